"""Pretrain the tiny models, whose world is support/world.py.

    python experiments/pretrain_world.py [PART...]    # all that are missing; at most 6 minutes

They are diffusers' and transformers' own classes with small dimensions, in folders that
`from_pretrained` loads. `sana/`, `flux/` and `sd3/` are whole pipelines with a transformer, text
encoders, tokenizers and a scheduler of their own. `autoencoder_dc/` (SANA's) and `autoencoder_kl/`
(that of FLUX.1 and SD3.5) are shared by them. `clip/` is a CLIPModel that serves as the reward. It
learns to prefer the picture of a caption to other pictures and to bent, blurred and noisy copies of
it, so that it responds to fine detail. All are trained so briefly that shapes come out misshapen or
confused, which reinforcement learning then corrects.

The tiny models differ from real ones in this:
 1. The weights of Gemma2 and T5 are random. Different prompts have different features, and the
    transformer needs no more.
 2. The CLIP with which FLUX.1 and SD3.5 read prompts is the reward's.
 3. The flow models were never trained without a prompt, so there is no classifier-free guidance.

Each of the six folders takes about a minute on one core. A second thread at best halves that. But
the tensors are so small that where another process is busy, two threads wait for each other much
longer than they compute. So there is one thread.
"""

import argparse
import functools
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# isort: split

from support import models  # before transformers, which support/__init__.py silences

# isort: split

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

from support.preference import clip_pixels
from support.world import CAPTIONS, PRETRAINING, SIDE, TRAIN_PROMPTS, draw, models_folder


def degrade(images, generator):
    """Images (n, 3, h, w) in [0, 1], each bent, blurred and noised by a random amount: what the
    reward learns to prefer the originals to."""
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


class Builder:
    """What a part is built with: pictures, random numbers, a training loop and the other parts."""

    def __init__(self):
        self.folder = models_folder()
        self.generator = torch.Generator().manual_seed(0)

    @functools.cached_property
    def caption_ids(self):
        """Index in CAPTIONS of each picture, (n,): every training caption 14 times."""
        return train_caption_ids().repeat(14)

    @functools.cached_property
    def images(self):
        """The pictures float32 (n, 3, 32, 32) in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        batches = self.caption_ids.split(1024)
        return 2 * torch.cat([draw([CAPTIONS[i] for i in ids], generator) for ids in batches]) - 1

    def batch(self, n=64):
        """Random indices of n pictures."""
        return torch.randint(len(self.caption_ids), (n,), generator=self.generator)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def train(self, model, loss, part):
        """Train with AdamW, a warm-up and a linear decay, for as long and as fast as PRETRAINING
        says of this part. The model is left with averaged weights, frozen."""
        steps, learning_rate = PRETRAINING[part]
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 40, 1.0, 2 * (steps - i) / steps)
        )
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
        )
        for _ in tqdm(range(steps), desc=f"pretraining {part}"):
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
        """The folder of a part, which is built now if it is missing. It is written to a temporary
        folder and renamed, so it is either complete or absent."""
        folder = self.folder / name
        if folder.is_dir():
            return folder
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix="unfinished-"))
        try:
            with torch.random.fork_rng():  # a part is the same, whatever was built before it
                torch.manual_seed(0)
                for module in PARTS[name](Builder()):
                    module.save_pretrained(temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def train_caption_ids():
    return torch.tensor([CAPTIONS.index(prompt) for prompt in TRAIN_PROMPTS])


# ---------------------------------------------------------------------------------------------
# Autoencoders


def build_autoencoder_dc(builder):
    """SANA's autoencoder."""
    blocks = dict(block_types="ResBlock", block_out_channels=(16, 32, 64))
    blocks |= dict(layers_per_block=(0, 1, 1), qkv_multiscales=((), (), ()))
    both = {f"{half}_{key}": v for half in ("encoder", "decoder") for key, v in blocks.items()}
    vae = AutoencoderDC(latent_channels=8, **both)

    def loss():
        x = builder.images[builder.batch()]
        z = vae.encode(x, return_dict=False)[0]
        # Noise on the latents makes the decoder tolerate the errors of the flow model.
        z = z + 0.03 * z.std().detach() * builder.randn(*z.shape)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()

    builder.train(vae, loss, "autoencoder_dc")
    with torch.no_grad():
        scale = 1 / encode_images(vae, builder.images).std()
        vae.register_to_config(scaling_factor=scale.item())
    return [vae]


