"""NVFP4: the number format, quantization, and the linear layer that explores.

The format. An E2M1 code is 0, .5, 1, 1.5, 2, 3, 4 or 6 with a sign. A block shares an E4M3 scale s:
1x16 numbers of an activation, or 16x16 of a weight, so that its transpose has the same scales. The
tensor has one float32 scale `unit`, which follows from its largest magnitude `amax`:

    unit  = amax / (6 * 448)                     6 and 448: the largest E2M1 and E4M3 numbers
    value = code * d,  where d = s * unit        d is the step of the block

How a scale is found (Transformer Engine from 2.14 on, common/cast/nvfp4, and its reference in
Python, pytorch/custom_recipes/reference_nvfp4.py; tests/nvfp4_vectors.safetensors has its bytes):

    S_enc = 6 * 448 / amax                       the tensor's encode scale
    s     = e4m3(block_amax * (S_enc * (1/6)))   puts the block's largest element near code 6
    code  = e2m1(clamp(x / (s / S_enc), -6, 6))  both roundings go to the nearest, ties to even

With row scales, each row has its own amax. Four-over-six has 256 in the place of 448, tries s and
1.5 s for each block, and keeps the one with the smaller mean absolute error.

How large the error is (docs/precision.md derives this and the bounds of FP8 and of a whole layer).
It is at most |x|, because 0 is a code. With u = |x| / d it is also at most

    d * h(u)                           for u <= 6
    max(|x| / 17, 6 * 2^-10 * unit)    for u > 6, which happens only if s was rounded down

    h = 1/4 for u < 2,  1/2 for 2 <= u < 4,  1 for 4 <= u <= 5,  6 - u for 5 < u <= 6

What a matmul does. The tensor core multiplies code * s exactly, accumulates in float32 and
multiplies the sums by unit_x * unit_w. The product code * s has at most 6 significant bits, so it
is exact in BF16 too. The simulation is one matmul of these products, in the dtype of the model. It
differs from the FP4 matmul only in the order of the sum and, in BF16, in one more rounding.
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


class NVFP4Tensor(NamedTuple):
    """A tensor (..., K) as a Blackwell GPU stores it; leading dimensions are joined to M rows."""

    codes: torch.Tensor  # uint8 (M, ceil(K / 2)), two E2M1 codes a byte, the even element low
    scales: torch.Tensor  # float8_e4m3fn (M, ceil(K / 16)); in 16x16 blocks rows have equal scales
    amax: torch.Tensor  # float32 (), or (M,) if row_scaled
    shape: torch.Size
    scale_max: float  # 448, or 256 for four-over-six

    @property
    def step(self):
        """d of each block, float32 (M, ceil(K / 16)). amax is divided first to avoid overflow."""
        return self.scales.float() * (self.amax.reshape(-1, 1) / (E2M1_MAX * self.scale_max))

    def dequantize(self, dtype=torch.float32):
        """The values code * step, computed in float32 and returned as `dtype`; (..., K)."""
        nibbles = torch.stack([self.codes & 0xF, self.codes >> 4], dim=-1).flatten(1)
        codes = torch.tensor([*E2M1, *(-code for code in E2M1)], device=nibbles.device)
        step = self.step.repeat_interleave(16, dim=1)[:, : self.shape[-1]]
        values = codes[nibbles[:, : self.shape[-1]].long()] * step
        return values.reshape(self.shape).to(dtype)


def quantize_nvfp4(x, block=(1, 16), four_over_six=False, row_scaled=False):
    """Quantize x (..., K), a float tensor, to NVFP4 with the bytes that Transformer Engine gives.

    block: (1, 16) for activations, (16, 16) for weights. row_scaled: each row (token) has its own
    amax, so it does not depend on the other rows; only for (1, 16). Rows and columns that do not
    fill a block are padded with zeros, which changes no other element. Returns an NVFP4Tensor.
    Raises ValueError on NaN or infinity, on another block, and on an empty or non-float tensor.
    """
    values, scales, amax, scale_max = _quantize(x, block, four_over_six, row_scaled)
    if not amax.isfinite().all():
        raise ValueError("quantize_nvfp4: the tensor holds a NaN or an infinity")
    rows = x.reshape(-1, x.shape[-1])
    values = _untile(values, rows.shape).abs().contiguous()  # rounding has lost the sign of -0
    codes = torch.bucketize(values, torch.tensor(E2M1, device=x.device)) + 8 * rows.signbit()
    codes = F.pad(codes.to(torch.uint8), (0, rows.shape[1] % 2))
    scales = _untile(scales.expand(-1, block[0], -1, 1), (len(rows), -(-rows.shape[1] // 16)))
    scales, amax = scales.to(torch.float8_e4m3fn), amax.flatten() if row_scaled else amax
    return NVFP4Tensor(codes[:, 0::2] | (codes[:, 1::2] << 4), scales, amax, x.shape, scale_max)


def fake_quantize_nvfp4(x, block=(1, 16), four_over_six=False, row_scaled=False):
    """quantize_nvfp4(x, ...).dequantize(x.dtype) without packing, in few passes over memory.
    Raises ValueError as quantize_nvfp4 does, but not on NaN or infinity, because the CPU would have
    to wait for the GPU. They make the whole result NaN, or with row_scaled their row."""
    values, scales, amax, scale_max = _quantize(x, block, four_over_six, row_scaled)
    values.mul_(scales * (amax / (E2M1_MAX * scale_max)))
    return _untile(values.to(x.dtype), x.shape)


def _quantize(x, block, four_over_six, row_scaled):
    """x (..., K) -> (the values of the codes, float32 tiles (a, rows, b, 16); the scales s, float32
    (a, 1, b, 1); amax (), or (a, 1, 1, 1) if row_scaled; scale_max)."""
    tiles = _tile(x, block)
    if row_scaled and tiles.shape[1] > 1:
        raise ValueError("row_scaled is for (1, 16) blocks")
    block_amax = _block_amax(tiles)
    amax = block_amax.amax(dim=2, keepdim=True) if row_scaled else block_amax.max()
    scale_max = E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX
    s_enc = _encode_scale(amax, E2M1_MAX * scale_max)
    if not four_over_six:
        return *_codes(tiles, block_amax * (s_enc * (1 / E2M1_MAX)), s_enc), amax, scale_max
    s = torch.div(block_amax, torch.full_like(block_amax, E2M1_MAX)) * s_enc
    six, four = _codes(tiles, s, s_enc), _codes(tiles, 1.5 * s, s_enc)
    largest = E2M1_MAX * scale_max
    errors = [_error(tiles, values * scales * amax / largest) for values, scales in (six, four)]
    values, scales = (torch.where(errors[1] < errors[0], *pair) for pair in zip(four, six))
    return values, scales, amax, scale_max


def _encode_scale(amax, largest):
    """The factor that turns amax into `largest`, but at most FLT_MAX."""
    # torch.div of two tensors is a true division on every device. `number / tensor` multiplies by
    # the tensor's reciprocal and, on a GPU, `tensor / number` by the number's.
    return torch.div(torch.full_like(amax, largest), amax).clamp(max=FLT_MAX)


def _codes(tiles, exact_scales, s_enc):
    """(values of the codes, like tiles; scales rounded to E4M3) for exact scales (a, 1, b, 1)."""
    scales = _round(exact_scales.clamp(max=E4M3_MAX), 3, 2.0**-6)
    multiplier = (scales * s_enc.reciprocal()).reciprocal().clamp(max=FLT_MAX)  # 1 / d
    return _round((tiles * multiplier).clamp_(-E2M1_MAX, E2M1_MAX), 1, 1.0), scales


def _round(y, mantissa_bits, smallest):
    """Round y, float32, in place to the nearest number with that many bits after the leading one,
    ties to even. Below `smallest`, a power of two, such numbers have equal steps."""
    # Let p be the power of two in (|y| / 2, |y|], at least `smallest`, and m = mantissa_bits. The
    # numbers near y are p / 2^m apart. Float32 numbers near 1.5 * 2^(23 - m) * p are p / 2^m apart
    # too, so adding and subtracting that rounds y.
    p = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=smallest)
    shift = 1.5 * 2.0 ** (23 - mantissa_bits)
    return y.add_(p, alpha=shift).sub_(p, alpha=shift)


def _tile(x, block):
    """(..., K), M rows -> (M / rows, rows, K / 16, 16) for blocks of (rows, 16), padded with 0."""
    if not x.is_floating_point() or x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"NVFP4 needs a non-empty float tensor, not {x.dtype} {tuple(x.shape)}")
    if tuple(block) not in ((1, 16), (16, 16)):
        raise ValueError(f"NVFP4 blocks are (1, 16) or (16, 16), not {block}")
    x = x.float() if x.dtype == torch.float64 else x
    x = x.reshape(-1, x.shape[-1])
    padding = (0, -x.shape[1] % 16, 0, -len(x) % block[0])
    x = F.pad(x, padding) if any(padding) else x  # F.pad copies in any case
    return x.reshape(-1, block[0], x.shape[1] // 16, 16)


def _untile(tiles, shape):
    """The opposite of _tile; shape: the (..., K) to return."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return tiles.flatten(2).flatten(0, 1)[:rows, :columns].reshape(shape)


