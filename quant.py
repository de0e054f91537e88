"""NVFP4: the number format, quantization, and the linear layer that explores.

The format. An E2M1 code is 0, .5, 1, 1.5, 2, 3, 4 or 6 with a sign. Each 16 neighbours along the
reduction dimension share an E4M3 block scale s (1x16 blocks for activations; weights share one
per 16x16 tile, so that a tile has the same scale in both directions), and the tensor has one
float32 scale, known through its largest magnitude `amax`:

    value = code * s * amax / (6 * 448)          448: E4M3's largest value

How a scale is found (Transformer Engine, common/cast/nvfp4; Python twin in
pytorch/custom_recipes/reference_nvfp4.py; equal bytes in tests/nvfp4_vectors.safetensors):

    S_enc = 6 * 448 / amax                       the tensor's encode scale
    s     = e4m3(block_amax * (S_enc * (1/6)))   puts the block's largest element near code 6
    code  = e2m1(clamp(x / (s / S_enc), -6, 6))  both roundings go to the nearest, ties to even

How wrong it can be. Let M = 6 * 448, or 6 * 256 for four-over-six, and unit = amax / M. A code c
stands for c * d, where d = s * unit is the block's step. The error is never more than |x|, because
0 is a code. With u = |x| / d it is also at most

    d * h(u)                           for u <= 6
    max(|x| / 17, 6 * 2^-10 * unit)    for u > 6

    h = 1/4 for u < 2,  1/2 for 2 <= u < 4,  1 for 4 <= u <= 5,  6 - u for 5 < u <= 6

The first line is half the gap between two codes and, above 5, the distance to code 6. The second is
for elements that are larger than 6 d and get code 6, which happens only where s was rounded down.
E4M3 keeps 3 bits after the leading one, so s loses at most 1/17 of its exact value (17 becomes 16,
and u reaches 6.375); below 2^-6, where E4M3 has equal steps of 2^-9, it loses at most 2^-10. This
includes s = 0, where the whole block becomes 0. Both lines are tight: an x halfway between two
codes attains the first, and the largest element of a block whose exact s is halfway between two
E4M3 numbers attains the second, each part of it in its range. Float32's own roundings add at most
2^-19 |x| + (6 s + 7) * 2^-150.

This holds while no reciprocal exceeds FLT_MAX, which means amax >= M / FLT_MAX (7.9e-36, for
four-over-six 4.5e-36) and, in each block, d >= 1 / FLT_MAX (2.9e-39) or s = 0. Elsewhere S_enc or
the reciprocal of the step saturates at FLT_MAX, as it does on the GPU. Then x is multiplied by less
than 1 / d and its code comes out too small. Only the bound |x| is left, with the same roundings.

With row scales each row obeys this with its own amax. Four-over-six tries s and 1.5 s for each
block and keeps the smaller mean absolute error; a value on 4 leaves a gap of 1/4 below the block's
largest element where 6 leaves 1/3. Either choice obeys this with the s that is kept. (Above
amax = 2.2e35 the two errors can overflow, and the choice need not be the better one.) The precision
fp8 is E4M3 with one scale a tensor, Q(x) = e4m3(m x) / m with m = min(448 / amax, FLT_MAX). Its
error is at most max(|x| / 17, 2^-10 / m), which is tight too, plus the same roundings with s = 0.

What a matmul does. The tensor core multiplies code * s exactly, accumulates in float32 and
applies alpha = amax_x * amax_w / 2688^2 at the end. A code has 2 significant bits and s has 4, so
code * s (at most 6 bits, exponents from -10 to 11) is exact in BF16: one BF16 matmul of these
products followed by alpha is the FP4 matmul up to the order of its sum and one more rounding to
BF16, before alpha. That is the simulation.

How wrong a layer can be. Let E_x and E_w hold the bounds above for each element of x and W. As
x w - Q(x) Q(w) = x (w - Q(w)) + (x - Q(x)) Q(w), the matmul's error is, besides its roundings,

    |x W^T - Q(x) Q(W)^T| <= |x| E_w^T + E_x |Q(W)|^T

This is tight too: x = W = (6, 5, ..., 5) attains it, since each 5 becomes 4 (in four-over-six
(6, 3.5, ..., 3.5) does, in fp8 a 17 that becomes 16). On Gaussian noise, with 128 terms in a sum,
errors of both signs cancel in part: the largest error of 160,000 outputs is 0.19 to 0.28 of its
bound.
"""

import torch
import torch.nn.functional as F
from torch import nn

