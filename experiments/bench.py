"""Speed on this machine, eager and compiled, as medians and their ratios within one run.

    python experiments/bench.py  # nan where torchao is not installed (pip install torchao==0.18.0)

1. fake_quantize_nvfp4 against torchao's NVFP4Tensor.to_nvfp4(x).dequantize(), and against a copy.
2. A sampling step of the tiny models in each precision against BF16.
"""

import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import models, world  # before torch, because support prepares OpenMP

# isort: split

import torch

import quant
from rollout import candidate_seeds, initial_noise, make_copy, sample

SHAPES = {"cpu": ((6144, 128), (4096, 2240)), "cuda": ((65536, 2240), (4096, 12288))}
MODES = {"eager": lambda function: function, "compiled": torch.compile}


def medians(functions, repeats=15):
    """{name: median milliseconds} of {name: function}. The functions are timed in turns, so that
    what else the machine does falls on all of them alike."""
    seconds = {name: [] for name in functions}
    for round_index in range(2 + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_index >= 2:  # after compilation and warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def quantization(device):
    """fake_quantize_nvfp4 against torchao, where it is installed, and a copy."""
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    except ImportError:
        NVFP4Tensor = None
    dtype = models.compute_dtype(device)
    print(f"| fake quantization of {dtype} | ours ms | copy ms | torchao ms | torchao / ours |")
    print("|" + " --- |" * 5)
    for shape in SHAPES[device]:
        x = torch.randn(shape, dtype=dtype, device=device)
        for mode, wrap in MODES.items():
            functions = {"ours": wrap(quant.fake_quantize_nvfp4), "copy": torch.clone}
            if NVFP4Tensor:
                functions["torchao"] = wrap(lambda x: NVFP4Tensor.to_nvfp4(x).dequantize())
            ms = medians({name: partial(f, x) for name, f in functions.items()})
            ours, copy, torchao = ms["ours"], ms["copy"], ms.get("torchao", math.nan)
            cells = f"{ours:.2f} | {copy:.2f} | {torchao:.2f} | {torchao / ours:.1f}x"
            print(f"| {shape}, {mode} | {cells} |", flush=True)


def exploring(device):
    """A sampling step of each tiny model for 96 images of a prompt, by precision."""
    precisions = [precision for precision in quant.PRECISIONS if precision != "bf16"]
    columns = " | ".join([f"{models.compute_dtype(device)} ms", *precisions])
    print(f"\n| a step for 96 images | {columns} |")
    print("|" + " --- |" * (2 + len(precisions)))
    for name in models.MODELS:
        model = models.load(name, device=device)
        text = model.encode(world.HELD_OUT_PROMPTS[:1]).take([0] * 96).to(device)
        noise = initial_noise(candidate_seeds(0, 0, 0, 96), model.latent_shape)
        networks = {p: make_copy(model, p, model.keep_bf16)[0] for p in ("bf16", *precisions)}
        for mode, wrap in MODES.items():
            wrapped = {p: wrap(network) for p, network in networks.items()}
            ms = medians({p: partial(sample, model, wrapped[p], text, noise, 1) for p in wrapped})
            cells = " | ".join(f"{ms[precision] / ms['bf16']:.2f}x" for precision in precisions)
            print(f"| {name}, {mode} | {ms['bf16']:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    for table in (quantization, exploring):
        table("cuda" if torch.cuda.is_available() else "cpu")
