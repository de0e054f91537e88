"""Transformer Engine (TE): matmuls in FP4 or FP8 on GPUs that have them.

This is the only file that knows TE and how its versions 2.8 to 2.20 differ. It has not been run on
a Blackwell GPU. What it assumes was read in TE's sources, and tests run it against a substitute
that enforces the same rules and names the sources (tests/fake_te.py). On real hardware `self_check`
compares one layer with the simulation and stops the run if the two differ.
"""

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import nn

from support.errors import InputError, one_line, require

try:
    import transformer_engine
    import transformer_engine.pytorch
except Exception as error:  # RuntimeError or OSError, for example, where its CUDA part is missing
    transformer_engine, IMPORT_ERROR = None, one_line(error)
    # peft imports any Transformer Engine that is installed and would fail as well. With None here
    # Python reports that there is no such package.
    sys.modules["transformer_engine"] = None

# te.Linear does not pad. NVFP4 needs a multiple of 16 tokens, of 32 for the faster kernel, and FP8
# of 8. Zeros are appended, which change no scale. A layer whose features do not fit stays in BF16.
TOKENS = 32
FEATURES = {"nvfp4": (32, 16), "fp8": (16, 16)}  # (in, out) must be multiples of these
CAPABILITY = {"nvfp4": ("Blackwell", (10, 0)), "fp8": ("GPU with FP8", (8, 9))}  # at least


def version():
    """TE's version, as in "2.20.2"."""
    return transformer_engine.__version__


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
    cuda = tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2])
    if precision.format == "nvfp4" and cuda < (12, 8):
        return f"PyTorch is built for CUDA {torch.version.cuda}, FP4 needs 12.8"
    if transformer_engine is None:
        return f"Transformer Engine cannot be imported: {IMPORT_ERROR}"
    try:
        recipe(precision)
    except InputError as error:
        return str(error)
    # TE must be asked before its autocast, which raises an error on a GPU that is not supported.
    # It considers the compute capability alone, hence our own check of CUDA's version above.
    name = f"is_{precision.format}_available"
    if hasattr(transformer_engine.pytorch, name):  # from 2.9 on
        available, reason = getattr(transformer_engine.pytorch, name)(return_reason=True)
    else:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        available, reason = getattr(FP8GlobalStateManager, name)()
    return "" if available else f"Transformer Engine says: {reason}"


def recipe(precision):
    """TE's recipe for a quant.Precision. Raises InputError if this version of TE has none.

    It is never DelayedScaling, which would run FP8 in place of FP4 and, without gradients, never
    updates its scales. Random rotations and stochastic rounding serve training only."""
    from transformer_engine.common import recipe as recipes

    if precision.format == "fp8":
        return recipes.Float8CurrentScaling()
    options = dict(disable_rht=True, disable_stochastic_rounding=True)
    if precision.four_over_six:
        options["nvfp4_4over6"] = "all"  # from 2.17 on
    if precision.row_scaled:
        options["row_scaled_activation"] = True  # from 2.16 on
    # The class ignores options that it does not know, so they are compared with its signature.
    recipe_class = getattr(recipes, "NVFP4BlockScaling", None)
    known = inspect.signature(recipe_class).parameters if recipe_class else ()
    for name in options:
        require(name in known, f"Transformer Engine's version {version()} has no {name} for NVFP4")
    return recipe_class(**options)


def features_fit(precision, in_features, out_features):
    """Why TE cannot run a layer of these sizes in a quant.Precision, or "" if it can."""
    sizes = dict(in_features=in_features, out_features=out_features)
    for (side, size), multiple in zip(sizes.items(), FEATURES[precision.format]):
        if size % multiple:
            return f"{side} {size} is no multiple of {multiple}"
    return ""


class TEMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) by te.Linear, which quantizes W and x.

    weight: (out, in) on a CUDA device; bias: (out,) or None; precision: quant.Precision.
    """

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.recipe = recipe(precision)
        (n_out, n_in), te = weight.shape, transformer_engine.pytorch
        options = dict(params_dtype=torch.bfloat16, device=weight.device)
        self.linear = te.Linear(n_in, n_out, bias=bias is not None, **options)
        self.linear.requires_grad_(False)
        if bias is not None:
            self.linear.bias.data.copy_(bias)
        self.set_weight(weight)

    def set_weight(self, weight):
        """weight (out, in). te.Linear keeps this tensor and no copy, so a layer that LoRA does not
        adapt shares it with the transformer. The next call of `forward` quantizes it; later ones
        use the result."""
        self.linear.weight.data = weight.detach().to(torch.bfloat16)
        self.weight_changed = True

    @torch.compiler.disable  # the compiler cannot look into Transformer Engine
    @torch.no_grad()
    def forward(self, x):
        te = transformer_engine.pytorch
        padded, missing = x.to(torch.bfloat16), -len(x) % TOKENS
        if missing:  # F.pad copies in any case
            padded = F.pad(padded, (0, 0, 0, missing))
        if hasattr(te, "autocast"):  # from 2.9 on
            quantizing = te.autocast(enabled=True, recipe=self.recipe)
        else:
            quantizing = te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)
        with quantizing:
            y = self.linear(padded, is_first_microbatch=self.weight_changed)
        self.weight_changed = False
        return y[: len(x)].to(x.dtype)


def quantized_bytes(x, precision, is_weight):
    """What TE stores for x (m, k) in NVFP4: codes uint8 (m, k / 2) and scales uint8 (m, k / 16)."""
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    options = dict(rowwise=True, columnwise=False, with_2d_quantization=is_weight)
    if precision.four_over_six:
        options |= dict(nvfp4_use_4over6=True, nvfp4_e4m3_max=256)
    if precision.row_scaled and not is_weight:
        options["row_scaled_nvfp4"] = True
    tensor = NVFP4Quantizer(**options)(x)
    m, k = x.shape
    codes = tensor._rowwise_data.view(torch.uint8).reshape(m, -1)
    # TE pads the scales for cuBLAS.
    return codes, tensor._rowwise_scale_inv.view(torch.uint8)[:m, : k // 16]


@torch.no_grad()
def self_check(layer, name, precision, quantize, simulate, tokens=96):
    """Compare TE with the simulation on one layer of a model, with noise as the input.

    In NVFP4 both must quantize the weight and the input to the same bytes. In every format their
    outputs must agree within 8e-3 of the largest output, which is what TE's own tests allow.

    layer: nn.Linear or 1x1 nn.Conv2d, called `name`; precision: quant.Precision; quantize and
    simulate: quant.quantize_nvfp4 and quant.SimulatedMatmul.
    Raises InputError that shows the first difference.
    """
    weight = layer.weight.flatten(1)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, torch.bfloat16)

    def compare(what, actual, expected, tolerance=0):
        actual, expected = actual.float(), expected.float()
        error = (actual - expected).abs()
        wrong = ~(error <= tolerance)  # also if an output is NaN
        if wrong.any():
            i, j = wrong.nonzero()[0].tolist()
            raise InputError(
                f"Transformer Engine and the simulation of {precision.format} differ in layer "
                f"{name}, in {int(wrong.sum())} of {wrong.numel()} {what} by up to "
                f"{float(error.max()):.3g}, first at [{i}, {j}], {float(actual[i, j]):.5g} and "
                f"{float(expected[i, j]):.5g}; uninstall transformer-engine to simulate instead"
            )

    if precision.format == "nvfp4":
        for what, tensor, block in (("weight", weight, (16, 16)), ("input", x, (1, 16))):
            row_scaled = precision.row_scaled and what == "input"
            simulated = quantize(tensor, block, precision.four_over_six, row_scaled)
            codes, scales = quantized_bytes(tensor, precision, is_weight=what == "weight")
            compare(f"bytes of the {what}'s codes", codes, simulated.codes)
            compare(f"bytes of the {what}'s scales", scales, simulated.scales.view(torch.uint8))
    expected = simulate(weight, layer.bias, precision)(x).float()
    actual = TEMatmul(weight, layer.bias, precision)(x)
    compare("outputs", actual, expected, tolerance=8e-3 * expected.abs().max())
