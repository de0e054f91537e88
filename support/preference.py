"""PickScore, HPS v2.1 and ImageReward, and what all rewards made of a CLIP model share.

They give the scores of their own code (tests/originals.py), because three things are the same:
 1. The picture. Their code reads a file, which has 8 bits a channel, and resizes it with Pillow,
    which rounds to 8 bits after each of its two passes. (Only HPSv2 resizes in floating point.)
 2. The prompt. ftfy cleans it for HPSv2; it is cut off after 77 tokens, for ImageReward after 35.
 3. The weights. They are loaded strictly: no key may be missing or left over.
"""

import html
import re

import ftfy
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from support.errors import InputError
from support.hub import fetch


def resize_and_crop(images, side, round_offset):
    """Resize the shorter edge to `side` by Pillow's bicubic filter; cut out the central square.

    The result is Pillow's to the last bit, but Pillow itself would need the images on the CPU.
    images: (n, 3, H, W) in [0, 1]; returns whole numbers from 0 to 255, float64 (n, 3, side, side)
    on the same device. round_offset: `int` or `round`, for the offset of the crop.
    """
    pixels = (255 * images).round().double()  # as in the file that a pipeline would have saved
    h, w = images.shape[-2:]
    for size in (w, h):  # along x, then along y; each pass transposes the picture
        resized = int(side * size / min(h, w))
        weights = bicubic_weights(size, resized, round_offset((resized - side) / 2), side)
        weights = weights.to(images.device)
        # Sums of these whole numbers are exact in float64: every device rounds the same values.
        pixels = (pixels @ weights.T / 2**22 + 0.5).floor().clamp(0, 255).mT
    return pixels


def bicubic_weights(size, resized, start, side):
    """Pillow's filter that resizes a line of `size` pixels to `resized` pixels, as a matrix: its
    rows start, ..., start + side - 1, float64 (side, size) on the CPU. As in Pillow, a weight is a
    whole number, in units of 1 / 2 ** 22. F.interpolate does not round its weights, so it rounds
    ties between two 8-bit values differently."""
    target = torch.arange(start, start + side, dtype=torch.float64)
    source = torch.arange(size, dtype=torch.float64)
    distance = source + 0.5 - (target[:, None] + 0.5) * size / resized  # of the pixels' centres
    x = distance.abs() / max(1, size / resized)
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weights = torch.where(x < 2, weights, 0)
    return (2**22 * weights / weights.sum(dim=1, keepdim=True)).round()


