"""NVFP4: Transformer Engine's bytes, a fast path equal to the slow one, a bounded error.

The largest ratio of error and bound in 20,000 examples, for each kind of tensor and precision:

    python -m pytest tests/test_quant.py -k bound --hypothesis-profile=thorough -s
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from hypothesis import example, given
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
    weight, precision = layer.weight.flatten(1), quant.PRECISIONS[precision]
    return quant.QuantizedLinear(layer, quant.SimulatedMatmul(weight, layer.bias, precision))


# ---------------------------------------------------------------------------------------------
# The bounds of quant.py's essay

BOTH = quant.Precision("nvfp4", four_over_six=True, row_scaled=True)
PRECISIONS = quant.PRECISIONS | {"nvfp4_row_4over6": BOTH}
FORMATS = ("nvfp4", "nvfp4_row", "nvfp4_4over6", "nvfp4_row_4over6", "fp8")
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448


class Quantized(NamedTuple):
    """What quant makes of a tensor x, and the essay's bound on |x - Q(x)|, element by element."""

    values: torch.Tensor  # Q(x), float64
    bound: torch.Tensor  # without float32's roundings
    roundings: torch.Tensor
    in_range: torch.Tensor  # False where a reciprocal saturates


def quantized(x, precision, block):
    """x (M, K) in one of FORMATS."""
    size = x.double().abs()
    if precision == "fp8":
        values, step = quant._exact_values(x, PRECISIONS["fp8"], block, torch.bfloat16)
        m = min(448 / size.max(), torch.tensor(quant.FLT_MAX, dtype=torch.float64))
        limit = torch.minimum(size, torch.maximum(size / 17, 2.0**-10 / m))
        roundings = size * 2.0**-19 + 7 * 2.0**-150
        # Decoded in float64: nothing decodes one element in float32, where FLT_MAX would overflow.
        return Quantized(values.double() * step.double(), limit, roundings, size >= 0)

    four_over_six = PRECISIONS[precision].four_over_six
    row_scaled = PRECISIONS[precision].row_scaled and block == (1, 16)
    q = quant.quantize_nvfp4(x, block, four_over_six, row_scaled)
    values = q.dequantize()
    fast = quant.fake_quantize_nvfp4(x.float(), block, four_over_six, row_scaled)
    assert torch.equal(fast, values)

    amax = q.amax.double().reshape(-1, 1)
    m = 6 * (256 if four_over_six else 448)
    unit = amax / m
    s = q.scales.double().repeat_interleave(16, dim=1)[:, : x.shape[1]]
    d = s * unit
    u = size / d  # infinite where s is 0, NaN where x is 0 too: neither is <= 6
    h = torch.where(u < 2, 0.25, torch.where(u < 4, 0.5, (6 - u).clamp(max=1)))
    limit = torch.where(u <= 6, d * h, torch.maximum(size / 17, 6 * 2.0**-10 * unit))
    in_range = (amax >= m / quant.FLT_MAX) & ((d >= 1 / quant.FLT_MAX) | (s == 0))
    limit = torch.where(in_range, torch.minimum(size, limit), size)
    roundings = size * 2.0**-19 + (6 * s + 7) * 2.0**-150
    return Quantized(values.double(), limit, roundings, in_range)


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

    if kind == "outlier":
        x[0, 0] = 3e4
    elif kind == "uniform":
        x = torch.rand(rows, columns, generator=g, dtype=torch.float64)
    elif kind == "structured":
        x = torch.arange(1.0, rows * columns + 1).reshape(rows, columns).double().sin()
    elif kind == "sparse":
        x = x * (torch.rand(rows, columns, generator=g) < 0.1)
    elif kind == "levels":  # blocks up to 2^40 apart: E4M3's subnormal scales, 0 and float32's end
        x = x * torch.exp2(-each_block(torch.randint(0, 41, blocks, generator=g).double()))
    elif kind in ("ties of codes", "ties of scales"):
        ties = (E4M3[1:] + E4M3[:-1]) / 2
        if precision == "fp8":
            x = pick(ties, (rows, columns), g)
        elif kind == "ties of codes":  # halfway between codes, block scales that are powers of two
            x = pick([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], (rows, columns), g)
            x[:, ::16] = 6
            x = x * each_block(torch.exp2(torch.randint(-9, 8, blocks, generator=g).double()))
        else:  # the largest of a block brings its scale, with 6 or with 4, halfway between two
            code = [6.0, 4.0] if four_over_six else [6.0]
            ties = ties[ties < m / 6]
            x = each_block(pick(ties, blocks, g) * pick(code, blocks, g))
            x = x * pick([1.0, 1.0, 0.5, 0.3, 0.0], (rows, columns), g)
        x = x * pick([-1.0, 1.0], (rows, columns), g)
        x = x * (1 + pick([0.0, 0.0, -(2.0**-23), 2.0**-23], (rows, columns), g))
        x[:, 0] = m  # each row's unit is 1 ...
        unit = 2.0 ** min(math.floor(math.log2(amax / m)), 116)
        amax = min(m * unit, quant.FLT_MAX)  # ... and becomes a power of two
    x = x / x.abs().max().clamp(min=1e-30) * amax
    return x.clamp(-quant.FLT_MAX, quant.FLT_MAX).float()


