"""The paper's claims, measured on the tiny models.

    python experiments/paper.py fidelity    # does NVFP4 rank as BF16 does? (Table 8; 3 minutes)
    python experiments/paper.py algorithms  # the four algorithms, 3 models, 3 seeds (40 minutes)
    python experiments/paper.py ladder      # precisions and steps of exploring (2 hours)

`fidelity` prints the paper's figures beside its own and draws docs/candidates.png. The other two
run train.py, in folders under runs/ (a run that is complete there is not repeated); `algorithms`
draws docs/algorithms.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from reward import build_reward
from rollout import candidate_seeds, draw, make_copy
from support import models, world
from support.report import mean_and_error, plt
from train import ALGORITHMS, selection

PROJECT = Path(__file__).parent.parent
POOL, KEEP, EXPLORE_STEPS, ROLLOUT_STEPS = 96, 12, 6, 10  # KEEP best and KEEP worst are compared
RANKING = f"ranking of {POOL} seeds against BF16 at {ROLLOUT_STEPS} steps, {{}} prompts"
OTHER_BATCH = f"ranking of {POOL} seeds in micro-batches of 16 against one of {POOL}"
COLUMNS = "kendall_tau spearman_rho top_match bottom_match top_rank bottom_rank".split()

LADDER = {  # name -> options of train.py
    precision: dict(precision=precision, explore_steps=EXPLORE_STEPS)
    for precision in ("bf16", "fp8", "nvfp4_4over6", "nvfp4_row", "nvfp4")
}
LADDER |= {f"nvfp4, {n} steps": dict(precision="nvfp4", explore_steps=n) for n in (2, 4, 8)}
EVERY_LAYER = "nvfp4, every layer"  # ranking only: train.py has no such option


class Pools:
    """The pools of one untrained tiny model for n held-out prompts."""

    def __init__(self, name, num_prompts):
        self.model, self.prompts = models.load(name), world.HELD_OUT_PROMPTS[:num_prompts]
        self.texts = self.model.encode(self.prompts)
        self.reward = build_reward("clipscore", clip=world.ensure_models() / "clip")

    def draw(self, i, transformer, steps, micro_batch=POOL):
        """(images, rewards) of the pool of the i-th prompt, always from the same noise."""
        seeds, text = candidate_seeds(0, 0, i, POOL), self.texts.take(i)
        parts = [seeds[j : j + micro_batch] for j in range(0, POOL, micro_batch)]
        images = torch.cat([draw(self.model, transformer, text, part, steps)[1] for part in parts])
        return images, self.reward(images, [self.prompts[i]] * POOL)

    def rewards(self, *how):
        """The rewards of the pool of each prompt; the arguments are those of `draw` after i."""
        return [self.draw(i, *how)[1] for i in range(len(self.prompts))]


def show(values, form=".3f"):
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form.lstrip('+')}}"


def rank_row(name, proxies, truths):
    """A table's row: rank fidelity of proxy pools to the true ones, as means over prompts."""
    ranks = [selection.rank_fidelity(*pair, KEEP) for pair in zip(proxies, truths)]
    return [name, *(show([rank[column] for rank in ranks]) for column in COLUMNS)]


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|" + " --- |" * len(columns))
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def fidelity(num_prompts):
    """Rank agreement of proxies with a BF16 rollout of the untrained tiny models, as means over
    prompts with their standard errors."""
    rows, other_batch, examples = [], [], []
    for name in models.MODELS:
        pools = Pools(name, num_prompts)
        policy = pools.model.transformer
        explorer, _ = make_copy(pools.model, "nvfp4", pools.model.keep_bf16)
        proxies = {
            f"NVFP4, {EXPLORE_STEPS} steps": (explorer, EXPLORE_STEPS),
            f"NVFP4, {EXPLORE_STEPS} steps, micro-batches of 16": (explorer, EXPLORE_STEPS, 16),
            f"NVFP4, {ROLLOUT_STEPS} steps": (explorer, ROLLOUT_STEPS),
            f"BF16, {EXPLORE_STEPS} steps": (policy, EXPLORE_STEPS),
        }
        truths = pools.rewards(policy, ROLLOUT_STEPS)
        drawn = [pools.rewards(*how) for how in tqdm(proxies.values(), desc=name)]
        rows += [rank_row(f"{name}: {p}", rewards, truths) for p, rewards in zip(proxies, drawn)]
        other_batch.append(rank_row(name, drawn[1], drawn[0]))
        explored = pools.draw(0, explorer, EXPLORE_STEPS)
        regenerated = pools.draw(0, policy, ROLLOUT_STEPS)
        kept = selection.best_worst(explored[1], 8)
        for label, (images, rewards) in (("NVFP4", explored), ("BF16", regenerated)):
            examples.append((f"{name}, {label}", images[kept], rewards[kept]))
    rows.append(["paper, CLIPScore", "0.752", "0.900", "0.922", "", "", ""])
    rows.append(["paper, HPSv2 (ranks: SANA)", "0.827", "0.943", "0.939", "", "8.7", "87.4"])
    rows.append(["paper, HPSv2, FLUX.1", "", "", "", "", "8.4", "87.4"])
    print_table(RANKING.format(num_prompts), ["proxy", *COLUMNS], rows)
    print_table(OTHER_BATCH, ["NVFP4", *COLUMNS], other_batch)
    candidates_picture(world.HELD_OUT_PROMPTS[0], examples)


