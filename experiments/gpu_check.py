"""What only a GPU can show, in one report.

    python experiments/gpu_check.py               # writes docs/gpu.md; at most 25 minutes
    python experiments/gpu_check.py tests memory  # only these sections

Nothing is downloaded. SANA 1.6B has its published sizes and random weights, with which it takes the
time and memory of the trained model. An error in one section stands in the report, the other
sections run all the same, and the exit code is 1. Without a GPU every size is small: that shows
only that this program works.
"""

import argparse
import datetime
import gc
import math
import multiprocessing
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

# isort: split

from support import models  # before diffusers, which support/__init__.py silences

# isort: split

import diffusers
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import quant
import rollout
import train
from experiments import bench
from support import distributed, dry_run, te
from support.errors import one_line, written_whole

GPUS = 8  # of the run whose iteration is predicted
QUANTIZED = [name for name in quant.PRECISIONS if name != "bf16"]
BACKENDS = {  # name in the report: (precision, what runs its layers, as in quant.backend)
    "BF16": ("bf16", "torch"),
    "NVFP4, simulated": ("nvfp4", "simulated"),
    "FP8, Transformer Engine": ("fp8", "te"),
    "NVFP4, Transformer Engine": ("nvfp4", "te"),
}
# What makes the published models small: one block or two, few channels.
SMALL_VAE = dict(block_out_channels=[32] * 4, layers_per_block=1)
SMALL_PROMPT = dict(joint_attention_dim=32, pooled_projection_dim=32)
SMALL = {
    "sana": dict(
        transformer=dict(
            num_layers=2,
            num_attention_heads=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=32,
        ),
        vae=dict(
            attention_head_dim=8,
            encoder_block_out_channels=[4, 4, 8, 8, 32, 32],
            decoder_block_out_channels=[4, 4, 8, 8, 32, 32],
            encoder_layers_per_block=[1] * 6,
            decoder_layers_per_block=[1] * 6,
        ),
    ),
    "flux": dict(
        transformer=dict(num_layers=1, num_single_layers=1, num_attention_heads=2) | SMALL_PROMPT,
        vae=SMALL_VAE,
    ),
    "sd3": dict(
        transformer=dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128)
        | SMALL_PROMPT,
        vae=SMALL_VAE,
    ),
}


class Setup(NamedTuple):
    """What is measured."""

    config: object  # the checked options of a run of train.py
    reduced: bool  # a small model in the place of the published one
    layer: tuple  # (in, out) of its largest quantized layer
    lora_numbers: int  # in one of its adapters
    repeats: int  # of each measurement of the model
    deadline: float  # of time.perf_counter(): no compilation begins later


def setup_for(device):
    """The Setup for "cuda" or, small, for "cpu"."""
    small = "--resolution 64 --micro_batch 4 --train_micro_batch 4 --pool 8 --keep 4".split()
    paper = ["--pretrained", "--prompts", "none"]  # the published model's options; no file is read
    c = train.parse_options([*(small if device == "cpu" else paper), "--device", device])
    # A compilation takes minutes; one that begins after 15 minutes might not end within 25.
    deadline = time.perf_counter() + 15 * 60
    if device == "cpu":
        return Setup(c, True, (64, 96), 1000, 1, deadline)
    # The largest layer opens the feed-forward. LoRA adapts 8 layers in each of 20 blocks.
    lora_numbers = 20 * 8 * c.lora_rank * (2240 + 2240)
    return Setup(c, False, (2240, 11200), lora_numbers, 5, deadline)


def rows(functions, failed):
    """For each of {name: function} a row of a table: what the function returns, or its error. An
    error does not stop the other functions; the name is added to the list `failed`."""
    for name, function in functions.items():
        try:
            result = function()
        except Exception as error:
            traceback.print_exc()
            result = f"**failed**: {describe(error)}"
            failed.append(name)
        yield f"| {name} | {result} |"


def describe(error):
    return f"{type(error).__name__}: {one_line(error)}".replace("|", "/")


