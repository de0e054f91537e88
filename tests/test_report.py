"""The log, the pictures and the model card of a run."""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import lines
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from huggingface_hub import ModelCard
from matplotlib import pyplot as plt

from rollout import Candidates
from support import distributed
from support.errors import InputError
from support.options import Config
from support.report import Report, mean_and_error

OPTIONS = dataclasses.asdict(
    Config(
        model="flux",
        reward="clipscore:2,mine.py:red",
        steps=4,
        rollout_steps=10,
        eval_steps=28,
        resolution=512,
    )
)
SECONDS = dict(explore=1.0, select=0.5, regenerate=2.0, reward=3.0, train=4.0)
METRICS = {
    "reward/mean": 0.5,
    "reward/worst": 0.25,
    "reward/best": 0.75,
    "fidelity/kept_kendall_tau": math.nan,
    "loss": 1.0,
    "kl": 1e-5,
    "grad_norm": 0.125,
}


def options_of(folder, **changes):
    return OPTIONS | dict(output_dir=str(folder)) | changes


def report(folder, **changes):
    names = ["clipscore", "mine.py:red"], ["mine.py:blue"]
    return Report(options_of(folder, **changes), *names, work=(7, 100))


def scores(*values):
    """Of two held-out prompts each."""
    return {name: list(values) for name in ("weighted_sum", "clipscore", "mine.py:blue")}


def two_steps(run, before={}, after={}):
    """Steps 1 and 2, with evaluations before and after them. before, after: more scores."""
    run.evaluated(0, scores(1.0, 3.0) | before, 5.0)
    run.step(1, METRICS, SECONDS)
    run.step(2, METRICS, SECONDS)
    run.evaluated(2, scores(2.0, 6.0) | after, 5.0)


def test_a_mean_and_its_error_by_hand():
    # Deviations -1 and 1: the standard deviation is sqrt(2), the error sqrt(2) / sqrt(2).
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    mean, error = mean_and_error([4.0])
    assert mean == 4 and math.isnan(error)


def test_each_step_is_a_line_and_an_evaluation_joins_the_line_of_its_step(tmp_path, capsys):
    with report(tmp_path / "run") as run:
        two_steps(run)
        assert [run.is_evaluated(step) for step in range(4)] == [True, False, True, False]
    first, second, third = lines(tmp_path / "run")
    assert first == {
        "step": 0,
        "eval/weighted_sum": 2.0,
        "eval/clipscore": 2.0,
        "eval/mine.py:blue": 2.0,
        "eval/reward": 2.0,
        "eval/standard_error": pytest.approx(1.0),
        "time/evaluate": 5.0,
        "eval/rewards": [1.0, 3.0],
    }
    logged = METRICS | {f"time/{stage}": value for stage, value in SECONDS.items()}
    assert second == {"step": 1} | logged | {"fidelity/kept_kendall_tau": None}  # JSON has no NaN
    # Gains of 1 and 3: their mean is 2, its error 1, although that of the mean 4 is 2.
    assert third["eval/gain"] == 2 and third["eval/gain_standard_error"] == pytest.approx(1.0)
    assert third["eval/standard_error"] == pytest.approx(2.0) and third["loss"] == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step    0  held-out reward 2.0000 +- 1.0000"
    assert said[1] == (
        "step    1  reward 0.5000 (0.250 to 0.750)  tau of the kept nan  loss 1.000  kl 1.0e-05  "
        "grad 0.12  explore 1.0s  select 0.5s  regenerate 2.0s  reward 3.0s  train 4.0s"
    )
    assert said[3] == "step    2  held-out reward 4.0000 +- 2.0000  gain +2.0000 +- 1.0000"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_resumed_log_goes_on_as_that_of_the_unstopped_run(step, tmp_path):
    with report(tmp_path / "whole") as run:
        two_steps(run)
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text((tmp_path / "whole" / "metrics.jsonl").read_text() + '{"step": 3, "lo')
    with report(tmp_path / "run") as run:
        run.resume(step)
        assert [line["step"] for line in lines(tmp_path / "run")] == list(range(step + 1))
        assert run.is_evaluated(step) == (step != 1)
        # 7 units of work a step and 100 an evaluation, before the first step and after the last.
        assert run.bar.n == 100 + 7 * step and run.bar.total == 4 * 7 + 2 * 100
        for later in range(step + 1, 3):
            run.step(later, METRICS, SECONDS)
        if step < 2:
            run.evaluated(2, scores(2.0, 6.0), 5.0)
    assert log.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "text", ["", "[]\n", '{"step": 0}\n', '{"step": 0}\n{"step": 2}\n', '{"step": 0}\n{"st\n', "1"]
)
def test_a_log_without_the_steps_before_is_refused(text, tmp_path):
    with report(tmp_path) as run:
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError, match="does not have the steps 0 to 1; start a new run"):
            run.resume(1)
        assert (tmp_path / "metrics.jsonl").read_text() == text
        run.resume(0)  # a run may have stopped before its first evaluation was logged