def magnitudes():
    """Largest magnitudes: anywhere in float32, and where the essay's range and float32 end."""
    anywhere = st.builds(
        lambda exponent, mantissa: min(2.0**exponent * mantissa, quant.FLT_MAX),
        st.integers(-149, 127),
        st.floats(1, 2),
    )
    ends = [m / quant.FLT_MAX for m in (6 * 448, 6 * 256, 448)] + [2.0**-126, quant.FLT_MAX / 4]
    near_an_end = st.builds(
        lambda end, off, exponent: end * off * 2.0**exponent,
        st.sampled_from(ends),
        st.sampled_from([1 - 2.0**-20, 1.0, 1 + 2.0**-20]),
        st.integers(-2, 12),  # block steps end up to 2^9 * 16 above
    ).map(lambda amax: min(amax, quant.FLT_MAX))
    return st.one_of(anywhere, near_an_end, st.just(quant.FLT_MAX), st.just(2.0**-149))


TENSORS = dict(
    kind=st.sampled_from(
        ["normal", "outlier", "uniform", "structured", "sparse", "levels"]
        + ["ties of codes", "ties of scales"]
    ),
    rows=st.integers(1, 33),
    columns=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)


@pytest.fixture(scope="module")
def largest_ratios():
    """{(kind, precision): the largest error / bound seen}, printed at the module's end."""
    ratios = defaultdict(float)
    yield ratios
    columns = [p for p in (*FORMATS, *quant.PRECISIONS) if any(p == key[1] for key in ratios)]
    columns = list(dict.fromkeys(columns))
    print("\n\nlargest error / bound".ljust(32), *(f"{p:>17}" for p in columns))
    for kind in sorted({key[0] for key in ratios}):
        row = (f"{ratios[kind, p]:17.5f}" if (kind, p) in ratios else " " * 17 for p in columns)
        print(f"{kind:30}", *row)


def note(ratios, kind, precision, ratio):
    if ratio.numel():
        ratios[kind, precision] = max(ratios[kind, precision], float(ratio.max()))


@given(
    **TENSORS,
    amax=magnitudes(),
    precision=st.sampled_from(FORMATS),
    block=st.sampled_from([(1, 16), (16, 16)]),
)
@example(  # amax above 2688 / FLT_MAX, one block's step below 1 / FLT_MAX: |x| lost, not |x| / 17
    kind="levels", amax=2.0**-116, rows=5, columns=1, precision="nvfp4", block=(1, 16), seed=20
)
def test_the_error_stays_within_the_proven_bound(
    largest_ratios, kind, amax, rows, columns, precision, block, seed
):
    x = tensor(kind, amax, rows, columns, precision, block, seed)
    q = quantized(x, precision, block)
    ratio = (x.double() - q.values).abs() / (q.bound + q.roundings)
    zero = q.values == 0  # an error of |x|, which is often the bound too: not to hide the others
    note(largest_ratios, kind, precision, ratio[q.in_range & ~zero])
    note(largest_ratios, "(Q(x) = 0)", precision, ratio[q.in_range & zero])
    note(largest_ratios, "(a reciprocal saturates)", precision, ratio[~q.in_range])
    assert (ratio <= 1).all()


def test_the_bound_is_attained_halfway_between_codes():
    x = torch.tensor([[6.0, 5.0, 2.5, 0.25] + [0.0] * 12])
    error = (x - quant.quantize_nvfp4(x).dequantize()).abs()
    assert error[0, :4].tolist() == [0, 1, 0.5, 0.25]


