"""What the published rewards' own code gives: `python tests/originals.py` makes originals.json.

The originals run with old packages, in a virtual environment of their own (Python 3.11; torch and
torchvision must fit each other):

    pip install torch torchvision "transformers==4.30.2" "huggingface_hub<0.26" timm==0.6.13 \
        fairscale==0.4.13 diffusers==0.16.0 datasets accelerate openai-clip "setuptools<80" \
        open_clip_torch==2.24.0 "pillow<13" ftfy pandas clint webdataset
    pip install --no-deps image-reward==1.5 hpsv2==1.2.0

The networks are small. Their random weights are not stored: `weights` gives them again from a seed.
hpsv2's package lacks its vocabulary; open_clip's is the same.
"""

import gzip
import importlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

STORED = Path(__file__).with_suffix(".json")
SIZES = [(40, 40), (32, 32), (48, 81), (91, 50), (2, 2), (37, 37), (20, 27)]  # height, width
PROMPTS = [
    "a small plain red ring at the top",
    "",
    "An astronaut’s “café” &amp; bar, it's 10:45 <br>",
    "猫坐在窗台上，看雨。",
    "Ёлка и кот ✨ في المدينة",
    "a very long prompt about a house by the sea with " + "many, many windows and " * 40,
]


def images():
    """A uint8 (h, w, 3) array for each of SIZES: noise, gradients, grey, what resembles a photo."""
    random, pictures = np.random.RandomState(7), []
    for i, (h, w) in enumerate(SIZES):
        y, x = np.mgrid[0:h, 0:w] / max(h, w)
        if i % 4 == 0:  # noise
            image = random.rand(h, w, 3)
        elif i % 4 == 1:  # gradients
            image = np.stack([x, y, 1 - (x + y) / 2], axis=-1)
        elif i % 4 == 2:  # soft blobs under a fine grain
            image = 0.05 * random.randn(h, w, 3) + 0.2
            for _ in range(12):
                cx, cy, r = random.rand(3)
                blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.1 * r + 0.005))
                image += 0.5 * blob[..., None] * random.rand(3)
        else:  # hard edges
            image = ((8 * x).astype(int) + (8 * y).astype(int))[..., None] % 2 * random.rand(3)
        pictures.append((255 * image.clip(0, 1)).astype(np.uint8))
    pictures[5][:] = 128  # grey
    return pictures


def weights(shapes, seed):
    """{name: shape} -> {name: float32 array}, so that every parameter matters."""
    random, state = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        values = random.standard_normal(shape).astype(np.float32)
        if name.endswith("position_ids"):
            state[name] = np.arange(shape[-1])[None]
        elif name == "logit_scale":
            state[name] = np.float32(3 + 0.1 * values)
        elif len(shape) < 2:
            norm = name.endswith("weight")  # of a layer normalization
            state[name] = (1.0 if norm else 0.0) + 0.2 * values
        else:
            fan = shape[-1] if len(shape) == 3 else np.prod(shape[1:])
            state[name] = values * np.float32(1.5 * fan**-0.5)
    return state


def byte_pairs(merges):
    """Lines of CLIP's byte pair file -> its tokens in their order, as open_clip numbers them."""
    from open_clip.tokenizer import bytes_to_unicode

    letters, ends = list(bytes_to_unicode().values()), ["<|startoftext|>", "<|endoftext|>"]
    return letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges] + ends


