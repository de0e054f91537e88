"""The tiny world: its captions and pictures, the shipped models and the classifier."""

import math
import re

import pytest
import torch
from conftest import MODEL_NAMES
from safetensors.torch import load_file

import train
from experiments.pretrain_world import latents_of
from support import models, world


def test_a_tenth_of_the_captions_is_held_out():
    assert len(set(world.CAPTIONS)) == 2 * 2 * 6 * 6 * 5 == 720
    held_out, train = set(world.HELD_OUT_PROMPTS), set(world.TRAIN_PROMPTS)
    assert len(held_out) == 72 and held_out.isdisjoint(train)
    assert held_out | train == set(world.CAPTIONS)


def test_the_shipped_models_are_small_and_in_bf16():
    files = [path for path in world.TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in world.TINY.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}, path


@pytest.mark.parametrize("pictures", ["drawn", *MODEL_NAMES])
def test_the_classifier_is_right_on_drawn_pictures_and_through_each_autoencoder(pictures):
    prompts = world.HELD_OUT_PROMPTS * 4
    images = world.draw(prompts, torch.Generator().manual_seed(5))
    if pictures != "drawn":
        model = models.load(pictures)
        images = model.decode(latents_of(model, images))
    judged = world.judge(images, prompts)
    assert judged["accuracy"].mean() >= 0.98 and judged["clear"].mean() >= 0.95


def test_accurate_is_right_in_all_five_attributes_and_clear_is_sure_of_all_five(monkeypatch):
    """Of three pictures, the attributes and the largest probabilities that the classifier sees."""
    prompt = "a large plain red ring at the top"
    right, wrong = world.ATTRIBUTES[prompt], world.ATTRIBUTES["a large plain red cross at the top"]
    pictures = [(right, [0.9] * 5), (right, [0.9, 0.9, 0.9, 0.9, 0.69]), (wrong, [0.71] * 5)]
    logits = [torch.zeros(3, len(words)) for words in world.VALUES]
    for i, picture in enumerate(pictures):
        for part, value, p in zip(logits, *picture):
            part[i] = math.log((1 - p) / (part.shape[1] - 1))
            part[i, value] = math.log(p)
    monkeypatch.setattr(world, "classifier", lambda: lambda images: logits)
    judged = world.judge(torch.zeros(3, 3, 32, 32), [prompt] * 3)
    assert judged["accuracy"].tolist() == [1, 1, 0] and judged["clear"].tolist() == [1, 0, 1]


KNOWN, UNKNOWN = "a large plain red ring at the top", "A large plain red ring at the top"


@pytest.mark.parametrize(
    "prompts, held_out, side, says",
    [
        ([KNOWN], [KNOWN], 32, []),
        ([KNOWN, UNKNOWN], [KNOWN], 32, ["720 captions, .*; 1 of the"]),
        ([KNOWN], [KNOWN, UNKNOWN], 32, ["; 1 of the", "not measured: 1 of the 2 held-out"]),
        ([KNOWN], [KNOWN], 64, ["not measured: .* --resolution 32"]),
    ],
)
def test_what_a_tiny_model_does_not_know_is_said(prompts, held_out, side, says):
    judges, notes = world.judges(prompts, held_out, side)
    assert len(notes) == len(says) and all(map(re.search, says, notes))
    names = [] if "not measured" in str(says) else ["accuracy", "clear"]
    assert [name for name, *_ in judges] == names
    image = world.draw([KNOWN], torch.Generator().manual_seed(5))
    assert all(function(image, [KNOWN], [{}]) == 1 for _, _, function in judges)
    other = KNOWN.replace("red", "blue")  # the picture is clear, but does not match this prompt
    judged = {name: float(function(image, [other], [{}])) for name, _, function in judges}
    assert judged in ({}, {"accuracy": 0, "clear": 1})


def test_a_run_with_prompts_of_its_own_has_these_notes(tmp_path):
    (tmp_path / "own.txt").write_text("a cat\na dog\n")
    options = ["--prompts", f"{tmp_path}/own.txt", "--prompts_per_step", "1", "--device", "cpu"]
    run = train.Run(train.parse_options([*options, "--output_dir", f"{tmp_path}/run"]))
    assert "2 of the prompts" in run.notes[0] and "1 of the 1 held-out" in run.notes[1]
    assert [name for name, *_ in run.eval_reward.parts] == ["clipscore"]
