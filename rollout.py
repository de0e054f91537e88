"""Rollout: noise from seeds, the ODE sampler, candidates, and the copies of the old policy that
draw them, in FP4 and in BF16 (paper, steps 1 and 3).

Sampling is a deterministic ODE without guidance, so a seed determines an image: the NVFP4 explorer
and the BF16 policy start from the same noise and end close to each other.

In NVFP4 every activation tensor has one global scale. Images in a micro-batch share it, so they
affect each other. When exploring, a micro-batch therefore holds candidates of one prompt only, in
the order of the pool. Its size is an option. The noise never depends on it.
"""

import copy
import dataclasses
import random

import numpy as np
import torch

import quant
from support import models

# ---------------------------------------------------------------------------------------------
# Seeds and noise


def candidate_seeds(run_seed, step, prompt_index, n):
    """n seeds (ints below 2^63) for one prompt of one step. A longer pool begins with the shorter
    one. All arguments are integers >= 0; numpy's SeedSequence mixes them."""
    state = np.random.SeedSequence((run_seed, step, prompt_index)).generate_state(n, np.uint64)
    return [int(s >> np.uint64(1)) for s in state]


def generator(word, *numbers):
    """A torch.Generator on the CPU that follows from a word, which says what its random numbers are
    for, and integers >= 0, such as (run seed, step, prompt's index)."""
    state = np.random.SeedSequence((*word.encode(), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def evaluation_seeds(prompt_index, n):
    """n seeds for one held-out prompt, the same in every run. The number in the place of the step
    is larger than any step."""
    return candidate_seeds(0, 2**32 - 2, prompt_index, n)


def seed_globals(seed):
    """Seed the global generators, which only a user's reward may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def initial_noise(seeds, shape):
    """Standard normal noise, float32 (n, *shape) on the CPU; row i depends on seeds[i] alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------
# The sampler


@torch.no_grad()
def sample(model, transformer, text, noise, steps):
    """x_0, float32 (n, c, h, w), from noise of that shape, by the model's solver.

    text: models.Text of n rows, or of one row for all, on the transformer's device. From the same
    noise, diffusers' own pipeline gives the same x_0.
    """
    scheduler = model.scheduler(steps)
    x = noise.to(text.embeds.device)
    for timestep in scheduler.timesteps:
        t = timestep.double() / 1000  # in float64, 1000 t is the scheduler's timestep again
        v = model.velocity(transformer, x, t.expand(len(x)), text)
        # Euler: x <- x + (t_next - t) v. The DPM solver also uses the v of the step before.
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def sampling_times(model, steps):
    """The times t, float32 (steps,) in (0, 1], at which `sample` asks for a velocity."""
    return model.scheduler(steps).timesteps.float() / 1000


def draw(model, transformer, text, seeds, steps):
    """Draw a micro-batch: (latents, float32 (n, c, h, w); images, float32 (n, 3, H, W) in [0, 1]).
    text: models.Text of n rows, or of one row for all."""
    noise = initial_noise(seeds, model.latent_shape)
    latents = sample(model, transformer, text, noise, steps)
    return latents, model.decode(latents)


# ---------------------------------------------------------------------------------------------
# Candidates


@dataclasses.dataclass
class Candidates:
    """n seeds and what was drawn from them. Decoded images are not kept; latents are."""

    indices: list  # of each one's prompt; the candidates of a pool share one prompt
    text: models.Text  # the encoded prompts: one row for all, or a row for each
    seeds: list  # candidate i was drawn from initial_noise of seeds[i]
    latents: torch.Tensor = None  # x_0, float32 (n, c, h, w)
    scores: dict = None  # reward -> float32 (n,); "weighted_sum" is the sum of raw scores

    @property
    def rewards(self):
        return self.scores["weighted_sum"]

    def rewards_of(self, seeds):
        """The rewards of these seeds, in their order."""
        return self.rewards[[self.seeds.index(seed) for seed in seeds]]

    def take(self, kept):
        """The candidates at these places, in this order. They must share one text."""
        seeds, latents = [self.seeds[i] for i in kept], self.latents[kept]
        scores = {name: values[kept] for name, values in self.scores.items()}
        return Candidates([self.indices[i] for i in kept], self.text, seeds, latents, scores)


def join(parts):
    """Several micro-batches as one Candidates, with the text of the first one."""
    indices, seeds = ([i for part in parts for i in getattr(part, n)] for n in ("indices", "seeds"))
    latents = torch.cat([part.latents for part in parts])
    scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
    return Candidates(indices, parts[0].text, seeds, latents, scores)


# ---------------------------------------------------------------------------------------------
# Merged copies of the transformer: the explorer, which is quantized, and the BF16 one


def make_copy(model, precision, skip=(), min_dim=0):
    """(A copy of the base transformer with quantized linear layers, the rows that describe them).
    Arguments and rows are those of quant.quantize_linears; in "bf16" no layer is quantized.

    Weights that are not quantized are shared with the transformer, except that `sync` gives the
    layers that LoRA adapts weights of their own. So a BF16 copy needs memory for those alone. The
    copy has the base model's weights until `sync` gives it a policy's."""
    tensors = (*model.transformer.parameters(), *model.transformer.buffers())
    # deepcopy shares what its second argument names.
    merged = copy.deepcopy(model.transformer, {id(tensor): tensor for tensor in tensors})
    # A copy that is made after add_lora, as in a notebook, has adapters: they are left out.
    for name, layer in models.lora_layers(merged):
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    return merged, quant.quantize_linears(merged, precision, skip, min_dim)


@torch.no_grad()
def sync(merged, transformer, adapter):
    """Give a copy the weights of a policy, a LoRA adapter or "base". Base and LoRA are merged in
    float32, rounded to BF16 (in a model that computes in float32, too) and then, where the copy's
    layer is quantized, quantized."""
    for name, layer in models.lora_layers(transformer):
        base = layer.get_base_layer().weight
        weight = base.float()
        if adapter != "base":
            weight = weight + layer.get_delta_weight(adapter).float()
        weight = weight.to(torch.bfloat16).to(base.dtype)
        copied_layer = merged.get_submodule(name)
        if isinstance(copied_layer, quant.QuantizedLinear):
            copied_layer.set_weight(weight)
        elif copied_layer.weight is base:  # the first time, this weight is still shared
            copied_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        else:
            copied_layer.weight.copy_(weight)
