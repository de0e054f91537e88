"""The paper's experiments on the tiny models, one command each; --help lists them.

    python experiments/paper.py pool           # Table 3
    python experiments/paper.py fidelity       # Table 8: does NVFP4 rank as BF16 does?
    python experiments/paper.py fidelity --model sana --precision fp8 --prompts 6  # half a minute
    python experiments/paper.py control negated --model sana  # one run of train.py under a control

Each command prints its section of docs/results.md and rewrites it there; the last two only print.
Runs of train.py lie in runs/paper/COMMIT, and every command reuses the complete runs of its commit.
After a change that is not committed, delete that folder.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path

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
RESULTS = PROJECT / "docs" / "results.md"
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


def other_text(run, samples, *arguments):
    """An update in which the samples of each prompt have the text of another prompt."""
    texts = [candidates.text for candidates in samples]
    pairs = zip(samples, texts[1:] + texts[:1])
    samples = [dataclasses.replace(candidates, text=text) for candidates, text in pairs]
    return update(run, samples, *arguments)


def old_fixed(transformer, follower, eta):
    """eta = 1 for the old policy: the base model draws all candidates."""
    follow(transformer, follower, 1.0 if follower == "old" else eta)


def every_layer(model, precision, skip=(), min_dim=0):
    """A copy of the transformer in which no linear layer stays in BF16."""
    return make_copy(model, precision)


def smooth(images, prompts, metadata):
    """A reward that sees texture: minus the mean distance of each pixel from the mean of its 3x3
    neighbourhood, (n,). It falls with fine noise, such as quantization may leave in an image."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return -(images - blurred).abs().mean(dim=(1, 2, 3))