def build_autoencoder_kl(builder):
    """The autoencoder of FLUX.1 and of Stable Diffusion 3.5."""
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
        x = builder.images[builder.batch(8)]
        latents = vae.encode(x).latent_dist
        y = vae.decode(latents.sample(builder.generator), return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-6 * latents.kl().mean()

    builder.train(vae, loss, "autoencoder_kl")
    z = encode_images(vae, builder.images)
    vae.register_to_config(scaling_factor=(1 / z.std()).item(), shift_factor=z.mean().item())
    return [vae]


@torch.no_grad()
def encode_images(vae, images):
    """Latents of images in [-1, 1], before they are shifted and scaled."""
    encoded = [vae.encode(x) for x in images.split(256)]
    return torch.cat(
        [e.latent if isinstance(vae, AutoencoderDC) else e.latent_dist.mode() for e in encoded]
    )


# ---------------------------------------------------------------------------------------------
# The reward


def build_clip(builder):
    tokenizer = build_tokenizer(CAPTIONS, "<bos> $A <eos>")
    shared = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64)
    text_config = dict(max_position_embeddings=32, num_hidden_layers=2) | token_ids(tokenizer)
    vision_config = dict(image_size=SIDE, patch_size=4, num_hidden_layers=3)
    clip = CLIPModel(
        CLIPConfig(
            text_config=shared | text_config,
            vision_config=shared | vision_config,
            projection_dim=64,
        )
    )
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    # Half of the good pictures went through an autoencoder, as every sample will.
    good = builder.images / 2 + 0.5
    vae = AutoencoderDC.from_pretrained(builder.part("autoencoder_dc"))
    with torch.no_grad():
        for rows in torch.arange(len(good) // 2).split(256):
            z = vae.encode(builder.images[rows], return_dict=False)[0]
            good[rows] = (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    train_ids = train_caption_ids()
    n = len(train_ids)

    def loss():
        # One picture each of 64 different captions, so that every other caption is wrong.
        rows = torch.randperm(n, generator=builder.generator)[:64]
        copy = torch.randint(len(good) // n, (64,), generator=builder.generator)
        images, ids = good[rows + n * copy], train_ids[rows]
        images = torch.cat([images, degrade(images, builder.generator)])
        output = clip(
            input_ids=tokens.input_ids[ids],
            attention_mask=tokens.attention_mask[ids],
            pixel_values=clip_pixels(images, SIDE),
        )
        target = torch.arange(64)
        # A caption chooses among all 128 pictures; a good picture among the 64 captions.
        caption_loss = F.cross_entropy(output.logits_per_text, target)
        return caption_loss + F.cross_entropy(output.logits_per_image[:64], target)

    builder.train(clip, loss, "clip")
    return [clip, tokenizer]


# ---------------------------------------------------------------------------------------------
# Text


def build_tokenizer(texts, template):
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # <eos> must not be token 2: CLIPTextModel then works around an old error and pools elsewhere.
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


def token_ids(tokenizer):
    """A text encoder's options that follow from its tokenizer."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return dict(vocab_size=len(tokenizer)) | {name: getattr(tokenizer, name) for name in names}


def random_t5(tokenizer, d_model):
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(d_model=d_model, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).eval()


# ---------------------------------------------------------------------------------------------
# Flow models


def build_sana(builder):
    instruction = "\n".join(models.Sana.instruction)
    tokenizer = build_tokenizer(CAPTIONS + [instruction] * 10, "<bos> $A")
    text_encoder = Gemma2Model(
        Gemma2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.1,
            **token_ids(tokenizer),
        )
    ).eval()
    vae = AutoencoderDC.from_pretrained(builder.part("autoencoder_dc"))
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
    return train_flow(builder, models.Sana(pipe, SIDE, "euler"), "sana")


def build_flux(builder):
    # The CLIP that encodes prompts is also CLIPScore's, as with the published models.
    clip = builder.part("clip")
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
        AutoencoderKL.from_pretrained(builder.part("autoencoder_kl")),
        CLIPTextModel.from_pretrained(clip),
        tokenizer,
        random_t5(tokenizer, 64),
        tokenizer,
        transformer,
    )
    return train_flow(builder, models.Flux(pipe, SIDE, "dpm"), "flux")


def build_sd3(builder):
    clip = builder.part("clip")
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
        AutoencoderKL.from_pretrained(builder.part("autoencoder_kl")),
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        random_t5(tokenizer, 128),
        tokenizer,
    )
    return train_flow(builder, models.SD3(pipe, SIDE, "dpm"), "sd3")


def train_flow(builder, model, part):
    """Train the transformer of a models.Model by flow matching; returns [its pipeline]."""
    transformer = model.transformer
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    texts, config = model.encode(CAPTIONS), model.vae.config
    latents = encode_images(model.vae, builder.images) - (config.get("shift_factor") or 0)
    latents *= config.scaling_factor
    guided = transformer.config.get("guidance_embeds")

    def loss():
        rows = builder.batch()
        x_0, noise = latents[rows], builder.randn(len(rows), *model.latent_shape)
        if guided:
            # Three in ten have a guidance scale above 1. Like distilled guidance, it raises the
            # contrast.
            random = torch.rand(2, len(rows), generator=builder.generator)
            model.guidance = 1 + 4 * random[0] * (random[1] < 0.3)
            x_0 = x_0 * (0.75 + 0.25 * model.guidance[:, None, None, None])
        t = torch.sigmoid(builder.randn(len(rows)))  # logit-normal
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        v = model.velocity(transformer, x_t, t, texts.take(builder.caption_ids[rows]))
        return F.mse_loss(v, noise - x_0)

    builder.train(transformer, loss, part)
    return [model.pipe]


PARTS = {
    "autoencoder_dc": build_autoencoder_dc,
    "autoencoder_kl": build_autoencoder_kl,
    "clip": build_clip,
    "sana": build_sana,
    "flux": build_flux,
    "sd3": build_sd3,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: what all need")
    parts = parser.parse_args().parts or ["clip", *models.MODELS]
    if set(parts) - PARTS.keys():
        parser.error(f"parts: must be of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # of writing and loading, which takes no time
    for name in parts:
        print(Builder().part(name))


if __name__ == "__main__":
    main()