import engine

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX, E4M3_MAX_FOUR_OVER_SIX = 6.0, 448.0, 256.0
FLT_MAX = torch.finfo(torch.float32).max
# Eager mode makes its passes over pieces of this many elements: on a CPU they stay in the L2 cache,
# on a GPU, where each pass is a kernel to launch, they only keep the float32 copies small.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 26}


# ---------------------------------------------------------------------------------------------
# The format, step by step


class NVFP4Tensor:
    """A tensor (..., K) as a Blackwell GPU stores it; leading dimensions are rows, M in all.

    codes: uint8 (M, ceil(K / 2)), two E2M1 codes a byte, the even element in the low nibble;
    scales: float8_e4m3fn (M, ceil(K / 16)), for 16x16 blocks each row repeats its tile's;
    amax: float32 scalar, or (M,) where each row has its own; scale_max: 448, or 256 for
    four-over-six.
    """

    def __init__(self, codes, scales, amax, shape, scale_max):
        self.codes, self.scales, self.amax = codes, scales, amax
        self.shape, self.scale_max = torch.Size(shape), scale_max

    def dequantize(self, dtype=torch.float32):
        """code * (scale * (amax / (6 * scale_max))) in float32, then `dtype`; (..., K)."""
        nibbles = torch.stack([self.codes & 0xF, self.codes >> 4], dim=-1).flatten(1)
        values = torch.tensor(E2M1, device=nibbles.device)[(nibbles & 0x7).long()]
        values = torch.where(nibbles >= 8, -values, values)[:, : self.shape[-1]]
        step = self.scales.float() * _global_step(self.amax.reshape(-1, 1), self.scale_max)
        values = values * step.repeat_interleave(16, dim=1)[:, : self.shape[-1]]
        return values.reshape(self.shape).to(dtype)


def quantize_nvfp4(x, block=(1, 16), four_over_six=False, row_scaled=False):
    """Quantize x (..., K), a float tensor, to NVFP4 with the bytes that Transformer Engine gives.

    block: (1, 16) for activations, (16, 16) for weights. row_scaled: each row (token) has a global
    scale of its own, so that it does not depend on the others; for (1, 16) only. Rows and columns
    that do not fill a block are padded with zeros, which changes no other element.
    Returns an NVFP4Tensor.
    Raises ValueError on a NaN or an infinity, another block, an empty or a non-float tensor.
    """
    x2d = _as_rows(x)
    if not torch.isfinite(x2d.float()).all():
        raise ValueError("quantize_nvfp4: the tensor holds a NaN or an infinity")
    y, scales, amax, scale_max = _scale_blocks(_tile(x2d, block), four_over_six, row_scaled)
    codes = _untile(_nearest_code(y), x2d.shape)
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    scales = scales.expand(-1, -1, block[0], 1).transpose(1, 2).flatten(2).flatten(0, 1)
    scales = scales[: len(x2d)].to(torch.float8_e4m3fn)
    amax = amax.flatten() if row_scaled else amax
    return NVFP4Tensor(codes[:, 0::2] | (codes[:, 1::2] << 4), scales, amax, x.shape, scale_max)


def _nearest_code(y):
    """E2M1 code (uint8) of each |y| <= 6, to the nearest value, ties to the even code."""
    magnitude, grid = y.abs().contiguous(), torch.tensor(E2M1, device=y.device)
    middle = (grid[1:] + grid[:-1]) / 2
    below = torch.bucketize(magnitude, middle)  # a tie stays below ...
    above = torch.bucketize(magnitude, middle, right=True)  # ... or goes above
    code = torch.where(below % 2 == 0, below, above).to(torch.uint8)
    return code | (torch.signbit(y).to(torch.uint8) << 3)


def _as_rows(x):
    if not x.is_floating_point() or x.dim() < 1 or x.numel() == 0:
        raise ValueError(
            f"NVFP4 needs a float tensor with elements, not {x.dtype} {tuple(x.shape)}"
        )
    return x.reshape(-1, x.shape[-1])


def _tile(x2d, block):
    """(M, K) -> float32 tiles (M / rows, K / 16, rows, 16), padded with zeros."""
    if tuple(block) not in ((1, 16), (16, 16)):
        raise ValueError(f"NVFP4 blocks are (1, 16) or (16, 16), not {block}")
    rows, columns = block
    x2d = F.pad(x2d.float(), (0, -x2d.shape[1] % columns, 0, -x2d.shape[0] % rows))
    return x2d.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)


def _untile(tiles, shape):
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def _global_step(amax, scale_max):
    # Divided first: scale * amax would overflow where amax is near float32's end.
    return amax / (E2M1_MAX * scale_max)


