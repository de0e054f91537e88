"""A text-to-image world small enough for a laptop, and the tiny models that live in it.

    python tiny.py           # pretrain now what a first `python train.py` would (about 2 minutes)

The world: 32x32 pictures of one shape, told apart by size, fill, colour, shape and place, each
drawn with a little jitter; 720 captions, 72 of them held out from every training. The models are
the real classes of diffusers and transformers, only small, in folders that `from_pretrained`
loads: `sana/` is a whole SanaPipeline (AutoencoderDC, SanaTransformer2DModel, Gemma2, tokenizer,
scheduler), `clip/` a CLIPModel that serves as the reward. They are trained for so short a time
that shapes come out misshapen or mixed up: that is what reinforcement learning then mends.

What is not like a real model: the Gemma2 weights are random (its 3-layer features of a prompt
differ from each other, which is all a caption projection needs), and the flow model was never
trained without its prompt, so guidance has nothing to push away from.
"""

import hashlib
import inspect
import itertools
import math
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import models
import reward

# ---------------------------------------------------------------------------------------------
# The world

SIDE = 32
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
PLACES = {
    "on the left": (-6, 0),
    "on the right": (6, 0),
    "at the top": (0, -6),
    "at the bottom": (0, 6),
    "in the middle": (0, 0),
}
THINGS = torch.tensor(list(itertools.product(range(2), range(2), range(6), range(6), range(5))))
CAPTIONS = [
    f"a {list(SIZES)[size]} {FILLS[fill]} {list(COLOURS)[colour]} {SHAPES[shape]} "
    f"{list(PLACES)[place]}"
    for size, fill, colour, shape, place in THINGS.tolist()
]
_ORDER = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0)).tolist()
HELD_OUT, TRAIN = sorted(_ORDER[:72]), sorted(_ORDER[72:])
TRAIN_PROMPTS = [CAPTIONS[i] for i in TRAIN]
HELD_OUT_PROMPTS = [CAPTIONS[i] for i in HELD_OUT]


