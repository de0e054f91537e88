"""What a run writes and says, by its first process alone.

config.json       every option, and what else train.py tells of the run
metrics.jsonl     one line per step (docs/running.md defines each name); NaN is null
images/           kept candidates of one prompt with their rewards, one row for each stage
curve.png         gain in the reward of the held-out prompts; with tiny models, their accuracy
before_after.png  held-out prompts, drawn from the same noise by the base model and the EMA policy
lora/             the EMA policy's LoRA, for `pipe.load_lora_weights(folder)`, with a model card
"""

import json
import math
import statistics
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib
from huggingface_hub import ModelCardData
from tqdm import tqdm

from support import distributed
from support.distributed import say
from support.errors import InputError, written_whole

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen before

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


def mean_and_error(values):
    """(mean, standard error of the mean, which is NaN for one value) of a list of numbers."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def reward_metrics(proxies, rewards, rank_fidelity):
    """What is logged of the rewards {name: (P, K)} that were trained on, and of how the first stage
    ranked the same candidates: proxies, P times (K,); rank_fidelity: that of select.py."""
    metrics = {f"reward/{name}": values.mean() for name, values in rewards.items()}
    rewards = rewards["weighted_sum"]
    best, worst = rewards.amax(dim=1), rewards.amin(dim=1)
    metrics |= {
        "reward/mean": rewards.mean(),
        "reward/best": best.mean(),
        "reward/worst": worst.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/spread": (best - worst).mean(),
        "reward/zero_spread": (best == worst).sum(),
    }
    ranks = [rank_fidelity(p, r, rewards.shape[1] // 2) for p, r in zip(proxies, rewards)]
    for name in ("kendall_tau", "spearman_rho"):
        metrics[f"fidelity/kept_{name}"] = sum(rank[name] for rank in ranks) / len(ranks)
    return {name: float(value) for name, value in metrics.items()}


class Report:
    """The log of a run and the files in its folder. Every process keeps the log, so that
    `is_evaluated` answers the same in all; only the first one writes.

    options: {name: value} of the whole Config, for config.json, trackers and the model card. work:
    (network evaluations of an iteration, and of an evaluation), which the progress bar counts.
    """

    def __init__(self, options, reward_names, eval_reward_names, work):
        self.options, self.folder, self.work = options, Path(options["output_dir"]), work
        self.reward_names, self.eval_reward_names = reward_names, eval_reward_names
        self.lines = []  # of metrics.jsonl, one per step
        self.seconds, self.started = {}, time.perf_counter()

    def __enter__(self):
        if distributed.RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.track, self.close_tracker = self._tracker()
        self.bar = tqdm(
            total=self._work(self.options["steps"]),
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} to go",
            smoothing=0,  # the time to go follows from the mean speed of the whole run
            disable=distributed.RANK > 0,
        )
        return self

    def _work(self, step):
        """Network evaluations up to the evaluation after a step."""
        steps, every = self.options["steps"], self.options["eval_every"]
        evaluations = 1 + step // every + (step == steps and step % every > 0)
        return step * self.work[0] + evaluations * self.work[1]

    def __exit__(self, *_):
        self.bar.close()
        self.close_tracker()

    def _done(self):
        return self.lines[-1]["step"] if self.lines else 0

    def _tracker(self):
        """(function of step and metrics, function that closes it) of --report_to."""
        if distributed.RANK > 0 or self.options["report_to"] == "none":
            return lambda step, metrics: None, lambda: None
        if self.options["report_to"] == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.folder)
            log = writer.add_scalar
            return lambda step, metrics: [log(k, v, step) for k, v in metrics.items()], writer.close
        import wandb

        wandb.init(project="sol-rl", id=self.folder.name, resume="allow", config=self.options)
        return lambda step, metrics: wandb.log(metrics, step=step), wandb.finish

    def begin(self, backend, layers, lines):
        """Say what the run will do, and write config.json: every option, the versions of packages
        and how each layer is explored. backend: what runs quantized layers; layers: rows of
        quant.quantize_linears; lines: of the console."""
        options = {name: value for name, value in self.options.items() if value != ""}
        say(textwrap.fill("  ".join(f"{name}={value}" for name, value in options.items()), 100))
        for line in (backend, *lines):
            say(line)
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        config = dict(config=self.options, backend=backend, layers=layers, versions=versions)
        self._write_text("config.json", json.dumps(config, indent=1))

    def resume(self, step):
        """Take up the log as it was after `step`: later lines and an unfinished last line are left
        out. Raises InputError if the log of the steps before is not complete."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = [json.loads(text) for text in path.read_text().splitlines()[: step + 1]]
            complete = [line["step"] for line in lines] == list(range(step + 1))
        except (OSError, ValueError, TypeError, KeyError):
            complete = False
        if not complete:
            if step > 0:
                raise InputError(f"{path}: does not have the steps 0 to {step}; start a new run")
            lines = []  # the run stopped in its first evaluation
        self.lines = [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]
        self._write_log()
        self.bar.initial = self.bar.n = self._work(step)

    @property
    def evaluations(self):
        return [line for line in self.lines if "eval/reward" in line]

    def is_evaluated(self, step):
        return any(line["step"] == step for line in self.evaluations)

    def evaluated(self, step, scores, seconds):
        """Log an evaluation. scores: {reward: list of each held-out prompt's mean}. The gain since
        step 0 is compared prompt by prompt, each drawn from the same noise as then."""
        rewards = scores["weighted_sum"]
        mean, error = mean_and_error(rewards)
        entries = {f"eval/{name}": statistics.mean(values) for name, values in scores.items()}
        entries |= {"eval/reward": mean, "eval/standard_error": error, "time/evaluate": seconds}
        text = f"step {step:4d}  held-out reward {mean:.4f} +- {error:.4f}"
        if self.evaluations:
            before = self.evaluations[0]["eval/rewards"]
            if len(before) != len(rewards):
                raise InputError("--resume: the held-out prompts are not those the run began with")
            gain, error = mean_and_error([new - old for old, new in zip(before, rewards)])
            entries |= {"eval/gain": gain, "eval/gain_standard_error": error}
            text += f"  gain {gain:+.4f} +- {error:.4f}"
        if "accuracy" in scores:
            text += f"  pictures that match their prompt {entries['eval/accuracy']:.0%}"
        self.track(step, entries)
        self._log(step, entries | {"eval/rewards": rewards}, {"evaluate": seconds})
        say(text)

    def step(self, step, metrics, seconds):
        """Log a step: one line on the console, one in metrics.jsonl. seconds: {stage: seconds}."""
        entries = metrics | {f"time/{stage}": value for stage, value in seconds.items()}
        self.track(step, entries)
        self._log(step, entries, seconds)
        self.bar.set_description(f"{step} of {self.options['steps']} steps", refresh=False)
        say(
            f"step {step:4d}  reward {metrics['reward/mean']:.4f} "
            f"({metrics['reward/worst']:.3f} to {metrics['reward/best']:.3f})  "
            f"tau of the kept {metrics['fidelity/kept_kendall_tau']:.2f}  "
            f"loss {metrics['loss']:.3f}  kl {metrics['kl']:.1e}  grad {metrics['grad_norm']:.2f}  "
            + "  ".join(f"{stage} {value:.1f}s" for stage, value in seconds.items())
        )

    def _log(self, step, entries, seconds):
        if not self.lines or self._done() < step:
            self.lines.append({"step": step})
        self.lines[-1] |= entries
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        self._write_log()

    def _write_log(self):
        clean = [{k: None if v != v else v for k, v in line.items()} for line in self.lines]
        self._write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in clean))

    def picture(self, step, prompt, rows, decode):
        """images/step_NNNN.png: candidates of a prompt that are trained on, a row for each stage,
        a column for each seed, from the four best of the first stage to its four worst.

        rows: [(label, rollout.Candidates)]; decode: function of latents that returns images."""
        if distributed.RANK > 0:
            return
        first, last = rows[0][1], rows[-1][1]
        order = first.rewards_of(last.seeds).argsort(descending=True, stable=True)
        seeds = [last.seeds[i] for i in order]
        seeds = seeds[:4] + seeds[4:][-4:]
        size = (1.3 * len(seeds), 1.9 * len(rows))
        figure, axes = plt.subplots(len(rows), len(seeds), figsize=size, squeeze=False)
        for row, (label, candidates) in zip(axes, rows):
            shown = [candidates.seeds.index(seed) for seed in seeds]
            images = decode(candidates.latents[shown]).cpu()
            for axis, image, reward in zip(row, images, candidates.rewards[shown]):
                axis.imshow(image.permute(1, 2, 0).numpy())
                axis.set_title(f"{reward:.3f}", fontsize=9)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(label)
        title = f"{prompt}: kept candidates, step {step}"
        figure.suptitle(title, fontsize=10, parse_math=False)
        self._write_figure(f"images/step_{step:04d}.png", figure)

    def before_after(self, prompts, rows):
        """before_after.png: a column for each prompt, a row for each policy, with the reward and,
        for the tiny models, whether the picture matches its prompt under each picture.

        rows: [(label, images, {reward: (n,)})]; the images are float32 (n, 3, H, W)."""
        size = (1.3 * len(prompts) + 0.4, 1.65 * len(rows) + 0.6)
        figure, axes = plt.subplots(len(rows), len(prompts), figsize=size, squeeze=False)
        for axis, prompt in zip(axes[0], prompts):
            title = textwrap.fill(prompt, 20, max_lines=3)
            axis.set_title(title, fontsize=8, parse_math=False)
        for row, (label, images, scores) in zip(axes, rows):
            row[0].set_ylabel(label)
            for i, axis in enumerate(row):
                axis.imshow(images[i].permute(1, 2, 0).cpu().numpy())
                axis.set(xticks=[], yticks=[])
                text, colour = f"{scores['weighted_sum'][i]:.3f}", "black"
                if "accuracy" in scores:
                    mark, colour = ("✓", "green") if scores["accuracy"][i] else ("✗", "red")
                    text += f"  {mark}"
                    axis.spines[:].set(color=colour, linewidth=2)
                axis.set_xlabel(text, color=colour, fontweight="bold")
        self._write_figure("before_after.png", figure)
        say(f"wrote {self.folder / 'before_after.png'}")

    def _curve(self):
        """curve.png, on held-out prompts: the gain in reward, below it the accuracy of a tiny model
        and each reward that is only measured: when the gain rises and they fall, the reward is
        being hacked."""
        steps = [line["step"] for line in self.evaluations]
        accurate = "eval/accuracy" in self.evaluations[0]
        panels = 1 + accurate + len(self.eval_reward_names)
        size = (6, 2 + 2 * panels)
        figure, axes = plt.subplots(panels, figsize=size, sharex=True, squeeze=False)
        top, *others = axes[:, 0]

        def values(name, start=None):
            return [line.get(name, start) for line in self.evaluations]

        errors = values("eval/gain_standard_error", 0.0)
        style = dict(color=COLOURS.get(self.options["algorithm"]), marker="o")
        top.errorbar(steps, values("eval/gain", 0.0), yerr=errors, capsize=3, **style)
        top.axhline(0, color="grey", linewidth=0.8)
        n = len(self.evaluations[0]["eval/rewards"])
        title = f"{' + '.join(self.reward_names)}: mean and standard error over {n} prompts"
        top.set(ylabel="gain in held-out reward", title=title)
        if accurate:
            axis = others.pop(0)
            axis.plot(steps, values("eval/accuracy"), label="match their prompt", **style)
            axis.plot(steps, values("eval/clear"), marker="o", color="lightgrey", label="clear")
            axis.set(ylabel="share of pictures", ylim=(-0.03, 1.03))
            axis.legend()
        for axis, name in zip(others, self.eval_reward_names):
            axis.plot(steps, values(f"eval/{name}"), marker="o")
            axis.set_ylabel(f"{name}\n(not trained on)")
        axes[-1, 0].set_xlabel("optimizer steps")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        self._write_figure("curve.png", figure)

    def finish(self):
        """Write curve.png and say how the run ended. Returns the line of the result."""
        self._curve()
        first, last = self.evaluations[0], self.evaluations[-1]
        text = "{eval/reward:.4f} +- {eval/standard_error:.4f}"
        before, after = text.format_map(first), text.format_map(last)
        gain, error = last["eval/gain"], last["eval/gain_standard_error"]
        result = f"{before} before, {after} after {last['step']} steps"
        result += f"; gain {gain:+.4f} +- {error:.4f}"
        if error > 0:
            result += f", {gain / error:.1f} standard errors"
        say(f"\nheld-out reward: {result}")
        say(
            "(errors are over the held-out prompts of this run; they say nothing of another --seed)"
        )
        if "eval/accuracy" in first:
            say(
                f"pictures that match their prompt: {first['eval/accuracy']:.0%} before, "
                f"{last['eval/accuracy']:.0%} after (clear: {first['eval/clear']:.0%}, "
                f"{last['eval/clear']:.0%})"
            )
        stages = "  ".join(f"{stage} {seconds:.0f}s" for stage, seconds in self.seconds.items())
        say(f"time: {time.perf_counter() - self.started:.0f}s in all;  {stages}")
        for name in ("curve.png", "images", "metrics.jsonl", "checkpoints", "config.json"):
            if (self.folder / name).exists():
                say(f"wrote {self.folder / name}")
        return result

    def card(self, model, result):
        """lora/README.md, a model card with the code that draws with the LoRA, and the scheduler
        that this code loads. model: a models.Model; result: the line that `finish` returns."""
        options, pipeline = self.options, model.pipeline.__name__
        published = options["pretrained"] == "published"
        base = model.published if published else options["pretrained"]
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=["lora", "sol-rl", "diffusion-nft"],
            base_model=base if base and not Path(base).exists() else None,
        )
        scheduler = model.scheduler(options["rollout_steps"])
        solver = type(scheduler).__name__
        variant = f', variant="{model.variant}"' if published and model.variant else ""
        call = dict(guidance_scale=1.0, num_inference_steps=options["eval_steps"])
        call |= dict(height=options["resolution"], width=options["resolution"])
        call |= model.call(options["eval_steps"])
        arguments = ", ".join(f"{name}={value}" for name, value in call.items())
        self._write_text("lora/scheduler_config.json", scheduler.to_json_string())
        self._write_text(
            "lora/README.md",
            f"""---
{data.to_yaml()}
---
# A LoRA for {base or f"the tiny {options['model']} of this project"}

Trained for {self._done()} steps on the reward `{options["reward"]}` by Sol-RL (arXiv 2604.06916),
`--algorithm {options["algorithm"]}`. These are the weights of the EMA policy. They were trained
without guidance, on images drawn by {solver} in {options["rollout_steps"]} steps.

Held-out reward: {result}.

```python
import torch
from diffusers import {pipeline}, {solver}

base = {(base or f"support/tiny/{options['model']}")!r}
pipe = {pipeline}.from_pretrained(base, dtype=torch.bfloat16{variant})
pipe.scheduler = {solver}.from_pretrained("path/to/this/folder")
pipe.load_lora_weights("path/to/this/folder")
image = pipe("a prompt", {arguments}).images[0]
```

Every option:

```json
{json.dumps(options, indent=1)}
```
""",
        )
        say(f"wrote {self.folder / 'lora'}")

    def _write(self, name, write):
        """Write a file of the folder; write: a function of the path that does it."""
        if distributed.RANK == 0:
            (self.folder / name).parent.mkdir(exist_ok=True)
            with written_whole(self.folder / name) as path:
                write(path)

    def _write_text(self, name, text):
        self._write(name, lambda path: path.write_text(text))

    def _write_figure(self, name, figure):
        figure.tight_layout()
        self._write(name, lambda path: figure.savefig(path, dpi=120))
        plt.close(figure)
