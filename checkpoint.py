"""Checkpoints: a run that stops at any moment continues as if it had not.

    checkpoints/step_000010/
        state.safetensors   the three adapters and AdamW's state
        run.json            step, options, a fingerprint of the prompts
        metrics.jsonl       the log so far
        manifest.json       size and SHA-256 of these three

There is no random state in it: every number follows from the seed, the step and the prompt. It is
written into a folder of a temporary name, synced and renamed: it is whole or it is not there. With
many processes the first one writes; all must see the folder to continue.

What is read is not trusted: names and sizes are checked before contents, hashes before anything
is parsed, shapes before anything is loaded, and no pickle is ever opened.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import distributed
import models
from reward import RewardError

FILES = ("state.safetensors", "run.json", "metrics.jsonl")
LARGEST = {"state.safetensors": 2**40, "metrics.jsonl": 2**30}  # bytes
LARGEST_JSON = 2**24  # of the other two and of a line of metrics.jsonl
EVALUATION = {"eval/reward", "eval/rewards", "eval/standard_error"}  # and, after step 0, GAIN
GAIN = {"eval/gain", "eval/gain_standard_error"}
FREE = "resume steps device output_dir report_to checkpoint_every keep_checkpoints on_nonfinite"
# Options that a continued run may have otherwise: they change no number.


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line for the user."""


def found(folder):
    """The checkpoints of a run's folder, by step: [(step, path)]."""
    paths = Path(folder, "checkpoints").glob("step_*")
    return sorted((int(p.name[5:]), p) for p in paths if p.name[5:].isdigit())