def draw(things, generator):
    """Pictures float32 (n, 3, 32, 32) in [0, 1] of rows of THINGS (n, 5), with jitter."""
    size, fill, colour, shape, place = things.T
    n = len(things)
    jitter = lambda *shape: torch.rand(n, *shape, generator=generator) - 0.5  # noqa: E731
    r = (torch.tensor(list(SIZES.values()))[size] + jitter())[:, None, None]
    centre = SIDE / 2 + torch.tensor(list(PLACES.values()))[place] + 2 * jitter(2)
    grid = torch.arange(SIDE) + 0.5
    x, y = torch.broadcast_tensors(
        grid[None, None, :] - centre[:, 0, None, None],
        grid[None, :, None] - centre[:, 1, None, None],
    )
    ax, ay, radius = x.abs(), y.abs(), (x**2 + y**2).sqrt()
    distance = {  # signed, in pixels, negative inside
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


def worsen(images, generator):
    """The same pictures (n, 3, h, w), each bent, blurred and noised by a random amount: what the
    reward learns to like less than the original."""
    n, _, h, w = images.shape
    amount = 0.4 + 0.6 * torch.rand(3, n, 1, 1, 1, generator=generator)
    bend = torch.randn(n, 2, 4, 4, generator=generator)
    bend = F.interpolate(bend, size=(h, w), mode="bicubic").permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, images.shape, align_corners=False)
    grid = grid + bend * amount[0] * (8.0 / w)
    bent = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(bent, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = torch.lerp(bent, blurred, amount[1] ** 2)
    noise = torch.randn(images.shape, generator=generator) * (0.15 * amount[2] ** 2)
    return (blurred + noise).clamp(0, 1)


# ---------------------------------------------------------------------------------------------
# Text


def _tokenizer(texts, template):
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # <eos> must not be token 2: CLIPTextModel takes that for an old mistake and pools elsewhere.
    special = ["<pad>", "<bos>", "<unk>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
    )


# ---------------------------------------------------------------------------------------------
# Pretraining


def _train(model, loss, steps, learning_rate, title, progress):
    """AdamW with a warm-up and a linear decay; returns `model` with averaged weights, eval."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 40, 1.0, 2 * (steps - i) / steps)
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    for _ in tqdm(range(steps), desc=f"pretraining {title}", disable=not progress):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    return model.eval().requires_grad_(False)


def _autoencoder(images, generator, steps, progress):
    blocks = dict(block_types="ResBlock", block_out_channels=(16, 32, 64))
    blocks |= dict(layers_per_block=(0, 1, 1), qkv_multiscales=((), (), ()))
    both = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in blocks.items()}
    vae = AutoencoderDC(latent_channels=8, **both)

    def loss():
        x = 2 * images[torch.randint(len(images), (64,), generator=generator)] - 1
        z = vae.encode(x, return_dict=False)[0]
        # Noise on the latents makes the decoder forgive what the flow model gets wrong.
        z = z + 0.03 * z.std().detach() * torch.randn(z.shape, generator=generator)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()

    return _train(vae, loss, steps, 4e-3, "the autoencoder", progress)


def _clip(images, generator, steps, progress):
    tokenizer = _tokenizer(CAPTIONS, "<bos> $A <eos>")
    small = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(image_size=SIDE, patch_size=4, num_hidden_layers=3)
    clip = CLIPModel(
        CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=64)
    )
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")

    def loss():
        # One picture each of 64 different captions, so that every other caption is wrong.
        captions = torch.randperm(len(TRAIN), generator=generator)[:64]
        picked = captions + len(TRAIN) * torch.randint(
            len(images) // len(TRAIN), (64,), generator=generator
        )
        good = images[picked]
        ids = torch.tensor(TRAIN)[captions]
        out = clip(
            input_ids=tokens.input_ids[ids],
            attention_mask=tokens.attention_mask[ids],
            pixel_values=reward.clip_pixels(torch.cat([good, worsen(good, generator)]), SIDE),
        )
        target = torch.arange(64)
        of_text = F.cross_entropy(out.logits_per_text, target)  # among the worsened ones too
        return of_text + F.cross_entropy(out.logits_per_image[:64], target)

    return _train(clip, loss, steps, 1.5e-3, "the reward", progress), tokenizer


def _sana(vae, latents, things, generator, steps, progress):
    instruction = "\n".join(models.Sana.instruction())
    tokenizer = _tokenizer(CAPTIONS + [instruction] * 10, "<bos> $A")
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=32,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=4,
        caption_channels=64,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1.0,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    scheduler = DPMSolverMultistepScheduler(  # SANA's own; its shift of 3 is for larger pictures
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5
    )
    pipe = SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    sana = models.Sana(pipe)
    texts = sana.encode(CAPTIONS)

    def loss():
        i = torch.randint(len(latents), (64,), generator=generator)
        x_0 = latents[i]
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(64, generator=generator))  # logit-normal
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        v = sana.velocity(transformer, x_t, t, texts.take(things[i]))
        return F.mse_loss(v, noise - x_0)

    _train(transformer, loss, steps, 2e-3, "the flow model", progress)
    return pipe


def pretrain(folder, scale=1.0, progress=True):
    """Train everything and save it under `folder`: sana/ and clip/. scale: of all step counts."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    steps = lambda n: max(2, round(n * scale))  # noqa: E731
    copies = 14
    things = torch.tensor(TRAIN).repeat(copies)
    images = torch.cat([draw(THINGS[part], generator) for part in things.split(1024)])
    vae = _autoencoder(images, generator, steps(320), progress)
    with torch.no_grad():
        codes = [vae.encode(2 * x - 1, return_dict=False)[0] for x in images.split(256)]
        seen = [vae.decode(z, return_dict=False)[0] / 2 + 0.5 for z in codes[: len(codes) // 2]]
    latents = torch.cat(codes)
    vae.register_to_config(scaling_factor=(1 / latents.std()).item())
    # Half of what the reward calls good went through the autoencoder, as every sample will.
    seen = torch.cat(seen).clamp(0, 1)
    clip, tokenizer = _clip(
        torch.cat([seen[: len(seen) // len(TRAIN) * len(TRAIN)], images[: len(images) // 2]]),
        generator,
        steps(300),
        progress,
    )
    latents = latents * vae.config.scaling_factor
    pipe = _sana(vae, latents, things, generator, steps(270), progress)
    transformers_logging.disable_progress_bar()
    pipe.save_pretrained(folder / "sana")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")


def cache_folder():
    """$SOL_RL_CACHE, or sol_rl in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sol_rl"
    return Path(os.environ.get("SOL_RL_CACHE") or default)


def ensure(scale=1.0, progress=True):
    """The folder with the tiny models, pretrained if this code with these packages has not been.

    It appears whole or not at all: written under another name beside it, then renamed.
    """
    made_by = Path(__file__).read_text() + inspect.getsource(models.Sana) + str(scale)
    made_by += "".join(version(package) for package in ("torch", "diffusers", "transformers"))
    folder = cache_folder() / f"tiny-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache_folder(), prefix="unfinished-"))
    try:
        if progress:
            print(f"first use: pretraining the tiny models, kept in {folder}", flush=True)
        pretrain(unfinished, scale, progress)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


if __name__ == "__main__":
    print(ensure())
