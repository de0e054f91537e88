"""The command line: a dataclass of options, read by transformers' HfArgumentParser and checked.

Wrong input raises a one-line InputError before any work is done.
"""

import dataclasses
import importlib.util
import os
from datetime import datetime
from pathlib import Path

import torch
from transformers import HfArgumentParser

from support import checkpoint, distributed
from support.errors import InputError, require
from support.preference import split_weight

# A resumed run may change these options: no number of the training depends on the first four, and
# only roundings depend on the others. All other options must be as they were.
RUNNING = ("steps", "report_to", "checkpoint_every", "eval_every")
RUNNING += ("gradient_checkpointing", "device", "train_micro_batch", "resume", "output_dir")
SMALLEST = {"kl": 0, "seed": 0, "learning_rate": 1e-30, "max_grad_norm": 1e-30}  # of others 1


def option(default, help, choices=None, optional=None):
    """A field that is an option of the command line. optional: its value where none follows it."""
    metadata = dict(help=help)
    if choices:
        metadata["choices"] = tuple(choices)
    if optional:
        metadata |= dict(nargs="?", const=optional)
    return dataclasses.field(default=default, metadata=metadata)


def constant(default):
    """A field that is no option."""
    return dataclasses.field(default=default, init=False)


class Parser(HfArgumentParser):
    """A command line whose errors are InputErrors."""

    def error(self, message):
        raise InputError(f"{message}; --help lists every option")


def parse(config_class, argv, paper, tiny):
    """argv, a list of words -> a checked config_class. paper: {model: its values that differ from
    the dataclass}; tiny: the same for the tiny models. Raises InputError."""
    first, _ = Parser(config_class, allow_abbrev=False, add_help=False).parse_known_args(argv)
    parser = Parser(config_class, allow_abbrev=False)
    if first.resume:
        return resumed(parser, config_class, argv, first.resume)
    own = (paper if first.pretrained else tiny).get(first.model, {})
    parser.set_defaults(**own)  # --help then shows what this command would use
    config = build(config_class, own | absolute(vars(parser.parse_args(argv))))
    if not config.output_dir:
        name = f"runs/{config.model}_{config.algorithm}_{datetime.now():%m%d-%H%M%S.%f}"[:-3]
        config.output_dir = distributed.gather([name])[0]  # the processes' clocks differ
    out = Path(config.output_dir)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    require(not taken, f"--output_dir {out}: is taken; choose another, or --resume {out}")
    above = next(path for path in out.absolute().parents if path.exists())
    usable = above.is_dir() and os.access(above, os.W_OK)
    require(usable, f"--output_dir {out}: {above} is no folder to write in; choose another")
    return check(config)


def build(config_class, values):
    """A config_class with these values of its options and constants; other names are left out."""
    config = config_class()
    for name in dataclasses.asdict(config).keys() & values.keys():
        setattr(config, name, values[name])
    return config


def resumed(parser, config_class, argv, folder):
    """The Config of the run that --resume names, with the changes that the command line makes. Its
    `checkpoint` is the Checkpoint to continue from."""
    if folder == "latest":
        paths = Path("runs").glob("*/checkpoints/step_*")
        latest = max(paths, key=os.path.getmtime, default=None)
        require(latest, "--resume latest: no run in runs/ has a checkpoint")
        folder = str(latest.parents[1])
    newest = checkpoint.newest(folder)
    saved, where = newest.options, f"--resume {folder}"
    known = {f.name for f in dataclasses.fields(config_class)}
    problem = "another version of this program made the run; start a new one"
    require(saved.keys() == known, f"{where}: {problem}")
    parser.set_defaults(**saved)
    named = {word.split("=")[0].replace("-", "_") for word in argv}
    given = absolute(vars(parser.parse_args(argv)) | dict(resume=folder))
    other = Path(given["output_dir"]).resolve() != Path(folder).resolve()
    require(not (other and "__output_dir" in named), f"{where}: continues there; no --output_dir")
    given["output_dir"] = folder
    for name in ("reward", "eval_rewards"):  # a file is executed only if the user names it here
        trusted = ".py:" not in saved[name] or f"__{name}" in named
        advice = f"if you trust it, add --{name} {saved[name]}"
        require(trusted, f"{where}: the run executes a file; {advice}")
    for name, value in given.items():
        was = f"{name} was {saved[name]!r} and is {value!r}; start a new run for that"
        require(name in RUNNING or value == saved[name], f"{where}: {was}")
    config, done = check(build(config_class, saved | given)), newest.step
    require(done <= config.steps, f"--steps {config.steps}: the run has done {done}; give more")
    config.checkpoint = newest
    return config


def absolute(options):
    """The options with absolute paths, so that a run can be resumed from any folder. Two ways to
    write the same file or the same reward become equal."""
    options = dict(options)
    for name in ("prompts", "eval_prompts", "pretrained", "lora"):
        if options[name] not in ("", "published") and Path(options[name]).exists():
            options[name] = str(Path(options[name]).resolve())  # else it is an id on the hub
    for name in ("reward", "eval_rewards"):
        options[name] = ",".join(map(absolute_reward, options[name].split(",")))
    return options


def absolute_reward(item):
    """One reward of a weighted sum: "mine.py:red:0.50" -> "/path/to/mine.py:red:0.5"."""
    name, weight = split_weight(item)
    file, is_file, function = name.rpartition(".py:")
    name = f"{Path(file).resolve().as_posix()}.py:{function}" if is_file else name
    return name if weight == 1 else f"{name}:{weight}"


def check(c):
    """Check ranges and this machine: processes, device, packages. Returns the Config."""
    for field in dataclasses.fields(c):
        value, least = getattr(c, field.name), SMALLEST.get(field.name, 1)
        if field.init and field.type in (int, float):
            allowed = f"must be at least {least} and below 2^63"
            require(least <= value < 2**63, f"--{field.name} {value}: {allowed}")
    require(c.keep % 2 == 0, f"--keep {c.keep}: must be even, half best and half worst")
    require(c.prompts or not c.pretrained, "--pretrained: needs --prompts FILE as well")
    P, processes = c.prompts_per_step, distributed.WORLD
    require(P >= processes, f"--prompts_per_step {P}: must be at least the {processes} processes")
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(c.device)
        if device.type == "cuda":
            torch.cuda.set_device(distributed.LOCAL_RANK if device.index is None else device.index)
        exists = device.type in ("cpu", "cuda") and torch.empty(1, device=device).numel()
    except (RuntimeError, AssertionError, AttributeError):  # the last if torch has no CUDA
        exists = False
    require(exists, f"--device {c.device}: not on this machine; try --device cpu")
    installed = c.report_to == "none" or importlib.util.find_spec(c.report_to)
    require(installed, f"--report_to {c.report_to}: not installed; pip install {c.report_to}")
    return c
