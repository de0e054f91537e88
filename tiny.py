"""A text-to-image world small enough for a laptop, and the tiny models that live in it.

    python tiny.py           # pretrain now what first runs of train.py would (6 minutes)

The world: 32x32 pictures of one shape, told apart by size, fill, colour, shape and place, each
drawn with a little jitter; 720 captions, 72 of them held out from every training. The models are
the real classes of diffusers and transformers, only small, in folders that `from_pretrained`
loads: `sana/`, `flux/` and `sd3/` are whole pipelines with their own transformer, text encoders,
tokenizers and scheduler, `autoencoder_dc/` (SANA's) and `autoencoder_kl/` (that of the other two)
are shared, and so is `clip/`, a CLIPModel that serves as the reward. All are trained for so short
a time that shapes come out misshapen or mixed up: that is what reinforcement learning then mends.

What is not like a real model: the weights of Gemma2 and T5 are random (their features of two
prompts differ, which is all the transformer needs), the CLIP that FLUX.1 and SD3.5 read prompts
with is the reward's own, and the flow models were never trained without their prompt, so guidance
has nothing to push away from.

Pretraining takes about a minute for each of the six folders, on one core, however many there are.
A second thread at best halves that; but the tensors are so small that, where another process is
busy, two threads wait for each other much longer than they compute.
"""

import functools
import hashlib
import inspect
import itertools
import math
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import models  # isort: skip  (before transformers, which it keeps quiet)

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

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


def _tokenizer(texts, template, **more):
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
        **more,
    )


# ---------------------------------------------------------------------------------------------
# Pretraining


class Workshop:
    """What the parts are made with: pictures, random numbers, a training loop, the other parts."""

    def __init__(self, folder, scale, progress):
        self.folder, self.scale, self.progress = folder, scale, progress
        self.generator = torch.Generator().manual_seed(0)

    @functools.cached_property
    def things(self):
        """Rows of THINGS, (n,): every training caption 14 times."""
        return torch.tensor(TRAIN).repeat(14)

    @functools.cached_property
    def images(self):
        """A picture of each, in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        parts = [draw(THINGS[part], generator) for part in self.things.split(1024)]
        return 2 * torch.cat(parts) - 1

    def batch(self, n=64):
        return torch.randint(len(self.things), (n,), generator=self.generator)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def train(self, model, loss, steps, learning_rate, title):
        """AdamW with a warm-up and a linear decay; leaves averaged weights, eval, frozen."""
        steps = max(2, round(steps * self.scale))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 40, 1.0, 2 * (steps - i) / steps)
        )
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
        )
        for _ in tqdm(range(steps), desc=f"pretraining {title}", disable=not self.progress):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        model.load_state_dict(average.module.state_dict())
        model.eval().requires_grad_(False)

    def part(self, name):
        """The folder of a part, made now if it is not there. It appears whole or not at all:
        written under another name beside it, then renamed."""
        folder = self.folder / name
        if folder.is_dir():
            return folder
        if self.progress:
            about = "about a minute on one core"
            print(f"first use: pretraining {name}, {about}, kept in {folder}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=self.folder, prefix="unfinished-"))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            # Random numbers from the start: a part does not depend on what was made before it.
            maker = Workshop(self.folder, self.scale, self.progress)
            torch.manual_seed(0)
            transformers_logging.disable_progress_bar()  # of writing and loading, over at once
            for piece in PARTS[name](maker):
                piece.save_pretrained(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        finally:
            torch.set_num_threads(threads)
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder


def _autoencoder_dc(make):
    """SANA's."""
    blocks = dict(block_types="ResBlock", block_out_channels=(16, 32, 64))
    blocks |= dict(layers_per_block=(0, 1, 1), qkv_multiscales=((), (), ()))
    both = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in blocks.items()}
    vae = AutoencoderDC(latent_channels=8, **both)

    def loss():
        x = make.images[make.batch()]
        z = vae.encode(x, return_dict=False)[0]
        # Noise on the latents makes the decoder forgive what the flow model gets wrong.
        z = z + 0.03 * z.std().detach() * make.randn(*z.shape)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()

    make.train(vae, loss, 320, 4e-3, "SANA's autoencoder")
    with torch.no_grad():
        vae.register_to_config(scaling_factor=(1 / _codes(vae, make.images).std()).item())
    return [vae]


