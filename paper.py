"""The paper's claims, measured on the tiny models.

    python paper.py fidelity           # does NVFP4 rank as BF16 does? (Table 8; half a minute)
    python paper.py families           # the four rollout families, 3 seeds each

Each prints the paper's figure beside its own. `families` runs train.py twelve times, writes its
runs under runs/families/ (a run that is complete there is not run again) and the picture
docs/families.png.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import models
import tiny
from config import FAMILIES
from report import plt
from reward import build_reward
from rollout import candidate_seeds, draw
from train import selection


def fidelity(prompts=16, pool=96, keep=12, explore_steps=6, rollout_steps=10):
    """Rank agreement of proxies with a BF16 rollout of the untrained tiny SANA, as means over
    prompts with their standard errors."""
    world = tiny.ensure()
    model = models.load("sana", world / "sana")
    reward = build_reward("clipscore", "cpu", world)
    explorer, _ = models.make_explorer(model, "nvfp4")
    names = tiny.HELD_OUT_PROMPTS[:prompts]
    texts = model.encode(names)

    def scores(transformer, i, steps, micro_batch):
        seeds = candidate_seeds(0, 0, i, pool)
        pieces = draw(model, transformer, texts.take(i), seeds, steps, micro_batch)
        return torch.cat([reward(images, [names[i]] * len(images)) for _, images in pieces])

    few = f"{explore_steps} steps"
    proxies = {
        f"NVFP4, {few}": (explorer, explore_steps, pool),
        f"NVFP4, {few}, micro-batches of 16": (explorer, explore_steps, 16),
        f"NVFP4, {rollout_steps} steps": (explorer, rollout_steps, pool),
        f"BF16, {few}": (model.transformer, explore_steps, pool),
    }
    found = {name: [] for name in proxies}
    batches = []  # rho between the first two
    for i in tqdm(range(prompts), desc="prompts"):
        truth = scores(model.transformer, i, rollout_steps, pool)
        ranked = {name: scores(t, i, s, m) for name, (t, s, m) in proxies.items()}
        for name, proxy in ranked.items():
            found[name].append(selection.rank_fidelity(proxy, truth, keep))
        first, second, *_ = ranked.values()
        batches.append(selection.rank_fidelity(second, first, keep)["spearman_rho"])
    columns = list(found[f"NVFP4, {few}"][0])
    print(f"\nranking of {pool} seeds against BF16 at {rollout_steps} steps, {prompts} prompts")
    print("| proxy | " + " | ".join(columns) + " |\n|" + " --- |" * (1 + len(columns)))
    for name, rows in found.items():
        cells = [mean_and_error([row[column] for row in rows]) for column in columns]
        print(f"| {name} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in cells) + " |")
    print("| paper, CLIPScore | 0.752 | 0.900 | 0.922 | | | |")
    print("| paper, HPSv2 (ranks: SANA) | 0.827 | 0.943 | 0.939 | | 8.7 | 87.4 |")
    m, e = mean_and_error(batches)
    print(f"\nNVFP4 in micro-batches of {pool} against 16, rho: {m:.3f} ± {e:.3f}")


def families(seeds, steps, folder=Path("runs/families"), jobs=2):
    """Held-out reward of the four rollout families at equal updates: a table and a picture."""
    tiny.ensure()  # once, before the runs share it

    def run(family, seed):
        out = folder / f"{family}_{seed}"
        if not (out / "lora").is_dir():
            command = [sys.executable, "train.py", "--family", family, "--seed", str(seed)]
            command += ["--steps", str(steps), "--output_dir", str(out)]
            threads = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)))
            log = folder / f"{family}_{seed}.log"
            with open(log, "w") as output:
                subprocess.run(
                    command, check=True, stdout=output, stderr=output, env=os.environ | threads
                )
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(family, seed) for seed in range(seeds) for family in FAMILIES]
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(pairs, tqdm(pool.map(lambda p: run(*p), pairs), total=len(pairs))))

    figure, axis = plt.subplots(figsize=(6, 4))
    print("\n| family | before | after | gain | rollout s | train s |\n|" + " --- |" * 6)
    for family in FAMILIES:
        runs = [found[family, seed] for seed in range(seeds)]
        evals = [[line for line in run if "eval/reward" in line] for run in runs]
        gains = [run[-1]["eval/reward"] - run[0]["eval/reward"] for run in evals]
        after, error = mean_and_error([run[-1]["eval/reward"] for run in evals])
        gain, gain_error = mean_and_error(gains)
        seconds = {
            stage: sum(line.get(f"time/{stage}", 0) for run in runs for line in run) / seeds
            for stage in ("explore", "regenerate", "reward", "train")
        }
        train = seconds.pop("train")
        print(
            f"| {family} | {evals[0][0]['eval/reward']:.4f} | {after:.4f} ± {error:.4f} | "
            f"{gain:.4f} ± {gain_error:.4f} | {sum(seconds.values()):.0f} | {train:.0f} |"
        )
        steps = [line["step"] for line in evals[0]]
        means, errors = zip(
            *(mean_and_error([run[i]["eval/reward"] for run in evals]) for i in range(len(steps)))
        )
        axis.errorbar(steps, means, yerr=errors, label=family, capsize=2)
    axis.set(xlabel="optimizer steps", ylabel="held-out reward (tiny CLIPScore)")
    axis.set_title(f"tiny SANA, {seeds} seeds, standard errors", fontsize=10)
    axis.legend()
    figure.tight_layout()
    figure.savefig("docs/families.png", dpi=110)


def mean_and_error(values):
    """(mean, standard error of the mean)."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("fidelity", "families"))
    parser.add_argument("--prompts", type=int, default=16, help="of fidelity")
    parser.add_argument("--seeds", type=int, default=3, help="runs a family")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    arguments = parser.parse_args(argv)
    if arguments.what == "fidelity":
        fidelity(arguments.prompts)
    else:
        families(arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
