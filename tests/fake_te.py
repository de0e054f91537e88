"""A substitute for Transformer Engine (TE), for machines that cannot run it.

It has the functions and classes that support/te.py uses. It checks what TE checks and computes with
the simulation, so a call that TE would reject or understand differently fails a test. The comment
at each rule names the file of transformer_engine (version 2.20.2 unless another is named) in which
the rule was read. `install` puts the substitute into sys.modules.
"""

import contextlib
import dataclasses
import math
import sys
import types

import torch
from torch import nn

import quant
from support import te


class State:
    """Counts of what the substitute was called for, which tests compare."""

    def __init__(self):
        self.recipe = None  # of the autocast that is open
        self.depth = self.quantized_weights = self.calls = self.unquantized = 0


def recipes(version):
    """transformer_engine.common.recipe, with the options that `version` has."""

    @dataclasses.dataclass
    class NVFP4BlockScaling:
        disable_rht: bool = False
        disable_stochastic_rounding: bool = False
        disable_2d_quantization: bool = False
        if version >= (2, 16):
            row_scaled_activation: bool = False
        if version >= (2, 17):
            nvfp4_4over6: str = "none"

        def __post_init__(self):
            if getattr(self, "nvfp4_4over6", "none") not in (
                "none",
                "weights",
                "activations",
                "all",
            ):
                raise AssertionError("NVTE_NVFP4_4OVER6 must be one of ...")
            if getattr(self, "row_scaled_activation", False) and not self.disable_rht:
                raise ValueError("row-scaled NVFP4 does not combine with RHT")

    class Float8CurrentScaling:
        pass

    class DelayedScaling:
        def __init__(self, **_):
            raise AssertionError("runs no FP4 and updates no scale without gradients")

    known = dict(Float8CurrentScaling=Float8CurrentScaling, DelayedScaling=DelayedScaling)
    return known | ({"NVFP4BlockScaling": NVFP4BlockScaling} if version >= (2, 8) else {})


def precision_of(recipe):
    if type(recipe).__name__ == "Float8CurrentScaling":
        return quant.Precision("fp8")
    assert recipe.disable_rht and recipe.disable_stochastic_rounding, "those are for training"
    four_over_six = getattr(recipe, "nvfp4_4over6", "none") == "all"
    return quant.Precision("nvfp4", four_over_six, getattr(recipe, "row_scaled_activation", False))


