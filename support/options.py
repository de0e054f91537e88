"""What a run is told: its options, checked before any work is done.

One dataclass holds everything that can be set. A field with a help text is an option of the command
line; a field without one is a constant of the method, which you change here. A mistake is answered
by an InputError, whose text is one line. The file imports torch only once the options are known, so
`--help` and a mistyped option are answered at once.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path

from support import distributed
from support.errors import InputError, Parser, require


def option(default, help=None, choices=None, tiny=None):
    """A field of Config. tiny: its default where a tiny model is trained, if that is another."""
    metadata = dict(help=help, choices=choices, tiny=tiny)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Everything that can be set. The defaults are the paper's. Where they depend on the model, the
    model's class has them (`paper` in support/models.py). Tiny models have some of their own."""

    model: str = option("sana", "sana, flux or sd3: SANA, FLUX.1 or Stable Diffusion 3.5")
    algorithm: str = option("sol_rl", "sol_rl, naive_scaling, naive_quant or diffusionnft")
    pretrained: str = option("", "a diffusers folder or hub id; without a value: the published one")
    lora: str = option("", "a LoRA in diffusers' format to start from: a folder, file or hub id")
    reward: str = option("clipscore", "NAME, NAME:WEIGHT,NAME:WEIGHT or path/to/file.py:function")
    eval_rewards: str = option("", "rewards that are only measured, on the held-out prompts")
    prompts: str = option("", "file with one prompt per line, or .jsonl with 'prompt' and metadata")
    eval_prompts: str = option("", "file of held-out prompts; else every tenth prompt, at most 64")
    pipeline_text: bool = option(False, "encode as the pipeline does, not the authors' code")
    resolution: int = option(None, "side of the images in pixels", tiny=32)

    steps: int = option(300, "iterations, one optimizer step each", tiny=40)
    prompts_per_step: int = option(48, "P, prompts per iteration", tiny=2)
    pool: int = option(96, "N, candidates explored per prompt")
    keep: int = option(24, "K, candidates trained on per prompt; an even number")
    select: str = option("best_worst", "best_worst, random_subset, mean_deviation, extremes_random")
    precision: str = option("nvfp4", "explore in nvfp4, nvfp4_4over6, nvfp4_row, fp8 or bf16")
    min_dim: int = option(None, tiny=0)  # layers with max(inputs, outputs) up to this stay in BF16
    compile: bool = option(None, "torch.compile the transformers that draw candidates")
    explore_steps: int = option(6, "sampling steps when exploring")
    rollout_steps: int = option(10, "sampling steps of the images that are trained on")
    eval_steps: int = option(40, "sampling steps when evaluating", tiny=20)
    eval_every: int = option(20, "iterations between evaluations", tiny=10)
    eval_images: int = option(2, tiny=4)  # images per held-out prompt
    micro_batch: int = option(24, "images drawn at once", tiny=96)
    train_micro_batch: int = option(16, "(image, time) pairs trained on at once", tiny=144)
    gradient_checkpointing: bool = option(True, "less memory, more time in the update", tiny=False)
    low_memory: bool = option(False, "slower: LoRA not merged for BF16, text encoders on the CPU")
    dry_run: bool = option(False, "only print what --pretrained with nvfp4 needs of a GPU")

    learning_rate: float = option(3e-4, "learning rate of AdamW", tiny=3e-3)
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm")
    lora_rank: int = option(32, "rank of the LoRA; a new one's alpha is twice that", tiny=16)
    kl: float = option(1e-4, "weight of the KL term against the base model")
    timestep_fraction: float = 0.6  # share of the sampling times at which each image is trained
    nft_beta: float = 1.0  # beta of the NFT loss, the policy mix
    advantage_std: str = "all"  # the std of the advantages is over "all" rewards, or per "prompt"
    adv_clip: float = 5.0  # advantages are clipped to this on both sides
    ema_decay: float = 0.9  # largest decay of the EMA policy, which is evaluated and saved

    seed: int = option(0, "every random number of the run follows from it")
    output_dir: str = option("", "the run's folder; default: runs/MODEL_ALGORITHM_TIME")
    checkpoint_every: int = option(5, "iterations between checkpoints")
    resume: str = option("", "a run's folder to continue, or latest: the newest run in runs/")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    report_to: str = option("none", "where metrics also go", ("none", "tensorboard", "wandb"))

    checkpoint = None  # neither option nor constant: the Checkpoint that --resume found

    @property
    def compiled(self):
        """Whether what draws candidates is compiled."""
        by_default = bool(self.pretrained) and self.device.startswith("cuda")
        return by_default if self.compile is None else self.compile


