"""The log, the pictures and the model card of a run."""

import dataclasses
import json
import math
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from conftest import PROJECT, lines
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image

import train
from rollout import Candidates
from support import distributed, models
from support.errors import InputError
from support.report import Report, commit

SECONDS = {"explore": 1.0, "train": 4.0}
METRICS = {"reward/mean": 0.5, "reward/worst": 0.25, "reward/best": 0.75, "loss": 1.0, "kl": 1e-5}
METRICS |= {"fidelity/kept_kendall_tau": math.nan, "grad_norm": 0.125}


def candidates(seeds, rewards, prompts=None, **scores):
    """One-pixel latents that show their seed."""
    latents = torch.tensor(seeds).reshape(-1, 1, 1, 1) / 16
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    scores["weighted_sum"] = torch.tensor(rewards)
    return Candidates(prompts or [0] * len(seeds), None, seeds, latents, scores)


KEPT = [candidates([1, 2], [0.25, 0.5])] * 2
SCORES = {  # two images of each of two held-out prompts, before and after training
    "weighted_sum": ([0.5, 1.5, 2.0, 4.0], [2.5, 1.5, 4.0, 8.0]),
    "clipscore": ([0.5, 1.5, 2.0, 4.0], [2.5, 1.5, 4.0, 8.0]),
    "mine.py:red": ([0.0] * 4, [0.0] * 4),
    "mine.py:blue": ([0.0, 0.0, 1.0, 1.0], [0.0] * 4),
    "accuracy": ([0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]),
    "clear": ([1.0, 1.0, 1.0, 0.0], [1.0] * 4),
}
PARTS = [("clipscore", 2, None), ("mine.py:red", 1, None)]
MEASURED = [(name, 0, None) for name in ("mine.py:blue", "accuracy", "clear")]


def report(folder, **options):
    """The Report of as much of a run as it reads: 2 steps of one prompt, 2 held-out prompts."""
    settings = dict(model="flux", reward="clipscore:2,mine.py:red", steps=2, eval_every=2)
    settings |= dict(prompts_per_step=1, pool=4, keep=2, explore_steps=3, rollout_steps=5)
    c = train.Config(**settings, eval_steps=28, output_dir=str(folder), device="cpu", **options)
    c.checkpoint = types.SimpleNamespace(step=1)  # of a run that is resumed
    drawing = types.SimpleNamespace(
        pipeline=FluxPipeline,
        published="black-forest-labs/FLUX.1-dev",
        variant="bf16",
        computes_in="float32",
        scheduler=lambda steps: FlowMatchEulerDiscreteScheduler(shift=steps),
        call=lambda steps: {"sigmas": f"[1.0] * {steps}", "max_sequence_length": 16},
        decode=lambda latents: latents.expand(-1, 3, 4, 4),
    )
    run = types.SimpleNamespace(
        config=c,
        model=drawing,
        num_candidates=4,
        stages=train.ALGORITHMS["sol_rl"](c)[1],
        train=types.SimpleNamespace(prompts=["a $5 cat"]),
        held_out=types.SimpleNamespace(prompts=["a ring", "a $5 cat"]),
        clock=types.SimpleNamespace(take=SECONDS.copy),
        reward=types.SimpleNamespace(parts=PARTS),
        eval_reward=types.SimpleNamespace(parts=PARTS + MEASURED),
        backends=["explored in simulated nvfp4"],
        layers=[["to_q", 8, 16, "nvfp4"]],
        notes=["a note"],
    )
    return Report(run, dataclasses.asdict(c), num_times=2)


def evaluated(run, step):
    scores = {name: values[step > 0] for name, values in SCORES.items()}
    run.evaluated(
        step, candidates([1, 2, 3, 4], scores.pop("weighted_sum"), [0, 0, 1, 1], **scores)
    )


def two_steps(run):
    """Steps 1 and 2, with evaluations before and after them."""
    evaluated(run, 0)
    run.step(1, METRICS, KEPT)
    run.step(2, METRICS, KEPT)
    evaluated(run, 2)


