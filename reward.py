"""Rewards: a reward is a function (images, prompts, metadata) -> scores, higher is better.

    images      float32 (n, 3, H, W) in [0, 1]
    prompts     n strings
    metadata    n dictionaries: the other fields of a .jsonl prompts file, else empty
    scores      n finite numbers, in a list or a tensor

`--reward` is clipscore, pickscore, hpsv2, imagereward (docs/rewards.md), a function in a file, or a
weighted sum of raw scores, such as pickscore:0.7,mine.py:red:0.3. For that, mine.py has

    def red(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

Score pictures: python reward.py --reward mine.py:red --prompt "a red ring" IMAGE...
"""

import argparse
import copy
import functools
import importlib.util
import reprlib
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from support import hub, preference, world
from support.errors import InputError, one_line, require


class CLIPScore(preference.CLIPReward):
    """Cosine of a picture's and its prompt's embedding (arXiv 2104.08718). Plain cosine: no factor
    100, no clamp. clip: a CLIPModel's folder, "tiny" for the tiny models', None for CLIP-L."""

    repository, file = "openai/clip-vit-large-patch14", "model.safetensors"

    def __init__(self, device, clip=None):
        folder = world.TINY / "clip" if clip == "tiny" else clip
        folder = Path(folder or hub.fetch(self.repository, ("*.json", "*.txt", self.file)))
        super().__init__(device, folder, folder, load_file(folder / self.file))

    def __call__(self, images, prompts, metadata):
        return self.cosine(images, prompts)


PUBLISHED = {"clipscore": CLIPScore} | preference.PUBLISHED


class Reward:
    """A weighted sum of rewards. parts: [(name, weight, function)]."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, images, prompts, metadata=None):
        """The weighted sum alone, float32 (n,) on the CPU. Raises what `scores` raises."""
        return self.scores(images, prompts, metadata)["weighted_sum"]

    def scores(self, images, prompts, metadata=None):
        """{name of a part: raw scores}, and their "weighted_sum"; each float32 (n,) on the CPU.
        Raises InputError on wrong images or where a reward fails. NaN is returned."""
        n, shape, scores, total = len(prompts), tuple(images.shape), {}, 0
        low, high = images.aminmax()
        right = len(shape) == 4 and shape[:2] == (n, 3) and 0 <= low <= high <= 1  # False for NaN
        wrong = f"{shape} with pixels from {low:.4g} to {high:.4g}"
        require(right, f"a reward scores {n} images (3, H, W) in [0, 1], not {wrong}")
        for name, weight, function in self.parts:
            where = f"reward {name} for prompt {prompts[0]!r}"
            # Copies, so that no reward changes what the next one sees.
            rows = [copy.deepcopy(row) for row in metadata or [{}] * n]
            try:
                returned = function(images.clone(), list(prompts), rows)
            except torch.OutOfMemoryError:
                raise
            except (Exception, SystemExit) as error:
                problem = f"raised {type(error).__name__}: {one_line(error)}"
                raise InputError(f"{where} {problem}") from error
            scores[name] = as_scores(returned, n, where)
            total = total + weight * scores[name]
        return scores | {"weighted_sum": total}


def as_scores(returned, n, where):
    """What a reward returned -> float32 (n,) on the CPU. Raises InputError, which begins with
    `where`, unless these are n numbers."""
    try:
        scores = torch.as_tensor(returned).detach()
        wrong = f"shape {tuple(scores.shape)}"
    except (RuntimeError, TypeError, ValueError):  # None, a dictionary, (scores, {})
        scores, wrong = torch.empty(()), reprlib.repr(returned)
    right = scores.shape == (n,)
    require(right, f"{where} must return a list or a tensor of {n} numbers, not {wrong}")
    return scores.to("cpu", torch.float32)


def build_reward(spec, device="cpu", clip=None, option="--reward"):
    """A Reward from its specification (see the top of this file). Executes the user's files, each
    once, and loads weights only if all of the specification is right. clip: see CLIPScore. option:
    the option that errors name. Raises InputError."""
    weights, functions = {}, {}
    for item in spec.split(","):
        name, weight = preference.split_weight(item)
        usable = 0 < abs(weight) < np.inf
        require(usable, f"{option} {item}: a weight must be a finite number, not 0")
        require(name not in weights, f"{option} {spec!r}: {name} is in it twice")
        weights[name] = weight
        functions[name] = PUBLISHED.get(name) or user_function(name, option)
    for name in [name for name in weights if name in PUBLISHED]:
        more = [clip] if name == "clipscore" else []
        try:
            functions[name] = PUBLISHED[name](device, *more)
        except Exception as error:  # A broken file makes libraries raise almost anything.
            raise InputError(f"{option} {name}: cannot be loaded: {one_line(error)}") from error
    # The log leaves folders out of a name, unless two names would then be equal.
    short = [name.rpartition("/")[2] for name in weights]
    logged = [s if short.count(s) == 1 else name for s, name in zip(short, weights)]
    return Reward(list(zip(logged, weights.values(), functions.values())))


def user_function(name, option):
    """The function that "path/to/file.py:function" names. Raises InputError."""
    path, _, function = name.rpartition(":")
    is_file, known = path.endswith(".py") and Path(path).is_file(), ", ".join(PUBLISHED)
    require(is_file, f"{option} {name!r}: not one of {known}, nor an existing file.py:function")
    try:
        return getattr(execute(Path(path).resolve(), Path(path).stat().st_mtime_ns), function)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{option} {name!r}: cannot be imported: {reason}") from error


@functools.cache
def execute(path, modified):
    """A file as a module, which may import the modules beside it. The cache executes it once, and
    again when it was modified."""
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(str(path.with_suffix("")), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def read_image(path):
    """A picture file -> float32 (1, 3, H, W) in [0, 1]: as it is shown upright, on white."""
    image = Image.open(path)
    require(image.mode[0] not in "IF", f"{path}: has more than 8 bits a colour; give one of 8 bits")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255


def main(argv=None):
    """Print the scores of pictures; returns the exit code, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="reward.py", description="Score pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--prompt", required=True, help="what the pictures should show")
    parser.add_argument("--reward", default="clipscore", help="see the top of reward.py")
    parser.add_argument("--tiny", action="store_true", help="clipscore by the tiny models' CLIP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    scores = {}
    try:
        reward = build_reward(options.reward, options.device, "tiny" if options.tiny else None)
        for path in options.images:
            scores[path] = reward.scores(read_image(path), [options.prompt])
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"reward.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    print("  ".join(f"{name:>12}" for name in scores[path]))
    for path, row in scores.items():
        print("  ".join(f"{float(value):12.4f}" for value in row.values()), "", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
