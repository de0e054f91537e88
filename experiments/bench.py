"""Speed on this machine, as ratios of medians within one run.

    python experiments/bench.py  # after `pip install torchao==0.18.0` with two columns of it

1. fake_quantize_nvfp4 against torchao's NVFP4Tensor.to_nvfp4(x).dequantize(), and against a plain
   copy of the same tensor, eager and compiled.
2. A sampling step of the tiny models in each precision against none, eager and compiled.

Everything is in the dtype that a run on this machine computes in, BF16 or float32.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import quant
from rollout import candidate_seeds, initial_noise, make_copy, sample
from support import models, world

SHAPES = {"cpu": ((6144, 128), (4096, 2240)), "cuda": ((65536, 2240), (4096, 12288))}
MODES = {"eager": lambda function: function, "compiled": torch.compile}


def medians(functions, repeats=15, calls=1):
    """{name: median milliseconds} of {name: function}. The functions are timed in turns, so that
    what else the machine does falls on all of them alike. calls: of a function in one measurement;
    several keep a GPU busy with functions that take less time than it takes to start them."""
    seconds = {name: [] for name in functions}
    for round_index in range(2 + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_index >= 2:  # after compilation and warm-up
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def quantization(device):
    """A table, line by line."""
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    except ImportError:
        NVFP4Tensor = None

    def torchao_fake_quantize(x):
        return NVFP4Tensor.to_nvfp4(x).dequantize()

    dtype = models.compute_dtype(device)
    columns = [f"fake quantization of {dtype}", "ours ms", "copy ms", "of the copy's bandwidth"]
    columns += ["torchao ms", "torchao / ours"] if NVFP4Tensor else []
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)
    for shape in SHAPES[device]:
        x = torch.randn(shape, dtype=dtype, device=device)
        for mode, wrap in MODES.items():
            functions = {"ours": wrap(quant.fake_quantize_nvfp4), "copy": torch.clone}
            if NVFP4Tensor:
                functions["torchao"] = wrap(torchao_fake_quantize)
            calls = 1 if device == "cpu" else 10
            ms = medians({name: lambda f=f: f(x) for name, f in functions.items()}, calls=calls)
            cells = [f"{shape}, {mode}", f"{ms['ours']:.2f}", f"{ms['copy']:.2f}"]
            cells += [f"{ms['copy'] / ms['ours']:.0%}"]
            if NVFP4Tensor:
                cells += [f"{ms['torchao']:.2f}", f"{ms['torchao'] / ms['ours']:.1f}x"]
            yield f"| {' | '.join(cells)} |"


def exploring(device):
    """A sampling step of each tiny model for 96 images of a prompt, by precision."""
    precisions = [precision for precision in quant.PRECISIONS if precision != "bf16"]
    print(f"\n| a step for 96 images | {models.compute_dtype(device)} ms | ", end="")
    print(" | ".join(precisions) + " |")
    print("|" + " --- |" * (2 + len(precisions)))
    for name in models.MODELS:
        model = models.load(name, device=device)
        text = model.encode(world.HELD_OUT_PROMPTS[:1]).take([0] * 96).to(device)
        noise = initial_noise(candidate_seeds(0, 0, 0, 96), model.latent_shape)
        for mode, wrap in MODES.items():
            networks = {"bf16": wrap(model.transformer)}
            for precision in precisions:
                networks[precision] = wrap(make_copy(model, precision, model.keep_bf16)[0])
            ms = medians(
                {p: lambda n=n: sample(model, n, text, noise, 1) for p, n in networks.items()}
            )
            cells = " | ".join(f"{ms[precision] / ms['bf16']:.2f}x" for precision in precisions)
            print(f"| {name}, {mode} | {ms['bf16']:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for line in quantization(device):
        print(line, flush=True)
    exploring(device)
