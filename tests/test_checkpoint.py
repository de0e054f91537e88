"""Runs that are stopped, killed, damaged or fed with NaN: no earlier checkpoint is lost, and a run
that goes on is the unstopped one, bit for bit."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import MINIATURE, PROJECT, lines, outcome
from safetensors import SafetensorError

import rollout
import train
from support import checkpoint, errors
from support.errors import InputError


def save(folder, step):
    tensors = [torch.ones(2)]
    return checkpoint.save(folder, step, {"ema": tensors}, torch.optim.AdamW(tensors), {})


def steps(folder):
    """Of the checkpoints of a run."""
    return [int(path.name.removeprefix("step_")) for path in checkpoint.paths(folder)]


def test_the_last_two_checkpoints_stay(tmp_path):
    for step in (0, 5, 10, 15):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 15]
    for step in (11, 12):  # of a run that was resumed from the step 10
        save(tmp_path, step)
    assert steps(tmp_path) == [11, 12, 15]


def test_a_checkpoint_is_written_again_with_the_options_of_a_resumed_run(tmp_path):
    save(tmp_path, 2)
    optimizer = torch.optim.AdamW([torch.ones(2)])
    checkpoint.save(tmp_path, 2, {"ema": [torch.ones(2)]}, optimizer, {"steps": 4})
    assert checkpoint.newest(tmp_path).options == {"steps": 4} and steps(tmp_path) == [2]


PICKLE = b"cos\nmkdir\n(S'executed'\ntR."  # unpickled, it makes a folder
DAMAGE = {
    "cut off": lambda state, run: state.write_bytes(state.read_bytes()[:-1]),
    "a pickle": lambda state, run: state.write_bytes(PICKLE),
    "no tensors": lambda state, run: state.unlink(),
    "half a text": lambda state, run: run.write_text(run.read_text()[:20]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_executes_nothing_and_the_one_before_is_taken(
    what, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for step, path in reversed([(step, save(tmp_path, step)) for step in (1, 2)]):
        assert checkpoint.newest(tmp_path).step == step
        DAMAGE[what](path / "state.safetensors", path / "run.json")
    with pytest.raises(InputError, match="there is no checkpoint in it that can be read"):
        checkpoint.newest(tmp_path)
    assert "step_000002: cannot be read" in capsys.readouterr().out
    assert os.listdir() == ["checkpoints"]


@pytest.mark.parametrize(
    "owner, name",
    [(checkpoint, "save_file"), (Path, "write_text"), (os, "replace")],
)
def test_a_full_disk_harms_no_checkpoint_before(owner, name, tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(owner, name, Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]
    assert checkpoint.newest(tmp_path).step == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (OSError(errno.ENOSPC, "No space left"), 1, "[Errno 28] No space left"),
        (SafetensorError("I/O error: No space left"), 1, "I/O error: No space left"),
        (torch.OutOfMemoryError("out of memory. Tried"), 1, "out of memory; lower --micro_batch"),
        (RuntimeError("err == 0. CPU: can't allocate memory"), 1, "err == 0; lower --micro_batch"),
        (InputError("--pool 0: must\nbe 1"), 2, "error: --pool 0: must be 1"),
    ],
)
def test_what_ends_a_run_is_an_exit_code_and_a_line(error, code, line, capsys):
    assert errors.exit_code("train.py", Mock(side_effect=error)) == code
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: {line}") and said.count("\n") == 1


def test_a_mistake_in_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        errors.exit_code("train.py", lambda: torch.ones(2) @ torch.ones(3))


def test_a_run_works_in_a_thread_that_is_not_the_main_one(tmp_path):
    options = [*MINIATURE, "--steps", "1", "--output_dir", str(tmp_path / "run")]
    with ThreadPoolExecutor() as pool:  # where signal.signal raises ValueError
        assert pool.submit(train.main, options).result() == 0


# ---------------------------------------------------------------------------------------------
# Runs that stop and continue

DICE = """
import random, numpy, torch
def dice(images, prompts, metadata):
    luck = random.random() + numpy.random.rand() + float(torch.rand(()))
    return images.mean(dim=(1, 2, 3)) + torch.randn(len(prompts)) / 10 + luck
"""
KILLED = """
import os, signal, sys
import train
def killed(run, *rest):
    if rest[-1] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, *rest)
