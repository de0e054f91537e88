"""The tests of support/dry_run.py that need its fake GPU.

The fake GPU gets its name once and keeps it until the process ends, so tests/test_dry_run.py runs
this file in a process of its own. By hand: python -m pytest tests/dry_run_cases.py
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rollout
import train
from support import dry_run, models
from support.dry_run import GPU, fake_gpu, measure

SMALL = dry_run.small_configs()
BF16 = dict(dtype=torch.bfloat16, device=GPU)


def small_model(name):
    return dry_run.published_model(name, 256, GPU, parts=SMALL[name])


def options(name, *more):
    config = train.parse_options(["--model", name, "--pretrained", "--dry_run", *more])
    # In small SANA, as in the published one, the layers wider than the attention are quantized.
    return dataclasses.replace(config, min_dim=128)


def test_a_linear_layer():
    """y = x W^T and dW = dy^T x: two matmuls of 2 * 512 * 1024 * 2048 operations."""
    with fake_gpu() as meter:
        weight = torch.zeros(2048, 1024, **BF16, requires_grad=True)
        x, dy = torch.zeros(512, 1024, **BF16), torch.zeros(512, 2048, **BF16)
        forward = measure(meter, lambda: nn.functional.linear(x, weight))
        assert forward == (0, 2 * 512 * 2048, 2 * 512 * 1024 * 2048)
        both = measure(meter, lambda: nn.functional.linear(x, weight).backward(dy))
        # At the peak there are y, whose `backward` still runs, and dW; dW stays.
        assert both == (2 * 1024 * 2048, 2 * 512 * 2048, 2 * 2 * 512 * 1024 * 2048)


def test_adamw_keeps_two_moments_in_float32():
    with fake_gpu() as meter:
        p = torch.zeros(1000, device=GPU, requires_grad=True)
        p.grad = torch.zeros(1000, device=GPU)
        assert measure(meter, torch.optim.AdamW([p]).step).kept == 2 * 4 * 1000


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_checkpointed_block_keeps_its_input_alone(checkpointed):
    """Blocks W2 relu(W1 x) with frozen weights, n = 256 rows of d = 64, inside 4 d. Without
    checkpoints, each relu keeps its 4 d results. With them, each block's input of d is kept, and
    so is the last output; the first input was there before. In the backward pass, checkpoints cost
    the first matmul of each block a second time; nothing needs the result of the second one."""
    n, d, blocks = 256, 64, 5
    with fake_gpu() as meter:
        block = nn.Sequential(
            nn.Linear(d, 4 * d, bias=False, **BF16),
            nn.ReLU(),
            nn.Linear(4 * d, d, bias=False, **BF16),
        ).requires_grad_(False)
        x, kept = torch.zeros(n, d, **BF16, requires_grad=True), []

        def forward():
            y = x
            for _ in range(blocks):
                y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
            kept.append(y)

        use = measure(meter, forward)
        matmul, of_d = 2 * n * d * 4 * d, 2 * n * d
        assert use.kept == (blocks * of_d if checkpointed else blocks * 4 * of_d + of_d)
        assert use.flops == blocks * 2 * matmul
        backward = measure(meter, lambda: kept.pop().sum().backward())
        again = blocks * (matmul if checkpointed else 0)
        assert backward.flops == blocks * 2 * matmul + again


def test_attention_keeps_no_weights():
    """64 tokens of 8 heads: the output and a float32 number for each row and head; a mask, and
    heads of more than 256 channels, change nothing."""
    with fake_gpu() as meter:
        for size, mask in ((64, None), (64, torch.zeros(1, 1, 1, 64, **BF16)), (512, None)):
            q = torch.zeros(1, 8, 64, size, **BF16, requires_grad=True)
            use = measure(meter, lambda q=q, m=mask: dry_run.attention(q, q, q, attn_mask=m))
            assert (
                2 * 8 * 64 * size <= use.kept + use.transient <= 2 * 8 * 64 * size + 4 * 8 * 64 + 64
            )
            # Two matmuls: queries and keys, weights and values.
            assert use.flops == 2 * 2 * 8 * 64 * 64 * size


def test_what_two_tensors_share_counts_once():
    with fake_gpu() as meter:
        made = []
        assert measure(meter, lambda: made.append(torch.zeros(10, 10, device=GPU))).kept == 400
        assert measure(meter, lambda: made.append(made[0].view(100)[:5].T)).kept == 0
        assert measure(meter, made.clear).kept == -400


def test_a_tensor_on_the_wrong_device_is_found():
    with fake_gpu():
        model, x = small_model("sana"), torch.zeros(1, 32, 8, 8, device=GPU)
        text = dry_run.made_up_text(model, GPU)
        t = torch.zeros(1, device=GPU)
        assert model.velocity(model.transformer, x, t, text).device == x.device
        with pytest.raises(RuntimeError, match="same device"):
            model.velocity(model.transformer, x, t, text.to("cpu"))


def test_a_wrong_device_in_the_rollout_is_found_by_the_report(monkeypatch):
    take = models.Text.take
    forgets_device = lambda self, rows: take(self, rows).to("cpu")  # noqa: E731
    monkeypatch.setattr(models.Text, "take", forgets_device)
    with pytest.raises(RuntimeError, match="same device"):
        dry_run.report(
            options("flux", "--resolution", "256"), rollout, train.pairs_loss, 6, SMALL["flux"]
        )


def test_a_wrong_dtype_and_a_wrong_shape_are_found():
    with fake_gpu():
        layer, x = nn.Linear(64, 32, **BF16), torch.zeros(8, 64, **BF16)
        with pytest.raises(TypeError, match="bfloat16, torch.float32"):
            layer(x.float())
        with pytest.raises(RuntimeError, match="same reduction dim"):
            layer(x[:, :32])


def test_transformer_engines_stand_in_has_its_rules():
    with fake_gpu() as meter, dry_run.stand_in_for_te():
        layer = dry_run.StandInLinear(128, 256, True, torch.bfloat16, GPU)
        # Codes: half a byte each. Scales: a byte for 16 codes, for 256 rows, 8 columns.
        use = measure(meter, layer, torch.zeros(32, 128, **BF16), True)
        assert use.kept == 256 * 128 // 2 + 256 * 8
        assert measure(meter, layer, torch.zeros(32, 128, **BF16), False).kept == 0
        for x in (torch.zeros(8, 128, **BF16), torch.zeros(32, 128, device=GPU)):
            with pytest.raises(AssertionError, match="te.Linear"):
                layer(x, False)


@pytest.mark.parametrize(
    "name, more",
    [("sana", ("--low_memory", "--no-gradient_checkpointing")), ("flux", ()), ("sd3", ())],
)
def test_the_report_of_a_small_model(name, more, capsys):
    config = options(name, "--resolution", "256", "--micro_batch", "4", *more)
    dry_run.report(config, rollout, train.pairs_loss, 6, SMALL[name])
    printed = capsys.readouterr().out
    stages = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]
    for stage in ("explore", "regenerate", "decode", "update"):
        assert f"| {stage}" in stages
    assert ("| encode prompts" in stages) == ("--low_memory" in more)
    for kind in dry_run.EXPLORERS:
        assert f"| 24 GB | {kind} | yes | 96 and 144 | 96 and 144 |" in printed


def test_the_resident_memory_of_a_small_model_by_hand():
    """SANA with two layers: 8 attention matrices of 128 x 128 a layer have LoRA."""
    config = options("sana", "--resolution", "256", "--micro_batch", "4")
    resident, _ = dry_run.run_stages(config, rollout, train.pairs_loss, 6, SMALL["sana"])
    matrices, d = 2 * 8, 128
    assert resident["three LoRA adapters"] == 3 * matrices * 4 * 2 * d * config.lora_rank
    assert resident["AdamW's moments"] == 2 * matrices * 4 * 2 * d * config.lora_rank
    assert resident[dry_run.MERGED] == matrices * 2 * d * d
    # Quantized are the 1 x 1 convolutions d -> 2 * 2.5 d and 2.5 d -> d; the simulation holds BF16.
    quantized = 2 * (d * 5 * d + 5 * d // 2 * d)
    simulated = resident["explorer, simulated"] - resident[dry_run.MERGED] - 2 * quantized
    assert 0 <= simulated <= 16 * 4  # and a float32 scale for each layer
    # Transformer Engine's layers share the BF16 weights that LoRA does not adapt.
    codes = quantized // 2
    engine = resident["explorer, Transformer Engine"] - resident[dry_run.MERGED] - codes
    # Scales: one for 16 codes, and their padding; biases.
    assert quantized // 16 <= engine <= 1.05 * quantized // 16 + 2 * 2 * 5 * d
