"""The command line: what is wrong with it is one line, before anything is written."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT

import train
from support import checkpoint, distributed, options
from support.errors import InputError


def parse(*argv):
    return train.parse_options([str(word) for word in argv])


# ---------------------------------------------------------------------------------------------
# Options


def test_defaults_are_the_papers_the_models_or_for_tiny_models_their_own():
    tiny, flux = parse(), parse("--model", "flux", "--pretrained", "--prompts", "p.txt")
    assert (tiny.pool, tiny.keep, tiny.explore_steps, tiny.rollout_steps) == (96, 24, 6, 10)
    own = options.TINY_DEFAULTS
    assert own["resolution"] == 32 and {"steps", "prompts_per_step", "eval_steps"} < own.keys()
    assert all(getattr(tiny, name) == value for name, value in own.items())
    expected = (300, 512, 3e-4, 28)
    assert (flux.steps, flux.resolution, flux.learning_rate, flux.eval_steps) == expected
    assert (tiny.timestep_fraction, flux.timestep_fraction) == (0.6, 0.4)
    assert flux.pretrained == "published"
    assert tiny.output_dir.startswith("runs/sana_sol_rl_") and tiny.checkpoint is None
    assert [
        parse("--model", name, "--pretrained", "--prompts", "p.txt").train_micro_batch
        for name in ("sana", "flux", "sd3")
    ] == [16, 12, 4]  # as the authors'
    assert not any(hasattr(tiny, name) for name in ("solver", "force", "reward_weights"))


def test_pretrained_models_are_compiled_on_a_gpu_unless_one_says_otherwise():
    def compiled(*argv, device="cuda"):
        config = parse(*argv)
        config.device = device
        return config.compiled

    pretrained = ["--pretrained", "--prompts", "p.txt"]
    assert compiled(*pretrained) and not compiled(*pretrained, device="cpu")
    assert not compiled(*pretrained, "--no-compile") and not compiled()
    assert compiled("--compile") and compiled("--compile", device="cpu")


def test_what_is_given_wins_and_36_options_can_be_given():
    config = parse("--low_memory", "--no-gradient_checkpointing", "--kl", "0", "--seed", "3")
    expected = (True, False, 0.0, 3)
    assert (config.low_memory, config.gradient_checkpointing, config.kl, config.seed) == expected
    constants = dataclasses.asdict(config).keys() - options.OPTIONS.keys()
    assert len(options.OPTIONS) == 36 and len(constants) == 7
    for name in constants:
        with pytest.raises(InputError, match="unrecognized"):
            parse(f"--{name}", "1")


def test_help_and_a_mistyped_option_are_answered_without_torch():
    code = (
        "import sys\nfrom support.options import *\n"
        "try:\n    read_command_line(['--pol', '3'])\n"
        "except InputError as error:\n    print(error)\n"
        "try:\n    read_command_line(['--help'], 'What it does')\n"
        "except SystemExit as request:\n    print('code', request.code)\n"
        "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    error, *help, code, modules = done.stdout.splitlines()
    assert "--pol" in error and "What it does" in help and (code, modules) == ("code 0", "[]")
    text = " ".join(" ".join(help).split())
    assert all(f"--{name} " in text or f"--{name}," in text for name in options.OPTIONS)
    steps = options.TINY_DEFAULTS["steps"]
    assert f"(default: {steps}; with --pretrained: 300)" in text
    assert "(default: the model's)" in text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a file and the folder of a run; nothing in it may change."""
    (tmp_path / "FILE").write_text("a cat\n")
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "line, says",
    [
        ("--pol 3", "--pol"),
        ("--family sol_rl", "--family"),
        ("extra", "extra"),
        ("--pool", "--pool: expected one argument"),
        ("--pool many", "--pool: invalid int value: 'many'"),
        ("--kl much", "--kl: invalid float value: 'much'"),
        ("--low_memory 1", "unrecognized arguments: 1"),
        ("--report_to paper", "--report_to: invalid choice"),
        ("--report_to wandb", "--report_to wandb: not installed; pip install wandb"),
        ("--model dalle", "--model dalle: must be one of sana, flux, sd3"),
        (
            "--algorithm ppo",
            "--algorithm ppo: must be one of sol_rl, naive_scaling, naive_quant, diff",
        ),
        ("--select all", "--select all: must be one of best_worst, random_subset, mean_"),
        (
            "--precision fp3",
            "--precision fp3: must be one of nvfp4, nvfp4_4over6, nvfp4_row, fp8, bf16",
        ),
        ("--keep 1", "--keep 1: must be even"),
        ("--keep 7", "--keep 7: must be even"),
        ("--keep 0", "--keep 0: must be from 1 to 999999"),
        ("--steps 0", "--steps 0: must be from 1"),
        ("--explore_steps -1", "--explore_steps -1"),
        ("--micro_batch 0", "--micro_batch 0"),
        ("--resolution 0", "--resolution 0"),
        ("--pool 1000000000000", "--pool 1000000000000"),
        ("--learning_rate nan", "--learning_rate nan"),
        ("--learning_rate 0", "--learning_rate 0.0"),
        ("--learning_rate 1e300", "to 1e+30"),
        ("--max_grad_norm -1", "--max_grad_norm -1.0"),
        ("--train_micro_batch 0", "--train_micro_batch 0: must be from 1 to 999999"),
        ("--kl -1", "--kl -1.0"),
        ("--seed -1", "--seed -1"),
        ("--seed 99999999999999999999999", "--seed"),
        ("--device cuda:77", "--device cuda:77: not on this machine; try --device cpu"),
        ("--device banana", "--device banana"),
        ("--device meta", "--device meta"),
        ("--pretrained", "--prompts"),
        ("--output_dir TAKEN", "--output_dir TAKEN: is taken; choose another, or delete it"),
        ("--output_dir FILE", "--output_dir FILE: cannot write in FILE"),
        ("--output_dir /dev/null/x", "--output_dir /dev/null/x"),
        ("--resume nowhere", "--resume nowhere: there is no checkpoint"),
        ("--resume TAKEN", "--resume TAKEN: there is no checkpoint"),
        ("--resume latest", "--resume latest: no run"),
        ("--resume=", "--resume '': "),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_option(line, says, folder, monkeypatch):
    if "wandb" in line:
        monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        parse(*line.split())
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", ["sol_rl", "naive_scaling", "naive_quant"])
def test_no_more_can_be_kept_than_the_pool_has(algorithm, folder):
    config = parse("--algorithm", algorithm, "--keep", "24", "--pool", "23")
    with pytest.raises(InputError, match="^--keep 24: must be at most --pool 23$"):
        train.Run(config)


def test_a_baseline_without_a_pool_may_keep_more_than_the_pools_default(folder):
    options = "--algorithm diffusionnft --keep 128 --prompts FILE --prompts_per_step 1"
    config = parse(*options.split(), "--pretrained", "nowhere")
    num_candidates, (stage,) = train.ALGORITHMS["diffusionnft"](config)
    assert (config.pool, config.keep, num_candidates, stage.num_kept) == (96, 128, 128, 128)
    with pytest.raises(InputError, match="nowhere"):  # the first mistake of this run
        train.Run(config)


def test_each_process_takes_the_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 3)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: real(*size))
    for device in ("cuda", "cuda:1", "auto"):
        assert parse("--device", device).device in ("cuda", "cuda:1")
    assert taken == [3, 1, 3]
    monkeypatch.setattr(distributed, "WORLD", 4)
    with pytest.raises(InputError, match="--device cuda:1: one device for 4 processes; give cuda"):
        parse("--device", "cuda:1", "--prompts_per_step", "4")
    with pytest.raises(InputError, match="--prompts_per_step 3: must be at least the 4 processes"):
        parse("--prompts_per_step", "3")