def test_what_a_finished_run_leaves_and_says(tmp_path, capsys):
    with report(tmp_path / "run") as run:
        run.begin("simulated", [["to_q", 8, 16, "nvfp4"]], ["the work", "a note"])
        two_steps(run)
        result = run.finish()
    assert result == (
        "2.0000 +- 1.0000 before, 4.0000 +- 2.0000 after 2 steps; gain +2.0000 +- 1.0000, "
        "2.0 standard errors"
    )
    said = capsys.readouterr().out
    options, begun = said[: said.index("step    0")].split("\nsimulated\n")
    assert {"pool=96", "keep=24"} < set(options.split()) and "prompts=" not in options.split()
    assert begun == "the work\na note\n"
    assert f"held-out reward: {result}" in said
    assert "evaluate 10s  explore 2s  select 1s  regenerate 4s  reward 6s  train 8s" in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "curve.png"}
    assert {line.split("/")[-1] for line in said.splitlines() if "wrote" in line} == names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"] == options_of(tmp_path / "run") and config["backend"] == "simulated"
    assert config["layers"] == [["to_q", 8, 16, "nvfp4"]]
    assert config["versions"].keys() == {"torch", "diffusers", "transformers", "peft"}


JUDGED = [
    {"accuracy": [0.0, 0.5], "clear": [1.0, 0.5]},
    {"accuracy": [1.0, 0.5], "clear": [1.0, 1.0]},
]


def test_a_tiny_run_says_how_many_pictures_match_their_prompt(tmp_path, capsys):
    with report(tmp_path) as run:
        two_steps(run, *JUDGED)
        run.finish()
    first, _, last = lines(tmp_path)
    assert (first["eval/accuracy"], first["eval/clear"]) == (0.25, 0.75)
    assert (last["eval/accuracy"], last["eval/clear"], last["eval/reward"]) == (0.75, 1, 4)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("+- 1.0000  pictures that match their prompt 25%")
    assert said[3].endswith("gain +2.0000 +- 1.0000  pictures that match their prompt 75%")
    assert "pictures that match their prompt: 25% before, 75% after (clear: 75%, 100%)" in said


