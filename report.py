"""What a run writes and says: its folder, its pictures, its lines on the console.

config.json     every option as resolved, what ran each layer, package versions
metrics.jsonl   one line a step (the README defines each name)
images/         best and worst candidates of one prompt, FP4 above BF16, with their rewards
curve.png       reward on held-out prompts and on the kept candidates
lora/           the EMA policy's LoRA, which `pipe.load_lora_weights(folder)` takes, with a card
checkpoints/    what --resume continues from
"""

import dataclasses
import json
import math
import os
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib
from huggingface_hub import ModelCardData
from tqdm import tqdm

import quant
from config import FAMILIES, command

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend comes first


class Report:
    """The run's folder and console. Creating one creates the folder."""

    def __init__(self, run):
        self.run, self.config = run, run.config
        self.folder = Path(self.config.output_dir)
        self.history, self.evaluations, self.started = [], [], time.perf_counter()
        self.spent = dict(run.clock.seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._header()
        self.tracker = self._tracker()

    def _header(self):
        c, layers = self.config, self.run.layers
        swapped = sum(not outcome.startswith("kept") for *_, outcome in layers)
        backend = "explored in BF16"
        if layers:
            backend = f"explored in {quant.backend(c.precision)}: {swapped} of {len(layers)} layers"
        P, K = c.prompts_per_step, c.keep
        N = c.pool if FAMILIES[c.family].explore else K
        trained = max(1, round(c.timestep_fraction * c.rollout_steps))
        options = "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(c).items() if v != "")
        tqdm.write(textwrap.fill(options, 100))
        tqdm.write(
            f"{backend}\n"
            f"an iteration: {P} prompts x {N} candidates; {P} x {K} = {P * K} trained at {trained} "
            f"times each, one optimizer step; guidance off\n"
            f"{len(self.run.train.prompts)} training and {len(self.run.held_out.prompts)} held-out "
            f"prompts; writing to {self.folder}"
        )
        for note in self.run.notes:
            tqdm.write(note)
        packages = ("torch", "diffusers", "transformers", "peft")
        config = {
            "config": dataclasses.asdict(c),
            "backend": backend,
            "layers": layers,
            "versions": {package: version(package) for package in packages},
        }
        _write(self.folder / "config.json", json.dumps(config, indent=1))

    def _tracker(self):
        if self.config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.folder)
            return lambda step, m: [writer.add_scalar(k, v, step) for k, v in m.items()]
        if self.config.report_to == "wandb":
            import wandb

            wandb.init(project="sol-rl", config=dataclasses.asdict(self.config))
            return lambda step, m: wandb.log(m, step=step)
        return lambda step, m: None

    def evaluated(self, step, mean, error):
        self.evaluations.append((step, mean, error))
        tqdm.write(f"step {step:4d}  held-out reward {mean:.4f} +- {error:.4f}")

    def step(self, step, metrics):
        """Log one step: a line on the console, a line in metrics.jsonl, the curve."""
        seconds = self.run.clock.seconds
        metrics |= {f"time/{k}": seconds[k] - self.spent[k] for k in seconds}
        self.spent = dict(seconds)
        if self.evaluations and self.evaluations[-1][0] == step:
            _, metrics["eval/reward"], metrics["eval/standard_error"] = self.evaluations[-1]
        self.history.append({"step": step} | metrics)
        self._write_history()
        self.tracker(step, metrics)
        tqdm.write(
            f"step {step:4d}  reward {metrics['reward/mean']:.4f} "
            f"({metrics['reward/worst']:.3f} to {metrics['reward/best']:.3f})  "
            f"tau {metrics['fidelity/kendall_tau']:.2f}  loss {metrics['loss']:.3f}  "
            f"kl {metrics['kl']:.1e}  grad {metrics['grad_norm']:.2f}  "
            + "  ".join(f"{k} {metrics[f'time/{k}']:.1f}s" for k in seconds if k != "select")
        )

    def _write_history(self):
        names = ("step", "eval/reward", "eval/standard_error")
        before = [dict(zip(names, line)) for line in self.evaluations[:1] if line[0] == 0]
        clean = [
            {k: None if math.isnan(v) else v for k, v in line.items()}
            for line in before + self.history
        ]
        _write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in clean))

    def rewind(self, step):
        """Take up the lines of the run that is resumed, up to `step`."""
        for text in (self.folder / "metrics.jsonl").read_text().splitlines():
            line = {k: math.nan if v is None else v for k, v in json.loads(text).items()}
            if line["step"] > step:
                break
            if "eval/reward" in line:
                keys = ("step", "eval/reward", "eval/standard_error")
                self.evaluations.append(tuple(line[k] for k in keys))
            if line["step"]:
                self.history.append(line)

    def picture(self, step, row, explored, trained):
        """images/step_NNNN.png: the same seeds as explored (above) and as trained on (below)."""
        places = [i for i in explored.images if i in trained.images]
        if not places:  # a rule may keep none of the pool's best and worst
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
        figure, axis = plt.subplots(figsize=(6, 4))
        steps, means, errors = zip(*self.evaluations)
        axis.errorbar(steps, means, yerr=errors, marker="o", label="held-out prompts, EMA policy")
        axis.plot(
            [line["step"] for line in self.history],
            [line["reward/mean"] for line in self.history],
            alpha=0.5,
            label="candidates trained on",
        )
        axis.set(xlabel="optimizer steps", ylabel=f"reward ({self.config.reward})")
        axis.legend()
        _save(figure, self.folder / "curve.png")

    def finish(self):
        self.curve()
        _, before, error_before = self.evaluations[0]
        last, after, error_after = self.evaluations[-1]
        error = math.hypot(error_before, error_after)
        gain = (
            f"{(after - before) / error:+.1f} standard errors"
            if error > 0
            else (f"{after - before:+.4f}, without an error from one held-out prompt")
        )
        tqdm.write(
            f"\nheld-out reward: {before:.4f} +- {error_before:.4f} before, {after:.4f} +- "
            f"{error_after:.4f} after {last} steps: {gain}"
        )
        self._card(before, after, error_before, error_after)
        stages = "  ".join(f"{k} {v:.0f}s" for k, v in self.run.clock.seconds.items())
        tqdm.write(f"time: {time.perf_counter() - self.started:.0f}s in all;  {stages}")
        for name in ("curve.png", "images", "metrics.jsonl", "lora", "checkpoints", "config.json"):
            tqdm.write(f"wrote {self.folder / name}")

    def _card(self, before, after, error_before, error_after):
        """lora/README.md, a model card."""
        c, kind = self.config, self.run.model.pipeline.__name__
        base = c.pretrained if c.pretrained != "published" else self.run.model.published
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=["lora", "sol-rl", "diffusion-nft"],
            base_model=base if base and not Path(base).exists() else None,
        )
        config = json.dumps(dataclasses.asdict(c), indent=1)
        _write(
            self.folder / "lora" / "README.md",
            f"---\n{data.to_yaml()}\n---\n"
            f"# A LoRA for {base or f'the tiny {c.model} of this project'}\n\n"
            f"Trained by Sol-RL (arXiv 2604.06916) for {len(self.history)} steps on the reward "
            f"`{c.reward}`; these are the EMA policy's weights. Guidance was off and the solver "
            f"{c.solver} at {c.rollout_steps} steps.\n\n"
            f"Held-out reward: {before:.4f} ± {error_before:.4f} before, {after:.4f} ± "
            f"{error_after:.4f} after.\n\n```\n{command(c)}\n```\n\n```python\n"
            f"from diffusers import {kind}\n\n"
            f"pipe = {kind}.from_pretrained({(base or 'path/to/the/tiny/model')!r})\n"
            f'pipe.load_lora_weights("path/to/this/folder")\n```\n\n'
            f"Every option:\n\n```json\n{config}\n```\n",
        )

    def stopped(self):
        saved = sorted((self.folder / "checkpoints").glob("step_*.safetensors"))
        kept = "there was no checkpoint yet"
        if saved:
            kept = f"continue with --resume {self.folder} from {saved[-1].stem}"
        tqdm.write(f"interrupted after {len(self.history)} steps; {kept}")


def _write(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _save(figure, path):
    figure.tight_layout()
    figure.savefig(path.with_name("unfinished.png"), dpi=120)
    os.replace(path.with_name("unfinished.png"), path)
    plt.close(figure)
