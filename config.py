"""What a run is told: its options and its prompts, checked before any work is done.

One dataclass holds every option; a field is an option of the command line (underscores, as in
diffusers' scripts). What is wrong is said in one line, as an OptionError.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import time
from pathlib import Path

import torch

import checkpoint
import distributed
import models
import quant
from engine import EngineError

RULES = ("best_worst", "random_subset", "mean_deviation", "extremes_random")


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the pool and the training samples of a rollout family come from."""

    explore: bool  # draw a pool of N, else only the K that are trained on
    quantized: bool  # draw it with the quantized explorer
    regenerate: bool  # draw the kept seeds again in BF16


FAMILIES = {
    "sol_rl": Family(explore=True, quantized=True, regenerate=True),
    "naive_scaling": Family(explore=True, quantized=False, regenerate=False),
    "naive_quant": Family(explore=True, quantized=True, regenerate=False),
    "diffusionnft": Family(explore=False, quantized=False, regenerate=False),
}


def option(default, about, choices=None):
    return dataclasses.field(default=default, metadata=dict(about=about, choices=choices))


@dataclasses.dataclass
class Config:
    """Every option. Defaults are the paper's; where a model family has its own they are in its
    class (models.py), and TINY replaces some unless --pretrained is given."""

    model: str = option("sana", "model family", tuple(models.MODELS))
    family: str = option("sol_rl", "rollout family", tuple(FAMILIES))
    pretrained: str = option("", "a diffusers folder or hub id; alone: the published checkpoint")
    reward: str = option("clipscore", "NAME, NAME:WEIGHT,NAME:WEIGHT or path/to/file.py:function")
    eval_rewards: str = option(
        "", "rewards like --reward that are only measured, on held-out prompts"
    )
    z_score: bool = option(
        False, "z-score each reward of a sum over a prompt's pool, or an iteration, first"
    )
    reward_weights: str = option("", "folder with the rewards' repositories instead of the hub")
    prompts: str = option("", "file with a prompt a line, or .jsonl with 'prompt' and metadata")
    eval_prompts: str = option(
        "", "prompts file to evaluate on; else every tenth of --prompts is held out, at most 64"
    )
    resolution: int = option(None, "side of the images in pixels")
    solver: str = option(None, "solver of the sampling ODE", models.SOLVERS)
    steps: int = option(300, "iterations, one optimizer step each")
    prompts_per_step: int = option(48, "P, prompts an iteration")
    pool: int = option(96, "N, candidates explored for a prompt")
    keep: int = option(24, "K, candidates trained on for a prompt, half best, half worst")
    select: str = option("best_worst", "which candidates are kept", RULES)
    precision: str = option("nvfp4", "precision of exploring", quant.PRECISIONS)
    precision_backend: str = option(
        "auto", "auto: Transformer Engine where it can be used; te: nothing else", quant.BACKENDS
    )
    min_dim: int = option(None, "layers with max(in, out) up to this stay in BF16")
    quantize_all: bool = option(False, "explore with no layer in BF16, whatever the paper keeps")
    compile: bool = option(False, "torch.compile what explores and regenerates")
    explore_steps: int = option(6, "sampling steps of exploring")
    rollout_steps: int = option(10, "sampling steps of what is trained on")
    eval_steps: int = option(40, "sampling steps of evaluation")
    eval_every: int = option(10, "iterations between evaluations and pictures")
    eval_images: int = option(2, "images for each held-out prompt")
    micro_batch: int = option(24, "images drawn or trained on at once")
    gradient_checkpointing: bool = option(True, "less memory and more time in the update")
    learning_rate: float = option(3e-4, "of AdamW")
    max_grad_norm: float = option(1.0, "gradient clip")
    lora_rank: int = option(32, "LoRA rank; alpha is twice it")
    timestep_fraction: float = option(0.6, "share of the sampling times trained per sample")
    nft_beta: float = option(1.0, "policy mix of the loss")
    kl: float = option(1e-4, "weight of the KL term against the base model")
    adv_clip: float = option(5.0, "advantages are clipped to +- this")
    advantage_std: str = option(
        "all", "over what the advantages' std is: all samples, or each prompt's", ("all", "prompt")
    )
    ema_decay: float = option(0.9, "decay of the EMA policy, which is evaluated and saved")
    seed: int = option(0, "run seed")
    output_dir: str = option("", "the run's folder; default runs/<model>_<family>_<time>")
    checkpoint_every: int = option(10, "iterations between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints are kept")
    on_nonfinite: str = option(
        "stop", "on NaN or infinity: end the run, or skip the step", ("stop", "skip")
    )
    resume: str = option("", "a run's folder to continue from its last checkpoint, or latest")
    force: str = option("", "options that a resumed run may change, as NAME,NAME")
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    report_to: str = option("none", "also log to", ("none", "tensorboard", "wandb"))

    checkpoint = None  # no option: what --resume found