def test_the_curve_shows_the_paired_gain_then_accuracy_then_what_is_only_measured(
    tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    for more in ({}, {}), JUDGED:
        with report(tmp_path) as run:
            two_steps(run, *more)
            run.finish()
    plain, judged = ([axis.get_ylabel() for axis in figure.axes] for figure in figures)
    gain, measured = "gain in held-out reward", "mine.py:blue\n(not trained on)"
    assert plain == [gain, measured] and judged == [gain, "share of pictures", measured]
    top, shares, _ = figures[1].axes
    line, _, (bars,) = top.containers[0]
    assert line.get_xydata().tolist() == [[0, 0], [2, 2]]
    lengths = [float(ends[1, 1] - ends[0, 1]) for ends in bars.get_segments()]
    assert lengths == [0, pytest.approx(2.0)]  # the gain's error is 1
    assert [line.get_ydata().tolist() for line in shares.lines] == [[0.25, 0.75], [0.75, 1]]


def test_before_and_after_stand_below_each_other_with_reward_and_mark(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    prompts, images = (
        ["a small plain red ring at the top", "a $5 cat for $6"],
        torch.rand(2, 3, 4, 4),
    )
    scores = {"weighted_sum": torch.tensor([0.5, 0.25])}
    with report(tmp_path) as run:
        run.before_after(prompts, [("base model", images, scores)])
        judged = [scores | {"accuracy": torch.tensor(marks)} for marks in ([0.0, 1.0], [1.0, 1.0])]
        rows = [("base model", images, judged[0]), ("after 4 steps", images / 2, judged[1])]
        run.before_after(prompts, rows)
    assert (tmp_path / "before_after.png").stat().st_size > 0
    plain, marked = figures
    assert [axis.get_xlabel() for axis in plain.axes] == ["0.500", "0.250"]
    assert [axis.get_xlabel().split() for axis in marked.axes] == [
        ["0.500", "✗"],
        ["0.250", "✓"],
        ["0.500", "✓"],
        ["0.250", "✓"],
    ]
    assert [axis.get_ylabel() for axis in marked.axes] == ["base model", "", "after 4 steps", ""]
    assert [axis.get_title().replace("\n", " ") for axis in marked.axes] == [*prompts, "", ""]
    shown = [axis.images[0].get_array() for axis in marked.axes]
    assert (shown[1] == 2 * shown[3]).all()


def test_only_the_first_process_writes_but_all_know_what_is_evaluated(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "RANK", 1)
    with report(tmp_path / "run", report_to="wandb") as run:
        run.begin("simulated", [], [])
        two_steps(run)
        run.picture(1, "a cat", [("", candidates([0], [0.5]))], decode)
        assert "2.0 standard errors" in run.finish()
        run.card(model(), "")
        assert run.is_evaluated(2) and not run.is_evaluated(1)
    assert not (tmp_path / "run").exists() and capfd.readouterr().out == ""


def candidates(seeds, rewards):
    """One-pixel latents that show their seed."""
    latents = torch.tensor(seeds).reshape(-1, 1, 1, 1) / 16
    return Candidates(0, None, seeds, latents, {"weighted_sum": torch.tensor(rewards)})


def decode(latents):
    """Each pixel becomes 4 x 4 of its colour."""
    return latents.expand(-1, 3, 4, 4)


def test_a_picture_has_a_row_for_each_stage_and_a_column_for_each_seed_it_trained_on(
    tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    # Seed 7 was explored, but the last stage did not draw it.
    explored = candidates([1, 7, 3, 2], [0.125, 0.25, 0.375, 0.5])
    trained = candidates([3, 1, 2], [0.75, 1.0, 0.625])
    with report(tmp_path) as run:
        rows = [("explore, nvfp4", explored), ("regenerate, bf16", trained)]
        run.picture(7, "a $5 cat", rows, decode)
        run.picture(8, "a cat", [("", candidates([5], [0.5]))], decode)
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"step_0007.png", "step_0008.png"}
    two, one = figures
    assert two.get_suptitle() == "a $5 cat: kept candidates, step 7"
    # From the explorer's best to its worst; each row has the rewards of its own.
    shown = [axis.images[0].get_array().max() * 16 for axis in two.axes]
    assert shown == [2, 3, 1] * 2
    titles = ["0.500", "0.375", "0.125", "0.625", "0.750", "1.000"]
    assert [axis.get_title() for axis in two.axes] == titles
    labels = [axis.get_ylabel() for axis in two.axes]
    assert labels == ["explore, nvfp4", "", "", "regenerate, bf16", "", ""]
    assert len(one.axes) == 1 and one.axes[0].get_title() == "0.500"


def test_of_many_candidates_a_picture_shows_the_four_best_and_the_four_worst(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    seeds = [4, 9, 0, 7, 2, 5, 8, 1, 6, 3]
    with report(tmp_path) as run:
        run.picture(1, "a cat", [("", candidates(seeds, [seed / 8 for seed in seeds]))], decode)
    shown = [axis.images[0].get_array().max() * 16 for axis in figures[0].axes]
    assert shown == [9, 8, 7, 6, 3, 2, 1, 0]


def test_a_tracker_gets_the_same_numbers(tmp_path, monkeypatch):
    calls, logged = [], []
    wandb = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings),
        log=lambda metrics, step: logged.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with report(tmp_path / "run", report_to="wandb") as run:
        two_steps(run)
    assert calls[0]["config"] == options_of(tmp_path / "run", report_to="wandb")
    assert calls[0]["id"] == "run" and calls[1] == "finish"
    assert [step for step, _ in logged] == [0, 1, 2, 2]
    assert logged[1][1]["loss"] == 1 and logged[3][1]["eval/gain"] == 2
    assert all(isinstance(value, float) for _, metrics in logged for value in metrics.values())


def model(variant=None):
    """As much of a models.Model as the card needs."""
    return types.SimpleNamespace(
        pipeline=FluxPipeline,
        published="black-forest-labs/FLUX.1-dev",
        variant=variant,
        scheduler=lambda steps: FlowMatchEulerDiscreteScheduler(shift=steps),
        call=lambda steps: {"sigmas": f"[1.0] * {steps}", "max_sequence_length": 16},
    )


@pytest.mark.parametrize(
    "pretrained, variant, base, load",
    [
        ("", None, None, "'support/tiny/flux'"),
        ("published", None, "black-forest-labs/FLUX.1-dev", "'black-forest-labs/FLUX.1-dev'"),
        ("published", "bf16", "black-forest-labs/FLUX.1-dev", "'black-forest-labs/FLUX.1-dev'"),
        ("some/one", "bf16", "some/one", "'some/one'"),
        (str(Path(__file__).parent), None, None, repr(str(Path(__file__).parent))),  # a folder
    ],
)
def test_the_model_card_tells_how_to_draw_with_the_lora(pretrained, variant, base, load, tmp_path):
    with report(tmp_path, pretrained=pretrained) as run:
        run.evaluated(0, scores(1.0, 3.0), 5.0)
        run.step(1, METRICS, SECONDS)
        run.card(model(variant), "better by 2")
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == base
    assert "Trained for 1 steps on the reward `clipscore:2,mine.py:red`" in card.text
    assert "Held-out reward: better by 2." in card.text
    options = card.text.split("```json\n")[1].split("```")[0]
    assert json.loads(options) == options_of(tmp_path, pretrained=pretrained)
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "from diffusers import FluxPipeline, FlowMatchEulerDiscreteScheduler" in code
    assert f"base = {load}\n" in code
    assert ('variant="bf16"' in code) == (variant is not None and pretrained == "published")
    call = "num_inference_steps=28, height=512, width=512, sigmas=[1.0] * 28, max_sequence_length"
    assert f"{call}=16)" in code
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora")
    assert loaded.config.shift == 10  # the one of the rollout's steps