def header(*columns):
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


# ---------------------------------------------------------------------------------------------
# Tests. Each check returns its figures, or raises AssertionError with them.


def assert_equal(actual, expected, what):
    wrong = actual.cpu() != expected.cpu()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ"


def assert_below(limit, errors):
    """{what: relative error} as a line; AssertionError with this line if one exceeds the limit."""
    line = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    assert all(error <= limit for error in errors.values()), f"{line}; the limit is {limit:g}"
    return line


def relative_error(actual, expected):
    """The norm of the difference, as a share of the expected norm."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float((actual - expected).norm() / expected.norm())


# block, four_over_six and row_scaled of quant.quantize_nvfp4
FORMATS = [((1, 16), *modes) for modes in ((False, False), (True, False), (False, True))]
FORMATS += [((16, 16), four_over_six, False) for four_over_six in (False, True)]


def random_tensors():
    """Two tensors whose rows differ much in size; the second one's sizes fill no whole blocks."""
    g = torch.Generator().manual_seed(0)
    for m, k, dtype in ((1024, 2240, torch.bfloat16), (100, 72, torch.float32)):
        row_sizes = torch.randn(m, 1, generator=g).mul(2).exp()
        yield (torch.randn(m, k, generator=g) * row_sizes).to(dtype)


def assert_same_bytes(q, expected, what):
    """q: an NVFP4Tensor; expected: its codes, scales (uint8) and amax."""
    actual = q.codes, q.scales.view(torch.uint8), q.amax.reshape(-1)
    for part, a, b in zip(("codes", "scales", "amax"), actual, expected):
        assert_equal(a, b, f"{part} of {what}")


def check_bytes(setup):
    """quantize_nvfp4 gives the bytes of Transformer Engine's reference, and those of the CPU"""
    device = setup.config.device
    vectors = load_file(PROJECT / "tests" / "nvfp4_vectors.safetensors")
    cases = [key.removesuffix(".codes") for key in vectors if key.endswith(".codes")]
    for case in cases:
        x, block, mode = case.split(".")
        block = (1, 16) if block == "1x16" else (16, 16)
        q = quant.quantize_nvfp4(vectors[f"{x}.x"].to(device), block, mode != "plain")
        expected = [vectors[f"{case}.{part}"] for part in ("codes", "scales", "amax")]
        assert_same_bytes(q, expected, case)
    for x in random_tensors():
        for form in FORMATS:
            q, on_cpu = quant.quantize_nvfp4(x.to(device), *form), quant.quantize_nvfp4(x, *form)
            expected = on_cpu.codes, on_cpu.scales.view(torch.uint8), on_cpu.amax.reshape(-1)
            assert_same_bytes(q, expected, f"{x.dtype}, {form}")
    return f"equal in {len(cases)} tensors of the reference and in {2 * len(FORMATS)} larger ones"


def check_fake_quantization(setup):
    """fake_quantize_nvfp4 equals quantize_nvfp4(...).dequantize(...), eager and compiled"""
    different = {}
    for x in random_tensors():
        x = x.to(setup.config.device)
        for form in FORMATS:
            expected = quant.quantize_nvfp4(x, *form).dequantize(x.dtype)
            for mode, wrap in bench.MODES.items():
                torch._dynamo.reset()  # each is compiled for itself
                wrong = wrap(quant.fake_quantize_nvfp4)(x, *form) != expected
                if wrong.any():
                    share = f"{int(wrong.sum())} of {wrong.numel()} differ"
                    different[f"{mode}, {x.dtype}, {form}"] = share
    assert not different, str(different)
    return f"equal in {2 * len(FORMATS)} tensors, {' and '.join(bench.MODES)}"


