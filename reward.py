"""Rewards: a reward is a function (images, prompts, metadata) -> scores.

images: float32 (n, 3, H, W) in [0, 1]; prompts: n strings; metadata: n dicts (from a .jsonl prompts
file, else empty); scores: n finite numbers, higher is better. `build_reward` makes one of a spec:

    clipscore                       a published one: clipscore, pickscore, hpsv2, imagereward
    pickscore:0.7,mine.py:sharp:0.3 a weighted sum of raw scores
    mine.py:sharp                   the function `sharp` in the file mine.py

To try one on pictures:

    python reward.py --reward clipscore --prompt "a red ring" IMAGE...

The published rewards stand on transformers alone and are tested to give the scores of their own
code (tests/originals.py), which they do because three things are the same:
 1. The picture. Theirs is a file's: 8 bits a channel, resized by Pillow, which rounds to 8 bits
    after each of its two passes. `shrink` does exactly that with tensors, on their device. (HPSv2
    alone resizes in floating point.)
 2. The prompt: cleaned by ftfy for HPSv2, at most 77 tokens, for ImageReward 35.
 3. The weights, loaded strictly: no key may be missing or left over.

With the tiny models clipscore is a small CLIP trained on the tiny world to prefer each caption's
picture over other pictures and over bent, blurred and noisy copies of it, so that it feels fine
detail and not only the class of what is drawn.
"""

import argparse
import functools
import html
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.utils import HfHubHTTPError
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging


class RewardError(ValueError):
    """A reward that cannot be built, or whose scores cannot be used."""


class NonFiniteScores(RewardError):
    """A reward gave NaN or infinity for pictures that are in order."""

    def __init__(self, name, scores, prompt):
        super().__init__(name, scores, prompt)  # all of it, or it cannot be sent to other processes
        self.name, self.scores = f"reward {name}", scores

    def __str__(self):
        return f"{self.name} returned NaN or infinity for prompt {self.args[2]!r}"


# ---------------------------------------------------------------------------------------------
# Preprocessing


def pillow_bicubic(size, new_size, start, count):
    """`count` rows, from `start` on, of the matrix (new_size, size) float64 by which Pillow's
    bicubic filter resizes a line of pixels, in its fixed point: integers, 2^22 for 1 (Pillow,
    Resample.c, precompute_coeffs)."""
    scale = size / new_size
    stretch = max(scale, 1.0)  # when it shrinks the filter widens: antialiasing
    rows = torch.arange(start, start + count, dtype=torch.float64)
    centre = (rows[:, None] + 0.5) * scale
    pixel = torch.arange(size, dtype=torch.float64)
    x = ((pixel + 0.5 - centre) / stretch).abs()
    near, far = ((1.5 * x - 2.5) * x) * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    first, last = centre - 2 * stretch + 0.5, centre + 2 * stretch + 0.5
    weight = weight * ((pixel >= first.trunc()) & (pixel < last.trunc()))
    weight = weight * (1 / weight.sum(dim=1, keepdim=True)) * 2**22
    return (weight + 0.5 * weight.sign()).trunc()


def shrink(images, side, centred):
    """Shorter edge to `side` as Pillow does it, then the `side` x `side` in the middle.

    images: (n, 3, H, W) of whole numbers 0 to 255. centred: the function that makes a whole number
    of the half of what is too much, `int` or `round`. Only what is in the middle is computed.
    """
    shorter = min(images.shape[-2:])
    lines = []
    for size in images.shape[-2:]:
        new_size = int(side * size / shorter)
        start = centred((new_size - side) / 2)
        lines.append(pillow_bicubic(size, new_size, start, side).to(images.device))
    for matrix in reversed(lines):  # along x, then y: Pillow's order (its 13th version may swap)
        images = (matrix @ images.double().mT + 2**21).div(2**22).floor().clamp(0, 255)
    return images


def eight_bits(images):
    """[0, 1] -> whole numbers 0 to 255, as in the file that a pipeline would have saved."""
    return (255 * images).round()