TINY = dict(
    steps=20,
    prompts_per_step=6,
    resolution=32,
    min_dim=0,
    eval_every=5,
    checkpoint_every=5,
    eval_images=4,
    micro_batch=48,
    gradient_checkpointing=False,
    learning_rate=1e-3,
    lora_rank=16,
)


class OptionError(ValueError):
    """Bad input: one line for the user, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise OptionError(message)


def parse(argv, description=None):
    """argv -> Config, checked as far as options alone can be. Raises OptionError."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=as_written, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        name, meta = field.name, field.metadata
        kind = dict(type=field.type, choices=meta["choices"], default=argparse.SUPPRESS)
        if name == "pretrained":
            kind |= dict(nargs="?", const="published", metavar="ID_OR_PATH")
        elif field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif not meta["choices"]:
            kind |= dict(metavar=name.upper())
        paper = {m: family.paper.get(name, field.default) for m, family in models.MODELS.items()}
        same = len(set(paper.values())) == 1
        shown = field.default if same else ", ".join(f"{m} {v}" for m, v in paper.items())
        if name in TINY:
            shown = f"{TINY[name]}; pretrained: {shown}"
        about = meta["about"] + (f" (default {shown})" if shown != "" else "")
        parser.add_argument(f"--{name}", help=about, **kind)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        config = _resumed_config(given)
    elif "force" in given:
        raise OptionError(f"--force {given['force']}: what a --resume may change; there is none")
    else:
        config = Config(**(defaults(given.get("model", "sana"), given.get("pretrained")) | given))
    if not config.output_dir:
        now = time.strftime("%m%d-%H%M%S") + f"{time.time() % 1:.3f}"[1:]  # for starts in a loop
        config.output_dir = f"runs/{config.model}_{config.family}_{now}"
    _check(config)
    return config


def defaults(model, pretrained):
    """What the options of a model family are where Config's defaults do not say it."""
    return models.MODELS[model].paper | ({} if pretrained else TINY)


def command(config):
    """The command line that gives this config: every option that is not as by default."""
    usual = dataclasses.asdict(Config(**defaults(config.model, config.pretrained)))
    options = {k: v for k, v in dataclasses.asdict(config).items() if v != usual[k]}
    words = [f"--model {config.model}"]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif name not in ("model", "resume", "force", "device", "output_dir"):
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(["python train.py", *words])


def resuming(config):
    """The command line that continues a run. It names a reward's file, which is executed: what a
    checkpoint alone names is not."""
    start = f"torchrun --nproc_per_node={distributed.LOCAL_WORLD}"
    start = start if distributed.WORLD > 1 else "python"
    words = [f"{start} train.py --resume {shlex.quote(config.output_dir)}"]
    for name in ("reward", "eval_rewards"):
        if ".py:" in getattr(config, name):
            words.append(f"--{name} {shlex.quote(getattr(config, name))}")
    return " ".join(words)