def _autoencoder_kl(make):
    """That of FLUX.1 and of Stable Diffusion 3."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.nn.init.constant_(vae.encoder.conv_out.bias[16:], -6.0)  # log variances: little noise

    def loss():
        x = make.images[make.batch(8)]
        latents = vae.encode(x).latent_dist
        y = vae.decode(latents.sample(make.generator), return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-6 * latents.kl().mean()

    make.train(vae, loss, 800, 2e-3, "the autoencoder of FLUX.1 and SD3")
    z = _codes(vae, make.images)
    vae.register_to_config(scaling_factor=(1 / z.std()).item(), shift_factor=z.mean().item())
    return [vae]


@torch.no_grad()
def _codes(vae, images):
    """What the autoencoder makes of images in [-1, 1], before its scaling."""
    encoded = [vae.encode(x) for x in images.split(256)]
    return torch.cat(
        [e.latent if isinstance(vae, AutoencoderDC) else e.latent_dist.mode() for e in encoded]
    )


def _clip(make):
    tokenizer = _tokenizer(CAPTIONS, "<bos> $A <eos>")
    small = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64)
    text = _text_config(tokenizer) | dict(max_position_embeddings=32, num_hidden_layers=2)
    vision = dict(image_size=SIDE, patch_size=4, num_hidden_layers=3)
    clip = CLIPModel(
        CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=64)
    )
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    # Half of what the reward calls good went through an autoencoder, as every sample will.
    good = make.images / 2 + 0.5
    vae = AutoencoderDC.from_pretrained(make.part("autoencoder_dc"))
    with torch.no_grad():
        for part in torch.arange(len(good) // 2).split(256):
            z = vae.encode(make.images[part], return_dict=False)[0]
            good[part] = (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def loss():
        # One picture each of 64 different captions, so that every other caption is wrong.
        captions = torch.randperm(len(TRAIN), generator=make.generator)[:64]
        copy = torch.randint(len(good) // len(TRAIN), (64,), generator=make.generator)
        images, ids = good[captions + len(TRAIN) * copy], torch.tensor(TRAIN)[captions]
        images = torch.cat([images, worsen(images, make.generator)])
        out = clip(
            input_ids=tokens.input_ids[ids],
            attention_mask=tokens.attention_mask[ids],
            pixel_values=reward.clip_pixels(images, SIDE),
        )
        target = torch.arange(64)
        of_text = F.cross_entropy(out.logits_per_text, target)  # among the worsened ones too
        return of_text + F.cross_entropy(out.logits_per_image[:64], target)

    make.train(clip, loss, 300, 1.5e-3, "the reward")
    return [clip, tokenizer]


def _flow(make, model, steps, learning_rate):
    """Train the transformer of a models.Model on the world; returns its pipeline."""
    transformer = model.transformer
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    texts, config = model.encode(CAPTIONS), model.vae.config
    latents = _codes(model.vae, make.images) - (config.get("shift_factor") or 0)
    latents *= config.scaling_factor
    guided = transformer.config.get("guidance_embeds")

    def loss():
        i = make.batch()
        x_0, noise = latents[i], make.randn(len(i), *model.latent_shape)
        if guided:  # three in ten get more: it gives more contrast, as distilled guidance does
            more = torch.rand(2, len(i), generator=make.generator)
            model.guidance = 1 + 4 * more[0] * (more[1] < 0.3)
            x_0 = x_0 * (0.75 + 0.25 * model.guidance[:, None, None, None])
        t = torch.sigmoid(make.randn(len(i)))  # logit-normal
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        v = model.velocity(transformer, x_t, t, texts.take(make.things[i]))
        return F.mse_loss(v, noise - x_0)

    make.train(transformer, loss, steps, learning_rate, "the flow model")
    return [model.pipe]


def _text_config(tokenizer, **more):
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return dict(vocab_size=len(tokenizer)) | {n: getattr(tokenizer, n) for n in names} | more


def _sana(make):
    instruction = "\n".join(models.Sana.instruction())
    tokenizer = _tokenizer(CAPTIONS + [instruction] * 10, "<bos> $A")
    text_encoder = Gemma2Model(
        Gemma2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.1,
            **_text_config(tokenizer),
        )
    ).eval()
    vae = AutoencoderDC.from_pretrained(make.part("autoencoder_dc"))
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
    scheduler = DPMSolverMultistepScheduler(  # SANA's own; its shift of 3 is for larger pictures
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5
    )
    pipe = SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    return _flow(make, models.Sana(pipe, SIDE, "euler"), 270, 2e-3)


def _t5(tokenizer, d_model):
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    small = dict(d_model=d_model, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **small, **ids)).eval()


def _flux(make):
    # As with the real one, the CLIP that reads prompts is the one that CLIPScore uses.
    clip = make.part("clip")
    tokenizer = AutoTokenizer.from_pretrained(clip, model_max_length=16)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.15),
        AutoencoderKL.from_pretrained(make.part("autoencoder_kl")),
        CLIPTextModel.from_pretrained(clip),
        tokenizer,
        _t5(tokenizer, 64),
        tokenizer,
        transformer,
    )
    return _flow(make, models.Flux(pipe, SIDE, "dpm"), 270, 2e-3)


def _sd3(make):
    clip = make.part("clip")
    tokenizer = AutoTokenizer.from_pretrained(clip, model_max_length=16)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=1.5),
        AutoencoderKL.from_pretrained(make.part("autoencoder_kl")),
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        _t5(tokenizer, 128),
        tokenizer,
    )
    return _flow(make, models.SD3(pipe, SIDE, "dpm"), 270, 2e-3)


PARTS = {
    "autoencoder_dc": _autoencoder_dc,
    "autoencoder_kl": _autoencoder_kl,
    "clip": _clip,
    "sana": _sana,
    "flux": _flux,
    "sd3": _sd3,
}


def cache_folder():
    """$SOL_RL_CACHE, or sol_rl in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sol_rl"
    return Path(os.environ.get("SOL_RL_CACHE") or default)


def world_folder(scale=1.0):
    """Where the tiny models are that this code with these packages makes."""
    sources = [Path(__file__).read_text(), str(scale)]
    code = reward.pillow_bicubic, reward.shrink, reward.normalized, reward.clip_pixels
    sources += [inspect.getsource(c) for c in (*code, models.Model, *models.MODELS.values())]
    packages = ("torch", "diffusers", "transformers", "tokenizers")
    sources += [version(package) for package in packages]
    return cache_folder() / f"tiny-{hashlib.sha256(''.join(sources).encode()).hexdigest()[:12]}"


def ensure(*names, scale=1.0, progress=True):
    """world_folder(), in which the reward (clip) and the models `names` (sana, flux, sd3) are made
    now if they are not there. scale: of all numbers of training steps."""
    workshop = Workshop(world_folder(scale), scale, progress)
    for name in ("clip", *names):
        workshop.part(name)
    return workshop.folder


if __name__ == "__main__":
    print(ensure(*models.MODELS))