def normalized(images):
    """[0, 1] -> CLIP's mean 0 and deviation 1, float32."""
    mean, std = (torch.tensor(c, device=images.device) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def clip_pixels(images, side, centred=int):
    """CLIP's preprocessing of images (n, 3, H, W) in [0, 1]; the BLIP of ImageReward goes through
    torchvision, which rounds when it centres."""
    return normalized(shrink(eight_bits(images), side, centred) / 255)


def square_pixels(images, side):
    """HPSv2's preprocessing: longer edge to `side`, black bars to make it a square. Bicubic with
    antialiasing, as its torchvision code does by default today (before torchvision 0.17 without),
    and not cut off at 0 and 1."""
    h, w = images.shape[-2:]
    images = eight_bits(images) / 255
    if max(h, w) != side:
        h, w = (max(1, round(size * (side / max(h, w)))) for size in (h, w))
        images = F.interpolate(images, size=(h, w), mode="bicubic", antialias=True)
    left, top = (side - w) // 2, (side - h) // 2
    return normalized(F.pad(images, (left, side - w - left, top, side - h - top)))


# ---------------------------------------------------------------------------------------------
# The published rewards. Each says what files of which repositories it `needs`, and is made of a
# device and {repository: folder}.


class CLIPScore:
    """Cosine of image and text embeddings, the scale of Sol-RL's tables: not 100 times it, not cut
    off at 0."""

    weights = vocabulary = "openai/clip-vit-large-patch14"
    needs = {weights: ("*.json", "*.txt", "model.safetensors")}

    def __init__(self, device, folders):
        self.tokenizer = AutoTokenizer.from_pretrained(folders[self.vocabulary])
        clip, info = CLIPModel.from_pretrained(
            **self.saved(folders), dtype=torch.float32, output_loading_info=True
        )
        for what in ("missing", "unexpected"):
            for key in sorted(info[f"{what}_keys"])[:1]:
                raise ValueError(f"{what} key {key} in its weights")
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.side = clip.config.vision_config.image_size

    def saved(self, folders):
        return {"pretrained_model_name_or_path": folders[self.weights]}

    def pixels(self, images):
        return clip_pixels(images, self.side)

    def clean(self, prompt):
        return prompt

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            [self.clean(prompt) for prompt in unique],
            padding=True,
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.clip.device)
        text = self.clip.get_text_features(**tokens).pooler_output
        pixels = self.pixels(images.to(self.clip.device))
        image = self.clip.get_image_features(pixel_values=pixels).pooler_output
        rows = [unique.index(prompt) for prompt in prompts]
        return torch.cosine_similarity(image, text[rows], dim=-1)


class PickScore(CLIPScore):
    """CLIP-H fine-tuned on choices between pictures (arXiv 2305.01569): logit scale times cosine,
    over 26, as is usual in reinforcement learning, which brings it near 1."""

    weights = "yuvalkirstain/PickScore_v1"
    vocabulary = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    needs = {vocabulary: ("*.json", "*.txt"), weights: ("config.json", "model.safetensors")}

    def __call__(self, images, prompts, metadata):
        return self.clip.logit_scale.exp() * super().__call__(images, prompts, metadata) / 26


