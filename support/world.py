"""The tiny world: captions, their 32x32 pictures of one shape, and a classifier of such pictures.

A caption names size, fill, colour, shape and place; its pictures differ by a little jitter. Of 720
captions, 72 are held out: no model but the classifier, which only judges, was trained on them. The
models of this world are in the folder `tiny`; experiments/pretrain_world.py made them.
"""

import functools
import itertools
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

SIDE = 32  # of a picture, in pixels
SIZES = {"small": 5.5, "large": 9.5}  # radius in pixels
FILLS = ("plain", "striped")
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.6, 0.2, 0.75),
    "orange": (0.95, 0.5, 0.1),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
PLACES = {  # offset of the shape's centre from the picture's, in pixels
    "on the left": (-6, 0),
    "on the right": (6, 0),
    "at the top": (0, -6),
    "at the bottom": (0, 6),
    "in the middle": (0, 0),
}
VALUES = [list(words) for words in (SIZES, FILLS, COLOURS, SHAPES, PLACES)]
ATTRIBUTES = {  # caption -> index of its size, fill, colour, shape and place
    "a " + " ".join(words[i] for words, i in zip(VALUES, row)): row
    for row in itertools.product(*(range(len(words)) for words in VALUES))
}
CAPTIONS = list(ATTRIBUTES)
_ORDER = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0)).tolist()
HELD_OUT_PROMPTS = [CAPTIONS[i] for i in sorted(_ORDER[:72])]
TRAIN_PROMPTS = [CAPTIONS[i] for i in sorted(_ORDER[72:])]

TINY = Path(__file__).with_name("tiny")  # the folder of the tiny models
CLEAR = 0.7  # a picture is clear if the classifier is this sure of each of its attributes


def draw(prompts, generator):
    """Pictures float32 (n, 3, 32, 32) in [0, 1] of n captions, with jitter from `generator`."""
    size, fill, colour, shape, place = torch.tensor([ATTRIBUTES[prompt] for prompt in prompts]).T
    n = len(prompts)
    jitter = lambda *shape: torch.rand(n, *shape, generator=generator) - 0.5  # noqa: E731
    r = (torch.tensor(list(SIZES.values()))[size] + 0.5 * jitter())[:, None, None]
    centre = SIDE / 2 + torch.tensor(list(PLACES.values()))[place] + 0.6 * jitter(2)
    grid = torch.arange(SIDE) + 0.5
    x, y = centre[:, :, None, None].unbind(dim=1)
    x, y = torch.broadcast_tensors(grid - x, grid[:, None] - y)
    ax, ay, radius = x.abs(), y.abs(), (x**2 + y**2).sqrt()
    distance = {  # from the shape's edge in pixels, negative inside
        "circle": radius - r,
        "square": torch.maximum(ax, ay) - 0.85 * r,
        "triangle": torch.maximum(0.866 * ax - 0.5 * y, y) - 0.6 * r,
        "diamond": (ax + ay) / math.sqrt(2) - 0.8 * r,
        "ring": (radius - 0.75 * r).abs() - 0.25 * r,
        "cross": torch.minimum(
            torch.maximum(ax - r, ay - 0.35 * r), torch.maximum(ax - 0.35 * r, ay - r)
        ),
    }
    distance = torch.stack([distance[name] for name in SHAPES], dim=1)[torch.arange(n), shape]
    ink = torch.tensor(list(COLOURS.values()))[colour] + 0.1 * jitter(3)
    stripes = (0.5 + 1.5 * torch.sin((x + y) * (2 * math.pi / 6))).clamp(0, 1)
    stripes = stripes * (fill == FILLS.index("striped"))[:, None, None]
    ink = ink[:, :, None, None] * (1 - 0.75 * stripes[:, None])
    paper = (0.9 + 0.08 * jitter(1))[:, :, None, None]
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    return (paper * (1 - cover) + ink * cover).clamp(0, 1)


class Classifier(nn.Module):
    """Says which size, fill, colour, shape and place a picture shows. The reward never sees it."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 48, 2), (48, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, sum(map(len, VALUES))))

    def forward(self, images):
        """(n, 3, 32, 32) in [0, 1] -> for each attribute the logits of its values, (n, values)."""
        return self.layers(images).split([len(words) for words in VALUES], dim=1)


@functools.cache
def classifier():
    """The trained classifier, in float32 on the CPU."""
    network = Classifier()
    network.load_state_dict(load_file(TINY / "classifier" / "model.safetensors"))
    return network.requires_grad_(False)


def judge(images, prompts):
    """What the classifier says of the pictures of n captions: {"accuracy": whether all five
    attributes are as the caption says, "clear": whether it is sure of each attribute, whichever
    value it has}, each float32 (n,), 1 or 0."""
    probabilities = [logits.softmax(dim=1) for logits in classifier()(images.cpu())]
    largest, values = zip(*(p.max(dim=1) for p in probabilities))
    right = torch.stack(values, dim=1) == torch.tensor([ATTRIBUTES[prompt] for prompt in prompts])
    clear = torch.stack(largest, dim=1) >= CLEAR
    return {"accuracy": right.all(dim=1).float(), "clear": clear.all(dim=1).float()}


def judges(prompts, held_out_prompts, side):
    """For a run of a tiny model: ([(name, weight, function)], what `judge` says as rewards that are
    only measured; notes for the user). The list is empty where `judge` does not know what all
    held-out pictures, of this side in pixels, should show."""
    notes, why = [], "" if side == SIDE else f"it needs --resolution {SIDE}"
    if new := len({*prompts, *held_out_prompts} - ATTRIBUTES.keys()):
        known = f"{len(CAPTIONS)} captions, such as {CAPTIONS[0]!r}"
        notes.append(f"the tiny models know only {known}; {new} of the prompts are none of these")
    if new := sum(prompt not in ATTRIBUTES for prompt in held_out_prompts):
        why = f"{new} of the {len(held_out_prompts)} held-out prompts are none of these captions"
    if why:
        return [], notes + [f"accuracy is not measured: {why}"]
    rewards = [
        (name, 0.0, lambda images, prompts, metadata, name=name: judge(images, prompts)[name])
        for name in ("accuracy", "clear")
    ]
    return rewards, notes
