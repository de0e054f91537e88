"""Text-to-image flow models: loading, prompts, velocity, decoding, LoRA.

A family is one class: what it is called, which layers LoRA adapts and which stay in BF16, and how
its transformer is called. Everything else is shared. Convention everywhere:

    x_t = (1 - t) x_0 + t noise,   t in [0, 1],   t = 1 is noise,   v = noise - x_0
"""

import contextlib
import copy
import inspect
import warnings
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers.utils import logging as transformers_logging

import quant


class Text(NamedTuple):
    """What a transformer reads of n prompts."""

    embeds: torch.Tensor  # (n, tokens, channels)
    mask: torch.Tensor  # (n, tokens), 1 where a token is

    def take(self, rows):
        """The same for other rows: an index, a list or a tensor of them, repeats allowed."""
        rows = torch.as_tensor(rows, device=self.embeds.device).reshape(-1)
        return Text(self.embeds[rows], self.mask[rows])


class Sana:
    """SANA (arXiv 2410.10629): linear attention, deep-compression autoencoder, Gemma2."""

    pipeline = SanaPipeline
    published = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
    # In the published code one fused layer makes self-attention's q, k and v; it stays in BF16.
    keep_bf16 = ("patch_embed", "time_embed", "caption_projection", "proj_out")
    keep_bf16 += ("attn1.to_q", "attn1.to_k", "attn1.to_v")

    def __init__(self, pipe):
        self.pipe, self.transformer, self.vae = pipe, pipe.transformer, pipe.vae
        side = self.transformer.config.sample_size
        self.latent_shape = (self.transformer.config.in_channels, side, side)

    @staticmethod
    def instruction():
        """The text that the pipeline puts before every prompt unless told otherwise."""
        return (
            inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        )

    @torch.no_grad()
    def encode(self, prompts):
        """A list of n prompts -> Text, as SanaPipeline encodes them by default, but padded only to
        the longest of them: attention masks padding out, and the pipeline's 300 tokens of it cost
        more than the prompts."""
        prefix, tokenizer = "\n".join(self.instruction()), self.pipe.tokenizer
        longest = max(
            len(ids) for ids in tokenizer([prefix + p.lower().strip() for p in prompts]).input_ids
        )
        parts = [
            self.pipe.encode_prompt(
                prompts[i : i + 32],
                do_classifier_free_guidance=False,
                complex_human_instruction=self.instruction(),
                max_sequence_length=min(300, longest - len(tokenizer.encode(prefix)) + 2),
            )
            for i in range(0, len(prompts), 32)
        ]
        return Text(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))

    def velocity(self, transformer, x_t, t, text):
        """v float32 like x_t (n, c, h, w), at times t (n,) in [0, 1]; no guidance."""
        dtype = transformer.dtype
        return transformer(
            x_t.to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            encoder_attention_mask=text.mask,
            timestep=t * 1000 * transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()

    def scheduler(self):
        """Euler with the shift of the family's own scheduler (the paper's solver for SANA)."""
        return FlowMatchEulerDiscreteScheduler(shift=self.pipe.scheduler.config.flow_shift)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (n, c, h, w) -> images float32 (n, 3, H, W) in [0, 1]."""
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


FAMILIES = {"sana": Sana}


def load(name, folder, device="cpu", dtype=torch.bfloat16):
    """A family's model from a diffusers folder or a hub id, frozen, in `dtype` on `device`.

    Raises OSError where the folder is missing or broken or the hub cannot be reached.
    """
    family = FAMILIES[name]
    diffusers_logging.disable_progress_bar()  # loading bars, over before they can be read
    transformers_logging.disable_progress_bar()
    pipe = family.pipeline.from_pretrained(folder, dtype=dtype).to(device)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return family(pipe)


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
    transformer = model.transformer
    model.pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=adapter),
        transformer_lora_adapter_metadata=transformer.peft_config[adapter].to_dict(),
    )


# ---------------------------------------------------------------------------------------------
# The explorer: a quantized copy of the transformer


def make_explorer(model, precision, min_dim=0):
    """(A copy of the base transformer with quantized linears, quantize_linears' rows). Call it
    before add_lora, and `sync` before it draws."""
    explorer = copy.deepcopy(model.transformer)
    rows = quant.quantize_linears(explorer, precision, skip=model.keep_bf16, min_dim=min_dim)
    return explorer, rows


@torch.no_grad()
def sync(explorer, transformer, adapter):
    """Give the explorer the weights of a policy: base + LoRA, merged and quantized once."""
    for name, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer().weight
        merged = (base.float() + layer.get_delta_weight(adapter).float()).to(base.dtype)
        twin = explorer.get_submodule(name)
        if isinstance(twin, quant.SimulatedLinear):
            twin.set_weight(merged)
        else:
            twin.weight.copy_(merged)
