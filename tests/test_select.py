"""Selection rules, rank fidelity, and the name that the standard library also uses."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT

from train import selection

REWARDS = [0.1, 0.9, 0.5, 0.9, -1.0, 0.3]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_best_worst_takes_the_best_falling_then_the_worst_rising(kind):
    assert selection.best_worst(kind(REWARDS), 4) == [1, 3, 4, 0]  # 0.9 0.9 | -1.0 0.1
    assert selection.best_worst(kind(REWARDS), 3) == [1, 4, 0]
    assert selection.best_worst(kind(REWARDS), 1) == [4]
    # of equal rewards the lower index is taken, and nobody is kept twice
    assert selection.best_worst(kind([7.0] * 5), 4) == [0, 1, 2, 3]


def test_the_other_rules():
    # The mean is 2.2. From the median, 0, the first would be the second farthest.
    assert selection.mean_deviation([1.0, 0.0, 0.0, 0.0, 10.0], 2) == [4, 1]
    chosen = selection.random_subset(REWARDS, 3)
    assert len(set(chosen)) == 3 and chosen == selection.random_subset(REWARDS, 3)
    assert sorted(selection.extremes_random(REWARDS, 6)) == [0, 1, 2, 3, 4, 5]
    mixed = selection.extremes_random(list(range(100)), 24)
    assert mixed[:2] == [99, 0] and len(set(mixed)) == 24
    assert sorted(mixed)[1:-1] != [*range(1, 12), *range(88, 99)]  # as best_worst would


@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("pool, k", [([], 1), ([1.0], 2), ([1.0], 0), ([1.0, float("nan")], 1)])
def test_rules_have_their_names_and_refuse_bad_pools(rule, pool, k):
    assert selection.RULES[rule] is getattr(selection, rule)
    with pytest.raises(ValueError, match=f"cannot keep {k} of|reward 1 of the pool is NaN"):
        selection.RULES[rule](pool, k)


def test_rank_fidelity_by_hand():
    got = selection.rank_fidelity([4, 3, 1, 2], [40, 30, 20, 10], 2)
    # one of six pairs is turned round: tau (5 - 1) / 6; rho 1 - 6 * 2 / (4 * 15)
    assert (got["kendall_tau"], got["spearman_rho"]) == pytest.approx((4 / 6, 0.8))
    assert (got["top_match"], got["top_rank"]) == (1, 1.5)
    assert (got["bottom_match"], got["bottom_rank"]) == (1, 3.5)
    # With proxy and truth exchanged these ranks would be 4 and 3.
    got = selection.rank_fidelity([1, 4, 3, 2], [4, 3, 2, 1], 1)
    assert (got["top_rank"], got["bottom_rank"]) == (2, 1)
    order = list(range(96))
    same = selection.rank_fidelity(order, order, 12)
    assert (same["top_rank"], same["bottom_rank"]) == (6.5, 90.5)  # Table 8's ideal
    with pytest.raises(ValueError):
        selection.rank_fidelity([1, 2], [1, 2, 3], 1)


def test_correlations_with_ties_are_tau_b_and_that_of_mean_ranks():
    # scipy.stats.kendalltau([1, 2, 2, 3], [1, 2, 3, 3]) and spearmanr, scipy 1.17
    got = selection.rank_fidelity([1, 2, 2, 3], [1, 2, 3, 3], 1)
    assert (got["kendall_tau"], got["spearman_rho"]) == pytest.approx((0.8, 0.8333333333333333))
    assert math.isnan(selection.rank_fidelity([1, 1], [1, 2], 1)["kendall_tau"])


def test_ties_give_expected_values():
    # The proxy's best 2 are candidate 0 and, with probability 1/2 each, 1 or 2. Truly the best 2
    # are 1 and, with probability 1/2 each, 0 or 3. True ranks are 2.5, 1, 4, 2.5.
    got = selection.rank_fidelity([3, 2, 2, 1], [5, 6, 4, 5], 2)
    assert got["top_match"] == (1 * 0.5 + 0.5 * 1) / 2
    assert got["top_rank"] == (2.5 + 0.5 * 1 + 0.5 * 4) / 2
    # Each of three equal candidates is the proxy's worst with probability 1/3; truly 0 is.
    got = selection.rank_fidelity([0, 0, 0, 1], [1, 2, 3, 4], 1)
    assert (got["bottom_match"], got["bottom_rank"]) == pytest.approx((1 / 3, (4 + 3 + 2) / 3))
    # Rewards 0 and 1 that are independent give what no information gives: 12 / 96, (96 + 1) / 2.
    got = selection.rank_fidelity([0, 0, 1, 1] * 24, [0, 1, 0, 1] * 24, 12)
    for side in ("top", "bottom"):
        assert (got[f"{side}_match"], got[f"{side}_rank"]) == pytest.approx((0.125, 48.5))


# Some interpreters have the standard library's module built in, and others do not.
PYTHONS = [sys.executable] + [p for p in [shutil.which("python3", path="/usr/bin")] if p]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_standard_librarys_users_of_select_work_in_the_project_folder(python):
    code = (
        "import selectors, subprocess, asyncio, select, sys;"
        "selectors.DefaultSelector(); subprocess.run(['true']); asyncio.run(asyncio.sleep(0));"
        "assert not {'torch', 'numpy'} & set(sys.modules);"
        "print(select.select([], [], [], 0), hasattr(select, 'best_worst'))"
    )
    out = subprocess.run([python, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "([], [], []) False", out.stderr