def _block_amax(tiles):
    """(a, rows, b, 16) -> (a, 1, b, 1) float32, the largest magnitudes; NaN if a block has one."""
    if torch.compiler.is_compiling():
        return tiles.float().abs().amax(dim=(1, 3), keepdim=True)
    # Floats >= 0 and the integers with the same bits have the same order. In eager mode on a CPU
    # the maximum of integers is several times faster.
    integer = torch.int32 if tiles.dtype == torch.float32 else torch.int16
    return tiles.abs().view(integer).amax(dim=(1, 3), keepdim=True).view(tiles.dtype).float()


def _error(tiles, dequantized):
    """Each block's summed |dequantized - tiles|, in the GPU's order: along rows, then row pairs."""
    total = sum((dequantized - tiles).abs().unbind(dim=3))
    while total.shape[1] > 1:
        total = sum(total.chunk(2, dim=1))
    return total[..., None]


class Precision(NamedTuple):
    format: str  # "nvfp4"; "fp8": E4M3 with one scale a tensor; "bf16": not quantized
    four_over_six: bool = False  # weights and activations
    row_scaled: bool = False  # activations; an image then does not depend on its micro-batch


PRECISIONS = {
    "nvfp4": Precision("nvfp4"),
    "nvfp4_4over6": Precision("nvfp4", four_over_six=True),
    "nvfp4_row": Precision("nvfp4", row_scaled=True),
    "fp8": Precision("fp8"),
    "bf16": Precision("bf16"),
}


