"""The paper's experiments on the tiny models, one command each.

    python experiments/paper.py algorithms     # the four algorithms: reward, accuracy, a figure
    python experiments/paper.py milestones     # updates and cost to reach 25 to 100% of a gain
    python experiments/paper.py explore_steps  # Table 2
    python experiments/paper.py pool           # Table 3
    python experiments/paper.py kept           # how many candidates of 96 are trained on
    python experiments/paper.py selection      # best and worst, or random, at equal cost
    python experiments/paper.py controls       # what the gain rests on
    python experiments/paper.py naive_fp4      # when does training on NVFP4 samples fall behind?
    python experiments/paper.py long_runs      # the same in twice as many updates
    python experiments/paper.py fidelity       # does NVFP4 rank as BF16 does? (Table 8, a figure)
    python experiments/paper.py ladder         # the same for other precisions and steps
    python experiments/paper.py fidelity --model sana --precision fp8 --prompts 6  # half a minute

Each command prints its section of docs/results.md and rewrites it there; the last one only prints.
All but the last three compare runs of train.py. These lie in runs/paper, two are made at a time,
and a complete one is used by every command that needs it: delete the folder after a change of code.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

import train
from reward import build_reward
from rollout import candidate_seeds, draw_and_score, make_copy
from support import models, world
from support.errors import InputError, Parser, exit_code, require, written_whole
from support.report import COLOURS, mean_and_error, plt

PROJECT = Path(__file__).parent.parent
RUNS, RESULTS = PROJECT / "runs" / "paper", PROJECT / "docs" / "results.md"
# Asked when the program starts, because the project may change while runs are made.
_DESCRIBE = ["git", "describe", "--always", "--dirty"]
COMMIT = subprocess.run(_DESCRIBE, cwd=PROJECT, capture_output=True, text=True).stdout.strip()

# ---------------------------------------------------------------------------------------------
# Runs of train.py


class Run:
    """A complete run: its options, its evaluations, and where and how long it ran."""

    def __init__(self, folder):
        self.folder = folder
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text())["config"])
        self.made = json.loads((folder / "made.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.evaluations = [line for line in lines if "eval/reward" in line]
        self.steps, self.rewards = self.values("step"), self.values("eval/reward")
        self.gain = self.rewards[-1] - self.rewards[0]
        self.reward_at_half = self.reward_at(0.5)

    def values(self, metric):
        return [evaluation[metric] for evaluation in self.evaluations]

    def reward_at(self, share):
        """The reward of the evaluation that is nearest to this share of the updates."""
        step = min(self.steps, key=lambda step: abs(step - share * self.config.steps))
        return self.rewards[self.steps.index(step)]

    def reach(self, reward):
        return first_reach(self.steps, self.rewards, reward)


def first_reach(steps, values, target):
    """The number of updates after which `values` first reach the target, interpolated linearly
    between evaluations; infinity if they never do."""
    if values[0] >= target:
        return steps[0]
    for (step, value), (next_step, next_value) in pairwise(zip(steps, values)):
        if next_value >= target:
            return step + (target - value) / (next_value - value) * (next_step - step)
    return math.inf


def folder_name(options):
    """The name of a run's folder, which follows from its options in any order."""
    name = ",".join(f"{name}={options[name]}" for name in sorted(options))
    return name.replace("/", "|")  # of a reward's file


def finish(options):
    """The Run with these options, made now if it is not complete. "control" is one of
    experiments/controls.py; all others are options of train.py."""
    folder = RUNS / folder_name(options)
    if (folder / "made.json").exists():
        return Run(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, PROJECT / "train.py"]
    if "control" in options:
        command = [sys.executable, PROJECT / "experiments/controls.py", options["control"], "--"]
    command += [f"--{name}={value}" for name, value in options.items() if name != "control"]
    command += [f"--output_dir={folder}", "--checkpoint_every=999999", "--device=cpu"]
    started, log = time.perf_counter(), RUNS / f"{folder.name}.log"
    with open(log, "w") as file:
        one_thread = os.environ | dict(OMP_NUM_THREADS="1")
        done = subprocess.run(command, stdout=file, stderr=file, env=one_thread, cwd=PROJECT)
    if done.returncode:
        raise InputError(f"a run failed: {log.read_text().strip().split(chr(10))[-1]} ({log})")
    (folder / "made.json").write_text(json.dumps(provenance(started)))
    return Run(folder)