def make(folder):
    """All that is stored. folder: for files that the originals read."""
    import open_clip
    from hpsv2.src.open_clip import tokenizer

    torch.set_grad_enabled(False)
    pictures, shapes, folder = [Image.fromarray(x) for x in images()], {}, Path(folder)

    def fill(model, name, seed):
        shapes[name] = {k: list(v.shape) for k, v in model.state_dict().items()}
        state = {k: torch.from_numpy(np.asarray(v)) for k, v in weights(shapes[name], seed).items()}
        model.load_state_dict(state)
        return model.eval()

    def table(score):
        return [[float(score(picture, prompt)) for prompt in PROMPTS] for picture in pictures]

    # The vocabularies: of CLIP only the first merges, of BERT letters and a few words.
    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.open(packed).read().decode().split("\n")[1:601]
    (folder / "merges.txt.gz").write_bytes(gzip.compress("\n".join(["version", *merges]).encode()))
    tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(folder / "merges.txt.gz"))
    vocabulary = byte_pairs(merges)
    clip_files(folder / "words", vocabulary, merges)
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789猫坐窗看雨кот"))
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    bert += ["##" + c for c in letters] + ["red", "ring", "house", "windows", ",", "."]
    (folder / "vocab.txt").write_text("\n".join(bert), encoding="utf-8")

    tools = dict(fill=fill, table=table, folder=folder)
    scores = {
        "clipscore": clip("clipscore", 0, "quick_gelu", len(vocabulary), **tools),
        "pickscore": clip("pickscore", 1, "gelu", len(vocabulary), **tools),
        "hpsv2": hpsv2(len(vocabulary), **tools),
        "imagereward": imagereward(len(bert), **tools),
    }
    stored = {"scores": scores, "shapes": shapes, "clip_merges": merges}
    return stored | {"clip_vocabulary": vocabulary, "bert_vocabulary": bert}


def clip(name, seed, act, words, fill, table, folder):
    """CLIPScore, and PickScore as its repository's README computes it."""
    model = fill(transformers.CLIPModel(clip_config(act, words)), name, seed)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "words")
    process = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)

    def score(picture, prompt):
        options = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
        image = model.get_image_features(**process(picture, return_tensors="pt"))
        text = model.get_text_features(**tokenizer(prompt, **options))
        image = image / torch.norm(image, dim=-1, keepdim=True)
        text = text / torch.norm(text, dim=-1, keepdim=True)
        product = (text @ image.T)[0, 0]
        return product if name == "clipscore" else model.logit_scale.exp() * product

    return table(score)


def hpsv2(words, fill, table, folder):
    """hpsv2/img_score.py, with the transform that its `light_augmentation` gives."""
    from hpsv2.src import open_clip
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    vision = dict(image_size=32, layers=2, width=64, head_width=16, patch_size=8)
    text = dict(context_length=77, vocab_size=words, width=64, heads=4, layers=2)
    config = dict(embed_dim=48, vision_cfg=vision, text_cfg=text)
    model = fill(CLIP(**config, output_dict=True), "hpsv2", 2)
    transform = image_transform(32, is_train=False, resize_longest_max=True)

    def score(picture, prompt):
        out = model(transform(picture)[None], open_clip.tokenize([prompt]))
        return torch.diagonal(out["image_features"] @ out["text_features"].T)[0]

    return table(score)


def imagereward(words, fill, table, folder):
    """ImageReward.score; its constructor would ask the hub for BERT's vocabulary."""
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    package = importlib.import_module("ImageReward.ImageReward")  # hidden by a class of that name
    blip_pretrain.init_tokenizer = lambda: transformers.BertTokenizer(str(folder / "vocab.txt"))
    med = dict(vocab_size=words + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    med |= dict(num_attention_heads=4, max_position_embeddings=64, layer_norm_eps=1e-12)
    med |= dict(hidden_act="gelu", pad_token_id=0, add_cross_attention=True, encoder_width=768)
    shape = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=4)
    blip_pretrain.create_vit = lambda *_: (VisionTransformer(**shape), 96)
    package.MLP = lambda _, made=package.MLP: made(64)
    (folder / "med_config.json").write_text(json.dumps(med))
    model = fill(package.ImageReward(str(folder / "med_config.json")), "imagereward", 3)
    model.preprocess = package._transform(32)
    return table(lambda picture, prompt: model.score(prompt, picture))


def clip_config(act, words):
    shape = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2)
    return transformers.CLIPConfig(
        text_config=shape | dict(hidden_act=act, vocab_size=words, eos_token_id=2),  # as published
        vision_config=shape | dict(hidden_act=act, image_size=32, patch_size=8),
        projection_dim=48,
    )


def clip_files(folder, vocabulary, merges):
    """Write a CLIP tokenizer as transformers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version", *merges]), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(make(folder), ensure_ascii=False))