def _resumed_config(given):
    """The options of the run that --resume names, changed as the command line may."""
    folder = given["resume"]
    if not folder:
        raise OptionError("--resume '': give a run's folder, or latest")
    if folder == "latest":
        runs = [path for path in Path("runs").glob("*") if checkpoint.found(path)]
        if not runs:
            raise OptionError("--resume latest: there is no run with checkpoints in runs/")
        folder = str(max(runs, key=lambda path: checkpoint.found(path)[-1][1].stat().st_mtime))
    about = f"--resume {folder}"
    for name in ("checkpoints", "images", "lora", "nonfinite"):
        if Path(folder, name).is_symlink():
            raise OptionError(f"{about}: its {name} is a link; nothing is written through one")
    try:  # the first process chooses for all
        found = checkpoint.newest(folder) if distributed.RANK == 0 else None
    except checkpoint.CheckpointError as error:
        raise OptionError(str(error)) from error
    found = distributed.exchange(found)[0]
    path, saved = found.path, found.about["options"]
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in sorted(fields.keys() ^ saved.keys()):
        raise OptionError(f"{about}: {path} is of another version: {name} is an option of one only")
    for name, value in saved.items():
        kind, choices = fields[name].type, fields[name].metadata["choices"]
        if not isinstance(value, (int, float) if kind is float else kind) or (
            choices and value not in choices
        ):
            raise OptionError(f"{about}: {path} has {name} = {value!r}")
    for name in ("reward", "eval_rewards"):
        if ".py:" in saved[name] and name not in given:
            raise OptionError(
                f"{about}: the run executes a file; if you trust it, say so by "
                f"--{name} {saved[name]}"
            )
    if Path(given.get("output_dir", folder)) != Path(folder):
        raise OptionError(
            f"--output_dir {given['output_dir']}: a run goes on in its folder {folder}"
        )
    changed = {k: v for k, v in given.items() if saved[k] != v and k != "output_dir"}
    forced = set(filter(None, given.get("force", "").split(",")))
    if forced - fields.keys() or forced & set(checkpoint.FIXED):
        raise OptionError(
            f"--force {given['force']}: names of options, without dashes, and none of "
            f"{', '.join(checkpoint.FIXED)}"
        )
    refused = sorted(changed.keys() - set(checkpoint.FREE) - forced)
    if refused:
        each = ", ".join(f"--{k} was {saved[k]!r} and is {changed[k]!r}" for k in refused)
        can = not set(refused) & set(checkpoint.FIXED)
        advice = f"--force {','.join(refused)} goes on" if can else "start a new run"
        raise OptionError(f"{about}: {each}; {advice}")
    config = Config(**saved | changed)
    config.resume = config.output_dir = folder
    config.force, config.checkpoint = given.get("force", ""), found
    if found.about["step"] > config.steps:
        raise OptionError(f"{about}: it has done {found.about['step']} steps; give more --steps")
    return config


def _check(c):
    ranges = dict(resolution=(1, 2**14), lora_rank=(1, 2**12), seed=(0, 2**63 - 1))
    ranges |= dict(min_dim=(0, 999_999), kl=(0, 1e30))
    counts = "steps prompts_per_step pool keep explore_steps rollout_steps eval_steps eval_every"
    counts += " checkpoint_every keep_checkpoints eval_images micro_batch"
    for name, (low, high) in (ranges | dict.fromkeys(counts.split(), (1, 999_999))).items():
        if not low <= getattr(c, name) <= high:
            raise OptionError(f"--{name} {getattr(c, name)}: must be in {low} to {high}")
    for name in ("learning_rate", "max_grad_norm", "nft_beta", "adv_clip", "timestep_fraction"):
        most = 1 if name == "timestep_fraction" else 1e30
        if not 0 < getattr(c, name) <= most:
            raise OptionError(f"--{name} {getattr(c, name)}: must be above 0 and at most {most}")
    if not 0 <= c.ema_decay < 1:
        raise OptionError(f"--ema_decay {c.ema_decay}: must be at least 0 and below 1")
    for name, value in dataclasses.asdict(c).items():
        if isinstance(value, str) and not _is_text(value):
            raise OptionError(f"--{name} {value!r}: holds a character that nothing may hold")
    if c.keep < 2 or c.keep % 2:
        raise OptionError(f"--keep {c.keep}: must be even and at least 2, half best and half worst")
    if c.keep > c.pool and FAMILIES[c.family].explore:
        raise OptionError(f"--keep {c.keep}: more than --pool {c.pool}")
    if c.prompts_per_step < distributed.WORLD:
        raise OptionError(
            f"--prompts_per_step {c.prompts_per_step}: fewer than the {distributed.WORLD} "
            f"processes they are split over; give at least that, or start fewer"
        )
    if distributed.WORLD > 1 and ":" in c.device:
        raise OptionError(
            f"--device {c.device}: one for {distributed.WORLD} processes; give cuda for one each"
        )
    if c.pretrained and not c.prompts:
        raise OptionError(
            "--pretrained needs --prompts FILE: the built-in ones are the tiny world's"
        )
    if not c.pretrained:
        import tiny

        if c.model not in tiny.PARTS:
            raise OptionError(f"--model {c.model}: there is no tiny one of it; give --pretrained")
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(c.device)
        if place.type not in ("cpu", "cuda"):
            raise RuntimeError
        if place.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(distributed.LOCAL_RANK if place.index is None else place.index)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {c.device}: not on this machine; try --device cpu") from error
    try:
        quant.backend(c.precision, c.device, c.precision_backend)
    except EngineError as error:
        raise OptionError(str(error)) from error
    if c.report_to != "none" and importlib.util.find_spec(c.report_to) is None:
        raise OptionError(f"--report_to {c.report_to}: not installed; pip install {c.report_to}")
    out = Path(c.output_dir)
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError(f"--output_dir {out}: cannot write in {above}; choose another")
    if not c.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        advice = f"--resume {out}" if checkpoint.found(out) else "delete it"
        raise OptionError(f"--output_dir {out} is taken; choose another, or {advice}")