class HPSv2(CLIPScore):
    """HPS v2.1 (arXiv 2306.09341): cosine of a CLIP-H fine-tuned on preferences, published in
    open_clip's format, on whole pictures. In float32; its own code uses float16 on a GPU."""

    weights, file = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
    vocabulary = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # and the sizes: the same network
    needs = {vocabulary: ("*.json", "*.txt"), weights: (file,)}

    def saved(self, folders):
        state = _load(folders[self.weights] / self.file)["state_dict"]
        return {
            "pretrained_model_name_or_path": None,
            "config": CLIPConfig.from_pretrained(folders[self.vocabulary]),
            "state_dict": from_open_clip(state),
        }

    def pixels(self, images):
        return square_pixels(images, self.side)

    def clean(self, prompt):
        import ftfy  # only here: a package of its own for one reward

        return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def from_open_clip(state):
    """open_clip's names -> those of transformers' CLIPModel. Raises nothing: what it does not know
    keeps its name, and strict loading refuses it."""
    names = {
        r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
        r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
        r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
        r"^visual\.ln_post\.": "vision_model.post_layernorm.",
        r"^visual\.proj$": "visual_projection.weight",
        r"^visual\.transformer\.": "vision_model.transformer.",
        r"^token_embedding\.": "text_model.embeddings.token_embedding.",
        r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
        r"^ln_final\.": "text_model.final_layer_norm.",
        r"^text_projection$": "text_projection.weight",
        r"^transformer\.": "text_model.transformer.",
        r"\.transformer\.resblocks\.": ".encoder.layers.",
        r"\.ln_([12])\.": r".layer_norm\1.",
        r"\.attn\.out_proj\.": ".self_attn.out_proj.",
        r"\.mlp\.c_fc\.": ".mlp.fc1.",
        r"\.mlp\.c_proj\.": ".mlp.fc2.",
    }
    renamed = {}
    for name, value in _renamed(state, names).items():
        if ".attn.in_proj_" in name:  # q, k and v in one
            for part, piece in zip("qkv", value.chunk(3)):
                renamed[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = piece
        else:
            renamed[name] = value.T if name.endswith("_projection.weight") else value
    return renamed


class ImageReward(nn.Module):
    """ImageReward v1.0 (arXiv 2304.05977): BLIP's image encoder, a BERT that looks at it, and a
    head of five linear layers on the first token, normalized to mean 0 and deviation 1."""

    weights, file = "THUDM/ImageReward", "ImageReward.pt"
    vocabulary = "google-bert/bert-base-uncased"
    needs = {vocabulary: ("vocab.txt",), weights: (file,)}
    mean, std = 0.16717362830052426, 1.0333394966054072
    eyes = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    reader = dict(
        vocab_size=30524,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    names = {  # its checkpoint's -> transformers'
        r"^blip\.visual_encoder\.": "vision.",
        r"^vision\.cls_token": "vision.embeddings.class_embedding",
        r"^vision\.pos_embed": "vision.embeddings.position_embedding",
        r"^vision\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
        r"^vision\.blocks\.": "vision.encoder.layers.",
        r"^vision\.norm\.": "vision.post_layernorm.",
        r"\.norm([12])\.": r".layer_norm\1.",
        r"\.attn\.qkv\.": ".self_attn.qkv.",
        r"\.attn\.proj\.": ".self_attn.projection.",
        r"^blip\.text_encoder\.": "text.",
        r"^mlp\.layers\.": "head.",
    }
    # BLIP's own pretraining: its heads, queues and moving averages.
    unused = (
        r"blip\.(vision_proj|text_proj|itm_head|temp|image_queue|text_queue|queue_ptr|\w+_m)(\..*)?"
        r"|blip\.text_encoder\.embeddings\.position_ids"
    )

    def __init__(self, device, folders):
        super().__init__()
        self.tokenizer = BertTokenizer.from_pretrained(folders[self.vocabulary])
        self.vision = BlipVisionModel(BlipVisionConfig(**self.eyes))
        reader = BlipTextConfig(encoder_hidden_size=self.eyes["hidden_size"], **self.reader)
        self.text = BlipTextModel(reader, add_pooling_layer=False)
        sizes = (reader.hidden_size, 1024, 128, 64, 16, 1)
        places = (0, 2, 4, 6, 7)  # between the first ones there was dropout
        layers = [nn.Identity() for _ in range(8)]
        for place, n, m in zip(places, sizes, sizes[1:]):
            layers[place] = nn.Linear(n, m)
        self.head = nn.Sequential(*layers)
        state = _load(folders[self.weights] / self.file)
        state = {k: v for k, v in state.items() if not re.fullmatch(self.unused, k)}
        self.load_state_dict(_renamed(state, self.names))
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, prompts, metadata):
        device = self.head[0].weight.device
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(device)
        pixels = clip_pixels(images.to(device), self.eyes["image_size"], centred=round)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - self.mean) / self.std


PUBLISHED = {
    "clipscore": CLIPScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "imagereward": ImageReward,
}


def _renamed(state, names):
    """The same tensors under names to which each of the patterns was applied in turn."""
    renamed = {}
    for name, value in state.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


def _load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def _in_folder(root, hub_id, patterns):
    """A repository's folder under `root`, where repositories are under their hub ids."""
    path = Path(root, hub_id)
    for pattern in patterns:
        if not any(path.glob(pattern)):
            wanted = " ".join(f"--include '{pattern}'" for pattern in patterns)
            raise RewardError(
                f"--reward_weights {root}: no {path / pattern}; "
                f"hf download {hub_id} {wanted} --local-dir {shlex.quote(str(path))}"
            )
    return path


