"""Rollouts: noise from seeds, the ODE sampler, pools of candidates.

Sampling is a deterministic ODE without guidance, so a seed is a handle on an image: the NVFP4
explorer and the BF16 policy start from the same noise and land close to each other.

How close depends on one thing that is easy to miss: in NVFP4 every activation tensor has one
global scale, so the images of a micro-batch influence each other (and a matmul may sum in another
order for another batch). A micro-batch therefore holds candidates of one prompt only, in the order
of the pool, and its size comes from the config alone. `python paper.py fidelity` prints how much
the ranking moves when it is another. The noise never depends on it.
"""

import random

import numpy as np
import torch


def candidate_seeds(run_seed, step, prompt_index, n):
    """n seeds (ints below 2^63) for one prompt of one step; a longer pool begins with the shorter
    one. All arguments are integers >= 0; numpy's SeedSequence mixes them."""
    state = np.random.SeedSequence((run_seed, step, prompt_index)).generate_state(n, np.uint64)
    return [int(s >> np.uint64(1)) for s in state]


def seed_globals(seed):
    """Seed the global generators, from which nothing here draws, but a reward may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def initial_noise(seeds, shape):
    """Standard normal float32 (n, *shape) on the CPU; row i depends on seeds[i] alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


@torch.no_grad()
def sample(model, transformer, text, noise, steps):
    """x_0 (n, c, h, w) float32 from noise like it, by the model's solver.

    text: models.Text of n rows, on the transformer's device. The same noise gives what the family's
    own diffusers pipeline gives.
    """
    scheduler = model.scheduler(steps)
    x = noise.to(text.embeds.device)
    for timestep in scheduler.timesteps:
        t = timestep.double() / 1000  # so that 1000 t is the very timestep, and an integer if it is
        v = model.velocity(transformer, x, t.expand(len(x)), text)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def sampling_times(model, steps):
    """The times t (steps,) in (0, 1], float32, at which `sample` asks for a velocity."""
    return model.scheduler(steps).timesteps.float() / 1000


def draw(model, transformer, text, seeds, steps):
    """Draw a micro-batch of one prompt's candidates: (latents float32 (n, c, h, w), images float32
    (n, 3, H, W) in [0, 1]). text: models.Text of one row."""
    noise = initial_noise(seeds, model.latent_shape)
    latents = sample(model, transformer, text.take([0] * len(noise)), noise, steps)
    return latents, model.decode(latents)
