"""NVFP4: Transformer Engine's bytes, a fast path equal to the slow one, a bounded error."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import quant

VECTORS = load_file(Path(__file__).with_name("nvfp4_vectors.safetensors"))
CASES = [key.rsplit(".", 1)[0] for key in VECTORS if key.endswith(".codes")]


def case(name):
    x, tile, mode = name.split(".")
    return VECTORS[f"{x}.x"], (1, 16) if tile == "1x16" else (16, 16), mode != "plain"


@pytest.mark.parametrize("name", CASES)
def test_bytes_equal_transformer_engines(name):
    q = quant.quantize_nvfp4(*case(name))
    assert torch.equal(q.codes, VECTORS[f"{name}.codes"])
    assert torch.equal(q.scales.view(torch.uint8), VECTORS[f"{name}.scales"])
    assert torch.equal(q.amax.reshape(1), VECTORS[f"{name}.amax"])


@pytest.mark.parametrize("name", CASES)
def test_fake_quantization_gives_the_dequantized_values(name):
    x, *how = case(name)
    expected = quant.quantize_nvfp4(x, *how).dequantize(x.dtype)
    assert torch.equal(quant.fake_quantize_nvfp4(x, *how), expected)


def test_a_block_worked_by_hand():
    # amax 6 gives S_enc 448; the block's scale is 6 * 448 / 6 = 448, so a step is 1.
    x = torch.tensor(
        [[6.0, -6.0, 0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.9, 1, 2, 3, 4]]
    )
    q = quant.quantize_nvfp4(x)
    # ties go to the even code: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4
    expected = [6, -6, 0, 0, 0.5, 1, 1, 2, 2, 4, 4, 4, 1, 2, 3, 4]
    assert q.scales.float().tolist() == [[448.0]]
    assert q.codes[0, :2].tolist() == [0xF7, 0x00]  # 6 is code 7, -6 code 15; the even one is low
    assert torch.equal(q.dequantize(), torch.tensor([expected]))


def simulated(layer, precision):
    weight = layer.weight.flatten(1)
    return quant.QuantizedLinear(layer, quant.SimulatedMatmul(weight, layer.bias, precision))


def bound(x, q):
    """The essay's bound for each element of x (M, K), given its scales."""
    amax = q.amax.double()
    if amax < 2688 / quant.FLT_MAX:
        return amax.expand(x.shape)
    unit = amax / (6 * q.scale_max)
    scale = q.scales.double().repeat_interleave(16, dim=1)[:, : x.shape[1]]
    d, size = scale * unit, x.double().abs()
    u = size / d
    h = torch.where(u < 2, 0.25, torch.where(u < 4, 0.5, 1.0))
    normal = torch.maximum(torch.where(u <= 6, d * h, 0), torch.where(u > 6, size / 17, 0))
    small = torch.where(u <= 6, d * h, 0) + 6 * 2.0**-10 * unit
    # Below e4m3's normal range a block's exact scale is under 2^-6, the rounded one at most 2^-6.
    limit = torch.where(scale > 2.0**-6, normal, torch.maximum(normal, small))
    return limit + size * 2.0**-20 + 2.0**-149 * 2688


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["normal", "outlier", "uniform", "structured", "sparse", "levels"]),
    exponent=st.integers(-140, 120),
    rows=st.integers(1, 33),
    columns=st.integers(1, 70),
    block=st.sampled_from([(1, 16), (16, 16)]),
    four_over_six=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_error_stays_within_the_proven_bound(
    kind, exponent, rows, columns, block, four_over_six, seed
):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    if kind == "outlier":
        x.view(-1)[0] = 3e4
    elif kind == "uniform":
        x = torch.rand(rows, columns, generator=g)
    elif kind == "structured":
        x = torch.arange(rows * columns).reshape(rows, columns).float().sin()
    elif kind == "sparse":
        x = x * (torch.rand(rows, columns, generator=g) < 0.1)
    elif kind == "levels":  # blocks 2^40 apart, through the scales' whole range and below it
        x = x * torch.exp2(-torch.randint(0, 40, (rows, 1), generator=g).float())
    x = x * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)
    x = x.clamp(-quant.FLT_MAX, quant.FLT_MAX)
    q = quant.quantize_nvfp4(x, block, four_over_six)
    error = (x.double() - q.dequantize().double()).abs()
    limit = bound(x, q)
    assert (error <= limit).all(), (error / limit.clamp(min=1e-300)).max()


def test_the_bound_is_attained_halfway_between_codes():
    x = torch.tensor([[6.0, 5.0, 2.5, 0.25] + [0.0] * 12])
    error = (x - quant.quantize_nvfp4(x).dequantize()).abs()
    assert error[0, :4].tolist() == [0, 1, 0.5, 0.25]


