"""NVFP4: the number format, quantization, and the linear layer that explores.

The format. An E2M1 code is 0, .5, 1, 1.5, 2, 3, 4 or 6 with a sign. Every 16 neighbours along the
reduction dimension share an E4M3 block scale s (activations have 1x16 blocks; weights have 16x16
blocks, so that a weight and its transpose have the same scales), and the tensor has one float32
scale, which follows from its largest magnitude `amax`:

    value = code * s * amax / (6 * 448)          448: E4M3's largest value

How a scale is found (Transformer Engine, common/cast/nvfp4, and its reference in Python,
pytorch/custom_recipes/reference_nvfp4.py, whose bytes are in tests/nvfp4_vectors.safetensors):

    S_enc = 6 * 448 / amax                       the tensor's encode scale
    s     = e4m3(block_amax * (S_enc * (1/6)))   puts the block's largest element near code 6
    code  = e2m1(clamp(x / (s / S_enc), -6, 6))  both roundings go to the nearest, ties to even

How large the error is. Let M = 6 * 448, or 6 * 256 for four-over-six, and unit = amax / M. A code
c stands for c * d, where d = s * unit is the step of the block. The error is at most |x|, because 0
is a code. With u = |x| / d it is also at most

    d * h(u)                           for u <= 6
    max(|x| / 17, 6 * 2^-10 * unit)    for u > 6

    h = 1/4 for u < 2,  1/2 for 2 <= u < 4,  1 for 4 <= u <= 5,  6 - u for 5 < u <= 6

The first line is half the gap between two codes and, above 5, the distance to code 6. The second is
for elements larger than 6 d, which get code 6. They exist only where s was rounded down: E4M3 keeps
3 bits after the leading one, so s loses at most 1/17 of its exact value (17 becomes 16, and u
reaches 6.375) or, below 2^-6, where E4M3 has equal steps of 2^-9, at most 2^-10 (also where s
becomes 0 and with it the whole block). Both lines are tight: the first for an x halfway between two
codes, each part of the second for the largest element of a block whose exact s is halfway between
two E4M3 numbers. Float32's own roundings add at most 2^-19 |x| + (6 s + 7) * 2^-150.

The two lines hold while no reciprocal exceeds FLT_MAX, which means amax >= M / FLT_MAX (7.9e-36,
for four-over-six 4.5e-36) and, in each block, d >= 1 / FLT_MAX (2.9e-39) or s = 0. Elsewhere S_enc
or the reciprocal of d saturates at FLT_MAX, as it does on the GPU. Then x is multiplied by less
than 1 / d and its code comes out too small. Only the bound |x| is left, with the same roundings.

With row scales all this holds for each row with its own amax. Four-over-six tries s and 1.5 s for
each block and keeps the one with the smaller mean absolute error, and all this holds with the s
that is kept. The block's largest element is then near code 6, below which the next code is 1/3
smaller, or near code 4, below which it is 1/4 smaller. (Above amax = 2.2e35 the two errors can
overflow, and the choice need not be the better one.) The precision fp8 is E4M3 with one scale for
the tensor, Q(x) = e4m3(m x) / m with m = min(448 / amax, FLT_MAX). Its error is at most
max(|x| / 17, 2^-10 / m), which is tight too, plus the same roundings with s = 0.

What a matmul does. The tensor core multiplies code * s exactly, accumulates in float32 and
multiplies the sums by alpha = amax_x * amax_w / M^2. A code has 2 significant bits and s has 4, so
code * s (at most 6 bits, exponents from -10 to 11) is exact in BF16 and in float32. The simulation
is one matmul of these products, in the dtype of the model, followed by alpha. It differs from the
FP4 matmul only in the order of the sum and, in BF16, in one more rounding, before alpha.

How large a layer's error is. Let E_x and E_w hold the bounds above for each element of x and W.
As x w - Q(x) Q(w) = x (w - Q(w)) + (x - Q(x)) Q(w), the matmul's error, besides its roundings, is

    |x W^T - Q(x) Q(W)^T| <= |x| E_w^T + E_x |Q(W)|^T

This is tight too: x = W = (6, 5, ..., 5) attains it, since each 5 becomes 4. On Gaussian noise, in
sums of 128 terms, errors partly cancel: the largest of 160,000 is 0.19 to 0.28 of its bound.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from support import te

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX, E4M3_MAX_FOUR_OVER_SIX = 6.0, 448.0, 256.0
FLT_MAX = torch.finfo(torch.float32).max


# ---------------------------------------------------------------------------------------------
# The format, step by step


class NVFP4Tensor(NamedTuple):
    """A tensor (..., K) as a Blackwell GPU stores it; leading dimensions are joined to M rows."""

    codes: torch.Tensor  # uint8 (M, ceil(K / 2)), two E2M1 codes a byte, the even element low
    scales: torch.Tensor  # float8_e4m3fn (M, ceil(K / 16)); in 16x16 blocks rows have equal scales
    amax: torch.Tensor  # float32 (), or (M,) if row_scaled
    shape: torch.Size
    scale_max: float  # 448, or 256 for four-over-six

    def dequantize(self, dtype=torch.float32):
        """code * (scale * (amax / (6 * scale_max))) in float32, then as `dtype`; (..., K)."""
        nibbles = torch.stack([self.codes & 0xF, self.codes >> 4], dim=-1).flatten(1)
        values = torch.tensor(E2M1, device=nibbles.device)[(nibbles & 0x7).long()]
        values = torch.where(nibbles >= 8, -values, values)[:, : self.shape[-1]]
        # scale * amax could overflow, so amax is divided first.
        step = self.scales.float() * (self.amax.reshape(-1, 1) / (E2M1_MAX * self.scale_max))
        values = values * step.repeat_interleave(16, dim=1)[:, : self.shape[-1]]
        return values.reshape(self.shape).to(dtype)


def quantize_nvfp4(x, block=(1, 16), four_over_six=False, row_scaled=False):
    """Quantize x (..., K), a float tensor, to NVFP4 with the bytes that Transformer Engine gives.

    block: (1, 16) for activations, (16, 16) for weights. row_scaled: each row (token) has its own
    global scale and so does not depend on the other rows; only for (1, 16). Rows and columns that
    do not fill a block are padded with zeros, which changes no other element.
    Returns an NVFP4Tensor.
    Raises ValueError on NaN or infinity, on another block, and on an empty or non-float tensor.
    """
    tiles = _tile(x, block).float()
    if not torch.isfinite(tiles).all():
        raise ValueError("quantize_nvfp4: the tensor holds a NaN or an infinity")
    scales, multiplier, amax, scale_max = _scale_blocks(tiles, four_over_six, row_scaled)
    codes = _nearest_code((tiles * multiplier).clamp(-E2M1_MAX, E2M1_MAX))
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    codes = F.pad(_untile(codes, (rows, columns)), (0, columns % 2))
    scales = _untile(scales.expand(-1, -1, block[0], 1), (rows, -(-columns // 16)))
    scales, amax = scales.to(torch.float8_e4m3fn), amax.flatten() if row_scaled else amax
    return NVFP4Tensor(codes[:, 0::2] | (codes[:, 1::2] << 4), scales, amax, x.shape, scale_max)


def _nearest_code(y):
    """The E2M1 code (uint8) nearest to each |y| <= 6; a tie goes to the even code."""
    magnitude, grid = y.abs().contiguous(), torch.tensor(E2M1, device=y.device)
    middle = (grid[1:] + grid[:-1]) / 2
    tie_down = torch.bucketize(magnitude, middle)
    tie_up = torch.bucketize(magnitude, middle, right=True)
    code = torch.where(tie_down % 2 == 0, tie_down, tie_up).to(torch.uint8)
    return code | (torch.signbit(y).to(torch.uint8) << 3)


def _tile(x, block):
    """(..., K), M rows -> (M / rows, K / 16, rows, 16) for blocks of (rows, 16), padded with 0."""
    if not x.is_floating_point() or x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"NVFP4 needs a non-empty float tensor, not {x.dtype} {tuple(x.shape)}")
    if tuple(block) not in ((1, 16), (16, 16)):
        raise ValueError(f"NVFP4 blocks are (1, 16) or (16, 16), not {block}")
    x = x.reshape(-1, x.shape[-1])
    bottom, right = -len(x) % block[0], -x.shape[1] % 16
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return x.reshape(-1, block[0], x.shape[1] // 16, 16).transpose(1, 2)


def _untile(tiles, shape):
    """The opposite of _tile; shape: the (..., K) to return."""
    x = tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * tiles.shape[3])
    return x[: math.prod(shape[:-1]), : shape[-1]].reshape(shape)


def _scale_blocks(tiles, four_over_six, row_scaled):
    """Tiles (a, b, rows, 16) -> (scales s (a, b, 1, 1), float32 with E4M3 values; multiplier
    1 / d (a, b, 1, 1); amax (), or (a, 1, 1, 1) if row_scaled; scale_max)."""
    if row_scaled and tiles.shape[2] > 1:
        raise ValueError("row_scaled is for (1, 16) blocks")
    block_amax = _block_amax(tiles)
    amax = block_amax.amax(dim=1, keepdim=True) if row_scaled else block_amax.max()
    if not four_over_six:
        return *_block_scales(block_amax, amax), amax, E4M3_MAX

    tiles, scale_max, candidates = tiles.float(), E4M3_MAX_FOUR_OVER_SIX, []
    for on_four in (False, True):
        scales, multiplier = _block_scales(block_amax, amax, scale_max, on_four)
        y = (tiles * multiplier).clamp(-E2M1_MAX, E2M1_MAX)
        value = _round(y, 1, 1.0) * scales * amax / (E2M1_MAX * scale_max)
        candidates.append((scales, multiplier, _sum_in_order((value - tiles).abs())))
    six, four = candidates
    four_is_better = four[2] < six[2]
    scales, multiplier = (torch.where(four_is_better, four[i], six[i]) for i in (0, 1))
    return scales, multiplier, amax, scale_max


def _block_scales(block_amax, amax, scale_max=E4M3_MAX, on_four=None):
    """(s of each block as float32, its multiplier 1 / d). on_four: None for plain NVFP4; for
    four-over-six, whether the block's largest element becomes code 4 instead of 6."""
    # torch.div of two tensors is a true division on every device. `number / tensor` multiplies by
    # the tensor's reciprocal and, on a GPU, `tensor / number` by the number's.
    s_enc = torch.div(torch.full_like(amax, E2M1_MAX * scale_max), amax).clamp(max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    if on_four is None:
        scales = block_amax * (s_enc * (1 / E2M1_MAX))
    else:
        sixth = torch.div(block_amax, torch.full_like(block_amax, E2M1_MAX))
        scales = sixth * s_enc * (1.5 if on_four else 1.0)
    scales = _round(scales.clamp_(max=E4M3_MAX), 3, 2.0**-6)  # to E4M3
    return scales, (scales * s_enc.reciprocal()).reciprocal().clamp(max=FLT_MAX)


def _sum_in_order(errors):
    """(a, b, rows, 16) -> (a, b, 1, 1), in the GPU's order: along rows, then pairs of rows."""
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

    x: float (..., K); the result has its shape and dtype. NaN and infinity raise no error, because
    the CPU would have to wait for the GPU to know of them. They make the whole result NaN, or with
    row_scaled their row. Raises ValueError on another block and an empty or non-float tensor.
    """
    return _fake_quantize(x, block, four_over_six, row_scaled, x.dtype, decode=True)[0]


def _fake_quantize(x, block, four_over_six, row_scaled, dtype, decode):
    """x (..., K), M rows -> (values (..., K) in dtype, unit () or, if row_scaled, (M, 1)). Values
    are code * s, which is exact in BF16; with `decode` they are code * s * unit."""
    tiles = _tile(x, block)
    scales, multiplier, amax, scale_max = _scale_blocks(tiles, four_over_six, row_scaled)
    unit = amax / (E2M1_MAX * scale_max)
    codes = _round((tiles * multiplier).clamp_(-E2M1_MAX, E2M1_MAX), 1, 1.0)  # to E2M1
    values = codes.mul_(scales * unit if decode else scales).to(dtype)
    return _untile(values, x.shape), unit.reshape(-1, 1) if row_scaled else unit


def _block_amax(tiles):
    """(a, b, rows, 16) -> (a, b, 1, 1) float32, the largest magnitudes; NaN if a block has one."""
    if torch.compiler.is_compiling() or tiles.dtype not in (torch.float32, torch.bfloat16):
        return tiles.float().abs().amax(dim=(2, 3), keepdim=True)
    # Floats without their sign bits have the same order as the integers with the same bits, and
    # in eager mode on a CPU the maximum of integers is several times faster.
    integer = torch.int16 if tiles.dtype == torch.bfloat16 else torch.int32
    bits = tiles.view(integer) & torch.iinfo(integer).max
    return bits.amax(dim=(2, 3), keepdim=True).view(tiles.dtype).float()


def _round(y, mantissa_bits, smallest):
    """Round y, float32, in place to the nearest number with that many bits after the leading one,
    ties to even. Below `smallest`, a power of two, such numbers have equal steps.

    Let p be the power of two in (|y| / 2, |y|], at least `smallest`, and m = mantissa_bits. The
    numbers near y are p / 2^m apart. Float32 numbers near 1.5 * 2^(23 - m) * p are p / 2^m apart
    too, so adding and subtracting that rounds y.
    """
    p = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=smallest)
    shift = 1.5 * 2.0 ** (23 - mantissa_bits)
    return y.add_(p, alpha=shift).sub_(p, alpha=shift)


# ---------------------------------------------------------------------------------------------
# Linear layers


class Precision(NamedTuple):
    """How a linear layer computes. Each token's activation can have a global scale of its own, so
    that an image does not depend on the other images in its micro-batch."""

    format: str  # "nvfp4"; "fp8": E4M3 with one scale a tensor; "bf16": not quantized
    four_over_six: bool = False  # weights and activations
    row_scaled: bool = False  # activations


PRECISIONS = {
    "nvfp4": Precision("nvfp4"),
    "nvfp4_4over6": Precision("nvfp4", four_over_six=True),
    "nvfp4_row": Precision("nvfp4", row_scaled=True),
    "fp8": Precision("fp8"),
    "bf16": Precision("bf16"),
}


def _exact_values(x, precision, block, dtype):
    """x (M, K) -> (values that hold the quantized numbers exactly, in dtype, BF16 or float32; the
    float32 scale, () or (M, 1), that the matmul's result is multiplied by). precision: a Precision
    other than bf16."""
    if precision.format == "fp8":
        amax = x.abs().amax().float()
        multiplier = torch.where(amax == 0, 1.0, E4M3_MAX / amax).clamp(max=FLT_MAX)
        values = (x.float() * multiplier).clamp_(-E4M3_MAX, E4M3_MAX)
        return _round(values, 3, 2.0**-6).to(dtype), multiplier.reciprocal()
    row_scaled = precision.row_scaled and block == (1, 16)
    return _fake_quantize(x, block, precision.four_over_six, row_scaled, dtype, decode=False)


class SimulatedMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) as an FP4 or FP8 tensor core computes it; see the essay.

    The weight (out, in) is quantized by `set_weight` and x at each call. The bias is added in
    float32, before the result is rounded to x's dtype. precision: a Precision other than bf16.
    """

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.precision, self.bias = precision, bias
        values, scale = _exact_values(weight, precision, (16, 16), weight.dtype)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def set_weight(self, weight):
        values, scale = _exact_values(weight, self.precision, (16, 16), self.values.dtype)
        self.values.copy_(values)  # in place, because a compiled model keeps reading these tensors
        self.scale.copy_(scale)

    def forward(self, x):
        values, scale = _exact_values(x, self.precision, (1, 16), self.values.dtype)
        y = F.linear(values, self.values).float().mul_(scale * self.scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype)


class QuantizedLinear(nn.Module):
    """A linear layer, or a 1x1 convolution (a linear layer over channels), that calls `matmul`.
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


def backend(precision, device="cpu"):
    """What runs the layers of a precision, a name in PRECISIONS, on a device: ("te", "simulated" or
    "torch", a line for the user that says so and why). Raises ValueError on an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if PRECISIONS[precision].format == "bf16":
        return "torch", f"{precision}: PyTorch"
    reason = te.unusable(PRECISIONS[precision], device)
    if reason:
        return "simulated", f"{precision}: simulated ({reason})"
    sm = "sm{}{}".format(*te.capability(device))
    return "te", f"{precision}: Transformer Engine {te.version()} on {sm}"


def quantize_linears(model, precision, skip=(), min_dim=0):
    """Replace the linear layers and 1x1 convolutions of `model` by quantized ones, in place.

    precision: a name in PRECISIONS; "bf16" replaces nothing. A layer is kept if a part of its
    dotted name is in `skip`, if max(in, out) <= min_dim (the paper's rule), or if Transformer
    Engine cannot run its sizes. `backend` says what runs the replaced layers.
    Returns rows (name, in, out, precision or the reason why the layer was kept).
    Raises ValueError on an unknown precision, and InputError if the largest layer differs between
    Transformer Engine and the simulation.
    """
    device = next((p.device for p in model.parameters()), "cpu")
    kind, _ = backend(precision, device)
    settings, rows = PRECISIONS[precision], []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            sizes = layer.in_channels, layer.out_channels
        else:
            continue
        skipped = [part for part in skip if f".{part}." in f".{name}."]
        if kind == "torch":
            reason = "precision is bf16"
        elif skipped:
            reason = skipped[0]
        elif max(sizes) <= min_dim:
            reason = f"max(in, out) <= {min_dim}"
        else:
            reason = te.features_fit(settings, *sizes) if kind == "te" else ""
        rows.append((name, *sizes, f"kept: {reason}" if reason else precision))
    quantized = [row for row in rows if not row[3].startswith("kept")]
    if kind == "te" and quantized:
        largest, *_ = max(quantized, key=lambda row: row[1] * row[2])
        layer = model.get_submodule(largest)
        te.self_check(layer, largest, settings, quantize_nvfp4, SimulatedMatmul)
    matmul = te.TEMatmul if kind == "te" else SimulatedMatmul
    for name, *_ in quantized:  # one at a time, so that no second copy of all weights is in memory
        layer, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        new = QuantizedLinear(layer, matmul(layer.weight.flatten(1), layer.bias, settings))
        setattr(model.get_submodule(parent), child, new)
    return rows