def test_each_step_is_a_line_and_an_evaluation_joins_the_line_of_its_step(tmp_path, capsys):
    with report(tmp_path) as run:
        capsys.readouterr()
        two_steps(run)
        assert [run.is_evaluated(step) for step in range(4)] == [True, False, True, False]
    first, second, third = lines(tmp_path)
    seconds = {f"time/{stage}": value for stage, value in SECONDS.items()}
    evaluation = {"eval/reward": 2, "eval/weighted_sum": 2, "eval/clipscore": 2}
    evaluation |= {"eval/mine.py:red": 0, "eval/mine.py:blue": 0.5, "eval/accuracy": 0.25}
    # Deviations -1 and 1: the standard deviation is sqrt(2), the error sqrt(2) / sqrt(2).
    evaluation |= {"eval/clear": 0.75, "eval/rewards": [1, 3]}
    evaluation["eval/standard_error"] = pytest.approx(1.0)
    assert first == {"step": 0} | evaluation | seconds
    # JSON has no NaN.
    assert second == {"step": 1} | METRICS | seconds | {"fidelity/kept_kendall_tau": None}
    # Gains of 1 and 3: their mean is 2, its error 1, although that of the mean 4 is 2.
    assert third["eval/gain"] == 2 and third["eval/gain_standard_error"] == pytest.approx(1.0)
    assert third["eval/standard_error"] == pytest.approx(2.0) and third["loss"] == 1
    assert capsys.readouterr().out.splitlines()[::2] == [
        "step    0  held-out reward 2.0000 +- 1.0000  pictures that match their prompt 25%",
        "step    2  reward 0.5000 (0.250 to 0.750)  tau of the kept nan  loss 1.000  kl 1.0e-05  "
        "grad 0.12  explore 1.0s  train 4.0s",
    ]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_resumed_log_goes_on_as_that_of_the_unstopped_run(step, tmp_path):
    with report(tmp_path / "whole") as run:
        two_steps(run)
    (tmp_path / "run").mkdir()
    log, whole = (tmp_path / name / "metrics.jsonl" for name in ("run", "whole"))
    log.write_text(whole.read_text() + '{"step": 3, "lo')
    with report(tmp_path / "run") as run:
        run.resume(step)
        assert [line["step"] for line in lines(tmp_path / "run")] == list(range(step + 1))
        # A step: 4 x 3 + 2 x 5 evaluations of the network, 2 x 2 pairs that cost 5 each. An
        # evaluation, before the first step and after the last: 2 x 2 images in 28 steps.
        assert run.bar.n == 42 * step + 112 * (2 if step == 2 else 1)
        assert run.bar.total == 42 * 2 + 112 * 2
        for later in range(step + 1, 3):
            run.step(later, METRICS, KEPT)
        if step < 2:
            evaluated(run, 2)
    assert log.read_text() == whole.read_text()


