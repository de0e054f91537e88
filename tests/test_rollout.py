"""Rollouts: a seed is a handle on an image."""

import types

import pytest
import torch
from conftest import MODEL_NAMES, load, with_policies
from diffusers import FlowMatchEulerDiscreteScheduler

from reward import build_reward
from rollout import (
    Candidates,
    candidate_seeds,
    draw,
    draw_and_score,
    initial_noise,
    make_copy,
    sample,
    sampling_times,
    sync,
)
from support import models
from support.world import TINY
from train import selection

PROMPT = "a large plain red circle in the middle"


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
    scheduler = models.Model.scheduler
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


def test_candidates_are_taken_with_all_that_belongs_to_them_in_the_order_asked_for():
    latents = torch.arange(4.0).reshape(4, 1, 1, 1)
    scores = {"mine": torch.arange(4.0) + 10, "weighted_sum": torch.arange(4.0) + 20}
    text = models.Text(torch.ones(1, 2, 3))
    taken = Candidates(7, text, [100, 101, 102, 103], latents, scores).take([3, 0, 2])
    assert (taken.prompt, taken.text, taken.seeds) == (7, text, [103, 100, 102])
    assert taken.latents.flatten().tolist() == [3, 0, 2]
    assert taken.scores["mine"].tolist() == [13, 10, 12]
    assert taken.rewards.tolist() == [23, 20, 22]


def test_a_pool_is_drawn_and_scored_in_micro_batches_in_its_order(sana):
    text, seeds, batches = sana.encode([PROMPT]), candidate_seeds(0, 0, 0, 7), []

    def score(batch_seeds, latents, images):
        assert torch.equal(images, sana.decode(latents))
        batches.append(batch_seeds)
        return {"first": latents.flatten(1)[:, 0], "size": torch.full((len(images),), len(images))}

    latents, scores = draw_and_score(sana, sana.transformer, text, seeds, 2, 3, score)
    assert batches == [seeds[:3], seeds[3:6], seeds[6:]]
    assert scores["size"].tolist() == [3, 3, 3, 3, 3, 3, 1]
    assert torch.equal(scores["first"], latents.flatten(1)[:, 0])
    expected = [draw(sana, sana.transformer, text, part, 2)[0] for part in batches]
    assert torch.equal(latents, torch.cat(expected))


def test_the_size_of_a_micro_batch_changes_float32_images_by_rounding_only(sana):
    seeds, circle = candidate_seeds(0, 0, 0, 10), sana.encode([PROMPT])
    images = {
        m: torch.cat(
            [draw(sana, sana.transformer, circle, seeds[i : i + m], 6)[1] for i in range(0, 10, m)]
        )
        for m in (10, 3)
    }
    assert (images[10] - images[3]).abs().max() < 1e-4


def test_row_scaled_nvfp4_makes_an_image_independent_of_its_micro_batch():
    model, seeds = models.load("flux"), candidate_seeds(0, 0, 0, 24)
    text, change = model.encode([PROMPT]), {}
    for precision in ("nvfp4", "nvfp4_row"):
        explorer, _ = make_copy(model, precision, model.keep_bf16)
        whole, *parts = (
            draw(model, explorer, text, part, 6)[0]
            for part in (seeds, seeds[:8], seeds[8:16], seeds[16:])
        )
        change[precision] = (whole - torch.cat(parts)).abs().mean()
    # 0 where a matmul sums alike for any number of rows.
    assert change["nvfp4_row"] < change["nvfp4"] / 5


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_copy_is_the_base_and_synced_with_a_policy_it_is_that_policy(name):
    model = load(name)
    merged, _ = make_copy(model, "bf16")
    transformer = with_policies(model)
    text = model.encode(["a small plain red ring at the top"])
    x, t = initial_noise([0], model.latent_shape), torch.tensor([0.5])

    def velocity(network, adapter="default"):
        with torch.no_grad(), models.policy(transformer, adapter):
            return model.velocity(network, x, t, text)

    assert torch.allclose(velocity(transformer, "base"), velocity(merged), atol=1e-6)
    base = {name: p.clone() for name, p in transformer.named_parameters() if "lora" not in name}
    for adapter in ("old", "default"):
        sync(merged, transformer, adapter)
        away = (velocity(merged) - velocity(transformer, adapter)).norm()
        others = {"old": "default", "default": "old"}[adapter]
        apart = (velocity(transformer, others) - velocity(transformer, adapter)).norm()
        assert away < apart / 10  # the merged weights are rounded to BF16
    for name, p in transformer.named_parameters():
        assert "lora" in name or torch.equal(p, base[name])

    # It has no LoRA layers, and memory of its own for the weights alone that LoRA adapts.
    own = {p.data_ptr() for p in merged.parameters()}
    own -= {p.data_ptr() for p in transformer.parameters()}
    assert len(own) == len(models.lora_layers(transformer)) > 0
    assert not models.lora_layers(merged)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_explorer_ranks_like_the_policy(name):
    model = models.load(name)
    reward = build_reward("clipscore", clip=TINY / "clip")
    explorer, _ = make_copy(model, "nvfp4", model.keep_bf16)
    text, rewards = model.encode([PROMPT]), {}
    for which, network, steps in (("proxy", explorer, 6), ("truth", model.transformer, 10)):
        _, images = draw(model, network, text, candidate_seeds(0, 0, 0, 48), steps)
        rewards[which] = reward(images, [PROMPT] * 48)
    fidelity = selection.rank_fidelity(rewards["proxy"], rewards["truth"], 6)
    assert fidelity["spearman_rho"] > 0.7
