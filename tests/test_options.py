"""The command line: what the options are, and what is said of bad input before a run begins."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, error_line

import train
from support import checkpoint, distributed, options
from support.errors import InputError

REWARD = """
def raises(i, p, m): raise ValueError("no")
open("EXECUTED", "a").close()
"""


def parse(*argv):
    return train.parse_options([str(word) for word in argv])


def stored(folder, *argv, **changes):
    """A run's folder that has nothing but a checkpoint of step 2, of these options."""
    saved = dataclasses.asdict(parse(*argv, "--output_dir", folder)) | changes
    optimizer = torch.optim.AdamW([torch.ones(2)])
    return checkpoint.save(folder, 2, {"default": [torch.ones(2)]}, optimizer, saved)


def test_defaults_are_the_papers_then_the_models_then_the_tiny_models():
    """The paper's: N = 96, K = 24, 48 prompts, steps, AdamW, rank; by model the authors' code."""
    published = ["--pretrained", "--prompts", "p.txt"]
    configs = (parse("--model", name, *published) for name in ("sana", "flux", "sd3"))
    sana, flux, sd3 = map(dataclasses.asdict, configs)
    paper = dict(pool=96, keep=24, prompts_per_step=48, explore_steps=6, rollout_steps=10)
    paper |= dict(learning_rate=3e-4, lora_rank=32, kl=1e-4, nft_beta=1.0, adv_clip=5.0)
    paper |= dict(advantage_std="all", ema_decay=0.9, resolution=1024, eval_steps=40)
    paper |= dict(timestep_fraction=0.6, max_grad_norm=1.0, pretrained="published")
    assert (paper | dict(min_dim=2240, train_micro_batch=16)).items() <= sana.items()
    own = dict(resolution=512, eval_steps=28, timestep_fraction=0.4)
    assert (paper | own | dict(min_dim=1000, train_micro_batch=12)).items() <= flux.items()
    own = dict(max_grad_norm=0.002, min_dim=2432, train_micro_batch=4)
    assert (paper | own).items() <= sd3.items()
    tiny = dataclasses.asdict(parse())
    own = dict(pool=96, prompts_per_step=2, learning_rate=3e-3, kl=4e-2, steps=40, min_dim=0)
    assert own.items() <= tiny.items()
    assert tiny["output_dir"].startswith("runs/sana_sol_rl_")


def test_what_is_given_wins_constants_are_no_options_and_help_names_every_option(capsys):
    config = parse("--gradient_checkpointing", "false", "--kl", "0", "--keep", "6")
    assert (config.gradient_checkpointing, config.kl, config.keep) == (False, 0.0, 6)
    fields = dataclasses.fields(config)
    assert sum(field.init for field in fields) == 32
    assert train.main(["--help"]) == 0
    said = capsys.readouterr().out
    for field in fields:
        assert (f"--{field.name} " in said) == field.init


