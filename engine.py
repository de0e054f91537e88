"""Transformer Engine (TE): matmuls in FP4 or FP8 on hardware that has them.

This is the one place that knows TE and the differences between its versions 2.8 to 2.20. It has not
been run on such a GPU: what it assumes was read in TE's sources (paths below are inside
`transformer_engine/`), tests drive it with a stand-in that enforces just that (tests/stand_in.py),
and `quant.self_check` compares the first layer on real hardware with the simulation and stops the
run if they differ.

 1. The recipe is NVFP4BlockScaling (common/recipe, from 2.8); a DelayedScaling with an E2M1 format
    runs FP8 instead. Rotations and stochastic rounding are for training and off; weights are
    scaled in 16x16 blocks, activations in 1x16. Four-over-six is a field from 2.17, row-scaled
    activations from 2.16. FP8 is Float8CurrentScaling: DelayedScaling's scales never move without
    gradients.
 2. `te.autocast(recipe=)` from 2.9, before `te.fp8_autocast(fp8_recipe=)`. Entering it where the
    hardware does not suffice fails, so `te.is_nvfp4_available` (2.8: pytorch/fp8.py,
    FP8GlobalStateManager) is asked first. It looks at the compute capability alone; CUDA must be
    12.8 at least.
 3. te.Linear.forward(x, is_first_microbatch) (pytorch/module/linear.py): None quantizes the weight
    at each call, True quantizes and keeps it, False takes what was kept, however old. So: True in
    the first call after each `set_weight`, then False. (quantized_model_init would save the BF16
    copy of the weights; this protocol is older and says what it does.)
 4. Shapes (pytorch/utils.py, pytorch/tensor/nvfp4_tensor.py): te.Linear pads nothing. For NVFP4
    tokens must be multiples of 16, better of 32, in_features of 32 and out_features of 16; for FP8
    tokens of 8, in and out of 16. Tokens are padded here with zeros, which move no scale; a layer
    whose features do not fit stays in BF16.
 5. Input and parameters are BF16, the bias is added before the result is rounded.
"""

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import nn

try:
    import transformer_engine
except ImportError as error:
    transformer_engine, BROKEN = None, f"not installed ({error})"
except Exception as error:  # the wheel without its CUDA part, or of another CUDA or torch
    transformer_engine, BROKEN = None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    # peft imports it too, wherever it is found, and would not survive that.
    sys.modules["transformer_engine"] = None

TOKENS = 32
FEATURES = {"fp8": (16, 16), "nvfp4": (32, 16)}  # multiples that (in, out) must be


class EngineError(RuntimeError):
    """Transformer Engine was asked for and cannot be used, or does not compute what it should."""


def capability(device):
    """The compute capability (major, minor) of a CUDA device, (0, 0) of another."""
    device = torch.device(device)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def unusable(precision, device):
    """Why TE cannot run a precision on a device, or "" if it can. Never raises."""
    fp8, found = precision == "fp8", capability(device)
    if found < ((8, 9) if fp8 else (10, 0)):
        needs = "no GPU with FP8" if fp8 else "no Blackwell"
        return f"{needs}: this is " + ("sm{}{}".format(*found) if any(found) else str(device))
    cuda = tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2])
    if not fp8 and cuda < (12, 8):
        return f"PyTorch is built for CUDA {torch.version.cuda}, FP4 needs 12.8"
    try:
        te = _load()
        recipe(precision)
        available, reason = _available(te, "fp8" if fp8 else "nvfp4")
    except Exception as error:  # a TE that does not fit its CUDA or torch fails in many ways
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"Transformer Engine cannot be used: {line}"
    return "" if available else f"Transformer Engine says: {reason}"


def version():
    return transformer_engine.__version__


def _load():
    if transformer_engine is None:
        raise EngineError(BROKEN)
    import transformer_engine.pytorch as te

    return te


def _available(te, kind):
    ask = getattr(te, f"is_{kind}_available", None)
    if ask:
        return ask(return_reason=True)
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # 2.8

    return getattr(FP8GlobalStateManager, f"is_{kind}_available")()


def recipe(precision):
    """TE's recipe for a precision. Raises EngineError where this TE does not have it."""
    from transformer_engine.common import recipe as recipes

    if precision == "fp8":
        return recipes.Float8CurrentScaling()
    options = dict(disable_rht=True, disable_stochastic_rounding=True)
    if precision == "nvfp4_4over6":
        options["nvfp4_4over6"] = "all"
    if precision == "nvfp4_row":
        options["row_scaled_activation"] = True
    kind = getattr(recipes, "NVFP4BlockScaling", None)
    known = inspect.signature(kind).parameters if kind else ()
    missing = [name for name in options if name not in known]
    if missing:
        raise EngineError(f"its version {version()} has no {missing[0]} for {precision}")
    return kind(**options)


def features_fit(precision, in_features, out_features):
    """ "", or the reason why TE cannot take a layer of these sizes."""
    of_in, of_out = FEATURES["fp8" if precision == "fp8" else "nvfp4"]
    if in_features % of_in:
        return f"in_features {in_features} is no multiple of {of_in}"
    if out_features % of_out:
        return f"out_features {out_features} is no multiple of {of_out}"
    return ""


class EngineMatmul(nn.Module):
    """x (m, in) -> x W^T + bias (m, out) by te.Linear, W and x quantized.

    weight: (out, in) on a CUDA device; bias: (out,) or None."""

    def __init__(self, weight, bias, precision):
        super().__init__()
        self.te = _load()
        self.recipe = recipe(precision)
        (n_out, n_in), how = weight.shape, dict(params_dtype=torch.bfloat16, device=weight.device)
        self.linear = self.te.Linear(n_in, n_out, bias=bias is not None, **how)
        self.linear.requires_grad_(False)
        if bias is not None:
            self.linear.bias.data.copy_(bias)
        self.set_weight(weight)

    @torch.no_grad()
    def set_weight(self, weight):
        self.linear.weight.data.copy_(weight)
        self.stale = True  # what te.Linear keeps of the weight in FP4

    def autocast(self):
        if hasattr(self.te, "autocast"):
            return self.te.autocast(enabled=True, recipe=self.recipe)
        return self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)

    @torch.no_grad()
    def forward(self, x):
        padded = F.pad(x.to(torch.bfloat16), (0, 0, 0, -len(x) % TOKENS))
        with self.autocast():
            y = self.linear(padded, is_first_microbatch=self.stale)
        self.stale = False
        return y[: len(x)].to(x.dtype)


def quantized_bytes(x, precision, is_weight):
    """TE's own NVFP4 of x (m, k): (codes uint8 (m, k / 2), scales uint8 (m, k / 16))."""
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    options = dict(rowwise=True, columnwise=False, with_2d_quantization=is_weight)
    if precision == "nvfp4_4over6":
        options |= dict(nvfp4_use_4over6=True, nvfp4_e4m3_max=256)
    if precision == "nvfp4_row" and not is_weight:
        options["row_scaled_nvfp4"] = True
    tensor = NVFP4Quantizer(**options)(x)
    m, k = x.shape
    codes = tensor._rowwise_data.view(torch.uint8).reshape(m, -1)
    return codes, tensor._rowwise_scale_inv.view(torch.uint8)[:m, : k // 16]  # padded for cuBLAS
