"""SANA, FLUX.1 and Stable Diffusion 3.5: loading, prompts, velocity, decoding, LoRA.

Each model is one class that says where it is published, which settings the paper uses for it, which
layers LoRA adapts, which layers stay in BF16, and how its pipeline encodes prompts and calls its
transformer. The rest is shared. Everywhere in this project

    x_t = (1 - t) x_0 + t noise,   t in [0, 1],   t = 1 is noise,   v = noise - x_0
"""

import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from support import te  # noqa: F401  before peft, which cannot be imported beside a broken TE

# isort: split

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import world
from support.errors import InputError, one_line, require, written_whole
from support.hub import fetch

SOLVERS = ("euler", "dpm")
DECODED_PIXELS = 2**21  # of the images that are decoded at once: two of 1024 x 1024


class Text(NamedTuple):
    """n encoded prompts, as a transformer takes them."""

    embeds: torch.Tensor  # (n, tokens, channels)
    mask: torch.Tensor = None  # (n, tokens), 1 for a token, 0 for padding; SANA only
    pooled: torch.Tensor = None  # (n, channels); FLUX.1 and SD3.5 only

    def take(self, rows):
        """The Text of some rows: an index, or a list or tensor of indices, which may repeat."""
        rows = torch.as_tensor(rows, device=self.embeds.device).reshape(-1)
        return Text(*(None if part is None else part[rows] for part in self))

    def of(self, n):
        """n rows: these, or the only one n times."""
        return self.take([0] * n) if len(self.embeds) == 1 else self

    def to(self, device):
        return Text(*(None if part is None else part.to(device) for part in self))