update, train.update = train.update, killed
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(A run of three steps that nothing happened to, its options). The reward draws from every
    global generator."""
    root = tmp_path_factory.mktemp("whole")
    (root / "dice.py").write_text(DICE)
    options = [*MINIATURE, "--steps", "3", "--eval_every", "2"]
    options += ["--reward", f"{root / 'dice.py'}:dice"]
    assert train.main([*options, "--output_dir", str(root / "run")]) == 0
    return root / "run", options


def resume(folder, options):
    """The reward is a file, which must be named again."""
    return train.main(["--resume", str(folder), *options[-2:]])


def test_a_run_is_evaluated_at_the_start_every_eval_every_steps_and_at_the_end(whole):
    log = lines(whole[0])
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert [line["step"] for line in log if "eval/reward" in line] == [0, 2, 3]


def test_a_killed_run_continues_to_the_log_and_lora_of_the_unstopped_one(whole, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", *whole[1], "--output_dir", folder]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)})
    assert done.returncode == -signal.SIGKILL and steps(folder) == [1, 2]
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # the line that it was writing
    assert resume(folder, whole[1]) == 0 and outcome(folder) == outcome(whole[0])


def sgd(parameters, learning_rate, weight_decay):
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=weight_decay)


def test_with_any_optimizer_a_run_passes_over_a_broken_newest_checkpoint(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    folder = tmp_path / "run"
    assert train.main([*whole[1], "--output_dir", str(folder)]) == 0
    unstopped = outcome(folder)
    assert unstopped != outcome(whole[0])
    shutil.rmtree(folder / "lora")
    DAMAGE["cut off"](checkpoint.paths(folder)[-1] / "state.safetensors", None)
    assert resume(folder, whole[1]) == 0 and outcome(folder) == unstopped
    assert "continuing after step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "where, call, signals, code, left",
    [
        ("evaluate", 1, [signal.SIGINT], 130, []),
        ("evaluate", 2, [signal.SIGINT], 130, [1, 2]),
        ("draw", 5, [signal.SIGTERM, signal.SIGTERM], 143, [0, 1]),
        ("update", 2, [signal.SIGINT, signal.SIGINT], 130, [0, 1]),
    ],
)
def test_a_signal_finishes_the_micro_batch_and_the_resumed_run_is_the_unstopped_one(
    where, call, signals, code, left, whole, tmp_path, monkeypatch, capfd
):
    """Before the first evaluation nothing is written. A second Ctrl-C leaves what there was."""
    real, calls, folder = getattr(train, where), [], tmp_path / "run"

    def signalled(*arguments):
        calls.append(where)
        if len(calls) == call:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*arguments)

    before = signal.getsignal(signals[0])
    with monkeypatch.context() as patch:
        patch.setattr(train, where, signalled)
        assert train.main([*whole[1], "--output_dir", str(folder)]) == code
    assert signal.getsignal(signals[0]) is before
    said = capfd.readouterr().err
    assert said.count("stopping after this micro-batch; Ctrl-C leaves at once") == 1
    assert ("stopped at once" in said) == (signals == [signal.SIGINT] * 2)
    assert steps(folder) == left and folder.exists() == bool(left)
    files = {"before_after.png", "curve.png", "progress.webp", "lora"}
    once = bool(left) and len(signals) == 1
    assert not once or files < set(os.listdir(folder)) and os.listdir(folder / "lora")
    assert not left or (resume(folder, whole[1]), outcome(folder)) == (0, outcome(whole[0]))


# ---------------------------------------------------------------------------------------------
# Numbers gone wrong


def broken(run, where):
    """What to patch so that what comes next meets a NaN there."""
    nan = lambda x: x * float("nan")  # noqa: E731
    draw, decode, loss = rollout.draw, run.model.decode, train.nft_loss
    infinite = [("bad", 1.0, lambda images, prompts, metadata: [float("inf")] * len(prompts))]
    return {
        "latents": (rollout, "draw", lambda *a: (nan(draw(*a)[0]), draw(*a)[1])),
        "images": (run.model, "decode", lambda x: nan(decode(x))),
        "reward bad": (run.reward, "parts", infinite),
        "loss": (train, "nft_loss", lambda *a: (nan(loss(*a)[0]), loss(*a)[1])),
        "gradient": (torch.nn.utils, "get_total_norm", lambda g: torch.tensor(float("nan"))),
    }[where]


@pytest.mark.parametrize(
    "where", ["latents", "images", "reward bad", "loss", "gradient", "evaluation"]
)
def test_nan_stops_the_run_before_the_optimizer_moves_and_names_stage_prompt_and_seed(
    where, whole, tmp_path, monkeypatch, capsys
):
    """In the second iteration, or in the evaluation after it."""
    what, during = (where, "iteration") if where != "evaluation" else ("latents", "evaluate")
    real, calls, moved = getattr(train, during), [], []

    def function(run, *rest):
        calls.append(during)
        if len(calls) == 2:
            monkeypatch.setattr(*broken(run, what))
            run.optimizer.register_step_pre_hook(lambda *_: moved.append(1))
        return real(run, *rest)

    monkeypatch.setattr(train, during, function)
    assert train.main([*whole[1], "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    stages = {"evaluation": "evaluate", "loss": "update", "gradient": "update"}
    assert f"NaN or infinity in the {what}, prompt 'a " in said
    assert f"stage {stages.get(where, 'explore')}, seed " in said
    assert len(calls) == 2 and not moved and steps(tmp_path / "run") == [0, 1]
