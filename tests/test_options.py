"""The command line: what the options are, and what is said of bad input before a run begins."""

import dataclasses
import os

import pytest
import torch
from conftest import error_line

import train
from support import checkpoint, distributed, options
from support.errors import InputError

# A user's rewards, each wrong in its own way; whoever executes the file leaves a mark.
REWARD = """
def raises(i, p, m): raise ValueError("no")
def short(i, p, m): return [1.0]
def nan(i, p, m): return [float("nan")] * len(p)
open("EXECUTED", "a").close()
"""
PUBLISHED = "--prompts GOOD.txt --prompts_per_step 1 --pretrained"


def parse(*argv):
    return train.parse_options([str(word) for word in argv])


def stored(folder, *argv, **changes):
    """A run's folder that has nothing but a checkpoint of step 2, of these options."""
    saved = dataclasses.asdict(parse(*argv, "--output_dir", folder)) | changes
    optimizer = torch.optim.AdamW([torch.ones(2)])
    return checkpoint.save(folder, 2, {"default": [torch.ones(2)]}, optimizer, saved)


def test_defaults_are_the_papers_then_the_models_then_the_tiny_models():
    """Sol-RL's paper: N = 96, K = 24, 48 prompts, 6 and 10 steps, AdamW at 3e-4, rank 32; by model
    28 evaluation steps, .4 of the times and 512 pixels for FLUX.1, the clipping of SD3.5."""
    published = ["--pretrained", "--prompts", "p.txt"]
    tiny, sana, flux, sd3 = (
        parse("--model", name, *more)
        for name, more in [("sana", [])] + [(name, published) for name in ("sana", "flux", "sd3")]
    )
    of = lambda c, *names: tuple(getattr(c, name) for name in names)  # noqa: E731
    assert of(tiny, *train.TINY_DEFAULTS) == tuple(train.TINY_DEFAULTS.values())
    for config in (tiny, sana, flux, sd3):
        assert of(config, "pool", "keep", "explore_steps", "rollout_steps") == (96, 24, 6, 10)
    assert of(sana, "prompts_per_step", "learning_rate", "lora_rank") == (48, 3e-4, 32)
    assert of(sana, "min_dim", "timestep_fraction", "max_grad_norm") == (2240, 0.6, 1.0)
    assert of(flux, "resolution", "eval_steps", "timestep_fraction") == (512, 28, 0.4)
    assert of(sd3, "resolution", "eval_steps", "max_grad_norm") == (1024, 40, 0.002)
    assert [c.train_micro_batch for c in (sana, flux, sd3)] == [16, 12, 4]
    assert flux.pretrained == "published" and tiny.output_dir.startswith("runs/sana_sol_rl_")


def test_what_is_given_wins_constants_are_no_options_and_help_names_every_option(capsys):
    config = parse("--gradient_checkpointing", "false", "--kl", "0", "--keep", "6")
    assert (config.gradient_checkpointing, config.kl, config.keep) == (False, 0.0, 6)
    fields = dataclasses.fields(config)
    given = [field.name for field in fields if field.init]
    assert len(given) == 32 and len(fields) == 39
    assert train.main(["--help"]) == 0
    said = capsys.readouterr().out
    for field in fields:
        assert (f"--{field.name} " in said) == field.init
        if not field.init:
            with pytest.raises(InputError, match="unrecognized"):
                parse(f"--{field.name}", "1")