def candidates_picture(prompt, examples):
    """docs/candidates.png. examples: a row each, (label, images (8, 3, H, W), rewards (8,))."""
    figure, axes = plt.subplots(len(examples), 8, figsize=(9, 1.3 * len(examples)))
    for row, (label, images, rewards) in zip(axes, examples):
        for axis, image, reward in zip(row, images, rewards):
            axis.imshow(image.permute(1, 2, 0).float().numpy())
            axis.set_title(f"{reward:.2f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8)
    figure.suptitle(f"{prompt}: best 4 and worst 4 as explored", fontsize=10)
    figure.tight_layout()
    figure.savefig(PROJECT / "docs" / "candidates.png", dpi=110)


def run_all(folder, todo):
    """Run train.py with each of these dicts of options, two runs at a time. A run that is complete
    in `folder` is not repeated. Returns [(options, lines of metrics.jsonl)]."""
    threads = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // 2)))

    def run(options):
        out = folder / "_".join(map(str, options.values()))
        if not (out / "lora").is_dir():
            shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
            words = [f"--{k}={v}" for k, v in options.items()] + [f"--output_dir={out}"]
            command = [sys.executable, PROJECT / "train.py", *words]
            with open(out.with_suffix(".log"), "w") as log:
                ran = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads)
            if ran.returncode:
                sys.exit(f"paper.py: error: train.py failed; {log.name} says why")
        return options, [json.loads(line) for line in open(out / "metrics.jsonl")]

    world.ensure_models(*models.MODELS)  # once, before the runs share it
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(run, todo), total=len(todo)))


def logs(runs, **options):
    """The logs of those runs that have all of these options, in the order of their seeds."""
    return [lines for given, lines in runs if given.items() >= options.items()]


def ladder(num_prompts, seeds, steps):
    """What each precision and number of steps of exploring does to the ranking of the untrained
    tiny models, and to the held-out reward after training with it."""
    todo = [
        dict(model=model, seed=seed, steps=steps) | options
        for seed in range(seeds)
        for model in models.MODELS
        for options in LADDER.values()
    ]
    runs = run_all(PROJECT / "runs" / "ladder", todo)
    rows, other_batch = [], []
    for name in models.MODELS:
        pools = Pools(name, num_prompts)
        truths = pools.rewards(pools.model.transformer, ROLLOUT_STEPS)
        for proxy, options in tqdm({**LADDER, EVERY_LAYER: LADDER["nvfp4"]}.items(), desc=name):
            skip = () if proxy == EVERY_LAYER else pools.model.keep_bf16
            explorer, _ = make_copy(pools.model, options["precision"], skip)
            rewards = pools.rewards(explorer, options["explore_steps"])
            rows.append(rank_row(f"{name}: {proxy}", rewards, truths))
            if options["explore_steps"] == EXPLORE_STEPS and options["precision"] != "bf16":
                again = pools.rewards(explorer, EXPLORE_STEPS, 16)
                other_batch.append(rank_row(f"{name}: {proxy}", again, rewards))
    print_table(RANKING.format(num_prompts), ["proxy", *COLUMNS], rows)
    print_table(OTHER_BATCH, ["proxy", *COLUMNS], other_batch)
    rows = []
    for proxy, options in LADDER.items():
        of_models = [logs(runs, model=name, **options) for name in models.MODELS]
        gains = [[lines[-1]["eval/gain"] for lines in of_model] for of_model in of_models]
        rows.append([proxy, *(show(of_model, ".4f") for of_model in gains)])
    title = f"gain in held-out reward after {steps} steps, {seeds} seeds"
    print_table(title, ["exploring in", *models.MODELS], rows)
    print("paper, final reward by explore steps: 2 0.3587, 4 0.3650, 6 0.3686, 8 0.3659")