@pytest.mark.parametrize(
    "line, says",
    [
        ("--pol 3", "--pol"),
        ("--pool many", "--pool: invalid int value: 'many'"),
        ("--micro_batch 0", "--micro_batch 0: must be at least 1"),
        ("--model dalle", "--model: invalid choice: 'dalle'"),
        ("--report_to wandb", "--report_to wandb: not installed; pip install wandb"),
        ("--keep 7", "--keep 7: must be even"),
        ("--output_dir GOOD.txt/run", "GOOD.txt is no folder to write in"),
        ("--keep 24 --pool 23", "--keep 24: must be at most --pool 23"),
        ("--resolution 36", "multiple of 8"),
        ("--model sd3 --resolution 96", "positions up to 64"),
        ("--device cuda:77", "--device cuda:77: not on this machine; try --device cpu"),
        ("--prompts missing.txt", "--prompts missing.txt"),
        ("--prompts GOOD.txt", "--prompts_per_step 2: there are 1 training prompts"),
        ("--pretrained a/b/c --prompts_per_step 1 --prompts GOOD.txt", "a/b/c: neither a folder"),
        ("--pretrained", "--pretrained: needs --prompts FILE"),
        ("--lora nowhere", "--lora nowhere: cannot be loaded"),
        ("--reward nothing", "--reward 'nothing'"),
        ("--reward REWARD.py:raises", "raised ValueError: no"),
        ("--eval_rewards nothing", "--eval_rewards 'nothing'"),
        ("--output_dir TAKEN", "--output_dir TAKEN: is taken; choose another, or --resume TAKEN"),
        ("--resume nowhere", "--resume nowhere: there is no checkpoint"),
        ("--resume latest", "--resume latest: no run"),
        ("--resume RUN --pool 96", "pool was 48 and is 96; start a new run for that"),
        ("--resume RUN --prompts other.txt", "prompts was '' and is 'other.txt'"),
        ("--resume RUN --steps 1", "--steps 1: the run has done 2"),
        ("--resume RUN", "other layers"),
        ("--resume FILE_RUN", "if you trust it, add --reward HERE/REWARD.py:raises"),
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
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    line = line.replace("HERE", str(tmp_path))
    says = says.replace("HERE", str(tmp_path))
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)  # wandb, say
    monkeypatch.setattr(train, "iteration", None)  # a run that is not refused fails at once
    assert train.main(line.split()) == 2
    assert says in error_line(capsys.readouterr().err)
    assert (tmp_path / "EXECUTED").exists() == ("--reward REWARD" in line)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert {path: after[path] for path in after if path.suffix != ".pyc"} == before


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
    stored("runs/b", "--pool", "48", "--steps", "2", adv_clip=3.0)
    os.utime(stored("runs/c"), (1, 1))  # older than the other
    changed = dict(steps=3, eval_every=7, checkpoint_every=4, train_micro_batch=5, device="cpu")
    flags = [word for name, value in changed.items() for word in (f"--{name}", value)]
    again = parse("--resume", "latest", *flags)
    assert {name: getattr(again, name) for name in changed} == changed
    assert (again.pool, again.adv_clip) == (48, 3.0)  # a constant is the run's, too
    assert again.resume == again.output_dir == "runs/b" and again.checkpoint.step == 2


@pytest.mark.parametrize(
    "reward, prompts",
    [
        ("clipscore:0.5,mine.py:red", "p.txt"),
        ("clipscore:.50, ./mine.py:red:1", "./p.txt"),
        ("clipscore:5e-1,HERE/mine.py:red:1.0", "HERE/sub/../p.txt"),
    ],
)
def test_a_run_is_resumed_from_any_folder_however_its_files_are_written(
    reward, prompts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "p.txt").touch()
    files = ["--eval_rewards", "mine.py:blue", "--prompts", "p.txt", "--pretrained", "sub"]
    stored("run/", "--reward", "clipscore:0.5,mine.py:red", *files)
    reward, prompts = (text.replace("HERE", str(tmp_path)) for text in (reward, prompts))
    named = ["--reward", reward, "--eval_rewards"]
    parse("--resume", "run", *named, "./mine.py:blue", "--prompts", prompts)
    monkeypatch.chdir("sub")
    named += ["../mine.py:blue"]
    if str(tmp_path) in reward:
        again = parse("--resume", "../run/", *named)
        files = str(tmp_path / "p.txt"), str(tmp_path / "sub")
        assert (again.prompts, again.pretrained) == files
    else:  # here it is another file
        with pytest.raises(InputError, match="reward was"):
            parse("--resume", "../run/", *named)


def test_only_main_reads_the_command_line_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    assert train.parse_options().model == "sana"
    assert train.main() == 2 and "-f" in error_line(capsys.readouterr().err)


def test_the_program_runs_through_a_symbolic_link(tmp_path):
    (tmp_path / "linked.py").symlink_to(PROJECT / "train.py")
    command = [sys.executable, tmp_path / "linked.py", "--help"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