def normalize(images):
    """[0, 1] -> CLIP's training pictures' mean 0 and standard deviation 1, float32."""
    mean, std = (torch.tensor(c, device=images.device) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def clip_pixels(images, side, round_offset=int):
    """CLIP's preprocessing: (n, 3, H, W) in [0, 1] -> float32 (n, 3, side, side). ImageReward uses
    torchvision's, which differs in `round_offset=round`."""
    return normalize(resize_and_crop(images, side, round_offset) / 255)


def square_pixels(images, side):
    """HPSv2's preprocessing: (n, 3, H, W) in [0, 1] -> float32 (n, 3, side, side). The longer edge
    is resized to `side`, and black bars make the picture a square. Bicubic with antialiasing, as
    torchvision does by default since version 0.17, and not clamped to [0, 1]."""
    h, w = images.shape[-2:]
    images = (255 * images).round() / 255
    h, w = (max(1, round(size * (side / max(h, w)))) for size in (h, w))
    images = F.interpolate(images, size=(h, w), mode="bicubic", antialias=True)
    left, top = (side - w) // 2, (side - h) // 2
    return normalize(F.pad(images, (left, side - w - left, top, side - h - top)))


CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer and sizes of PickScore and HPSv2


class CLIPReward:
    """A CLIP model in float32 and its embeddings; how they become a score is for subclasses to say.

    tokenizer, weights: folders; weights is None if `config` and `state_dict` are given instead.
    Raises InputError if a key of the weights is missing or left over.
    """

    def __init__(self, device, tokenizer, weights, **config_and_state):
        transformers.utils.logging.disable_progress_bar()  # it would end before anyone can read it
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        options = dict(dtype=torch.float32, output_loading_info=True)
        clip, info = transformers.CLIPModel.from_pretrained(weights, **config_and_state, **options)
        for problem in ("missing", "unexpected"):
            if keys := sorted(info[f"{problem}_keys"]):
                raise InputError(f"{problem} key {keys[0]} in its weights")
        self.clip = clip.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def cosine(self, images, prompts, preprocess=clip_pixels):
        """Cosine of each picture's embedding and its prompt's, (n,). Equal prompts are embedded
        once. images: (n, 3, H, W) in [0, 1]."""
        config, unique = self.clip.config, list(dict.fromkeys(prompts))
        pixels = preprocess(images.to(self.clip.device), config.vision_config.image_size)
        cut = dict(truncation=True, max_length=config.text_config.max_position_embeddings)
        tokens = self.tokenizer(unique, padding=True, return_tensors="pt", **cut).to(pixels.device)
        image = self.clip.get_image_features(pixel_values=pixels).pooler_output  # (n, d)
        text = self.clip.get_text_features(**tokens).pooler_output
        text = text[[unique.index(prompt) for prompt in prompts]]  # (n, d)
        return torch.cosine_similarity(image, text, dim=-1)


class PickScore(CLIPReward):
    """CLIP-H fine-tuned on people's choices between two pictures (arXiv 2305.01569): logit scale
    times cosine, divided by 26 as in Flow-GRPO's code, which brings it near 1."""

    repository, file = "yuvalkirstain/PickScore_v1", "model.safetensors"

    def __init__(self, device):
        tokenizer = fetch(CLIP_H, ("*.json", "*.txt"))
        super().__init__(device, tokenizer, fetch(self.repository, ("config.json", self.file)))

    def __call__(self, images, prompts, metadata):
        return self.clip.logit_scale.exp() * self.cosine(images, prompts) / 26


class HPSv2(CLIPReward):
    """HPS v2.1 (arXiv 2306.09341): cosine of a CLIP-H fine-tuned on preferences, published in
    open_clip's format, which sees the whole picture. Its own code uses float16 on a GPU."""

    repository, file = "xswu/HPSv2", "HPS_v2.1_compressed.pt"

    def __init__(self, device):
        folder = fetch(CLIP_H, ("*.json", "*.txt"))
        path = fetch(self.repository, (self.file,)) / self.file
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        config = transformers.CLIPConfig.from_pretrained(folder)
        super().__init__(device, folder, None, config=config, state_dict=from_open_clip(state))

    def __call__(self, images, prompts, metadata):
        cleaned = [html.unescape(html.unescape(ftfy.fix_text(p))).strip() for p in prompts]
        return self.cosine(images, cleaned, square_pixels)


def from_open_clip(state):
    """open_clip's state_dict under the names of transformers' CLIPModel. A key that is not among
    them keeps its name; loading then refuses it."""
    names = {
        r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
        r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
        r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
        r"^visual\.ln_post\.": "vision_model.post_layernorm.",
        r"^visual\.proj$": "visual_projection.weight",
        r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
        r"^token_embedding\.": "text_model.embeddings.token_embedding.",
        r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
        r"^ln_final\.": "text_model.final_layer_norm.",
        r"^text_projection$": "text_projection.weight",
        r"^transformer\.resblocks\.": "text_model.encoder.layers.",
        r"\.ln_([12])\.": r".layer_norm\1.",
        r"\.attn\.out_proj\.": ".self_attn.out_proj.",
        r"\.mlp\.c_fc\.": ".mlp.fc1.",
        r"\.mlp\.c_proj\.": ".mlp.fc2.",
    }
    renamed = {}
    for name, value in rename(state, names).items():
        if ".attn.in_proj_" in name:  # queries, keys and values in one tensor
            for part, piece in zip("qkv", value.chunk(3)):
                renamed[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = piece
        else:
            renamed[name] = value.T if name.endswith("_projection.weight") else value
    return renamed


class ImageReward(nn.Module):
    """ImageReward v1.0 (arXiv 2304.05977): BLIP's image encoder, a BERT that attends to it, and
    five linear layers on the first token, normalized to mean 0 and standard deviation 1."""

    repository, file = "THUDM/ImageReward", "ImageReward.pt"
    bert = "google-bert/bert-base-uncased"
    mean, std = 0.16717362830052426, 1.0333394966054072
    # Where the two differ from transformers' defaults.
    vision_config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vision_config |= dict(num_attention_heads=16, image_size=224, layer_norm_eps=1e-6)
    text_config = dict(num_attention_heads=12, encoder_hidden_size=1024)
    names = {  # in its checkpoint -> in transformers
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
    # Left over from BLIP's pretraining: its heads, queues and moving averages.
    unused = (
        r"blip\.(vision_proj|text_proj|itm_head|temp|image_queue|text_queue|queue_ptr|\w+_m)(\..*)?"
        r"|blip\.text_encoder\.embeddings\.position_ids"
    )

    def __init__(self, device):
        super().__init__()
        vocabulary = fetch(self.bert, ("vocab.txt",))
        self.tokenizer = transformers.BertTokenizer.from_pretrained(vocabulary)
        vision_config = transformers.BlipVisionConfig(**self.vision_config)
        self.vision = transformers.BlipVisionModel(vision_config)
        text_config = transformers.BlipTextConfig(**self.text_config)
        self.text = transformers.BlipTextModel(text_config, add_pooling_layer=False)
        sizes = (text_config.hidden_size, 1024, 128, 64, 16, 1)
        layers = [nn.Identity() for _ in range(8)]  # three of them, dropout in training, stay
        for position, n, m in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
            layers[position] = nn.Linear(n, m)
        self.head = nn.Sequential(*layers)
        path = fetch(self.repository, (self.file,)) / self.file
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not re.fullmatch(self.unused, k)}
        self.load_state_dict(rename(state, self.names))
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, prompts, metadata):
        device, side = self.head[0].weight.device, self.vision_config["image_size"]
        cut = dict(padding="max_length", truncation=True, max_length=35)
        tokens = self.tokenizer(prompts, return_tensors="pt", **cut).to(device)
        pixels = clip_pixels(images.to(device), side, round)
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=image)
        return (self.head(text.last_hidden_state[:, 0]).squeeze(-1) - self.mean) / self.std


def rename(state, names):
    """The same tensors; every pattern of `names` is replaced in their names, one after another."""
    for pattern, replacement in names.items():
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state