class Model:
    """What the models share. A subclass sets these attributes and defines `encode_batch`."""

    pipeline = None  # diffusers' class
    published = ""  # id on the hub
    variant = None  # of the published files
    paper = {}  # the paper's options for this model where they differ from Config's defaults
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names of layers for LoRA
    keep_bf16 = ()  # parts of the names of layers that the explorer does not quantize
    token_limits = {}  # tokenizer -> number of tokens of a prompt that are read
    patch = None  # a token is patch x patch latents; None: as the transformer's config says

    def __init__(self, pipe, resolution, solver):
        self.pipe, self.transformer, self.vae = pipe, pipe.transformer, pipe.vae
        self.solver, config = solver, pipe.transformer.config
        prefix = f"--resolution {resolution}"
        multiple = pipe.vae_scale_factor * (self.patch or config.patch_size)
        fits = resolution > 0 and resolution % multiple == 0
        require(fits, f"{prefix}: must be a multiple of {multiple}")
        largest = multiple * config.get("pos_embed_max_size", resolution)  # only SD3.5 has one
        require(resolution <= largest, f"{prefix}: this model has positions up to {largest}")
        side = resolution // pipe.vae_scale_factor
        self.latent_shape = (self.vae.config.latent_channels, side, side)

    @property
    def computes_in(self):
        """ "bf16" or "float32": in which BF16 weights are multiplied."""
        return "bf16" if self.transformer.dtype == torch.bfloat16 else "float32"

    def token_limit(self, tokenizer):
        """Number of tokens of a prompt that are read, at most as many as the tokenizer allows."""
        return min(self.token_limits[tokenizer], getattr(self.pipe, tokenizer).model_max_length)

    def cut_off(self, prompts):
        """A line for each tokenizer for which some of the prompts are too long."""
        lines = []
        for name in self.token_limits:
            limit, token_ids = self.token_limit(name), getattr(self.pipe, name)(prompts).input_ids
            if too_long := sum(len(ids) > limit for ids in token_ids):
                lines.append(f"{too_long} prompts lose what comes after {limit} tokens ({name})")
        return lines

    @torch.no_grad()
    def encode(self, prompts):
        """A list of n prompts -> Text of n rows on the CPU, where the encoders wait while a GPU
        draws. Raises TypeError for a string."""
        if isinstance(prompts, str):
            raise TypeError("encode takes a list of prompts, not a string")
        parts = self.pipe.components.items()
        encoders = [part for name, part in parts if "text_encoder" in name and part]
        for encoder in encoders:
            encoder.to(self.transformer.device)
        batches = [prompts[i : i + 32] for i in range(0, len(prompts), 32)]
        texts = [self.encode_batch(batch, self.transformer.device).to("cpu") for batch in batches]
        for encoder in encoders:
            encoder.to("cpu")
        return Text(*(None if part[0] is None else torch.cat(part) for part in zip(*texts)))

    def scheduler(self, steps, shift=None, **timestep_options):
        """diffusers' scheduler of `solver`, with its timesteps set. shift: None: as published.
        No other setting of the published scheduler is used: some make the sampler stochastic."""
        config = self.pipe.scheduler.config
        shift = shift or config.get("shift", config.get("flow_shift"))
        options = dict(use_dynamic_shifting="mu" in timestep_options)
        if self.solver == "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)
        else:
            options |= dict(prediction_type="flow_prediction", use_flow_sigmas=True)
            scheduler = diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **options)
        scheduler.set_timesteps(steps, **timestep_options)
        scheduler.set_begin_index(0)
        return scheduler

    @torch.no_grad()
    def decode(self, latents):
        """Latents (n, c, h, w) -> images float32 (n, 3, H, W) in [0, 1]."""
        config = self.vae.config
        z = latents.to(self.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0)
        pixels = (z.shape[-1] * self.pipe.vae_scale_factor) ** 2
        parts = z.split(max(1, DECODED_PIXELS // pixels))
        images = [self.vae.decode(part, return_dict=False)[0].float() for part in parts]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def velocity(self, transformer, x_t, t, text):
        """v float32 like x_t (n, c, h, w), at times t (n,) in [0, 1], without guidance.

        transformer: this model's or a copy of it; text: Text of n rows, or of one row for all, on
        the same device.
        """
        dtype, text = transformer.dtype, text.of(len(x_t))
        timestep = (1000 * t).to(x_t.device, torch.float32)
        timestep = timestep * transformer.config.get("timestep_scale", 1.0)  # SANA has one
        inputs = dict(encoder_hidden_states=text.embeds.to(dtype), timestep=timestep)
        if text.mask is not None:
            inputs["encoder_attention_mask"] = text.mask
        if text.pooled is not None:
            inputs["pooled_projections"] = text.pooled.to(dtype)
        return transformer(x_t.to(dtype), **inputs, return_dict=False)[0].float()

    def call(self, steps):
        """Keyword arguments, as Python source, with which the pipeline draws as this project does
        in that many steps."""
        return {"max_sequence_length": self.token_limit(list(self.token_limits)[-1])}


class Sana(Model):
    """SANA (arXiv 2410.10629): linear attention, deep-compression autoencoder, Gemma2."""

    pipeline = diffusers.SanaPipeline
    published = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    variant = "bf16"
    paper = dict(resolution=1024, solver="euler", min_dim=2240, train_micro_batch=16)
    # In the published code one fused layer makes self-attention's q, k and v; it stays in BF16.
    keep_bf16 = ("patch_embed", "time_embed", "caption_projection", "proj_out")
    keep_bf16 += ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    token_limits = {"tokenizer": 300}

    def call(self, steps):
        call = {"use_resolution_binning": False}  # binning samples at another size
        if self.solver == "euler":
            call["sigmas"] = f"[1 - i / {steps} for i in range({steps})]"
        return call | {"complex_human_instruction": None}

    def scheduler(self, steps):
        """Euler's times are 1, 1 - 1 / steps, ..., 1 / steps, without a shift, as in the authors'
        code. (diffusers' own end near 0, of 10 times at .0089, where a sample hardly changes.)"""
        if self.solver != "euler":
            return super().scheduler(steps)
        return super().scheduler(steps, shift=1.0, sigmas=[1 - i / steps for i in range(steps)])

    def encode(self, prompts):
        """Pads to the longest of the prompts only. Attention masks padding out, and the pipeline's
        padding to 300 tokens costs more than the prompts themselves."""
        token_ids = self.pipe.tokenizer([prompt.lower() for prompt in prompts]).input_ids
        self.max_tokens = min(self.token_limit("tokenizer"), max(map(len, token_ids)) + 2)
        return super().encode(prompts)

    def encode_batch(self, prompts, device):
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            complex_human_instruction=None,
            max_sequence_length=self.max_tokens,
            device=device,
        )
        return Text(embeds, mask=mask)


class Flux(Model):
    """FLUX.1: blocks of two streams and of one, packed latents, CLIP and T5. Guidance is distilled
    into an embedding of its scale, which the paper sets to 1."""

    pipeline = diffusers.FluxPipeline
    published = "black-forest-labs/FLUX.1-dev"
    paper = dict(resolution=512, solver="dpm", min_dim=1000, train_micro_batch=12)
    paper |= dict(eval_steps=28, timestep_fraction=0.4)
    keep_bf16 = ("x_embedder", "context_embedder", "time_text_embed", "norm_out")
    token_limits = {"tokenizer": 77, "tokenizer_2": 128}
    patch = 2  # 2 x 2 latents are packed into one token before the transformer
    guidance = 1.0

    def encode_batch(self, prompts, device):
        tokens = self.token_limit("tokenizer_2")
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, max_sequence_length=tokens, device=device
        )
        return Text(embeds, pooled=pooled)

    def velocity(self, transformer, x_t, t, text):
        """As in Model, but x_t is packed, and a guidance scale is one of the inputs."""
        dtype, device, text = transformer.dtype, x_t.device, text.of(len(x_t))
        (n, c, h, w), scale = x_t.shape, self.pipe.vae_scale_factor
        guidance = torch.as_tensor(self.guidance, device=device).expand(n)
        v = transformer(
            self.pipe._pack_latents(x_t, n, c, h, w).to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            pooled_projections=text.pooled.to(dtype),
            # The transformer takes t and multiplies it by 1000; this rounds as the pipeline does.
            timestep=(1000 * t).to(device, torch.float32) / 1000,
            guidance=guidance if transformer.config.guidance_embeds else None,
            img_ids=self.pipe._prepare_latent_image_ids(n, h // 2, w // 2, device, dtype),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=device, dtype=dtype),
            return_dict=False,
        )[0].float()
        return self.pipe._unpack_latents(v, h * scale, w * scale, scale)

    def scheduler(self, steps):
        """The shift grows with the number of image tokens, except for FLUX.1-schnell."""
        config, options = self.pipe.scheduler.config, {}
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        by_tokens = {name: config[name] for name in names}
        if config.use_dynamic_shifting:
            tokens = (self.latent_shape[1] // 2) ** 2
            options["mu"] = calculate_shift(tokens, *by_tokens.values())
        if self.solver == "euler":
            options["sigmas"] = np.linspace(1, 1 / steps, steps)  # as the pipeline does
        scheduler = super().scheduler(steps, **options)
        scheduler.register_to_config(**by_tokens)  # the pipeline looks for them there
        return scheduler


class SD3(Model):
    """Stable Diffusion 3.5 Large: joint attention with normalized queries and keys; the features of
    two CLIPs and T5 side by side."""

    pipeline = diffusers.StableDiffusion3Pipeline
    published = "stabilityai/stable-diffusion-3.5-large"
    paper = dict(resolution=1024, solver="dpm", min_dim=2432, train_micro_batch=4)
    paper |= dict(max_grad_norm=0.002)
    lora_targets = Model.lora_targets + ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    # The paper's list says "norm1"; we take it to mean norm1 and norm1_context.
    keep_bf16 = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "ff_context")
    keep_bf16 += ("norm1", "norm1_context")
    token_limits = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 128}

    def encode_batch(self, prompts, device):
        options = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        options |= dict(max_sequence_length=self.token_limit("tokenizer_3"), device=device)
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, **options)
        return Text(embeds, pooled=pooled)


