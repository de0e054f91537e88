"""Checkpoints: a run that stops at any moment continues as if it had not.

    checkpoints/step_000010/
        state.safetensors   the three adapters and AdamW's state
        run.json            step, options, fingerprints of prompts, rewards' files and base model
        metrics.jsonl       the log so far
        manifest.json       size and SHA-256 of these three

There is no random state in it: every number follows from the seed, the step and the prompt. It is
written into a folder of a temporary name, synced and renamed: it is whole or it is not there. With
many processes the first one writes and chooses; all must see the folder to continue.

What is read is not trusted: kinds and sizes of files are checked before contents, hashes before
anything is parsed, shapes before anything is loaded. No pickle is opened, no reward's file executed
that the command line does not name too.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import distributed
import models
from reward import RewardError

FILES = ("state.safetensors", "run.json", "metrics.jsonl")
LARGEST = {"state.safetensors": 2**36, "metrics.jsonl": 2**28}  # bytes
LARGEST_JSON = 2**24  # of the other two and of a line of metrics.jsonl
EVALUATION = {"eval/reward", "eval/rewards", "eval/standard_error"}  # and, after step 0, GAIN
GAIN = {"eval/gain", "eval/gain_standard_error"}
# Options that a continued run may have otherwise; of prompts files the contents must be the same.
FREE = (
    "resume force steps device report_to checkpoint_every keep_checkpoints on_nonfinite "
    "prompts eval_prompts"
).split()
ASIDE = ".replaced"
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)
FIXED = ["model", "lora_rank"]  # those that no --force can change: they are the checkpoint's shapes


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line for the user."""


def found(folder):
    """The checkpoints of a run's folder, by step: [(step, path)]. One that was being replaced by
    another of its step, and so still is aside, comes before that."""
    paths = Path(folder, "checkpoints").glob("step_*")
    named = re.compile(rf"step_[0-9]{{6}}({re.escape(ASIDE)})?")
    paths = [path for path in paths if named.fullmatch(path.name)]
    return sorted(((_step(p), p) for p in paths), key=lambda each: (each[0], not each[1].suffix))


def _step(path):
    return int(path.stem[5:])


def prompts_fingerprint(*parts):
    """A hash of the prompts and metadata of training and held-out Prompts."""
    return _text_hash([[part.prompts, part.metadata] for part in parts])


def rewards_fingerprint(*specs):
    """A hash of the files that specs of rewards name."""
    files = re.findall(r"([^,]+[.]py):", ",".join(specs))
    return _text_hash([_hash(name.strip()) for name in files])


def base_fingerprint(transformer):
    """A hash of the first numbers of every parameter."""
    return _text_hash([p.flatten()[:16].tolist() for p in transformer.parameters()])


def _text_hash(what):
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


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
        if not self.asked and distributed.RANK == 0:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this micro-batch; Ctrl-C to leave at once\n")
        self.asked = self.asked or number

    def check(self):
        if self.asked:
            distributed.fail(Stopped(self.asked))


class Ended(RuntimeError):
    """What is outside the run failed it: the disk, a reward."""


@contextlib.contextmanager
def resumable(folder, again):
    """Say how the run goes on, by the command `again`, when what fails it in here is mended."""
    try:
        yield
    except (OSError, SafetensorError, RewardError) as error:
        then = f"continue with: {again}" if found(folder) else "start again"
        line = " ".join(str(error).split()) or repr(error)
        raise Ended(f"{line}; when that is mended, {then}") from error


# ---------------------------------------------------------------------------------------------
# Writing


