"""Two drawings: one iteration with its four policies, and what the loss does to a velocity.

python experiments/diagram.py    # writes docs/iteration.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from support.report import COLOURS

POLICY, SEEDS, IMAGES = (COLOURS[name] for name in ("sol_rl", "best", "diffusionnft"))
FP4, BF16, DISCARDED = (COLOURS[name] for name in ("nvfp4", "bf16", "worst"))
TEXT = dict(va="center", fontsize=13)


def box(axis, x, y, title, text, colour, line="-"):
    """A box of 23 x 10 around (x, y) with a bold title."""
    style = dict(boxstyle="round,pad=0,rounding_size=1.5", linewidth=2.5, linestyle=line)
    style |= dict(facecolor=(colour, 0.15), edgecolor=colour)
    axis.add_patch(FancyBboxPatch((x - 11.5, y - 5), 23, 10, **style))
    axis.text(x, y + 2.3, title, ha="center", fontweight="bold", **TEXT)
    axis.text(x, y - 1.9, text, ha="center", **TEXT)


def arrow(axis, *points, text="", at=(0, 0), align="left", colour="black", width=2):
    """An arrow through these points, and a text at a place."""
    axis.plot(*zip(*points[:-1]), color=colour, linewidth=width)
    style = dict(arrowstyle="-|>", color=colour, linewidth=width, mutation_scale=12 + 2 * width)
    axis.annotate("", points[-1], points[-2], arrowprops=dict(shrinkA=0, shrinkB=0, **style))
    axis.text(*at, text, color=colour, ha=align, **TEXT)


def iteration():
    """The diagram of one iteration, a pyplot figure."""
    figure, axis = plt.subplots(figsize=(11, 7.3))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(-0.5, 113), ylim=(-15, 60))
    axis.axis("off")
    # Seeds and images, clockwise from the top.
    box(axis, 43, 51, "96 seeds", "of one prompt", SEEDS)
    box(axis, 72, 51, "1  explore", "NVFP4 copy, 6 steps", FP4)
    box(axis, 101, 51, "96 FP4 images", "and proxy rewards", DISCARDED, line="--")
    box(axis, 101, 31, "2  select", "12 best, 12 worst", SEEDS)
    box(axis, 101, 11, "24 seeds", "kept", SEEDS)
    box(axis, 72, 11, "3  regenerate", "BF16 copy, 10 steps", BF16)
    box(axis, 43, 11, "24 BF16 images", "and rewards", IMAGES)
    box(axis, 12, 11, "4  update", "advantages, loss", IMAGES)
    axis.text(101, 58, "thrown away", color=DISCARDED, ha="center", fontweight="bold", **TEXT)
    for x, y, end in ((54.5, 51, 60.5), (83.5, 51, 89.5), (89.5, 11, 83.5), (60.5, 11, 54.5)):
        arrow(axis, (x, y), (end, y))
    arrow(axis, (101, 46), (101, 36), text="ranks", at=(100, 41), align="right")
    arrow(axis, (101, 26), (101, 16), text="seeds only", at=(100, 21), align="right")
    arrow(axis, (31.5, 9), (23.5, 9))
    # The four policies, and what they give.
    box(axis, 12, 51, "EMA", "evaluated, saved", POLICY)
    box(axis, 12, 31, "policy", "learns", POLICY)
    box(axis, 72, 31, "old policy", "draws for training", POLICY)
    box(axis, 12, -9, "base model", "never changes", POLICY)
    arrow(axis, (12, 36), (12, 46), text="follows", at=(13, 41))
    arrow(axis, (23.5, 33), (60.5, 33), text="follows, after each update", at=(26, 35.5))
    arrow(axis, (72, 36), (72, 46), text="weights in NVFP4", at=(71, 41), align="right")
    arrow(axis, (72, 26), (72, 16), text="weights in BF16", at=(71, 21), align="right")
    arrow(axis, (3, 26), (3, 16), text="v", at=(4, 21))
    arrow(axis, (12, 16), (12, 26), text="step", at=(13, 21))
    arrow(axis, (60.5, 29), (28, 29), (28, 13), (23.5, 13), text="v_old", at=(29, 21))
    arrow(axis, (12, -4), (12, 6), text="v_ref", at=(13, 1))
    legend = "Dark blue: four policies, which are one network with three LoRAs.\n"
    legend += "From FP4 to BF16 go seeds only, never an image or a reward.\n"
    legend += "v, v_old, v_ref: velocities that the loss compares."
    axis.text(31.5, -9, legend, linespacing=1.6, **TEXT)
    return figure


def loss():
    """What the loss does to v for a good and for a bad sample, a pyplot figure."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    titles = "good sample, r > 1/2", "bad sample, r < 1/2"
    colours = {"v": POLICY, "2 v_old - v": IMAGES}
    for axis, title, (above, below) in zip(axes, titles, (colours, reversed(colours))):
        arrow(axis, (0, 0), (6, 0), text="v_old", at=(6.2, 0), colour=BF16)
        arrow(axis, (0, 0), (6.7, 1.5), text=above, at=(7, 1.3), colour=colours[above])
        arrow(axis, (6.7, 1.5), (7.3, 2.9), colour=colours[above], width=5)
        arrow(axis, (0, 0), (5.3, -1.5), text=below, at=(5.6, -1.6), colour=colours[below])
        arrow(axis, (5.3, -1.5), (4.7, -2.9), colour=colours[below], width=5)
        axis.plot(7.4, 3.2, "*", color=DISCARDED, markersize=18)
        axis.text(7, 3.5, "noise - x_0", color=DISCARDED, ha="right", **TEXT)
        axis.set(xlim=(-0.3, 10), ylim=(-3.2, 4.2), title=title)
        axis.axis("off")
    return figure


if __name__ == "__main__":
    iteration().savefig(Path(__file__).parent.parent / "docs" / "iteration.png", dpi=160)
