"""What a run writes and says, by its first process alone.

config.json       every option, how each layer is explored, versions of packages
metrics.jsonl     one line per step (docs/running.md defines each name); NaN is null
images/           step_NNNN.png: kept candidates of one prompt, one row for each stage;
                  held_out_NNNN.png: held-out prompts drawn by the EMA policy, from the same noise
curve.png         gain in the reward of the held-out prompts; with tiny models, their accuracy
before_after.png  the first and the last of the held-out pictures
progress.webp     all held-out pictures as an animation
lora/             the EMA policy's LoRA, for `pipe.load_lora_weights(folder)`, with a model card

Nothing is written before the first evaluation is done. After it, a run that is stopped leaves all
of these files too.
"""

import functools
import hashlib
import json
import math
import statistics
import subprocess
import textwrap
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from PIL import Image
from tqdm import tqdm

from support import distributed, models
from support.distributed import say
from support.errors import require, written_whole

PROJECT = Path(__file__).resolve().parents[1]
# One colour for one thing in all figures that compare; colour-blind people can tell them apart.
COLOURS = {
    "sol_rl": "#0072B2",  # blue
    "naive_scaling": "#E69F00",  # orange
    "naive_quant": "#CC79A7",  # pink
    "diffusionnft": "#009E73",  # green
    "nvfp4": "#882255",  # wine
    "bf16": "#888888",  # grey
    "best": "#56B4E9",  # sky blue
    "worst": "#D55E00",  # vermilion
}
# What a (sample, time) pair of the update costs, in evaluations of the network. Three passes are
# forward (the policy, the old policy, the base model); one is backward, which counts twice.
UPDATE_COST = 5
HELD_OUT = "images/held_out_{:04d}.png"  # of a step
# Fonts with Chinese, Japanese and Korean characters, which matplotlib's own font lacks.
WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC")
WIDE_FONTS += ("Hiragino Sans", "Arial Unicode MS", "WenQuanYi Zen Hei", "SimHei", "Malgun Gothic")
INSTALLED = [font for font in WIDE_FONTS if font in get_font_names()]
USERS_TEXT = dict(parse_math=False, fontfamily=["sans-serif", *INSTALLED])  # prompts, names


def network_evaluations(candidates, stages, num_times):
    """{stage: evaluations of the network for one prompt of an iteration}, with the update as
    "train". candidates: the size of the pool; stages: of train.ALGORITHMS; num_times: at which each
    sample is trained."""
    counts = Counter()
    for stage in stages:
        counts[stage.name] += candidates * stage.steps
        candidates = stage.num_kept or candidates
    counts["train"] = candidates * num_times * UPDATE_COST
    return counts


def evaluates_after(c, step):
    """Whether a run of this Config evaluates the policy after a step; 0 is before training."""
    return step % c.eval_every == 0 or step == c.steps


