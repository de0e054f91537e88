"""Rollouts: a seed is a handle on an image."""

import math

import numpy as np
import pytest
import torch

import models
from rollout import candidate_seeds, draw, initial_noise, sample, sampling_times


def test_seeds_follow_from_run_step_and_prompt_and_a_longer_pool_begins_with_the_shorter():
    seeds = candidate_seeds(0, 3, 5, 96)
    assert candidate_seeds(0, 3, 5, 24) == seeds[:24] and len(set(seeds)) == 96
    assert all(0 <= s < 2**63 for s in seeds)
    for other in ((1, 3, 5), (0, 4, 5), (0, 3, 6)):
        assert not set(seeds) & set(candidate_seeds(*other, 96))


def test_noise_of_a_seed_is_the_same_whatever_it_is_drawn_with():
    noise = initial_noise([5, 6, 7], (4, 2, 2))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(noise[1:2], initial_noise([6], (4, 2, 2)))
    assert torch.equal(noise[0], torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(5)))


class Line:
    """A flow whose data is one point, where the velocity is exact: x_0 + v = noise."""

    latent_shape = (2, 2, 2)
    target = torch.full(latent_shape, 3.0)

    def velocity(self, transformer, x_t, t, text):
        return (x_t - self.target) / t[:, None, None, None]

    scheduler = models.Sana.scheduler
    pipe = type("P", (), {"scheduler": type("S", (), {"config": type("C", (), {"flow_shift": 3})})})


def test_the_ode_ends_at_the_data_for_any_number_of_steps():
    text = models.Text(torch.zeros(3, 1, 1), torch.ones(3, 1))
    noise = initial_noise([1, 2, 3], Line.latent_shape)
    for steps in (1, 6, 10):
        got = sample(Line(), None, text, noise, steps)
        assert torch.allclose(got, Line.target.expand_as(got), atol=1e-5)


def test_sampling_times_fall_from_noise():
    times = sampling_times(Line(), 10)
    assert len(times) == 10 and times[0] == 1 and (times.diff() < 0).all() and times[-1] > 0


@pytest.fixture(scope="module")
def circle(sana):
    return sana.encode(["a large plain red circle in the middle"])


def test_sample_gives_what_the_pipeline_gives(sana, circle):
    noise = initial_noise([1, 2], sana.latent_shape)
    got = sample(sana, sana.transformer, circle.take([0, 0]), noise, 10)
    pipe = sana.pipe
    own, pipe.scheduler = pipe.scheduler, sana.scheduler()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt_embeds=circle.take([0, 0]).embeds,
        prompt_attention_mask=circle.take([0, 0]).mask,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=1.0,
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    pipe.scheduler = own
    assert torch.equal(got, expected)


def test_the_size_of_a_micro_batch_changes_float32_images_by_rounding_only(sana, circle):
    seeds = candidate_seeds(0, 0, 0, 10)
    images = {
        m: torch.cat([x for _, x in draw(sana, sana.transformer, circle, seeds, 6, m)])
        for m in (10, 3)
    }
    assert (images[10] - images[3]).abs().max() < 1e-5


def test_a_stock_pipeline_draws_the_prompt(sana):
    """The path a user of diffusers takes: prompt in, picture out, red where it should be."""
    sana.pipe.set_progress_bar_config(disable=True)
    images = sana.pipe(
        "a large plain red square in the middle",
        num_images_per_prompt=4,
        num_inference_steps=10,
        guidance_scale=1.0,
        height=32,
        width=32,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    r, g, b = np.moveaxis(images[:, 10:22, 10:22], -1, 0)
    assert (r.mean() > 0.6) and (g.mean() < 0.5) and (b.mean() < 0.5)


def test_velocity_is_noise_minus_data_at_times_from_0_to_1(sana, world):
    """The flow loss of the pretrained model is low; of a wrong sign or time scale it is not."""
    import tiny

    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(len(tiny.TRAIN), generator=g)[:64]
    things = torch.tensor(tiny.TRAIN)[rows]
    with torch.no_grad():
        z = sana.vae.encode(2 * tiny.draw(tiny.THINGS[things], g) - 1, return_dict=False)[0]
        x_0 = z * sana.vae.config.scaling_factor
        text = sana.encode([tiny.CAPTIONS[i] for i in things])
        noise, t = torch.randn(x_0.shape, generator=g), torch.rand(64, generator=g)
        x_t = torch.lerp(x_0, noise, t[:, None, None, None])
        v = sana.velocity(sana.transformer, x_t, t, text)
        loss = ((v - (noise - x_0)) ** 2).mean()
        wrong_scale = sana.velocity(sana.transformer, x_t, t / 1000, text)
    zero = ((noise - x_0) ** 2).mean()
    assert loss < 0.3 * zero
    assert ((-v - (noise - x_0)) ** 2).mean() > zero
    assert ((wrong_scale - (noise - x_0)) ** 2).mean() > 1.4 * loss


def test_the_explorer_ranks_like_the_policy(sana, world, circle):
    from reward import build_reward
    from train import selection

    reward = build_reward("clipscore", "cpu", world)
    explorer, rows = models.make_explorer(sana, "nvfp4")
    outcomes = [outcome for *_, outcome in rows]
    assert outcomes.count("nvfp4") == 28  # 4 layers of out, cross q k v out, two of feed-forward
    taken = {}
    for name, transformer, steps in (("proxy", explorer, 6), ("truth", sana.transformer, 10)):
        pieces = draw(sana, transformer, circle, candidate_seeds(0, 0, 0, 48), steps, 48)
        taken[name] = torch.cat(
            [reward(x, ["a large plain red circle in the middle"] * len(x)) for _, x in pieces]
        )
    assert selection.rank_fidelity(taken["proxy"], taken["truth"], 6)["spearman_rho"] > 0.7
    assert not math.isnan(float(taken["proxy"].sum()))
