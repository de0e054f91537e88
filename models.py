"""Text-to-image flow models: loading, prompts, velocity, decoding, LoRA.

A family is one class: where it is published, the paper's settings for it, which layers LoRA adapts
and which stay in BF16, and how its pipeline encodes prompts and calls its transformer. All else is
shared. Convention everywhere:

    x_t = (1 - t) x_0 + t noise,   t in [0, 1],   t = 1 is noise,   v = noise - x_0
"""

import contextlib
import copy
import inspect
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else importing FLUX.1 warns twice
import engine  # noqa: F401  before peft, which does not import beside a broken Transformer Engine

# isort: split

import numpy as np
import torch
import transformers
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    build_hf_headers,
    hf_raise_for_status,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

import quant

SOLVERS = ("euler", "dpm")
PIXELS_AT_ONCE = 2**21  # that are decoded: two images of 1024 x 1024


class ModelError(ValueError):
    """A model that cannot be loaded or used as asked: one line for the user."""


class Text(NamedTuple):
    """What a transformer reads of n prompts."""

    embeds: torch.Tensor  # (n, tokens, channels)
    mask: torch.Tensor = None  # (n, tokens), 1 where a token is; for families that mask padding
    pooled: torch.Tensor = None  # (n, channels), for families that have it

    def map(self, function):
        return Text(*(None if part is None else function(part) for part in self))

    def take(self, rows):
        """The same for other rows: an index, a list or a tensor of them, repeats allowed."""
        rows = torch.as_tensor(rows, device=self.embeds.device).reshape(-1)
        return self.map(lambda part: part[rows])

    def to(self, device):
        return self.map(lambda part: part.to(device))


class Model:
    """What all families share. A subclass sets the names below and has `encode_some` and
    `velocity`; it overrides what is different with it."""

    pipeline = None  # diffusers' class
    published = ""  # the hub's id
    variant = None  # of the published files
    paper = {}  # the paper's options where they are not Config's defaults
    lora_targets = ()
    keep_bf16 = ()  # parts of names of layers that the explorer does not quantize
    longest = {}  # tokenizer -> tokens that the pipeline reads of a prompt by default

    def __init__(self, pipe, resolution, solver):
        self.pipe, self.transformer, self.vae = pipe, pipe.transformer, pipe.vae
        self.solver = solver
        self.multiple = pipe.vae_scale_factor * self.patch
        if resolution < self.multiple or resolution % self.multiple:
            raise ModelError(f"--resolution {resolution}: must be a multiple of {self.multiple}")
        side = resolution // pipe.vae_scale_factor
        self.latent_shape = (self.latent_channels, side, side)

    @property
    def latent_channels(self):
        return self.vae.config.latent_channels

    @property
    def patch(self):
        """Side of what becomes one token, in latents."""
        return self.transformer.config.patch_size

    def tokens(self, tokenizer):
        """How many tokens of a prompt `tokenizer` leaves: its own limit or the pipeline's."""
        return min(self.longest[tokenizer], getattr(self.pipe, tokenizer).model_max_length)

    def cut_off(self, prompts):
        """{tokenizer: (its limit, how many of the prompts are longer and lose their end)}"""
        found = {}
        for name in self.longest:
            lengths = [len(ids) for ids in getattr(self.pipe, name)(prompts).input_ids]
            found[name] = self.tokens(name), sum(n > self.tokens(name) for n in lengths)
        return found

    @torch.no_grad()
    def encode(self, prompts):
        """A list of n prompts -> Text on the CPU, as the pipeline encodes them by default."""
        spoken = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()  # `cut_off` tells of long prompts, in a line
        parts = [
            self.encode_some(prompts[i : i + 32]).to("cpu") for i in range(0, len(prompts), 32)
        ]
        diffusers_logging.set_verbosity(spoken)
        return Text(*(None if p[0] is None else torch.cat(p) for p in zip(*parts)))

    def scheduler(self, steps):
        """diffusers' scheduler for `solver` with the shift of the family's own, timesteps set."""
        own = self.pipe.scheduler.config
        shift = own.get("shift", own.get("flow_shift"))
        if self.solver == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(own, shift=shift)
        else:
            flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
            scheduler = DPMSolverMultistepScheduler.from_config(own, solver_order=2, **flow)
        self.set_timesteps(scheduler, steps)
        scheduler.set_begin_index(0)
        return scheduler

    def set_timesteps(self, scheduler, steps):
        scheduler.set_timesteps(steps)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (n, c, h, w) -> images float32 (n, 3, H, W) in [0, 1], a slice at a time."""
        config = self.vae.config
        z = latents.to(self.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0)
        pixels = (z.shape[-1] * self.pipe.vae_scale_factor) ** 2
        slices = z.split(max(1, PIXELS_AT_ONCE // pixels))
        images = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in slices])
        return (images / 2 + 0.5).clamp(0, 1)

    def call(self):
        """What else the pipeline's call must be told to draw as here."""
        return {}

    def free_text_encoders(self):
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)


