"""Pretrain the tiny models that lie in support/tiny; their world is support/world.py.

    python experiments/pretrain_world.py            # every part that is missing in runs/tiny
    python experiments/pretrain_world.py sana flux  # only these, and what they are built on
    python experiments/pretrain_world.py judge      # the figures by which the models are judged

They are diffusers' and transformers' own classes with small dimensions, in BF16, in folders that
`from_pretrained` loads. `sana/`, `flux/` and `sd3/` are whole pipelines with a transformer, an
autoencoder, text encoders, tokenizers and a scheduler of their own. `clip/` is a CLIPModel that
serves as the reward. `classifier/` judges the pictures, and nothing is trained on what it says.

The flow models are trained on captions like those of the web, which are often wrong: each of the
five attributes is replaced with probability 0.2. So they draw clear shapes that often are not what
the prompt says, which reinforcement learning then corrects. The CLIP learns from right captions,
among them captions that differ in one attribute only, and from spoiled pictures.

The tiny models differ from real ones in this:
 1. The weights of Gemma2 and T5 are random. Different prompts have different features, and the
    transformer needs no more.
 2. The CLIP with which FLUX.1 and SD3.5 read prompts is the reward's.
 3. The flow models were never trained without a prompt, so there is no classifier-free guidance.

All parts take about two and a half hours on one core of an AMD EPYC with AVX512-BF16. The tensors
are so small that a second thread hardly helps. With two cores, make autoencoder_dc and
autoencoder_kl at the same time, then clip beside classifier and sana, then flux beside sd3.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# isort: split

from support import models  # before transformers, which support/__init__.py silences

# isort: split

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
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

from reward import build_reward
from rollout import sample
from support import world
from support.preference import clip_pixels
from support.world import ATTRIBUTES, CAPTIONS, SIDE, TRAIN_PROMPTS, VALUES, Classifier, draw

FOLDER = Path(__file__).parent.parent / "runs" / "tiny"
PRETRAINING = {  # what is trained -> (training steps, learning rate)
    "autoencoder_dc": (1600, 3e-3),
    "autoencoder_kl": (4000, 3e-3),
    "clip": (2000, 1.5e-3),
    "classifier": (1500, 2e-3),
    "sana": (8000, 2e-3),
    "flux": (9000, 2e-3),
    "sd3": (9000, 2e-3),
    "flux, with other pooled features": (5000, 2e-3),
    "sd3, with other pooled features": (5000, 2e-3),
}


def degrade(images, generator):
    """Images (n, 3, h, w) in [0, 1], each spoiled in one of three ways: what the reward learns to
    prefer the originals to. Half are bent, and some of these blurred or noisy too; a quarter have a
    second shape; through a quarter another picture shines."""
    n, _, h, w = images.shape
    amount = 0.4 + 0.6 * torch.rand(3, n, 1, 1, 1, generator=generator)
    amount[1:] *= torch.rand(2, n, 1, 1, 1, generator=generator) < 0.5
    bend = torch.randn(n, 2, 4, 4, generator=generator)
    bend = F.interpolate(bend, size=(h, w), mode="bicubic").permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, images.shape, align_corners=False)
    grid = grid + bend * amount[0] * (8.0 / w)
    bent = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(bent, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = torch.lerp(bent, blurred, amount[1] ** 2)
    noise = torch.randn(images.shape, generator=generator) * (0.15 * amount[2] ** 2)
    spoiled = (blurred + noise).clamp(0, 1)
    other = images.roll(n // 2 + 1, dims=0)
    spoiled[::4] = torch.minimum(images, other)[::4]  # shapes are darker than paper
    share = 0.25 + 0.5 * torch.rand(n, 1, 1, 1, generator=generator)
    spoiled[1::4] = torch.lerp(images, other, share)[1::4]
    return spoiled


class Builder:
    """What a part is built with: pictures, random numbers, a training loop and the other parts."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, n, captions=TRAIN_PROMPTS):
        """n random captions and pictures of them, float32 (n, 3, 32, 32) in [0, 1]."""
        rows = torch.randint(len(captions), (n,), generator=self.generator)
        captions = [captions[row] for row in rows]
        return captions, draw(captions, self.generator)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def train(self, model, loss, part):
        """Train with AdamW, a warm-up and a linear decay in the last third, for as long and as fast
        as PRETRAINING says. The model is left with averaged weights, frozen."""
        steps, learning_rate = PRETRAINING[part]
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 100, 1.0, 3 * (steps - i) / steps)
        )
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
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
        folder = FOLDER / name
        if folder.is_dir():
            return folder
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=FOLDER, prefix="unfinished-"))
        try:
            with torch.random.fork_rng():  # a part is the same, whatever was built before it
                torch.manual_seed(0)
                for module in PARTS[name](Builder()):
                    if isinstance(module, (torch.nn.Module, DiffusionPipeline)):
                        module.to(dtype=torch.bfloat16)
                    if isinstance(module, Classifier):
                        weights = module.state_dict()
                        safetensors.torch.save_file(weights, temporary / "model.safetensors")
                    else:
                        module.save_pretrained(temporary)
            for path in temporary.rglob("tokenizer.json"):  # without indents, a third of the size
                path.write_text(json.dumps(json.loads(path.read_text())))
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def autoencoders(self):
        return [
            AutoencoderDC.from_pretrained(self.part("autoencoder_dc"), dtype=torch.float32),
            AutoencoderKL.from_pretrained(self.part("autoencoder_kl"), dtype=torch.float32),
        ]