# ---------------------------------------------------------------------------------------------
# Resuming


def stored(folder, *argv, step=1, **changes):
    """A run's folder with a checkpoint of the options of `argv`, some of them changed."""
    saved = dataclasses.asdict(parse(*argv, "--output_dir", folder)) | changes
    parameters = [torch.ones(2)]
    optimizer = torch.optim.AdamW(parameters)
    checkpoint.save(folder, step, {"default": parameters}, optimizer, saved)
    return folder


def test_a_resumed_run_has_the_options_it_had_and_running_ones_may_change(tmp_path):
    run = stored(tmp_path / "run", "--device", "cpu", "--pool", "48", "--steps", "2")
    again = parse("--resume", run, "--steps", "3", "--eval_every", "1", "--pool", "48")
    assert (again.pool, again.steps, again.eval_every) == (48, 3, 1)
    assert again.resume == again.output_dir == str(run) and again.checkpoint.step == 1
    assert again.checkpoint.notes == [
        f"continuing from {run / 'checkpoints' / 'step_000001'}",
        "steps was 2 and is 3",
        f"eval_every was {options.TINY_DEFAULTS['eval_every']} and is 1",
    ]
    assert "checkpoint" not in dataclasses.asdict(again)


def resume_error(run, *argv):
    with pytest.raises(InputError) as error:
        parse("--resume", run, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_options_and_changed_constants_are_refused_in_one_line(tmp_path, monkeypatch):
    run = stored(tmp_path / "run", "--pool", "48", "--pipeline_text", step=2)
    assert resume_error(run, "--pool", "96", "--no-pipeline_text", "--steps", "9") == (
        f"--resume {run}: pool was 48 and is 96, pipeline_text was True and is False; "
        "start a new run for that"
    )
    assert "model was 'sana' and is 'flux'" in resume_error(run, "--model", "flux")
    assert "micro_batch was 96 and is 24" in resume_error(run, "--micro_batch", "24")
    assert "output_dir was" in resume_error(run, "--output_dir", "elsewhere")
    assert "--steps 1: the run has done 2 already" in resume_error(run, "--steps", "1")
    constant = dataclasses.field(default=3.0)
    edited = dataclasses.make_dataclass(
        "Config", [("adv_clip", float, constant)], bases=(options.Config,)
    )
    monkeypatch.setattr(options, "Config", edited)  # a student changed it in the file
    assert "adv_clip was 5.0 and is 3.0" in resume_error(run)


def test_what_an_older_checkpoint_lacks_is_default_and_what_is_gone_is_refused(tmp_path):
    run = stored(tmp_path / "run", solver="dpm", force="")
    path = checkpoint.list_checkpoints(run)[0][1] / "run.json"
    contents = json.loads(path.read_text())
    del contents["options"]["advantage_std"]
    path.write_text(json.dumps(contents))
    said = "another version made the run, with the options force, solver; start a new run"
    assert resume_error(run) == f"--resume {run}: {said}"
    for name in ("force", "solver"):
        del contents["options"][name]
    path.write_text(json.dumps(contents))
    assert parse("--resume", run).advantage_std == "all"


def test_a_reward_in_a_file_must_be_named_again(tmp_path):
    run = stored(tmp_path / "run", "--reward", "clipscore,mine.py:red", "--eval_rewards", "a.py:f")
    name = "clipscore,mine.py:red"
    assert f"if you trust it, add --reward {name}" in resume_error(run)
    assert "add --eval_rewards a.py:f" in resume_error(run, "--reward", name)
    assert "reward was" in resume_error(run, "--reward", "clipscore", "--eval_rewards", "a.py:f")
    assert parse("--resume", run, "--reward", name, "--eval_rewards", "a.py:f").reward == name


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(pool="many"), "--pool 'many': must be int"),
        (dict(pool=10**12), "--pool 1000000000000"),
        (dict(learning_rate=[]), "--learning_rate []: must be float"),
        (dict(reward=1), "--reward 1: must be str"),
        (dict(model=["sana"]), "--model ['sana']: must be str"),
        (dict(model="dalle"), "--model dalle: must be one of"),
        (dict(keep=7), "--keep 7"),
        (dict(ema_decay="high"), "ema_decay was 'high' and is 0.9"),
    ],
)
def test_a_checkpoints_options_are_checked_as_those_of_a_command_line(changes, says, tmp_path):
    assert says in resume_error(stored(tmp_path / "run", **changes))


def test_latest_is_the_run_with_the_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seconds, name in enumerate(("c", "a", "b")):
        path = checkpoint.list_checkpoints(stored(f"runs/{name}"))[0][1]
        os.utime(path, (seconds, seconds))
    assert parse("--resume", "latest").output_dir == "runs/b"


def test_a_folder_that_holds_a_run_is_taken_and_can_be_resumed(tmp_path):
    run = stored(tmp_path / "run")
    with pytest.raises(InputError, match=f"is taken; choose another, or --resume {run}"):
        parse("--output_dir", run)
