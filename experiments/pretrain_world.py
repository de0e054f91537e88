"""Pretrain the tiny models that lie in support/tiny; their world is support/world.py.

    python experiments/pretrain_world.py            # every part that is missing in runs/tiny
    python experiments/pretrain_world.py sana flux  # only these, and what they are built on
    python experiments/pretrain_world.py judge      # the figures by which the models are judged

They are of diffusers' and transformers' own classes, in BF16. Sizes, tokenizers and schedulers are
read from support/tiny. `sana/`, `flux/` and `sd3/` are whole pipelines. `clip/` is a CLIPModel that
serves as the reward. `classifier/` judges the pictures; nothing is trained on what it says.

The flow models are trained on captions like those of the web, which are often wrong: each of the
five attributes is replaced with probability 0.2. So they draw clear shapes that often are not what
the prompt says, which reinforcement learning then corrects. The CLIP learns from right captions,
among them captions that differ in one attribute only, and from spoiled pictures.

docs/models.md says in what the tiny models differ from the published ones.
All parts take about two and a half hours on one core of an AMD EPYC with AVX512-BF16.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import models  # before torch, because support prepares OpenMP

# isort: split

import diffusers
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from reward import build_reward
from rollout import sample
from support import world
from support.preference import clip_pixels
from support.world import ATTRIBUTES, CAPTIONS, SIDE, TINY, TRAIN_PROMPTS, VALUES, draw

FOLDER = Path(__file__).parent.parent / "runs" / "tiny"
CAPTION_OF = {row: caption for caption, row in ATTRIBUTES.items()}
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


def random_pictures(n, generator, captions=TRAIN_PROMPTS):
    """n random captions and pictures of them, float32 (n, 3, 32, 32) in [0, 1]."""
    captions = [captions[i] for i in torch.randint(len(captions), (n,), generator=generator)]
    return captions, draw(captions, generator)


def fresh(folder):
    """A module with random weights, of the class and the sizes of the one in support/tiny."""
    config = json.loads((TINY / folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    module_class = getattr(transformers, config["architectures"][0])
    return module_class(module_class.config_class.from_pretrained(TINY / folder)).eval()


def pretrain(model, loss, part):
    """Train with AdamW, a warm-up and a linear decay in the last third, as PRETRAINING says. The
    model is left with averaged weights, frozen."""
    steps, learning_rate = PRETRAINING[part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / 100, 1.0, 3 * (steps - i) / steps))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
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


def part(name):
    """The folder of a part, which is built now if it is missing, and is complete or absent."""
    folder = FOLDER / name
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    # A part is the same, whatever was built before it.
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary, torch.random.fork_rng():
        torch.manual_seed(0)
        for module in PARTS[name](torch.Generator().manual_seed(0)):
            if isinstance(module, (torch.nn.Module, diffusers.DiffusionPipeline)):
                module.to(dtype=torch.bfloat16)
            if name == "classifier":
                safetensors.torch.save_file(module.state_dict(), f"{temporary}/model.safetensors")
            else:
                module.save_pretrained(temporary)
        for path in Path(temporary).rglob("tokenizer.json"):  # without indents: a third of the size
            path.write_text(json.dumps(json.loads(path.read_text())))
        return Path(temporary).rename(folder)


# ---------------------------------------------------------------------------------------------
# Autoencoders

AUTOENCODERS = {  # name -> (folder of the shipped one, batch)
    "autoencoder_dc": ("sana/vae", 64),
    "autoencoder_kl": ("flux/vae", 32),  # of SD3.5 too
}


def build_autoencoder(generator, name):
    folder, batch = AUTOENCODERS[name]
    vae = fresh(folder)
    variational = isinstance(vae, diffusers.AutoencoderKL)
    if variational:  # log variances: little noise
        torch.nn.init.constant_(vae.encoder.conv_out.bias[8:], -6.0)

    def loss():
        x = 2 * random_pictures(batch, generator)[1] - 1
        if variational:
            latents = vae.encode(x).latent_dist
            z, penalty = latents.sample(generator), 1e-6 * latents.kl().mean()
        else:
            z = vae.encode(x).latent
            penalty = 1e-4 * z.square().mean()
        # Noise on the latents makes the decoder tolerate the errors of the flow model.
        z = z + 0.03 * z.std().detach() * torch.randn(z.shape, generator=generator)
        y = vae.decode(z, return_dict=False)[0]
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + penalty

    pretrain(vae, loss, name)
    z = encode_images(vae, 2 * random_pictures(4096, generator)[1] - 1)
    shift = dict(shift_factor=z.mean().item()) if variational else {}
    vae.register_to_config(scaling_factor=(1 / z.std()).item(), **shift)
    return [vae]


def autoencoder(name):
    return diffusers.AutoModel.from_pretrained(str(part(name)), dtype=torch.float32)


@torch.no_grad()
def encode_images(vae, images):
    """Latents of images in [-1, 1], before they are shifted and scaled."""
    encoded = [vae.encode(x) for x in images.split(256)]
    return torch.cat([e.latent if "latent" in e else e.latent_dist.mode() for e in encoded])


def latents_of(model, images):
    """Images (n, 3, h, w) in [0, 1] -> float32 (n, c, h, w), what a models.Model decodes."""
    config = model.vae.config
    z = encode_images(model.vae, (2 * images - 1).to(model.vae.dtype)).float()
    return (z - (config.get("shift_factor") or 0)) * config.scaling_factor


# ---------------------------------------------------------------------------------------------
# The reward and the classifier


def batch_of_neighbours(neighbours, generator):
    """64 different indices of training prompts: 16 groups of a prompt and three that differ from it
    in one attribute. neighbours: for each prompt, the indices of those that do."""
    chosen = []
    for i in torch.randperm(len(neighbours), generator=generator).tolist():
        order = torch.randperm(len(neighbours[i]), generator=generator).tolist()
        free = [neighbours[i][k] for k in order if neighbours[i][k] not in chosen]
        if i not in chosen and len(free) >= 3:
            chosen += [i, *free[:3]]
        if len(chosen) == 64:
            return chosen


@torch.no_grad()
def through_autoencoders(images, vaes):
    """The images in [0, 1], a quarter of which go through each of the two autoencoders."""
    images = images.clone()
    for i, vae in enumerate(vaes):
        z = encode_images(vae, 2 * images[i::4] - 1)
        images[i::4] = (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    return images


def build_clip(generator):
    clip, tokenizer = fresh("clip"), transformers.AutoTokenizer.from_pretrained(TINY / "clip")
    tokens = tokenizer(TRAIN_PROMPTS, padding=True, return_tensors="pt")
    vaes = [autoencoder(name) for name in AUTOENCODERS]
    rows = torch.tensor([ATTRIBUTES[prompt] for prompt in TRAIN_PROMPTS])
    apart = (rows[:, None] != rows).sum(dim=2) == 1
    neighbours = [row.nonzero().flatten().tolist() for row in apart]

    def loss():
        ids = batch_of_neighbours(neighbours, generator)
        images = draw([TRAIN_PROMPTS[i] for i in ids], generator)
        images = through_autoencoders(images, vaes)
        images = torch.cat([images, degrade(images, generator)])
        of_captions = {name: values[ids] for name, values in tokens.items()}
        output = clip(**of_captions, pixel_values=clip_pixels(images, SIDE))
        target = torch.arange(64)
        # A caption chooses among all 128 pictures; a good picture among the 64 captions.
        caption_loss = F.cross_entropy(output.logits_per_text, target)
        return caption_loss + F.cross_entropy(output.logits_per_image[:64], target)

    pretrain(clip, loss, "clip")
    return [clip, tokenizer]


def build_classifier(generator):
    """It learns all captions, because nothing is trained on what it says."""
    classifier, vaes = world.Classifier(), [autoencoder(name) for name in AUTOENCODERS]

    def loss():
        captions, images = random_pictures(64, generator, CAPTIONS)
        images = through_autoencoders(images, vaes)
        # A quarter are mixtures of two pictures, so that it is not sure of an unclear picture.
        share = torch.rand(64, generator=generator)
        share[16:] = 1
        images = torch.lerp(images.roll(1, dims=0), images, share[:, None, None, None])
        noise = 0.05 * torch.rand(64, 1, 1, 1, generator=generator)
        images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        rows = torch.tensor([ATTRIBUTES[caption] for caption in captions])
        losses = []
        for logits, values in zip(classifier(images), rows.T):
            of_picture = F.cross_entropy(logits, values, reduction="none")
            of_other = F.cross_entropy(logits, values.roll(1), reduction="none")
            losses.append(torch.lerp(of_other, of_picture, share).mean())
        return sum(losses)

    pretrain(classifier, loss, "classifier")
    return [classifier]


# ---------------------------------------------------------------------------------------------
# Flow models


def build_sana(generator):
    parts = dict(text_encoder=fresh("sana/text_encoder"), vae=autoencoder("autoencoder_dc"))
    return train_flow(generator, "sana", **parts, transformer=fresh("sana/transformer"))


def build_with_clip(generator, name, clip_classes):
    """FLUX.1 or SD3.5. The CLIP that encodes prompts is also CLIPScore's, as with the published
    models; the last text encoder is T5."""
    parts = dict(transformer=fresh(f"{name}/transformer"))
    for suffix, clip_class in zip(("", "_2"), clip_classes):
        parts[f"text_encoder{suffix}"] = clip_class.from_pretrained(part("clip"))
    t5 = f"text_encoder_{len(parts)}"
    parts[t5] = fresh(f"{name}/{t5}")
    return train_flow(generator, name, **parts, vae=autoencoder("autoencoder_kl"))


def mislabelled(caption, generator):
    """The caption, each attribute of which is replaced by another with probability 0.2, as the
    captions of the web often are wrong. It is never a held-out caption."""

    def replaced(value, words):
        if torch.rand((), generator=generator) >= 0.2:
            return value
        shift = 1 + torch.randint(len(words) - 1, (), generator=generator).item()
        return (value + shift) % len(words)

    label = CAPTION_OF[tuple(map(replaced, ATTRIBUTES[caption], VALUES))]
    return label if label in TRAIN_PROMPTS else mislabelled(caption, generator)


def train_flow(generator, name, transformer, **parts):
    """Train a model's transformer by flow matching on 20 pictures of each training caption. Returns
    [the pipeline of these parts; tokenizers and scheduler are those of support/tiny]."""
    model_class, parts = models.MODELS[name], parts | {"transformer": transformer}
    loaded = model_class.pipeline.from_pretrained(TINY / name, **parts)
    pipe = model_class.pipeline(**loaded.components)  # without the path of support/tiny
    model = model_class(pipe, SIDE, model_class.paper["solver"])
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    images = torch.cat([draw(TRAIN_PROMPTS, generator) for _ in range(20)])
    latents, texts = latents_of(model, images), model.encode(TRAIN_PROMPTS)
    labels = [mislabelled(caption, generator) for caption in TRAIN_PROMPTS * 20]
    text_rows = torch.tensor([TRAIN_PROMPTS.index(label) for label in labels])

    def loss(shuffle_pooled=False):
        rows = torch.randint(len(latents), (64,), generator=generator)
        x_0, noise = latents[rows], torch.randn(64, *model.latent_shape, generator=generator)
        if transformer.config.get("guidance_embeds"):
            # One in ten has a guidance scale above 1, which raises the contrast.
            random = torch.rand(2, 64, generator=generator)
            model.guidance = 1 + 4 * random[0] * (random[1] < 0.1)
            x_0 = x_0 * (0.75 + 0.25 * model.guidance[:, None, None, None])
        t = torch.sigmoid(torch.randn(64, generator=generator))  # logit-normal
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        text = texts.take(text_rows[rows])
        if shuffle_pooled:
            text = text._replace(pooled=text.pooled[torch.randperm(64, generator=generator)])
        return F.mse_loss(model.velocity(transformer, x_t, t, text), noise - x_0)

    pretrain(transformer, loss, name)
    if texts.pooled is not None:
        # So far the pooled features of CLIP alone said much of what to draw. With those of other
        # captions, the transformer learns to read the tokens by its attention, which LoRA adapts.
        transformer.requires_grad_(True)
        pretrain(transformer, partial(loss, True), f"{name}, with other pooled features")
    return [pipe]


PARTS = {
    **{name: partial(build_autoencoder, name=name) for name in AUTOENCODERS},
    "clip": build_clip,
    "classifier": build_classifier,
    "sana": build_sana,
    "flux": partial(build_with_clip, name="flux", clip_classes=[CLIPTextModel]),
    "sd3": partial(build_with_clip, name="sd3", clip_classes=[CLIPTextModelWithProjection] * 2),
}
SHIPPED = ["clip", "classifier", "sana", "flux", "sd3"]


def judge():
    """Print how good the classifier and the flow models of support/tiny are."""
    generator, prompts = torch.Generator().manual_seed(1), world.HELD_OUT_PROMPTS * 4
    drawn, reward = draw(prompts, generator), build_reward("clipscore", clip="tiny")
    pictures = {"drawn": drawn, "spoiled as for the reward": degrade(drawn, generator)}
    for name in models.MODELS:
        model = models.load(name)
        through = model.decode(latents_of(model, drawn))
        noise = torch.randn(len(prompts), *model.latent_shape, generator=generator)
        x_0 = sample(model, model.transformer, model.encode(prompts), noise, 20)
        pictures[f"drawn, through the autoencoder of {name}"] = through
        pictures[f"by {name} in 20 steps"] = model.decode(x_0)
    print("| pictures of held-out prompts | reward | match | clear |\n| --- | --- | --- | --- |")
    for name, images in pictures.items():
        scores = [reward(images, prompts), *world.judge(images, prompts).values()]
        print(f"| {name} | {' | '.join(f'{values.mean():.3f}' for values in scores)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = dict(choices=["judge", *PARTS], default=SHIPPED)
    parser.add_argument("parts", nargs="*", **known, help="default: all that is shipped")
    parts = parser.parse_args().parts
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # of writing and loading, which takes no time
    for name in parts:
        judge() if name == "judge" else print(part(name))
    if parts == SHIPPED:
        print(f"to use them, copy {', '.join(SHIPPED)} from {FOLDER} to {TINY}")


if __name__ == "__main__":
    main()