def mean_and_error(values):
    """(mean, standard error of the mean, which is NaN for one value) of a list of numbers."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def reward_metrics(scores, rank_fidelity):
    """What is logged of the candidates that were trained on. scores: of each of P prompts {reward,
    "weighted_sum", "proxy": (K,)}; the proxy is the first stage's reward of the same candidates.
    rank_fidelity: that of select.py."""
    rewards = torch.stack([of_prompt["weighted_sum"] for of_prompt in scores]).double()  # (P, K)
    best, worst = rewards.amax(dim=1), rewards.amin(dim=1)
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/best": best.mean(),
        "reward/worst": worst.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/spread": (best - worst).mean(),
        "reward/zero_spread": (best == worst).sum(),
    }
    for name in [name for name in scores[0] if name != "proxy"]:
        metrics[f"reward/{name}"] = torch.stack([s[name] for s in scores]).double().mean()
    ranks = [rank_fidelity(s["proxy"], s["weighted_sum"], rewards.shape[1] // 2) for s in scores]
    for name in ("kendall_tau", "spearman_rho"):
        metrics[f"fidelity/kept_{name}"] = statistics.mean(rank[name] for rank in ranks)
    return {name: float(value) for name, value in metrics.items()}


def commit():
    """The git commit of this project, with "-dirty" where a file was changed; None without git."""
    command = "git --git-dir=.git describe --always --dirty --abbrev=40 --exclude=*"
    found = subprocess.run(command, shell=True, cwd=PROJECT, capture_output=True, text=True)
    return found.stdout.strip() or None


def fitted(text, width, lines=3):
    """Text in at most that many lines. Chinese, Japanese and Korean characters, which come after
    U+2E80, are twice as wide as others."""
    wide = max(text, default="") > "\u2e80"
    return textwrap.fill(text, width // 2 if wide else width, max_lines=lines)


class Report:
    """The log of a run and the files in its folder. Every process keeps the log, so that
    `is_evaluated` answers the same in all; only the first one writes.

    run: train.Run; options: its Config as a dict; num_times: at which each sample is trained."""

    def __init__(self, run, options, num_times):
        self.run, self.options, self.num_times = run, options, num_times
        self.folder, self.commit = Path(options["output_dir"]), commit()
        n = len(run.held_out.prompts)
        self.shown = sorted({i * n // 8 for i in range(8)})  # the held-out prompts in pictures
        self.lines = []  # of metrics.jsonl, one per step
        self.seconds, self.started = Counter(), time.perf_counter()

    def __enter__(self):
        """Say what the run will do."""
        run, c = self.run, self.run.config
        options = [f"{name}={value}" for name, value in self.options.items() if value != ""]
        lines = [
            textwrap.fill("  ".join(options), 100),
            *run.backends,
            f"an iteration: {c.prompts_per_step} prompts x {run.num_candidates} candidates, "
            f"{c.keep} of each prompt trained on at {self.num_times} times, one optimizer step; "
            f"{len(run.train.prompts)} training and {len(run.held_out.prompts)} held-out prompts; "
            "guidance is off",
            f"an evaluation, the first of them now: {c.eval_images} images of each held-out prompt "
            f"in {c.eval_steps} steps",
            *run.notes,
        ]
        say("\n".join(lines))
        self.track = self._tracker()
        self.bar = tqdm(
            total=self._work(c.steps),
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} to go",
            smoothing=0,  # the time to go follows from the mean speed of the whole run
            disable=distributed.RANK > 0,
        )
        run.advance = self.bar.update
        return self

    def __exit__(self, *_):
        self.bar.close()

    def _work(self, step):
        """This process's network evaluations up to the evaluation after a step."""
        c, mine = self.run.config, distributed.mine
        counts = network_evaluations(self.run.num_candidates, self.run.stages, self.num_times)
        evaluations = sum(evaluates_after(c, earlier) for earlier in range(step + 1))
        images = range(len(self.run.held_out.prompts) * c.eval_images)
        drawn = sum(len(images[i : i + c.micro_batch]) for i in mine(images[:: c.micro_batch]))
        prompts = len(mine(range(c.prompts_per_step)))
        return step * prompts * sum(counts.values()) + evaluations * drawn * c.eval_steps

    def _tracker(self):
        """A function of metrics and step, for --report_to."""
        c, folder = self.run.config, self.folder.resolve()
        if distributed.RANK > 0 or c.report_to == "none":
            return lambda metrics, step: None
        if c.report_to == "wandb":
            import wandb

            key = hashlib.sha256(bytes(folder)).hexdigest()[:16]  # two folders are two runs
            which = dict(project="sol-rl", id=key, name=folder.name, resume="allow")
            return wandb.init(**which, config=self.options, reinit="finish_previous").log
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is logged again, so it is purged.
        first = c.checkpoint.step + 1 if c.resume else None
        # The writer makes the folder, so it must not be made before there is something to write.
        writer = functools.cache(lambda: SummaryWriter(folder, purge_step=first))

        def track(metrics, step):
            for name, value in metrics.items():
                writer().add_scalar(name, value, step)
            writer().flush()

        return track

    @property
    def evaluations(self):
        return [line for line in self.lines if "eval/reward" in line]

    def is_evaluated(self, step):
        return any(line["step"] == step for line in self.evaluations)

    def resume(self, step):
        """Take up the log as it was after `step`; later lines are left out. Raises InputError if
        the log of the steps before cannot be read."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()[: step + 1]]
        except (OSError, ValueError):
            lines = []
        complete = len(lines) > step or step == 0  # step 0 is simply evaluated again
        require(complete, f"{path}: lacks some of the steps 0 to {step}; start a new run")
        for line in lines:
            self.lines.append({k: math.nan if v is None else v for k, v in line.items()})
        self._write_log()
        self._write_config()
        self.bar.initial = self.bar.n = self._work(step)
        say(f"continuing after step {step}")

    def _write_config(self):
        names = ("torch", "diffusers", "transformers", "peft")
        config = dict(config=self.options, backend=self.run.backends, layers=self.run.layers)
        config |= dict(versions={name: version(name) for name in names}, commit=self.commit)
        self._write("config.json", Path.write_text, json.dumps(config, indent=1))

    def evaluated(self, step, drawn):
        """Log an evaluation and draw at most 8 of its images. drawn: the Candidates of
        train.evaluate. The gain since step 0 is compared prompt by prompt, each drawn from the same
        noise as then."""
        n = len(self.run.held_out.prompts)
        scores = {k: v.reshape(n, -1).mean(dim=1).tolist() for k, v in drawn.scores.items()}
        rewards = scores["weighted_sum"]
        mean, error = mean_and_error(rewards)
        entries = {f"eval/{name}": statistics.mean(values) for name, values in scores.items()}
        entries |= {"eval/reward": mean, "eval/standard_error": error}
        text = f"step {step:4d}  held-out reward {mean:.4f} +- {error:.4f}"
        if self.evaluations:
            before = self.evaluations[0]["eval/rewards"]
            problem = "--resume: the held-out prompts are not those the run began with"
            require(len(before) == len(rewards), problem)
            gain, error = mean_and_error([new - old for old, new in zip(before, rewards)])
            entries |= {"eval/gain": gain, "eval/gain_standard_error": error}
            text += f"  gain {gain:+.4f} +- {error:.4f}"
        else:
            self._write_config()
        if "accuracy" in scores:
            text += f"  pictures that match their prompt {entries['eval/accuracy']:.0%}"
        images = len(drawn.seeds) // n  # of each prompt; the first one is shown
        shown = drawn.take([prompt * images for prompt in self.shown])
        prompts = [self.run.held_out.prompts[i] for i in self.shown]
        label = f"after {step} steps" if step else "before training"
        self._draw(HELD_OUT.format(step), "", prompts, [(label, shown)])
        self._log(step, entries, also={"eval/rewards": rewards})
        say(text)

    def step(self, step, metrics, kept):
        """Log a step, and where it is evaluated draw its picture. kept: the Candidates of a prompt
        that each stage kept."""
        seconds = self._log(step, metrics)
        self.bar.set_description(f"{step} of {self.options['steps']} steps", refresh=False)
        say(
            f"step {step:4d}  reward {metrics['reward/mean']:.4f} "
            f"({metrics['reward/worst']:.3f} to {metrics['reward/best']:.3f})  "
            f"tau of the kept {metrics['fidelity/kept_kendall_tau']:.2f}  "
            f"loss {metrics['loss']:.3f}  kl {metrics['kl']:.1e}  grad {metrics['grad_norm']:.2f}  "
            + "  ".join(f"{stage} {value:.1f}s" for stage, value in seconds.items())
        )
        if evaluates_after(self.run.config, step):
            self.picture(step, kept)

    def picture(self, step, kept):
        """images/step_NNNN.png: candidates of a prompt that are trained on, a row for each stage,
        a column for each seed, from the four best of the first stage to its four worst."""
        first, last = kept[0], kept[-1]
        order = first.rewards_of(last.seeds).argsort(descending=True, stable=True)
        seeds = [last.seeds[i] for i in order]
        seeds, rows = seeds[:4] + seeds[4:][-4:], []
        for stage, candidates in zip(self.run.stages, kept):
            shown = candidates.take([candidates.seeds.index(seed) for seed in seeds])
            precision = stage.precision.replace("bf16", self.run.model.computes_in)
            rows.append((f"{stage.name}, {precision}", shown))
        title = f"step {step}, kept candidates: {self.run.train.prompts[first.indices[0]]}"
        self._draw(f"images/step_{step:04d}.png", title, [""] * len(seeds), rows)

    def _draw(self, name, title, columns, rows):
        """Write rows of pictures with their rewards. columns: a title for each, or ""; rows:
        [(label, Candidates)]."""
        if distributed.RANK > 0:
            return
        size = (1.3 * len(columns) + 0.4, 1.65 * len(rows) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for axis, column in zip(axes[0], columns):
            axis.set_title(fitted(column, 20), fontsize=8, **USERS_TEXT)
        for row, (label, drawn) in zip(axes, rows):
            row[0].set_ylabel(label)
            images = self.run.model.decode(drawn.latents.to(self.options["device"]))
            for i, axis in enumerate(row):
                text, colour = f"{drawn.rewards[i]:.3f}", "black"
                if "accuracy" in drawn.scores:
                    mark, colour = ("✓", "green") if drawn.scores["accuracy"][i] else ("✗", "red")
                    text += f"  {mark}"
                axis.imshow(images[i].permute(1, 2, 0).cpu().numpy())
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(color=colour, linewidth=2)
                axis.set_xlabel(text, color=colour, fontweight="bold")
        figure.suptitle(fitted(title, 16 * len(columns), 2), fontsize=10, **USERS_TEXT)
        self._write(name, figure.savefig, dpi=120)

    def _curve(self):
        """curve.png, on held-out prompts: the gain in reward; below it the accuracy of a tiny
        model, the parts of a weighted sum, and each reward that is only measured: when the gain
        rises and they fall, the reward is being hacked."""
        steps = [line["step"] for line in self.evaluations]
        trained = [name for name, *_ in self.run.reward.parts]
        names = [name for name, *_ in self.run.eval_reward.parts if [name] != trained]
        figure = Figure(figsize=(6, 4 + 2 * len(names)), layout="constrained")
        top, *others = figure.subplots(1 + len(names), sharex=True, squeeze=False)[:, 0]

        def values(name):
            return [line.get(name, 0.0) for line in self.evaluations]  # step 0 has no gain

        style = dict(color=COLOURS.get(self.options["algorithm"]), marker="o", capsize=3)
        top.errorbar(steps, values("eval/gain"), values("eval/gain_standard_error"), **style)
        top.axhline(0, color="grey", linewidth=0.8)
        n = len(self.evaluations[0]["eval/rewards"])
        title = f"{' + '.join(trained)}: mean and standard error over {n} prompts"
        top.set_title(fitted(title, 62), **USERS_TEXT)
        top.set_ylabel("gain in held-out reward")
        shares = {"accuracy": "pictures that\nmatch their prompt", "clear": "clear pictures"}
        for axis, name in zip(others, names):
            kind = "part of the reward" if name in trained else "not trained on"
            axis.plot(steps, values(f"eval/{name}"), marker="o")
            axis.set_ylabel(shares.get(name, f"{name}\n({kind})"), **USERS_TEXT)
            if name in shares:
                axis.set_ylim(-0.03, 1.03)
        axis = figure.axes[-1]
        axis.set_xlabel("optimizer steps")
        axis.xaxis.get_major_locator().set_params(integer=True)
        self._write("curve.png", figure.savefig, dpi=120)

    def finish(self):
        """Write the LoRA, its card and the pictures of a run that is done or was stopped, and say
        how it ended."""
        if distributed.RANK > 0:
            return
        self.bar.close()
        first, last = self.evaluations[0], self.evaluations[-1]
        text = "{eval/reward:.4f} +- {eval/standard_error:.4f}"
        result = f"{text.format_map(first)} before"
        if last is not first:
            gain, error = last["eval/gain"], last["eval/gain_standard_error"]
            result += f", {text.format_map(last)} after {last['step']} steps"
            result += f"; gain {gain:+.4f} +- {error:.4f}"
            if len(first["eval/rewards"]) < 8:
                result += ", from too few held-out prompts to rely on the error"
            elif error > 0:
                result += f", {gain / error:.1f} standard errors"
        models.save_lora(self.run.model, "ema", self.folder / "lora")
        self._card(result)
        self._curve()
        steps = [line["step"] for line in self.evaluations]
        files = [self.folder / HELD_OUT.format(step) for step in steps]
        frames = [Image.fromarray(np.asarray(Image.open(file))) for file in files]
        ends = Image.fromarray(np.vstack(frames[:1] + frames[1:][-1:]))
        self._write("before_after.png", ends.save)
        film = dict(append_images=frames[1:], loop=0, save_all=True)
        film["duration"] = [800] * (len(frames) - 1) + [3000]  # milliseconds
        self._write("progress.webp", frames[0].save, **film)
        say(f"\nheld-out reward: {result}")
        say("(the error covers prompts only; another --seed may differ more)")
        if "eval/accuracy" in first:
            say(
                f"pictures that match their prompt: {first['eval/accuracy']:.0%} before, "
                f"{last['eval/accuracy']:.0%} after (clear: {first['eval/clear']:.0%}, "
                f"{last['eval/clear']:.0%})"
            )
        stages = "  ".join(f"{stage} {seconds:.0f}s" for stage, seconds in self.seconds.items())
        say(f"time: {time.perf_counter() - self.started:.0f}s in all;  {stages}")
        say(f"wrote {self.folder}: {', '.join(sorted(p.name for p in self.folder.iterdir()))}")

    def _card(self, result):
        """lora/README.md, a model card with code that draws with the LoRA, wherever it is run.
        result: the line that `finish` says."""
        options, model = self.options, self.run.model
        published = options["pretrained"] == "published"
        base = model.published if published else options["pretrained"]
        on_hub = f"base_model: {base}\n" if base and not Path(base).exists() else ""
        base = base or (PROJECT / "support" / "tiny" / options["model"]).as_posix()
        variant = f', variant="{model.variant}"' if published and model.variant else ""
        lora = (self.folder / "lora").resolve().as_posix()
        reward = ",".join(f"{name}:{weight:g}" for name, weight, _ in self.run.reward.parts)
        scheduler = model.scheduler(options["rollout_steps"])
        solver, pipeline = type(scheduler).__name__, model.pipeline.__name__
        usual, settings = type(scheduler)().config, {True: [], False: []}
        for name, value in scheduler.config.items():
            if name[0] != "_" and value != usual.get(name):
                settings[name in usual].append(f"{name}={value!r}")
        made = f"{solver}({', '.join(settings[True])})"
        # FLUX.1's pipeline looks for its shift in the configuration of any scheduler.
        more = ", ".join(settings[False])
        made += f"\npipe.scheduler.register_to_config({more})" if more else ""
        steps, side = options["eval_steps"], options["resolution"]
        call = dict(height=side, width=side, guidance_scale=1.0, num_inference_steps=steps)
        call = "".join(f"    {k}={v},\n" for k, v in (call | model.call(steps)).items())
        card = f"""---