def check_noise(setup):
    """The noise of a seed depends neither on the GPU, nor on its generator, nor on other seeds"""
    seeds, shape = rollout.candidate_seeds(0, 0, 0, 24), (32, 32, 32)
    expected = rollout.initial_noise(seeds, shape)
    torch.randn(1000, device=setup.config.device)
    noise = [rollout.initial_noise([s], shape).to(setup.config.device) for s in seeds]
    assert_equal(torch.cat(noise), expected, "noise")
    return f"equal for {len(seeds)} seeds"


def configurations(name, small):
    """{part of the pipeline: configuration} of a published model."""
    changes = SMALL[name] if small else {}
    published = dry_run.published_configs()[name].items()
    return {part: config | changes.get(part, {}) for part, config in published}


def random_model(name, resolution, device, dtype, small):
    """(A model with random weights and no text encoders, the Text of one prompt)."""
    torch.manual_seed(0)
    parts = configurations(name, small)
    parts = {part: parts[part] for part in ("transformer", "vae", "scheduler")}
    model = dry_run.published_model(name, resolution, device, dtype, parts)
    return model, dry_run.made_up_text(model, device)


def on_both(setup, model, function):
    """What function(device) returns with the model on the CPU, and then on setup's device."""
    results = []
    for device in ("cpu", setup.config.device):
        model.transformer.to(device)
        model.vae.to(device)
        # By default cuDNN rounds the inputs of convolutions in float32 to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            results.append(function(device))
    return results


def check_drawing(setup):
    """Small models in float32 draw the CPU's latents and images in 4 steps, within 1e-3"""
    errors = {}
    for name in models.MODELS:
        model, text = random_model(name, 64, "cpu", torch.float32, small=True)

        def draw(device):
            return rollout.draw(model, model.transformer, text.to(device), [0, 1, 2], 4)

        for what, *pair in zip(("latents", "images"), *reversed(on_both(setup, model, draw))):
            errors[f"{name} {what}"] = relative_error(*pair)
    return assert_below(1e-3, errors)


def check_layer(setup):
    """A simulated layer holds the CPU's quantized numbers; its outputs are within 8e-3"""
    (n_in, n_out), device, errors = setup.layer, setup.config.device, {}
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(shape, generator=g).bfloat16()
        for shape in ((n_out, n_in), (n_out,), (96, n_in))
    )
    for precision in QUANTIZED:
        settings = quant.PRECISIONS[precision]
        on_cpu = quant.SimulatedMatmul(weight, bias, settings)
        on_device = quant.SimulatedMatmul(weight.to(device), bias.to(device), settings)
        assert_equal(on_device.values, on_cpu.values, f"{precision}, the weight's numbers")
        errors[precision] = relative_error(on_device(x.to(device)), on_cpu(x))
    return assert_below(8e-3, errors)


def check_explorer(setup):
    """A simulated NVFP4 explorer gives the CPU's velocity, within half of what NVFP4 changes"""
    errors = {}  # not near 0: sums in another order move some numbers to a neighbouring code
    for name in models.MODELS:
        model, text = random_model(name, 64, "cpu", torch.bfloat16, small=True)
        noise = rollout.initial_noise([0, 1, 2], model.latent_shape)
        text, t = text.take([0, 0, 0]), torch.tensor([0.9, 0.9, 0.9])
        with torch.no_grad():
            in_bf16 = model.velocity(model.transformer, noise, t, text)
            model.transformer = make_network(model, "NVFP4, simulated", min_dim=0)

            def velocity(device):
                inputs = noise.to(device), t.to(device), text.to(device)
                return model.velocity(model.transformer, *inputs)

            expected, actual = on_both(setup, model, velocity)
        errors[name] = relative_error(actual, expected) / relative_error(expected, in_bf16)
    return assert_below(0.5, errors)


def check_gradient(setup):
    """The update's gradient of small models in float32 is the CPU's, within 1e-3"""
    c, errors = setup.config, {}
    for name in models.MODELS:
        model, text = random_model(name, 64, "cpu", torch.float32, small=True)
        models.add_lora(model, c.lora_rank, alpha=2 * c.lora_rank)
        for adapter in models.ADAPTERS:  # which begin equal, and without effect
            for p in models.lora_parameters(model.transformer, adapter):
                p.data += 0.02 * torch.randn(p.shape)

        def gradient(device):
            loss = update_loss(c, model, text.to(device), 4)
            policy = models.lora_parameters(model.transformer, "default")
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy)])

        expected, actual = on_both(setup, model, gradient)
        errors[name] = relative_error(actual, expected)
    return assert_below(1e-3, errors)