CONTROLS = {  # name -> (module, the name of its function that is replaced, what replaces it)
    "negated": (train, "group_advantages", negated),
    "weights_one": (train, "group_advantages", weights_one),
    "advantage_weighted": (train, "nft_loss", advantage_weighted),
    "other_text": (train, "update", other_text),
    "old_fixed": (models, "follow", old_fixed),
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

    def gain_at(self, share):
        return self.reward_at(share) - self.rewards[0]

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
    settings = dict(cwd=PROJECT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    command = [sys.executable, *program, *options]
    done = subprocess.run(command, capture_output=True, text=True, **settings)
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


def provenance(started):
    """What docs/results.md says about how something was made that was started at this time."""
    cpu = subprocess.getoutput("grep -sm1 'model name' /proc/cpuinfo").partition(": ")[2]
    machine = f"{cpu or 'unknown CPU'}, {os.cpu_count()} cores"
    return dict(commit=COMMIT, machine=machine, seconds=time.perf_counter() - started)


def show(values, form=".3f"):
    """Mean and, if the values differ, its standard error. Infinity stands for a run that does not
    get there."""
    missing = sum(not math.isfinite(value) for value in values)
    if missing:
        return f"not reached by {missing} of {len(values)}"
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" + (f" ± {error:{form.lstrip('+')}}" if len(set(values)) > 1 else "")


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


OWN = {  # columns -> (format, function of a Run)
    "reward before": (".4f", lambda run: run.rewards[0]),
    **{f"gain at {s:.0%}": (".4f", lambda run, s=s: run.gain_at(s)) for s in (0.25, 0.5, 0.75, 1)},
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


def compare(given, variants, paper=None):
    """The variants' table, with the leads of the first one. paper: the paper's values."""
    runs, rows = run_variants(given, variants), []
    groups = [[model] for model in given.models]
    if len(groups) > 1:
        groups.append(given.models)
    for group, (i, variant) in product(groups, enumerate(variants)):
        pairs = [pair for m in group for pair in zip(runs[m, variants[0]], runs[m, variant])]
        own = [show([f(run) for _, run in pairs], form) for form, f in OWN.values()]
        leads = [show([f(*pair) for pair in pairs], form) for form, f in PAIRED.values()]
        own = own if len(group) == 1 else [""] * len(own)
        leads = leads if i else [""] * len(leads)
        paper_cell = [paper[i]] if paper else []
        rows.append([" + ".join(group), f"`{variant}`", *own, *leads, *paper_cell])
    columns = ["model", "variant", *OWN, *PAIRED, *(["paper"] if paper else [])]
    text = f"Mean ± standard error over seeds {given.seeds}; the leads are of the first variant."
    return f"{text}\n\n{table(columns, rows)}"


# ---------------------------------------------------------------------------------------------
# Experiments that compare runs. Each returns the text of its section.

VARIANTS = {  # experiment -> variants; "" is the default
    "algorithms": ["", *(f"--algorithm {name}" for name in list(train.ALGORITHMS)[1:])],
    "explore_steps": ["", "--explore_steps 2", "--explore_steps 4", "--explore_steps 8"],
    "pool": ["", "--algorithm diffusionnft", "--pool 48", "--pool 72"],
    "kept": ["", "--keep 48", "--keep 96"],
    "selection": ["", "--select random_subset"],
    "controls": ["", "--select random_subset"]
    + [f"control {name}" for name in ("negated", "other_text", "weights_one", "old_fixed")],
    "long_runs": [f"--steps 80 --algorithm {name}" for name in list(train.ALGORITHMS)[:3]],
}
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
    return lambda given: compare(given, VARIANTS[name], PAPER.get(name))


def algorithms(given):
    text = compare(given, VARIANTS["algorithms"])
    figure = Figure(figsize=(4 * len(given.models), 3.5))
    axes = dict(zip(given.models, figure.subplots(1, len(given.models), squeeze=False)[0]))
    for (model, variant), of_seeds in run_variants(given, VARIANTS["algorithms"]).items():
        means, errors = zip(*map(mean_and_error, zip(*(run.rewards for run in of_seeds))))
        name = variant.removeprefix("--algorithm ") or "sol_rl"
        style = dict(label=name, color=COLOURS[name], capsize=2)
        axes[model].errorbar(of_seeds[0].steps, means, errors, **style)
        axes[model].set(title=f"tiny {model}", xlabel="updates", ylabel="held-out reward")
        axes[model].legend(title=f"mean, n = {len(of_seeds)} seeds")
    figure.tight_layout()
    figure.savefig(RESULTS.with_name("algorithms.png"), dpi=110)
    return f"{text}\n![the four algorithms](algorithms.png)\n"


def evaluations(config):
    """(evaluations of the model to draw, and to train on, one prompt's candidates in an update)."""
    pool, stages = train.ALGORITHMS[config.algorithm](config)
    counts = network_evaluations(pool, stages, train.num_timesteps(config))
    return sum(counts.values()) - counts["train"], counts["train"]


def costs_of_update(model):
    """Evaluations of the model in an update by (24 of 24, sol_rl at no speed-up, sol_rl with the
    paper's speed-up of the rollout)."""
    drawing = {}
    for algorithm in ("diffusionnft", "sol_rl", "naive_scaling"):
        argv = [f"--model={model}", f"--algorithm={algorithm}", "--device=cpu"]
        drawing[algorithm], training = evaluations(train.parse_options(argv))
    modelled = drawing["naive_scaling"] / SPEED_UPS[model]
    return [n + training for n in (drawing["diffusionnft"], drawing["sol_rl"], modelled)]


def milestones(given):
    runs = run_variants(given, ["", "--algorithm diffusionnft"])
    columns = ["model", "share of the gain", "updates: 24 of 24", "updates: sol_rl"]
    columns += ["cost ratio, FP4 at no speed-up", "cost ratio, modelled", "paper's ratio"]
    rows = []
    for model in given.models:
        base_cost, *costs = costs_of_update(model)
        bases, others = runs[model, "--algorithm diffusionnft"], runs[model, ""]
        for share, paper in PAPER_RATIOS[model].items():
            targets = [(1 - share) * run.rewards[0] + share * run.rewards[-1] for run in bases]
            updates = [list(map(Run.reach, part, targets)) for part in (bases, others)]
            # A run that does not get there has no ratio.
            ratios = [b / n if 0 < n < math.inf else math.inf for b, n in zip(*updates)]
            cells = [show(numbers, ".1f") for numbers in updates]
            cells += [show([r * base_cost / cost for r in ratios], ".2f") for cost in costs]
            rows.append([model, f"{share:.0%}", *cells, f"{paper}"])
    text = (
        f"Updates to reach shares of the final gain of diffusionnft (24 of 24) with the same seed; "
        f"mean ± standard error over seeds {given.seeds}. Cost ratio: cost of 24 of 24 / cost of "
        f"sol_rl, seed by seed, in evaluations of the model; the paper's is of GPU-hours. The "
        f"**modelled** ratio is not measured: it assumes that the rollout of sol_rl is faster than "
        f"that of naive_scaling by the paper's factor ({SPEED_UPS}).\n\n"
    )
    return text + table(columns, rows)


def naive_fp4(given):
    text = "In the paper naive_quant starts lower, dips, peaks below BF16 and falls back.\n"
    for setting in NAIVE_FP4:
        pair = [
            f"{setting} --algorithm {name}".strip() for name in ("naive_scaling", "naive_quant")
        ]
        text += f"\n### {setting or 'the default'}\n\n{compare(given, pair)}"
    return text


# ---------------------------------------------------------------------------------------------
# Rank fidelity of the base models, without runs

POOL, KEEP, EXPLORE_STEPS, ROLLOUT_STEPS = 96, 12, 6, 10  # KEEP best and KEEP worst are compared
COLUMNS = "kendall_tau spearman_rho top_match bottom_match top_rank bottom_rank".split()
# name -> (precision, steps, micro-batch)
PROXIES = {name: (name, EXPLORE_STEPS, POOL) for name in train.quant.PRECISIONS}
PROXIES |= {f"nvfp4, {n} steps": ("nvfp4", n, POOL) for n in (2, 4, 8, 10)}
PROXIES |= {"nvfp4, micro-batches of 16": ("nvfp4", EXPLORE_STEPS, 16)}
PROXIES |= {"nvfp4, every layer": ("nvfp4", EXPLORE_STEPS, POOL)}
PAPER_RANKS = [
    ["paper", "CLIPScore", "0.752", "0.900", "0.922", "", "", ""],
    ["paper", "HPSv2; ranks of SANA", "0.827", "0.943", "0.939", "", "8.7", "87.4"],
    ["paper", "HPSv2, FLUX.1", "", "", "", "", "8.4", "87.4"],
]


def pool_rewards(model, reward, prompts, transformer, steps, micro_batch):
    """The rewards of each prompt's pool, (POOL,), always from the same noise."""
    texts, pools = model.encode(prompts), []
    for i, prompt in enumerate(prompts):
        seeds, rewards = candidate_seeds(0, 0, i, POOL), []
        for start in range(0, POOL, micro_batch):
            batch = seeds[start : start + micro_batch]
            _, images = draw(model, transformer, texts.take(i), batch, steps)
            rewards.append(reward(images, [prompt] * len(batch)))
        pools.append(torch.cat(rewards))
    return pools


def fidelity(given):
    """How PROXIES, or --precision and BF16, rank the pools of the base models against BF16."""
    proxies, steps = PROXIES, given.explore_steps or EXPLORE_STEPS
    if given.precision:
        names = (given.precision, "bf16")
        proxies = {f"{name}, {steps} steps": (name, steps, POOL) for name in names}
    prompts, rows = world.HELD_OUT_PROMPTS[: given.prompts], []
    reward = build_reward("clipscore", clip=world.TINY / "clip")
    for name in given.models:
        model = models.load(name)
        truths = pool_rewards(model, reward, prompts, model.transformer, ROLLOUT_STEPS, POOL)
        for proxy, (precision, steps, micro_batch) in tqdm(proxies.items(), desc=name):
            skip = () if proxy.endswith("every layer") else model.keep_bf16
            explorer, _ = make_copy(model, precision, skip)
            pools = pool_rewards(model, reward, prompts, explorer, steps, micro_batch)
            ranks = [train.selection.rank_fidelity(*pair, KEEP) for pair in zip(pools, truths)]
            rows.append([name, proxy, *(show([rank[c] for rank in ranks]) for c in COLUMNS)])
    text = (
        f"Pools of {POOL} seeds of {given.prompts} prompts, drawn by the base models in "
        f"{EXPLORE_STEPS} steps unless the row names another number, ranked against BF16 at "
        f"{ROLLOUT_STEPS} steps; mean ± standard error over prompts. Match: the share of the "
        f"proxy's best (worst) {KEEP} that are truly among them. Rank: their mean true rank, 1 = "
        f"best; perfect 6.5 / 90.5, no information 48.5 / 48.5.\n\n"
    )
    return text + table(["model", "proxy", *COLUMNS], rows + PAPER_RANKS)


# ---------------------------------------------------------------------------------------------
# docs/results.md

EXPERIMENTS = {  # name -> (title, function of the command line)
    "algorithms": ("The four algorithms", algorithms),
    "milestones": ("Milestones", milestones),
    "explore_steps": ("Steps of exploring (Table 2)", comparison("explore_steps")),
    "pool": ("Size of the pool (Table 3)", comparison("pool")),
    "kept": ("Candidates trained on, at equal updates", comparison("kept")),
    "selection": ("Best and worst, or random, at equal cost", comparison("selection")),
    "controls": ("Controls: what the gain rests on", comparison("controls")),
    "naive_fp4": ("When does training on NVFP4 samples fall behind?", naive_fp4),
    "long_runs": ("80 updates: do NVFP4 samples fall behind?", comparison("long_runs")),
    "fidelity": ("Does NVFP4 rank as BF16 does? (Table 8)", fidelity),
}


def replace_section(page, name, text):
    """The page with this text as its section `name`, at its end if it has none of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    return before + begin + text + end + rest.partition(end)[2]


def read_command_line(argv):
    """Each experiment is a command with its own options."""
    parser = argparse.ArgumentParser(prog="paper.py", description=__doc__.split(",")[0])
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, (title, _) in EXPERIMENTS.items():
        command = commands.add_parser(name, help=title, description=title, allow_abbrev=False)
        known = dict(nargs="+", default=list(models.MODELS), choices=models.MODELS)
        command.add_argument("--models", "--model", **known, help="default: all")
        if name != "fidelity":
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            continue
        command.add_argument("--prompts", type=int, default=16, help="1 to 72; default: 16")
        command.add_argument("--precision", choices=train.quant.PRECISIONS, help="only this one")
        command.add_argument("--explore_steps", type=int, help="with --precision; default: 6")
    control = commands.add_parser("control", help="one run of train.py under a control")
    control.add_argument("name", help=f"{', '.join(CONTROLS)}, or several joined by +")
    control.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py")
    given = parser.parse_args(argv)
    if not 1 <= getattr(given, "prompts", 1) <= 72:
        parser.error(f"--prompts {given.prompts}: must be from 1 to 72")
    steps = getattr(given, "explore_steps", None)
    if steps is not None and (steps < 1 or not given.precision):
        parser.error(f"--explore_steps {steps}: must be at least 1, and needs --precision")
    return given


def main(argv):
    started, given = time.perf_counter(), read_command_line(argv)
    if given.experiment == "control":
        sys.exit(train_under(given.name, given.options))
    title, experiment = EXPERIMENTS[given.experiment]
    text, command = experiment(given), shlex.join(["python", "experiments/paper.py", *argv])
    made = "(commit {commit}; {machine}; {seconds:.0f} s)".format_map(provenance(started))
    text = f"## {title}\n\n`{command}` {made}\n\n{text}"
    print(text)
    if getattr(given, "precision", None):
        return
    page = RESULTS.read_text() if RESULTS.exists() else ""
    with written_whole(RESULTS) as temporary:
        temporary.write_text(replace_section(page, given.experiment, text))


if __name__ == "__main__":
    sys.exit(exit_code("paper.py", lambda: main(sys.argv[1:])))