library_name: diffusers
pipeline_tag: text-to-image
{on_hub}tags: [lora, sol-rl, diffusion-nft]
---
# A LoRA for {base}

Trained for {self.lines[-1]["step"]} steps on the reward `{reward}` by Sol-RL (arXiv 2604.06916),
`--algorithm {options["algorithm"]}`, without guidance. These are the weights of the EMA policy.

Held-out reward: {result}.

```python
import torch
from diffusers import {pipeline}, {solver}

pipe = {pipeline}.from_pretrained({base!r}, dtype=torch.bfloat16{variant})
pipe.scheduler = {made}
pipe.load_lora_weights({lora!r})  # the folder of this file
image = pipe(
    "a prompt",
    generator=torch.Generator().manual_seed(0),
{call}).images[0]
```
"""
        self._write("lora/README.md", Path.write_bytes, card.encode())

    def _log(self, step, entries, also={}):
        """Add entries and the seconds since the last call to the step's line; returns these."""
        seconds = self.run.clock.take()
        entries = entries | {f"time/{stage}": value for stage, value in seconds.items()}
        self.track(entries, step)
        if not self.lines or self.lines[-1]["step"] < step:
            self.lines.append({"step": step})
        self.lines[-1] |= entries | also
        self.seconds.update(seconds)
        self._write_log()
        return seconds

    def _write_log(self):
        clean = [{k: None if v != v else v for k, v in line.items()} for line in self.lines]
        text = "".join(json.dumps(line) + "\n" for line in clean)
        self._write("metrics.jsonl", Path.write_text, text)

    def _write(self, name, write, *values, **options):
        """Write a file of the folder by a function of its path and these values and options."""
        if distributed.RANK == 0:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / name) as path, warnings.catch_warnings():
                # In a figure, a character that no font has becomes a box.
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                write(path, *values, **options)