def _from_hub(hub_id, patterns):
    """A repository's folder from the hub, or from its cache on this machine where the hub cannot
    be reached."""
    try:
        try:
            model_info(hub_id, timeout=5)  # one question, where a download would ask for a minute
        except HfHubHTTPError:
            pass  # there is a hub; what it does not like the download will say
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # of the network, and of several libraries
        try:
            kept = dict(allow_patterns=list(patterns), local_files_only=True)
            return Path(snapshot_download(hub_id, **kept))
        except Exception:
            raise RewardError(
                f"{hub_id} cannot be fetched ({_line(error)}); "
                f"without the hub give --reward_weights FOLDER with FOLDER/{hub_id}"
            ) from error


def _line(error):
    """An error's text in one line; of a thousand wrong keys only the first few."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) < 400 else line[:400] + " ..."


# ---------------------------------------------------------------------------------------------
# One reward of a spec


class Reward:
    """A weighted sum of rewards. Called with images, prompts and, if there is any, metadata it
    gives float32 (n,) on the CPU; `scores` gives the raw score of each part as well."""

    def __init__(self, parts):
        self.parts = parts  # (name, weight, function)

    def __call__(self, images, prompts, metadata=None):
        return self.scores(images, prompts, metadata)["weighted_sum"]

    def scores(self, images, prompts, metadata=None):
        """{name of a part: its raw scores, "weighted_sum": theirs}, each float32 (n,) on the CPU.
        Raises RewardError on images that are none and scores that cannot be used."""
        _check_images(images, prompts)
        metadata = metadata or [{} for _ in prompts]
        found = {name: _scores(name, f, images, prompts, metadata) for name, _, f in self.parts}
        total = sum(w * found[name] for name, w, _ in self.parts)
        for i in (~torch.isfinite(total)).nonzero()[:1, 0].tolist():
            raise NonFiniteScores("weighted_sum", total, prompts[i])
        return found | {"weighted_sum": total}

    def z_scored_sum(self, scores):
        """The weighted sum of raw scores {name: (...)}, each part first brought to mean 0 and
        deviation 1 over all that are given; float32 (...)."""
        return sum(
            w * (scores[name] - scores[name].mean()) / (scores[name].std(correction=0) + 1e-4)
            for name, w, _ in self.parts
        )


def build_reward(spec, device="cpu", tiny=False, weights=None, option="--reward"):
    """A Reward from its spec (see the top of this file).

    tiny: False for the published CLIP, True for the tiny models' (pretrained if need be), or the
    folder it is in. weights: a folder with repositories under their hub ids, instead of the hub.
    option: the name that errors call it by. Raises RewardError on a bad spec or unreadable weights,
    and later on scores that cannot be used.
    """
    parts = read_spec(spec, option)
    transformers_logging.disable_progress_bar()  # loading bars, over before they can be read
    transformers_logging.set_verbosity_error()  # its tables of wrong keys; here they are errors
    made = []
    for name, weight, function in parts:
        if function is None:
            cls, folders = PUBLISHED[name], {}
            try:
                for hub_id, patterns in cls.needs.items():
                    if tiny and name == "clipscore":
                        folders[hub_id] = _tiny_clip(tiny)
                    elif weights:
                        folders[hub_id] = _in_folder(weights, hub_id, patterns)
                    else:
                        folders[hub_id] = _from_hub(hub_id, patterns)
                function = cls(device, folders)
            except torch.OutOfMemoryError:
                raise
            except RewardError as error:
                raise RewardError(f"{option} {name}: {error}") from error
            except Exception as error:  # they raise whatever a broken file makes them stumble over
                raise RewardError(f"{option} {name}: cannot be loaded: {_line(error)}") from error
        made.append((name, weight, function))
    return Reward(made)


def _tiny_clip(tiny):
    """The tiny CLIP's folder."""
    if tiny is True:
        from tiny import ensure  # only here: the tiny world stands on rewards, not under them

        tiny = ensure()
    return Path(tiny) / "clip"


