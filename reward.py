"""Rewards: a reward is a function (images, prompts, metadata) -> scores, higher is better.

    images      float32 (n, 3, H, W) in [0, 1]
    prompts     n strings
    metadata    n dictionaries: the other fields of a .jsonl prompts file, else empty
    scores      n finite numbers, in a list or a tensor

`build_reward` makes a reward from its specification:

    clipscore                           CLIPScore, below
    pickscore, hpsv2 or imagereward     the other published rewards (support/preference.py)
    mine.py:red                         the function `red` in the file mine.py
    pickscore:0.7,mine.py:red:0.3       a weighted sum of raw scores

To write your own, put a function into a file. This one prefers red pictures:

    def red(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

To try a reward on pictures before you train on it:

    python reward.py --reward mine.py:red --prompt "a red ring" IMAGE...
    python reward.py --tiny --prompt "a small plain red ring at the top" IMAGE...
"""

import argparse
import functools
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support import hub, preference, world
from support.errors import InputError, NonFinite, one_line, require


class CLIPScore(preference.CLIPReward):
    """Cosine of a picture's embedding and its prompt's (arXiv 2104.08718), on the scale of Sol-RL's
    tables: neither multiplied by 100 nor clamped at 0. folder: of another CLIPModel to use."""

    repository, file = "openai/clip-vit-large-patch14", "model.safetensors"

    def __init__(self, device, folder=None):
        folder = folder or hub.fetch(self.repository, ("*.json", "*.txt", self.file))
        super().__init__(device, tokenizer=folder, weights=folder)

    def __call__(self, images, prompts, metadata):
        return self.cosine(images, prompts)


PUBLISHED = {
    "clipscore": CLIPScore,
    "pickscore": preference.PickScore,
    "hpsv2": preference.HPSv2,
    "imagereward": preference.ImageReward,
}


class Reward:
    """A weighted sum of rewards. Called with images, prompts and metadata it returns the sum of
    the raw scores, float32 (n,) on the CPU. parts: a list of (name, weight, function)."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, images, prompts, metadata=None):
        return self.scores(images, prompts, metadata)["weighted_sum"]

    def scores(self, images, prompts, metadata=None):
        """{name of a part: its raw scores}, and their "weighted_sum"; each float32 (n,) on the CPU.

        Raises InputError if images are not as rewards expect them or a reward fails, and NonFinite
        if a score is NaN or infinite."""
        right = images.dim() == 4 and images.shape[:2] == (len(prompts), 3) and images.numel()
        require(right, f"{len(prompts)} images (3, H, W) to score, not {tuple(images.shape)}")
        in_range = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)  # False for NaN
        for i in (~in_range).nonzero()[:1, 0].tolist():
            raise InputError(f"an image for prompt {prompts[i]!r} has pixels outside [0, 1] or NaN")
        metadata, scores = metadata or [{} for _ in prompts], {}
        for name, _, function in self.parts:
            scores[name] = raw_scores(name, function, images, prompts, metadata)
        scores["weighted_sum"] = sum(weight * scores[name] for name, weight, _ in self.parts)
        for name, values in scores.items():
            for i in (~torch.isfinite(values)).nonzero()[:1, 0].tolist():
                raise NonFinite(f"reward {name}", prompts[i], index=i)
        return scores


def raw_scores(name, function, images, prompts, metadata):
    """One reward's scores, float32 (n,) on the CPU. Raises InputError."""
    prefix = f"reward {name} for prompt {prompts[0]!r}"
    try:
        # The function gets copies, so that the next reward sees the same images and prompts.
        scores = torch.as_tensor(function(images.clone(), list(prompts), metadata))
        if scores.is_complex():
            raise ValueError("its scores are complex numbers")
        scores = scores.detach().to("cpu", torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{prefix} raised {type(error).__name__}: {one_line(error)}") from error
    shape, expected = tuple(scores.shape), (len(prompts),)
    require(shape == expected, f"{prefix} returned shape {shape}, not {expected}")
    return scores


def build_reward(spec, device="cpu", clip=None, option="--reward"):
    """A Reward from its specification (see the top of this file). clip: the folder of a CLIPModel
    that clipscore uses instead of the published one. option: the option that errors name. Raises
    InputError, also if weights cannot be fetched or loaded."""
    parts = []
    for name, weight, function in read_spec(spec, option):
        if function is None:
            try:
                cls = PUBLISHED[name]
                function = cls(device, clip) if cls is CLIPScore else cls(device)
            except Exception as error:  # A broken file makes libraries raise almost anything.
                raise InputError(f"{option} {name}: cannot be loaded: {one_line(error)}") from error
        parts.append((name, weight, function))
    return Reward(parts)


def read_spec(spec, option="--reward"):
    """A specification -> [(name, weight, the user's function, or None for a published reward)].
    Executes the user's files, each once, and loads no weights. Raises InputError."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    parts = []
    for item in spec.split(","):
        name, weight = re.fullmatch(rf"(?s)(.*?)(?::({number}))?", item.strip()).groups("1")
        weight = float(weight)
        usable = weight and np.isfinite(weight)
        require(usable, f"{option} {item}: a weight must be a finite number, not 0")
        function = None if name in PUBLISHED else user_function(name, option)
        name = name.rpartition("/")[2]  # as it is logged
        twice = name in [part[0] for part in parts]
        require(not twice, f"{option} {spec!r}: {name} is in it twice")
        parts.append((name, weight, function))
    return parts


def user_function(name, option):
    """The function that "path/to/file.py:function" names. Raises InputError."""
    path, _, function = name.rpartition(":")
    prefix, is_file = f"{option} {name!r}", path.endswith(".py") and Path(path).is_file()
    known = ", ".join(PUBLISHED)
    require(is_file, f"{prefix}: not one of {known}, nor an existing file.py:function")
    try:
        module = execute(Path(path).resolve(), Path(path).stat().st_mtime_ns)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{prefix}: {path} fails to import: {reason}") from error
    is_function = callable(getattr(module, function, None))
    require(is_function, f"{prefix}: {path} has no function {function}")
    return getattr(module, function)


@functools.cache
def execute(path, modified):
    """A file as a module. The cache executes it once, and again when it was modified."""
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def read_image(path):
    """A picture file -> float32 (1, 3, H, W) in [0, 1]. Raises InputError."""
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a channel")
        return torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    except Exception as error:  # Pillow raises many kinds of errors.
        raise InputError(f"{path}: {one_line(error)}") from error


def main(argv=None):
    """Print the scores of pictures; returns the exit code, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="reward.py", description="Score pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--prompt", required=True, help="what the pictures should show")
    parser.add_argument("--reward", default="clipscore", help="see the top of reward.py")
    parser.add_argument("--tiny", action="store_true", help="clipscore by the tiny models' CLIP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    try:
        images = [read_image(path) for path in options.images]
        clip = world.TINY / "clip" if options.tiny else None
        reward = build_reward(options.reward, options.device, clip)
        scores = [reward.scores(image, [options.prompt]) for image in images]
    except (InputError, NonFinite, torch.OutOfMemoryError) as error:
        hint = "; --tiny needs no download" if CLIPScore.repository in str(error) else ""
        print(f"reward.py: error: {error}{hint}", file=sys.stderr)
        return 2
    names = list(scores[0]) if len(reward.parts) > 1 else [reward.parts[0][0]]
    print("  ".join(f"{name:>12}" for name in names))
    for path, row in zip(options.images, scores):
        print("  ".join(f"{float(row[name]):12.4f}" for name in names), "", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
