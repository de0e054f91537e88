"""A substitute for Transformer Engine (TE), for machines that cannot run it.

It has what support/te.py uses. It checks what TE checks and computes with the simulation, so a call
that TE would reject or understand differently fails a test. The comment at each rule names the file
of transformer_engine 2.20.2 in which the rule was read.
"""

import contextlib
import dataclasses
import sys
import types

import torch
from torch import nn

import quant
from support import te


def install(monkeypatch, version="2.20.2", sm=(10, 0), wrong=None, output=lambda y: y):
    """Put the substitute into sys.modules, on a GPU of compute capability `sm`. wrong: ("codes" or
    "scales", "weight" or "input"), of which one byte is wrong; output: a function of each result.
    Returns counts of what was called."""
    state = types.SimpleNamespace(recipe=None, calls=0, quantized_weights=0, unquantized=0)
    minor = int(version.split(".")[1])

    @dataclasses.dataclass
    class NVFP4BlockScaling:  # common/recipe/__init__.py
        disable_rht: bool = False
        disable_stochastic_rounding: bool = False
        if minor >= 16:
            row_scaled_activation: bool = False
        if minor >= 17:
            nvfp4_4over6: str = "none"

    class Float8CurrentScaling:
        pass

    def precision_of(recipe):
        if isinstance(recipe, Float8CurrentScaling):
            return quant.Precision("fp8")
        assert recipe.disable_rht and recipe.disable_stochastic_rounding, "those are for training"
        four_over_six = getattr(recipe, "nvfp4_4over6", "none")
        assert four_over_six in ("none", "all"), "weights and activations"
        row_scaled = getattr(recipe, "row_scaled_activation", False)
        return quant.Precision("nvfp4", four_over_six == "all", row_scaled)

    @contextlib.contextmanager
    def autocast(enabled, recipe):
        # pytorch/quantization.py, autocast_enter: asserts support when entered
        assert enabled and sm >= ((8, 9) if isinstance(recipe, Float8CurrentScaling) else (10, 0))
        before, state.recipe = state.recipe, recipe
        yield
        state.recipe = before

    class Linear(nn.Module):
        # pytorch/module/linear.py: the third positional argument is sequence_parallel, not bias
        def __init__(self, n_in, n_out, sequence_parallel=False, *, bias, params_dtype, device):
            super().__init__()
            assert not sequence_parallel
            self.weight = nn.Parameter(torch.randn(n_out, n_in).to(device, params_dtype))
            self.bias = nn.Parameter(self.weight.new_zeros(n_out)) if bias else None
            self.stored = None

        def forward(self, x, is_first_microbatch=None):
            state.calls += 1
            # pytorch/module/base.py, set_activation_dtype: parameters have the input's dtype
            assert x.dtype == self.weight.dtype == torch.bfloat16
            if state.recipe is None:  # outside of autocast it is an ordinary linear layer
                state.unquantized += 1
                return nn.functional.linear(x, self.weight, self.bias)
            precision, (n_out, n_in) = precision_of(state.recipe), self.weight.shape
            # pytorch/utils.py, assert_dim_for_fp8_exec, of input and weight
            assert len(x) % 8 == 0 and n_in % 16 == 0 and n_out % 8 == 0
            if precision.format == "nvfp4":
                # pytorch/tensor/nvfp4_tensor.py, is_quantizable: both sizes are multiples of 16.
                # cuBLAS's FP4 matmul needs a multiple of 32 features, which TE does not check.
                assert len(x) % 16 == 0 and n_out % 16 == 0 and n_in % 32 == 0
            # pytorch/module/linear.py: update_ws = is_first_microbatch is None or is_first_...
            matmul = self.stored
            if is_first_microbatch or is_first_microbatch is None or matmul is None:
                state.quantized_weights += 1
                matmul = quant.SimulatedMatmul(self.weight.data.clone(), self.bias, precision)
            self.stored = None if is_first_microbatch is None else matmul
            return output(matmul(x))

    class NVFP4Quantizer:
        # pytorch/tensor/nvfp4_tensor.py
        def __init__(self, *, rowwise, columnwise, with_2d_quantization, **options):
            assert rowwise and not columnwise
            self.how = [(16, 16) if with_2d_quantization else (1, 16)]
            self.how.append(options.pop("nvfp4_use_4over6", False))
            assert options.pop("nvfp4_e4m3_max", 448) == (256 if self.how[1] else 448)
            self.how.append(options.pop("row_scaled_nvfp4", False))
            assert not options and (minor >= 17 or not self.how[1])

        def __call__(self, x):
            (m, k), q = x.shape, quant.quantize_nvfp4(x, *self.how)
            assert m % 16 == 0 and k % 16 == 0
            # get_scale_shape: padded to 128 rows and 4 columns
            scales = torch.full((-(-m // 128) * 128, -(-k // 64) * 4), 77, dtype=torch.uint8)
            scales[:m, : k // 16] = q.scales.view(torch.uint8)
            codes = q.codes.clone()
            of = "weight" if self.how[0] == (16, 16) else "input"
            codes[3, 1] ^= wrong == ("codes", of)
            scales[3, 1] ^= wrong == ("scales", of)
            return types.SimpleNamespace(_rowwise_data=codes, _rowwise_scale_inv=scales)

    def module(name, **attributes):
        substitute = types.ModuleType(name)
        substitute.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, substitute)
        return substitute

    name = "transformer_engine"
    pytorch = module(f"{name}.pytorch", Linear=Linear, autocast=autocast)
    recipes = dict(NVFP4BlockScaling=NVFP4BlockScaling, Float8CurrentScaling=Float8CurrentScaling)
    common = module(f"{name}.common", recipe=module(f"{name}.common.recipe", **recipes))
    module(f"{name}.pytorch.tensor")
    module(f"{name}.pytorch.tensor.nvfp4_tensor", NVFP4Quantizer=NVFP4Quantizer)
    package = module(name, __version__=version, pytorch=pytorch, common=common)
    monkeypatch.setattr(te, "transformer_engine", package)
    monkeypatch.setattr(te, "capability", lambda device: sm)
    return state