def update_loss(c, model, text, pairs):
    """The loss of a micro-batch of (sample, time) pairs with made-up samples. text: of a prompt."""
    device = text.embeds.device
    x_0, noise = (
        rollout.initial_noise(range(first, first + pairs), model.latent_shape).to(device)
        for first in (0, pairs)
    )
    t, advantages = torch.linspace(0.1, 1, pairs), torch.linspace(-2, 2, pairs)
    loss, _ = train.pairs_loss(c, model, text, x_0, noise, t.to(device), advantages.to(device))
    return loss


def check_transformer_engine(setup, precision):
    """Transformer Engine agrees with the simulation on a layer, or the reason why it cannot run."""
    settings, device = quant.PRECISIONS[precision], setup.config.device
    reason = te.unusable(settings, device)
    if reason:
        return f"not run: {reason}"
    torch.manual_seed(0)
    layer = torch.nn.Linear(*setup.layer, device=device, dtype=torch.bfloat16)
    te.self_check(layer, "of random weights", settings, quant.quantize_nvfp4, quant.SimulatedMatmul)
    return f"Transformer Engine {te.version()} agrees with the simulation"


CHECKS = (check_bytes, check_fake_quantization, check_noise, check_drawing, check_layer)
CHECKS += (check_explorer, check_gradient)


def tests(setup):
    functions = {" ".join(f.__doc__.split()): lambda f=f: f(setup) for f in CHECKS}
    for precision in QUANTIZED:
        name = "Transformer Engine, {}: a layer of {} -> {}".format(precision, *setup.layer)
        functions[name] = lambda p=precision: check_transformer_engine(setup, p)
    yield from header("check", "figures: norms of differences, as shares of the CPU's")
    failed = []
    yield from rows(functions, failed)
    assert not failed, f"{len(failed)} of {len(functions)} checks"


# ---------------------------------------------------------------------------------------------
# Speed and memory


def quantization(setup):
    yield "The goal is half of the bandwidth of a copy.\n"
    yield from bench.quantization(setup.config.device)


def make_network(model, backend, min_dim):
    """A copy of the model's transformer that draws by one of BACKENDS."""
    precision, kind = BACKENDS[backend]
    reason = "" if kind == "te" else "to be simulated"
    # The section of tests compares Transformer Engine with the simulation.
    with mock.patch.multiple(te, unusable=lambda *_: reason, self_check=lambda *_: None):
        return rollout.make_copy(model, precision, model.keep_bf16, min_dim)[0]


class Workload:
    """SANA with random weights as a run has it, and the work of its stages in micro-batches."""

    def __init__(self, setup, *backends):
        c = self.config = setup.config
        size = c.resolution, c.device, torch.bfloat16, setup.reduced
        self.model, self.text = random_model("sana", *size)
        if c.gradient_checkpointing:
            self.model.transformer.enable_gradient_checkpointing()
        self.networks = {
            backend: make_network(self.model, backend, c.min_dim) for backend in backends
        }
        models.add_lora(self.model, c.lora_rank, alpha=2 * c.lora_rank)
        self.policy = models.lora_parameters(self.model.transformer, "default")
        self.optimizer = torch.optim.AdamW(self.policy, lr=c.learning_rate)
        for network in self.networks.values():
            rollout.sync(network, self.model.transformer, "old")
        noise = rollout.initial_noise(range(c.micro_batch), self.model.latent_shape)
        self.noise = noise.to(c.device)

    def step(self, network):
        """One sampling step of a micro-batch."""
        text = self.text.take([0] * len(self.noise))
        return rollout.sample(self.model, network, text, self.noise, 1)

    def decode(self):
        return self.model.decode(self.noise)

    def update(self):
        """The gradient of a micro-batch of (sample, time) pairs, summed in float64 as in train.py,
        and the optimizer's step."""
        size = sum(p.numel() for p in self.policy)
        summed = torch.zeros(size, dtype=torch.float64, device=self.config.device)
        update_loss(self.config, self.model, self.text, self.config.train_micro_batch).backward()
        summed += torch.cat([p.grad.flatten() for p in self.policy])
        self.optimizer.step()
        self.optimizer.zero_grad()