MODELS = {"sana": Sana, "flux": Flux, "sd3": SD3}


def compute_dtype(device):
    """The dtype in which a device computes fast: BF16 on a GPU, float32 on a CPU. Most CPUs take 10
    to 50 times as long for a matmul in BF16; those with AVX512-BF16 gain only 5% of a run by it."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load(name, folder=None, resolution=None, solver=None, device="cpu", dtype=None):
    """The model `name` of MODELS, frozen, in `dtype` on `device`.

    folder: a diffusers folder, an id on the hub, or "published"; None is the tiny model.
    dtype: None is that of `compute_dtype`. The tiny models' weights are BF16 numbers in any dtype.
    resolution: side of the images in pixels, solver: of SOLVERS; None is the paper's choice (of the
    tiny model's resolution, 32). Raises InputError if that model cannot be loaded or the resolution
    does not suit it.
    """
    model_class, paper = MODELS[name], MODELS[name].paper
    folder = model_class.published if folder == "published" else folder
    if folder is None:
        folder, resolution = world.TINY / name, resolution or world.SIDE
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options = dict(dtype=dtype or compute_dtype(device), use_safetensors=True)
    path = Path(folder)
    # SANA's text encoder is published only as a variant, so copies of it have only that, too.
    if folder == model_class.published or any(path.glob("*/*.bf16*.safetensors")):
        options["variant"] = model_class.variant
    try:
        if not path.is_dir():
            path = fetch(str(folder), ["model_index.json"], whole=True)
        parts = json.loads((path / "model_index.json").read_text())
        found, needed = parts["_class_name"], model_class.pipeline.__name__
        require(found == needed, f"it is a {found}, but --model {name} needs a {needed}")
        encoders = {}
        for part in [name for name in parts if name.startswith("text_encoder") and parts[name][1]]:
            # Loaded here because the pipeline would fill missing weights with random numbers.
            encoders[part], info = getattr(transformers, parts[part][1]).from_pretrained(
                folder, subfolder=part, output_loading_info=True, **options
            )
            missing = sorted(info["missing_keys"])
            require(not missing, f"{part} lacks the weights {missing[:3]}")
        pipe = model_class.pipeline.from_pretrained(folder, **encoders, **options).to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files raise exceptions of any kind
        raise InputError(f"--pretrained {folder}: cannot be loaded: {one_line(error)}") from error
    for part in (pipe.transformer, pipe.vae, *encoders.values()):
        part.requires_grad_(False)
    return model_class(pipe, resolution or paper["resolution"], solver or paper["solver"])


def attention_for_training(device):
    """A context in which attention is fast with gradients. On a CPU the backward pass of PyTorch's
    fused kernel takes longer than that of plain matmuls, which need more memory."""
    if torch.device(device).type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


# LoRA: three adapters on one frozen base model. "default" is the policy, which is trained; "old" is
# the old policy, which draws; "ema" is evaluated and saved.

ADAPTERS = ("default", "old", "ema")


def add_lora(model, rank, alpha, path=""):
    """Add the three adapters in float32, with equal values. Only "default" requires gradients.

    path: a LoRA in diffusers' or peft's format, a folder, file or id on the hub, whose layers and
    values they get; without it values are drawn with torch's global generator. Raises InputError if
    that LoRA cannot be loaded as a whole or has another rank, ValueError if there is one already.
    """
    transformer, state, targets = model.transformer, {}, list(model.lora_targets)
    if path:
        try:
            state = read_lora(model, rank, alpha, path)
        except Exception as error:  # broken files raise exceptions of any kind
            raise InputError(f"--lora {path}: cannot be loaded: {one_line(error)}") from error
        # A regular expression, because a list also means layers whose names only end like these.
        targets = "|".join(sorted({re.escape(name.split(".lora_")[0]) for name in state}))
    options = dict(init_lora_weights="gaussian", target_modules=targets)
    for adapter in ADAPTERS:
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, **options), adapter)
        for p in lora_parameters(transformer, adapter):
            p.data = p.data.float()
        state = state or get_peft_model_state_dict(transformer, adapter_name=adapter)
        set_peft_model_state_dict(transformer, state, adapter)
    transformer.set_adapter("default")


def read_lora(model, rank, alpha, path):
    """A LoRA as {"LAYER.lora_A.weight" or "LAYER.lora_B.weight": float32}, with lora_B scaled to
    this alpha. Raises an exception of any kind unless every tensor of the file has a place here."""
    folder = (
        Path(path)
        if Path(path).exists()
        else fetch(path, ["*.safetensors"], optional=["adapter_config.json"])
    )
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    require(len(files) == 1, f"give one safetensors file; here are {[f.name for f in files]}")
    with safe_open(files[0], "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        config = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    if (peft_config := files[0].with_name("adapter_config.json")).exists():
        config = peft_config.read_text()
    prefix = r"^(transformer|base_model\.model)\."
    state = {re.sub(prefix, "", key): tensor for key, tensor in state.items()}
    config = {re.sub(prefix, "", key): value for key, value in json.loads(config).items()}
    require(not config.get("alpha_pattern"), "its layers have different alphas")
    found = {}
    for name, layer in model.transformer.named_modules():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if a in state and b in state:
            A, B = state.pop(a).float(), state.pop(b).float()
            advice = f"give --lora_rank {len(A)} if all layers have it"
            require(len(A) == rank, f"{name} has rank {len(A)}; {advice}")
            own_alpha = float(state.pop(f"{name}.alpha", config.get("lora_alpha", rank)))
            B *= own_alpha / (rank**0.5 if config.get("use_rslora") else rank) * rank / alpha
            change = B.flatten(1) @ A.flatten(1)
            fits = change.shape == layer.weight.flatten(1).shape
            require(fits, f"{name} has another shape in this model")
            require(change.isfinite().all(), f"{name} holds NaN or infinity")
            found |= {a: A, b: B}
    first = min(state, default=None)
    advice = "only pairs of lora_A and lora_B for layers of the transformer are read"
    require(found and not state, f"{len(state)} tensors have no place, first {first}; {advice}")
    return found


def lora_parameters(transformer, adapter):
    """The adapter's parameters, always in the same order."""
    part = f".{adapter}."
    return [p for name, p in transformer.named_parameters() if part in name and "lora_" in name]


