"""experiments/paper.py and controls.py: their arithmetic and what each control replaces."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, error_line

import rollout
import train
from experiments import controls, paper
from support import models


@pytest.fixture
def run(tmp_path):
    """A run written by hand: rewards 0.1, 0.2, 0.2 and 0.5 after 0, 10, 20 and 30 updates."""
    config = dict(steps=30, algorithm="sol_rl", pool=96, keep=24, precision="nvfp4")
    config |= dict(explore_steps=6, rollout_steps=10, timestep_fraction=0.6, prompts_per_step=2)
    log = [{"step": n, "eval/reward": r} for n, r in ((0, 0.1), (10, 0.2), (20, 0.2), (30, 0.5))]
    log.insert(1, {"step": 1, "loss": 1.0})
    (tmp_path / "config.json").write_text(json.dumps(dict(config=config)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "made.json").write_text("{}")
    return paper.Run(tmp_path)


def test_a_milestone_is_interpolated_between_evaluations(run):
    assert run.reach(0.1) == 0
    assert run.reach(0.15) == pytest.approx(5)
    assert run.reach(0.2) == pytest.approx(10)  # the first of the two evaluations with this reward
    assert run.reach(0.4) == pytest.approx(20 + 10 * 2 / 3)
    assert run.reach(0.6) == math.inf
    assert run.gain == pytest.approx(0.4) and run.reward_at_half == 0.2
    assert [run.reward_at(share) for share in (0.1, 0.7, 0.9)] == [0.1, 0.2, 0.5]


def test_the_cost_of_an_update_in_evaluations_of_the_model(run):
    """By hand: 96 x 6 + 24 x 10 to draw, 24 x 6 times x 5 to train."""
    assert paper.evaluations(run.config) == (816, 720)
    run.config.algorithm = "naive_scaling"
    assert paper.evaluations(run.config) == (960, 720)
    run.config.algorithm = "diffusionnft"
    assert paper.evaluations(run.config) == (240, 720)


def test_milestones_of_two_runs_by_hand(run, monkeypatch):
    """24 of 24 has gained half, 0.2, after 20 + 10 / 3 updates of 2 x 960 evaluations. A run that
    is twice as fast needs half of them, of 2 x 1536."""
    runs = {}
    for algorithm in ("sol_rl", "diffusionnft"):
        config = SimpleNamespace(**vars(run.config) | dict(algorithm=algorithm))
        steps = [0, 5, 10, 15] if algorithm == "sol_rl" else run.steps
        faster = SimpleNamespace(config=config, steps=steps, rewards=run.rewards)
        faster.reach = lambda reward, run=faster: paper.Run.reach(run, reward)
        runs["flux", algorithm] = [faster]
    monkeypatch.setattr(paper, "run_variants", lambda given, variants: runs)
    text, _ = paper.milestones(SimpleNamespace(models=["flux"], seeds=[0]))
    row = text.splitlines()[-3].split(" | ")
    assert row[:5] == ["| flux", "50%", "23.3", "11.7", "44.8"]
    assert row[5] == "35.8; 1.25"  # 2 x 960 / 1536
    assert row[6] == "26.4; 1.70"  # the rollout at 960 / 2.33: 2 x 960 / (412 + 720)
    assert row[7] == "1.9 |"


def test_means_have_errors_and_runs_that_do_not_get_there_are_counted():
    assert paper.show([0.1, 0.2, 0.3], "+.2f") == "+0.20 ± 0.06"
    assert paper.show([0.5]) == "0.500"
    assert paper.show([1.0, math.inf, 2.0]) == "not reached by 1 of 3"


def test_leads_are_of_pairs_of_one_seed_and_pooled_over_models():
    """Leads of 0.1 and 0.3: 0.2 ± 0.1, whatever the two runs of a pair have in common."""

    def runs(*rewards):
        return [
            SimpleNamespace(
                steps=[0, 1], rewards=[0, r], reward_at_half=0, reach=lambda _: 0.5, gain=r
            )
            for r in rewards
        ]

    table = {("sana", "a"): runs(0.5), ("sana", "b"): runs(0.4)}
    table |= {("flux", "a"): runs(0.9), ("flux", "b"): runs(0.6)}
    own = {"gain": (".1f", lambda run: run.gain)}
    given = SimpleNamespace(models=["sana", "flux"])
    lines = paper.compare(given, table, "a", {"a": "1", "b": "2"}, own).splitlines()
    assert lines[0].startswith("| model | variant | gain | lead at half | lead at the end |")
    assert lines[2] == "| sana | a | 0.5 |  |  |  | 1 |"
    assert lines[5] == "| flux | b | 0.6 | +0.0000 | +0.3000 | 50% | 2 |"
    pooled = "| sana + flux | b |  | +0.0000 | +0.2000 ± 0.1000 | 50% | 2 |"
    assert lines[6:] == [pooled]


def test_a_section_replaces_only_itself():
    page = paper.replace_section("# Results\n\n", "pool", "old\n")
    page = paper.replace_section(page, "kept", "kept\n")
    page = paper.replace_section(page, "pool", "new\n")
    assert page == (
        "# Results\n\n<!-- pool -->\nnew\n<!-- end of pool -->\n"
        "<!-- kept -->\nkept\n<!-- end of kept -->\n"
    )


def test_a_section_counts_a_run_once_that_serves_several_variants(run, tmp_path):
    made = dict(commit="abc", machine="a CPU")
    run.made = made | dict(seconds=60.0)
    other = SimpleNamespace(folder=tmp_path / "other", made=made | dict(seconds=30.0))
    text = paper.section("Title", "command", 0.0, "text", {"a": [run], "b": [run, other]})
    made = "(commit abc; a CPU; 2 runs, two at a time with one thread each, of 45 s)"
    assert text == f"## Title\n\n`command` {made}\n\ntext"


def test_folders_follow_from_the_options_alone():
    every = [options for variants in paper.VARIANTS.values() for options in variants.values()]
    every += paper.NAIVE_FP4.values()
    distinct = {json.dumps(options, sort_keys=True) for options in every}
    assert len({paper.folder_name(options) for options in every}) == len(distinct)
    assert paper.folder_name(dict(a=1, b=2)) == paper.folder_name(dict(b=2, a=1))


def test_a_complete_run_is_not_repeated_and_a_failed_one_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RUNS", tmp_path.parent)
    monkeypatch.setattr(paper, "folder_name", lambda options: tmp_path.name)
    monkeypatch.setattr(paper.subprocess, "run", None)  # would raise TypeError
    assert paper.finish({}).rewards == run.rewards
    monkeypatch.undo()
    monkeypatch.setattr(paper, "RUNS", tmp_path)
    with pytest.raises(paper.InputError, match="a run failed: train.py: error: .*--stepz"):
        paper.finish(dict(stepz=1))


@pytest.mark.parametrize(
    "words, error",
    [
        ("algorithm", "invalid choice: 'algorithm'"),
        ("pool --models sdxl", "invalid choice: 'sdxl'"),
        ("pool --options steps", "--options steps: must be NAME=VALUE"),
        ("pool --precision fp8", "unrecognized arguments: --precision fp8"),
        ("pool --options pool=4", "--options pool: cannot be chosen in this experiment"),
        ("kept --options seed=4", "--options seed: cannot be chosen in this experiment"),
        ("fidelity --prompts 73", "--prompts 73: must be from 1 to 72"),
        ("fidelity --seeds 1", "unrecognized arguments: --seeds 1"),
        ("fidelity --explore_steps 4", "--explore_steps 4: needs --precision"),
        ("fidelity --precision fp8 --explore_steps 0", "--explore_steps 0: must be at least 1"),
    ],
)
def test_bad_input_is_answered_in_a_line(words, error, capsys):
    def program():
        paper.main(words.split())

    assert paper.exit_code("paper.py", program) == 2
    assert error in error_line(capsys.readouterr().err, "paper.py")


# ---------------------------------------------------------------------------------------------
# Controls


REWARDS = torch.tensor([[0.1, 0.2, 0.6], [0.3, 0.3, 0.9]])


def loss_gradients(nft_loss, advantages):
    """Gradients (2,) by v of two samples of one number each: x_0 0, noise 1, t 1/2; v = v_old = 2,
    so that x_t = 1/2, x_0_hat = -1/2 and w = 1/2."""
    x_0, v = torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0, requires_grad=True)
    t = torch.tensor([0.5, 0.5])
    loss, _ = nft_loss(v, v.detach(), v.detach(), x_0 + 0.5, x_0, t, advantages, kl=0.0)
    loss.backward()
    return v.grad.flatten()


def test_negated_advantages_are_the_negative():
    assert torch.equal(controls.negated(REWARDS, 5.0, "all"), -train.group_advantages(REWARDS))


def test_weights_one_makes_r_one():
    assert torch.equal(controls.weights_one(REWARDS, 5.0, "all"), torch.full((2, 3), 5.0))


def test_advantage_weighted_regression_ignores_what_is_below_the_mean():
    """One sample's gradient with weight A: A (error^2 / w)' / 2 samples, where the derivative is
    2 x 1/2 x 1/2 / 1/2 = 1. NFT's has the same at v = v_old, but for a negative A too."""
    advantages = torch.tensor([3.0, -2.0])
    expected = torch.tensor([1.5, 0.0])
    assert torch.allclose(loss_gradients(controls.advantage_weighted, advantages), expected)
    assert torch.allclose(loss_gradients(train.nft_loss, advantages), torch.tensor([1.5, -1.0]))