STEP_COLUMNS = ("s", "ratio to BF16", "first call s")  # the first call compiles


def speed(setup):
    c, seconds, failed = setup.config, {}, []

    def measure(name, function):
        seconds[name] = bench.medians({name: function}, setup.repeats)[name] / 1e3
        return f"{seconds[name]:.4f}"

    def measure_step(backend, mode):
        """A row's cells: seconds of a sampling step, their ratio to BF16, seconds of the first."""
        precision, kind = BACKENDS[backend]
        reason = te.unusable(quant.PRECISIONS[precision], c.device) if kind == "te" else ""
        if mode == "compiled" and time.perf_counter() > setup.deadline:
            reason = "its compilation might not end within 25 minutes"
        if reason:
            return f"not run: {reason} | |"
        torch._dynamo.reset()
        gc.collect()  # the workload before this one
        work = Workload(setup, backend)
        network, start = bench.MODES[mode](work.networks[backend]), time.perf_counter()
        work.step(network).cpu()  # which waits for the GPU
        first = time.perf_counter() - start
        cell = measure((backend, mode), lambda: work.step(network))
        ratio = seconds[backend, mode] / seconds.get(("BF16", mode), math.nan)
        return f"{cell} | {ratio:.2f} | {first:.1f}"

    work = Workload(setup)
    yield from header("a micro-batch", "s")
    update = f"update, {c.train_micro_batch} (sample, time) pairs"
    decode = f"decoding, {c.micro_batch} images of {c.resolution} px"
    functions = {decode: work.decode, update: work.update}
    yield from rows({n: lambda n=n, f=f: measure(n, f) for n, f in functions.items()}, failed)
    del work, functions  # each step below has a workload of its own
    for mode in bench.MODES:
        yield ""
        yield from header(f"a sampling step, {c.micro_batch} images, {mode}", *STEP_COLUMNS)
        steps = {
            backend: lambda backend=backend, mode=mode: measure_step(backend, mode)
            for backend in BACKENDS
        }
        yield from rows(steps, failed)
        of_step = {
            backend: seconds[backend, mode] for backend in BACKENDS if (backend, mode) in seconds
        }
        if {decode, update} <= seconds.keys() and "BF16" in of_step:
            yield ""
            yield from iteration_table(c, of_step, seconds[decode], seconds[update])
    assert not failed, f"{len(failed)} measurements"


def iteration_table(c, of_step, decode, update):
    """Whole iterations of naive_scaling and of sol_rl, predicted. of_step: {backend: seconds of a
    sampling step}; decode, update: seconds; all of a micro-batch."""
    stages = ("explore", "regenerate", "update")
    title = f"an iteration, {c.prompts_per_step} prompts on {GPUS} GPUs, predicted without rewards"
    yield from header(title, *(f"{stage} s" for stage in stages), "sum s", "speed-up")
    seconds = {"bf16": of_step["BF16"], "decode": decode, "update": update}
    runs = {"naive_scaling, BF16": iteration_seconds(c, "naive_scaling", seconds)}
    for backend in of_step:
        if backend != "BF16":
            seconds[c.precision] = of_step[backend]
            runs[f"sol_rl, {backend}"] = iteration_seconds(c, "sol_rl", seconds)
    naive, *_ = [sum(run.values()) for run in runs.values()]
    for name, run in runs.items():
        cells = " | ".join(f"{run.get(stage, 0):.2f}" for stage in stages)
        total = sum(run.values())
        yield f"| {name} | {cells} | {total:.2f} | {naive / total:.2f}x |"