def install(monkeypatch, version="2.20.2", sm=(10, 0), cuda="12.8", wrong=None):
    """Install the substitute and let the GPU appear to have compute capability `sm`. wrong: "codes"
    or "output" makes that part of its results wrong. Returns its State."""
    number, state = tuple(int(n) for n in version.split(".")[:2]), State()

    def available(kind):
        # pytorch/quantization.py, check_nvfp4_support: by compute capability alone
        if sm >= ((10, 0) if kind == "nvfp4" else (8, 9)):
            return True, ""
        return False, f"Device compute capability too low for {kind} execution."

    def ask(kind):
        return lambda return_reason=False: available(kind) if return_reason else available(kind)[0]

    @contextlib.contextmanager
    def enter(enabled, recipe):
        # pytorch/quantization.py, autocast_enter: asserts support when entered
        kind = "fp8" if type(recipe).__name__ == "Float8CurrentScaling" else "nvfp4"
        ok, reason = available(kind)
        assert enabled and ok, reason
        before, state.recipe = state.recipe, recipe
        state.depth += 1
        yield
        state.recipe = before

    class Linear(nn.Module):
        # pytorch/module/linear.py: the third positional argument is sequence_parallel, not bias
        def __init__(
            self,
            in_features,
            out_features,
            sequence_parallel=False,
            *,
            bias=True,
            params_dtype=None,
            device="cuda",
        ):
            super().__init__()
            if sequence_parallel:
                raise RuntimeError("sequence_parallel needs a tensor parallel group")
            dtype = params_dtype or torch.get_default_dtype()
            self.weight = nn.Parameter(torch.randn(out_features, in_features).to(device, dtype))
            self.bias = nn.Parameter(torch.zeros(out_features).to(device, dtype)) if bias else None
            self.stored = None

        def forward(self, inp, is_first_microbatch=None):
            state.calls += 1
            # pytorch/module/base.py, set_activation_dtype: parameters have the input's dtype
            assert inp.dtype == self.weight.dtype == torch.bfloat16
            tokens, features = math.prod(inp.shape[:-1]), inp.shape[-1]
            if state.recipe is None:  # outside of autocast it is an ordinary linear layer
                state.unquantized += 1
                return nn.functional.linear(inp, self.weight, self.bias)
            precision = precision_of(state.recipe)
            # pytorch/utils.py, assert_dim_for_fp8_exec, of input and weight
            assert tokens % 8 == 0 and features % 16 == 0 and len(self.weight) % 8 == 0
            if precision.format == "nvfp4":
                # pytorch/tensor/nvfp4_tensor.py, is_quantizable: both sizes are multiples of 16.
                # cuBLAS's FP4 matmul needs a multiple of 32 features, which TE does not check.
                assert tokens % 16 == 0 and len(self.weight) % 16 == 0 and features % 32 == 0
            # pytorch/module/linear.py: update_ws = is_first_microbatch is None or is_first_...
            matmul = self.stored
            if is_first_microbatch or is_first_microbatch is None or matmul is None:
                state.quantized_weights += 1
                matmul = quant.SimulatedMatmul(self.weight.data.clone(), self.bias, precision)
            self.stored = None if is_first_microbatch is None else matmul
            return matmul(inp) * (1.1 if wrong == "output" else 1)

    class NVFP4Quantizer:
        # pytorch/tensor/nvfp4_tensor.py
        def __init__(self, *, rowwise, columnwise, with_2d_quantization, **more):
            known = {"row_scaled_nvfp4"} if number >= (2, 16) else set()
            known |= {"nvfp4_use_4over6", "nvfp4_e4m3_max"} if number >= (2, 17) else set()
            if set(more) - known:
                raise TypeError(f"unexpected keyword arguments {set(more) - known}")
            assert rowwise and not columnwise
            self.tile = (16, 16) if with_2d_quantization else (1, 16)
            self.four_over_six = more.get("nvfp4_use_4over6", False)
            assert not self.four_over_six or more["nvfp4_e4m3_max"] == 256
            self.row_scaled = more.get("row_scaled_nvfp4", False)

        def __call__(self, x):
            m, k = x.shape
            assert m % 16 == 0 and k % 16 == 0
            q = quant.quantize_nvfp4(x, self.tile, self.four_over_six, self.row_scaled)
            # get_scale_shape: padded to 128 rows and 4 columns
            scales = torch.full((-(-m // 128) * 128, -(-k // 64) * 4), 77, dtype=torch.uint8)
            scales[:m, : k // 16] = q.scales.view(torch.uint8)
            codes = q.codes.clone()
            if wrong == "codes":
                codes[3, 1] ^= 1
            return types.SimpleNamespace(_rowwise_data=codes, _rowwise_scale_inv=scales)

    def module(name, **attributes):
        substitute = types.ModuleType(name)
        substitute.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, substitute)
        return substitute

    names = {"Linear": Linear}
    if number >= (2, 9):  # pytorch/__init__.py
        names["autocast"] = lambda enabled=True, recipe=None: enter(enabled, recipe)
        names |= {"is_nvfp4_available": ask("nvfp4"), "is_fp8_available": ask("fp8")}
    else:  # 2.8: pytorch/fp8.py
        names["fp8_autocast"] = lambda enabled=True, fp8_recipe=None: enter(enabled, fp8_recipe)
        manager = types.SimpleNamespace(
            is_nvfp4_available=lambda: available("nvfp4"), is_fp8_available=lambda: available("fp8")
        )
        module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=manager)
    pytorch = module("transformer_engine.pytorch", **names)
    recipe = module("transformer_engine.common.recipe", **recipes(number))
    common = module("transformer_engine.common", recipe=recipe)
    package = module("transformer_engine", __version__=version, pytorch=pytorch, common=common)
    monkeypatch.setattr(te, "transformer_engine", package)
    module("transformer_engine.pytorch.tensor")
    module("transformer_engine.pytorch.tensor.nvfp4_tensor", NVFP4Quantizer=NVFP4Quantizer)
    monkeypatch.setattr(te, "capability", lambda device: sm)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return state
