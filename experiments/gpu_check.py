"""What only a GPU can show, in one report.

    python experiments/gpu_check.py               # writes docs/gpu.md; planned for 25 minutes
    python experiments/gpu_check.py tests memory  # only these sections

tests         whether the GPU computes what the CPU computes
quantization  the speed of fake_quantize_nvfp4, compared with a copy of the same tensor
memory        the peak of each stage of an iteration, compared with the dry run
processes     one on each GPU: whether they exchange over NCCL what train.py exchanges
speed         the time of a sampling step in each precision; the time of an iteration from it

Nothing is downloaded. SANA 1.6B has its published sizes and random weights, with which it takes the
time and memory of the trained model. Where an error happens, the report says **failed** and why,
the rest runs all the same, and the exit code is 1. Without a GPU the models are small: that shows
only that this program works.
"""

import argparse
import datetime
import gc
import math
import multiprocessing
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import quant
import rollout
import train
from experiments import bench
from support import distributed, dry_run, models, te
from support.errors import one_line, written_whole

FAILED = "**failed**"
GPUS = 8  # of the run whose iteration is predicted
LAYER = 2240, 11200  # inputs and outputs of the largest quantized layer of SANA 1.6B
LORA_NUMBERS = 20 * 8 * 32 * (2240 + 2240)  # of a LoRA of rank 32 on 8 layers in 20 blocks of SANA
QUANTIZED = [name for name in quant.PRECISIONS if name != "bf16"]


def attempt(function, *arguments):
    """What the function returns or, if it raises an error, a line that says so."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{FAILED}: {type(error).__name__}: {one_line(error)}".replace("|", "/")


def row(*cells):
    return f"| {' | '.join(cells)} |"


def header(*columns):
    return row(*columns), row(*["---"] * len(columns))


def random_model(name, configs, resolution, device, dtype):
    """(A model with random weights and no text encoders, the Text of one prompt)."""
    torch.manual_seed(0)
    parts = {part: config for part, config in configs[name].items() if "text" not in part}
    model = dry_run.published_model(name, resolution, device, dtype, parts)
    return model, dry_run.made_up_text(model, device)


def update_loss(c, model, text, pairs):
    """The update's loss for a micro-batch of (sample, time) pairs with made-up samples."""
    device = text.embeds.device
    x_0, noise = rollout.initial_noise(range(2 * pairs), model.latent_shape).to(device).chunk(2)
    t, advantages = torch.linspace(0.1, 1, pairs), torch.linspace(-2, 2, pairs)
    return train.pairs_loss(c, model, text, x_0, noise, t.to(device), advantages.to(device))[0]


# ---------------------------------------------------------------------------------------------
# Tests. Each check returns its figures, or raises AssertionError with them. c: a run's options.


def tests(c):
    yield from header("check", "result (differences are relative, of whole tensors)")
    for check in CHECKS:
        yield row(check.__doc__, attempt(check, c))
    for precision in QUANTIZED:
        name = f"A layer simulated in {precision} gives the CPU's outputs, within 8e-3; TE agrees"
        yield row(name, attempt(check_layer, c, precision))


def assert_equal(actual, expected, what):
    wrong = actual.cpu() != expected.cpu()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ"


def relative_error(actual, expected):
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float((actual - expected).norm() / expected.norm())


def assert_below(limit, errors):
    """errors: {what: relative error}. Returns them as a line."""
    line = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    assert all(error <= limit for error in errors.values()), line
    return line


# block, four_over_six and row_scaled of quant.quantize_nvfp4
FORMATS = [((1, 16), *modes) for modes in ((False, False), (True, False), (False, True))]
FORMATS += [((16, 16), four_over_six, False) for four_over_six in (False, True)]


def bytes_of(q):
    """The parts of an NVFP4Tensor as tests/nvfp4_vectors.safetensors has them."""
    return {"codes": q.codes, "scales": q.scales.view(torch.uint8), "amax": q.amax.reshape(-1)}