def _exact_values(x, precision, block, dtype):
    """x (M, K) -> (values that the tensor core multiplies, in dtype, BF16 or float32; the float32
    scale, one or (M, 1), by which the result is multiplied). precision: a Precision but bf16."""
    if precision.format == "fp8":  # Transformer Engine, common/recipe/recipe_common.cuh
        multiplier = _encode_scale(x.abs().amax().float(), E4M3_MAX)
        values = (x.float() * multiplier).clamp_(-E4M3_MAX, E4M3_MAX)
        return _round(values, 3, 2.0**-6).to(dtype), multiplier.reciprocal()
    row_scaled = precision.row_scaled and block == (1, 16)
    values, scales, amax, scale_max = _quantize(x, block, precision.four_over_six, row_scaled)
    unit = (amax / (E2M1_MAX * scale_max)).reshape(-1, 1)
    return _untile(values.mul_(scales).to(dtype), x.shape), unit


class SimulatedMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) as an FP4 or FP8 tensor core computes it, in x's dtype.
    The bias is added in float32, before this rounding. precision: a Precision but bf16."""

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
        self.matmul, self.features_dim = matmul, 1 if isinstance(layer, nn.Conv2d) else -1

    def set_weight(self, weight):
        """weight (out, in), or (out, in, 1, 1) of a convolution; quantizes it."""
        self.matmul.set_weight(weight.flatten(1))

    def forward(self, x):
        x = x.movedim(self.features_dim, -1)
        y = self.matmul(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return y.movedim(-1, self.features_dim)


def backend(precision, device="cpu"):
    """What runs the layers of a precision, a name in PRECISIONS, on a device: ("te", "simulated" or
    "torch", a line for the user that says so and why). Raises ValueError on an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if PRECISIONS[precision].format == "bf16":
        return "torch", f"{precision}: PyTorch"
    if reason := te.unusable(PRECISIONS[precision], device):
        return "simulated", f"{precision}: simulated ({reason})"
    sm = "sm{}{}".format(*te.capability(device))
    return "te", f"{precision}: Transformer Engine {te.transformer_engine.__version__} on {sm}"


def quantize_linears(model, precision, skip=(), min_dim=0):
    """Replace the linear layers and 1x1 convolutions of `model` by quantized ones, in place.

    precision: a name in PRECISIONS; "bf16" replaces nothing. A layer is kept if a part of its
    dotted name is in `skip`, if max(in, out) <= min_dim (the paper's rule), or if Transformer
    Engine cannot run its sizes. Returns rows (name, in, out, precision or why it was kept). Raises
    ValueError on an unknown precision, and InputError if te.self_check of the largest layer fails.
    """
    kind, _ = backend(precision, next(model.parameters()).device)
    settings, rows = PRECISIONS[precision], []
    for name, layer in model.named_modules():
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
        if not isinstance(layer, nn.Linear) and not (pointwise and layer.groups == 1):
            continue
        n_out, n_in = layer.weight.shape[:2]
        skipped = [part for part in skip if f".{part}." in f".{name}."]
        if kind == "torch":
            reason = "precision is bf16"
        elif skipped:
            reason = skipped[0]
        elif max(n_in, n_out) <= min_dim:
            reason = f"max(in, out) <= {min_dim}"
        else:
            reason = te.features_fit(settings, n_in, n_out) if kind == "te" else ""
        rows.append((name, n_in, n_out, f"kept: {reason}" if reason else precision))
    quantized = [row for row in rows if row[3] == precision]
    if kind == "te" and quantized:
        name, *_ = max(quantized, key=lambda row: row[1] * row[2])
        te.self_check(model.get_submodule(name), name, settings, quantize_nvfp4, SimulatedMatmul)
    matmul = te.TEMatmul if kind == "te" else SimulatedMatmul
    for name, *_ in quantized:  # one at a time, so that no second copy of all weights is in memory
        layer, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        new = QuantizedLinear(layer, matmul(layer.weight.flatten(1), layer.bias, settings))
        setattr(model.get_submodule(parent), child, new)
    return rows
