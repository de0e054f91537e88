"""What a run writes and says: its folder, its pictures, its lines on the console.

config.json     every option as resolved, what ran each layer, package versions
metrics.jsonl   one line a step (the README defines each name)
images/         best and worst candidates of one prompt, FP4 above BF16, with their rewards
curve.png       reward on held-out prompts and on the kept candidates
lora/           the EMA policy's LoRA, which `pipe.load_lora_weights(folder)` takes, with a card
checkpoints/    what --resume continues from
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib
from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from tqdm import tqdm

import distributed
import models
import quant
from config import FAMILIES, OptionError, command, resuming
from distributed import say

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend comes first

SHOWN = ("time/explore", "time/regenerate", "time/reward", "time/train")  # in a step's line
EVALUATED = ("step", "eval/", "time/evaluate")  # in the line of an evaluation


class Report:
    """The run's folder and console, written by the first of the run's processes alone."""

    def __init__(self, run):
        self.run, self.config = run, run.config
        self.folder = Path(self.config.output_dir)
        self.history, self.evaluations, self.started = [], [], time.perf_counter()
        self.bar, self.close_tracker = None, lambda: None
        self.spent = dict(run.clock.seconds)
        self._header()
        self.tracker = self._tracker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()
        self.close_tracker()

    def begin(self, done):
        """Show how far the run is."""
        c, others = self.config, distributed.RANK > 0
        self.bar = tqdm(desc=c.family, initial=done, total=c.steps, disable=others)

    def _header(self):
        c, layers = self.config, self.run.layers
        swapped = sum(not outcome.startswith("kept") for *_, outcome in layers)
        backend = "explored in BF16"
        if layers:
            _, line = quant.backend(c.precision, c.device, c.precision_backend)
            backend = f"explored in {line}: {swapped} of {len(layers)} layers"
        P, K = c.prompts_per_step, c.keep
        N = c.pool if FAMILIES[c.family].explore else K
        trained = max(1, round(c.timestep_fraction * c.rollout_steps))
        options = "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(c).items() if v != "")
        say(textwrap.fill(options, 100))
        say(
            f"{backend}\n"
            f"an iteration: {P} prompts x {N} candidates; {P} x {K} = {P * K} trained at {trained} "
            f"times each, one optimizer step; guidance off\n"
            f"{len(self.run.train.prompts)} training and {len(self.run.held_out.prompts)} held-out "
            f"prompts; writing to {self.folder}"
        )
        for note in self.run.notes:
            say(note)
        packages = ("torch", "diffusers", "transformers", "peft")
        config = {
            "config": dataclasses.asdict(c),
            "backend": backend,
            "layers": layers,
            "versions": {package: version(package) for package in packages},
        }
        _write(self.folder / "config.json", json.dumps(config, indent=1))

    def _tracker(self):
        if distributed.RANK > 0 or self.config.report_to == "none":
            return lambda step, m: None
        if self.config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.folder)
            self.close_tracker = writer.close
            return lambda step, m: [writer.add_scalar(k, v, step) for k, v in m.items()]
        import wandb

        about = dict(id=self.folder.name, resume="allow", config=dataclasses.asdict(self.config))
        wandb.init(project="sol-rl", **about)
        self.close_tracker = wandb.finish
        return lambda step, m: wandb.log(m, step=step)

    def evaluated(self, step, scores):
        """scores: {reward: of each held-out prompt}. What is gained since step 0 is compared prompt
        by prompt, the noise being the same: its error is much below that of either mean."""
        rewards = scores["weighted_sum"]
        mean, error = mean_and_error(rewards)
        line = {f"eval/{name}": statistics.mean(values) for name, values in scores.items()}
        line |= {"eval/reward": mean, "eval/standard_error": error}
        seconds = self.run.clock.seconds["evaluate"]
        line["time/evaluate"] = seconds - self.spent["evaluate"]
        self.spent["evaluate"] = seconds
        text = f"step {step:4d}  held-out reward {mean:.4f} +- {error:.4f}"
        if self.evaluations:
            first = self.evaluations[0]["eval/rewards"]
            gain, error = mean_and_error([b - a for a, b in zip(first, rewards)])
            line |= {"eval/gain": gain, "eval/gain_standard_error": error}
            text += f"  gain {gain:+.4f} +- {error:.4f}"
        self.evaluations.append({"step": step} | line | {"eval/rewards": rewards})
        if self.history:
            self.history[-1] |= self.evaluations[-1]
        self._write_history()
        self.tracker(step, line)
        say(text)

    def step(self, step, metrics):
        """Log one step: a line on the console, a line in metrics.jsonl."""
        self._log(step, metrics)
        say(
            f"step {step:4d}  reward {metrics['reward/mean']:.4f} "
            f"({metrics['reward/worst']:.3f} to {metrics['reward/best']:.3f})  "
            f"tau {metrics['fidelity/kendall_tau']:.2f}  loss {metrics['loss']:.3f}  "
            f"kl {metrics['kl']:.1e}  grad {metrics['grad_norm']:.2f}  "
            + "  ".join(f"{k[5:]} {v:.1f}s" for k, v in metrics.items() if k in SHOWN)
        )

    def skipped(self, step):
        """A line of its own for a step that was not taken."""
        before = sum("nonfinite/skipped" in line for line in self.history)
        self._log(step, {"nonfinite/skipped": before + 1})

    def _log(self, step, metrics):
        seconds = self.run.clock.seconds
        metrics |= {f"time/{k}": seconds[k] - self.spent[k] for k in seconds if k != "evaluate"}
        self.spent = seconds | {"evaluate": self.spent["evaluate"]}
        self.history.append({"step": step} | metrics)
        self._write_history()
        self.bar.update()
        self.tracker(step, metrics)

    def _write_history(self):
        _write(self.folder / "metrics.jsonl", self.log())

    def log(self):
        """What metrics.jsonl holds."""
        before = [line for line in self.evaluations[:1] if line["step"] == 0]
        clean = [
            {k: None if v != v else v for k, v in line.items()}  # JSON has no nan
            for line in before + self.history
        ]
        return "".join(json.dumps(line) + "\n" for line in clean)

    def resumed(self, checkpoint):
        """Take up the log of a checkpoint.Found; returns its step."""
        for line in checkpoint.lines:
            line = {k: math.nan if v is None else v for k, v in line.items()}
            if "eval/reward" in line:
                evaluation = {k: v for k, v in line.items() if k.startswith(EVALUATED)}
                self.evaluations.append(evaluation)
            if line["step"]:
                self.history.append(line)
        self._write_history()
        for note in [*checkpoint.notes, f"continuing from {checkpoint.path}"]:
            say(note)
        for name, value in dataclasses.asdict(self.config).items():
            before = checkpoint.about["options"][name]
            if value != before and name not in ("resume", "force", "output_dir"):
                say(f"--{name} was {before!r} and is {value!r}")
        done = checkpoint.about["step"]
        if done == self.config.steps:
            say(f"all {done} steps are done: writing their results; more --steps would go on")
        return done

    def is_evaluated(self, step):
        return bool(self.evaluations) and self.evaluations[-1]["step"] == step

    def picture(self, step, row, explored, trained):
        """images/step_NNNN.png: the same seeds as explored (above) and as trained on (below)."""
        places = [i for i in explored.images if i in trained.images]
        if not places or distributed.RANK > 0:  # a rule may keep none of the best and worst
            return
        two = explored is not trained
        figure, axes = plt.subplots(
            1 + two, len(places), figsize=(1.3 * len(places), 1.9 * (1 + two)), squeeze=False
        )
        for column, i in enumerate(sorted(places)):
            for line, candidates in enumerate([explored, trained] if two else [trained]):
                axis = axes[line][column]
                axis.imshow(candidates.images[i].permute(1, 2, 0).float().numpy())
                axis.set_title(f"{candidates.rewards[i]:.3f}", fontsize=9)
                axis.set_xticks([])
                axis.set_yticks([])
        names = [self.config.precision, "bf16"] if two else [""]
        for line, name in enumerate(names):
            axes[line][0].set_ylabel(name)
        figure.suptitle(
            f"{self.run.train.prompts[row]}: best and worst, step {step}",
            fontsize=10,
            parse_math=False,
        )
        (self.folder / "images").mkdir(exist_ok=True)
        _save(figure, self.folder / "images" / f"step_{step:04d}.png")

    def curve(self):
        """curve.png: the reward trained on and, below, each one only measured, on held-out prompts:
        when the first rises and the others fall, the reward is being hacked."""
        others = [name for name, *_ in self.run.eval_rewards.parts] if self.run.eval_rewards else []
        figure, axes = plt.subplots(
            1 + len(others), figsize=(6, 4 + 2 * len(others)), sharex=True, squeeze=False
        )
        first, *rest = axes[:, 0]
        steps = [line["step"] for line in self.evaluations]
        means, errors = (
            [line[f"eval/{name}"] for line in self.evaluations]
            for name in ("reward", "standard_error")
        )
        first.errorbar(steps, means, yerr=errors, marker="o", label="held-out prompts, EMA policy")
        taken = [line for line in self.history if "reward/mean" in line]
        first.plot(
            [line["step"] for line in taken],
            [line["reward/mean"] for line in taken],
            alpha=0.5,
            label="kept candidates, best and worst",
        )
        first.set(ylabel="reward", title=self.config.reward)
        first.legend()
        for axis, name in zip(rest, others):
            # A continued run may measure another one, of which there is nothing before.
            seen = [line.get(f"eval/{name}", math.nan) for line in self.evaluations]
            axis.plot(steps, seen, marker="o")
            axis.set_ylabel(f"{name}\n(not trained on)")
        axes[-1, 0].set_xlabel("optimizer steps")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        _save(figure, self.folder / "curve.png")

    def finish(self):
        """Write what a finished run leaves, its LoRA last."""
        if distributed.RANK > 0:
            return
        (self.folder / "lora").mkdir(exist_ok=True)
        self.curve()
        first, last = self.evaluations[0], self.evaluations[-1]
        result = "{} before, {} after {} steps".format(
            *(f"{x['eval/reward']:.4f} +- {x['eval/standard_error']:.4f}" for x in (first, last)),
            last["step"],
        )
        gain, error = last["eval/gain"], last["eval/gain_standard_error"]
        result += f"; gain {gain:+.4f} +- {error:.4f}"
        if error > 0:
            result += f", {gain / error:.1f} standard errors"
        say(f"\nheld-out reward: {result}")
        self._card(result)
        models.save_lora(self.run.model, "ema", self.folder / "lora")
        stages = "  ".join(f"{k} {v:.0f}s" for k, v in self.run.clock.seconds.items())
        say(f"time: {time.perf_counter() - self.started:.0f}s in all;  {stages}")
        for name in ("curve.png", "images", "metrics.jsonl", "lora", "checkpoints", "config.json"):
            say(f"wrote {self.folder / name}")

    def _card(self, result):
        """lora/README.md, a model card, and the scheduler that it tells to take."""
        c, kind = self.config, self.run.model.pipeline.__name__
        base = c.pretrained if c.pretrained != "published" else self.run.model.published
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=["lora", "sol-rl", "diffusion-nft"],
            base_model=base if base and not Path(base).exists() else None,
        )
        config = json.dumps(dataclasses.asdict(c), indent=1)
        taken = sum("loss" in line for line in self.history)
        scheduler = self.run.model.scheduler(c.rollout_steps)
        scheduler.save_pretrained(self.folder / "lora")  # with what FLUX.1's pipeline reads of it
        solver = type(scheduler).__name__
        variant = self.run.model.variant if c.pretrained == "published" else None
        load = "torch_dtype=torch.bfloat16" + (f', variant="{variant}"' if variant else "")
        call = dict(guidance_scale=1.0, num_inference_steps=c.eval_steps)
        call |= dict(height=c.resolution, width=c.resolution) | self.run.model.call()
        call = ", ".join(f"{name}={value}" for name, value in call.items())
        _write(
            self.folder / "lora" / "README.md",
            f"---\n{data.to_yaml()}\n---\n"
            f"# A LoRA for {base or f'the tiny {c.model} of this project'}\n\n"
            f"Trained by Sol-RL (arXiv 2604.06916) for {taken} steps on the reward "
            f"`{c.reward}`; these are the EMA policy's weights. Guidance was off and the solver "
            f"{c.solver} at {c.rollout_steps} steps.\n\n"
            f"Held-out reward: {result}.\n\n```\n{command(c)}\n```\n\n```python\n"
            f"import torch\nfrom diffusers import {kind}, {solver}\n\n"
            f"pipe = {kind}.from_pretrained({(base or 'path/to/the/tiny/model')!r}, {load})\n"
            f'pipe.scheduler = {solver}.from_pretrained("path/to/this/folder")\n'
            f'pipe.load_lora_weights("path/to/this/folder")\n'
            f'image = pipe("a prompt", {call}).images[0]\n```\n\n'
            f"Every option:\n\n```json\n{config}\n```\n",
        )

    def nonfinite(self, step, error):
        """Say what was not finite after `step` steps and keep it in nonfinite/, with its seed."""
        if distributed.RANK > 0:
            return
        step += error.stage != "evaluate"  # of the step that was to come
        path = self.folder / "nonfinite" / f"step_{step:06d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        names = ("what", "value", "stage", "prompt", "seed", "precision")
        about = {"step": str(step)} | {k: str(v) for k, v in zip(names, error.args) if k != "value"}
        value = error.args[1].contiguous()
        with _unfinished(path) as temporary:
            save_file({"value": value}, temporary, metadata=about)
        say(f"step {step}: {error}; nothing was updated; kept in {path}", file=sys.stderr)

    def stopped(self, path, *more):
        """Say what continues the run, with more options if it takes them."""
        say(f"stopped after {len(self.history)} steps; the last checkpoint is {path}")
        say(" ".join(["continue with:", resuming(self.config), *more]))

    def given_up(self, found, stage):
        """Say what may help a run that a NaN ended; found: its checkpoints, which are as they were,
        because what the policy has become since may be what is wrong."""
        lower = "--force learning_rate --learning_rate LOWER"
        if found:
            self.stopped(found[-1][1], lower if stage == "evaluate" else "--on_nonfinite skip")
        else:
            say("there is no checkpoint yet: start again, with other options")


def mean_and_error(values):
    """(mean, standard error of the mean; nan of one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


@contextlib.contextmanager
def alone(config):
    """Create the run's folder; inside, no other run can be in it. Raises OptionError."""
    if distributed.RANK > 0:
        yield
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not config.resume and any(folder.iterdir())  # by one that started meanwhile
        except BlockingIOError:
            taken = True
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
            taken = False
        if taken:
            raise OptionError(
                f"--output_dir {folder}: another run is in it; wait or choose another"
            )
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _unfinished(path):
    """A name beside `path` to write it under: it then takes its place, or nothing is left of it."""
    temporary = path.with_name(f"unfinished.{path.name}")
    temporary.unlink(missing_ok=True)  # were it a link, writing would follow it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path, text):
    if distributed.RANK > 0:
        return
    with _unfinished(path) as temporary:
        temporary.write_text(text)


def _save(figure, path):
    figure.tight_layout()
    with _unfinished(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
