"""support/te.py with a substitute for Transformer Engine; quant.py against TE's own reference."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import fake_te
import pytest
import torch
from conftest import MINIATURE, PROJECT, lines
from torch import nn

import quant
from support.errors import InputError


def layers():
    """Three layers, of which TE can take the first."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        dict(
            good=nn.Linear(64, 48), odd_in=nn.Linear(48, 64), odd_out=nn.Linear(64, 40, bias=False)
        )
    ).bfloat16()


@pytest.mark.parametrize("version", ["2.8.0", "2.9.0", "2.12.0", "2.16.1", "2.17.1", "2.20.2"])
@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_4over6", "nvfp4_row", "fp8"])
def test_a_layer_runs_in_every_version_that_has_its_precision(version, precision, monkeypatch):
    state = fake_te.install(monkeypatch, version)
    number = tuple(int(n) for n in version.split(".")[:2])
    has = number >= {"nvfp4_row": (2, 16), "nvfp4_4over6": (2, 17)}.get(precision, (2, 8))
    kind, line = quant.backend(precision)
    if not has:
        assert kind == "simulated" and f"version {version} has no" in line
        return
    assert (kind, line) == ("te", f"{precision}: Transformer Engine {version} on sm100")
    model, before = layers(), layers()
    rows = {name: outcome for name, _, _, outcome in quant.quantize_linears(model, precision)}
    fits = precision == "fp8"
    assert rows == {
        "good": precision,
        "odd_in": precision if fits else "kept: in_features 48 is no multiple of 32",
        "odd_out": "kept: out_features 40 is no multiple of 16",
    }
    for tokens in (1, 32, 77):  # padded to a multiple of 32, which changes nothing but rounding
        x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        layer = before["good"]
        simulated = quant.SimulatedMatmul(layer.weight, layer.bias, quant.PRECISIONS[precision])
        expected = simulated(x.reshape(-1, 64)).reshape(2, tokens, 48)
        # With another number of rows a processor may sum the 64 terms in another order. This can
        # change the product's and the result's rounding to BF16, each by one step of at most 2^-7
        # of its value. If padding changed a scale, the difference would be far larger.
        largest = expected.abs().max().item()
        torch.testing.assert_close(model["good"](x), expected, rtol=2**-7, atol=2**-7 * largest)
    assert state.unquantized == 0 and state.recipe is None


@pytest.mark.parametrize("tokens, copied", [(64, False), (65, True)])
def test_tokens_are_copied_only_where_they_are_padded(tokens, copied, monkeypatch):
    fake_te.install(monkeypatch)
    model, x = layers(), torch.randn(tokens, 64).bfloat16()
    quant.quantize_linears(model, "nvfp4")
    linear, seen = model["good"].matmul.linear, []
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model["good"](x)
    assert (seen[0].data_ptr() != x.data_ptr()) == copied and len(seen[0]) % 32 == 0


def test_the_weight_is_quantized_once_after_each_sync(monkeypatch):
    state, model = fake_te.install(monkeypatch), layers()
    quant.quantize_linears(model, "nvfp4")
    layer, x = model["good"], torch.randn(32, 64).bfloat16()
    start = state.quantized_weights
    first = [layer(x) for _ in range(3)]
    assert state.quantized_weights == start + 1 and torch.equal(first[0], first[2])
    for n in (2, 3):
        layer.set_weight(torch.randn(48, 64).bfloat16())
        second = [layer(x) for _ in range(3)]
        assert state.quantized_weights == start + n
        assert torch.equal(second[0], second[2]) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    "machine, precision, why",
    [
        (dict(sm=(9, 0)), "nvfp4", "no Blackwell: this is sm90"),
        (dict(sm=(8, 0)), "fp8", "no GPU with FP8: this is sm80"),
        (dict(cuda="12.6"), "nvfp4", "CUDA 12.6"),
        (dict(version="2.7.0"), "nvfp4", "version 2.7.0 has no disable_rht"),
    ],
)
def test_where_te_cannot_be_used_the_run_simulates_and_says_why(
    machine, precision, why, monkeypatch
):
    state = fake_te.install(monkeypatch, **machine)
    kind, line = quant.backend(precision)
    assert kind == "simulated" and why in line and "\n" not in line
    model = layers()
    rows = quant.quantize_linears(model, precision)
    assert all(outcome == precision for *_, outcome in rows) and state.calls == state.depth == 0
    assert isinstance(model["good"].matmul, quant.SimulatedMatmul)


# `pip install transformer-engine`, without [pytorch], installs a package that cannot be imported.
BARE_WHEEL = """
raise RuntimeError("Found empty `transformer-engine` meta package installed.\\nInstall [pytorch].")
"""


def test_a_te_that_cannot_be_imported_does_not_stop_quant_or_peft(tmp_path):
    package = tmp_path / "transformer_engine" / "__init__.py"
    package.parent.mkdir()
    package.write_text(BARE_WHEEL)
    program = """
import torch
from support import te
te.capability = lambda device: (10, 0)
torch.version.cuda = "12.8"
import quant
print(quant.backend("nvfp4"))
from peft.import_utils import is_te_pytorch_available
assert not is_te_pytorch_available()
"""
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kind, line = ast.literal_eval(run.stdout)
    assert kind == "simulated" and "\n" not in line
    assert "cannot be imported: Found empty `transformer-engine` meta package" in line