# What the help text says of defaults that are not the same for all models and devices.
OF_MODEL = ("resolution", "eval_steps", "max_grad_norm", "train_micro_batch")
DEFAULTS_IN_WORDS = dict.fromkeys(OF_MODEL, "the model's")
DEFAULTS_IN_WORDS["compile"] = "on with --pretrained on a GPU"
# Options that a resumed run may change. No number of the training depends on those of the first
# line; on those of the second only roundings depend.
RUNNING = ("steps", "report_to", "checkpoint_every", "eval_every", "gradient_checkpointing")
RUNNING += ("device", "compile", "train_micro_batch", "low_memory")
# Smallest and largest value, by the option's name or else by its type.
RANGES = {int: (1, 999_999), float: (1e-30, 1e30), "seed": (0, 2**63 - 1), "kl": (0, 1e30)}
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
OPTIONS = {name: field for name, field in FIELDS.items() if field.metadata.get("help")}
TINY_DEFAULTS = {
    n: f.metadata["tiny"] for n, f in FIELDS.items() if f.metadata.get("tiny") is not None
}


def read_command_line(argv, description=None):
    """argv (None: the program's own) -> dict of the options that are given. Raises InputError for
    an unknown option or a value of the wrong type, and SystemExit(0) after --help."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=as_written, allow_abbrev=False)
    for name, field in OPTIONS.items():
        default = DEFAULTS_IN_WORDS.get(name, field.default)
        if name in TINY_DEFAULTS:
            default = f"{TINY_DEFAULTS[name]}; with --pretrained: {default}"
        help = field.metadata["help"] + (f" (default: {default})" if default != "" else "")
        settings = dict(type=field.type, metavar=field.type.__name__.upper())
        if field.type is bool:
            settings = dict(action=argparse.BooleanOptionalAction)
        elif name == "pretrained":
            settings = dict(nargs="?", const="published", metavar="FOLDER_OR_ID")
        elif field.metadata["choices"]:
            settings = dict(choices=field.metadata["choices"])
        parser.add_argument(f"--{name}", help=help, default=argparse.SUPPRESS, **settings)
    return vars(parser.parse_args(argv))


def answer_at_once(argv, description):
    """End the program here after --help (exit code 0) or a wrong option (one line, by the first
    process; exit code 2)."""
    try:
        read_command_line(argv, description)
    except InputError as error:
        if distributed.RANK == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(argv, choices, paper, description=None):
    """argv -> Config, checked. choices: {option: its possible values}; paper: {model: dict of its
    defaults}. Raises InputError."""
    given = read_command_line(argv, description)
    if "resume" in given:
        config = resumed_config(given, paper)
    else:
        defaults = model_defaults(given.get("model", "sana"), given.get("pretrained"), paper)
        config = Config(**defaults | given)
    check_values(config, choices)
    if not config.output_dir:
        now = time.strftime("%m%d-%H%M%S") + f"{time.time() % 1:.3f}"[1:]
        config.output_dir = f"runs/{config.model}_{config.algorithm}_{now}"
    if not config.dry_run:
        check_machine(config)
    return config


def model_defaults(model, pretrained, paper):
    """The defaults of a model where they are not those of Config."""
    own = {name: value for name, value in paper.get(str(model), {}).items() if name in FIELDS}
    return own | ({} if pretrained else TINY_DEFAULTS)


def resumed_config(given, paper):
    """The Config of the run that --resume names, with the changes that the command line makes."""
    from support import checkpoint

    folder = given["resume"]
    if folder == "latest":
        paths = Path("runs").glob("*/checkpoints/step_*")
        latest = max(paths, key=os.path.getmtime, default=None)
        require(latest, "--resume latest: no run in runs/ has a checkpoint")
        folder = str(latest.parents[1])
    require(folder, "--resume '': give a run's folder, or latest")
    newest = checkpoint.newest(folder)
    saved = {name: value for name, value in newest.options.items() if name in FIELDS}
    unknown = ", ".join(sorted(newest.options.keys() - saved.keys()))
    reason = f"another version made the run, with the options {unknown}; start a new run"
    require(not unknown, f"--resume {folder}: {reason}")
    for name in ("reward", "eval_rewards"):  # a file is executed only if the user names it here
        if ".py:" in str(saved.get(name)) and name not in given:
            trust = f"if you trust it, add --{name} {saved[name]}"
            raise InputError(f"--resume {folder}: the run executes a file; {trust}")
    defaults = model_defaults(saved.get("model", "sana"), saved.get("pretrained"), paper)
    fresh, folders = dataclasses.asdict(Config(**defaults)), dict(resume=folder, output_dir=folder)
    before = fresh | saved | folders
    constants = {name: value for name, value in fresh.items() if name not in OPTIONS}
    wanted = constants | given | dict(resume=folder)
    changed = {name: value for name, value in wanted.items() if value != before[name]}
    lines = {name: f"{name} was {before[name]!r} and is {changed[name]!r}" for name in changed}
    refused = ", ".join(line for name, line in lines.items() if name not in RUNNING)
    require(not refused, f"--resume {folder}: {refused}; start a new run for that")
    newest.notes.extend([f"continuing from {newest.path}", *lines.values()])
    config = Config(**before | changed)
    if config.steps == newest.step:
        newest.notes.append("all steps are done: the results are written; more --steps would go on")
    config.checkpoint = newest
    return config


def check_values(c, choices):
    """Check each value, which a checkpoint may give any type, and what two of them must fulfil."""
    for name, field in OPTIONS.items():
        value, types = getattr(c, name), (int, float) if field.type is float else field.type
        if name == "compile" and value is None:  # then Config.compiled decides
            continue
        require(isinstance(value, types), f"--{name} {value!r}: must be {field.type.__name__}")
        allowed = field.metadata["choices"] or choices.get(name)
        if allowed:
            require(value in allowed, f"--{name} {value}: must be one of {', '.join(allowed)}")
        low, high = RANGES.get(name) or RANGES.get(field.type) or (value, value)
        require(low <= value <= high, f"--{name} {value}: must be from {low} to {high}")
    require(c.keep % 2 == 0, f"--keep {c.keep}: must be even, half best and half worst")
    needs_prompts = c.pretrained and not c.dry_run
    require(c.prompts or not needs_prompts, "--pretrained: needs --prompts FILE as well")
    done = c.checkpoint.step if c.checkpoint else 0
    require(done <= c.steps, f"--steps {c.steps}: the run has done {done} already; give more")


def check_machine(c):
    """Check the values against this machine: processes, device, packages, folder."""
    import torch

    from support import checkpoint

    world = distributed.WORLD
    few = f"--prompts_per_step {c.prompts_per_step}: must be at least the {world} processes"
    require(c.prompts_per_step >= world, few)
    index = f"--device {c.device}: one device for {world} processes; give cuda for one each"
    require(world == 1 or ":" not in c.device, index)
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(c.device)
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(distributed.LOCAL_RANK if device.index is None else device.index)
        exists = device.type in ("cpu", "cuda") and torch.empty(1, device=device).numel()
    except (RuntimeError, AssertionError):
        exists = False
    require(exists, f"--device {c.device}: not on this machine; try --device cpu")
    installed = c.report_to == "none" or importlib.util.find_spec(c.report_to)
    require(installed, f"--report_to {c.report_to}: not installed; pip install {c.report_to}")
    out = Path(c.output_dir)
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    writable = above.is_dir() and os.access(above, os.W_OK)
    require(writable, f"--output_dir {out}: cannot write in {above}; choose another folder")
    advice = f"--resume {out}" if checkpoint.list_checkpoints(out) else "delete it"
    taken = not c.resume and out.exists() and any(out.iterdir())
    require(not taken, f"--output_dir {out}: is taken; choose another, or {advice}")