@pytest.mark.parametrize(
    "line, says",
    [
        ("--pol 3", "--pol"),
        ("extra", "extra"),
        ("--pool", "--pool: expected one argument"),
        ("--pool many", "--pool: invalid int value: 'many'"),
        ("--kl much", "--kl: invalid float value: 'much'"),
        ("--kl nan", "--kl nan: must be at least 0"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--learning_rate 0", "--learning_rate 0.0: must be at least 1e-30"),
        ("--micro_batch 0", "--micro_batch 0: must be at least 1"),
        ("--seed 99999999999999999999999", "--seed 99999999999999999999999"),
        ("--model dalle", "--model: invalid choice: 'dalle'"),
        ("--algorithm ppo", "--algorithm: invalid choice: 'ppo'"),
        ("--select all", "--select: invalid choice: 'all'"),
        ("--precision fp3", "--precision: invalid choice: 'fp3'"),
        ("--report_to wandb", "--report_to wandb: not installed; pip install wandb"),
        ("--keep 7", "--keep 7: must be even"),
        ("--keep 24 --pool 23", "--keep 24: must be at most --pool 23"),
        ("--resolution 36", "multiple of 8"),
        ("--model sd3 --resolution 96", "positions up to 64"),
        ("--device cuda:77", "--device cuda:77: not on this machine; try --device cpu"),
        ("--device meta", "--device meta"),
        ("--device banana", "--device banana"),
        ("--prompts missing.txt", "--prompts missing.txt"),
        ("--eval_prompts missing.txt", "--eval_prompts missing.txt"),
        ("--prompts GOOD.txt", "--prompts_per_step 2: there are 1 training prompts"),
        ("--pretrained", "--pretrained: needs --prompts FILE"),
        (f"{PUBLISHED} a/b/c", "a/b/c: neither a folder nor such a model on the hub"),
        (f"{PUBLISHED} TAKEN", "model_index.json"),
        ("--lora nowhere", "--lora nowhere: cannot be loaded"),
        ("--reward nothing", "--reward 'nothing'"),
        ("--reward clipscore,clipscore:2", "twice"),
        ("--reward pickscore", "--reward pickscore"),
        ("--reward REWARD.py:absent", "absent"),
        ("--reward REWARD.py:raises", "raised ValueError: no"),
        ("--reward REWARD.py:short", "shape"),
        ("--eval_rewards nothing", "--eval_rewards 'nothing'"),
        ("--output_dir TAKEN", "--output_dir TAKEN: is taken; choose another, or --resume TAKEN"),
        ("--output_dir GOOD.txt", "--output_dir GOOD.txt: is taken"),
        ("--resume nowhere", "--resume nowhere: there is no checkpoint"),
        ("--resume TAKEN", "--resume TAKEN: there is no checkpoint"),
        ("--resume latest", "--resume latest: no run"),
        ("--resume RUN --pool 96", "pool was 48 and is 96; start a new run for that"),
        ("--resume RUN --model flux", "model was 'sana' and is 'flux'"),
        ("--resume RUN --prompts other.txt", "prompts was '' and is 'other.txt'"),
        ("--resume RUN --steps 1", "--steps 1: the run has done 2"),
        ("--resume RUN", "other layers"),
        ("--resume FILE_RUN", "executes a file; if you trust it, add --reward REWARD.py:raises"),
        ("--resume OLD_RUN", "another version"),
    ],
)
def test_bad_input_is_one_line_that_says_what_would_do_and_nothing_is_written(
    line, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "GOOD.txt").write_text("a cat\n")
    (tmp_path / "REWARD.py").write_text(REWARD)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "config.json").write_text("{}")
    stored("RUN", "--pool", "48", "--eval_steps", "1")
    stored("FILE_RUN", "--reward", "REWARD.py:raises")
    stored("OLD_RUN", gone=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)  # wandb, say
    if not line.startswith("--resume"):
        line += " --eval_steps 1"
    assert train.main(line.split()) == 2
    assert says in error_line(capsys.readouterr().err)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    may_be_there = {tmp_path / "EXECUTED"} if "--reward REWARD" in line else set()
    new = {p for p in after.keys() - may_be_there if "__pycache__" not in p.parts}
    assert new == before.keys() and before.items() <= after.items()


def test_a_baseline_without_a_pool_may_keep_more_than_the_pools_default():
    config = parse("--algorithm", "diffusionnft", "--keep", "128")
    num_candidates, (stage,) = train.ALGORITHMS["diffusionnft"](config)
    assert (config.pool, num_candidates, stage.num_kept) == (96, 128, 128)


def test_each_process_takes_the_gpu_of_its_own(monkeypatch):
    taken, real = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: real(*size))
    monkeypatch.setattr(distributed, "LOCAL_RANK", 3)
    devices = [parse("--device", device).device for device in ("cuda", "cuda:1", "auto")]
    assert devices == ["cuda", "cuda:1", "cuda"] and taken == [3, 1, 3]
    monkeypatch.setattr(distributed, "WORLD", 4)
    monkeypatch.setattr(distributed, "gather", lambda share: share * 4)
    with pytest.raises(InputError, match="--prompts_per_step 3: must be at least the 4 processes"):
        parse("--prompts_per_step", "3")


def test_a_resumed_run_has_the_options_it_had_and_those_of_running_may_change(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    reward = "REWARD.py:raises"
    stored("runs/b", "--pool", "48", "--steps", "2", "--reward", reward, adv_clip=3.0)
    os.utime(stored("runs/c"), (1, 1))  # older than the other
    named = ["--reward", tmp_path / reward]  # paths are compared as files
    changed = dict(steps=3, eval_every=7, checkpoint_every=4, train_micro_batch=5, device="cpu")
    flags = [word for name, value in changed.items() for word in (f"--{name}", value)]
    again = parse("--resume", "latest", *named, *flags)
    assert {name: getattr(again, name) for name in changed} == changed
    assert (again.pool, again.adv_clip) == (48, 3.0)  # a constant is the run's, too
    assert again.resume == again.output_dir == "runs/b" and again.checkpoint.step == 2