def check_reference(c):
    """quantize_nvfp4 gives the bytes of Transformer Engine's reference"""
    vectors = load_file(PROJECT / "tests" / "nvfp4_vectors.safetensors")
    cases = [key.removesuffix(".codes") for key in vectors if key.endswith(".codes")]
    for case in cases:
        x, block, mode = case.split(".")
        block = (1, 16) if block == "1x16" else (16, 16)
        q = quant.quantize_nvfp4(vectors[f"{x}.x"].to(c.device), block, mode != "plain")
        for part, actual in bytes_of(q).items():
            assert_equal(actual, vectors[f"{case}.{part}"], f"{part} of {case}")
    return f"equal in {len(cases)} tensors"


def check_quantization(c):
    """quantize_nvfp4 gives the CPU's bytes; fake_quantize_nvfp4 their values, eager and compiled"""
    torch.manual_seed(0)  # the rows of x differ much in size; x does not divide into whole blocks
    x = (torch.randn(1000, 2232) * torch.randn(1000, 1).mul(2).exp()).bfloat16()
    x_gpu = x.to(c.device)
    for form in FORMATS:
        q, expected = quant.quantize_nvfp4(x_gpu, *form), bytes_of(quant.quantize_nvfp4(x, *form))
        for part, actual in bytes_of(q).items():
            assert_equal(actual, expected[part], f"{part} with {form}")
        for mode, wrap in bench.MODES.items():
            torch._dynamo.reset()  # each is compiled for itself
            fake = wrap(quant.fake_quantize_nvfp4)(x_gpu, *form)
            assert_equal(fake, q.dequantize(x.dtype), f"{mode} with {form}")
    return f"equal in {len(FORMATS)} formats, {' and '.join(bench.MODES)}"


def check_layer(c, precision):
    torch.manual_seed(0)
    layer = torch.nn.Linear(*LAYER, dtype=torch.bfloat16).requires_grad_(False)
    x, settings = torch.randn(96, LAYER[0]).bfloat16(), quant.PRECISIONS[precision]
    on_cpu = quant.SimulatedMatmul(layer.weight, layer.bias, settings)
    expected, layer = on_cpu(x), layer.to(c.device)
    on_gpu = quant.SimulatedMatmul(layer.weight, layer.bias, settings)
    assert_equal(on_gpu.values, on_cpu.values, "numbers of the quantized weight")
    line = assert_below(8e-3, {"simulated": relative_error(on_gpu(x.to(c.device)), expected)})
    if reason := te.unusable(settings, c.device):
        return f"{line}; Transformer Engine not run: {reason}"
    te.self_check(layer, "of random weights", settings, quant.quantize_nvfp4, quant.SimulatedMatmul)
    return f"{line}; Transformer Engine {te.version()} agrees"


def compare_models(c, dtype, limit, compute):
    """Compare tensors that compute(model, text) returns, of each small model on the GPU and on the
    CPU. text: of one prompt."""
    errors = {}
    for name in models.MODELS:
        results = []
        for device in (c.device, "cpu"):
            model, text = random_model(name, dry_run.small_configs(), 64, "cpu", dtype)
            model.transformer.to(device)
            model.vae.to(device)
            # By default cuDNN rounds the inputs of convolutions in float32 to 10 bits.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                results.append(compute(model, text.to(device)))
        errors[name] = max(map(relative_error, *results))
    return assert_below(limit, errors)


def check_drawing(c):
    """Small models in float32 draw the CPU's images from the same seeds in 4 steps, within 1e-3"""

    def draw(model, text):
        return rollout.draw(model, model.transformer, text, [0, 1, 2], 4)

    return compare_models(c, torch.float32, 1e-3, draw)


def check_explorer(c):
    """Small simulated NVFP4 explorers draw the CPU's latents in a step, within 0.04"""
    # NVFP4 itself changes them by 0.04 to 0.07. Sums in another order move some numbers to a
    # neighbouring NVFP4 code, which changes them by up to half of that.

    def explore(model, text):
        with mock.patch.object(te, "unusable", lambda *_: "to be simulated"):
            explorer, _ = rollout.make_copy(model, "nvfp4", model.keep_bf16)
        return rollout.draw(model, explorer, text, [0, 1, 2], 1)[:1]

    return compare_models(c, torch.bfloat16, 0.04, explore)