class Sana(Model):
    """SANA (arXiv 2410.10629): linear attention, deep-compression autoencoder, Gemma2."""

    pipeline = SanaPipeline
    published = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    variant = "bf16"
    paper = dict(resolution=1024, solver="euler", min_dim=2240)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
    # In the published code one fused layer makes self-attention's q, k and v; it stays in BF16.
    keep_bf16 = ("patch_embed", "time_embed", "caption_projection", "proj_out")
    keep_bf16 += ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    longest = {"tokenizer": 300}

    @staticmethod
    def instruction():
        """The text that the pipeline puts before every prompt unless told otherwise."""
        return (
            inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        )

    def call(self):
        return {"use_resolution_binning": False}  # which samples at another size

    def encode(self, prompts):
        """Padded only to the longest of the prompts: attention masks padding out, and the
        pipeline's 300 tokens of it cost more than the prompts."""
        lengths = [len(ids) for ids in self.pipe.tokenizer([p.lower() for p in prompts]).input_ids]
        self.padded = min(self.tokens("tokenizer"), max(lengths) + 2)
        return super().encode(prompts)

    def encode_some(self, prompts):
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            complex_human_instruction=self.instruction(),
            max_sequence_length=self.padded,
        )
        return Text(embeds, mask=mask)

    def velocity(self, transformer, x_t, t, text):
        """v float32 like x_t (n, c, h, w), at times t (n,) in [0, 1]; no guidance."""
        dtype = transformer.dtype
        timestep = (1000 * t).to(x_t.device, torch.float32)
        return transformer(
            x_t.to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            encoder_attention_mask=text.mask,
            timestep=timestep * transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()


class Flux(Model):
    """FLUX.1: double- and single-stream blocks, packed latents, guidance distilled into an
    embedding, which the paper fixes at 1; CLIP and T5."""

    pipeline = FluxPipeline
    published = "black-forest-labs/FLUX.1-dev"
    paper = dict(resolution=512, solver="dpm", min_dim=1000, eval_steps=28, timestep_fraction=0.4)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    keep_bf16 = ("x_embedder", "context_embedder", "time_text_embed", "norm_out")
    longest = {"tokenizer": 77, "tokenizer_2": 512}
    patch = 2  # 2 x 2 latents are packed into one token outside of the transformer
    guidance = 1.0

    def call(self):
        return {"max_sequence_length": self.tokens("tokenizer_2")}

    def encode_some(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, max_sequence_length=self.tokens("tokenizer_2")
        )
        return Text(embeds, pooled=pooled)

    def velocity(self, transformer, x_t, t, text):
        """v float32 like x_t (n, c, h, w), at times t (n,) in [0, 1]."""
        dtype, device = transformer.dtype, x_t.device
        (n, c, h, w), scale = x_t.shape, self.pipe.vae_scale_factor
        guidance = torch.as_tensor(self.guidance, device=device).expand(n)
        v = transformer(
            FluxPipeline._pack_latents(x_t, n, c, h, w).to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            pooled_projections=text.pooled.to(dtype),
            # FLUX.1 takes t and multiplies by 1000 itself; the detour rounds as its pipeline does.
            timestep=(1000 * t).to(device, torch.float32) / 1000,
            guidance=guidance if transformer.config.guidance_embeds else None,
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, device, dtype),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=device, dtype=dtype),
            return_dict=False,
        )[0].float()
        return FluxPipeline._unpack_latents(v, h * scale, w * scale, scale)

    def set_timesteps(self, scheduler, steps):
        """The shift grows with the number of image tokens, but for FLUX.1-schnell."""
        config, mu = self.pipe.scheduler.config, {}
        tokens = (self.latent_shape[1] // 2) ** 2
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        if config.use_dynamic_shifting:
            mu = {"mu": calculate_shift(tokens, *(config[name] for name in names))}
        sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)} if self.solver == "euler" else {}
        scheduler.set_timesteps(steps, **mu, **sigmas)