def test_on_hopper_fp8_runs_and_fp4_is_simulated(monkeypatch):
    fake_te.install(monkeypatch, sm=(9, 0))
    assert quant.backend("fp8")[0] == "te" and quant.backend("nvfp4")[0] == "simulated"


@pytest.mark.parametrize(
    "wrong, says", [("codes", "1 of 1536 bytes"), ("output", "outputs by up to")]
)
def test_hardware_that_differs_from_the_simulation_stops_the_run(wrong, says, monkeypatch):
    fake_te.install(monkeypatch, wrong=wrong)
    model = layers()
    with pytest.raises(InputError, match=says) as error:
        quant.quantize_linears(model, "nvfp4")
    assert "layer good" in str(error.value) and "uninstall transformer-engine" in str(error.value)
    assert isinstance(model["good"], nn.Linear)  # nothing was swapped


def test_two_iterations_go_through_transformer_engine(tmp_path, monkeypatch, capsys):
    import train

    state = fake_te.install(monkeypatch)
    out = tmp_path / "run"
    assert train.main([*MINIATURE, "--model", "flux", "--output_dir", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    swapped = sum(not outcome.startswith("kept") for *_, outcome in config["layers"])
    assert f"nvfp4: Transformer Engine 2.20.2 on sm100: {swapped} of" in config["backend"]
    assert config["backend"] in capsys.readouterr().out
    # One in the self-check, one of each layer, and the 13 that LoRA changes after the second sync.
    assert (swapped, state.quantized_weights) == (33, 1 + 33 + 13)
    assert state.unquantized == 0 and len(lines(out)) == 3


REFERENCE = "transformer_engine/pytorch/custom_recipes/reference_nvfp4.py"


@pytest.fixture(scope="module")
def reference():
    """TE's reference in Python, from the wheel that `pip install --no-deps transformer-engine`
    installs. That package cannot be imported without CUDA, so its file is loaded alone, with
    substitutes for what it imports."""
    try:
        path = Path(distribution("transformer-engine").locate_file(REFERENCE))
    except PackageNotFoundError:
        pytest.skip("the transformer-engine wheel is not installed")

    class Quantizer:
        def __init__(self, *, rowwise, columnwise):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    with pytest.MonkeyPatch.context() as patch:
        te = "transformer_engine"
        for name, names in {
            te: {},
            f"{te}.pytorch": {},
            f"{te}.pytorch.quantized_tensor": dict(
                Quantizer=Quantizer, QuantizedTensorStorage=object
            ),
            f"{te}.pytorch.tensor": {},
            f"{te}.pytorch.tensor.utils": dict(is_custom=lambda x=None: False),
            f"{te}.pytorch.custom_recipes": dict(gemm=None),
        }.items():
            module = types.ModuleType(name)
            module.__dict__.update(names)
            patch.setitem(sys.modules, name, module)

        def load(file, name):
            spec = importlib.util.spec_from_file_location(name, path.with_name(file))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module

        package = f"{te}.pytorch.custom_recipes"
        for part in ("reference_utils", "gemm"):
            patch.setitem(sys.modules, f"{package}.{part}", load(f"{part}.py", part))
            setattr(sys.modules[package], part, sys.modules[f"{package}.{part}"])
        yield load("reference_nvfp4.py", "reference_nvfp4"), sys.modules[package].reference_utils


@pytest.mark.parametrize("mode", ["plain", "four_over_six", "row_scaled"])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_bytes_equal_those_of_transformer_engines_reference(mode, block, reference):
    if mode == "row_scaled" and block == (16, 16):
        pytest.skip("rows are scaled in activations only")
    module, utils = reference
    quantizer = module.NVFP4QuantizerRef(
        dtype=utils.Fp4Formats.E2M1,
        rowwise=True,
        columnwise=False,
        quant_tile_shape=block,
        row_scaled_nvfp4=mode == "row_scaled",
        nvfp4_use_4over6=mode == "four_over_six",
        nvfp4_e4m3_max=256 if mode == "four_over_six" else 448,
    )
    g = torch.Generator().manual_seed(0)
    for i in range(200):
        rows, columns = (16 * int(torch.randint(1, 5, (), generator=g)) for _ in range(2))
        x = torch.randn(rows, columns, generator=g)
        x = x * torch.randn(rows, 1, generator=g).mul(i % 7).exp() * 10.0 ** (i % 13 - 6)
        x = x.to((torch.bfloat16, torch.float32)[i % 2])
        codes, scales, _, _, amax, _ = quantizer._quantize(x)
        q = quant.quantize_nvfp4(x, block, mode == "four_over_six", mode == "row_scaled")
        assert torch.equal(q.codes, codes.view(torch.uint8)), i
        theirs = scales.view(torch.uint8)
        if block == (16, 16) and len(theirs) != rows:
            theirs = theirs.repeat_interleave(16, dim=0)
        assert torch.equal(q.scales.view(torch.uint8), theirs), i
        assert torch.equal(q.amax.reshape(-1), amax.reshape(-1)), i
