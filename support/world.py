"""The tiny world: captions, their 32x32 pictures of one shape, and where its tiny models are.

A caption names size, fill, colour, shape and place; its pictures differ by a little jitter. Of 720
captions, 72 are held out from every training. experiments/pretrain_world.py makes the models.
"""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from support.errors import InputError

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
_WORDS = [list(words) for words in (SIZES, FILLS, COLOURS, SHAPES, PLACES)]
ATTRIBUTES = {  # caption -> index of its size, fill, colour, shape and place
    "a " + " ".join(words[i] for words, i in zip(_WORDS, row)): row
    for row in itertools.product(*(range(len(words)) for words in _WORDS))
}
CAPTIONS = list(ATTRIBUTES)
_ORDER = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0)).tolist()
HELD_OUT_PROMPTS = [CAPTIONS[i] for i in sorted(_ORDER[:72])]
TRAIN_PROMPTS = [CAPTIONS[i] for i in sorted(_ORDER[72:])]

VERSION = 2  # raised when new code makes other tiny models; tests/test_world.py says when
PRETRAINING = {  # part -> (training steps, learning rate)
    "autoencoder_dc": (320, 4e-3),
    "autoencoder_kl": (800, 2e-3),
    "clip": (300, 1.5e-3),
    "sana": (270, 2e-3),
    "flux": (270, 2e-3),
    "sd3": (270, 2e-3),
}


def draw(prompts, generator):
    """Pictures float32 (n, 3, 32, 32) in [0, 1] of n captions, with jitter from `generator`."""
    size, fill, colour, shape, place = torch.tensor([ATTRIBUTES[prompt] for prompt in prompts]).T
    n = len(prompts)
    jitter = lambda *shape: torch.rand(n, *shape, generator=generator) - 0.5  # noqa: E731
    r = (torch.tensor(list(SIZES.values()))[size] + jitter())[:, None, None]
    centre = SIDE / 2 + torch.tensor(list(PLACES.values()))[place] + 2 * jitter(2)
    grid = torch.arange(SIDE) + 0.5
    x, y = torch.broadcast_tensors(
        grid[None, None, :] - centre[:, 0, None, None],
        grid[None, :, None] - centre[:, 1, None, None],
    )
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


def models_folder():
    """Where the tiny models are kept: in $SOL_RL_CACHE, or in the user's cache folder / sol_rl."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("SOL_RL_CACHE") or user_cache / "sol_rl")
    return cache / f"tiny-v{VERSION}-{hashlib.sha256(repr(PRETRAINING).encode()).hexdigest()[:8]}"


def ensure_models(*names):
    """models_folder(), in which the reward's CLIP and the models `names` (sana, flux, sd3) are
    pretrained now if they are missing. Raises InputError if that fails."""
    folder, program = models_folder(), Path(__file__).parents[1] / "experiments/pretrain_world.py"
    needed = {"clip", *names} | ({"autoencoder_kl"} if {"flux", "sd3"} & set(names) else set())
    # A process for each part, since each uses one thread; first the parts that others build on.
    for parts in (("clip", "autoencoder_kl"), ("sana", "flux", "sd3")):
        missing = [part for part in parts if part in needed and not (folder / part).is_dir()]
        if missing:
            print(f"first use: pretraining {', '.join(missing)} takes about 2 minutes", flush=True)
        builds = [subprocess.Popen([sys.executable, str(program), part]) for part in missing]
        if any([build.wait() for build in builds]):
            raise InputError(f"pretraining in {folder} failed; the lines above say why")
    return folder