class SD3(Model):
    """Stable Diffusion 3.5 Large: joint attention with normalized queries and keys, two CLIPs and
    T5 side by side."""

    pipeline = StableDiffusion3Pipeline
    published = "stabilityai/stable-diffusion-3.5-large"
    paper = dict(resolution=1024, solver="dpm", min_dim=2432, max_grad_norm=0.002)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_targets += ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    # The paper's "norm1" is read as that of both streams.
    keep_bf16 = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "ff_context")
    keep_bf16 += ("norm1", "norm1_context")
    longest = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}

    def __init__(self, pipe, resolution, solver):
        super().__init__(pipe, resolution, solver)
        most = self.transformer.config.pos_embed_max_size * self.multiple
        if resolution > most:
            raise ModelError(f"--resolution {resolution}: this model has positions up to {most}")

    def call(self):
        return {"max_sequence_length": self.tokens("tokenizer_3")}

    def encode_some(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens("tokenizer_3"),
        )
        return Text(embeds, pooled=pooled)

    def velocity(self, transformer, x_t, t, text):
        """v float32 like x_t (n, c, h, w), at times t (n,) in [0, 1]; no guidance."""
        dtype = transformer.dtype
        return transformer(
            x_t.to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            pooled_projections=text.pooled.to(dtype),
            timestep=(1000 * t).to(x_t.device, torch.float32),
            return_dict=False,
        )[0].float()


MODELS = {"sana": Sana, "flux": Flux, "sd3": SD3}


# ---------------------------------------------------------------------------------------------
# Loading


def load(name, folder, resolution, solver=None, device="cpu", dtype=torch.bfloat16):
    """A family's model from a diffusers folder or a hub id, frozen, in `dtype` on `device`.

    resolution: side of the images in pixels. solver: of SOLVERS; None is the paper's choice.
    Raises ModelError where the folder is of another family, missing or broken, the hub cannot be
    reached, or the resolution does not suit the model.
    """
    family = MODELS[name]
    index = check_pretrained(name, folder)
    diffusers_logging.disable_progress_bar()  # loading bars, over before they can be read
    transformers_logging.disable_progress_bar()
    # Published SANA text encoders are there as a variant only, on the hub and in copies of it.
    copied = any(Path(folder).glob(f"*/*.{family.variant}*.safetensors"))
    variant = family.variant if copied or folder == family.published else None
    how = dict(dtype=dtype, variant=variant, use_safetensors=True)
    try:
        encoders = {}
        for part in [part for part in index if part.startswith("text_encoder") and index[part][1]]:
            # Here and not by the pipeline, which does not tell of weights that are not there.
            encoders[part], info = getattr(transformers, index[part][1]).from_pretrained(
                folder, subfolder=part, output_loading_info=True, **how
            )
            if info["missing_keys"]:
                raise ValueError(f"{part} lacks {sorted(info['missing_keys'])[0]}")
        pipe = family.pipeline.from_pretrained(folder, **encoders, **how).to(device)
    except Exception as error:  # they raise whatever a broken file makes them stumble over
        raise ModelError(f"--pretrained {folder}: cannot be loaded: {_line(error)}") from error
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return family(pipe, resolution, solver or family.paper["solver"])