def check_gradient(c):
    """The update's gradient of small models in float32 is the CPU's, within 1e-3"""

    def gradient(model, text):
        models.add_lora(model, c.lora_rank, alpha=2 * c.lora_rank)
        torch.manual_seed(0)
        for adapter in models.ADAPTERS:  # which begin equal, and without effect
            for p in models.lora_parameters(model.transformer, adapter):
                p.data.copy_(0.05 * torch.randn(p.shape))
        policy = models.lora_parameters(model.transformer, "default")
        gradients = torch.autograd.grad(update_loss(c, model, text, 4), policy)
        return [torch.cat([g.flatten() for g in gradients])]

    return compare_models(c, torch.float32, 1e-3, gradient)


CHECKS = check_reference, check_quantization, check_drawing, check_explorer, check_gradient


# ---------------------------------------------------------------------------------------------
# Memory and speed of the stages of a run with SANA 1.6B


def sana_configs(c):
    return dry_run.small_configs() if c.device == "cpu" else dry_run.published_configs()


def sana(c):
    """(SANA with random weights, the Text of a micro-batch of images, their noise)."""
    model, text = random_model("sana", sana_configs(c), c.resolution, c.device, torch.bfloat16)
    noise = rollout.initial_noise(range(c.micro_batch), model.latent_shape).to(c.device)
    return model, text.take([0] * len(noise)), noise


def make_update(c, model, text):
    """Add LoRA. Returns a function that runs the update of a micro-batch and AdamW's step."""
    models.add_lora(model, c.lora_rank, alpha=2 * c.lora_rank)
    if c.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    policy = models.lora_parameters(model.transformer, "default")
    optimizer = torch.optim.AdamW(policy, lr=c.learning_rate)

    def update():
        size = sum(p.numel() for p in policy)
        summed = torch.zeros(size, dtype=torch.float64, device=c.device)  # as in train.py
        update_loss(c, model, text.take(0), c.train_micro_batch).backward()
        summed += torch.cat([p.grad.flatten() for p in policy])
        optimizer.step()
        optimizer.zero_grad()

    return update


def memory(c):
    kind = "simulated" if te.unusable(quant.PRECISIONS["nvfp4"], c.device) else "Transformer Engine"
    # In a process of its own, which ends, because PyTorch does not forget the fake GPU.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        predicted = process.submit(predicted_peaks, c, kind).result()
    model, text, noise = sana(c)
    explorer, _ = rollout.make_copy(model, "nvfp4", model.keep_bf16, c.min_dim)
    merged, _ = rollout.make_copy(model, "bf16")
    update = make_update(c, model, text)
    for network in (explorer, merged):
        rollout.sync(network, model.transformer, "old")
    stages = {
        "explore": lambda: rollout.sample(model, explorer, text, noise, 1),
        "regenerate": lambda: rollout.sample(model, merged, text, noise, 1),
        "decode": lambda: model.decode(noise),
        "update": update,
    }
    for run in stages.values():  # which makes all that stays, such as AdamW's moments
        run()
    yield from header(f"stage (explorer: {kind})", "peak GB", "dry run GB", "peak / dry run")
    for name, run in stages.items():
        if c.device != "cpu":  # whose memory PyTorch does not count
            torch.cuda.reset_peak_memory_stats()
        run()
        gb, predicted_gb = torch.cuda.max_memory_allocated() / 1e9, predicted[name] / 1e9
        yield row(name, f"{gb:.3f}", f"{predicted_gb:.3f}", f"{gb / predicted_gb:.3f}")