def iteration_seconds(c, algorithm, seconds):
    """{stage: predicted seconds of an iteration on GPUS GPUs}, with decoding and without rewards.

    c: options; seconds: {"bf16" and c.precision: of a sampling step; "decode"; "update"}, each of a
    micro-batch."""
    prompts, result = c.prompts_per_step / GPUS, {}
    images, stages = train.ALGORITHMS[algorithm](c)
    for stage in stages:
        of_micro_batch = stage.steps * seconds[stage.precision] + seconds["decode"]
        result[stage.name] = prompts * math.ceil(images / c.micro_batch) * of_micro_batch
        images = stage.num_kept or images
    micro_batches = math.ceil(images * train.num_timesteps(c) / c.train_micro_batch)
    return result | {"update": prompts * micro_batches * seconds["update"]}


def memory(setup):
    c = setup.config
    simulated = te.unusable(quant.PRECISIONS["nvfp4"], c.device)
    backend = "NVFP4, simulated" if simulated else "NVFP4, Transformer Engine"
    explore = backend.replace("NVFP4", "explore")
    work = Workload(setup, "BF16", backend)
    functions = {
        "update": work.update,  # the first, because it makes AdamW's moments
        explore: lambda: work.step(work.networks[backend]),
        "regenerate": lambda: work.step(work.networks["BF16"]),
        "decode": work.decode,
    }
    peaks = {}
    if c.device == "cpu":
        yield "No CUDA: PyTorch does not count the memory of a CPU.\n"
    yield from header("measured", "peak GB")
    for stage, function in functions.items():
        function()  # the first call allocates what later calls use again
        peaks[stage] = peak_bytes(function, c.device)
        yield f"| {stage} | {peaks[stage] / 1e9:.3f} |"

    # In a process of its own, which ends, because PyTorch does not forget the fake GPU.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        predicted = process.submit(predicted_peaks, setup, explore).result()
    yield "\nThe goal is a difference of at most 10% from what the dry run predicts.\n"
    yield from header("predicted", "peak GB", "measured / predicted")
    for stage, peak in peaks.items():
        yield f"| {stage} | {predicted[stage] / 1e9:.3f} | {peak / predicted[stage]:.3f} |"


def peak_bytes(function, device):
    """The largest memory of PyTorch's tensors during a call; NaN on a CPU."""
    if device == "cpu":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()


def predicted_peaks(setup, explore):
    """{stage: bytes} that the dry run predicts for a Workload. explore: name of the stage."""
    parts = configurations("sana", setup.reduced)
    resident, stages = dry_run.run_stages(setup.config, rollout, train.pairs_loss, parts)
    held = ["transformer", "VAE", dry_run.MERGED, "three LoRA adapters", "AdamW's moments"]
    held = sum(resident[name] for name in [*held, dry_run.DRAWS[explore]])
    return {name: held + stage.transient(stage.micro_batch) for name, stage in stages.items()}


# ---------------------------------------------------------------------------------------------
# Several processes


def processes(setup):
    n = torch.cuda.device_count() or 2
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={n}", __file__, "--process", str(setup.lora_numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    sys.stderr.write(done.stderr)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert done.returncode == 0, errors[0] if errors else f"exit code {done.returncode}"
    yield from done.stdout.splitlines()


