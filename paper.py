"""The paper's claims, measured on the tiny models.

    python paper.py fidelity           # does NVFP4 rank as BF16 does? (Table 8; 3 minutes)
    python paper.py families           # the four rollout families, 3 models, 3 seeds (40 minutes)
    python paper.py ladder             # precisions and steps of exploring, 3 models (2 hours)

`fidelity` prints the paper's figures beside its own and draws docs/candidates.png. The other two
run train.py, under runs/families/ and runs/ladder/ (a run that is complete there is not run
again); `families` draws docs/families.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import models
import tiny
from config import FAMILIES
from report import mean_and_error, plt
from reward import build_reward
from rollout import candidate_seeds, draw
from train import selection

HERE = Path(__file__).parent
COLUMNS = "kendall_tau spearman_rho top_match bottom_match top_rank bottom_rank".split()


def candidates(model, reward, text, prompt, i, transformer, steps, micro_batch, pool=96):
    """(images, rewards) of the pool of the i-th prompt."""
    seeds = candidate_seeds(0, 0, i, pool)
    parts = [seeds[j : j + micro_batch] for j in range(0, pool, micro_batch)]
    images = torch.cat([draw(model, transformer, text, part, steps)[1] for part in parts])
    return images, reward(images, [prompt] * pool)


def fidelity(prompts, pool=96, keep=12, explore_steps=6, rollout_steps=10):
    """Rank agreement of proxies with a BF16 rollout of the untrained tiny models, as means over
    prompts with their standard errors."""
    world = tiny.ensure(*models.MODELS)
    reward = build_reward("clipscore", "cpu", world)
    names = tiny.HELD_OUT_PROMPTS[:prompts]
    rows, batches, shown = [], [], []
    for family in models.MODELS:
        model = models.load(family, world / family, tiny.SIDE)
        explorer, _ = models.make_explorer(model, "nvfp4", model.keep_bf16)
        texts = model.encode(names)
        few = f"{explore_steps} steps"
        proxies = {
            f"NVFP4, {few}": (explorer, explore_steps, pool),
            f"NVFP4, {few}, micro-batches of 16": (explorer, explore_steps, 16),
            f"NVFP4, {rollout_steps} steps": (explorer, rollout_steps, pool),
            f"BF16, {few}": (model.transformer, explore_steps, pool),
        }
        found, other_batch = {name: [] for name in proxies}, []
        for i in tqdm(range(prompts), desc=f"{family}, prompts"):
            of = model, reward, texts.take(i), names[i], i
            images, truth = candidates(*of, model.transformer, rollout_steps, pool)
            drawn = {name: candidates(*of, *how) for name, how in proxies.items()}
            for name, (_, proxy) in drawn.items():
                found[name].append(selection.rank_fidelity(proxy, truth, keep))
            first, second, *_ = drawn.values()
            other_batch.append(selection.rank_fidelity(second[1], first[1], keep)["spearman_rho"])
            if i == 0:
                kept = selection.best_worst(first[1], 8)
                shown.append((family, [(x[kept], r[kept]) for x, r in (first, (images, truth))]))
        rows += [(f"{family}: {name}", ranks) for name, ranks in found.items()]
        batches.append("{}: {:.3f} ± {:.3f}".format(family, *mean_and_error(other_batch)))
    print(f"\nranking of {pool} seeds against BF16 at {rollout_steps} steps, {prompts} prompts")
    print_ranks(rows)
    print("| paper, CLIPScore | 0.752 | 0.900 | 0.922 | | | |")
    print("| paper, HPSv2 (ranks: SANA) | 0.827 | 0.943 | 0.939 | | 8.7 | 87.4 |")
    print("| paper, HPSv2, FLUX.1 | | | | | 8.4 | 87.4 |")
    print(f"\nNVFP4 in micro-batches of {pool} against 16, rho: {', '.join(batches)}")
    candidates_picture(names[0], shown)


def print_ranks(rows):
    print("| proxy | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (1 + len(COLUMNS)))
    for name, ranks in rows:
        cells = [mean_and_error([rank[column] for rank in ranks]) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in cells) + " |")


def candidates_picture(prompt, shown):
    """docs/candidates.png. shown: (family, [(images, rewards) explored, the same in BF16])."""
    figure, axes = plt.subplots(2 * len(shown), 8, figsize=(9, 2.6 * len(shown)))
    for i, (family, pairs) in enumerate(shown):
        for j, (name, (images, rewards)) in enumerate(zip(("NVFP4", "BF16"), pairs)):
            for k, axis in enumerate(axes[2 * i + j]):
                axis.imshow(images[k].permute(1, 2, 0).float().numpy())
                axis.set_title(f"{rewards[k]:.2f}", fontsize=8)
                axis.set_xticks([])
                axis.set_yticks([])
            axes[2 * i + j][0].set_ylabel(f"{family}, {name}", fontsize=8)
    figure.suptitle(f"{prompt}: best 4 and worst 4 as explored", fontsize=10)
    figure.tight_layout()
    figure.savefig(HERE / "docs" / "candidates.png", dpi=110)


def runs_of(folder, todo, jobs=2):
    """The metrics of a run of train.py for each dict of options; those complete are not rerun."""

    def run(options):
        out = folder / "_".join(str(v) if v is not True else k for k, v in options.items())
        if (out / "lora").is_dir():
            ran = json.loads((out / "config.json").read_text())["config"]
            if any(ran[name] != value for name, value in options.items()):
                sys.exit(f"paper.py: error: {out} is of other options; delete it")
        else:
            shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
            words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]
            command = [sys.executable, HERE / "train.py", *words, f"--output_dir={out}"]
            threads = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)))
            with open(out.with_suffix(".log"), "w") as log:
                ran = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads)
            if ran.returncode:
                sys.exit(f"paper.py: error: {' '.join(words)} failed; {log.name} says why")
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    tiny.ensure(*models.MODELS)  # once, before the runs share it
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        return list(tqdm(pool.map(run, todo), total=len(todo)))


LADDER = {
    "bf16": dict(precision="bf16"),
    "fp8": dict(precision="fp8"),
    "nvfp4_4over6": dict(precision="nvfp4_4over6"),
    "nvfp4_row": dict(precision="nvfp4_row"),
    "nvfp4": dict(precision="nvfp4"),
    "nvfp4, every layer": dict(precision="nvfp4", quantize_all=True),
    "nvfp4, 2 steps": dict(precision="nvfp4", explore_steps=2),
    "nvfp4, 4 steps": dict(precision="nvfp4", explore_steps=4),
    "nvfp4, 8 steps": dict(precision="nvfp4", explore_steps=8),
}


def ladder(prompts, seeds, steps, pool=96, keep=12, rollout_steps=10):
    """What each precision and number of steps of exploring does to the ranking of the untrained
    tiny models, and to the held-out reward after training with it."""
    todo = [
        dict(model=model, seed=seed, steps=steps) | options
        for seed in range(seeds)
        for model in models.MODELS
        for options in LADDER.values()
    ]
    runs = runs_of(HERE / "runs" / "ladder", todo)
    world = tiny.ensure(*models.MODELS)
    reward = build_reward("clipscore", "cpu", world)
    names, rows, other_batch, gains = tiny.HELD_OUT_PROMPTS[:prompts], [], [], {}
    for family in models.MODELS:
        model = models.load(family, world / family, tiny.SIDE)
        texts = model.encode(names)
        of = [(model, reward, texts.take(i), names[i], i) for i in range(prompts)]
        truths = [candidates(*o, model.transformer, rollout_steps, pool)[1] for o in of]
        for name, options in tqdm(LADDER.items(), desc=family):
            skip = () if "quantize_all" in options else model.keep_bf16
            explorer, _ = models.make_explorer(model, options["precision"], skip)
            few = options.get("explore_steps", 6)
            proxies = [candidates(*o, explorer, few, pool)[1] for o in of]
            found = [selection.rank_fidelity(p, t, keep) for p, t in zip(proxies, truths)]
            rows.append((f"{family}: {name}", found))
            if few == 6 and options["precision"] != "bf16":
                again = [candidates(*o, explorer, few, 16)[1] for o in of]
                rhos = [
                    selection.rank_fidelity(*p, keep)["spearman_rho"] for p in zip(again, proxies)
                ]
                other_batch.append((f"{family}: {name}", mean_and_error(rhos)))
            mine = [
                run
                for o, run in zip(todo, runs)
                if o == dict(model=family, seed=o["seed"], steps=steps) | options
            ]
            gains[family, name] = mean_and_error([run[-1]["eval/gain"] for run in mine])
    print(f"\nranking of {pool} seeds against BF16 at {rollout_steps} steps, {prompts} prompts")
    print_ranks(rows)
    print("\nmicro-batches of 16 against 96, rho: ", end="")
    print(", ".join(f"{name} {mean:.3f} ± {error:.3f}" for name, (mean, error) in other_batch))
    print(f"\ngain in held-out reward after {steps} steps, {seeds} seeds")
    print(
        "| exploring in | "
        + " | ".join(models.MODELS)
        + " |\n|"
        + " --- |" * (1 + len(models.MODELS))
    )
    for name in LADDER:
        cells = ["{:.4f} ± {:.4f}".format(*gains[family, name]) for family in models.MODELS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("paper, final reward by explore steps: 2 0.3587, 4 0.3650, 6 0.3686, 8 0.3659")


def families(seeds, steps):
    """Held-out reward of the four rollout families at equal updates: a table and a picture. Runs of
    one seed share prompts and candidates, so Sol-RL's lead is that of pairs."""
    todo = [
        dict(model=model, family=family, seed=seed, steps=steps)
        for seed in range(seeds)
        for model in models.MODELS
        for family in FAMILIES
    ]
    runs = runs_of(HERE / "runs" / "families", todo)
    figure, axes = plt.subplots(1, len(models.MODELS), figsize=(12, 4))
    columns = "model | family | before | after | gain | lead of sol_rl | rollout s | train s"
    print(f"\n| {columns} |\n|" + " --- |" * 8)
    for axis, model in zip(axes, models.MODELS):
        gains = {}
        for family in FAMILIES:
            mine = [
                run
                for options, run in zip(todo, runs)
                if (options["model"], options["family"]) == (model, family)
            ]
            evals = [[line for line in run if "eval/reward" in line] for run in mine]
            curves = list(zip(*([line["eval/reward"] for line in run] for run in evals)))
            after, error = mean_and_error(curves[-1])
            gains[family] = [b - a for a, b in zip(curves[0], curves[-1])]
            gain, gain_error = mean_and_error(gains[family])
            leads = [a - b for a, b in zip(gains["sol_rl"], gains[family])]
            lead = "" if family == "sol_rl" else "{:+.4f} ± {:.4f}".format(*mean_and_error(leads))
            seconds = {
                stage: sum(line.get(f"time/{stage}", 0) for run in mine for line in run) / seeds
                for stage in ("explore", "regenerate", "reward", "train")
            }
            train = seconds.pop("train")
            print(
                f"| {model} | {family} | {curves[0][0]:.4f} | {after:.4f} ± {error:.4f} | "
                f"{gain:.4f} ± {gain_error:.4f} | {lead} | {sum(seconds.values()):.0f} | "
                f"{train:.0f} |"
            )
            means, errors = zip(*map(mean_and_error, curves))
            at = [line["step"] for line in evals[0]]
            axis.errorbar(at, means, yerr=errors, label=family, capsize=2)
        axis.set_title(f"tiny {model}", fontsize=10)
        axis.set_xlabel("optimizer steps")
    axes[0].set_ylabel(f"held-out reward (tiny CLIPScore), {seeds} seeds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "docs" / "families.png", dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("fidelity", "families", "ladder"))
    parser.add_argument("--prompts", type=int, default=16, help="of fidelity and ladder")
    parser.add_argument("--seeds", type=int, default=3, help="runs a model and family")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.prompts <= len(tiny.HELD_OUT_PROMPTS):
        parser.error(f"--prompts: 1 to {len(tiny.HELD_OUT_PROMPTS)}, the held-out ones")
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps: at least 1")
    if arguments.what == "fidelity":
        fidelity(arguments.prompts)
    elif arguments.what == "ladder":
        ladder(arguments.prompts, arguments.seeds, arguments.steps)
    else:
        families(arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
