"""Rewards: a reward is a function (images, prompts, metadata) -> scores.

images: float32 (n, 3, H, W) in [0, 1]; prompts: n strings; metadata: n dicts (from a .jsonl prompts
file, else empty); scores: n finite numbers, higher is better. `build_reward` makes one of a spec:

    clipscore                       a published one
    clipscore:0.7,mine.py:sharp:0.3 a weighted sum of raw scores
    mine.py:sharp                   the function `sharp` in the file mine.py

CLIPScore here is the cosine of CLIP's image and text embeddings, on the scale the paper uses (not
100 times it, not cut off at 0). With the tiny models it is a small CLIP trained on the tiny world
to prefer each caption's picture over other pictures and over bent, blurred and noisy copies of it,
so that it feels fine detail and not only the class of what is drawn.
"""

import importlib.util
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class RewardError(ValueError):
    """A reward that cannot be built, or whose scores cannot be used."""


def clip_pixels(images, side):
    """CLIP's preprocessing of images (n, 3, H, W) in [0, 1], on their device: shorter edge to
    `side` (bicubic, antialiased), centre crop, normalisation."""
    h, w = images.shape[-2:]
    if min(h, w) != side:
        h, w = round(h * side / min(h, w)), round(w * side / min(h, w))
        images = F.interpolate(images, size=(h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - side) // 2, (w - side) // 2
    images = images[..., top : top + side, left : left + side]
    mean, std = (torch.tensor(c, device=images.device) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


class CLIPScore:
    """Cosine of image and text embeddings of a CLIP (openai/clip-vit-large-patch14)."""

    published = "openai/clip-vit-large-patch14"

    def __init__(self, device, tiny):
        folder = tiny / "clip" if tiny else self.published
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.clip = CLIPModel.from_pretrained(folder).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            unique,
            padding=True,
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.clip.device)
        text = self.clip.get_text_features(**tokens).pooler_output
        side = self.clip.config.vision_config.image_size
        pixels = clip_pixels(images.to(self.clip.device), side)
        image = self.clip.get_image_features(pixel_values=pixels).pooler_output
        rows = [unique.index(prompt) for prompt in prompts]
        return torch.cosine_similarity(image, text[rows], dim=-1)


PUBLISHED = {"clipscore": CLIPScore}


def build_reward(spec, device="cpu", tiny=False):
    """A reward from its spec (see the top of this file).

    tiny: False for the published weights, True for the tiny models' (pretrained if need be), or
    the folder they are in. Returns callable(images, prompts, metadata=None) -> float32 (n,) on
    the CPU. Raises RewardError on a bad spec, and later on scores that cannot be used.
    """
    parts = read_spec(spec)
    if tiny is True:
        from tiny import ensure  # only here: the tiny world stands on rewards, not under them

        tiny = ensure()
    folder = Path(tiny) if tiny else None
    parts = [(name, w, f or PUBLISHED[name](device, folder)) for name, w, f in parts]

    def reward(images, prompts, metadata=None):
        metadata = metadata or [{} for _ in prompts]
        return sum(w * _scores(name, f, images, prompts, metadata) for name, w, f in parts)

    return reward


def read_spec(spec):
    """A spec -> [(name, weight, the user's function, or None for a published reward)]. Loads no
    weights, so it can be called before any work is done. Raises RewardError."""
    parts = []
    for item in spec.split(","):
        name, _, weight = item.strip().rpartition(":")
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight):
            weight = float(weight)
        else:
            name, weight = item.strip(), 1.0
        parts.append((name, weight, None if name in PUBLISHED else _function(name)))
    return parts


def _function(name):
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        known = ", ".join(PUBLISHED)
        raise RewardError(f"--reward {name!r}: not one of {known}, nor path/to/file.py:function")
    if not Path(path).is_file():
        raise RewardError(f"--reward {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"--reward {name!r}: {path} fails to import: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, function, None)):
        raise RewardError(f"--reward {name!r}: {path} has no function {function}")
    return getattr(module, function)


def _scores(name, function, images, prompts, metadata):
    """One reward's scores as float32 (n,) on the CPU, or a RewardError that says what is wrong."""
    about = f"reward {name} for prompt {prompts[0]!r}"
    try:
        scores = torch.as_tensor(function(images, prompts, metadata))
        scores = scores.detach().to("cpu", torch.float32)
    except Exception as error:
        raise RewardError(f"{about} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(prompts),):
        raise RewardError(f"{about} returned shape {tuple(scores.shape)}, not ({len(prompts)},)")
    if not torch.isfinite(scores).all():
        bad = prompts[int((~torch.isfinite(scores)).nonzero()[0])]
        raise RewardError(f"reward {name} returned NaN or infinity for prompt {bad!r}")
    return scores
