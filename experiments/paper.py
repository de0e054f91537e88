"""The paper's experiments on the tiny models, one command each; --help lists them.

    python experiments/paper.py pool           # Table 3
    python experiments/paper.py fidelity       # Table 8: does NVFP4 rank as BF16 does?
    python experiments/paper.py fidelity --model sana --precision fp8 --prompts 6  # half a minute
    python experiments/paper.py budget --speed_up 3     # which pool for my explorer? seconds
    python experiments/paper.py control negated --model sana  # one run of train.py under a control

Each command prints a table. It writes it to docs/data as CSV, where rows of models that are not in
--models stay, and renews the tables of docs/results.md that are made from this file. The last three
commands do not: `fidelity` about one precision only prints, `budget` draws a figure of its own, and
`control` is a run. Runs of train.py lie in runs/paper/COMMIT, and every command reuses the complete
runs of its commit. After a change that is not committed, delete that folder.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # before torch, because support prepares OpenMP

# isort: split

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import rollout
from reward import build_reward
from rollout import candidate_seeds, draw, make_copy
from support import models, world
from support.errors import InputError, exit_code, require, written_whole
from support.models import follow
from support.report import COLOURS, mean_and_error, network_evaluations
from train import group_advantages, nft_loss, update

PROJECT = Path(__file__).parent.parent
RESULTS, DATA = PROJECT / "docs" / "results.md", PROJECT / "docs" / "data"
# Asked when the program starts, because the project may change while runs are made.
COMMIT = subprocess.getoutput(f"git -C '{PROJECT}' describe --always --dirty")
RUNS = PROJECT / "runs" / "paper" / COMMIT.removesuffix("-dirty")

# ---------------------------------------------------------------------------------------------
# Controls: train.py with one of its functions replaced. If the reward still rises as much, then the
# part of the method that the control removes is not the cause.


def negated(rewards, *settings):
    """Advantages with the other sign: the worst candidates are imitated, the best avoided."""
    return -group_advantages(rewards, *settings)


def weights_one(rewards, adv_clip=5.0, std_over="all"):
    """Advantages that make r = 1 for every sample: fine-tuning on one's own samples."""
    return torch.full_like(rewards, adv_clip)


def advantage_weighted(v, v_old, v_ref, x_t, x_0, t, advantages, beta=1.0, adv_clip=5.0, kl=1e-4):
    """Advantage-weighted regression: l_plus alone, weighted by the advantage where it is positive.
    It weights the gradient of the KL term too. The arguments are those of nft_loss."""
    weight = (advantages / adv_clip).clamp(0, 1).reshape(-1, *[1] * (v.dim() - 1))
    v = v.detach() + weight * (v - v.detach())  # the same values; their gradients are weighted
    r_is_one = torch.full_like(advantages, adv_clip)
    return nft_loss(v, v_old, v_ref, x_t, x_0, t, r_is_one, beta, adv_clip, kl)


def pairwise_dpo(v, v_old, v_ref, x_t, x_0, t, advantages, *settings):
    """Online DPO with beta = 100: of each two samples, the policy should improve on the base model
    more for the one with the larger advantage. The arguments are those of nft_loss."""
    _, metrics = nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, *settings)
    times = t.reshape(-1, *[1] * (x_0.dim() - 1))
    errors = [((x_t - times * u - x_0) ** 2).flatten(1).mean(dim=1) for u in (v, v_ref)]
    gain = errors[1] - errors[0]  # (B,)
    margins = 100 * (gain[:, None] - gain)[advantages[:, None] > advantages]
    loss = -F.logsigmoid(margins).sum() / max(1, len(margins))
    return loss, metrics | {"loss": loss.detach()}


def other_text(run, samples, *arguments):
    """An update in which the samples of each prompt have the text of another prompt."""
    texts = [candidates.text for candidates in samples]
    pairs = zip(samples, texts[1:] + texts[:1])
    samples = [dataclasses.replace(candidates, text=text) for candidates, text in pairs]
    return update(run, samples, *arguments)


def old_policy(fixed_eta):
    """The old policy follows with this eta in every step; with 1 the base model draws."""

    def following(transformer, follower, eta):
        follow(transformer, follower, fixed_eta if follower == "old" else eta)

    return following


