"""Rollouts: a seed is a handle on an image."""

import math
import types

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

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
        return (x_t - self.target) / t.float()[:, None, None, None]

    solver = "euler"
    scheduler, set_timesteps = models.Model.scheduler, models.Model.set_timesteps
    pipe = types.SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("solver", models.SOLVERS)
def test_the_ode_ends_at_the_data_for_any_number_of_steps(solver):
    text = models.Text(torch.zeros(3, 1, 1))
    noise = initial_noise([1, 2, 3], Line.latent_shape)
    line = Line()
    line.solver = solver
    for steps in (1, 6, 10):
        got = sample(line, None, text, noise, steps)
        # DPM's times are whole thousandths, so that its first guess of x_0 is off by that much.
        assert torch.allclose(got, Line.target.expand_as(got), atol=1e-5 + 0.02 * (solver == "dpm"))


def test_sampling_times_fall_from_noise():
    times = sampling_times(Line(), 10)
    assert len(times) == 10 and times[0] == 1 and (times.diff() < 0).all() and times[-1] > 0


@pytest.fixture(scope="module")
def circle(sana):
    return sana.encode(["a large plain red circle in the middle"])


@pytest.mark.parametrize("solver", models.SOLVERS)
def test_sample_gives_what_the_pipeline_gives(model, solver, monkeypatch):
    """Bit for bit in float32, from the same prompt, noise and scheduler, the pipeline told nothing
    else than the size, the steps and no guidance."""
    monkeypatch.setattr(model, "solver", solver)
    prompt, pipe = "a large plain red circle in the middle", model.pipe
    noise = initial_noise([1, 2], model.latent_shape)
    got = sample(model, model.transformer, model.encode([prompt]).take([0, 0]), noise, 10)

    monkeypatch.setattr(pipe, "scheduler", stock_scheduler(pipe, solver))
    pipe.set_progress_bar_config(disable=True)
    options = dict(height=32, width=32, guidance_scale=1.0, num_inference_steps=10)
    if isinstance(model, models.Sana):
        options |= dict(use_resolution_binning=False)
        # The model pads to its longest prompt; the pipeline pads to 300 and masks it.
        embeds, mask, _ = model.encode([prompt])
        options |= dict(prompt_embeds=embeds, prompt_attention_mask=mask)
    else:
        options |= dict(prompt=prompt, max_sequence_length=16)  # the tiny tokenizers' limit
    if isinstance(model, models.Flux):
        noise = pipe._pack_latents(noise, 2, *model.latent_shape)
    expected = pipe(latents=noise, num_images_per_prompt=2, output_type="latent", **options).images
    if isinstance(model, models.Flux):
        expected = pipe._unpack_latents(expected, 32, 32, pipe.vae_scale_factor)
    assert torch.equal(got, expected)


def stock_scheduler(pipe, solver):
    """What the documentation of diffusers says to write to change a pipeline's scheduler."""
    if solver == "euler":
        shift = pipe.scheduler.config.get("shift", pipe.scheduler.config.get("flow_shift"))
        return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=shift)
    shift = pipe.scheduler.config.get("flow_shift", pipe.scheduler.config.get("shift"))
    return DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=shift,
    )


def test_images_are_decoded_as_the_pipeline_decodes_them(model):
    latents = initial_noise([3, 4], model.latent_shape)
    config = model.vae.config
    with torch.no_grad():
        z = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        expected = model.pipe.image_processor.postprocess(model.vae.decode(z)[0], output_type="pt")
    assert torch.allclose(model.decode(latents), expected, atol=1e-6)


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


def test_velocity_is_noise_minus_data_at_times_from_0_to_1(model, monkeypatch):
    """The flow loss of the pretrained model is low; with a wrong sign, time or guidance it is
    not."""
    import tiny

    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(len(tiny.TRAIN), generator=g)[:128]
    things, config = torch.tensor(tiny.TRAIN)[rows], model.vae.config
    codes = tiny._codes(model.vae, 2 * tiny.draw(tiny.THINGS[things], g) - 1)
    x_0 = (codes - (config.get("shift_factor") or 0)) * config.scaling_factor
    text = model.encode([tiny.CAPTIONS[i] for i in things])
    noise, t = torch.randn(x_0.shape, generator=g), torch.rand(len(x_0), generator=g)
    x_t = torch.lerp(x_0, noise, t[:, None, None, None])

    @torch.no_grad()
    def loss(time, sign=1):
        v = sign * model.velocity(model.transformer, x_t, time, text)
        return ((v - (noise - x_0)) ** 2).mean()

    right, nothing = loss(t), ((noise - x_0) ** 2).mean()
    assert right < 0.3 * nothing
    assert loss(t, sign=-1) > nothing
    for wrong in (t / 1000, t * 1000, 1 - t):
        assert loss(wrong) > 1.3 * right
    if isinstance(model, models.Flux):
        monkeypatch.setattr(model, "guidance", 3.5)
        assert loss(t) > 1.3 * right


@pytest.mark.parametrize("name, quantized", [("sana", 28), ("flux", 41), ("sd3", 30)])
def test_the_explorer_ranks_like_the_policy(world, name, quantized):
    from reward import build_reward
    from train import selection

    prompt = "a large plain red circle in the middle"
    model = models.load(name, world / name, 32)
    reward = build_reward("clipscore", "cpu", world)
    explorer, rows = models.make_explorer(model, "nvfp4")
    assert [outcome for *_, outcome in rows].count("nvfp4") == quantized
    text, taken = model.encode([prompt]), {}
    for which, transformer, steps in (("proxy", explorer, 6), ("truth", model.transformer, 10)):
        pieces = draw(model, transformer, text, candidate_seeds(0, 0, 0, 48), steps, 48)
        taken[which] = torch.cat([reward(x, [prompt] * len(x)) for _, x in pieces])
    assert selection.rank_fidelity(taken["proxy"], taken["truth"], 6)["spearman_rho"] > 0.7
    assert not math.isnan(float(taken["proxy"].sum()))
