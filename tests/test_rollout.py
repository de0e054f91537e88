"""Rollouts: a seed is a handle on an image."""

import pytest
import torch
from conftest import MODEL_NAMES, load, with_policies

import train
from reward import build_reward
from rollout import (
    Candidates,
    candidate_seeds,
    draw,
    evaluation_seeds,
    generator,
    initial_noise,
    make_copy,
    sync,
)
from support import models

PROMPT = "a large plain red circle in the middle"


def test_seeds_follow_from_run_step_and_prompt_and_a_longer_pool_begins_with_the_shorter():
    seeds = candidate_seeds(0, 3, 5, 96)
    assert candidate_seeds(0, 3, 5, 24) == seeds[:24] and len(set(seeds)) == 96
    assert all(0 <= s < 2**63 for s in seeds)
    for other in ((1, 3, 5), (0, 4, 5), (0, 3, 6)):
        assert not set(seeds) & set(candidate_seeds(*other, 96))
    assert evaluation_seeds(3, 4)[:2] == evaluation_seeds(3, 2) != evaluation_seeds(4, 2)


def test_a_generator_follows_from_its_word_and_numbers():
    of = [("update", 0, 1), ("order", 0, 1), ("update", 1, 1), ("update", 0, 2)]
    assert len({torch.rand(1, generator=generator(*words)).item() for words in of}) == 4


def test_noise_of_a_seed_is_the_same_whatever_it_is_drawn_with():
    noise = initial_noise([5, 6, 7], (4, 2, 2))
    assert torch.equal(noise[0], torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(noise[1:2], initial_noise([6], (4, 2, 2)))


def test_candidates_are_taken_with_all_that_belongs_to_them_in_the_order_asked_for():
    latents = torch.arange(4.0).reshape(4, 1, 1, 1)
    scores = {"mine": torch.arange(4.0) + 10, "weighted_sum": torch.arange(4.0) + 20}
    text = models.Text(torch.ones(1, 2, 3))
    taken = Candidates([7] * 4, text, [100, 101, 102, 103], latents, scores).take([3, 0, 2])
    assert (taken.indices, taken.text, taken.seeds) == ([7] * 3, text, [103, 100, 102])
    assert taken.latents.flatten().tolist() == [3, 0, 2]
    assert taken.scores["mine"].tolist() == [13, 10, 12]
    assert taken.rewards.tolist() == [23, 20, 22]
    assert taken.rewards_of([102, 103]).tolist() == [22, 23]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_copy_synced_with_a_policy_is_that_policy_whenever_it_was_made(name):
    model = load(name)
    before, _ = make_copy(model, "bf16")
    transformer = with_policies(model)
    after, _ = make_copy(model, "bf16")
    text = model.encode(["a small plain red ring at the top"])
    x, t = initial_noise([0], model.latent_shape), torch.tensor([0.5])

    def velocity(network, adapter="default"):
        with torch.no_grad(), models.policy(transformer, adapter):
            return model.velocity(network, x, t, text)

    for merged in (before, after):
        assert torch.allclose(velocity(transformer, "base"), velocity(merged), atol=1e-6)
    base = {name: p.clone() for name, p in transformer.named_parameters() if "lora" not in name}
    for adapter, other in (("old", "default"), ("default", "base"), ("base", "old")):
        sync(before, transformer, adapter)
        sync(after, transformer, adapter)
        assert torch.equal(velocity(before), velocity(after))
        away = (velocity(before) - velocity(transformer, adapter)).norm()
        apart = (velocity(transformer, other) - velocity(transformer, adapter)).norm()
        assert away < apart / 10  # the merged weights are rounded to BF16
        assert all(torch.equal(p, p.bfloat16().float()) for p in before.parameters())
    for name, p in transformer.named_parameters():
        assert "lora" in name or torch.equal(p, base[name])
        assert p.requires_grad == (".default." in name)  # whatever was switched to meanwhile

    # A copy has no LoRA layers, and memory of its own for the weights alone that LoRA adapts.
    for merged in (before, after):
        own = {p.data_ptr() for p in merged.parameters()}
        own -= {p.data_ptr() for p in transformer.parameters()}
        assert len(own) == len(models.lora_layers(transformer)) > 0
        assert not models.lora_layers(merged)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_nvfp4_in_6_steps_ranks_the_seeds_as_bf16_in_10_does(name):
    model, reward = models.load(name), build_reward("clipscore", clip="tiny")
    explorer, _ = make_copy(model, "nvfp4", model.keep_bf16)
    text, rewards = model.encode([PROMPT]), []
    for network, steps in ((explorer, 6), (model.transformer, 10)):
        _, images = draw(model, network, text, candidate_seeds(0, 0, 0, 48), steps)
        rewards.append(reward(images, [PROMPT] * 48))
    assert train.selection.rank_fidelity(*rewards, 6)["spearman_rho"] > 0.7
