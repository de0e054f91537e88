"""Compare runs of train.py on the held-out prompts: reward and accuracy against updates and cost.

    python experiments/compare.py runs/A runs/B mine=runs/C    # writes compare.png

Runs that differ in the seed alone form a group; LABEL=RUN puts a run into the group LABEL. Cost is
of training alone, in evaluations of the network (a backward pass counts as two) and in seconds.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from matplotlib.figure import Figure

from experiments.paper import evaluations, figure_path, table
from support.errors import InputError, exit_code, one_line, require, written_whole
from support.report import COLOURS, mean_and_error

COSTS = {"updates": "updates", "evaluations": "thousands of network evaluations"}
COSTS |= {"seconds": "seconds"}
SCORES = ("held-out reward", "accuracy")  # the second only of the tiny models
# These options may differ in a group.
WITHIN = ("seed", "steps", "eval_every", "checkpoint_every", "output_dir", "resume", "report_to")


def read(name):
    """(label, options, {step: a number for each of COSTS and SCORES}) of a run."""
    label, _, folder = ("", "", name) if Path(name).exists() else name.rpartition("=")
    try:
        options = json.loads((Path(folder) / "config.json").read_text())["config"]
        cost = sum(evaluations(SimpleNamespace(**options))) * options["prompts_per_step"] / 1000
        seconds, points = 0.0, {}
        for line in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines()):
            seconds += sum(v for k, v in line.items() if k[:5] == "time/" and k[5:] != "evaluate")
            if "eval/reward" in line:
                scores = line["eval/reward"], line.get("eval/accuracy", float("nan"))
                points[line["step"]] = line["step"], cost * line["step"], seconds, *scores
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: not a run of train.py: {one_line(error)}") from error
    return label, options, points


def grouped(names):
    """{label: {seed: points of a run}}. The options that differ between runs are a label, too."""
    runs = [read(name) for name in names]
    options = [{k: v for k, v in own.items() if k not in WITHIN} for _, own, _ in runs]
    differing = [k for k in options[0] if any(own.get(k) != options[0][k] for own in options)]
    groups = {}
    for name, own, (label, every, points) in zip(names, options, runs):
        label = label or ", ".join(f"{k} {own.get(k)}" for k in differing) or own["algorithm"]
        group, seed = groups.setdefault(label, {}), every["seed"]
        require(seed not in group, f"{name}: {label} has a run of seed {seed}; use LABEL=RUN")
        group[seed] = points
    return groups


def main(argv):
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.split(":")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder of train.py, or LABEL=RUN")
    parser.add_argument("--output", type=figure_path, default="compare.png", help="the figure")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=list(COSTS), help="columns")
    given = parser.parse_args(argv)
    figure, rows = Figure(figsize=(3.7 * len(given.costs), 6.5), layout="constrained"), []
    axes = figure.subplots(len(SCORES), len(given.costs), sharex="col", sharey="row", squeeze=False)
    spare = iter([*COLOURS.values()][4:] * 99)  # the first four are colours of the algorithms
    for label, group in grouped(given.runs).items():
        steps = sorted(set.intersection(*map(set, group.values())))  # evaluated in all of its runs
        points = [list(zip(*(run[step] for run in group.values()))) for step in steps]
        numbers = [[mean_and_error(point[k]) for point in points] for k in range(5)]
        colour = COLOURS.get(label.removeprefix("algorithm ")) or next(spare)
        for (i, j), axis in np.ndenumerate(axes):
            cost = given.costs[j]
            x, (y, error) = [m for m, _ in numbers[[*COSTS].index(cost)]], zip(*numbers[3 + i])
            axis.errorbar(x, y, error, label=label, color=colour, marker="o", capsize=3)
            axis.set(xlabel=COSTS[cost], ylabel=SCORES[i])
            axis.label_outer()
        last = [f"{column[-1][0]:.0f}" for column in numbers[:3]]
        ends = ["{:.4f} ± {:.4f}".format(*column[i]) for column in numbers[3:] for i in (0, -1)]
        ends = [end.removesuffix(" ± nan") for end in ends]  # a group of one run has no error
        rows.append([label, str(len(group)), *last, *ends])
    axes[0, 0].legend()
    with written_whole(given.output) as path:
        figure.savefig(path, dpi=120)
    titles = [f"{score} {when}" for score in SCORES for when in ("before", "after")]
    print(table(["group", "runs", *COSTS.values(), *titles], rows) + f"wrote {given.output}")


if __name__ == "__main__":
    sys.exit(exit_code("compare.py", lambda: main(sys.argv[1:])))