def predicted_peaks(c, kind):
    """{stage: bytes} by the dry run, without what is not here: text encoders, CLIP, latents."""
    given = rollout, train.pairs_loss, train.num_timesteps(c), sana_configs(c)["sana"]
    resident, stages = dry_run.run_stages(c, *given)
    resident |= {dry_run.ENCODERS: 0, dry_run.CLIP: 0, dry_run.LATENTS: 0}
    return dry_run.peaks(resident, stages, kind, False, c.micro_batch, c.train_micro_batch)


def speed(c):
    """Each precision runs as train.py would run it on this machine, in micro-batches."""
    start, steps = time.perf_counter(), {}  # {(precision, mode): seconds of a sampling step}
    model, text, noise = sana(c)

    def seconds(function):
        return bench.medians({"function": function}, repeats=5)["function"] / 1e3

    def measure_step(precision, mode):
        """The cells of a row."""
        if mode == "compiled" and time.perf_counter() - start > 8 * 60:
            return "not run: after 8 minutes of this section nothing more is compiled |"
        torch._dynamo.reset()
        network, _ = rollout.make_copy(model, precision, model.keep_bf16, c.min_dim)
        network = bench.MODES[mode](network)
        step = seconds(lambda: rollout.sample(model, network, text, noise, 1))
        steps[precision, mode] = step
        return f"{step:.4f} | {step / steps.get(('bf16', mode), math.nan):.2f}"

    yield from header(f"a sampling step of {c.micro_batch} images", "seconds", "seconds / BF16's")
    for mode in bench.MODES:
        for precision in ("bf16", "nvfp4", "fp8"):
            _, name = quant.backend(precision, c.device)
            yield row(f"{name}, {mode}", attempt(measure_step, precision, mode))
    decode, update = seconds(lambda: model.decode(noise)), seconds(make_update(c, model, text))
    yield f"\nDecoding {c.micro_batch} images of {c.resolution} pixels takes {decode:.4f} seconds."
    yield f"The update of {c.train_micro_batch} (sample, time) pairs takes {update:.4f} seconds.\n"

    title = (
        f"an iteration of {c.prompts_per_step} prompts on {GPUS} GPUs, predicted without rewards"
    )
    columns = "explore s", "regenerate s", "update s", "sum s", "times as fast"
    yield from header(title, *columns)
    for (precision, mode), step in steps.items():
        bf16 = steps.get(("bf16", mode), math.nan)
        naive = sum(iteration_seconds(c, bf16, None, decode, update))
        explorer = None if precision == "bf16" else step
        parts = iteration_seconds(c, bf16, explorer, decode, update)
        name = f"{'sol_rl' if explorer else 'naive_scaling'}, {precision}, {mode}"
        yield row(name, *(f"{s:.2f}" for s in (*parts, sum(parts))), f"{naive / sum(parts):.2f}")


def iteration_seconds(c, bf16, explorer, decode, update):
    """Seconds of (exploring, regenerating, the update) in an iteration, without rewards.

    The arguments are seconds of a micro-batch: a sampling step in BF16, one by the explorer,
    decoding, the update. Without an explorer BF16 draws all images and none is drawn again."""
    pool, kept = math.ceil(c.pool / c.micro_batch), math.ceil(c.keep / c.micro_batch)
    pairs = math.ceil(c.keep * train.num_timesteps(c) / c.train_micro_batch)
    explore, regenerate = pool * (c.rollout_steps * bf16 + decode), 0
    if explorer is not None:
        explore = pool * (c.explore_steps * explorer + decode)
        regenerate = kept * (c.rollout_steps * bf16 + decode)
    prompts = c.prompts_per_step / GPUS
    return prompts * explore, prompts * regenerate, prompts * pairs * update


# ---------------------------------------------------------------------------------------------
# Several processes


def processes(c):
    n = torch.cuda.device_count() or 2
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={n}", __file__, "--process"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    sys.stderr.write(done.stderr)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert done.returncode == 0, errors[0] if errors else f"exit code {done.returncode}"
    yield from done.stdout.splitlines()


