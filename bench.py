"""Speed on this machine, as ratios within one run (medians).

    python bench.py          # the first part needs `pip install torchao==0.18.0`, else is left out

1. fake_quantize_nvfp4 against torchao's NVFP4Tensor.to_nvfp4(x).dequantize(), eager and compiled.
2. A sampling step of the tiny SANA with the simulated NVFP4 explorer against BF16.
"""

import statistics
import time

import torch

import models
import quant
import tiny
from rollout import candidate_seeds, initial_noise, sample


def medians(functions, repeats=15):
    """Median milliseconds of each function, taken in turns: they share the machine's moods."""
    seconds = {name: [] for name in functions}
    for round_ in range(2 + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 2:  # compilation and warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def quantization(device):
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    except ImportError:
        print("torchao is not installed: its comparison is left out")
        return

    def theirs(x):
        return NVFP4Tensor.to_nvfp4(x).dequantize()

    print("| fake quantization of BF16 | torchao ms | ours ms | ratio |\n| --- | --- | --- | --- |")
    for shape in ((6144, 128), (4096, 2240)):
        x = torch.randn(shape, dtype=torch.bfloat16, device=device)
        for mode, wrap in (("eager", lambda f: f), ("compiled", torch.compile)):
            a, b = wrap(theirs), wrap(quant.fake_quantize_nvfp4)
            ms = medians({"theirs": lambda: a(x), "ours": lambda: b(x)})
            a, b = ms["theirs"], ms["ours"]
            print(f"| {shape}, {mode} | {a:.2f} | {b:.2f} | {a / b:.1f}x |", flush=True)


def exploring(device):
    model = models.load("sana", tiny.ensure("sana") / "sana", 32, device=device)
    explorer, _ = models.make_explorer(model, "nvfp4", model.keep_bf16)
    text = model.encode(tiny.HELD_OUT_PROMPTS[:1]).take([0] * 96)
    noise = initial_noise(candidate_seeds(0, 0, 0, 96), model.latent_shape)
    ms = medians(
        {
            "bf16": lambda: sample(model, model.transformer, text, noise, 1),
            "nvfp4": lambda: sample(model, explorer, text, noise, 1),
        }
    )
    ratio = ms["nvfp4"] / ms["bf16"]
    print(
        f"\na step for 96 images: BF16 {ms['bf16']:.1f} ms, simulated NVFP4 {ms['nvfp4']:.1f} ms, "
        f"{ratio:.2f}x"
    )


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization(device)
    exploring(device)