def _scale_blocks(tiles, four_over_six, row_scaled=False):
    """Tiles (a, b, rows, 16) -> (tiles on the code grid within +-6, scales (a, b, 1, 1), amax (),
    or (a, 1, 1, 1) if row_scaled, scale_max); scales are float32 with E4M3 values."""
    if row_scaled and tiles.shape[2] > 1:
        raise ValueError("row_scaled is for (1, 16) blocks")
    block_amax = tiles.abs().amax(dim=(2, 3), keepdim=True)
    amax, scale_max = block_amax.max(), E4M3_MAX
    if row_scaled:
        amax = block_amax.amax(dim=1, keepdim=True)
    if not four_over_six:
        scales, multiplier = _block_scales(block_amax, amax)
        return (tiles * multiplier).clamp(-E2M1_MAX, E2M1_MAX), scales, amax, scale_max

    scale_max, best = E4M3_MAX_FOUR_OVER_SIX, None
    for on_four in (False, True):
        scales, multiplier = _block_scales(block_amax, amax, scale_max, on_four)
        y = (tiles * multiplier).clamp(-E2M1_MAX, E2M1_MAX)
        value = _round_e2m1(y) * scales * amax / (E2M1_MAX * scale_max)
        error = _sum_in_order((value - tiles).abs())
        if best is None:
            best = y, scales, error
        else:
            take = error < best[2]  # a tie keeps 6
            best = torch.where(take, y, best[0]), torch.where(take, scales, best[1]), None
    return best[0], best[1], amax, scale_max