def lora_layers(transformer):
    """(name, layer) of each layer that has adapters."""
    return [(name, m) for name, m in transformer.named_modules() if isinstance(m, LoraLayer)]


@contextlib.contextmanager
def policy(transformer, adapter):
    """Inside, `transformer` uses this adapter, or none if `adapter` is "base". Afterwards it uses
    "default" again, whose parameters alone require gradients."""
    if adapter == "base":
        transformer.disable_adapters()
    else:
        transformer.set_adapter(adapter)
    try:
        yield transformer
    finally:
        transformer.enable_adapters()
        transformer.set_adapter("default")


@torch.no_grad()
def follow(transformer, follower, eta):
    """follower <- eta * follower + (1 - eta) * default, for every LoRA parameter."""
    default = lora_parameters(transformer, "default")
    for p, new in zip(lora_parameters(transformer, follower), default):
        p.lerp_(new, 1 - eta)


def save_lora(model, adapter, folder):
    """Write folder/pytorch_lora_weights.safetensors, which diffusers' pipelines load. Programs that
    read no alpha multiply lora_B lora_A by 1. So the file has alpha = rank, and lora_B is scaled.
    """
    config = model.transformer.peft_config[adapter]
    state = get_peft_model_state_dict(model.transformer, adapter_name=adapter)
    for name in state:
        if "lora_B" in name:
            state[name] = state[name] * (config.lora_alpha / config.r)
    layers = sorted({name.split(".lora_")[0] for name in state})
    metadata = dict(r=config.r, lora_alpha=config.r, target_modules=layers)
    with written_whole(Path(folder) / "pytorch_lora_weights.safetensors") as path:
        model.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=metadata,
            weight_name=path.name,
        )