def check_pretrained(name, folder):
    """What can be known before anything large is read or fetched; returns model_index.json.
    Raises ModelError."""
    about = f"--pretrained {folder}"
    try:
        index = _model_index(str(folder))
        found = index["_class_name"]
    except GatedRepoError as error:
        raise ModelError(
            f"{about}: gated; accept its licence on the hub and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{about}: neither a diffusers folder nor such a model on the hub"
        ) from error
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{about}: no readable model_index.json in it, so not diffusers'"
        ) from error
    except Exception as error:  # of the network, and of several libraries
        raise ModelError(
            f"{about}: no such folder, and the hub cannot be asked for it ({_line(error)})"
        ) from error
    if found != MODELS[name].pipeline.__name__:
        others = [n for n, family in MODELS.items() if family.pipeline.__name__ == found]
        advice = f"try --model {others[0]}" if others else "no --model here is"
        raise ModelError(f"{about} is a {found}, not --model {name}; {advice}")
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        try:
            safe_open(path, "pt")  # reads its header, which says how long the file must be
        except Exception as error:
            raise ModelError(f"{about}: {path} is broken: {_line(error)}") from error
    return index


def _model_index(folder):
    """model_index.json of a folder, of the hub's local cache, or of the hub, asked once."""
    if Path(folder).is_dir():
        return json.loads((Path(folder) / "model_index.json").read_text())
    try:
        cached = hf_hub_download(folder, "model_index.json", local_files_only=True)
        return json.loads(Path(cached).read_text())
    except LocalEntryNotFoundError:
        url, headers = hf_hub_url(folder, "model_index.json"), build_hf_headers()
        response = get_session().get(url, headers=headers, timeout=5, follow_redirects=True)
        hf_raise_for_status(response)
        return response.json()


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------
# LoRA: three adapters over one frozen base. "default" is the policy that learns, "old" the one
# that draws, "ema" the one that is evaluated and saved.

ADAPTERS = ("default", "old", "ema")


def add_lora(model, rank, alpha):
    """Add the three adapters, equal at the start, float32; only "default" requires gradients.
    The draw is torch's global generator's."""
    transformer = model.transformer
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(model.lora_targets),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # meant so
        for adapter in ADAPTERS:
            transformer.add_adapter(config, adapter_name=adapter)
    for adapter in ADAPTERS:
        for p, first in zip(
            lora_parameters(transformer, adapter), lora_parameters(transformer, "default")
        ):
            p.data = first.data.float().clone()
    transformer.set_adapter("default")


def lora_parameters(transformer, adapter):
    """The adapter's parameters, always in the same order."""
    part = f".{adapter}."
    return [p for name, p in transformer.named_parameters() if part in name and "lora_" in name]


@contextlib.contextmanager
def policy(transformer, adapter):
    """Inside, `transformer` is that policy: "default", "old", "ema", or "base" without LoRA.
    Outside it is "default" again, which alone requires gradients there."""
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
    """follower <- eta * follower + (1 - eta) * default, in LoRA parameters."""
    for p, new in zip(
        lora_parameters(transformer, follower), lora_parameters(transformer, "default")
    ):
        p.lerp_(new, 1 - eta)


def save_lora(model, adapter, folder):
    """Write folder/pytorch_lora_weights.safetensors, which diffusers' pipelines load."""
    transformer, name = model.transformer, "pytorch_lora_weights.safetensors"
    unfinished = folder / f"unfinished.{name}"
    unfinished.unlink(missing_ok=True)  # were it a link, writing would follow it
    about = transformer.peft_config[adapter].to_dict()
    about["target_modules"] = sorted(about["target_modules"])  # a set, in any order
    try:
        model.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=adapter),
            transformer_lora_adapter_metadata=about,
            weight_name=unfinished.name,
        )
        os.replace(unfinished, folder / name)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# The explorer: a quantized copy of the transformer


def make_explorer(model, precision, skip=(), min_dim=0, wanted="auto"):
    """(A copy of the base transformer with quantized linears, the rows of quant.quantize_linears,
    where the arguments are explained). Call it before add_lora, and `sync` before it draws."""
    explorer = copy.deepcopy(model.transformer)
    return explorer, quant.quantize_linears(explorer, precision, skip, min_dim, wanted)


@torch.no_grad()
def sync(explorer, transformer, adapter):
    """Give the explorer the weights of a policy: base + LoRA, merged and quantized once."""
    for name, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer().weight
        merged = (base.float() + layer.get_delta_weight(adapter).float()).to(base.dtype)
        twin = explorer.get_submodule(name)
        if isinstance(twin, quant.QuantizedLinear):
            twin.set_weight(merged)
        else:
            twin.weight.copy_(merged)