def save(run, log, step):
    """Write the checkpoint of `step` and delete all but the last --keep_checkpoints.

    log: metrics.jsonl's text so far. Returns its path."""
    folder = Path(run.config.output_dir) / "checkpoints"
    path, unfinished = folder / f"step_{step:06d}", folder / "unfinished"
    if distributed.RANK > 0:
        return path
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(_tensors(run), unfinished / FILES[0])
        about = {
            "step": step,
            "options": dataclasses.asdict(run.config),
            "fingerprints": run.fingerprints,
        }
        (unfinished / FILES[1]).write_text(json.dumps(about))
        (unfinished / FILES[2]).write_text(log)
        files = {name: unfinished / name for name in FILES}
        manifest = {name: [file.stat().st_size, _hash(file)] for name, file in files.items()}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in (*FILES, "manifest.json", "."):
            _sync(unfinished / name)
        aside = path.with_name(path.name + ASIDE)
        if path.exists():  # of other options, or damaged; there is one of the two at any moment
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        unfinished.rename(path)
        _sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
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
        for name in (*FILES, "manifest.json"):
            status = os.lstat(path / name)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{name} is not a file")
            if status.st_size > LARGEST.get(name, LARGEST_JSON):
                raise CheckpointError(f"{name} is too large to be one")
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or sorted(manifest) != sorted(FILES):
            raise CheckpointError("its manifest names other files")
        for name in FILES:
            size, digest = manifest[name]
            if (path / name).stat().st_size != size or _hash(path / name) != digest:
                raise CheckpointError(f"{name} is not what the manifest says")
        about = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if about["step"] != _step(path) or not isinstance(about["options"], dict):
            raise CheckpointError("run.json is of another checkpoint")
        if not isinstance(about["fingerprints"], dict):
            raise CheckpointError("run.json has no fingerprints")
        with open(path / "metrics.jsonl", encoding="utf-8") as file:
            lines = []
            while text := file.readline(LARGEST_JSON):
                lines.append(_line(text, len(lines)))
        before_any = not lines and about["step"] == 0  # stopped in its first evaluation
        if len(lines) != about["step"] + 1 and not before_any:
            raise CheckpointError("metrics.jsonl is of another checkpoint")
        if len({len(line["eval/rewards"]) for line in lines if "eval/rewards" in line}) > 1:
            raise CheckpointError("metrics.jsonl has evaluations of different prompts")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except BROKEN as error:
        said = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path}: damaged ({said})") from error
    return about, lines


def _line(text, step):
    """The line of metrics.jsonl of a step: numbers by name; an evaluation, which step 0 is, has all
    that is read of one."""
    line = json.loads(text)
    for name, value in line.items():
        several = name == "eval/rewards" and isinstance(value, list) and value
        if name == "eval/rewards" and not several:
            raise CheckpointError(f"metrics.jsonl has no list for {name}")
        for number in value if several else [value]:
            empty = number is None and not several  # what was nan
            if not empty and not (isinstance(number, (int, float)) and math.isfinite(number)):
                raise CheckpointError(f"metrics.jsonl has no number for {name}")
    if line["step"] != step:
        raise CheckpointError("metrics.jsonl is of another checkpoint")
    wanted = EVALUATION | (GAIN if step else set())
    if not (wanted <= line.keys() or (step and not wanted & line.keys())):
        raise CheckpointError("metrics.jsonl has a line that is none of a run")
    return line


class Found(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    about: dict  # run.json
    lines: list  # of metrics.jsonl
    notes: list  # the newer ones that are damaged, a line each


def newest(folder):
    """The newest intact checkpoint of a run's folder, as Found. Raises CheckpointError where none
    is intact."""
    notes = []
    for _, path in reversed(found(folder)):
        try:
            return Found(path, *read(path), notes)
        except CheckpointError as error:
            notes.append(f"{error}: taking the one before")
    if notes:
        raise CheckpointError(f"--resume {folder}: no checkpoint is intact; {notes[0]}")
    raise CheckpointError(f"--resume {folder}: there is no checkpoint in it")


@torch.no_grad()
def load(run, path):
    """Give the run the state of a checkpoint that `read` found intact. Raises CheckpointError, and
    nothing is changed, if it is of another model."""
    policy = models.lora_parameters(run.model.transformer, "default")
    fresh = {name: ["F32", *t.shape] for name, t in _tensors(run).items()}
    expected = dict(fresh)
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
        if not any(name.startswith("optimizer.") for name in stored):
            expected = fresh  # AdamW has no state before its first step
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
