"""Checkpoints: a run that stops at any moment continues as if it had not stopped.

    checkpoints/step_000010/
        state.safetensors   the LoRA parameters of all policies and the state of the optimizer
        run.json            the step and every option

No random state is stored, since every random number follows from the seed, the step and the prompt.
A checkpoint is written to a temporary folder and renamed, so it is either complete or absent. Only
a power failure can damage the newest one, because no one waits until the disk has it.
Nothing that it holds is executed: there are only safetensors and JSON.
"""

import json
import os
import shutil
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from support import distributed
from support.errors import InputError, Stopped, one_line, require, written_whole

KEPT = 2  # number of checkpoints that a run keeps, the last ones


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    step: int
    options: dict
    tensors: dict  # as `save` wrote them


def save(folder, step, policies, optimizer, options):
    """Write folder/checkpoints/step_NNNNNN and delete all but the last KEPT up to that step; only
    the first process writes. policies: {name: list of parameters}; options: a dict for JSON.
    Returns the path. Raises OSError, after which the earlier checkpoints are as they were."""
    path = Path(folder, "checkpoints", f"step_{step:06d}")
    if distributed.RANK > 0:
        return path
    tensors = numbered(policies)
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(v) for name, v in state.items()}
    with written_whole(path) as unfinished:
        unfinished.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished / "state.safetensors")
        (unfinished / "run.json").write_text(json.dumps({"step": step, "options": options}))
        shutil.rmtree(path, ignore_errors=True)  # of a run that is resumed, with other options
    for old in [p for p in paths(folder) if p.name <= path.name][:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def numbered(policies):
    """{name: list of parameters} -> {"name.0": tensor, "name.1": tensor, ...}."""
    return {f"{name}.{i}": p.detach() for name in policies for i, p in enumerate(policies[name])}


def paths(folder):
    """The checkpoints of a run's folder, the oldest first."""
    return sorted(Path(folder, "checkpoints").glob("step_*"))


def newest(folder):
    """The newest Checkpoint of a run's folder that can be read. One that cannot be read is named,
    and the one before is taken. Raises InputError if none can be read."""
    for path in reversed(paths(folder)):
        try:
            run = json.loads((path / "run.json").read_text())
            # Not by load_file: Windows cannot delete a file that is mapped into memory.
            tensors = load((path / "state.safetensors").read_bytes())
            return Checkpoint(path, run["step"], dict(run["options"]), tensors)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            distributed.say(f"{path}: cannot be read ({one_line(error)}); trying the one before")
    raise InputError(f"--resume {folder}: there is no checkpoint in it that can be read")


def restore(checkpoint, policies, optimizer):
    """Copy a Checkpoint into the parameters of the policies and the state of the optimizer, of any
    kind. Returns its step. Raises InputError if the parameters are not those of this run."""
    ours, state = numbered(policies), defaultdict(dict)
    found = {n: t for n, t in checkpoint.tensors.items() if not n.startswith("optimizer.")}
    same = {n: t.shape for n, t in found.items()} == {n: p.shape for n, p in ours.items()}
    require(same, f"{checkpoint.path}: its LoRA has other layers than this run's")
    for name, parameter in ours.items():
        parameter.copy_(found[name])
    for name in checkpoint.tensors.keys() - found.keys():
        _, i, entry = name.split(".")
        state[int(i)][entry] = checkpoint.tensors[name]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return checkpoint.step


class StopFlag:
    """Inside, SIGINT (Ctrl-C) and SIGTERM only set a flag, for which `check` raises Stopped. A
    second Ctrl-C leaves at once. In a thread that is not the main one there is no flag."""

    signal = None

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._set)
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
