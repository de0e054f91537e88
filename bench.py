"""Speed on this machine, as ratios within one run (medians).

    python bench.py          # the first part needs `pip install torchao==0.18.0`, else is left out

1. fake_quantize_nvfp4 against torchao's NVFP4Tensor.to_nvfp4(x).dequantize(), and against a plain
   copy of the same tensor, eager and compiled.
2. A sampling step of the tiny models in each precision against BF16, eager and compiled.
"""

import statistics
import time

import torch

import models
import quant
import tiny
from rollout import candidate_seeds, initial_noise, sample

SHAPES = {"cpu": ((6144, 128), (4096, 2240)), "cuda": ((65536, 2240), (4096, 12288))}


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
        NVFP4Tensor = None
        print("torchao is not installed: its column is left out")

    def theirs(x):
        return NVFP4Tensor.to_nvfp4(x).dequantize()

    print(
        "| fake quantization of BF16 | torchao ms | ours ms | ratio | copy ms | of its bandwidth |"
    )
    print("|" + " --- |" * 6)
    for shape in SHAPES[device]:
        x = torch.randn(shape, dtype=torch.bfloat16, device=device)
        for mode, wrap in (("eager", lambda f: f), ("compiled", torch.compile)):
            ours = wrap(quant.fake_quantize_nvfp4)
            todo = {"ours": lambda: ours(x), "copy": x.clone}
            if NVFP4Tensor:
                other = wrap(theirs)
                todo["theirs"] = lambda: other(x)
            ms = medians(todo)
            them = ms.get("theirs", float("nan"))
            print(
                f"| {shape}, {mode} | {them:.2f} | {ms['ours']:.2f} | {them / ms['ours']:.1f}x | "
                f"{ms['copy']:.2f} | {ms['copy'] / ms['ours']:.0%} |",
                flush=True,
            )


def exploring(device):
    """A step of each tiny model for 96 images of a prompt, by precision."""
    world = tiny.ensure(*models.MODELS)
    names = [p for p in quant.PRECISIONS if p != "bf16"]
    print("\n| a step for 96 images | BF16 ms | " + " | ".join(names) + " |")
    print("|" + " --- |" * (2 + len(names)))
    for family in models.MODELS:
        model = models.load(family, world / family, tiny.SIDE, device=device)
        text = model.encode(tiny.HELD_OUT_PROMPTS[:1]).take([0] * 96).to(device)
        noise = initial_noise(candidate_seeds(0, 0, 0, 96), model.latent_shape)
        for mode, wrap in (("eager", lambda f: f), ("compiled", torch.compile)):
            drawers = {"bf16": wrap(model.transformer)}
            for precision in names:
                drawers[precision] = wrap(
                    models.make_explorer(model, precision, model.keep_bf16)[0]
                )
            ms = medians(
                {k: (lambda d=d: sample(model, d, text, noise, 1)) for k, d in drawers.items()}
            )
            cells = " | ".join(f"{ms[name] / ms['bf16']:.2f}x" for name in names)
            print(f"| {family}, {mode} | {ms['bf16']:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization(device)
    exploring(device)
