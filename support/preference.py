"""PickScore, HPS v2.1 and ImageReward, and what all rewards made of a CLIP model share.

They give the scores of their own code (tests/originals.py), because three things are the same:
 1. The picture. Their code reads 8 bits a channel from a file and resizes with Pillow, which rounds
    to 8 bits after each of its two passes. (Only HPSv2 resizes in floating point.)
 2. The prompt. HPSv2 cleans it with ftfy; it is cut after 77 tokens, for ImageReward after 35.
 3. The weights. They are loaded strictly: no key may be missing or left over.
"""

import html
import re

import ftfy
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from support import hub
from support.errors import require


def normalize(images):
    """[0, 1] -> mean 0 and standard deviation 1 over CLIP's training pictures, float32."""
    mean, std = (torch.tensor(c, device=images.device) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def clip_pixels(images, side, round_offset=int):
    """CLIP's preprocessing: (n, 3, H, W) in [0, 1] -> float32 (n, 3, side, side). The shorter edge
    becomes `side`, resized to the last bit as Pillow does it (bicubic), on the images' device. The
    central square is cut out. round_offset: `int` or `round`, for the offset of the cut."""
    pixels = (255 * images).round().double()  # as in the file that a pipeline would have saved
    h, w = images.shape[-2:]
    for size in (w, h):  # along x, then along y; each pass transposes the picture
        resized = int(side * size / min(h, w))
        start = round_offset((resized - side) / 2)
        identity = torch.eye(size, dtype=torch.float64)[None, None]
        weights = F.interpolate(identity, (resized, size), mode="bicubic", antialias=True)[0, 0]
        # Pillow's weights are whole numbers, in units of 1 / 2 ** 22, so ties round as there. Sums
        # of whole numbers are exact in float64: every device rounds the same values.
        weights = (2**22 * weights[start : start + side]).round().to(images.device)
        pixels = (pixels @ weights.T / 2**22 + 0.5).floor().clamp(0, 255).mT
    return normalize(pixels / 255)


def square_pixels(images, side):
    """HPSv2's preprocessing: (n, 3, H, W) in [0, 1] -> float32 (n, 3, side, side). The longer edge
    becomes `side`; black bars fill the square. Bicubic with antialiasing, not clamped to [0, 1], as
    in torchvision since 0.17."""
    images = (255 * images).round() / 255
    scale = side / max(images.shape[-2:])
    h, w = (max(1, round(size * scale)) for size in images.shape[-2:])
    images = F.interpolate(images, size=(h, w), mode="bicubic", antialias=True)
    left, top = (side - w) // 2, (side - h) // 2
    return normalize(F.pad(images, (left, side - w - left, top, side - h - top)))


CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer and sizes of PickScore and HPSv2


def split_weight(item):
    """NAME:WEIGHT, one reward of a weighted sum -> (NAME, WEIGHT); without a weight it is 1.0."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    name, weight = re.fullmatch(rf"(?s)(.*?)(?::({number}))?", item.strip()).groups("1")
    return name, float(weight)


class CLIPReward:
    """A CLIP model in float32; subclasses turn its cosine into a score.

    tokenizer, config: folders that hold them; state: {name: tensor}, the weights. Raises InputError
    if a weight is missing or left over.
    """

    def __init__(self, device, tokenizer, config, state):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        config = transformers.CLIPConfig.from_pretrained(config)
        transformers.utils.logging.disable_progress_bar()  # it would end before anyone can read it
        options = dict(config=config, dtype=torch.float32, output_loading_info=True)
        clip, info = transformers.CLIPModel.from_pretrained(None, state_dict=state, **options)
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        require(not wrong, f"missing or unexpected in its weights: {', '.join(wrong)}")
        self.clip = clip.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def cosine(self, images, prompts, preprocess=clip_pixels):
        """Cosine of each picture's and its prompt's embedding, (n,). images: (n, 3, H, W) in
        [0, 1]. Equal prompts are embedded once."""
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
        tokenizer = hub.fetch(CLIP_H, ("*.json", "*.txt"))
        folder = hub.fetch(self.repository, ("config.json", self.file))
        super().__init__(device, tokenizer, folder, load_file(folder / self.file))

    def __call__(self, images, prompts, metadata):
        return self.clip.logit_scale.exp() * self.cosine(images, prompts) / 26


class HPSv2(CLIPReward):
    """HPS v2.1 (arXiv 2306.09341): cosine of a CLIP-H fine-tuned on preferences, which sees the
    whole picture. Its file has open_clip's format. Its own code uses float16 on a GPU."""

    repository, file = "xswu/HPSv2", "HPS_v2.1_compressed.pt"

    def __init__(self, device):
        folder = hub.fetch(CLIP_H, ("*.json", "*.txt"))
        path = hub.fetch(self.repository, (self.file,)) / self.file
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        super().__init__(device, folder, folder, from_open_clip(state))

    def __call__(self, images, prompts, metadata):
        cleaned = [html.unescape(html.unescape(ftfy.fix_text(p))).strip() for p in prompts]
        return self.cosine(images, cleaned, square_pixels)


def from_open_clip(state):
    """open_clip's state_dict -> that of transformers' CLIPModel. Unknown keys keep their names, and
    loading refuses them."""
    names = {
        r"^visual\.proj$": "visual_projection.weight",
        r"^text_projection$": "text_projection.weight",
        r"^visual\.": "vision_model.",
        r"^(transformer|token|positional|ln_final)": r"text_model.\1",
        "positional_embedding": "embeddings.position_embedding.weight",
        "(class|token)_embedding": r"embeddings.\1_embedding",
        "conv1": "embeddings.patch_embedding",
        "transformer.resblocks": "encoder.layers",
        "ln_pre": "pre_layrnorm",  # sic
        "ln_post": "post_layernorm",
        "ln_final": "final_layer_norm",
        "ln_([12])": r"layer_norm\1",
        "attn": "self_attn",
        "c_fc": "fc1",
        "c_proj": "fc2",
    }
    renamed = {}
    for name, value in rename(state, names).items():
        if "in_proj_" in name:  # queries, keys and values in one tensor
            for part, piece in zip("qkv", value.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = piece
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
        "^blip.visual_encoder": "vision",
        "^blip.text_encoder": "text",
        "^mlp.layers": "head",
        "vision.cls_token": "vision.embeddings.class_embedding",
        "vision.pos_embed": "vision.embeddings.position_embedding",
        "vision.patch_embed.proj": "vision.embeddings.patch_embedding",
        "vision.blocks": "vision.encoder.layers",
        "vision.norm": "vision.post_layernorm",
        "norm([12])": r"layer_norm\1",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
    }
    # Left over from BLIP's pretraining: its heads, queues and moving averages.
    unused = r"blip\.(\w+_(proj|head|queue|ptr|m)|temp|text_encoder\..*position_ids)(\..*)?"

    def __init__(self, device):
        super().__init__()
        vocabulary = hub.fetch(self.bert, ("vocab.txt",))
        self.tokenizer = transformers.BertTokenizer.from_pretrained(vocabulary)
        vision, text = self.vision_config, transformers.BlipTextConfig(**self.text_config)
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
        self.text = transformers.BlipTextModel(text, add_pooling_layer=False)
        sizes = (text.hidden_size, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
        for position in (1, 3, 5):
            layers.insert(position, nn.Identity())  # where training has dropout
        self.head = nn.Sequential(*layers)
        path = hub.fetch(self.repository, (self.file,)) / self.file
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not re.fullmatch(self.unused, k)}
        self.load_state_dict(rename(state, self.names))
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, prompts, metadata):
        device, side = self.head[0].weight.device, self.vision_config["image_size"]
        cut = dict(padding="max_length", truncation=True, max_length=35)
        tokens = self.tokenizer(prompts, return_tensors="pt", **cut).to(device)
        pixels = clip_pixels(images.to(device), side, round)  # torchvision rounds the crop's offset
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=image)
        return (self.head(text.last_hidden_state[:, 0]).squeeze(-1) - self.mean) / self.std


def rename(state, names):
    """The same tensors under new names: each pattern of `names` is replaced, one after another."""
    for pattern, replacement in names.items():
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


PUBLISHED = {"pickscore": PickScore, "hpsv2": HPSv2, "imagereward": ImageReward}
