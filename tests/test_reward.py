"""Rewards: what a spec means, and what is refused."""

import pytest
import torch

from reward import RewardError, build_reward


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean(dim=(1, 2))\n"
        "def index(images, prompts, metadata):\n    return [m['i'] for m in metadata]\n"
        "def short(images, prompts, metadata):\n    return [1.0]\n"
        "def nan(images, prompts, metadata):\n"
        "    return [float('nan') if p == 'b' else 0.0 for p in prompts]\n"
        "def broken(images, prompts, metadata):\n    raise KeyError('x')\n"
    )
    return path


IMAGES = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])


def test_a_function_in_a_file_is_a_reward(mine):
    assert build_reward(f"{mine}:red")(IMAGES, ["a", "b"]).tolist() == [0, 1]


def test_weights_sum_raw_scores_and_metadata_arrives(mine):
    reward = build_reward(f"{mine}:red:0.5,{mine}:index:2")
    assert reward(IMAGES, ["a", "b"], [{"i": 3}, {"i": 4}]).tolist() == [6, 8.5]


@pytest.mark.parametrize(
    "function, message",
    [
        ("short", r"shape \(1,\)"),
        ("nan", "NaN or infinity for prompt 'b'"),
        ("broken", "prompt 'a' raised KeyError"),
    ],
)
def test_scores_that_cannot_be_used_name_the_prompt(mine, function, message):
    with pytest.raises(RewardError, match=message):
        build_reward(f"{mine}:{function}")(IMAGES, ["a", "b"])


@pytest.mark.parametrize(
    "spec", ["nothing", "", "clipscore,", "none.py:f", "clipscore:1:2", "x:nan"]
)
def test_unknown_specs_are_refused_before_any_weights_are_loaded(spec):
    with pytest.raises(RewardError, match="--reward"):
        build_reward(spec)


def test_a_missing_function_is_refused(mine):
    with pytest.raises(RewardError, match="no function blue"):
        build_reward(f"{mine}:blue")


@pytest.fixture(scope="module")
def clipscore(world):
    return build_reward("clipscore", "cpu", world)


def test_clipscore_prefers_the_right_prompt_and_the_undamaged_picture(clipscore):
    import tiny

    g = torch.Generator().manual_seed(3)
    rows = torch.tensor(tiny.HELD_OUT)
    prompts = [tiny.CAPTIONS[i] for i in rows]
    good = tiny.draw(tiny.THINGS[rows], g)
    right = clipscore(good, prompts)
    assert (right > clipscore(good, prompts[1:] + prompts[:1])).float().mean() > 0.9
    assert (right > clipscore(tiny.worsen(good, g), prompts)).float().mean() > 0.9


def test_clipscore_reads_every_word_of_a_caption(clipscore):
    """CLIP's text tower pools at <eos>; pooled anywhere else it would not see what follows."""
    image = torch.full((1, 3, 32, 32), 0.5)
    caption = "a small plain red ring at the top".split()
    whole = clipscore(image, [" ".join(caption)])
    for i in range(1, len(caption)):
        changed = caption[:i] + ["cross"] + caption[i + 1 :]
        assert clipscore(image, [" ".join(changed)]) != whole, changed


def test_clipscore_does_not_depend_on_the_batch(clipscore):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a small plain red ring at the top", "x", "", "日本", "y " * 100]
    together = clipscore(images, prompts)
    alone = torch.cat([clipscore(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_clip_pixels_crop_the_middle_whatever_the_shape():
    from reward import clip_pixels

    for shape in ((32, 40), (64, 48), (16, 16)):
        assert clip_pixels(torch.rand(1, 3, *shape), 32).shape == (1, 3, 32, 32)