# ---------------------------------------------------------------------------------------------
# Autoencoders


def build_autoencoder_dc(builder):
    """SANA's autoencoder."""
    blocks = dict(block_types="ResBlock", block_out_channels=(16, 32, 64))
    blocks |= dict(layers_per_block=(0, 1, 1), qkv_multiscales=((), (), ()))
    both = {f"{half}_{key}": v for half in ("encoder", "decoder") for key, v in blocks.items()}
    vae = AutoencoderDC(latent_channels=8, **both)

    def loss():
        x = 2 * builder.draw(64)[1] - 1
        z = vae.encode(x, return_dict=False)[0]
        # Noise on the latents makes the decoder tolerate the errors of the flow model.
        z = z + 0.03 * z.std().detach() * builder.randn(*z.shape)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()

    builder.train(vae, loss, "autoencoder_dc")
    with torch.no_grad():
        scale = 1 / encode_images(vae, 2 * builder.draw(4096)[1] - 1).std()
        vae.register_to_config(scaling_factor=scale.item())
    return [vae]


def build_autoencoder_kl(builder):
    """The autoencoder of FLUX.1 and of Stable Diffusion 3.5."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        norm_num_groups=2,
        latent_channels=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.nn.init.constant_(vae.encoder.conv_out.bias[8:], -6.0)  # log variances: little noise

    def loss():
        x = 2 * builder.draw(32)[1] - 1
        latents = vae.encode(x).latent_dist
        z = latents.sample(builder.generator)
        z = z + 0.03 * z.std().detach() * builder.randn(*z.shape)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-6 * latents.kl().mean()

    builder.train(vae, loss, "autoencoder_kl")
    z = encode_images(vae, 2 * builder.draw(4096)[1] - 1)
    vae.register_to_config(scaling_factor=(1 / z.std()).item(), shift_factor=z.mean().item())
    return [vae]


@torch.no_grad()
def encode_images(vae, images):
    """Latents of images in [-1, 1], before they are shifted and scaled."""
    encoded = [vae.encode(x) for x in images.split(256)]
    return torch.cat(
        [e.latent if isinstance(vae, AutoencoderDC) else e.latent_dist.mode() for e in encoded]
    )


def latents_of(model, images):
    """Images (n, 3, h, w) in [0, 1] -> the latents float32 (n, c, h, w) that a models.Model's
    `decode` takes."""
    config = model.vae.config
    z = encode_images(model.vae, (2 * images - 1).to(model.vae.dtype)).float()
    return (z - (config.get("shift_factor") or 0)) * config.scaling_factor


# ---------------------------------------------------------------------------------------------
# The reward


def batch_of_neighbours(neighbours, generator):
    """64 different indices of training prompts: 16 groups of a prompt and three that differ from it
    in one attribute. neighbours: for each prompt, the indices of those that do."""
    chosen = {}
    for i in torch.randperm(len(neighbours), generator=generator).tolist():
        if len(chosen) == 64:
            break
        order = torch.randperm(len(neighbours[i]), generator=generator).tolist()
        free = [j for j in (neighbours[i][k] for k in order) if j not in chosen]
        if i not in chosen and len(free) >= 3:
            chosen |= dict.fromkeys([i, *free[:3]])
    return list(chosen)


@torch.no_grad()
def through_autoencoders(images, autoencoders):
    """The images in [0, 1], a quarter of which go through each of the two autoencoders."""
    images = images.clone()
    for i, vae in enumerate(autoencoders):
        z = encode_images(vae, 2 * images[i::4] - 1)
        images[i::4] = (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    return images


def build_clip(builder):
    tokenizer = build_tokenizer(CAPTIONS, "<bos> $A <eos>")
    shared = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64)
    text_config = dict(max_position_embeddings=32, num_hidden_layers=2) | token_ids(tokenizer)
    vision_config = dict(image_size=SIDE, patch_size=4, num_hidden_layers=4)
    clip = CLIPModel(
        CLIPConfig(
            text_config=shared | text_config,
            vision_config=shared | vision_config,
            projection_dim=64,
        )
    )
    tokens = tokenizer(TRAIN_PROMPTS, padding=True, return_tensors="pt")
    autoencoders = builder.autoencoders()
    rows = torch.tensor([ATTRIBUTES[prompt] for prompt in TRAIN_PROMPTS])
    apart = (rows[:, None] != rows).sum(dim=2) == 1
    neighbours = [row.nonzero().flatten().tolist() for row in apart]

    def loss():
        ids = batch_of_neighbours(neighbours, builder.generator)
        images = draw([TRAIN_PROMPTS[i] for i in ids], builder.generator)
        images = through_autoencoders(images, autoencoders)
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
# The classifier


def build_classifier(builder):
    """Of all captions, since it only judges: nothing is trained on what it says."""
    classifier, autoencoders = Classifier(), builder.autoencoders()

    def loss():
        captions, images = builder.draw(64, CAPTIONS)
        images = through_autoencoders(images, autoencoders)
        # A quarter are mixtures of two pictures, so that it is not sure of an unclear picture.
        share = torch.rand(64, generator=builder.generator)
        share[16:] = 1
        images = torch.lerp(images.roll(1, dims=0), images, share[:, None, None, None])
        noise = 0.05 * torch.rand(64, 1, 1, 1, generator=builder.generator)
        images = (images + noise * builder.randn(*images.shape)).clamp(0, 1)
        rows = torch.tensor([ATTRIBUTES[caption] for caption in captions])
        losses = []
        for logits, values in zip(classifier(images), rows.T):
            of_picture = F.cross_entropy(logits, values, reduction="none")
            of_other = F.cross_entropy(logits, values.roll(1), reduction="none")
            losses.append(torch.lerp(of_other, of_picture, share).mean())
        return sum(losses)

    builder.train(classifier, loss, "classifier")
    return [classifier]


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
    vae = AutoencoderDC.from_pretrained(builder.part("autoencoder_dc"), dtype=torch.float32)
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
    tokenizer = AutoTokenizer.from_pretrained(clip, model_max_length=10)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.15),
        AutoencoderKL.from_pretrained(builder.part("autoencoder_kl"), dtype=torch.float32),
        CLIPTextModel.from_pretrained(clip),
        tokenizer,
        random_t5(tokenizer, 64),
        tokenizer,
        transformer,
    )
    return train_flow(builder, models.Flux(pipe, SIDE, "dpm"), "flux")


def build_sd3(builder):
    clip = builder.part("clip")
    tokenizer = AutoTokenizer.from_pretrained(clip, model_max_length=10)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
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
        AutoencoderKL.from_pretrained(builder.part("autoencoder_kl"), dtype=torch.float32),
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        CLIPTextModelWithProjection.from_pretrained(clip),
        tokenizer,
        random_t5(tokenizer, 128),
        tokenizer,
    )
    return train_flow(builder, models.SD3(pipe, SIDE, "dpm"), "sd3")


def mislabelled(captions, generator):
    """The captions, each attribute of which is replaced by another with probability 0.2, as the
    captions of the web often are wrong. Held-out captions do not occur."""
    by_attributes, train_prompts = {row: c for c, row in ATTRIBUTES.items()}, set(TRAIN_PROMPTS)

    def replaced(value, num_values):
        if torch.rand((), generator=generator) >= 0.2:
            return value
        shift = 1 + torch.randint(num_values - 1, (), generator=generator).item()
        return (value + shift) % num_values

    labels = []
    for caption in captions:
        label = None
        while label not in train_prompts:
            values = zip(ATTRIBUTES[caption], map(len, VALUES))
            label = by_attributes[tuple(itertools.starmap(replaced, values))]
        labels.append(label)
    return labels


def train_flow(builder, model, part):
    """Train the transformer of a models.Model by flow matching on 20 pictures of each training
    caption; returns [its pipeline]."""
    transformer = model.transformer
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    captions = TRAIN_PROMPTS * 20
    images = torch.cat([draw(TRAIN_PROMPTS, builder.generator) for _ in range(20)])
    latents = latents_of(model, images)
    texts = model.encode(TRAIN_PROMPTS)
    index = {prompt: i for i, prompt in enumerate(TRAIN_PROMPTS)}
    labels = mislabelled(captions, builder.generator)
    text_rows = torch.tensor([index[label] for label in labels])
    guided = transformer.config.get("guidance_embeds")

    def loss():
        rows = torch.randint(len(captions), (64,), generator=builder.generator)
        x_0, noise = latents[rows], builder.randn(64, *model.latent_shape)
        if guided:
            # One in ten has a guidance scale above 1. Like distilled guidance, it raises the
            # contrast.
            random = torch.rand(2, 64, generator=builder.generator)
            model.guidance = 1 + 4 * random[0] * (random[1] < 0.1)
            x_0 = x_0 * (0.75 + 0.25 * model.guidance[:, None, None, None])
        t = torch.sigmoid(builder.randn(64))  # logit-normal
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        text = texts.take(text_rows[rows])
        if shuffle_pooled:
            order = torch.randperm(64, generator=builder.generator)
            text = text._replace(pooled=text.pooled[order])
        v = model.velocity(transformer, x_t, t, text)
        return F.mse_loss(v, noise - x_0)

    shuffle_pooled = False
    builder.train(transformer, loss, part)
    if texts.pooled is not None:
        # So far the pooled features of CLIP alone said much of what to draw. With those of other
        # captions, the transformer learns to read the tokens, by its attention, as published models
        # do. LoRA adapts the attention.
        shuffle_pooled = True
        transformer.requires_grad_(True)
        builder.train(transformer, loss, f"{part}, with other pooled features")
    return [model.pipe]


PARTS = {
    "autoencoder_dc": build_autoencoder_dc,
    "autoencoder_kl": build_autoencoder_kl,
    "clip": build_clip,
    "classifier": build_classifier,
    "sana": build_sana,
    "flux": build_flux,
    "sd3": build_sd3,
}
SHIPPED = ["clip", "classifier", "sana", "flux", "sd3"]


def judge():
    """Print how good the classifier and the flow models of support/tiny are."""
    generator = torch.Generator().manual_seed(1)
    prompts = world.HELD_OUT_PROMPTS * 4
    reward = build_reward("clipscore", clip=world.TINY / "clip")
    print("| pictures of held-out prompts | reward | match their prompt | clear |")
    print("| --- | --- | --- | --- |")

    def row(name, images):
        scores = [reward(images, prompts), *world.judge(images, prompts).values()]
        print(f"| {name} | {' | '.join(f'{values.mean():.3f}' for values in scores)} |")

    drawn = draw(prompts, generator)
    row("drawn", drawn)
    row("spoiled as for the reward", degrade(drawn, generator))
    for name in models.MODELS:
        model = models.load(name)
        decoded = model.decode(latents_of(model, drawn))
        row(f"drawn, through the autoencoder of {name}", decoded)
        noise = torch.randn(len(prompts), *model.latent_shape, generator=generator)
        x_0 = sample(model, model.transformer, model.encode(prompts), noise, 20)
        row(f"by {name} in 20 steps", model.decode(x_0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"judge, or of {', '.join(PARTS)}; none: all")
    parts = parser.parse_args().parts or SHIPPED
    if set(parts) - PARTS.keys() - {"judge"}:
        parser.error(f"parts: must be judge, or of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # of writing and loading, which takes no time
    for name in parts:
        if name == "judge":
            judge()
        else:
            print(Builder().part(name))
    if parts == SHIPPED:
        print(f"to use them, copy {', '.join(SHIPPED)} from {FOLDER} to {world.TINY}")


if __name__ == "__main__":
    main()
