"""Rollouts: a seed is a handle on an image."""

import copy
import json
import shutil
import types

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from peft import LoraConfig

import models
import quant
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


def test_prompts_are_encoded_as_the_pipeline_encodes_them(model):
    prompts = ["a large plain red circle in the middle", "a small plain red ring"]
    ours, pipe = model.encode(prompts), model.pipe
    if isinstance(model, models.Sana):  # which pads to its longest prompt, the pipeline to 300
        how = dict(complex_human_instruction=model.instruction(), max_sequence_length=300)
        embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **how)
        assert mask.sum(dim=1).tolist() == ours.mask.sum(dim=1).tolist()
        for i in range(2):
            # Padded otherwise, float32 sums may have another order, which is 1e-6 of numbers up to
            # 3; two prompts are 2.5 apart.
            theirs, found = embeds[i][mask[i] == 1], ours.embeds[i][ours.mask[i] == 1]
            torch.testing.assert_close(found, theirs, rtol=0, atol=3e-5)
        return
    if isinstance(model, models.Flux):
        embeds, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None, max_sequence_length=16)
    else:
        more = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=16, **more)
    assert torch.equal(embeds, ours.embeds) and torch.equal(pooled, ours.pooled)


@pytest.mark.parametrize("at_once", [1, 3 * 32 * 32])
def test_images_are_the_pipelines_whatever_is_decoded_at_once(model, at_once, monkeypatch):
    """From noise to pixels, by the pipeline's own decoding."""
    monkeypatch.setattr(models, "PIXELS_AT_ONCE", at_once)
    noise, text = initial_noise([3, 4, 5, 6], model.latent_shape), model.encode(["a red ring"])
    x_0 = sample(model, model.transformer, text.take([0] * 4), noise, 2)
    how = dict(height=32, width=32, guidance_scale=1.0, num_inference_steps=2, output_type="pt")
    if isinstance(model, models.Sana):
        how |= dict(use_resolution_binning=False)
    else:
        how |= dict(max_sequence_length=16)
    if isinstance(model, models.Flux):
        noise = model.pipe._pack_latents(noise, 4, *model.latent_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.pipe, "scheduler", stock_scheduler(model.pipe, model.solver))
        expected = model.pipe("a red ring", latents=noise, num_images_per_prompt=4, **how).images
    # SANA's padding differs, and with it the last bits.
    assert torch.allclose(model.decode(x_0), expected, atol=1e-4)


def test_flux_schnell_has_no_shift_that_depends_on_the_size(world, tmp_path):
    shutil.copytree(world / "flux", tmp_path / "flux")
    path = tmp_path / "flux" / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift": 1.0}
    path.write_text(json.dumps(settings))
    for solver, last in (("euler", 0.1), ("dpm", 0.1)):
        model = models.load("flux", tmp_path / "flux", 32, solver)
        assert sampling_times(model, 10)[-1] == pytest.approx(last, abs=2e-3), solver


def test_a_copy_whose_text_encoder_is_a_variant_only_loads_like_the_published_one(world, tmp_path):
    shutil.copytree(world / "sana", tmp_path / "sana")
    encoder = tmp_path / "sana" / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.bf16.safetensors")
    prompts = ["a large plain red circle in the middle"]
    texts = [
        models.load("sana", f, 32).encode(prompts) for f in (world / "sana", tmp_path / "sana")
    ]
    assert torch.equal(texts[0].embeds, texts[1].embeds)


PUBLISHED = {  # the published transformers' sizes; the classes' defaults but for these
    "sana": (SanaTransformer2DModel, {}),
    "flux": (FluxTransformer2DModel, dict(guidance_embeds=True)),
    "sd3": (
        SD3Transformer2DModel,
        dict(
            num_layers=38,
            num_attention_heads=38,
            joint_attention_dim=4096,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ),
}


@pytest.mark.parametrize(
    "name, billions, quantized, adapted",
    [("sana", 1.6, 40, 160), ("flux", 11.9, 495, 190), ("sd3", 8.1, 76, 303)],
)
def test_at_published_size_the_papers_layers_are_quantized_and_adapted(
    name, billions, quantized, adapted
):
    """SANA: the two 1x1 convolutions of 20 feed-forwards. FLUX.1: 14 layers of 19 double blocks, 6
    of 38 single ones, the last. SD3.5: the two of 38 feed-forwards. (Meta: shapes, no numbers.)"""
    kind, sizes = PUBLISHED[name]
    with torch.device("meta"):
        transformer = kind(**sizes).to(torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(
        billions, abs=0.1
    )
    family = models.MODELS[name]
    rows = quant.quantize_linears(
        copy.deepcopy(transformer), "nvfp4", family.keep_bf16, family.paper["min_dim"]
    )
    assert [outcome for *_, outcome in rows].count("nvfp4") == quantized
    transformer.add_adapter(LoraConfig(r=4, target_modules=list(family.lora_targets)))
    assert sum("lora_A" in parameter for parameter, _ in transformer.named_parameters()) == adapted


def test_the_size_of_a_micro_batch_changes_float32_images_by_rounding_only(sana, circle):
    seeds = candidate_seeds(0, 0, 0, 10)
    images = {
        m: torch.cat(
            [draw(sana, sana.transformer, circle, seeds[i : i + m], 6)[1] for i in range(0, 10, m)]
        )
        for m in (10, 3)
    }
    assert (images[10] - images[3]).abs().max() < 1e-5


def test_row_scaled_nvfp4_makes_an_image_independent_of_its_micro_batch(world):
    model, seeds = models.load("flux", world / "flux", 32), candidate_seeds(0, 0, 0, 24)
    text, change = model.encode(["a large plain red circle in the middle"]), {}
    for precision in ("nvfp4", "nvfp4_row"):
        explorer, _ = models.make_explorer(model, precision, model.keep_bf16)
        whole, *parts = (
            draw(model, explorer, text, part, 6)[0]
            for part in (seeds, seeds[:8], seeds[8:16], seeds[16:])
        )
        change[precision] = (whole - torch.cat(parts)).abs().mean()
    # 0 where a BF16 matmul sums alike for any number of rows, as on the CPU it was written on.
    assert change["nvfp4_row"] < change["nvfp4"] / 5


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
    assert right < 0.4 * nothing  # 0.19 to 0.27, a little different on each machine
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
    explorer, rows = models.make_explorer(model, "nvfp4", model.keep_bf16)
    assert [outcome for *_, outcome in rows].count("nvfp4") == quantized
    text, taken = model.encode([prompt]), {}
    for which, transformer, steps in (("proxy", explorer, 6), ("truth", model.transformer, 10)):
        _, images = draw(model, transformer, text, candidate_seeds(0, 0, 0, 48), steps)
        taken[which] = reward(images, [prompt] * 48)
    assert selection.rank_fidelity(taken["proxy"], taken["truth"], 6)["spearman_rho"] > 0.7
