"""experiments/gpu_check.py: what it does on a CPU, alone or with a substitute for its GPU."""

import fake_te
import pytest
import torch

from experiments import gpu_check
from support import models


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "LAYER", (64, 96))


def test_without_a_gpu_every_section_is_skipped_with_the_reason(capsys):
    assert gpu_check.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert len(lines) == 3 + 4 + 4 + 2  # precisions of three checks, two measurements
    needs = {"fp8": "no GPU with FP8: this is cpu"}
    for name, _, reason in (line[2:].partition(": skipped: ") for line in lines[:-2]):
        assert reason == needs.get(name, "no Blackwell: this is cpu")
    assert lines[-2:] == ["- skipped: there is no GPU"] * 2


@pytest.mark.parametrize(
    "wrong, failures",
    [({}, 0), ({"wrong": ("codes", "weight")}, 3 + 3), ({"output": torch.neg}, 3 + 4 + 4)],
)
def test_a_wrong_transformer_engine_fails_where_it_is_wrong(wrong, failures, monkeypatch, capsys):
    """The self-check finds wrong codes in three precisions, alone and where explorers are made.
    Wrong outputs fail every check; the matmul and the explorer are checked in fp8 too."""
    fake_te.install(monkeypatch, **wrong)
    assert gpu_check.main() == (failures > 0)
    said = capsys.readouterr().out
    assert said.count("**failed**") == failures and said.count("skipped") == 2


def test_an_explorer_that_draws_like_bf16_fails(monkeypatch):
    make_copy, precisions = gpu_check.rollout.make_copy, iter(["bf16", "nvfp4"])
    copies = lambda model, _, skip: make_copy(model, next(precisions), skip)  # noqa: E731
    monkeypatch.setattr(gpu_check.rollout, "make_copy", copies)
    assert not gpu_check.check_explorer("nvfp4", "cpu")[1]


def test_sana_is_timed_and_trained_at_other_sizes(monkeypatch):
    """Quantized in its one block: five layers of the two attentions and two of the feed-forward."""
    widths = dict(num_attention_heads=4, num_cross_attention_heads=4, cross_attention_head_dim=32)
    widths |= dict(cross_attention_dim=128, num_layers=1)
    channels = dict(encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6)
    options = "--resolution 64 --prompts_per_step 1 --micro_batch 4 --pool 4 --keep 2 --device cpu"
    monkeypatch.setattr(gpu_check, "TRANSFORMER", widths)
    monkeypatch.setattr(gpu_check, "AUTOENCODER", gpu_check.AUTOENCODER | channels)
    monkeypatch.setattr(gpu_check, "OPTIONS", options)
    monkeypatch.setitem(models.Sana.paper, "min_dim", 0)
    bf16, _, fp8, iteration = [*gpu_check.speed("cpu"), *gpu_check.memory("cpu")]
    assert bf16.startswith("- bf16: PyTorch: ") and "ms for 4 images" in fp8
    assert ": 7 of 17 layers; loss " in iteration and "nan" not in iteration
