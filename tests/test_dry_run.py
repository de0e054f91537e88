"""support/dry_run.py; what needs its fake GPU is in dry_run_cases.py."""

import subprocess
import sys

import pytest
import torch
from conftest import MODEL_NAMES, PROJECT

import rollout
from support import dry_run
from support.dry_run import ENCODERS, MERGED, Stage


def test_on_the_fake_gpu():
    cases = PROJECT / "tests" / "dry_run_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "model, part, millions",
    [
        # SANA's paper (arXiv 2410.10629): 1.6B; DC-AE and Gemma 2 2B: their model cards
        ("sana", "transformer", 1604),
        ("sana", "vae", 312),
        ("sana", "text_encoder", 2614),
        # FLUX.1's and Stable Diffusion 3.5 Large's model cards: 12B and 8.1B
        ("flux", "transformer", 11901),
        ("flux", "vae", 84),
        ("flux", "text_encoder", 123),
        ("flux", "text_encoder_2", 4762),
        ("sd3", "transformer", 8057),
        ("sd3", "vae", 84),
        ("sd3", "text_encoder", 124),
        ("sd3", "text_encoder_2", 695),
        ("sd3", "text_encoder_3", 4762),
        ("clipscore", None, 428),
    ],
)
def test_the_published_configurations_have_the_published_sizes(model, part, millions):
    configs = dry_run.published_configs()[model]
    with torch.device("meta"):
        module = dry_run.build(configs[part] if part else configs)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_on_a_device_that_exists_a_model_with_random_weights_draws(name):
    parts = {k: v for k, v in dry_run.small_configs()[name].items() if "text" not in k}
    model = dry_run.published_model(name, 64, "cpu", parts=parts)
    text = dry_run.made_up_text(model, "cpu")
    latents, images = rollout.draw(model, model.transformer, text, [1, 2], 1)
    assert latents.isfinite().all() and images.shape == (2, 3, 64, 64)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}


# Bytes in round numbers. An image takes 1 and a pair 10; nothing is fixed but 5 of decoding.
RESIDENT = {"transformer": 100, MERGED: 20, ENCODERS: 50}
RESIDENT |= {"explorer, simulated": 30, "explorer, Transformer Engine": 40}
STAGES = {
    "explore, simulated": Stage(24, 0, 1, 0, 0),
    "explore, Transformer Engine": Stage(24, 0, 1, 0, 0),
    "regenerate": Stage(24, 0, 1, 0, 0),
    "regenerate, LoRA not merged": Stage(24, 0, 2, 0, 0),
    "decode": Stage(24, 5, 1, 0, 0),
    "update": Stage(4, 0, 10, 0, 0),
}


@pytest.mark.parametrize("kind, explorer", [("simulated", 30), ("Transformer Engine", 40)])
def test_the_peak_of_a_stage_is_what_is_resident_and_its_own(kind, explorer):
    def of(low_memory):
        return dry_run.peaks(RESIDENT, STAGES, kind, low_memory, draw=24, train=4)

    held = 170 + explorer
    assert of(False) == {
        "explore": held + 24,
        "regenerate": held + 24,
        "decode": held + 29,
        "update": held + 40,
    }
    held = 100 + explorer
    assert of(True) == {
        "encode prompts": held + 50,
        "explore": held + 24,
        "regenerate": held + 48,
        "decode": held + 29,
        "update": held + 40,
    }


def test_the_largest_micro_batches_that_fit():
    def largest(low_memory, limit):
        given = RESIDENT, STAGES, "Transformer Engine", low_memory, limit
        return dry_run.largest_micro_batches(*given, most=(96, 24))

    # Without --low_memory 210 is resident: 235 holds 20 images in decoding, and 2 pairs.
    assert largest(False, 235) == [20, 2]
    # With it 140 is, and regenerating takes 2 for an image.
    assert largest(True, 235) == [47, 9]
    assert largest(True, 189) == [0, 4]  # the text encoders do not fit
    assert largest(False, 1000) == [96, 24]  # no more than the pool and the kept
