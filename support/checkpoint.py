"""Checkpoints: a run that stops at any moment continues as if it had not stopped.

    checkpoints/step_000010/
        state.safetensors   the LoRA parameters of all policies and the state of AdamW
        run.json            the step and every option

No random state is stored, since every random number follows from the seed, the step and the prompt.
A checkpoint is written to a temporary folder and renamed, so it is either complete or absent.
Nothing that it holds is executed: there are only safetensors and JSON.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support import distributed
from support.errors import InputError, Stopped, one_line

KEPT = 2  # number of checkpoints that a run keeps, the last ones
FILES = ("state.safetensors", "run.json")
BROKEN = (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError)


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    step: int
    options: dict
    tensors: dict  # as state_tensors gives them
    notes: list  # lines for the user, such as the newer checkpoints that cannot be read


def list_checkpoints(folder):
    """The checkpoints of a run's folder: [(step, path)], the oldest first."""
    paths = Path(folder, "checkpoints").glob("step_" + "[0-9]" * 6)
    return sorted((int(path.name[5:]), path) for path in paths)


def save(folder, step, policies, optimizer, options):
    """Write folder/checkpoints/step_NNNNNN and delete all but the last KEPT up to that step; only
    the first process writes. policies: {name: list of parameters}; options: a dict for JSON.
    Returns the path. Raises OSError, after which the earlier checkpoints are as they were."""
    path = Path(folder, "checkpoints", f"step_{step:06d}")
    if distributed.RANK > 0:
        return path
    unfinished = path.with_name(f"unfinished.{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(state_tensors(policies, optimizer), unfinished / "state.safetensors")
        (unfinished / "run.json").write_text(json.dumps({"step": step, "options": options}))
        for name in (*FILES, "."):
            _sync(unfinished / name)
        if path.exists():
            # File by file, so that there is a checkpoint of this step at every moment. The old and
            # the new files are of the same step of the same run, so they fit together.
            for name in FILES:
                os.replace(unfinished / name, path / name)
        else:
            unfinished.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    up_to_step = [old for number, old in list_checkpoints(folder) if number <= step]
    for old in up_to_step[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _sync(path):
    """Wait until the disk has what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest(folder):
    """The newest Checkpoint of a run's folder that can be read. Raises InputError if none can."""
    notes = []
    for step, path in reversed(list_checkpoints(folder)):
        try:
            run = json.loads((path / "run.json").read_text(encoding="utf-8"))
            options = {**run["options"]}
            if run["step"] != step:
                raise ValueError(f"run.json is of step {run['step']}")
            return Checkpoint(path, step, options, load_file(path / "state.safetensors"), notes)
        except BROKEN as error:
            notes.append(f"{path}: cannot be read ({one_line(error)}); the one before is taken")
    reason = f"no checkpoint can be read; {notes[0]}" if notes else "there is no checkpoint in it"
    raise InputError(f"--resume {folder}: {reason}")


def state_tensors(policies, optimizer):
    """All that changes in training, {name: tensor}: "default.0", ..., "optimizer.0.exp_avg", ...
    policies: {name: list of parameters}."""
    tensors = {}
    for name, parameters in policies.items():
        tensors |= {f"{name}.{i}": p.detach().contiguous() for i, p in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    return tensors


@torch.no_grad()
def restore(checkpoint, policies, optimizer):
    """Copy a Checkpoint into the parameters of the policies and the state of AdamW. Raises
    InputError, with nothing changed, if names, shapes or dtypes differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = state_tensors(policies, optimizer)
    if any(name.startswith("optimizer.") for name in checkpoint.tensors):  # not before a first step
        for i, p in enumerate(parameters):
            expected |= {f"optimizer.{i}.{name}": p for name in ("exp_avg", "exp_avg_sq")}
            expected[f"optimizer.{i}.step"] = torch.zeros(())
    for name in sorted(expected.keys() | checkpoint.tensors.keys()):
        pair = [tensors.get(name) for tensors in (checkpoint.tensors, expected)]
        has, needs = (None if t is None else (str(t.dtype), list(t.shape)) for t in pair)
        if has != needs:
            raise InputError(f"{checkpoint.path}: its {name} is {has}, this run's {needs}")
    state = {i: {} for i in range(len(parameters))}
    for name, tensor in checkpoint.tensors.items():
        owner, i, *entry = name.split(".")
        if owner == "optimizer":
            state[int(i)][entry[0]] = tensor.clone()
        else:
            policies[owner][int(i)].copy_(tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


class StopFlag:
    """Inside, SIGINT (Ctrl-C) and SIGTERM only set a flag, for which `check` raises Stopped. A
    second Ctrl-C leaves at once. A second SIGTERM does not, since clusters send several."""

    signal = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self._set) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and distributed.RANK == 0:
            # Not by print, which the signal may have interrupted.
            os.write(2, b"\nstopping after this micro-batch; Ctrl-C leaves at once\n")
        self.signal = self.signal or number

    def check(self):
        if self.signal:
            raise Stopped(self.signal)
