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


def test_ties_go_to_the_lower_index_and_nobody_is_kept_twice():
    assert selection.best_worst([7.0] * 5, 4) == [0, 1, 2, 3]
    assert sorted(selection.best_worst([7.0] * 5, 5)) == [0, 1, 2, 3, 4]


def test_the_other_rules():
    assert selection.mean_deviation([0.0, 0.0, 0.0, 10.0], 1) == [3]
    assert selection.mean_deviation([1.0, -1.0, 0.0], 2) == [0, 1]
    chosen = selection.random_subset(REWARDS, 3, seed=1)
    assert len(set(chosen)) == 3 and chosen == selection.random_subset(REWARDS, 3, seed=1)
    mixed = selection.extremes_random(REWARDS, 4)
    assert mixed[:2] == [1, 4] and len(set(mixed)) == 4  # one highest, one lowest, random ones
    assert selection.extremes_random(REWARDS, 2) == [1, 4]
    assert sorted(selection.extremes_random(REWARDS, len(REWARDS))) == list(range(len(REWARDS)))
    mixed = selection.extremes_random(list(range(100)), 24)
    assert mixed[:2] == [99, 0] and len(set(mixed)) == 24
    assert sorted(mixed)[1:-1] != [*range(1, 12), *range(88, 99)]  # as best_worst would


def test_the_rules_have_the_names_that_the_command_line_takes():
    names = {"best_worst", "random_subset", "mean_deviation", "extremes_random"}
    assert selection.RULES.keys() == names
    assert all(selection.RULES[name] is getattr(selection, name) for name in names)


@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("pool, k", [([], 1), ([1.0], 2), ([1.0], 0), ([1.0, float("nan")], 1)])
def test_bad_pools_are_refused(rule, pool, k):
    with pytest.raises(ValueError):
        selection.RULES[rule](pool, k)


def test_rank_fidelity_by_hand():
    got = selection.rank_fidelity([4, 3, 1, 2], [40, 30, 20, 10], 2)
    # one of six pairs is turned round: tau (5 - 1) / 6; rho 1 - 6 * 2 / (4 * 15)
    assert got["kendall_tau"] == pytest.approx(4 / 6)
    assert got["spearman_rho"] == pytest.approx(0.8)
    assert (got["top_match"], got["bottom_match"]) == (1, 1)
    assert (got["top_rank"], got["bottom_rank"]) == (1.5, 3.5)


def test_rank_fidelity_with_ties_is_tau_b():
    # scipy.stats.kendalltau([1, 2, 2, 3], [1, 2, 3, 3]) and spearmanr, scipy 1.17
    got = selection.rank_fidelity([1, 2, 2, 3], [1, 2, 3, 3], 1)
    assert got["kendall_tau"] == pytest.approx(0.8)
    assert got["spearman_rho"] == pytest.approx(0.8333333333333333)
    assert math.isnan(selection.rank_fidelity([1, 1], [1, 2], 1)["kendall_tau"])


def test_ties_of_the_worst_go_to_the_lower_index_too():
    got = selection.rank_fidelity([0, 0, 0, 1], [0, 1, 2, 3], 1)
    assert (got["bottom_match"], got["bottom_rank"]) == (1, 4)


def test_perfect_and_no_information_ranks_of_the_paper():
    order = list(range(96))
    same = selection.rank_fidelity(order, order, 12)
    assert (same["top_rank"], same["bottom_rank"]) == (6.5, 90.5)  # Table 8's ideal


USE = (
    "import selectors, subprocess, asyncio, select;"
    "selectors.DefaultSelector(); subprocess.run(['true']); asyncio.run(asyncio.sleep(0));"
    "print(select.select([], [], [], 0))"
)
PYTHONS = [sys.executable] + [p for p in [shutil.which("python3", path="/usr/bin")] if p]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_standard_librarys_users_of_select_work_in_the_project_folder(python):
    out = subprocess.run([python, "-c", USE], cwd=PROJECT, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "([], [], [])", out.stderr


@pytest.mark.parametrize("python", PYTHONS)
def test_pip_runs_in_the_project_folder(python):
    out = subprocess.run(
        [python, "-m", "pip", "--version"], cwd=PROJECT, capture_output=True, text=True
    )
    if "No module named pip" in out.stderr:
        pytest.skip("this interpreter has no pip")
    assert out.returncode == 0, out.stderr


def test_importing_it_as_select_hands_on_the_real_names_without_third_party_modules():
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r}); sys.modules.pop('select', None);"
        "import select; assert callable(select.select) and issubclass(select.error, OSError);"
        "assert not {'torch', 'numpy'} & set(sys.modules); print(hasattr(select, 'best_worst'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    built_in = "select" in sys.builtin_module_names
    assert out.stdout.strip() == str(not built_in), out.stderr
