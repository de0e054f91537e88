"""support/te.py with the substitute for Transformer Engine in tests/fake_te.py."""

import os
import subprocess
import sys

import fake_te
import pytest
import torch
from conftest import MINIATURE, PROJECT
from torch import nn

import quant
from support.errors import InputError


def layers():
    """Three layers, of which TE can take the first in every precision."""
    torch.manual_seed(0)
    good, odd_in, odd_out = nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 40, bias=False)
    return nn.ModuleDict(dict(good=good, odd_in=odd_in, odd_out=odd_out)).bfloat16()


@pytest.mark.parametrize("version", ["2.9.0", "2.14.0", "2.15.0", "2.16.1", "2.20.2"])
@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_4over6", "nvfp4_row", "fp8"])
def test_a_layer_runs_in_every_version_that_has_its_precision(version, precision, monkeypatch):
    state = fake_te.install(monkeypatch, version)
    kind, line = quant.backend(precision)
    if int(version.split(".")[1]) < {"nvfp4_row": 16, "nvfp4_4over6": 17}.get(precision, 14):
        assert kind == "simulated" and "or later, found " + version in line
        return
    assert (kind, line) == ("te", f"{precision}: Transformer Engine {version} on sm100")
    model, before = layers(), layers()["good"]
    rows = {name: outcome for name, _, _, outcome in quant.quantize_linears(model, precision)}
    odd = "kept: in_features 48 is no multiple of 32"
    assert rows == {
        "good": precision,
        "odd_in": precision if precision == "fp8" else odd,
        "odd_out": "kept: out_features 40 is no multiple of 16",
    }
    simulated = quant.SimulatedMatmul(before.weight, before.bias, quant.PRECISIONS[precision])
    for tokens in (1, 32, 77):  # padded to a multiple of 32
        x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        expected = simulated(x.reshape(-1, 64)).reshape(2, tokens, 48)
        # With another number of rows the 64 terms may be added in another order, and so each of two
        # roundings to BF16 may change by 2^-7. A wrong scale would change far more.
        largest = expected.abs().max().item()
        torch.testing.assert_close(model["good"](x), expected, rtol=2**-7, atol=2**-7 * largest)
    assert state.unquantized == 0 and state.recipe is None


def test_the_weight_is_quantized_once_after_each_sync(monkeypatch):
    state, model = fake_te.install(monkeypatch), layers()
    quant.quantize_linears(model, "nvfp4")
    layer, x, start = model["good"], torch.randn(32, 64).bfloat16(), state.quantized_weights
    for n in (1, 2, 3):
        weight = torch.randn(48, 64).bfloat16()
        layer.set_weight(weight)
        matmul = quant.SimulatedMatmul(weight, layer.matmul.linear.bias, quant.PRECISIONS["nvfp4"])
        for _ in range(2):
            assert torch.equal(layer(x), matmul(x))
        assert state.quantized_weights == start + n


@pytest.mark.parametrize(
    "machine, precision, why",
    [
        (dict(sm=(9, 0)), "nvfp4", "no Blackwell: this is sm90"),
        (dict(sm=(8, 0)), "fp8", "no GPU with FP8: this is sm80"),
        (dict(version="2.13.1"), "nvfp4", "needs Transformer Engine 2.14 or later, found 2.13.1"),
    ],
)
def test_where_te_cannot_be_used_the_run_simulates_and_says_why(
    machine, precision, why, monkeypatch
):
    fake_te.install(monkeypatch, sm=(8, 9))
    assert quant.backend("fp8") == ("te", "fp8: Transformer Engine 2.20.2 on sm89")
    state = fake_te.install(monkeypatch, **machine)
    assert quant.backend(precision) == ("simulated", f"{precision}: simulated ({why})")
    model = layers()
    rows = quant.quantize_linears(model, precision)
    assert all(outcome == precision for *_, outcome in rows) and state.calls == 0
    assert isinstance(model["good"].matmul, quant.SimulatedMatmul)


def test_a_te_that_cannot_be_imported_does_not_stop_quant_or_peft(tmp_path):
    # `pip install transformer-engine`, without [pytorch], installs such a package.
    (tmp_path / "transformer_engine.py").write_text("raise RuntimeError('Found\\nempty package')")
    program = """
from support import te
te.capability = lambda device: (10, 0)
import quant
print(quant.backend("nvfp4"))
from peft.import_utils import is_te_pytorch_available
assert not is_te_pytorch_available()
"""
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    line = "nvfp4: simulated (Transformer Engine cannot be imported: Found empty package)"
    assert run.returncode == 0 and run.stdout == f"{('simulated', line)}\n", run.stderr


# support/te.py takes the tolerance of TE's own tests: 8e-3 of the largest output.
@pytest.mark.parametrize(
    "precision, wrong, says",
    [
        ("nvfp4", dict(wrong=("codes", "weight")), "1 of 2048 codes of the weight"),
        ("nvfp4", dict(wrong=("scales", "weight")), "1 of 256 scales of the weight"),
        ("nvfp4", dict(wrong=("codes", "input")), "1 of 3072 codes of the input"),
        ("nvfp4", dict(wrong=("scales", "input")), "1 of 384 scales of the input"),
        ("nvfp4", dict(output=lambda y: y + 0.02 * y.abs().max()), "outputs by up to"),
        ("fp8", dict(output=lambda y: y + 0.02 * y.abs().max()), "outputs by up to"),
        ("fp8", dict(output=lambda y: y * float("nan")), "outputs by up to nan"),
        ("fp8", dict(output=lambda y: y + 0.002 * y.abs().max()), None),
    ],
)
def test_hardware_that_differs_in_the_largest_layer_stops_the_run(
    precision, wrong, says, monkeypatch
):
    fake_te.install(monkeypatch, **wrong)
    layer = nn.Linear(64, 64)
    model = dict(small=nn.Linear(32, 16), large=layer, last=nn.Linear(64, 32))
    model = nn.ModuleDict(model).bfloat16()
    if says is None:
        quant.quantize_linears(model, precision)
        return
    with pytest.raises(InputError, match=f"in layer large, .*{says}.*uninstall transformer-engine"):
        quant.quantize_linears(model, precision)
    assert model["large"] is layer  # nothing was swapped


def test_two_iterations_go_through_transformer_engine(tmp_path, monkeypatch):
    import train

    state = fake_te.install(monkeypatch)
    assert train.main([*MINIATURE, "--model", "flux", "--output_dir", str(tmp_path / "run")]) == 0
    # One in the self-check, one of each layer, and the 13 that LoRA changes after the second sync.
    assert (state.unquantized, state.quantized_weights) == (0, 1 + 33 + 13)
