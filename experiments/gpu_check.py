"""What only a GPU can show, in the order in which one would look.

    python experiments/gpu_check.py  # prints a report; a few minutes

1. Do the bytes of Transformer Engine's quantizer equal those of quant.quantize_nvfp4? This is the
   self-check with which every run begins that explores by Transformer Engine.
2. Does a matmul by Transformer Engine agree with the simulation?
3. Does the explorer of the tiny SANA draw what the simulated explorer draws?
4. How long does a sampling step of SANA 1.6B take in each precision?
5. What is the peak memory of an iteration with SANA 1.6B?

What cannot run is skipped with the reason; 1 to 3 need Transformer Engine. Nothing is downloaded:
SANA 1.6B has random weights and reads prompts of the tiny world. Exit code 1 if a check failed.
"""

import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # before torch, because support prepares OpenMP

# isort: split

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

import quant
import rollout
from experiments import bench
from support import models, te, world

QUANTIZED = [name for name, p in quant.PRECISIONS.items() if p.format != "bf16"]
NVFP4 = [name for name, p in quant.PRECISIONS.items() if p.format == "nvfp4"]
LAYER = 2240, 11200  # inputs and outputs of the largest layer of SANA 1.6B that is quantized
# The defaults of the transformer's class are the sizes of SANA 1.6B; these are its autoencoder's.
TRANSFORMER, BLOCKS = {}, ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
AUTOENCODER = dict(encoder_block_types=BLOCKS, decoder_block_types=BLOCKS, scaling_factor=0.41407)
AUTOENCODER |= dict(upsample_block_type="interpolate", downsample_block_type="conv")
OPTIONS = "--resolution 1024 --prompts_per_step 1 --micro_batch 24 --train_micro_batch 16"
OPTIONS += " --lora_rank 32 --gradient_checkpointing true"

# Transformer Engine against the simulation. Each check returns (what it found, is it right).


def check_bytes(name, device):
    layer = torch.nn.Linear(*LAYER, device=device, dtype=torch.bfloat16)
    simulation = quant.quantize_nvfp4, quant.SimulatedMatmul
    te.self_check(layer, "of random weights", quant.PRECISIONS[name], *simulation)
    return "bytes of a weight and an input are equal, and the outputs agree", True


def check_matmul(name, device):
    options, precision = dict(device=device, dtype=torch.bfloat16), quant.PRECISIONS[name]
    weight, x = torch.randn(*LAYER[::-1], **options), torch.randn(96, LAYER[0], **options)
    expected = quant.SimulatedMatmul(weight, None, precision)(x).float()
    error = (te.TEMatmul(weight, None, precision)(x) - expected).abs().max() / expected.abs().max()
    # 8e-3 is the tolerance of Transformer Engine's own tests. NaN is not below it.
    return f"largest error / largest output: {error:.1e}, must be at most 8e-3", bool(error <= 8e-3)


def check_explorer(name, device):
    model = models.load("sana", device=device, dtype=torch.bfloat16)
    text = model.encode(world.HELD_OUT_PROMPTS[:1]).to(device)
    explorer, _ = rollout.make_copy(model, name, model.keep_bf16)
    with mock.patch.object(te, "unusable", lambda *_: "to be simulated"):
        simulated, _ = rollout.make_copy(model, name, model.keep_bf16)
    networks = explorer, simulated, model.transformer
    drawn = [rollout.draw(model, network, text, range(4), 6)[0] for network in networks]
    error, effect = ((drawn[i] - drawn[1]).norm() / drawn[1].norm() for i in (0, 2))
    line = f"latents {error:.1%} from the simulated ones, must be less than BF16's {effect:.1%}"
    return line, bool(error < effect)


# SANA 1.6B. Each function yields the lines of its section.


def sana_1600m(device):
    """SANA 1.6B with random weights, in BF16, with the text encoder of the tiny SANA."""
    tiny = models.load("sana", device=device, dtype=torch.bfloat16)
    with torch.device(device):
        transformer = SanaTransformer2DModel(caption_channels=64, **TRANSFORMER)  # of the encoder
        vae = AutoencoderDC(**AUTOENCODER)
    parts = [part.bfloat16().eval().requires_grad_(False) for part in (vae, transformer)]
    pipe = SanaPipeline(tiny.pipe.tokenizer, tiny.pipe.text_encoder, *parts, tiny.pipe.scheduler)
    return models.Sana(pipe, train.parse_options(OPTIONS.split()).resolution, "euler")


def speed(device):
    c, model = train.parse_options(OPTIONS.split()), sana_1600m(device)
    text = model.encode(world.HELD_OUT_PROMPTS[:1]).take([0] * c.micro_batch).to(device)
    noise = rollout.initial_noise(range(c.micro_batch), model.latent_shape)
    for name in ("bf16", "nvfp4", "fp8"):
        network, _ = rollout.make_copy(model, name, model.keep_bf16, model.paper["min_dim"])
        step = partial(rollout.sample, model, network, text, noise, 1)
        ms = bench.medians({"step": step}, repeats=5)["step"]
        yield f"- {quant.backend(name, device)[1]}: {ms:.1f} ms for {c.micro_batch} images"


def memory(device):
    config, model = train.parse_options(OPTIONS.split()), sana_1600m(device)
    config.min_dim = model.paper["min_dim"]
    with mock.patch.object(models, "load", lambda *_, **__: model):
        run = train.Run(config)
    metrics, _ = train.iteration(run, 0)
    peak = torch.cuda.max_memory_allocated() / 1e9
    yield f"- {', '.join(run.backends)}; loss {metrics['loss']:.3f}; peak {peak:.1f} GB"


CHECKS = (  # title, check, precisions
    ("Bytes of the quantizer", check_bytes, NVFP4),
    ("A matmul", check_matmul, QUANTIZED),
    ("The explorer of the tiny SANA", check_explorer, QUANTIZED),
)
MEASUREMENTS = ("A sampling step of SANA 1.6B", speed), ("An iteration of SANA 1.6B", memory)


def main():
    device, failed = "cuda" if torch.cuda.is_available() else "cpu", False
    print(torch.cuda.get_device_name() if device == "cuda" else "There is no GPU.")
    for title, check, precisions in CHECKS:
        print(f"\n## {title}: Transformer Engine against the simulation\n")
        for name in precisions:
            reason = te.unusable(quant.PRECISIONS[name], device)
            try:
                line, right = (f"skipped: {reason}", True) if reason else check(name, device)
            except Exception as error:
                traceback.print_exc()
                line, right = f"{type(error).__name__}: {error}", False
            failed |= not right
            print(f"- {name}: {line}" + ("" if right else " **failed**"), flush=True)
    for title, measure in MEASUREMENTS:
        print(f"\n## {title}\n")
        for line in measure(device) if device == "cuda" else ["- skipped: there is no GPU"]:
            print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
