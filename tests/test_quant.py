"""NVFP4: Transformer Engine's bytes, a fast path equal to the slow one, a bounded error.

20,000 examples of each bound: python -m pytest tests/test_quant.py --hypothesis-profile=thorough
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

import quant

VECTORS = load_file(Path(__file__).with_name("nvfp4_vectors.safetensors"))
ROW_4OVER6 = quant.Precision("nvfp4", four_over_six=True, row_scaled=True)
PRECISIONS = quant.PRECISIONS | {"nvfp4_row_4over6": ROW_4OVER6}
FORMATS = ("nvfp4", "nvfp4_row", "nvfp4_4over6", "nvfp4_row_4over6", "fp8")


@pytest.mark.parametrize("name", [key[:-6] for key in VECTORS if key.endswith(".codes")])
def test_bytes_equal_transformer_engines(name):
    x, block, mode = name.split(".")
    how = VECTORS[f"{x}.x"], (1, 16) if block == "1x16" else (16, 16), mode != "plain"
    q = quant.quantize_nvfp4(*how)
    assert torch.equal(q.codes, VECTORS[f"{name}.codes"])
    assert torch.equal(q.scales.view(torch.uint8), VECTORS[f"{name}.scales"])
    assert torch.equal(q.amax.reshape(1), VECTORS[f"{name}.amax"])
    assert torch.equal(quant.fake_quantize_nvfp4(*how), q.dequantize(how[0].dtype))


def test_a_block_worked_by_hand():
    # amax 6 gives S_enc 448; the block's scale is 6 * 448 / 6 = 448, so a step is 1.
    x = [6.0, -6.0, -0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.9, 1, 2, 3, 4]
    q = quant.quantize_nvfp4(torch.tensor([x]))
    # ties go to the even code: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4
    expected = [6, -6, 0, 0, 0.5, 1, 1, 2, 2, 4, 4, 4, 1, 2, 3, 4]
    assert q.scales.float().tolist() == [[448.0]] and q.step.tolist() == [[1.0]]
    assert q.codes[0, :2].tolist() == [0xF7, 0x08]  # 6 is code 7, -6 code 15, -0 code 8; low first
    assert q.dequantize().tolist() == [expected]


# ---------------------------------------------------------------------------------------------
# The bounds at the top of quant.py and in docs/precision.md


def quantized(x, precision, block=(1, 16)):
    """x (M, K) in one of FORMATS -> (Q(x), the bound on |x - Q(x)|, float32's roundings)."""
    size = x.double().abs()
    if precision == "fp8":
        values, scale = quant._exact_values(x, PRECISIONS["fp8"], block, torch.bfloat16)
        m = min(448 / size.max(), torch.tensor(quant.FLT_MAX, dtype=torch.float64))
        # Transformer Engine divides once, 448 / amax (common/recipe/recipe_common.cuh).
        codes = (x.float() * m.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(values.float(), codes.float()) and scale == m.float().reciprocal()
        bound = torch.minimum(size, torch.maximum(size / 17, 2.0**-10 / m))
        return values.double() * scale.double(), bound, size * 2.0**-19 + 7 * 2.0**-150

    _, four_over_six, row_scaled = PRECISIONS[precision]
    how = block, four_over_six, row_scaled and block == (1, 16)
    q = quant.quantize_nvfp4(x, *how)
    assert torch.equal(quant.fake_quantize_nvfp4(x.float(), *how), q.dequantize())
    amax = q.amax.double().reshape(-1, 1)
    m = 6 * (256 if four_over_six else 448)
    unit = amax / m
    s = q.scales.double().repeat_interleave(16, dim=1)[:, : x.shape[1]]
    d = s * unit
    u = size / d  # infinite where s is 0, NaN where x is 0 too: neither is <= 6
    h = torch.where(u < 2, 0.25, torch.where(u < 4, 0.5, (6 - u).clamp(max=1)))
    bound = torch.where(u <= 6, d * h, torch.maximum(size / 17, 6 * 2.0**-10 * unit))
    saturates = (amax < m / quant.FLT_MAX) | ((d < 1 / quant.FLT_MAX) & (s > 0))  # a reciprocal
    bound = torch.where(saturates, size, torch.minimum(size, bound))
    return q.dequantize(torch.float64), bound, size * 2.0**-19 + (6 * s + 7) * 2.0**-150


def pick(choices, shape, g):
    choices = torch.as_tensor(choices, dtype=torch.float64)
    return choices[torch.randint(len(choices), shape, generator=g)]


def tensor(kind, amax, rows, columns, precision, block, seed):
    """A float32 tensor (rows, columns) of a kind. Its largest magnitude is amax, for the two kinds
    of ties the number below amax for which float32's arithmetic is exact."""
    g = torch.Generator().manual_seed(seed)
    four_over_six = PRECISIONS[precision].four_over_six
    m = 448 if precision == "fp8" else 6 * 256 if four_over_six else 6 * 448
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    blocks = -(-rows // block[0]), -(-columns // 16)

    def each_block(values):  # one value a block -> one an element
        values = values.repeat_interleave(block[0], dim=0).repeat_interleave(16, dim=1)
        return values[:rows, :columns]

    if kind == "sparse":
        x = x * (torch.rand(rows, columns, generator=g) < 0.1)
    elif kind == "levels":  # blocks up to 2^40 apart: E4M3's subnormal scales, 0 and float32's end
        x = x * torch.exp2(-each_block(torch.randint(0, 41, blocks, generator=g).double()))
    elif kind.startswith("ties"):
        e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448
        ties = (e4m3[1:] + e4m3[:-1]) / 2
        if precision == "fp8":
            x = pick(ties, (rows, columns), g)
        elif kind == "ties of codes":  # halfway between codes, block scales that are powers of two
            x = pick([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], (rows, columns), g)
            x[:, ::16] = 6
            x = x * each_block(torch.exp2(torch.randint(-9, 8, blocks, generator=g).double()))
        else:  # the largest of a block brings its scale, with 6 or with 4, halfway between two
            code = [6.0, 4.0] if four_over_six else [6.0]
            x = each_block(pick(ties[ties < m / 6], blocks, g) * pick(code, blocks, g))
            x = x * pick([1.0, 1.0, 0.5, 0.3, 0.0], (rows, columns), g)
        x = x * pick([-1.0, 1.0], (rows, columns), g)
        x = x * (1 + pick([0.0, 0.0, -(2.0**-23), 2.0**-23], (rows, columns), g))
        x[:, 0] = m  # each row's unit is 1 ...
        unit = 2.0 ** min(math.floor(math.log2(amax / m)), 116)
        amax = min(m * unit, quant.FLT_MAX)  # ... and becomes a power of two
    x = x / x.abs().max().clamp(min=1e-30) * amax
    return x.clamp(-quant.FLT_MAX, quant.FLT_MAX).float()


def magnitudes():
    """Largest magnitudes: anywhere in float32, and where the bounds' range and float32 end."""
    exponents, mantissas = st.integers(-149, 127), st.floats(1, 2)
    anywhere = st.builds(lambda e, m: min(2.0**e * m, quant.FLT_MAX), exponents, mantissas)
    ends = [m / quant.FLT_MAX for m in (6 * 448, 6 * 256, 448)] + [2.0**-126, quant.FLT_MAX / 4]
    ends, off = st.sampled_from(ends), st.sampled_from([1 - 2.0**-20, 1.0, 1 + 2.0**-20])
    above = st.integers(-2, 12)  # block steps end up to 2^9 * 16 above
    near = st.builds(lambda end, off, e: min(end * off * 2.0**e, quant.FLT_MAX), ends, off, above)
    return st.one_of(anywhere, near, st.just(quant.FLT_MAX), st.just(2.0**-149))


TENSORS = dict(
    kind=st.sampled_from(["normal", "sparse", "levels", "ties of codes", "ties of scales"]),
    rows=st.integers(1, 33),
    columns=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
BLOCKS = st.sampled_from([(1, 16), (16, 16)])


@given(**TENSORS, amax=magnitudes(), precision=st.sampled_from(FORMATS), block=BLOCKS)
def test_the_error_stays_within_the_proven_bound(kind, amax, rows, columns, precision, block, seed):
    x = tensor(kind, amax, rows, columns, precision, block, seed)
    values, bound, roundings = quantized(x, precision, block)
    assert ((x.double() - values).abs() <= bound + roundings).all()


def attained(x, precision="nvfp4"):
    """The error of each element of a row where it equals its bound, and None elsewhere."""
    values, bound, _ = quantized(torch.tensor([x]), precision)
    errors = (torch.tensor([x]) - values).abs()
    return [e if e == b else None for e, b in zip(errors[0].tolist(), bound[0].tolist())]


def test_the_bound_is_attained():
    assert attained([6.0, 5.0, 2.5, 0.25]) == [0, 1, 0.5, 0.25]  # halfway between two codes
    # Where a block becomes 0: its exact scale 2^-10 is halfway between 0 and 2^-9.
    block = [2688.0] + [0.0] * 15
    assert attained([*block, 6 * 2.0**-10])[16] == 6 * 2.0**-10
    assert attained([*block, 6 * 2.0**-10 * (1 + 2.0**-20)])[16] is None  # the scale is 2^-9
    # Where 1 / d saturates: d is 2^-129 and FLT_MAX about 2^128, so 6 d becomes 3 d or less.
    small = [value * 2.0**-120 for value in block]
    assert quantized(torch.tensor([[*small, 6 * 2.0**-129]]), "nvfp4")[0][0, 16] == 3 * 2.0**-129
    # FP8: 17 is halfway between 16 and 18, and 2^-10 between 0 and 2^-9.
    assert attained([448.0, 17.0, 2.0**-10], "fp8")[1:] == [1, 2.0**-10]


@pytest.mark.parametrize("precision", FORMATS[:4])
@pytest.mark.parametrize(
    "exact, rounded", [(136, 128), (17 / 1024, 16 / 1024), (5 / 1024, 4 / 1024)]
)
def test_the_bound_is_attained_where_a_scale_is_rounded_down(exact, rounded, precision):
    # Exact scales halfway between two E4M3 numbers, of which the lower is even: 136 between 128 and
    # 144, the smallest such in the normal range, and one between two subnormal numbers.
    largest = 1536 if PRECISIONS[precision].four_over_six else 2688  # the unit is 1
    # The others are codes; four-over-six keeps 6, since 4 is far from them.
    x = [largest] + [0.0] * 15 + [6 * exact] + [0.5 * rounded] * 15
    assert attained(x, precision)[16] == 6 * (exact - rounded)


def test_the_errors_of_a_block_are_added_in_the_order_of_the_gpu():
    # Along rows one after the other: 2^24 + 1 is rounded to 2^24, twice.
    errors = torch.zeros(1, 16, 1, 16)
    errors[0, 0, 0, :3] = torch.tensor([2.0**24, 1, 1])
    assert quant._error(0, errors) == 2.0**24
    # Then rows r and r + 8, r + 4, r + 2 and r + 1: (2^24 + 1) + (1 + 1), and the first is 2^24.
    errors = torch.zeros(1, 16, 1, 16)
    errors[0, [0, 8, 1, 3], 0, 0] = torch.tensor([2.0**24, 1, 1, 1])
    assert quant._error(0, errors) == 2.0**24 + 2


def matmul_error(x, weight, precision):
    """(error of SimulatedMatmul, the bound on it, the roundings to add), each (M, out)."""
    xq, x_bound, x_roundings = quantized(x, precision)
    wq, w_bound, w_roundings = quantized(weight, precision, (16, 16))
    got = quant.SimulatedMatmul(weight, None, PRECISIONS[precision])(x).double()
    limit = x.double().abs() @ (w_bound + w_roundings).T + (x_bound + x_roundings) @ wq.abs().T
    # Product and result are each rounded to BF16 (2^-8), and at most 128 terms are summed in
    # float32 (128 * 2^-24). TE holds its own kernels to 8e-3, which is more.
    product = xq @ wq.T
    roundings = 2.0**-7 * (1 + 2.0**-8) * product.abs() + 2.0**-17 * (xq.abs() @ wq.abs().T)
    assert ((got - product).abs() <= roundings).all()  # it is the product of Q(x) and Q(W)
    return (got - x.double() @ weight.double().T).abs(), limit, roundings


@given(
    **TENSORS,
    weight_kind=TENSORS["kind"],
    out=st.integers(1, 40),
    amaxes=st.tuples(st.floats(2.0**-30, 2.0**30), st.floats(2.0**-30, 2.0**30)),
    precision=st.sampled_from([p for p in quant.PRECISIONS if p != "bf16"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_layers_error_stays_within_the_bound_that_follows(
    kind, weight_kind, rows, columns, out, amaxes, precision, dtype, seed
):
    x = tensor(kind, amaxes[0], rows, columns, precision, (1, 16), seed).to(dtype)
    weight = tensor(weight_kind, amaxes[1], out, columns, precision, (16, 16), seed + 1).to(dtype)
    error, limit, roundings = matmul_error(x, weight, precision)
    assert (error <= limit + roundings).all()


@pytest.mark.parametrize(
    "precision, x",
    [  # 5 and 3.5 become 4, and 17 becomes 16; 6 and 448 are exact
        ("nvfp4", [[6.0] + [5.0] * 15]),
        ("nvfp4_row", [[6.0] + [5.0] * 15]),
        ("nvfp4_4over6", [[6.0] + [3.5] * 15]),  # 4 for the largest has the same error: 6 is kept
        ("fp8", [[448.0] + [0.0] * 15, [17.0] * 16]),
    ],
)
def test_a_layer_attains_the_bound_and_gaussian_noise_stays_well_below(precision, x):
    x = torch.tensor(x)
    error, limit, _ = (float(e[-1, -1]) for e in matmul_error(x, x, precision))
    assert error == pytest.approx(limit, rel=1e-4)  # the limit includes the operands' roundings
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 128, generator=g), torch.randn(640, 128, generator=g)
    error, limit, _ = matmul_error(x, weight, precision)
    assert 0.19 < (error / limit).max() < 0.28  # as docs/precision.md says


# ---------------------------------------------------------------------------------------------
# Tensors and layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_and_shape_is_quantized(dtype):
    x = torch.randn(2, 3, 5, 23).to(dtype)
    flat, got = quant.quantize_nvfp4(x.reshape(-1, 23).float()), quant.fake_quantize_nvfp4(x)
    assert got.dtype == dtype and torch.equal(got, flat.dequantize(dtype).reshape(x.shape))
    assert torch.equal(quant.quantize_nvfp4(x).dequantize(dtype), got)


def test_what_is_no_number_is_refused_or_seen():
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 32)
        x[1, 5] = value
        with pytest.raises(ValueError, match="NaN or an infinity"):
            quant.quantize_nvfp4(x)
        assert quant.fake_quantize_nvfp4(x).isnan().all()
    for x, how, word in (
        (torch.randn(4, 16), dict(block=(1, 32)), "blocks are"),
        (torch.randn(4, 16), dict(block=(16, 16), row_scaled=True), "row_scaled"),
        (torch.zeros(0, 16), {}, "float tensor"),
        (torch.ones(2, 16, dtype=torch.int32), {}, "float tensor"),
    ):
        for quantize in (quant.quantize_nvfp4, quant.fake_quantize_nvfp4):
            with pytest.raises(ValueError, match=word):
                quantize(x, **how)


@pytest.mark.parametrize("four_over_six", [False, True])
def test_a_row_scaled_row_is_what_it_is_alone(four_over_six):
    x = torch.randn(9, 50) * torch.logspace(-3, 3, 9)[:, None]
    whole = quant.quantize_nvfp4(x, four_over_six=four_over_six, row_scaled=True)
    for i in range(9):
        alone = quant.quantize_nvfp4(x[i : i + 1], four_over_six=four_over_six)
        assert torch.equal(whole.codes[i : i + 1], alone.codes) and whole.amax[i] == alone.amax
        assert torch.equal(whole.scales[i : i + 1], alone.scales)
        assert torch.equal(whole.step[i : i + 1], alone.step)
    assert not torch.equal(quant.fake_quantize_nvfp4(x), whole.dequantize())


def simulated(layer, precision):
    weight, precision = layer.weight.flatten(1), quant.PRECISIONS[precision]
    return quant.QuantizedLinear(layer, quant.SimulatedMatmul(weight, layer.bias, precision))


def test_codes_times_scales_are_exact_in_bfloat16():
    x = torch.randn(64, 64) * torch.exp2(torch.randint(-30, 30, (64, 1)).float())
    values, _ = quant._exact_values(x, PRECISIONS["nvfp4"], (1, 16), torch.bfloat16)
    exact, _ = quant._exact_values(x, PRECISIONS["nvfp4"], (1, 16), torch.float32)
    assert torch.equal(values.float(), exact)


def test_the_bias_is_added():
    x, bias = torch.eye(16)[:1], torch.arange(16.0)
    for precision in ("nvfp4", "fp8"):
        matmul = quant.SimulatedMatmul(torch.eye(16), bias, PRECISIONS[precision])
        assert torch.allclose(matmul(x), x + bias)


def test_a_1x1_convolution_is_a_linear_over_channels_and_takes_a_new_weight():
    conv, linear, x = nn.Conv2d(24, 40, 1), nn.Linear(24, 40), torch.randn(2, 24, 3, 3)
    swapped = simulated(conv, "nvfp4")
    swapped.set_weight(linear.weight[:, :, None, None])
    linear.bias = conv.bias
    expected = simulated(linear, "nvfp4")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(swapped(x), expected)


def test_layers_are_swapped_by_name_and_size_and_reported():
    layers = dict(embed=nn.Linear(32, 64), small=nn.Linear(16, 16), big=nn.Linear(64, 128))
    model = nn.ModuleDict(layers | dict(conv1=nn.Conv2d(3, 32, 1), conv3=nn.Conv2d(3, 3, 3)))
    rows = quant.quantize_linears(model, "nvfp4", skip=("embed",), min_dim=16)
    assert rows == [
        ("embed", 32, 64, "kept: embed"),
        ("small", 16, 16, "kept: max(in, out) <= 16"),
        ("big", 64, 128, "nvfp4"),
        ("conv1", 3, 32, "nvfp4"),
    ]
    swapped = [name for name in model if isinstance(model[name], quant.QuantizedLinear)]
    assert swapped == ["big", "conv1"]
    assert quant.quantize_linears(nn.Linear(3, 4), "bf16")[0][3] == "kept: precision is bf16"
    with pytest.raises(ValueError, match="int3"):
        quant.quantize_linears(model, "int3")


def test_a_compiled_layer_is_not_compiled_again_for_each_number_of_tokens():
    """As prompts have; the second number makes it one for any number."""
    counters.clear()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = quant.SimulatedMatmul(weight, None, quant.PRECISIONS["nvfp4"])
    compiled = torch.compile(layer, backend="eager")
    for tokens in (40, 50, 61, 72, 85):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    assert counters["stats"]["unique_graphs"] <= 2