@pytest.mark.parametrize("text", ["", '{"step": 0}\n'])
def test_a_log_without_the_steps_before_is_refused(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with report(tmp_path) as run:
        with pytest.raises(InputError, match="start a new run"):
            run.resume(1)
        assert (tmp_path / "metrics.jsonl").read_text() == text
        run.resume(0)  # a run may have stopped before its first evaluation was logged


@pytest.fixture
def figures(monkeypatch):
    """{name of a file: the Figure that was written there}."""
    found, savefig = {}, Figure.savefig

    def recorded(figure, path, **how):
        found[path.name.removeprefix("unfinished.")] = figure
        savefig(figure, path, **how)

    monkeypatch.setattr(Figure, "savefig", recorded)
    monkeypatch.setattr(models, "save_lora", lambda model, adapter, folder: folder.mkdir())
    return found


def shown(figure):
    """Of each picture: the seed that it shows, title, label of its row, and what stands below."""
    texts = "get_title", "get_ylabel", "get_xlabel"
    return [
        (16 * axis.images[0].get_array().max(), *(getattr(axis, text)() for text in texts))
        for axis in figure.axes
    ]


def test_what_a_finished_run_leaves_and_says(tmp_path, capsys, figures):
    with report(tmp_path) as run:
        assert not any(tmp_path.iterdir())  # nothing before the first evaluation
        two_steps(run)
        run.finish()
    said = capsys.readouterr().out
    assert said.startswith("model=flux  algorithm=sol_rl  reward=clipscore:2,mine.py:red")
    assert "explored in simulated nvfp4\nan iteration: 1 prompts x 4 candidates, 2 of each" in said
    assert "\na note\nstep    0" in said
    result = "2.0000 +- 1.0000 before, 4.0000 +- 2.0000 after 2 steps; gain +2.0000 +- 1.0000"
    assert f"held-out reward: {result}, from too few held-out prompts" in said
    assert "explore 4s  train 16s" in said
    names = "before_after.png, config.json, curve.png, images, lora, metrics.jsonl, progress.webp"
    assert f"wrote {tmp_path}: {names}" in said
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"] == run.options and config["layers"] == [["to_q", 8, 16, "nvfp4"]]
    assert config["versions"].keys() == {"torch", "diffusers", "transformers", "peft"}
    assert config["commit"] == commit()

    gain, part, _, measured, *shares = figures["curve.png"].axes
    assert gain.get_ylabel() == "gain in held-out reward"
    line, _, (bars,) = gain.containers[0]
    assert line.get_xydata().tolist() == [[0, 0], [2, 2]]
    lengths = [float(ends[1, 1] - ends[0, 1]) for ends in bars.get_segments()]
    assert lengths == [0, pytest.approx(2.0)]  # the gain's error is 1
    assert part.get_ylabel() == "clipscore\n(part of the reward)"
    assert part.lines[0].get_ydata().tolist() == [2, 4]
    assert measured.get_ylabel() == "mine.py:blue\n(not trained on)"
    assert measured.lines[0].get_ydata().tolist() == [0.5, 0]
    assert [share.lines[0].get_ydata().tolist() for share in shares] == [[0.25, 0.75], [0.75, 1]]
    assert "pictures that match their prompt: 25% before, 75% after (clear: 75%, 100%)" in said
    assert shown(figures["held_out_0000.png"]) == [
        (1, "a ring", "before training", "0.500  ✗"),
        (3, "a $5 cat", "", "2.000  ✓"),
    ]
    assert shown(figures["held_out_0002.png"])[0] == (1, "a ring", "after 2 steps", "2.500  ✓")
    film, ends = (Image.open(tmp_path / name) for name in ("progress.webp", "before_after.png"))
    assert film.n_frames == 2 and ends.size == (film.width, 2 * film.height)


def test_a_run_that_is_stopped_before_its_second_evaluation_leaves_all_files(tmp_path, figures):
    with report(tmp_path) as run:
        evaluated(run, 0)
        run.step(1, METRICS, KEPT)
        run.finish()
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "Trained for 1 steps" in card and "Held-out reward: 2.0000 +- 1.0000 before.\n" in card
    film, ends = (Image.open(tmp_path / name) for name in ("progress.webp", "before_after.png"))
    assert film.n_frames == 1 and ends.size == film.size


def test_with_enough_held_out_prompts_the_gain_is_said_in_standard_errors(
    tmp_path, figures, capsys
):
    with report(tmp_path) as run:
        run.run.held_out.prompts = ["a ring"] * 8
        run.run.reward.parts = run.run.eval_reward.parts = [("clipscore", 1, None)]
        for step, rewards in ((0, [0.0] * 8), (2, [1.0, 3.0] * 4)):
            run.evaluated(step, candidates([1] * 8, rewards, [*range(8)], clipscore=rewards))
        run.finish()
    # The deviations from 2 are all 1: the variance is 8 / 7, the error is sqrt(8 / 7 / 8).
    assert f"{2 * 7**0.5:.1f} standard errors" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Glyph")  # of the second drawing, below
@pytest.mark.parametrize("prompt", ["a very long prompt " * 12, "一只在月球上弹钢琴的猫，" * 12])
def test_every_title_stays_inside_its_picture_and_no_missing_font_is_warned_of(
    prompt, tmp_path, figures
):
    with report(tmp_path) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        run.run.train.prompts = run.run.held_out.prompts = [prompt] * 2
        run.run.reward.parts = [(f"a_long_name_of_a_file.py:red_{i}", 1, None) for i in range(4)]
        two_steps(run)
        run.finish()
    for name, figure in figures.items():
        figure.draw_without_rendering()
        labels = [label for axis in figure.axes for label in (axis.title, axis.yaxis.label)]
        for text in [text for text in figure.texts + labels if text.get_text()]:
            box = text.get_window_extent()
            assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name


def test_a_picture_has_a_row_for_each_stage_and_a_column_for_each_seed_it_trained_on(
    tmp_path, figures
):
    """From the explorer's best to its worst, and of many the four best and the four worst."""
    # Seed 7 was explored, but the last stage did not draw it.
    explored = candidates([1, 7, 3, 2], [0.125, 0.25, 0.375, 0.5])
    trained = candidates([3, 1, 2], [0.75, 1.0, 0.625])
    many = candidates([4, 9, 0, 7, 2, 5, 8, 1, 6, 3], [4.0, 9, 0, 7, 2, 5, 8, 1, 6, 3])
    with report(tmp_path) as run:
        run.picture(7, [explored, trained])
        run.picture(8, [many])
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"step_0007.png", "step_0008.png"}
    two = figures["step_0007.png"]
    assert two.get_suptitle() == "step 7, kept candidates: a $5 cat"
    assert shown(two) == [
        (2, "", "explore, nvfp4", "0.500"),
        (3, "", "", "0.375"),
        (1, "", "", "0.125"),
        (2, "", "regenerate, float32", "0.625"),
        (3, "", "", "0.750"),
        (1, "", "", "1.000"),
    ]
    assert [seed for seed, *_ in shown(figures["step_0008.png"])] == [9, 8, 7, 6, 3, 2, 1, 0]