def _block_scales(block_amax, amax, scale_max=E4M3_MAX, on_four=None):
    """The two lines of the essay: each block's E4M3 scale (as float32) and what x is multiplied
    by to reach the code grid. on_four: None for plain NVFP4, else four-over-six's candidate."""
    # torch.div of two tensors is a true division; `number / tensor` multiplies by a reciprocal.
    s_enc = torch.div(torch.full_like(amax, E2M1_MAX * scale_max), amax).clamp(max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    if on_four is None:
        scales = block_amax * (s_enc * (1 / E2M1_MAX))
    else:
        scales = block_amax / E2M1_MAX * s_enc * (1.5 if on_four else 1.0)
    scales = scales.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return scales, (scales * s_enc.reciprocal()).reciprocal().clamp(max=FLT_MAX)


def _sum_in_order(errors):
    """(a, b, rows, 16) -> (a, b, 1, 1) in TE's order: along a row, then rows as a tree."""
    total = errors[..., 0]
    for column in range(1, 16):
        total = total + errors[..., column]
    while total.shape[2] > 1:
        half = total.shape[2] // 2
        total = total[:, :, :half] + total[:, :, half:]
    return total[..., None]


# ---------------------------------------------------------------------------------------------
# The same numbers, fast


def fake_quantize_nvfp4(x, block=(1, 16), four_over_six=False, row_scaled=False):
    """quantize_nvfp4(x, ...).dequantize(x.dtype) without packing, in few passes over memory.

    x: float (..., K); returns its shape and dtype. There is no check for NaN, because reading one
    back would stall a GPU: a NaN or an infinity anywhere makes the whole result NaN (row_scaled:
    its row).
    """
    x2d = _as_rows(x)
    if tuple(block) == (1, 16) and not four_over_six:
        values, _ = _fake_quantize_rows(x2d, x.dtype, row_scaled, decode=True)
    else:
        tiles = _tile(x2d, block)
        y, scales, amax, scale_max = _scale_blocks(tiles, four_over_six, row_scaled)
        values = _untile(_round_e2m1(y) * (scales * _global_step(amax, scale_max)), x2d.shape)
    return values.to(x.dtype).reshape(x.shape)


def _fake_quantize_rows(x2d, dtype, row_scaled, decode):
    """1x16 blocks of x2d (M, K): (values (M, K) in dtype, amax (), or (M, 1, 1) if row_scaled).
    Values are code * scale, which BF16 holds exactly, and with `decode` also times the global
    step."""
    columns = x2d.shape[1]
    if columns % 16:
        x2d = F.pad(x2d, (0, -columns % 16))
    blocks = x2d.unflatten(1, (-1, 16))
    block_amax = _block_amax(blocks)
    amax = block_amax.amax(dim=1, keepdim=True) if row_scaled else block_amax.max()
    scales, multiplier = _block_scales(block_amax, amax)
    if decode:
        scales = scales * _global_step(amax, E4M3_MAX)
    rows = max(1, PIECE.get(x2d.device.type, 1 << 26) // max(1, columns))
    if torch.compiler.is_compiling():  # which fuses the passes itself
        rows = max(1, len(blocks))
    values = torch.empty(blocks.shape, dtype=dtype, device=x2d.device)
    for i in range(0, len(blocks), rows):
        piece = slice(i, i + rows)
        y = blocks[piece].float() * multiplier[piece]
        values[piece] = _round_e2m1(y.clamp_(-E2M1_MAX, E2M1_MAX)).mul_(scales[piece])
    return values.flatten(1)[:, :columns], amax


def _block_amax(blocks):
    """(M, K / 16, 16) -> (M, K / 16, 1) float32, the largest magnitudes; NaN wins."""
    if blocks.dtype not in (torch.float32, torch.bfloat16):
        blocks = blocks.float()
    if torch.compiler.is_compiling():
        return blocks.float().abs().amax(dim=-1, keepdim=True)
    # Without its sign bit a float orders as the integer of its bits does, and eager mode's integer
    # maximum is several times faster on a CPU.
    integer = torch.int16 if blocks.dtype == torch.bfloat16 else torch.int32
    bits = blocks.contiguous().view(integer) & torch.iinfo(integer).max
    return bits.amax(dim=-1, keepdim=True).view(blocks.dtype).float()


def _round_e2m1(y):
    """|y| <= 6, float32, to the nearest E2M1 value, ties to even.

    Let p be the power of two in (|y| / 2, |y|], at least 1: codes near y are p / 2 apart. Float32
    numbers near 1.5 * 2^22 * p are p / 2 apart too, so adding and subtracting that rounds y.
    """
    p = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=1.0)
    return torch.add(y, p, alpha=1.5 * 2**22).sub_(p, alpha=1.5 * 2**22)


# ---------------------------------------------------------------------------------------------
# Linear layers


def _exact_values(x2d, precision, block):
    """x2d (M, K) -> (BF16 values that hold the quantized numbers exactly, the float32 scale, () or
    (M, 1), that the matmul's result is multiplied by)."""
    if precision == "fp8":  # E4M3 with one scale a tensor, TE's Float8CurrentScaling
        amax = x2d.abs().amax().float()
        multiplier = torch.where(amax == 0, 1.0, E4M3_MAX / amax).clamp(max=FLT_MAX)
        values = (x2d.float() * multiplier).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return values.to(torch.bfloat16), multiplier.reciprocal()
    if block == (1, 16) and precision != "nvfp4_4over6":
        row_scaled, scale_max = precision == "nvfp4_row", E4M3_MAX
        values, amax = _fake_quantize_rows(x2d, torch.bfloat16, row_scaled, decode=False)
        amax = amax.reshape(-1, 1) if row_scaled else amax
    else:
        four_over_six = precision == "nvfp4_4over6"
        y, scales, amax, scale_max = _scale_blocks(_tile(x2d, block), four_over_six)
        values = _untile(_round_e2m1(y) * scales, x2d.shape).to(torch.bfloat16)
    return values, _global_step(amax, scale_max)


class SimulatedMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) with the numbers of an FP4 tensor core, any sizes.

    The weight (out, in) is quantized by `set_weight`, once a sync; x at each call. The bias is
    added in float32, before the result is rounded to x's dtype."""

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.precision, self.bias = precision, bias
        values, scale = _exact_values(weight, precision, (16, 16))
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def set_weight(self, weight):
        values, scale = _exact_values(weight, self.precision, (16, 16))
        self.values.copy_(values)  # in place: a compiled model goes on reading these
        self.scale.copy_(scale)

    def forward(self, x):
        values, scale = _exact_values(x, self.precision, (1, 16))
        y = F.linear(values, self.values).float().mul_(scale * self.scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype)