def read_spec(spec, option="--reward"):
    """A spec -> [(name, weight, the user's function, or None for a published reward)]. Executes
    the user's files, once each, and loads no weights. Raises RewardError."""
    parts = []
    for item in spec.split(","):
        name, _, weight = item.strip().rpartition(":")
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight):
            weight = float(weight)
            if weight in (0, float("inf"), -float("inf")):
                raise RewardError(f"{option} {item}: a weight must be a finite number, not 0")
        else:
            name, weight = item.strip(), 1.0
        function = None if name in PUBLISHED else _function(name, option)
        name = name.rpartition("/")[2]  # as it is logged
        if name in [part[0] for part in parts]:
            raise RewardError(f"{option} {spec!r}: {name} is in it twice")
        if name == "hpsv2" and importlib.util.find_spec("ftfy") is None:
            raise RewardError(f"{option} hpsv2: needs a package; pip install ftfy")
        parts.append((name, weight, function))
    return parts


def _function(name, option):
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        known = ", ".join(PUBLISHED)
        raise RewardError(f"{option} {name!r}: not one of {known}, nor path/to/file.py:function")
    if not Path(path).is_file():
        raise RewardError(f"{option} {name!r}: there is no file {path}")
    try:
        module = _module(os.path.abspath(path), os.stat(path).st_mtime_ns)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"{option} {name!r}: {path} fails to import: {type(error).__name__}: {_line(error)}"
        ) from error
    if not callable(getattr(module, function, None)):
        raise RewardError(f"{option} {name!r}: {path} has no function {function}")
    return getattr(module, function)


@functools.cache
def _module(path, changed):
    """The user's file as a module, executed once however often it is asked for."""
    name = f"reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _check_images(images, prompts):
    """The images of a batch are what rewards are promised, or a RewardError says which is not."""
    if images.dim() != 4 or images.shape[:2] != (len(prompts), 3) or 0 in images.shape:
        raise RewardError(f"{len(prompts)} images (3, H, W) to score, not {tuple(images.shape)}")
    low, high = images.amin(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))
    for i in (~((low >= 0) & (high <= 1))).nonzero()[:1, 0].tolist():  # nan compares as False
        raise RewardError(
            f"an image for prompt {prompts[i]!r} has pixels outside [0, 1] or NaN: "
            f"{float(low[i])} to {float(high[i])}"
        )


def _scores(name, function, images, prompts, metadata):
    """One reward's scores as float32 (n,) on the CPU, or a RewardError that says what is wrong."""
    about = f"reward {name} for prompt {prompts[0]!r}"
    try:
        # Copies: what a function writes into its arguments must not reach the next one.
        scores = torch.as_tensor(function(images.clone(), list(prompts), metadata))
        if scores.is_complex():
            raise ValueError("its scores are complex numbers")
        scores = scores.detach().to("cpu", torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"{about} raised {type(error).__name__}: {_line(error)}") from error
    if scores.shape != (len(prompts),):
        raise RewardError(f"{about} returned shape {tuple(scores.shape)}, not ({len(prompts)},)")
    if not torch.isfinite(scores).all():
        raise NonFiniteScores(name, scores, prompts[int((~torch.isfinite(scores)).nonzero()[0])])
    return scores


# ---------------------------------------------------------------------------------------------
# python reward.py


def read_image(path):
    """A picture file -> float32 (1, 3, H, W) in [0, 1]. Raises RewardError."""
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a channel")
        pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow has many for what is no picture
        raise RewardError(f"{path}: {getattr(error, 'strerror', None) or _line(error)}") from error
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 255


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RewardError(message)


def main(argv=None):
    """Print the scores of pictures; returns the exit code, 2 on bad input."""
    parser = Parser(description="Score pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--prompt", required=True, help="what they should show")
    parser.add_argument("--reward", default="clipscore", help="see the top of reward.py")
    parser.add_argument("--reward_weights", help="a folder of repositories instead of the hub")
    parser.add_argument("--tiny", action="store_true", help="clipscore by the tiny models' CLIP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        options = parser.parse_args(argv)
        images = [read_image(path) for path in options.images]
        reward = build_reward(options.reward, options.device, options.tiny, options.reward_weights)
        scores = [reward.scores(image, [options.prompt]) for image in images]
    except (RewardError, torch.OutOfMemoryError) as error:
        print(f"reward.py: error: {_line(error)}", file=sys.stderr)
        return 2
    names = list(scores[0]) if len(reward.parts) > 1 else [reward.parts[0][0]]
    print("  ".join(f"{name:>12}" for name in names))
    for path, found in zip(options.images, scores):
        print("  ".join(f"{float(found[name]):12.4f}" for name in names), "", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