def test_other_text_gives_each_prompt_the_text_of_another(monkeypatch):
    samples = [rollout.Candidates(i, f"text {i}", [], None, {}) for i in range(3)]
    monkeypatch.setattr(controls, "update", lambda run, samples, step: samples)
    changed = controls.other_text(None, samples, 0)
    assert [c.text for c in changed] == ["text 1", "text 2", "text 0"]
    assert [c.prompt for c in changed] == [0, 1, 2] and samples[0].text == "text 0"


def test_old_fixed_keeps_the_old_policy_alone(monkeypatch):
    etas = {}
    monkeypatch.setattr(controls, "follow", lambda _, follower, eta: etas.update({follower: eta}))
    controls.old_fixed(None, "old", 0.1)
    controls.old_fixed(None, "ema", 0.2)
    assert etas == {"old": 1.0, "ema": 0.2}


def test_every_layer_leaves_no_layer_in_bf16():
    model = SimpleNamespace(transformer=torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)}))
    for make_copy, kept in ((rollout.make_copy, True), (controls.every_layer, False)):
        _, rows = make_copy(model, "nvfp4", ("a",), 0)
        assert [row[3].startswith("kept") for row in rows] == [kept]


def test_controls_replace_what_train_calls(monkeypatch):
    for module, name, _ in controls.CONTROLS.values():
        monkeypatch.setattr(module, name, getattr(module, name))  # undone after the test
    controls.replace_functions("negated+every_layer+old_fixed")
    assert train.group_advantages is controls.negated
    assert train.rollout.make_copy is controls.every_layer
    assert train.models.follow is models.follow is controls.old_fixed
    assert train.nft_loss is not controls.advantage_weighted


def test_an_unknown_control_is_answered_in_a_line():
    command = [sys.executable, PROJECT / "experiments" / "controls.py", "negate", "--"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert error_line(done.stderr, "controls.py").startswith("negate: must be one of negated, ")