@pytest.mark.parametrize("precision", FORMATS[:4])
@pytest.mark.parametrize(
    "exact, rounded", [(136, 128), (17 / 1024, 16 / 1024), (5 / 1024, 4 / 1024)]
)
def test_the_bound_is_attained_where_a_scale_is_rounded_down(exact, rounded, precision):
    # Exact scales halfway between two E4M3 numbers, of which the lower is even: 136 between 128 and
    # 144, the smallest such in the normal range, and one between two subnormal numbers.
    x = torch.zeros(1, 32)
    x[0, 0] = 1536 if PRECISIONS[precision].four_over_six else 2688  # the unit is 1
    x[0, 16] = 6 * exact
    x[0, 17:] = 0.5 * rounded  # a code; four-over-six keeps 6, since 4 is far from these
    q = quantized(x, precision, (1, 16))
    assert q.values[0, 16] == 6 * rounded
    assert x[0, 16] - q.values[0, 16] == q.bound[0, 16] == 6 * (exact - rounded)


@pytest.mark.parametrize("precision", FORMATS[:2])
def test_the_bound_is_attained_where_a_block_becomes_0(precision):
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688, 6 * 2.0**-10  # an exact scale of 2^-10, halfway between 0 and 2^-9
    q = quantized(x, precision, (1, 16))
    assert q.values[0, 16] == 0 and x[0, 16] == q.bound[0, 16]
    x[0, 16] *= 1 + 2.0**-20  # a little more, and the scale is 2^-9
    assert quantized(x, precision, (1, 16)).values[0, 16] == 3 * 2.0**-9


def test_fp8_attains_its_bound_halfway():
    x = torch.tensor([[448.0, 17.0, 2.0**-10]])  # 17 is between 16 and 18, 2^-10 between 0 and 2^-9
    q = quantized(x, "fp8", (1, 16))
    assert (x - q.values)[0, 1:].tolist() == q.bound[0, 1:].tolist() == [1, 2.0**-10]


def test_a_step_whose_reciprocal_saturates_can_lose_more_than_half_a_gap():
    # Step 2^-9 * 2^-120 = 2^-129, so 1 / step is 2^129 and FLT_MAX about half of that: an element
    # at 6 steps gets code 3. Half a gap between codes would be 1 step at most.
    unit = 2.0**-120
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688 * unit, 6 * 2.0**-9 * unit
    q = quantized(x, "nvfp4", (1, 16))
    assert q.in_range[0, 0] and not q.in_range[0, 16]
    assert q.values[0, 16] == x[0, 16].double() / 2 and q.bound[0, 16] == x[0, 16].double()


@given(
    **TENSORS,
    amax=st.floats(2.0**-90, 2.0**100),  # above 2^117 code * scale * amax overflows in the choice
    block=st.sampled_from([(1, 16), (16, 16)]),
)
def test_four_over_six_is_in_no_block_worse_than_six(kind, amax, rows, columns, block, seed):
    x = tensor(kind, amax, rows, columns, "nvfp4_4over6", block, seed)
    kept = quantized(x, "nvfp4_4over6", block).values
    tiles = quant._tile(x, block)
    block_amax = tiles.abs().amax(dim=(2, 3), keepdim=True)
    s, multiplier = quant._block_scales(block_amax, x.abs().max(), 256, on_four=False)
    six = quant._round((tiles * multiplier).clamp(-6, 6), 1, 1.0).double() * s
    error_of_six = (six * (float(x.abs().max()) / 1536) - tiles.double()).abs().sum(dim=(2, 3))
    error = (quant._tile(kept - x.double(), block).double()).abs().sum(dim=(2, 3))
    assert (error <= error_of_six + 2.0**-18 * tiles.double().abs().sum(dim=(2, 3))).all()


def matmul_error(x, weight, precision):
    """(error of SimulatedMatmul, the essay's bound on it, the roundings to add), each (M, out)."""
    xq, wq = quantized(x, precision, (1, 16)), quantized(weight, precision, (16, 16))
    got = quant.SimulatedMatmul(weight, None, PRECISIONS[precision])(x).double()
    size, exact = x.double().abs(), x.double() @ weight.double().T
    limit = size @ (wq.bound + wq.roundings).T + (xq.bound + xq.roundings) @ wq.values.abs().T
    # As in the test of the simulated linear: two roundings to BF16 and a sum in float32.
    product = (xq.values @ wq.values.T).abs()
    roundings = 2.0**-7 * (1 + 2.0**-8) * product
    roundings += 2.0**-17 * (xq.values.abs() @ wq.values.abs().T)
    return (got - exact).abs(), limit, roundings