def algorithms(seeds, steps):
    """Held-out reward of the four algorithms at equal updates: a table and a picture. Runs of one
    seed share prompts and candidates, so the lead of Sol-RL is the mean of paired differences."""
    todo = [
        dict(model=model, algorithm=algorithm, seed=seed, steps=steps)
        for seed in range(seeds)
        for model in models.MODELS
        for algorithm in ALGORITHMS
    ]
    runs = run_all(PROJECT / "runs" / "algorithms", todo)
    figure, axes = plt.subplots(1, len(models.MODELS), figsize=(12, 4))
    rows = []
    for axis, name in zip(axes, models.MODELS):
        gains = {}
        for algorithm in ALGORITHMS:
            of_seeds = logs(runs, model=name, algorithm=algorithm)
            evaluations = [[line for line in run if "eval/reward" in line] for run in of_seeds]
            curves = list(zip(*([line["eval/reward"] for line in run] for run in evaluations)))
            gains[algorithm] = [last - first for first, last in zip(curves[0], curves[-1])]
            leads = [sol_rl - gain for sol_rl, gain in zip(gains["sol_rl"], gains[algorithm])]
            lead = "" if algorithm == "sol_rl" else show(leads, "+.4f")
            seconds = [
                sum(line.get(f"time/{s}", 0) for run in of_seeds for line in run for s in stages)
                for stages in (("explore", "regenerate", "reward"), ("train",))
            ]
            cells = [f"{curves[0][0]:.4f}", show(curves[-1], ".4f"), show(gains[algorithm], ".4f")]
            times = [f"{of_stages / seeds:.0f}" for of_stages in seconds]
            rows.append([name, algorithm, *cells, lead, *times])
            means, errors = zip(*map(mean_and_error, curves))
            step = [line["step"] for line in evaluations[0]]
            axis.errorbar(step, means, yerr=errors, label=algorithm, capsize=2)
        axis.set(title=f"tiny {name}", xlabel="optimizer steps")
    axes[0].set_ylabel(f"held-out reward (tiny CLIPScore), {seeds} seeds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PROJECT / "docs" / "algorithms.png", dpi=110)
    columns = "model, algorithm, before, after, gain, lead of sol_rl, rollout s, train s"
    print_table(f"{steps} steps, {seeds} seeds", columns.split(", "), rows)


def main(argv=None):
    as_written = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("experiment", choices=("fidelity", "algorithms", "ladder"))
    parser.add_argument("--prompts", type=int, default=16, help="of fidelity and ladder")
    parser.add_argument("--seeds", type=int, default=3, help="runs of algorithms and ladder")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    given = parser.parse_args(argv)
    most = len(world.HELD_OUT_PROMPTS)
    if not 1 <= given.prompts <= most or given.seeds < 1 or given.steps < 1:
        parser.error(f"--prompts: 1 to {most}, the held-out ones; --seeds, --steps: at least 1")
    if given.experiment == "fidelity":
        fidelity(given.prompts)
    elif given.experiment == "ladder":
        ladder(given.prompts, given.seeds, given.steps)
    else:
        algorithms(given.seeds, given.steps)


if __name__ == "__main__":
    main()