def run_variants(given, variants):
    """{(model, variant): its Runs, one for each seed}. given: the command line; variants: {name:
    options}, without those that have train.py's defaults, so that experiments share folders."""
    refuse_fixed(given, variants.values())
    options = {
        (model, name): [dict(model=model, seed=s) | given.options | variant for s in given.seeds]
        for model in given.models
        for name, variant in variants.items()
    }
    flat = [of_run for of_seeds in options.values() for of_run in of_seeds]
    with ThreadPoolExecutor(2) as pool:
        runs = iter(list(tqdm(pool.map(finish, flat), total=len(flat))))
    return {key: [next(runs) for _ in of_seeds] for key, of_seeds in options.items()}


def refuse_fixed(given, variants):
    """Raise InputError if --options has one that a variant sets, or that leaves no accuracy."""
    fixed = {"model", "seed", "pretrained", "resolution", "prompts", "eval_prompts"}
    fixed |= {name for variant in variants for name in variant}
    for name in sorted(fixed & given.options.keys()):
        raise InputError(f"--options {name}: cannot be chosen in this experiment")


def provenance(started):
    """What docs/results.md says of how something was made that was started at this time."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    machine = f"{[*cpus, platform.processor()][0]}, {os.cpu_count()} cores"
    return dict(commit=COMMIT, machine=machine, seconds=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------
# Tables


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
    "after": (".4f", lambda run: run.rewards[-1]),
    "gain": (".4f", lambda run: run.gain),
    "accuracy before": (".1%", lambda run: run.values("eval/accuracy")[0]),
    "accuracy after": (".1%", lambda run: run.values("eval/accuracy")[-1]),
    "clear before": (".1%", lambda run: run.values("eval/clear")[0]),
    "clear after": (".1%", lambda run: run.values("eval/clear")[-1]),
}
PAIRED = {  # columns -> (format, function of the reference's Run and a Run with the same seed)
    "lead at half": ("+.4f", lambda reference, run: reference.reward_at_half - run.reward_at_half),
    "lead at the end": ("+.4f", lambda reference, run: reference.rewards[-1] - run.rewards[-1]),
    "caught up after": (".0%", lambda r, run: r.reach(run.rewards[-1]) / run.steps[-1]),
}


def reading(given, reference):
    """How the tables of `compare` are read."""
    return (
        f"Mean ± standard error over seeds {given.seeds}; in rows of several models, over all "
        f"pairs of a model and a seed. The held-out prompts are always the same. The lead of "
        f"{reference} over a row, at half of the updates and at the end, is that of pairs of runs "
        f"with the same model and seed. Caught up: the share of the updates after which "
        f"{reference} first has the reward that the row has at the end. Accuracy: pictures of "
        f"held-out prompts that match their prompt in all five attributes. Clear: pictures whose "
        f"five attributes the classifier is sure of, whichever they are.\n\n"
    )


def compare(given, runs, reference, paper=None, own=OWN):
    """The table of what run_variants returns. paper: {variant: the paper's value}."""
    variants, rows = dict.fromkeys(variant for _, variant in runs), []
    groups = [[model] for model in given.models]
    if len(groups) > 1:
        groups.append(given.models)  # the pairs of all models together
    for group in groups:
        for variant in variants:
            pairs = [pair for m in group for pair in zip(runs[m, reference], runs[m, variant])]
            cells, leads = [""] * len(own), [""] * len(PAIRED)
            if len(group) == 1:
                cells = [show([f(run) for _, run in pairs], form) for form, f in own.values()]
            if variant != reference:
                leads = [show([f(*pair) for pair in pairs], form) for form, f in PAIRED.values()]
            if len(group) == 1 or variant != reference:
                paper_cell = [paper[variant]] if paper else []
                rows.append([" + ".join(group), variant, *cells, *leads, *paper_cell])
    return table(["model", "variant", *own, *PAIRED] + (["paper"] if paper else []), rows)


# ---------------------------------------------------------------------------------------------
# Experiments that compare runs. Each returns (text, runs).

VARIANTS = {  # experiment -> {variant: options}; all are compared with the first, the default
    "algorithms": {"sol_rl": {}}
    | {name: dict(algorithm=name) for name in ("naive_scaling", "naive_quant", "diffusionnft")},
    "explore_steps": {"6 steps": {}} | {f"{n} steps": dict(explore_steps=n) for n in (2, 4, 8)},
    "pool": {"24 of 96": {}, "24 of 24": dict(algorithm="diffusionnft")}
    | {f"24 of {n}": dict(pool=n) for n in (48, 72)},
    "kept": {"24 of 96": {}, "48 of 96": dict(keep=48), "96 of 96": dict(keep=96)},
    "selection": {"best_worst": {}, "random_subset": dict(select="random_subset")},
    "controls": {
        "sol_rl": {},
        "advantages negated": dict(control="negated"),
        "another prompt's text in the update": dict(control="other_text"),
        "all weights 1": dict(control="weights_one"),
        "random_subset": dict(select="random_subset"),
        "eta = 1: the old policy never follows": dict(control="old_fixed"),
    },
    "long_runs": {"sol_rl": dict(steps=80)}
    | {name: dict(steps=80, algorithm=name) for name in ("naive_scaling", "naive_quant")},
}
PAPER = {  # the paper's values
    "explore_steps": dict(zip(VARIANTS["explore_steps"], ("0.3686", "0.3587", "0.3650", "0.3659"))),
    "pool": dict(zip(VARIANTS["pool"], ("0.3686", "0.3569", "0.3622", "0.3663"))),
    "kept": dict(zip(VARIANTS["kept"], ("0.908 (base 0.758)", "0.902", "0.893"))),
}
NAIVE_QUANT = "In the paper naive_quant starts lower, dips, peaks below BF16 and falls back.\n"
NAIVE_FP4 = {  # settings in which naive_quant is compared with naive_scaling
    "the default": {},
    "80 updates": dict(steps=80),
    "every layer quantized": dict(control="every_layer"),
    "learning rate 1e-2": dict(learning_rate=1e-2),
    "all weights 1": dict(control="weights_one"),
    "advantage-weighted regression": dict(control="advantage_weighted"),
    "advantage-weighted, every layer": dict(control="advantage_weighted+every_layer"),
    "6 sampling steps": dict(rollout_steps=6),
    "a reward that sees texture": dict(reward="clipscore,experiments/smooth.py:smooth:20"),
}
SPEED_UPS = {"sana": 1.41, "flux": 2.33, "sd3": 2.41}  # of the rollout, measured in the paper
PAPER_RATIOS = {  # the baseline's GPU-hours / Sol-RL's, to reach these shares of the gain
    "sana": {0.25: 1.6, 0.5: 1.9, 0.75: 2.2, 1.0: 2.42},
    "flux": {0.25: 1.6, 0.5: 1.9, 0.75: 2.3, 1.0: 3.00},
    "sd3": {0.25: 2.1, 0.5: 2.8, 0.75: 3.7, 1.0: 4.64},
}


def comparison(name, given):
    runs, reference = run_variants(given, VARIANTS[name]), list(VARIANTS[name])[0]
    return reading(given, reference) + compare(given, runs, reference, PAPER.get(name)), runs


def algorithms(given):
    text, runs = comparison("algorithms", given)
    size = (4 * len(given.models), 7)
    figure, axes = plt.subplots(2, len(given.models), figsize=size, squeeze=False, sharex="col")
    for column, model in zip(axes.T, given.models):
        for axis, metric in zip(column, ("eval/reward", "eval/accuracy")):
            for algorithm in VARIANTS["algorithms"]:
                curves = zip(*(run.values(metric) for run in runs[model, algorithm]))
                means, errors = zip(*map(mean_and_error, curves))
                steps = runs[model, algorithm][0].steps
                colour = COLOURS[algorithm]
                axis.errorbar(steps, means, errors, label=algorithm, color=colour, capsize=2)
        column[0].set_title(f"tiny {model}")
        column[1].set_xlabel("updates")
    axes[0, 0].set_ylabel("held-out reward")
    axes[1, 0].set_ylabel("share of pictures that match their prompt")
    axes[0, 0].legend()
    figure.suptitle(f"mean and standard error over n = {len(given.seeds)} seeds")
    save(figure, "algorithms.png")
    return text + f"\n{NAIVE_QUANT}\n![the four algorithms](algorithms.png)\n", runs


def evaluations(config):
    """(evaluations of the model to draw, and to train on, one prompt's candidates in an update).
    Training on a sample at a time takes 5: forward passes by the policy, the old policy and the
    base model, and a backward pass, which counts as two."""
    candidates, stages = train.ALGORITHMS[config.algorithm](config)
    rollout = 0
    for stage in stages:
        rollout += candidates * stage.steps
        candidates = stage.num_kept or candidates
    return rollout, 5 * candidates * train.num_timesteps(config)


def costs_of_update(runs, model):
    """{what is counted: thousands of evaluations of the model in an update}."""
    config = runs[model, "sol_rl"][0].config
    rollout, training = evaluations(config)
    scaling, _ = evaluations(SimpleNamespace(**vars(config) | dict(algorithm="naive_scaling")))
    costs = {
        "24 of 24": sum(evaluations(runs[model, "diffusionnft"][0].config)),
        "sol_rl, FP4 at no speed-up": rollout + training,
        "sol_rl, modelled": scaling / SPEED_UPS[model] + training,
    }
    return {name: cost * config.prompts_per_step / 1000 for name, cost in costs.items()}


def milestones(given):
    variants = {"sol_rl": {}, "diffusionnft": dict(algorithm="diffusionnft")}
    runs, rows = run_variants(given, variants), []
    for model in given.models:
        bases, of_sol_rl = runs[model, "diffusionnft"], runs[model, "sol_rl"]
        (name, base_cost), *costs = costs_of_update(runs, model).items()
        for share, paper in PAPER_RATIOS[model].items():
            targets = [(1 - share) * base.rewards[0] + share * base.rewards[-1] for base in bases]
            base_updates = [run.reach(target) for run, target in zip(bases, targets)]
            updates = [run.reach(target) for run, target in zip(of_sol_rl, targets)]
            base_costs = [n * base_cost for n in base_updates]
            cells = [show(values, ".1f") for values in (base_updates, updates, base_costs)]
            for _, cost in costs:
                totals = [n * cost for n in updates]
                pairs = zip(base_costs, totals)
                ratios = [b / c if 0 < c < math.inf else math.nan for b, c in pairs]
                cells.append(f"{show(totals, '.1f')}; {show(ratios, '.2f')}")
            rows.append([model, f"{share:.0%}", *cells, f"{paper}"])
    columns = ["model", "share of the gain", f"updates: {name}", "updates: sol_rl", f"cost: {name}"]
    columns += [*(f"cost: {name}; ratio" for name, _ in costs), "paper's ratio"]
    speed_ups = ", ".join(f"{model} {SPEED_UPS[model]}" for model in given.models)
    text = (
        f"Updates and cost to reach shares of the final gain that diffusionnft (24 of 24) has with "
        f"the same seed; mean ± standard error over seeds {given.seeds}, interpolated linearly "
        f"between evaluations. Cost: thousands of BF16 evaluations of the model, a backward pass "
        f"counted as two. Ratio: cost of 24 of 24 / cost of sol_rl, seed by seed; the paper's are "
        f"of GPU-hours. The **modelled** column is not measured: in it the whole rollout of sol_rl "
        f"is taken to be as many times faster than naive_scaling's as the paper measured it, in "
        f"seconds per iteration: {speed_ups}.\n\n"
    )
    return text + table(columns, rows), runs


def naive_fp4(given):
    def gain_at(share):
        return ".4f", lambda run: run.reward_at(share) - run.rewards[0]

    own = {f"gain at {share:.0%}": gain_at(share) for share in (0.25, 0.5, 0.75, 1)}
    own["highest gain"] = ".4f", lambda run: max(run.rewards) - run.rewards[0]
    own |= {name: OWN[name] for name in ("accuracy before", "accuracy after", "clear after")}
    text, all_runs = reading(given, "naive_scaling") + NAIVE_QUANT, {}
    text += "Gains are those at shares of the updates; the highest is that of all evaluations.\n"
    refuse_fixed(given, NAIVE_FP4.values())  # of all settings, before the first run
    for setting, options in NAIVE_FP4.items():
        pair = {n: options | dict(algorithm=n) for n in ("naive_scaling", "naive_quant")}
        if options.get("control") == "every_layer":  # which BF16 copies do not have
            del pair["naive_scaling"]["control"]
        runs = run_variants(given, pair)
        text += f"\n### {setting}\n\n{compare(given, runs, 'naive_scaling', own=own)}"
        all_runs |= {(setting, key): of_seeds for key, of_seeds in runs.items()}
    return text, all_runs


# ---------------------------------------------------------------------------------------------
# Rank fidelity of the base models, without runs

POOL, KEEP, ROLLOUT_STEPS = 96, 12, 10  # KEEP best and KEEP worst are compared
COLUMNS = "kendall_tau spearman_rho top_match bottom_match top_rank bottom_rank".split()
EVERY_LAYER = "nvfp4, every layer"
PROXIES = {  # name -> (precision, steps, micro-batch)
    "nvfp4": ("nvfp4", 6, POOL),
    "nvfp4, micro-batches of 16": ("nvfp4", 6, 16),
    "nvfp4, 10 steps": ("nvfp4", 10, POOL),
    "bf16": ("bf16", 6, POOL),
}
LADDER = {name: (name, 6, POOL) for name in ("fp8", "nvfp4_4over6", "nvfp4_row")}
LADDER |= {f"nvfp4, {n} steps": ("nvfp4", n, POOL) for n in (2, 4, 8)}
LADDER |= {EVERY_LAYER: ("nvfp4", 6, POOL)}
PAPER_RANKS = [
    ["paper", "CLIPScore", "0.752", "0.900", "0.922", "", "", ""],
    ["paper", "HPSv2; ranks of SANA", "0.827", "0.943", "0.939", "", "8.7", "87.4"],
    ["paper", "HPSv2, FLUX.1", "", "", "", "", "8.4", "87.4"],
]


def draw_pools(model, reward, prompts, transformer, steps, micro_batch=POOL):
    """[(latents, rewards) of each prompt's pool], always from the same noise."""
    texts, pools = model.encode(prompts), []
    for i, prompt in enumerate(prompts):

        def score(seeds, latents, images):
            return {"reward": reward(images, [prompt] * len(seeds))}

        seeds, text = candidate_seeds(0, 0, i, POOL), texts.take(i)
        latents, scores = draw_and_score(model, transformer, text, seeds, steps, micro_batch, score)
        pools.append((latents, scores["reward"]))
    return pools


def ranking(proxies, given):
    """How proxies, as in PROXIES, rank the pools of the base models against BF16."""
    prompts, rows, examples = world.HELD_OUT_PROMPTS[: given.prompts], [], []
    reward = build_reward("clipscore", clip=world.TINY / "clip")
    for name in given.models:
        model = models.load(name)
        truths = draw_pools(model, reward, prompts, model.transformer, ROLLOUT_STEPS)
        for proxy, (precision, steps, micro_batch) in tqdm(proxies.items(), desc=name):
            skip = () if proxy == EVERY_LAYER else model.keep_bf16
            explorer, _ = make_copy(model, precision, skip)
            pools = draw_pools(model, reward, prompts, explorer, steps, micro_batch)
            ranks = [
                train.selection.rank_fidelity(rewards, true_rewards, KEEP)
                for (_, rewards), (_, true_rewards) in zip(pools, truths)
            ]
            rows.append([name, proxy, *(show([rank[c] for rank in ranks]) for c in COLUMNS)])
            if proxy == "nvfp4":
                kept = train.selection.best_worst(pools[0][1], 8)
                for label, (latents, rewards) in (("NVFP4", pools[0]), ("BF16", truths[0])):
                    images = model.decode(latents[kept])
                    examples.append((f"{name}, {label}", images, rewards[kept]))
    text = (
        f"Pools of {POOL} seeds of {given.prompts} prompts, drawn by the base models in 6 "
        f"steps where the row names no other number, ranked against BF16 at {ROLLOUT_STEPS} steps; "
        f"mean ± standard error over prompts. Match: the share of the proxy's best (worst) {KEEP} "
        f"that are truly among them. Rank: the mean true rank, 1 = best, of the proxy's best "
        f"(worst) {KEEP}; perfect 6.5 / 90.5, no information 48.5 / 48.5.\n\n"
    )
    text += table(["model", "proxy", *COLUMNS], rows + PAPER_RANKS)
    if examples:
        draw_candidates(prompts[0], examples)
        text += "\n![best and worst candidates, NVFP4 above BF16](candidates.png)\n"
    return text, {}


def draw_candidates(prompt, examples):
    """docs/candidates.png. examples: a row each, (label, images (8, 3, H, W), rewards (8,))."""
    figure, axes = plt.subplots(len(examples), 8, figsize=(9, 1.3 * len(examples)))
    for row, (label, images, rewards) in zip(axes, examples):
        for axis, image, reward in zip(row, images, rewards):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_title(f"{reward:.2f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8)
    figure.suptitle(f"{prompt}: best 4 and worst 4 by their NVFP4 rewards", fontsize=10)
    save(figure, "candidates.png")


def save(figure, name):
    figure.tight_layout()
    figure.savefig(RESULTS.with_name(name), dpi=110)


# ---------------------------------------------------------------------------------------------
# docs/results.md

EXPERIMENTS = {  # name -> (title, function of the command line)
    "algorithms": ("The four algorithms", algorithms),
    "milestones": ("Milestones", milestones),
    "explore_steps": ("Steps of exploring (Table 2)", partial(comparison, "explore_steps")),
    "pool": ("Size of the pool (Table 3); 24 of 24 is diffusionnft", partial(comparison, "pool")),
    "kept": ("Candidates trained on, at equal updates", partial(comparison, "kept")),
    "selection": ("Best and worst, or random, at equal cost", partial(comparison, "selection")),
    "controls": ("Controls: what the gain rests on", partial(comparison, "controls")),
    "naive_fp4": ("When does training on NVFP4 samples fall behind?", naive_fp4),
    "long_runs": ("80 updates: do NVFP4 samples fall behind?", partial(comparison, "long_runs")),
    "fidelity": ("Does NVFP4 rank as BF16 does? (Table 8)", partial(ranking, PROXIES)),
    "ladder": ("Ranking in other precisions and numbers of steps", partial(ranking, LADDER)),
}
RANKINGS = ("fidelity", "ladder")  # these compare no runs of train.py


def section(title, command, started, text, runs):
    """A section of docs/results.md: how it was made, then the experiment's text."""
    # By folder, because a run may serve several variants.
    made = {run.folder: run.made for of_seeds in runs.values() for run in of_seeds}.values()
    time_taken = f"{len(made)} runs, two at a time with one thread each, of " if made else ""
    made = made or [provenance(started)]
    time_taken += f"{sum(m['seconds'] for m in made) / len(made):.0f} s"
    commits, machines = (", ".join(sorted({m[key] for m in made})) for key in ("commit", "machine"))
    return f"## {title}\n\n`{command}` (commit {commits}; {machines}; {time_taken})\n\n{text}"


def replace_section(page, name, text):
    """The page with this text as its section `name`, at its end if it has none of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    return before + begin + text + end + rest.partition(end)[2]


def read_command_line(argv):
    """Each experiment is a command with its own options; an option of another one is refused."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, (title, _) in EXPERIMENTS.items():
        command = commands.add_parser(name, help=title, description=title, allow_abbrev=False)
        names = list(SPEED_UPS if name == "milestones" else models.MODELS)
        known = dict(nargs="+", default=names, choices=names)
        command.add_argument("--models", "--model", **known, help="default: all")
        if name in RANKINGS:
            command.add_argument("--prompts", type=int, default=16, help="how many; default: 16")
            continue
        command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs")
        options_help = "options of train.py for all runs, as in steps=20 learning_rate=3e-3"
        command.add_argument("--options", nargs="+", default=[], metavar="A=B", help=options_help)
    fidelity = commands.choices["fidelity"]
    precision_help = "rank in this precision and in BF16, and only print"
    fidelity.add_argument("--precision", choices=train.quant.PRECISIONS, help=precision_help)
    fidelity.add_argument("--explore_steps", type=int, help="with --precision; default: 6")
    given = parser.parse_args(argv)
    if given.experiment in RANKINGS:
        most, steps = len(world.HELD_OUT_PROMPTS), getattr(given, "explore_steps", None)
        require(1 <= given.prompts <= most, f"--prompts {given.prompts}: must be from 1 to {most}")
        if steps is not None:
            require(given.precision, f"--explore_steps {steps}: needs --precision")
            require(steps > 0, f"--explore_steps {steps}: must be at least 1")
        return given
    require(len(set(given.seeds)) == len(given.seeds), "--seeds: must all be different")
    for word in given.options:
        require("=" in word, f"--options {word}: must be NAME=VALUE")
    given.options = dict(word.split("=", 1) for word in given.options)
    return given


def main(argv):
    started, given = time.perf_counter(), read_command_line(argv)
    if given.experiment == "fidelity" and given.precision:
        steps, precisions = given.explore_steps or 6, (given.precision, "bf16")
        proxies = {f"{name}, {steps} steps": (name, steps, POOL) for name in precisions}
        print(ranking(proxies, given)[0])
        return
    command = shlex.join(["python", "experiments/paper.py", *argv])
    title, experiment = EXPERIMENTS[given.experiment]
    text = section(title, command, started, *experiment(given))
    page = RESULTS.read_text() if RESULTS.exists() else ""
    with written_whole(RESULTS) as temporary:
        temporary.write_text(replace_section(page, given.experiment, text))
    print(text)


if __name__ == "__main__":
    sys.exit(exit_code("paper.py", lambda: main(sys.argv[1:])))