def test_only_the_first_process_writes_but_all_know_what_is_evaluated(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "RANK", 1)
    with report(tmp_path / "run", report_to="wandb") as run:
        two_steps(run)
        assert run.is_evaluated(2) and not run.is_evaluated(1)
    assert not (tmp_path / "run").exists() and capfd.readouterr().out == ""


def test_wandb_gets_the_same_numbers_and_each_folder_is_a_run_of_its_own(tmp_path, monkeypatch):
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("lr1/seed:0", "lr2/seed:0", "lr1/../lr1/seed:0"):
        with report(tmp_path / folder, report_to="wandb") as run:
            evaluated(run, 0)
    metrics, step = wandb.init.return_value.log.call_args.args
    assert step == 0 and metrics["eval/reward"] == 2
    first, second, again = (made.kwargs["id"] for made in wandb.init.call_args_list)
    assert first == again != second and first.isalnum()
    assert wandb.init.call_args.kwargs["name"] == "seed:0"


def test_tensorboard_purges_what_a_killed_run_logged_after_its_checkpoint(tmp_path, monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=Mock())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with report(tmp_path, report_to="tensorboard") as run:
        assert not module.SummaryWriter.called  # a writer makes the folder
        two_steps(run)
    with report(tmp_path, report_to="tensorboard", resume=str(tmp_path)) as run:
        run.resume(1)
        run.step(2, METRICS, KEPT)
    purged = [made.kwargs["purge_step"] for made in module.SummaryWriter.call_args_list]
    logged = module.SummaryWriter().add_scalar.call_args_list
    assert purged == [None, 2] and call("loss", 1.0, 1) in logged


@pytest.mark.parametrize(
    "pretrained, base, load",
    [
        ("", None, (PROJECT / "support/tiny/flux").as_posix()),
        ("published", *["black-forest-labs/FLUX.1-dev"] * 2),
        (str(PROJECT), None, str(PROJECT)),  # a folder, of which the hub should know nothing
    ],
)
def test_the_model_card_names_base_model_and_lora_so_that_its_code_runs_anywhere(
    pretrained, base, load, tmp_path, monkeypatch, figures
):
    monkeypatch.chdir(tmp_path)
    with report(Path("run"), pretrained=pretrained) as run:
        two_steps(run)
        run.finish()
    card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == base
    assert "Trained for 2 steps on the reward `clipscore:2,mine.py:red:1`" in card.text
    assert "Held-out reward: 2.0000 +- 1.0000 before, 4.0000" in card.text
    assert f"from_pretrained({load!r}, " in card.text and "manual_seed(0)" in card.text
    assert f"load_lora_weights({(tmp_path / 'run' / 'lora').as_posix()!r})" in card.text
    assert ('variant="bf16"' in card.text) == (pretrained == "published")
