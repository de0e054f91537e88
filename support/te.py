"""Transformer Engine (TE): matmuls in FP4 or FP8 on GPUs that have them.

This is the only file that knows TE and how its versions 2.8 to 2.20 differ. It has not been run on
a Blackwell GPU. What it assumes was read in TE's sources (the paths below are inside
`transformer_engine/`), and tests run it against a substitute that enforces those rules
(tests/fake_te.py). On real hardware `self_check` compares one layer with the simulation and stops
the run if the two differ.

 1. The recipe is NVFP4BlockScaling (common/recipe, from 2.8). A DelayedScaling recipe with the E2M1
    format would run FP8. Random rotations and stochastic rounding serve training and are turned
    off. Weights are scaled in 16x16 blocks and activations in 1x16 blocks. Row-scaled activations
    are an option from 2.16 on and four-over-six from 2.17 on. For FP8 the recipe is
    Float8CurrentScaling, because DelayedScaling never updates its scales without gradients.
 2. The context manager is te.autocast(recipe=...) from 2.9 on and te.fp8_autocast(fp8_recipe=...)
    in 2.8. Entering it raises an error on a GPU that is not supported. So te.is_nvfp4_available is
    asked first (in 2.8 it is a method of FP8GlobalStateManager in pytorch/fp8.py). It checks only
    the compute capability; CUDA must also be 12.8 or newer.
 3. te.Linear.forward(x, is_first_microbatch) (pytorch/module/linear.py) quantizes the weight at
    each call if is_first_microbatch is None. If it is True, the weight is quantized and the result
    is stored. If it is False, the stored result is used, even if the weight has changed since. So
    the first call after each `set_weight` passes True and the later ones False.
    (quantized_model_init would save the memory of the BF16 weights, but only from 2.9 on.)
 4. te.Linear does not pad (pytorch/utils.py, pytorch/tensor/nvfp4_tensor.py). NVFP4 needs a number
    of tokens that is a multiple of 16 (of 32 for the faster kernel), in_features a multiple of 32
    and out_features of 16. FP8 needs tokens a multiple of 8, in_features and out_features of 16.
    Here tokens are padded with zeros, which change no scale. A layer whose features do not fit
    stays in BF16.
 5. Inputs and parameters are BF16. The bias is added before the result is rounded to BF16.
"""

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import nn

from support.errors import InputError, one_line

try:
    import transformer_engine
    import transformer_engine.pytorch
except Exception as error:  # RuntimeError or OSError, for example, where its CUDA part is missing
    transformer_engine, IMPORT_ERROR = None, one_line(error)
    # peft imports any Transformer Engine that is installed and would fail as well. With None here
    # Python reports that there is no such package.
    sys.modules["transformer_engine"] = None

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
    available, reason = _available(precision.format)
    return "" if available else f"Transformer Engine says: {reason}"


def _available(number_format):
    """(whether TE supports the format on this GPU, its reason if not); see fact 2."""
    name = f"is_{number_format}_available"
    if hasattr(transformer_engine.pytorch, name):
        return getattr(transformer_engine.pytorch, name)(return_reason=True)
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    return getattr(FP8GlobalStateManager, name)()


def recipe(precision):
    """TE's recipe for a quant.Precision. Raises InputError if this version of TE has none."""
    from transformer_engine.common import recipe as recipes

    if precision.format == "fp8":
        return recipes.Float8CurrentScaling()
    options = dict(disable_rht=True, disable_stochastic_rounding=True)
    if precision.four_over_six:
        options["nvfp4_4over6"] = "all"
    if precision.row_scaled:
        options["row_scaled_activation"] = True
    # The class ignores options that it does not know, so they are compared with its signature.
    recipe_class = getattr(recipes, "NVFP4BlockScaling", None)
    known = inspect.signature(recipe_class).parameters if recipe_class else ()
    missing = [name for name in options if name not in known]
    if missing:
        raise InputError(f"Transformer Engine's version {version()} has no {missing[0]} for NVFP4")
    return recipe_class(**options)


def features_fit(precision, in_features, out_features):
    """Why TE cannot run a layer of these sizes in a quant.Precision, or "" if it can."""
    multiple_in, multiple_out = FEATURES[precision.format]
    if in_features % multiple_in:
        return f"in_features {in_features} is no multiple of {multiple_in}"
    if out_features % multiple_out:
        return f"out_features {out_features} is no multiple of {multiple_out}"
    return ""


class TEMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) by te.Linear, which quantizes W and x.

    weight: (out, in) on a CUDA device; bias: (out,) or None; precision: quant.Precision.
    """

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.recipe = recipe(precision)
        n_out, n_in = weight.shape
        self.linear = transformer_engine.pytorch.Linear(
            n_in, n_out, bias=bias is not None, params_dtype=torch.bfloat16, device=weight.device
        )
        self.linear.requires_grad_(False)
        if bias is not None:
            self.linear.bias.data.copy_(bias)
        self.set_weight(weight)

    @torch.no_grad()
    def set_weight(self, weight):
        """weight (out, in). It is quantized in the next call of `forward`."""
        self.linear.weight.data.copy_(weight)
        self.weight_changed = True

    def autocast(self):
        """The context manager in which te.Linear quantizes; see fact 2."""
        te = transformer_engine.pytorch
        if hasattr(te, "autocast"):
            return te.autocast(enabled=True, recipe=self.recipe)
        return te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)

    @torch.no_grad()
    def forward(self, x):
        padded = F.pad(x.to(torch.bfloat16), (0, 0, 0, -len(x) % TOKENS))
        with self.autocast():
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

    def stop(difference):
        raise InputError(
            f"Transformer Engine and the simulation of {precision.format} differ in layer {name}: "
            f"{difference}; uninstall transformer-engine to run the simulation instead"
        )

    for what, tensor, block in (("weight", weight, (16, 16)), ("input", x, (1, 16))):
        if precision.format != "nvfp4":
            break
        row_scaled = precision.row_scaled and what == "input"
        simulated = quantize(tensor, block, precision.four_over_six, row_scaled)
        stored = quantized_bytes(tensor, precision, is_weight=what == "weight")
        for part, a, b in zip(("codes", "scales"), stored, (simulated.codes, simulated.scales)):
            b = b.view(torch.uint8)
            if not torch.equal(a, b):
                i, j = (a != b).nonzero()[0].tolist()
                stop(
                    f"{int((a != b).sum())} of {a.numel()} bytes of the {what}'s {part}, "
                    f"first at [{i}, {j}], {int(a[i, j])} and {int(b[i, j])}"
                )

    a = TEMatmul(weight, layer.bias, precision)(x).float()
    b = simulate(weight, layer.bias, precision)(x).float()
    error = (a - b).abs()
    if not error.max() <= 8e-3 * b.abs().max():  # also if an output is NaN
        i, j = divmod(int(error.argmax()), error.shape[1])
        stop(
            f"outputs by up to {float(error.max()):.3g}, the largest output being "
            f"{float(b.abs().max()):.3g}; at [{i}, {j}] {float(a[i, j]):.5g} and "
            f"{float(b[i, j]):.5g}"
        )