def _is_text(text):
    """Whether files, tokenizers and the console can take it: no zero byte, no half of a pair."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def read_prompts(path, option="--prompts"):
    """A prompts file -> (prompts, their metadata dicts, what there is to say about them). A line
    that repeats prompt and metadata of another is left out; a prompt may come with others.
    option: the name that errors call it by."""
    about = f"{option} {path}"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OptionError(f"{about}: not a file")
        if os.stat(path).st_size > 2**28:
            raise OptionError(f"{about}: larger than 256 MB, which prompts are not")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"{about}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise OptionError(f"{about}: {error.strerror}") from error
    found, repeated = {}, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, metadata = line.strip(), {}
        if str(path).endswith(".jsonl"):
            try:
                metadata = json.loads(line)
                prompt = metadata.pop("prompt")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise OptionError(
                    f"{about}, line {number}: not a JSON object with 'prompt'"
                ) from error
            if not isinstance(prompt, str) or not prompt.strip() or not _is_text(prompt):
                raise OptionError(f"{about}, line {number}: 'prompt' is not a text")
        key = prompt, json.dumps(metadata, sort_keys=True)
        repeated += key in found
        found[key] = metadata
    if not found:
        raise OptionError(f"{about}: no prompt in it")
    note = [f"{path}: {repeated} repeated lines are used once"] if repeated else []
    return [prompt for prompt, _ in found], list(found.values()), note


@dataclasses.dataclass
class Prompts:
    """n prompts, their metadata, and, once encoded, what the transformer reads of them."""

    prompts: list
    metadata: list
    text: models.Text = None


def split_prompts(config):
    """(training Prompts, held-out Prompts, what there is to say about them).

    The tiny world's own, or a file's: of that every tenth prompt, at most 64 of them, is held out
    unless --eval_prompts is given, and a file of one prompt serves as both. Raises OptionError,
    also where a step needs more training prompts than there are.
    """
    if config.prompts:
        prompts, metadata, notes = read_prompts(config.prompts)
        train = Prompts(prompts, metadata)
        distinct = list(dict.fromkeys(prompts))
        if not config.eval_prompts and len(distinct) > 1:
            out = set(distinct[:: max(10, -(-len(distinct) // 64))])
            rows = [(p, m) for p, m in zip(prompts, metadata) if p in out]
            held_out = Prompts(*map(list, zip(*rows)))
            rows = [(p, m) for p, m in zip(prompts, metadata) if p not in out]
            train = Prompts(*map(list, zip(*rows)))
        else:
            held_out = train
    else:
        import tiny

        notes = []
        train, held_out = (
            Prompts(p, [{} for _ in p]) for p in (tiny.TRAIN_PROMPTS, tiny.HELD_OUT_PROMPTS)
        )
    if config.eval_prompts:
        prompts, metadata, more = read_prompts(config.eval_prompts, "--eval_prompts")
        held_out, notes = Prompts(prompts, metadata), notes + more
    both = len(set(train.prompts) & set(held_out.prompts))
    if both:
        notes.append(f"{both} of the {len(held_out.prompts)} held-out prompts are trained on too")
    most = len(train.prompts)
    if config.prompts_per_step > most:
        raise OptionError(
            f"--prompts_per_step {config.prompts_per_step}: there are {most} training prompts; "
            f"give at most that"
        )
    return train, held_out, notes