def fingerprint(*parts):
    """A hash of the prompts and metadata of training and held-out Prompts."""
    text = json.dumps([[part.prompts, part.metadata] for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Stopping


class Stopped(Exception):
    """A signal, its only argument, asked the run to stop."""


class Stop:
    """Inside, SIGINT (Ctrl-C) and SIGTERM let the micro-batch finish: `check` then raises Stopped.
    Another Ctrl-C leaves at once; another SIGTERM does not, clusters send several."""

    asked = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            distributed.say(
                "stopping after this micro-batch; Ctrl-C to leave at once", file=sys.stderr
            )
        self.asked = number

    def check(self):
        if self.asked:
            distributed.fail(Stopped(self.asked))


class Ended(RuntimeError):
    """What is outside the run failed it: the disk, a reward."""


@contextlib.contextmanager
def resumable(folder):
    """Say how the run goes on when what fails it in here is mended."""
    try:
        yield
    except (OSError, SafetensorError, RewardError) as error:
        steps = [step for step, _ in found(folder)]
        then = f"--resume {folder} goes on from step {steps[-1]}" if steps else "start again"
        line = " ".join(str(error).split()) or repr(error)
        raise Ended(f"{line}; when that is mended {then}") from error


# ---------------------------------------------------------------------------------------------
# Writing


def save(run, log, step):
    """Write the checkpoint of `step` and delete all but the last --keep_checkpoints.

    log: metrics.jsonl's text so far. Returns its path."""
    folder = Path(run.config.output_dir) / "checkpoints"
    path, unfinished = folder / f"step_{step:06d}", folder / "unfinished"
    if distributed.RANK > 0 or (path.exists() and _is_intact(path)):
        return path
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(_tensors(run), unfinished / FILES[0])
        about = {
            "step": step,
            "options": dataclasses.asdict(run.config),
            "prompts": fingerprint(run.train, run.held_out),
        }
        (unfinished / FILES[1]).write_text(json.dumps(about))
        (unfinished / FILES[2]).write_text(log)
        files = {name: unfinished / name for name in FILES}
        manifest = {name: [file.stat().st_size, _hash(file)] for name, file in files.items()}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in (*FILES, "manifest.json", "."):
            _sync(unfinished / name)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        unfinished.rename(path)
        _sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    before = [old for number, old in found(run.config.output_dir) if number <= step]
    for old in before[: -run.config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _tensors(run):
    tensors = {}
    for adapter in models.ADAPTERS:
        for i, p in enumerate(models.lora_parameters(run.model.transformer, adapter)):
            tensors[f"{adapter}.{i}"] = p.detach().contiguous()
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    return tensors


def _hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------
# Reading


def read(path):
    """(run.json's contents, metrics.jsonl's lines) of a checkpoint whose every byte is as it was
    written. Raises CheckpointError."""
    try:
        manifest = _json(path / "manifest.json")
        if not isinstance(manifest, dict) or sorted(manifest) != sorted(FILES):
            raise CheckpointError("its manifest names other files")
        for name in FILES:
            size, digest = manifest[name]
            file = path / name
            if file.is_symlink() or file.stat().st_size > LARGEST.get(name, LARGEST_JSON):
                raise CheckpointError(f"{name} cannot be one of a checkpoint")
            if file.stat().st_size != size or _hash(file) != digest:
                raise CheckpointError(f"{name} is not what the manifest says")
        about = _json(path / "run.json")
        with open(path / "metrics.jsonl", encoding="utf-8") as file:
            lines = [_line(text) for text in iter(lambda: file.readline(LARGEST_JSON), "")]
        if about["step"] != int(path.name[5:]) or not isinstance(about["options"], dict):
            raise CheckpointError("run.json is of another checkpoint")
        if [line["step"] for line in lines if line["step"]] != list(range(1, about["step"] + 1)):
            raise CheckpointError("metrics.jsonl is of another checkpoint")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path}: damaged ({said})") from error
    return about, lines


def _json(path):
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path.name} is too large to be one")
    return json.loads(path.read_text(encoding="utf-8"))


def _line(text):
    """A line of metrics.jsonl: numbers by name; an evaluation has all that is read of one."""
    line = json.loads(text)
    for name, value in line.items():
        for number in value if name == "eval/rewards" else [value]:
            if not isinstance(number, (int, float, type(None))):
                raise CheckpointError(f"metrics.jsonl has no number for {name}")
    wanted = EVALUATION | (GAIN if line["step"] else set())
    if not isinstance(line["step"], int) or wanted - line.keys() not in (set(), wanted):
        raise CheckpointError("metrics.jsonl has a line that is none of a run")
    return line


def _is_intact(path):
    try:
        read(path)
    except CheckpointError:
        return False
    return True


def newest(folder):
    """(path, run.json, lines, notes) of the newest intact checkpoint of a run's folder; the notes
    name the damaged ones. Raises CheckpointError where none is intact."""
    notes = []
    for _, path in reversed(found(folder)):
        try:
            return path, *read(path), notes
        except CheckpointError as error:
            notes.append(f"{error}: taking the one before")
    if notes:
        raise CheckpointError(f"--resume {folder}: no checkpoint is intact; {notes[0]}")
    raise CheckpointError(f"--resume {folder}: there is no checkpoint in it")


@torch.no_grad()
def load(run, path, about):
    """Give the run the state of a checkpoint that `read` found intact. Raises CheckpointError, and
    nothing is changed, if it is of another model or other prompts."""
    if about["prompts"] != fingerprint(run.train, run.held_out):
        raise CheckpointError(f"{path}: the run had other prompts")
    expected = {name: ["F32", *t.shape] for name, t in _tensors(run).items()}
    policy = models.lora_parameters(run.model.transformer, "default")
    for i, p in enumerate(policy):
        shapes = {"step": [], "exp_avg": list(p.shape), "exp_avg_sq": list(p.shape)}
        expected |= {f"optimizer.{i}.{name}": ["F32", *shape] for name, shape in shapes.items()}
    try:
        file = safe_open(path / "state.safetensors", "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: state.safetensors is none ({error})") from error
    with file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        stored = {name: [s.get_dtype(), *s.get_shape()] for name, s in slices.items()}
        if about["step"] == 0:  # AdamW has no state before its first step
            expected = {k: v for k, v in expected.items() if not k.startswith("optimizer.")}
        if stored != expected:
            name = min(k for k in stored.keys() | expected if stored.get(k) != expected.get(k))
            raise CheckpointError(
                f"{path}: its {name} is {stored.get(name)}, this run's {expected.get(name)}"
            )
        state = {}
        for name in stored:
            owner, i, *entry = name.split(".")
            if owner == "optimizer":
                state.setdefault(int(i), {})[entry[0]] = file.get_tensor(name)
            else:
                parameters = models.lora_parameters(run.model.transformer, owner)
                parameters[int(i)].copy_(file.get_tensor(name))
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