def exchange():
    """What each process of `processes` runs: the exchanges of train.py, over NCCL on GPUs."""
    world, device, library = distributed.WORLD, "cpu", "gloo"
    if torch.cuda.is_available():
        device, library = "cuda", "NCCL {}.{}.{}".format(*torch.cuda.nccl.version())
        torch.cuda.set_device(distributed.LOCAL_RANK)
    with distributed.group():
        if world == 1:  # a run of one process exchanges nothing; NCCL is tried all the same
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        items = list(range(2 * world + 1))
        gathered = distributed.gather(distributed.mine(items))
        assert gathered == items, f"gathered {gathered}"
        tensor = torch.ones(LORA_NUMBERS, dtype=torch.float64, device=device)
        tensor += distributed.RANK + 2**-40  # which is lost where the sum is not in float64
        distributed.total(tensor)
        expected = world * (world + 1) // 2 + world * 2**-40
        assert (tensor == expected).all(), f"total {tensor[0]}, expected {expected}"
        tensor.zero_()
        ms = bench.medians({"sum": lambda: dist.all_reduce(tensor)}, repeats=5)["sum"]
    distributed.say(f"- {world} processes over {library}: gathered and summed as expected")
    distributed.say(f"- all-reduce of {LORA_NUMBERS:,} numbers in float64: {ms / 1e3:.4f} s")


# ---------------------------------------------------------------------------------------------
# The report

SECTIONS = {
    "tests": ("The GPU against the CPU", tests),
    "quantization": (
        "Bandwidth of fake_quantize_nvfp4; the goal is half of a copy's",
        lambda c: bench.quantization(c.device),
    ),
    "memory": ("Peak memory of SANA 1.6B; the goal is within 10% of the dry run", memory),
    "processes": ("Processes, one on each GPU", processes),
    "speed": ("Speed of SANA 1.6B", speed),  # the last, because compilation takes longest
}


def machine():
    """Where and with what the figures were measured."""
    gpu = "none: the models are small, and no figure below means anything"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        gpu = f"{torch.cuda.device_count()} x {p.name}, sm{p.major}{p.minor}, "
        gpu += f"{p.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}"
    yield f"- GPU: {gpu}"
    for name in ("torch", "diffusers", "peft"):
        yield f"- {name}: {version(name)}"
    engine = te.version() if te.transformer_engine else f"none ({te.IMPORT_ERROR})"
    yield f"- Transformer Engine: {engine}"
    commit = subprocess.getoutput(f"git -C '{PROJECT}' describe --always --dirty")
    yield f"- commit: {commit}, on {datetime.date.today()}"


def run_section(name, c):
    """The lines of a section, which are also printed. An error is its last line."""
    (title, function), lines, start = SECTIONS[name], [], time.perf_counter()

    def add(new_lines):
        for line in new_lines:
            print(line, flush=True)
            lines.append(line)

    add([f"\n## {title}\n"])
    if error := attempt(lambda: add(function(c))):
        add([f"\n{error}"])
    add([f"\nThis section took {time.perf_counter() - start:.0f} seconds."])
    gc.collect()  # the next section needs the memory
    torch.cuda.empty_cache()
    return lines


def main(argv=None):
    """Run the chosen sections and write the report after each; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = dict(nargs="*", choices=["all", *SECTIONS], default="all")
    parser.add_argument("sections", metavar="SECTION", help=", ".join(SECTIONS), **sections)
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "gpu.md")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.process:
        exchange()
        return 0
    # The published model's options, for which no file is read, or small ones.
    run = "--device cpu --resolution 64 --micro_batch 4 --train_micro_batch 4 --pool 8 --keep 4"
    if torch.cuda.is_available():
        run = "--device cuda --pretrained --prompts none"
    c = train.parse_options(run.split())
    lines = ["# What a GPU shows", "", *machine()]
    print("\n".join(lines), flush=True)
    for name in SECTIONS if "all" in options.sections else options.sections:
        lines += run_section(name, c)
        with written_whole(options.output) as path:
            path.write_text("\n".join(lines) + "\n")
    return int(FAILED in "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