def decaying_rate(run, samples, advantages, step):
    """An update whose learning rate falls to 0 along a straight line."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.learning_rate * (1 - step / run.config.steps)
    return update(run, samples, advantages, step)


def every_layer(model, precision, skip=(), min_dim=0):
    """A copy of the transformer in which no linear layer stays in BF16."""
    return make_copy(model, precision)


def smooth(images, prompts, metadata):
    """A reward that sees texture: minus the mean distance of each pixel from the mean of its 3x3
    neighbourhood, (n,). It falls with fine noise, such as quantization may leave in an image."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return -(images - blurred).abs().mean(dim=(1, 2, 3))


def rarely_right(images, prompts, metadata):
    """A reward that succeeds rarely, (n,): 1 if the picture is purple although its prompt does not
    say so, else 0."""
    colours = world.classifier()(images.cpu())[2].argmax(dim=1)
    is_purple = colours == list(world.COLOURS).index("purple")
    return is_purple.float() * torch.tensor([float("purple" not in text) for text in prompts])


CONTROLS = {  # name -> (module, the name of its function that is replaced, what replaces it)
    "negated": (train, "group_advantages", negated),
    "weights_one": (train, "group_advantages", weights_one),
    "advantage_weighted": (train, "nft_loss", advantage_weighted),
    "pairwise_dpo": (train, "nft_loss", pairwise_dpo),
    "other_text": (train, "update", other_text),
    "old_fixed": (models, "follow", old_policy(1.0)),
    "old_slow": (models, "follow", old_policy(0.9)),
    "decaying_rate": (train, "update", decaying_rate),
    "every_layer": (rollout, "make_copy", every_layer),
}


def train_under(names, argv):
    """train.main(argv) under these controls, joined by +; returns the exit code. Nothing in the
    run's folder names them, so resume it with the same command."""
    for name in names.split("+"):
        require(name in CONTROLS, f"{name}: must be of {', '.join(CONTROLS)}, joined by +")
        setattr(*CONTROLS[name])
    return train.main(argv)


# ---------------------------------------------------------------------------------------------
# Runs of train.py, and tables of them