@given(
    **TENSORS,
    weight_kind=TENSORS["kind"],
    out=st.integers(1, 40),
    amaxes=st.tuples(st.floats(2.0**-30, 2.0**30), st.floats(2.0**-30, 2.0**30)),
    precision=st.sampled_from([p for p in quant.PRECISIONS if p != "bf16"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_layers_error_stays_within_the_bound_that_follows(
    largest_ratios, kind, weight_kind, rows, columns, out, amaxes, precision, dtype, seed
):
    x = tensor(kind, amaxes[0], rows, columns, precision, (1, 16), seed).to(dtype)
    weight = tensor(weight_kind, amaxes[1], out, columns, precision, (16, 16), seed + 1).to(dtype)
    error, limit, roundings = matmul_error(x, weight, precision)
    assert (error <= limit + roundings).all()
    note(largest_ratios, "(a layer)", precision, error / (limit + roundings).clamp(min=2.0**-149))


@pytest.mark.parametrize(
    "precision, x",
    [  # 5 and 3.5 become 4, and 17 becomes 16; 6 and 448 are exact
        ("nvfp4", [[6.0] + [5.0] * 15]),
        ("nvfp4_row", [[6.0] + [5.0] * 15]),
        ("nvfp4_4over6", [[6.0] + [3.5] * 15]),  # 4 for the largest has the same error: 6 is kept
        ("fp8", [[448.0] + [0.0] * 15, [17.0] * 16]),
    ],
)
def test_a_layer_attains_the_bound_that_follows(precision, x):
    x = torch.tensor(x)
    error, limit, roundings = (float(e[-1, -1]) for e in matmul_error(x, x, precision))
    xq, wq = quantized(x, precision, (1, 16)).values, quantized(x, precision, (16, 16)).values
    exact = float((x.double() @ x.double().T - xq @ wq.T).abs()[-1, -1])
    assert exact == pytest.approx(limit, rel=1e-4)  # the limit includes the operands' roundings
    assert abs(error - limit) <= roundings


@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_4over6", "nvfp4_row", "fp8"])
def test_a_layer_of_gaussian_noise_stays_well_below_its_bound(largest_ratios, precision):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 128, generator=g), torch.randn(640, 128, generator=g)
    error, limit, _ = matmul_error(x, weight, precision)
    note(largest_ratios, "(a layer of Gaussian noise)", precision, error / limit)
    assert 0.19 < (error / limit).max() < 0.28


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_a_blocks_largest_magnitude_is_found_by_integers_too(block, dtype):
    x = (torch.randn(32, 48) * torch.logspace(-40, 4, 48)).to(dtype)  # subnormal numbers too
    x[3, 20] = float("inf")
    x[20, 4] = float("nan")
    tiles = quant._tile(x, block)
    expected = tiles.float().abs().amax(dim=(2, 3), keepdim=True)
    assert torch.equal(quant._block_amax(tiles).nan_to_num(-1), expected.nan_to_num(-1))


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
        _, four_over_six, row_scaled = PRECISIONS[precision]
        xq = quant.quantize_nvfp4(x, (1, 16), four_over_six, row_scaled).dequantize(torch.float64)
        wq = quant.quantize_nvfp4(weight, (16, 16), four_over_six).dequantize(torch.float64)
    product = xq @ wq.T
    expected = product + (layer.bias.double() if bias else 0)
    # Product and result are each rounded to BF16 (2^-8), and at most 128 terms are summed in
    # float32 (128 * 2^-24). TE holds its own kernels to 8e-3, which is more.
    rounded = 2.0**-8 * (product.abs() + expected.abs() + 2.0**-8 * product.abs())
    tolerance = rounded + 2.0**-17 * (xq.abs() @ wq.abs().T)
    assert ((got.double() - expected).abs() <= tolerance).all()


def test_codes_times_scales_are_exact_in_bfloat16():
    x = torch.randn(64, 64) * torch.exp2(torch.randint(-30, 30, (64, 1)).float())
    values, scale = quant._exact_values(x, PRECISIONS["nvfp4"], (1, 16), torch.bfloat16)
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
