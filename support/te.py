"""Transformer Engine (TE) from 2.14 on: matmuls in FP4 or FP8 on GPUs that have them.

It has not been run on a Blackwell GPU. What it assumes was read in TE's sources; tests/fake_te.py
names them. On real hardware `self_check` compares one layer with the simulation.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from support.errors import one_line, require

try:
    import transformer_engine
    import transformer_engine.pytorch
except Exception as error:  # RuntimeError or OSError, for example, where its CUDA part is missing
    transformer_engine, IMPORT_ERROR = None, one_line(error)
    sys.modules["transformer_engine"] = None  # else peft imports it too, and fails

CAPABILITY = {"nvfp4": ("Blackwell", (10, 0)), "fp8": ("GPU with FP8", (8, 9))}  # at least
FEATURES = {"nvfp4": (32, 16), "fp8": (16, 16)}  # (in, out) must be multiples of these
TOKENS = 32  # NVFP4 needs a multiple of 16, of 32 for the faster kernel, and FP8 of 8


def capability(device):
    """The compute capability (major, minor) of a CUDA device; (0, 0) for any other device."""
    device = torch.device(device)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def unusable(precision, device):
    """Why TE cannot run a precision (quant.Precision, not bf16) on a device, or "" if it can."""
    if precision.format not in CAPABILITY:
        return f"there is no recipe for {precision.format} in support/te.py"
    (gpu, needed), found = CAPABILITY[precision.format], capability(device)
    if found < needed:
        return f"no {gpu}: this is " + ("sm{}{}".format(*found) if any(found) else str(device))
    if transformer_engine is None:
        return f"Transformer Engine cannot be imported: {IMPORT_ERROR}"
    # Before 2.14, TE computed NVFP4's scales as block_amax / 6 * S_enc.
    minor = 17 if precision.four_over_six else 16 if precision.row_scaled else 14
    found = transformer_engine.__version__
    if tuple(int(n) for n in found.split(".")[:2]) < (2, minor):
        return f"needs Transformer Engine 2.{minor} or later, found {found}"
    return ""


def recipe(precision):
    """TE's recipe for a quant.Precision. Random rotations (RHT) and stochastic rounding serve
    training only."""
    from transformer_engine.common import recipe as recipes

    if precision.format == "fp8":
        return recipes.Float8CurrentScaling()
    options = dict(disable_rht=True, disable_stochastic_rounding=True)
    if precision.four_over_six:
        options["nvfp4_4over6"] = "all"
    if precision.row_scaled:
        options["row_scaled_activation"] = True
    return recipes.NVFP4BlockScaling(**options)


def features_fit(precision, *sizes):
    """Why TE cannot run a layer of sizes (in, out) in a quant.Precision, or "" if it can."""
    for side, size, multiple in zip(("in", "out"), sizes, FEATURES[precision.format]):
        if size % multiple:
            return f"{side}_features {size} is no multiple of {multiple}"
    return ""


class TEMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) by te.Linear, which quantizes W and x. weight: (out, in)
    on a CUDA device; bias: (out,) or None; precision: quant.Precision."""

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.recipe = recipe(precision)
        options = dict(bias=bias is not None, params_dtype=torch.bfloat16, device=weight.device)
        self.linear = transformer_engine.pytorch.Linear(*weight.T.shape, **options)
        self.linear.requires_grad_(False)
        if bias is not None:
            self.linear.bias.data.copy_(bias)
        self.set_weight(weight)

    def set_weight(self, weight):
        """weight (out, in), which te.Linear keeps without a copy, so that a layer without LoRA
        shares it with the transformer. The next call of `forward` quantizes it, once."""
        self.linear.weight.data = weight.detach().to(torch.bfloat16)
        self.weight_changed = True

    @torch.compiler.disable  # the compiler cannot look into Transformer Engine
    @torch.no_grad()
    def forward(self, x):
        padded, missing = x.to(torch.bfloat16), -len(x) % TOKENS
        if missing:  # F.pad always copies; the zeros change no scale
            padded = F.pad(padded, (0, 0, 0, missing))
        with transformer_engine.pytorch.autocast(enabled=True, recipe=self.recipe):
            y = self.linear(padded, is_first_microbatch=self.weight_changed)
        self.weight_changed = False
        return y[: len(x)].to(x.dtype)


@torch.no_grad()
def self_check(layer, name, precision, quantize, simulate):
    """Compare TE with the simulation on `layer`, an nn.Linear or 1x1 nn.Conv2d, and noise as input.
    In NVFP4 both must give the same bytes. Outputs must agree within 8e-3 of the largest, as in
    TE's own tests. Raises InputError otherwise. quantize: quant.quantize_nvfp4; simulate:
    quant.SimulatedMatmul."""
    weight, generator = layer.weight.flatten(1), torch.Generator().manual_seed(0)
    x = torch.randn(96, weight.shape[1], generator=generator).to(weight.device, torch.bfloat16)

    def compare(what, actual, expected, tolerance=0):
        error = (actual.float() - expected.float()).abs()
        wrong = int((~(error <= tolerance)).sum())  # a NaN is wrong too
        found = f"in {wrong} of {error.numel()} {what} by up to {float(error.max()):.3g}"
        differ = f"Transformer Engine and the simulation differ in layer {name}, {found}"
        require(wrong == 0, f"{differ}; to simulate instead, uninstall transformer-engine")

    if precision.format == "nvfp4":
        from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

        for what, tensor, block in (("weight", weight, (16, 16)), ("input", x, (1, 16))):
            row_scaled = precision.row_scaled and what == "input"
            options = dict(rowwise=True, columnwise=False, with_2d_quantization=what == "weight")
            if row_scaled:
                options["row_scaled_nvfp4"] = True
            if precision.four_over_six:
                options |= dict(nvfp4_use_4over6=True, nvfp4_e4m3_max=256)
            stored = NVFP4Quantizer(**options)(tensor)
            q = quantize(tensor, block, precision.four_over_six, row_scaled)
            compare(f"codes of the {what}", stored._rowwise_data, q.codes)
            rows, columns = q.scales.shape  # TE pads them for cuBLAS
            scales = stored._rowwise_scale_inv.view(torch.uint8)[:rows, :columns]
            compare(f"scales of the {what}", scales, q.scales.view(torch.uint8))
    expected = simulate(weight, layer.bias, precision)(x)
    tolerance = 8e-3 * expected.float().abs().max()
    compare("outputs", TEMatmul(weight, layer.bias, precision)(x), expected, tolerance)