def exchange(numbers):
    """What each process of `processes` runs: the exchanges of train.py, over NCCL on GPUs."""
    device, rank, world = "cpu", distributed.RANK, distributed.WORLD
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.set_device(distributed.LOCAL_RANK)
    with distributed.group():
        if world == 1:  # a run of one process exchanges nothing; NCCL is tried all the same
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        items = list(range(2 * world + 1))
        gathered = distributed.gather([item**2 for item in distributed.mine(items)])
        assert gathered == [item**2 for item in items], f"gathered {gathered}"
        # 2^-40 is lost where the sum is not in float64.
        tensor = torch.full((numbers,), rank + 1 + 2**-40, dtype=torch.float64, device=device)
        distributed.total(tensor)
        expected = world * (world + 1) // 2 + world * 2**-40
        assert (tensor == expected).all(), f"total {tensor[0]}, expected {expected}"
        dist.all_reduce(tensor)  # `total` leaves it out where there is one process
        assert (tensor == world * expected).all(), f"sum {tensor[0]}, expected {world * expected}"
        tensor.zero_()
        ms = bench.medians({"all-reduce": lambda: dist.all_reduce(tensor)})["all-reduce"]
        library = "NCCL {}.{}.{}".format(*torch.cuda.nccl.version()) if device == "cuda" else "gloo"
    distributed.say(f"- {world} processes over {library}: gathered and summed as expected")
    distributed.say(f"- all-reduce of {numbers:,} numbers in float64: {ms / 1e3:.4f} s")


# ---------------------------------------------------------------------------------------------
# The report


TITLE = "# What a GPU shows"
SECTIONS = {
    "tests": ("The GPU against the CPU", tests),
    "quantization": ("Bandwidth of fake_quantize_nvfp4", quantization),
    "memory": ("Peak memory of SANA 1.6B", memory),
    "processes": ("Processes, one on each GPU", processes),
    "speed": ("Speed of SANA 1.6B", speed),  # the last, because compilation takes longest
}


def first_line(*command):
    """What a program prints; "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def machine(setup, argv):
    """Table rows: what was measured, where and with what."""
    gpu = "none: every size is small, and no figure below means anything"
    if setup.config.device != "cpu":
        p = torch.cuda.get_device_properties(0)
        gpu = f"{torch.cuda.device_count()} x {p.name}, sm{p.major}{p.minor}, "
        gpu += f"{p.total_memory / 1e9:.1f} GB"
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield from header("what", "")
    yield f"| GPU | {gpu} |"
    yield f"| driver; CUDA of PyTorch | {driver}; {torch.version.cuda} |"
    engine = te.version() if te.transformer_engine else f"none ({te.IMPORT_ERROR})"
    yield f"| Transformer Engine | {engine} |"
    versions = f"{torch.__version__}, {diffusers.__version__}, {platform.python_version()}"
    yield f"| PyTorch, diffusers, Python | {versions} |"
    yield f"| commit | {first_line('git', 'describe', '--always', '--dirty')} |"
    yield f"| command | `{' '.join(['python experiments/gpu_check.py', *argv])}` |"
    yield f"| date | {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC |"


def run_section(name, setup, failed):
    """The lines of a section. An error ends it with a line of its own, after the lines that it had
    before, and adds its name to the list `failed`."""
    title, function = SECTIONS[name]
    lines = []

    def add(line):
        print(line, flush=True)
        lines.append(line)

    add(f"\n## {title}\n")
    try:
        for line in function(setup):
            add(line)
    except Exception as error:
        traceback.print_exc()
        failed.append(name)
        add(f"\n**Failed**: {describe(error)}")
    gc.collect()  # the next section needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return lines


def main(argv=None):
    """Run the chosen sections and write the report after each; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "gpu.md")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # one of `processes`
    options = parser.parse_args(argv)
    if options.process:
        exchange(options.process)
        return 0
    unknown = set(options.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}")
    setup = setup_for("cuda" if torch.cuda.is_available() else "cpu")
    head, report, seconds, failed = [TITLE, "", *machine(setup, argv)], [], {}, []
    print("\n".join(head), flush=True)
    for name in options.sections or SECTIONS:
        start = time.perf_counter()
        report += run_section(name, setup, failed)
        seconds[name] = f"{name} {time.perf_counter() - start:.0f}"
        lines = [*head, f"| seconds of each section | {', '.join(seconds.values())} |", *report]
        with written_whole(options.output) as path:
            path.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