class Run:
    """The evaluations of a run of train.py."""

    def __init__(self, folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.evaluations = [line for line in lines if "eval/reward" in line]
        self.steps, self.rewards = self.values("step"), self.values("eval/reward")

    def values(self, metric):
        return [evaluation[metric] for evaluation in self.evaluations]

    def reward_at(self, share):
        """The reward of the evaluation nearest to this share of the updates."""
        distances = [abs(step - share * self.steps[-1]) for step in self.steps]
        return self.rewards[distances.index(min(distances))]

    def plateau(self):
        """The mean reward of the last third of the run."""
        return mean(self.rewards[-(len(self.rewards) // 3) :])

    def fall(self, first):
        """How far the reward falls at most below its highest value so far, from this update on."""
        points = zip(self.steps, accumulate(self.rewards, max), self.rewards)
        return max(highest - reward for step, highest, reward in points if step >= first)

    def reach(self, reward):
        """The number of updates after which the run first has this reward, interpolated linearly
        between evaluations; infinity if it never has."""
        if self.rewards[0] >= reward:
            return self.steps[0]
        for (step, value), (next_step, next_value) in pairwise(zip(self.steps, self.rewards)):
            if next_value >= reward:
                return step + (reward - value) / (next_value - value) * (next_step - step)
        return math.inf


def finish(model, variant, seed):
    """The Run of a variant, made now if it is not complete. A variant is the options of train.py
    that are not the default, perhaps after `control NAME`."""
    folder = RUNS / f"{model} {seed} {variant}".strip().replace("/", "|")
    if (folder / "complete").exists():
        return Run(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    program, options = ["train.py"], variant.split()
    if options[:1] == ["control"]:
        program, options = ["experiments/paper.py", *options[:2]], options[2:]
    options += [f"--model={model}", f"--seed={seed}", f"--output_dir={folder}", "--device=cpu"]
    command = [sys.executable, *program, *options]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{done.stderr.strip().splitlines()[-1]} ({shlex.join(command[1:])})")
    (folder / "complete").touch()
    return Run(folder)


def run_variants(given, variants):
    """{(model, variant): its Runs, one for each seed}; two runs are made at a time."""
    keys = [(m, v, seed) for m in given.models for v in variants for seed in given.seeds]
    with ThreadPoolExecutor(2) as pool:
        runs = list(tqdm(pool.map(finish, *zip(*keys)), total=len(keys)))
    return {(m, v): [run for key, run in zip(keys, runs) if key[:2] == (m, v)] for m, v, _ in keys}


def show(values, form=".3f"):
    """Mean and, if the values differ, its standard error. Infinity stands for a run that does not
    get there."""
    if math.inf in values:
        return f"not reached by {values.count(math.inf)} of {len(values)}"
    average, error = mean_and_error(values)
    return f"{average:{form}}" + (f" ± {error:{form.lstrip('+')}}" if len(set(values)) > 1 else "")


OWN = {  # columns -> (format, function of a Run)
    "reward before": (".4f", lambda run: run.rewards[0]),
    "reward after": (".4f", lambda run: run.rewards[-1]),
    "gain at 25%": (".4f", lambda run: run.reward_at(0.25) - run.rewards[0]),
    "gain at 50%": (".4f", lambda run: run.reward_at(0.5) - run.rewards[0]),
    "gain at 75%": (".4f", lambda run: run.reward_at(0.75) - run.rewards[0]),
    "gain at 100%": (".4f", lambda run: run.rewards[-1] - run.rewards[0]),
    "highest gain": (".4f", lambda run: max(run.rewards) - run.rewards[0]),
    "accuracy before": (".1%", lambda run: run.values("eval/accuracy")[0]),
    "accuracy after": (".1%", lambda run: run.values("eval/accuracy")[-1]),
    "clear before": (".1%", lambda run: run.values("eval/clear")[0]),
    "clear after": (".1%", lambda run: run.values("eval/clear")[-1]),
}
PAIRED = {  # columns -> (format, function of the first variant's Run and one of the same seed)
    "lead at half": ("+.4f", lambda first, run: first.reward_at(0.5) - run.reward_at(0.5)),
    "lead at the end": ("+.4f", lambda first, run: first.rewards[-1] - run.rewards[-1]),
    "caught up after": (".0%", lambda first, run: first.reach(run.rewards[-1]) / first.steps[-1]),
}


def cells(columns, *runs):
    """The columns of one or several lists of Runs, each as the mean and error over the runs."""
    return [show([f(*each) for each in zip(*runs)], form) for form, f in columns.values()]


def compare(given, variants, paper=()):
    """(columns, rows) of the variants, with the leads of the first one: mean and standard error
    over the seeds. paper: the paper's values."""
    made, rows = run_variants(given, variants), []
    groups = [[model] for model in given.models]
    if len(groups) > 1:
        groups.append(given.models)
    for group, (i, variant) in product(groups, enumerate(variants)):
        first, runs = (sum((made[m, v] for m in group), []) for v in (variants[0], variant))
        own = cells(OWN, runs) if len(group) == 1 else [""] * len(OWN)
        leads = cells(PAIRED, first, runs) if i else [""] * len(PAIRED)
        rows.append([" + ".join(group), variant or "default", *own, *leads, *paper[i : i + 1]])
    return ["model", "variant", *OWN, *PAIRED, *(["paper"] if paper else [])], rows


# ---------------------------------------------------------------------------------------------
# Experiments that compare runs. Each returns (columns, rows).

LONG = "--steps 150"  # the reward of 24 of 24 has its plateau before the end of it
LONG_BASE = f"{LONG} --algorithm diffusionnft"  # 24 of 24
RARE = "--steps 20 --eval_every 5 --reward experiments/paper.py:rarely_right"
VARIANTS = {  # experiment -> variants; "" is the default
    "algorithms": ["", *(f"--algorithm {name}" for name in list(train.ALGORITHMS)[1:])],
    "explore_steps": ["", "--explore_steps 2", "--explore_steps 4", "--explore_steps 8"],
    "pool": ["", "--algorithm diffusionnft", "--pool 48", "--pool 72"],
    "kept": ["", "--keep 48", "--keep 96"],
    "selection": ["", "--select random_subset"],
    "controls": ["", "--select random_subset"]
    + [f"control {name}" for name in ("negated", "other_text", "weights_one", "old_fixed")],
    "rare": [RARE, f"{RARE} --algorithm diffusionnft"],
    "long_runs": [f"--steps 80 --algorithm {name}" for name in list(train.ALGORITHMS)[:3]],
    "stability": [LONG, LONG_BASE],
    "against_falls": [LONG, *(f"{LONG} --kl {kl}" for kl in ("1e-4", "1e-3", "1e-2"))]
    + [f"control {name} {LONG} --kl 1e-4" for name in ("decaying_rate", "old_slow")],
}
UPDATE_RULES = {"NFT": "", "AWR": "control advantage_weighted", "DPO": "control pairwise_dpo"}
PAPER = {  # the paper's values
    "explore_steps": ["0.3686", "0.3587", "0.3650", "0.3659"],
    "pool": ["0.3686", "0.3569", "0.3622", "0.3663"],
    "kept": ["0.908 (base 0.758)", "0.902", "0.893"],
}
NAIVE_FP4 = (  # settings in which naive_quant is compared with naive_scaling
    "",
    "--steps 80",
    "control every_layer",
    "--learning_rate 1e-2",
    "control weights_one",
    "control advantage_weighted",
    "control advantage_weighted+every_layer",
    "--rollout_steps 6",
    "--reward clipscore,experiments/paper.py:smooth:20",
)
SPEED_UPS = {"sana": 1.41, "flux": 2.33, "sd3": 2.41}  # of the rollout, measured in the paper
PAPER_RATIOS = {  # the baseline's GPU-hours / Sol-RL's, to reach these shares of the gain
    "sana": {0.25: 1.6, 0.5: 1.9, 0.75: 2.2, 1.0: 2.42},
    "flux": {0.25: 1.6, 0.5: 1.9, 0.75: 2.3, 1.0: 3.00},
    "sd3": {0.25: 2.1, 0.5: 2.8, 0.75: 3.7, 1.0: 4.64},
}


def comparison(name):
    return lambda given: compare(given, VARIANTS[name], PAPER.get(name, ()))


def algorithms(given):
    figure = Figure(figsize=(4 * len(given.models), 3.5), layout="tight")
    axes = dict(zip(given.models, figure.subplots(1, len(given.models), squeeze=False)[0]))
    for (model, variant), of_seeds in run_variants(given, VARIANTS["algorithms"]).items():
        means, errors = zip(*map(mean_and_error, zip(*(run.rewards for run in of_seeds))))
        name = variant.removeprefix("--algorithm ") or "sol_rl"
        style = dict(label=name, color=COLOURS[name], capsize=2)
        axes[model].errorbar(of_seeds[0].steps, means, errors, **style)
        axes[model].set(title=f"tiny {model}", xlabel="updates", ylabel="held-out reward")
        axes[model].legend(title=f"mean, n = {len(of_seeds)} seeds")
    figure.savefig(RESULTS.with_name("algorithms.png"), dpi=110)
    return compare(given, VARIANTS["algorithms"])


def evaluations(config):
    """(evaluations of the model to draw, and to train on, one prompt's candidates in an update)."""
    pool, stages = train.ALGORITHMS[config.algorithm](config)
    counts = network_evaluations(pool, stages, train.num_timesteps(config))
    return sum(counts.values()) - counts["train"], counts["train"]


def costs_of_update(model):
    """Evaluations of the model in an update by (24 of 24, sol_rl at no speed-up, sol_rl with the
    paper's speed-up of the rollout)."""
    argv = [f"--model={model}", "--device=cpu", "--algorithm"]
    algorithms = ("diffusionnft", "sol_rl", "naive_scaling")
    counts = [evaluations(train.parse_options([*argv, name])) for name in algorithms]
    (base, training), (own, _), (bf16, _) = counts
    return [drawing + training for drawing in (base, own, bf16 / SPEED_UPS[model])]


def plateau(given):
    """Updates and cost to reach shares of the gain that 24 of 24 has on its plateau."""
    runs, rows = run_variants(given, [LONG, LONG_BASE]), []
    columns = ["model", "share of the gain", "updates: 24 of 24", "updates: sol_rl"]
    columns += ["cost ratio at no speed-up", "modelled cost ratio", "the paper's ratio"]
    for model in given.models:
        base_cost, *costs = costs_of_update(model)
        bases, others = runs[model, LONG_BASE], runs[model, LONG]
        for share, paper in PAPER_RATIOS[model].items():
            targets = [(1 - share) * run.rewards[0] + share * run.plateau() for run in bases]
            updates = [list(map(Run.reach, part, targets)) for part in (bases, others)]
            # A run that does not get there has no ratio.
            ratios = [b / n if 0 < n < math.inf else math.inf for b, n in zip(*updates)]
            cells = [show(numbers, ".1f") for numbers in updates]
            cells += [show([r * base_cost / cost for r in ratios], ".2f") for cost in costs]
            rows.append([model, f"{share:.0%}", *cells, f"{paper}"])
    return columns, rows


def stability(name):
    return lambda given: falls(given, VARIANTS[name])


def falls(given, variants):
    """How far the reward falls below its highest value after the update 80."""
    columns = {  # -> (format, function of a Run)
        "plateau": (".4f", Run.plateau),
        "highest": (".4f", lambda run: max(run.rewards)),
        "largest fall after 80": (".4f", lambda run: run.fall(80)),
        "at the end": (".4f", lambda run: run.rewards[-1]),
        "accuracy at the end": OWN["accuracy after"],
        "clear at the end": OWN["clear after"],
    }
    runs = run_variants(given, variants)
    rows = [[*key, *cells(columns, of_seeds)] for key, of_seeds in runs.items()]
    return ["model", "variant", *columns], rows


def update_rules(given):
    """24 of 96 against 24 of 24 under three update rules."""
    rows = []
    for name, rule in UPDATE_RULES.items():
        columns, more = compare(given, [rule, f"{rule} --algorithm diffusionnft".strip()])
        rows += [[name, *row] for row in more]
    return ["update", *columns], rows


def naive_fp4(given):
    rows = []
    for setting in NAIVE_FP4:
        pair = [
            f"{setting} --algorithm {name}".strip() for name in ("naive_scaling", "naive_quant")
        ]
        columns, more = compare(given, pair)
        rows += [[setting or "default", *row] for row in more]
    return ["setting", *columns], rows


# ---------------------------------------------------------------------------------------------
# What a pool can buy (docs/results.md derives it)

POOLS = (24, 48, 96, 192, 384)


def contrast(pool, keep, rho=1.0, pools=20_000):
    """The standard deviation of the rewards of the best and worst keep / 2 of a pool, by a proxy
    whose correlation with the reward is rho, in units of the rewards' own standard deviation. The
    rewards are normal; the mean over simulated pools."""
    rewards, noise = torch.randn(2, pools, pool, generator=rollout.generator("contrast"))
    order = (rho * rewards + (1 - rho**2) ** 0.5 * noise).argsort(dim=1)
    kept = torch.cat([order[:, : keep // 2], order[:, pool - keep // 2 :]], dim=1)
    return float(rewards.gather(1, kept).std(dim=1, correction=0).mean())


def measured_updates():
    """(share, error) for each of POOLS, as `contrasts` measured it on SANA; NaN where a run did not
    get there."""
    with open(DATA / "contrasts.csv", newline="") as file:
        cells = [r["updates measured"] for r in csv.DictReader(file) if r["model"] == "sana"]
    # "71% ± 8%", "100%" or "not reached by 1 of 3"
    numbers = [[float(n) / 100 for n in re.findall(r"([\d.]+)%", cell)] for cell in cells]
    return [(n + [0.0])[:2] if n else [math.nan] * 2 for n in numbers]


def budget(given):
    """What each pool costs, relative to 24 of 24, to reach the same reward. The signal of an update
    is proportional to the contrast, so the number of updates falls as the contrast rises. The
    figure has the number of updates that `contrasts` measured on SANA, too."""
    require(min(given.speed_up) > 0, f"--speed_up {min(given.speed_up):g}: must be above 0")
    require(-1 <= given.rho <= 1, f"--rho {given.rho:g}: must be from -1 to 1")
    require(given.training >= 0, f"--training {given.training:g}: must be at least 0")
    signals = [contrast(n, POOLS[0], given.rho) for n in POOLS]
    updates = [signals[0] / signal for signal in signals]

    def cost(n, share, speed_up):
        base = POOLS[0] * ROLLOUT_STEPS + given.training  # 24 of 24 does not explore
        explored = n * EXPLORE_STEPS / speed_up if n > POOLS[0] else 0
        return share * (explored + base) / base

    shares = updates, *zip(*measured_updates())  # in theory, measured, errors of the measured ones
    figure = Figure(figsize=(6, 4), layout="tight")
    axis, costs = figure.subplots(), []
    for speed_up, colour in zip(given.speed_up, [*COLOURS.values()][4:] * 99):
        theory, points, errors = ([cost(*of, speed_up) for of in zip(POOLS, u)] for u in shares)
        axis.plot(POOLS, theory, color=colour, label=f"explorer {speed_up:g} times as fast")
        axis.errorbar(POOLS, points, errors, color=colour, fmt="o", capsize=3)
        costs.append(theory)
    axis.plot([], [], "ko", label="with the updates measured on SANA")
    axis.set(xscale="log", xlabel="candidates per prompt", ylabel="cost to the same reward, 24 = 1")
    axis.set_xticks(POOLS, map(str, POOLS), minor=False)
    axis.set_xticks([], minor=True)
    axis.legend()
    with written_whole(given.output) as path:
        figure.savefig(path, dpi=110)
    columns = ["pool", "contrast", "updates", *(f"cost at speed-up {s:g}" for s in given.speed_up)]
    rows = [
        [str(n), f"{signal:.2f}", f"{share:.0%}", *(f"{c:.2f}" for c in of_pool)]
        for n, signal, share, *of_pool in zip(POOLS, signals, updates, *costs)
    ]
    return columns, rows


# ---------------------------------------------------------------------------------------------
# Rank fidelity of the base models, without runs

POOL, KEEP, EXPLORE_STEPS, ROLLOUT_STEPS = 96, 12, 6, 10  # KEEP best and KEEP worst are compared
COLUMNS = "kendall_tau spearman_rho top_match bottom_match top_rank bottom_rank".split()
BEST = (4, 8, 12)  # of the proxy's order; their mean percentile is compared with Table 8's "match"
# name -> (precision, steps, micro-batch)
PROXIES = {name: (name, EXPLORE_STEPS, POOL) for name in train.quant.PRECISIONS}
PROXIES |= {f"nvfp4, {n} steps": ("nvfp4", n, POOL) for n in (2, 4, 8, 10)}
PROXIES |= {"nvfp4, micro-batches of 16": ("nvfp4", EXPLORE_STEPS, 16)}
PROXIES |= {"nvfp4, every layer": ("nvfp4", EXPLORE_STEPS, POOL)}
PAPER_RANKS = [  # with the columns proxy, COLUMNS and BEST
    ["CLIPScore, all models", "0.752", "0.900", "", "", "", "", "95.7%", "93.9%", "92.2%"],
    ["CLIPScore, SANA, Euler", "", "", "", "", "11.2", "85.2", "", "", ""],
    ["CLIPScore, FLUX.1, DPM", "", "", "", "", "12.7", "83.0", "", "", ""],
    ["HPSv2, SD3.5 Medium, fp8", "", "", "", "", "7.7", "87.8", "", "", ""],
    ["HPSv2, SD3.5 Medium, nvfp4", "", "", "", "", "8.6", "83.9", "", "", ""],
]


def pool_rewards(model, prompts, transformer, steps, micro_batch, n):
    """The rewards of each prompt's pool, (prompts, n), always from the same noise."""
    reward, texts = build_reward("clipscore", clip="tiny"), model.encode(prompts)
    rewards = []
    for i, prompt in enumerate(prompts):
        seeds = candidate_seeds(0, 0, i, n)
        for start in range(0, n, micro_batch):
            batch = seeds[start : start + micro_batch]
            _, images = draw(model, transformer, texts.take(i), batch, steps)
            rewards.append(reward(images, [prompt] * len(batch)))
    return torch.cat(rewards).reshape(len(prompts), n)


def fidelity(given):
    """How PROXIES, or --precision and BF16, rank the pools of the base models against BF16."""
    proxies, steps, rows = PROXIES, given.explore_steps, []
    require(1 <= given.prompts <= 72, f"--prompts {given.prompts}: must be from 1 to 72")
    usable = steps is None or steps > 0 and given.precision
    require(usable, f"--explore_steps {steps}: must be at least 1, and needs --precision")
    if given.precision:
        steps = steps or EXPLORE_STEPS
        names = (given.precision, "bf16")
        proxies = {f"{name}, {steps} steps": (name, steps, POOL) for name in names}
    prompts = world.HELD_OUT_PROMPTS[: given.prompts]
    for name in given.models:
        model = models.load(name)
        truths = pool_rewards(model, prompts, model.transformer, ROLLOUT_STEPS, POOL, POOL)
        for proxy, (precision, steps, micro_batch) in tqdm(proxies.items(), desc=name):
            skip = () if proxy.endswith("every layer") else model.keep_bf16
            explorer, _ = make_copy(model, precision, skip)
            pools = pool_rewards(model, prompts, explorer, steps, micro_batch, POOL)
            ranks = {
                k: [train.selection.rank_fidelity(*pair, k) for pair in zip(pools, truths)]
                for k in {KEEP, *BEST}
            }
            cells = [show([rank[c] for rank in ranks[KEEP]]) for c in COLUMNS]
            for k in BEST:
                above = [(POOL - rank["top_rank"]) / (POOL - 1) for rank in ranks[k]]
                cells.append(show(above, ".1%"))
            rows.append([name, proxy, *cells])
    columns = ["model", "proxy", *COLUMNS, *(f"percentile of the best {k}" for k in BEST)]
    return columns, rows + [["paper", *row] for row in PAPER_RANKS]


def measured_pools(name):
    """(The correlation of the explorer's rewards with those in BF16, {n: contrasts of pools of n}),
    drawn by a base model; a pool's contrast is in units of the std of its prompt's rewards."""
    model, prompts = models.load(name), world.HELD_OUT_PROMPTS[::6]
    explorer, _ = make_copy(model, "nvfp4", model.keep_bf16)
    networks = (explorer, EXPLORE_STEPS), (model.transformer, ROLLOUT_STEPS)
    proxies, truths = (pool_rewards(model, prompts, *of, POOL, POOLS[-1]) for of in networks)
    rho = mean(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(proxies, truths))
    truths = truths / truths.std(dim=1, correction=0, keepdim=True)
    measured = {n: [] for n in POOLS}
    for n in POOLS:
        for proxy, truth in zip(proxies.reshape(-1, n), truths.reshape(-1, n)):
            kept = truth[train.selection.best_worst(proxy, POOLS[0])]
            measured[n].append(float(kept.std(correction=0)))
    return rho, measured


def contrasts(given):
    """The contrast of pools that the base models draw, and the updates of runs, beside theory."""
    columns = ["model", "pool", "correlation", "contrast in theory", "contrast measured"]
    columns += ["updates in theory", "updates measured"]
    keep, base = POOLS[0], "--algorithm diffusionnft"
    variants = {keep: base} | {n: f"--pool {n}" for n in POOLS[1:]}
    runs, rows = run_variants(given, variants.values()), []
    for name in given.models:
        rho, measured = measured_pools(name)
        for n, variant in variants.items():
            pairs = zip(runs[name, variant], runs[name, base])
            updates = [run.reach(other.rewards[-1]) / other.steps[-1] for run, other in pairs]
            first, theory = contrast(keep, keep), contrast(n, keep, rho)
            row = [name, str(n), f"{rho:.2f}", f"{theory:.2f}", show(measured[n], ".2f")]
            rows.append([*row, f"{first / theory:.0%}", show(updates, ".0%")])
    return columns, rows


def update_gradients(model, pool, updates=48):
    """The gradients of updates of the base model, each on prompts of its own: (updates, n)."""
    run = train.Run(train.parse_options([f"--model={model}", "--device=cpu", f"--pool={pool}"]))
    policy, gradients = run.policies["default"], []
    run.optimizer.step = lambda: gradients.append(torch.cat([p.grad.flatten() for p in policy]))
    for step in range(updates):
        train.iteration(run, step)
    return torch.stack(gradients)


def mean_cosine(vectors):
    """Of each two of the vectors (n, ...)."""
    unit = F.normalize(vectors, dim=1)
    return float(((unit @ unit.T).sum() - len(unit)) / (len(unit) * (len(unit) - 1)))


def jackknife(function, n):
    """n values whose mean is function(indices) of n samples without its bias, and whose standard
    error is its error."""
    everything = list(range(n))
    without = [function(everything[:i] + everything[i + 1 :]) for i in range(n)]
    return [n * function(everything) - (n - 1) * value for value in without]


def agreement(given):
    """How much the gradients of different updates have in common, with a pool of 24 and of 96 of
    the same prompts. If a gradient is a signal s that all share and noise n, the mean cosine of two
    of them is |s|^2 / (|s|^2 + |n|^2). A step of AdamW has nearly the same length for any gradient.
    So its progress along s grows with the root of the cosine."""
    rows = []
    for model in given.models:
        g = {pool: update_gradients(model, pool) for pool in (24, 96)}
        functions = [
            lambda some: mean_cosine(g[24][some]),
            lambda some: mean_cosine(g[96][some]),
            lambda some: (mean_cosine(g[24][some]) / mean_cosine(g[96][some])) ** 0.5,
        ]
        values = [jackknife(function, len(g[24])) for function in functions]
        rows.append([model, *map(show, values, (".3f", ".3f", ".0%"))])
    return ["model", "cosine for 24 of 24", "cosine for 24 of 96", "updates that follow"], rows


# ---------------------------------------------------------------------------------------------
# docs/data and docs/results.md

EXPERIMENTS = {  # name -> (title, function of the command line)
    "algorithms": ("the four algorithms", algorithms),
    "plateau": ("updates and cost to the plateau of 24 of 24", plateau),
    "stability": ("does the reward stay on its plateau?", stability("stability")),
    "against_falls": ("what keeps it there?", stability("against_falls")),
    "update_rules": ("24 of 96 against 24 of 24 under other update rules", update_rules),
    "explore_steps": ("steps of exploring (Table 2)", comparison("explore_steps")),
    "pool": ("size of the pool (Table 3)", comparison("pool")),
    "kept": ("candidates trained on, at equal updates", comparison("kept")),
    "selection": ("best and worst, or random, at equal cost", comparison("selection")),
    "controls": ("controls: what the gain rests on", comparison("controls")),
    "rare": ("a reward that succeeds rarely", comparison("rare")),
    "naive_fp4": ("when does training on NVFP4 samples fall behind?", naive_fp4),
    "long_runs": ("80 updates: do NVFP4 samples fall behind?", comparison("long_runs")),
    "budget": ("which pool for an explorer of this speed?", budget),
    "contrasts": ("the contrast of measured pools beside theory", contrasts),
    "agreement": ("what the gradients of different updates have in common", agreement),
    "fidelity": ("does NVFP4 rank as BF16 does? (Table 8)", fidelity),
}


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fill(page):
    """The page with the tables made anew that stand below a comment such as

    <!-- pool.csv: model, variant, paper; model = sana / flux -->

    which names a file of docs/data, its columns to show and, perhaps, the rows."""

    def made(match):
        name, columns, condition = match[1], match[2].split(", "), match[3] or ""
        with open(DATA / name, newline="") as file:
            rows = list(csv.DictReader(file))
        column, _, values = condition.partition(" = ")
        rows = [row for row in rows if not column or row[column] in values.split(" / ")]
        rows = [[row[column] for column in columns] for row in rows]
        return f"{match[0].splitlines()[0]}\n{table(columns, rows)}"

    return re.sub(r"<!-- (\S+\.csv): ([^;]+?)(?:; (.+?))? -->\n(?:\|.*\n)*", made, page)


def figure_path(text):
    """The Path of a figure to be written, as a type of argparse."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: give a .png, .pdf or .svg in an existing folder")
    return path


def read_command_line(argv):
    """Each experiment is a command with its own options."""
    parser = argparse.ArgumentParser(prog="paper.py", description=__doc__.split(",")[0])
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, (title, _) in EXPERIMENTS.items():
        option = commands.add_parser(name, help=title, description=title).add_argument
        if name == "budget":
            option("--speed_up", nargs="+", type=float, default=[1, 2, 4], help="of the explorer")
            option("--rho", type=float, default=0.9, help="correlation of proxy and reward")
            text = "of 24 candidates, in evaluations of the network; default: 24 x 6 times x 5"
            option("--training", type=float, default=720, help=text)
            option("--output", type=figure_path, default="budget.png", help="the figure")
            continue
        option("--models", nargs="+", default=list(models.MODELS), choices=models.MODELS)
        if name == "fidelity":
            option("--prompts", type=int, default=16, help="1 to 72; default: 16")
            option("--precision", choices=train.quant.PRECISIONS, help="only this one")
            option("--explore_steps", type=int, help="with --precision; default: 6")
        elif name != "agreement":
            option("--seeds", nargs="+", type=int, default=[0, 1, 2])
    control = commands.add_parser("control", help="one run of train.py under a control")
    control.add_argument("name", help=f"{', '.join(CONTROLS)}, or several joined by +")
    control.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py")
    return parser.parse_args(argv)


def main(argv):
    started, given = time.perf_counter(), read_command_line(argv)
    if given.experiment == "control":
        sys.exit(train_under(given.name, given.options))
    columns, rows = EXPERIMENTS[given.experiment][1](given)
    print(table(columns, rows))
    if given.experiment == "budget" or getattr(given, "precision", None):
        return
    seconds, command = time.perf_counter() - started, shlex.join(argv)
    cpu = subprocess.getoutput("grep -sm1 'model name' /proc/cpuinfo").partition(": ")[2]
    made = f"paper.py {command}; commit {COMMIT}; {cpu}, {os.cpu_count()} cores; {seconds:.0f} s"
    columns, rows = [*columns, "made by"], [[*row, made] for row in rows]
    path = DATA / f"{given.experiment}.csv"
    if path.exists():  # rows of other models stay
        with open(path, newline="") as file:
            first, *before = csv.reader(file)
        made_now = {row[columns.index("model")] for row in rows}
        others = [row for row in before if not made_now & {*row[first.index("model")].split(" + ")}]
        require(first == columns or not others, f"{path}: has other columns; make all models")
        rows = others + rows
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    with written_whole(RESULTS) as temporary:
        temporary.write_text(fill(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code("paper.py", lambda: main(sys.argv[1:])))