def test_bfloat16_outliers_and_extremes_survive():
    for value in (3e38, 1e-30, 1.0):
        x = torch.full((4, 32), value, dtype=torch.bfloat16)
        assert torch.allclose(quant.fake_quantize_nvfp4(x).float(), x.float(), rtol=0.01)
    assert torch.equal(quant.fake_quantize_nvfp4(torch.zeros(2, 16)), torch.zeros(2, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_or_seen(value):
    x = torch.randn(3, 32)
    x[1, 5] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quant.quantize_nvfp4(x)
    assert quant.fake_quantize_nvfp4(x).isnan().all()


def test_bad_tensors_and_blocks_are_refused():
    with pytest.raises(ValueError, match="blocks are"):
        quant.quantize_nvfp4(torch.randn(4, 16), (1, 32))
    for x in (torch.zeros(0, 16), torch.ones(2, 16, dtype=torch.int32)):
        with pytest.raises(ValueError, match="float tensor"):
            quant.quantize_nvfp4(x)


def test_leading_dimensions_are_rows():
    x = torch.randn(2, 3, 5, 24)
    flat = quant.fake_quantize_nvfp4(x.reshape(-1, 24))
    assert torch.equal(quant.fake_quantize_nvfp4(x), flat.reshape(x.shape))
    assert quant.quantize_nvfp4(x).dequantize().shape == x.shape


def test_a_row_scaled_row_is_what_it_is_alone():
    x = torch.randn(9, 50) * torch.logspace(-3, 3, 9)[:, None]
    whole = quant.quantize_nvfp4(x, row_scaled=True)
    for i in range(9):
        alone = quant.quantize_nvfp4(x[i : i + 1])
        assert torch.equal(whole.codes[i : i + 1], alone.codes)
        assert torch.equal(whole.scales[i : i + 1], alone.scales) and whole.amax[i] == alone.amax
        assert torch.equal(whole.dequantize()[i], alone.dequantize()[0])
    assert torch.equal(quant.fake_quantize_nvfp4(x, row_scaled=True), whole.dequantize())
    assert not torch.equal(quant.fake_quantize_nvfp4(x), whole.dequantize())
    for quantize in (quant.quantize_nvfp4, quant.fake_quantize_nvfp4):
        with pytest.raises(ValueError, match="row_scaled"):
            quantize(x, (16, 16), row_scaled=True)
    both = dict(four_over_six=True, row_scaled=True)
    slow, fast = quant.quantize_nvfp4(x, **both), quant.fake_quantize_nvfp4(x, **both)
    assert torch.equal(fast, slow.dequantize())


def fp8(x):
    """E4M3 with one scale a tensor: the largest magnitude becomes 448 (TE's current scaling)."""
    scale = 448 / x.double().abs().max()
    return (x.double() * scale).to(torch.float8_e4m3fn).double() / scale


@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_4over6", "nvfp4_row", "fp8"])
@pytest.mark.parametrize("tokens, features, out", [(1, 16, 16), (37, 50, 7), (96, 128, 640)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_simulated_linear_is_the_product_of_dequantized_operands(
    tokens, features, out, bias, precision
):
    torch.manual_seed(0)
    layer = nn.Linear(features, out, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, tokens, features, dtype=torch.bfloat16)
    got, weight = simulated(layer, precision)(x), layer.weight.detach()
    if precision == "fp8":
        xq, wq = fp8(x), fp8(weight)
    else:
        how, row_scaled = precision == "nvfp4_4over6", precision == "nvfp4_row"
        xq = quant.quantize_nvfp4(x, (1, 16), how, row_scaled).dequantize(torch.float64)
        wq = quant.quantize_nvfp4(weight, (16, 16), how).dequantize(torch.float64)
    product = xq @ wq.T
    expected = product + (layer.bias.double() if bias else 0)
    # Product and result are each rounded to BF16 (2^-8), and at most 128 terms are summed in
    # float32 (128 * 2^-24). TE holds its own kernels to 8e-3, which is more.
    rounded = 2.0**-8 * (product.abs() + expected.abs() + 2.0**-8 * product.abs())
    tolerance = rounded + 2.0**-17 * (xq.abs() @ wq.abs().T)
    assert ((got.double() - expected).abs() <= tolerance).all()


def test_codes_times_scales_are_exact_in_bfloat16():
    x = torch.randn(64, 64) * torch.exp2(torch.randint(-30, 30, (64, 1)).float())
    values, scale = quant._exact_values(x, "nvfp4", (1, 16))
    q = quant.quantize_nvfp4(x)
    step = q.scales.double().repeat_interleave(16, dim=1)
    codes = (q.dequantize(torch.float64) / (step * scale.double())).nan_to_num().mul(2).round() / 2
    assert torch.equal(values.double(), codes * step)


def test_a_1x1_convolution_is_a_linear_over_channels():
    conv = nn.Conv2d(24, 40, 1)
    x = torch.randn(2, 24, 3, 3)
    linear = nn.Linear(24, 40)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    got = simulated(conv, "nvfp4")(x)
    expected = simulated(linear, "nvfp4")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(got, expected)


def test_fp8_is_closer_than_nvfp4():
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 128), torch.randn(64, 128)
    exact = layer(x)
    error = {p: (simulated(layer, p)(x) - exact).norm() for p in ("fp8", "nvfp4")}
    assert error["fp8"] < error["nvfp4"] / 2


def test_layers_are_swapped_by_name_and_size_and_reported():
    model = nn.Sequential()
    model.add_module("embed", nn.Linear(32, 64))
    model.add_module("small", nn.Linear(16, 16))
    model.add_module("big", nn.Linear(64, 128))
    model.add_module("conv3", nn.Conv2d(3, 3, 3))
    rows = quant.quantize_linears(model, "nvfp4", skip=("embed",), min_dim=16)
    assert rows == [
        ("embed", 32, 64, "kept: embed"),
        ("small", 16, 16, "kept: max(in, out) <= 16"),
        ("big", 64, 128, "nvfp4"),
    ]
    assert isinstance(model.big, quant.QuantizedLinear) and isinstance(model.small, nn.Linear)
    with pytest.raises(ValueError, match="int3"):
        quant.quantize_linears(model, "int3")


def test_a_new_weight_replaces_the_old_one():
    a, b = nn.Linear(32, 32), nn.Linear(32, 32)
    layer = simulated(a, "nvfp4")
    layer.set_weight(b.weight)
    b.bias = a.bias
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), simulated(b, "nvfp4")(x))