class QuantizedLinear(nn.Module):
    """A linear layer, or a 1x1 convolution as one over channels, around a matmul that quantizes.
    Input (..., in) or, for a convolution, (n, in, h, w)."""

    def __init__(self, layer, matmul):
        super().__init__()
        self.matmul, self.pointwise = matmul, isinstance(layer, nn.Conv2d)

    def set_weight(self, weight):
        """weight (out, in), or (out, in, 1, 1) of a convolution; quantizes it."""
        self.matmul.set_weight(weight.flatten(1))

    def forward(self, x):
        if self.pointwise:
            x = x.movedim(1, -1)
        y = self.matmul(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return y.movedim(-1, 1) if self.pointwise else y


# What a linear layer explores in. nvfp4_4over6: four-over-six for weights and activations;
# nvfp4_row: a global scale for each token's activation, so that an image does not depend on its
# micro-batch; fp8: E4M3 with one scale a tensor, as Transformer Engine's Float8CurrentScaling.
PRECISIONS = ("nvfp4", "nvfp4_4over6", "nvfp4_row", "fp8", "bf16")


BACKENDS = ("auto", "te", "simulated")


def backend(precision, device="cpu", wanted="auto"):
    """("te", "simulated" or "torch", one line that says what runs a quantized layer, and why).

    wanted: "te" raises EngineError where Transformer Engine cannot be used, "simulated" never
    uses it, "auto" uses it where it can be.
    """
    if precision == "bf16":
        return "torch", "bf16: torch"
    reason = "as asked" if wanted == "simulated" else engine.unusable(precision, device)
    if not reason:
        sm = "sm{}{}".format(*engine.capability(device))
        return "te", f"{precision}: Transformer Engine {engine.version()} on {sm}"
    if wanted == "te":
        raise engine.EngineError(f"--precision_backend te, --precision {precision}: {reason}")
    return "simulated", f"{precision}: simulated ({reason})"


def quantize_linears(model, precision, skip=(), min_dim=0, wanted="auto"):
    """Swap the linear layers and 1x1 convolutions of `model` in place.

    precision: one of PRECISIONS; with "bf16" nothing is swapped. A layer stays as it is where a
    part of its dotted name is in `skip`, where max(in, out) <= min_dim (the paper's rule), or
    where Transformer Engine runs and cannot take its sizes. wanted: as in `backend`, which says
    what runs. Returns rows (name, in, out, precision or the reason it was kept).
    Raises ValueError on an unknown precision, EngineError if Transformer Engine is wanted and
    cannot be used, or fails `self_check`, which the largest layer goes through.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    runs, _ = backend(precision, where, wanted)
    rows, chosen = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            sizes = layer.in_channels, layer.out_channels
        else:
            continue
        skipped = [part for part in skip if f".{part}." in f".{name}."]
        misfit = engine.features_fit(precision, *sizes) if runs == "te" else ""
        if precision == "bf16":
            outcome = "kept: precision is bf16"
        elif skipped:
            outcome = f"kept: {skipped[0]}"
        elif max(sizes) <= min_dim:
            outcome = f"kept: max(in, out) <= {min_dim}"
        elif misfit:
            outcome = f"kept: {misfit}"
        else:
            outcome = precision
            chosen.append(name)
        rows.append((name, *sizes, outcome))
    if runs == "te" and chosen:
        largest = max((row for row in rows if row[0] in chosen), key=lambda row: row[1] * row[2])
        self_check(model.get_submodule(largest[0]), largest[0], precision)
    matmul = engine.EngineMatmul if runs == "te" else SimulatedMatmul
    for name in chosen:  # one by one, so that a replaced layer's memory is free for the next
        layer, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        quantized = QuantizedLinear(layer, matmul(layer.weight.flatten(1), layer.bias, precision))
        setattr(model.get_submodule(parent), child, quantized)
    return rows


@torch.no_grad()
def self_check(layer, name, precision, tokens=96):
    """Transformer Engine against the simulation on one layer and on noise: for NVFP4 the same
    bytes of weight and input, for all the same output up to 8e-3 of its largest, which is what
    TE's own tests allow its matmul. Raises EngineError that shows both."""
    weight = layer.weight.flatten(1)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, torch.bfloat16)
    about = f"Transformer Engine and the simulation differ in {precision} on {name}"
    advice = "; --precision_backend simulated does without"
    for what, tensor, block in (("weight", weight, (16, 16)), ("input", x, (1, 16))):
        if precision == "fp8":
            break
        ours = quantize_nvfp4(
            tensor, block, precision == "nvfp4_4over6", precision == "nvfp4_row" and what == "input"
        )
        theirs = engine.quantized_bytes(tensor, precision, what == "weight")
        for kind, a, b in zip(("codes", "scales"), theirs, (ours.codes, ours.scales)):
            b = b.view(torch.uint8)
            if not torch.equal(a, b):
                i = (a != b).nonzero()[0].tolist()
                raise engine.EngineError(
                    f"{about}: {int((a != b).sum())} of {a.numel()} bytes of the {what}'s {kind}, "
                    f"at {i} {int(a[tuple(i)])} and {int(b[tuple(i)])}{advice}"
                )
    a, b = (
        matmul(weight, layer.bias, precision)(x).float()
        for matmul in (engine.EngineMatmul, SimulatedMatmul)
    )
    largest = (a - b).abs().max()
    if not largest <= 8e-3 * b.abs().max():
        i = divmod(int((a - b).abs().argmax()), a.shape[1])
        raise engine.EngineError(
            f"{about}: outputs by up to {float(largest):.3g} of {float(b.abs().max()):.3g}, "
            f"at {list(i)} {float(a[i]):.5g} and {float(b[i]):.5g}{advice}"
        )
