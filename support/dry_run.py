"""A dry run: the training's own code on a GPU that does not exist.

    python train.py --model flux --pretrained --dry_run    # options as for the training itself

It prints how much memory and how many floating-point operations (FLOPs) an iteration needs, before
a GPU is rented. It also fails where the training would fail on a tensor of a wrong device, shape or
dtype. It needs no GPU, no weights and no download.

How it works. PyTorch's FakeTensorMode runs each operation on shapes, dtypes and devices alone, so a
tensor of 50 GB takes no memory and a matmul takes no time. The models are built from their
published configurations (published.json). The sampler, the explorer, the loss, the backward pass
and AdamW's step are the real functions. `Meter` sees each operation, adds up the bytes of all
tensors that are alive, and counts the FLOPs.

What is put in the place of the real thing
 1. Prompts, latents and advantages are made up, because they are values and here are only shapes.
 2. Attention calls the two kernels that PyTorch chooses on an NVIDIA GPU. On an unknown device it
    would write out all attention weights, which takes far more memory.
 3. Transformer Engine's linear layer holds and checks what the real one does; it quantizes nothing.
 4. Each stage runs one sampling step. More steps take more FLOPs and no more memory.

docs/memory.md has the result for the published options, and what it does not cover.
"""

import contextlib
import functools
import inspect
import json
import math
import types
import warnings
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# isort: split

import diffusers
import transformers

from support import models, te
from support.distributed import say
from support.errors import require

PUBLISHED = Path(__file__).with_name("published.json")
GPU = "gpu:0"  # the GPU that does not exist; fake tensors on "cuda" cannot run a backward pass
CARDS = (24, 48, 80, 141, 192)  # memory of GPUs in GB
USABLE = 0.9  # share of a card's memory; the rest is for fragmentation and CUDA's own needs
GB = 1e9


# ---------------------------------------------------------------------------------------------
# The published models without their weights


def published_configs():
    """{model: {part of its pipeline: its configuration}}, and the configuration of CLIPScore's CLIP
    under "clipscore"."""
    return json.loads(PUBLISHED.read_text())


def small_configs():
    """{model: {part of its pipeline: its configuration}} with few and narrow layers, for tests."""
    published = published_configs()
    return {
        name: {part: config | changes.get(part, {}) for part, config in published[name].items()}
        for name, changes in published["small"].items()
    }


def build(config):
    """A module or scheduler of diffusers or transformers with random parameters, on the device and
    in the dtype that are PyTorch's defaults. config: its "_class_name" and options."""
    if hasattr(diffusers, config["_class_name"]):
        return getattr(diffusers, config["_class_name"]).from_config(config)
    module_class = getattr(transformers, config["_class_name"])
    return module_class(module_class.config_class(**config))


def published_model(name, resolution, device, dtype=torch.bfloat16, parts=None):
    """The published model `name` of models.MODELS with random weights on `device`, frozen, for
    images of `resolution` pixels. It has no tokenizers. Inside `fake_gpu` its weights are fake.

    parts: {part of the pipeline: its configuration}, such as published_configs()[name] with other
    sizes or without the text encoders; None is published_configs()[name].
    """
    model_class, parts = models.MODELS[name], dict(parts or published_configs()[name])
    with unset_fake_temporarily():  # a scheduler reads numbers from its tensors
        scheduler = build(parts.pop("scheduler"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that there never is a copy in float32
    try:
        with torch.device(device):
            modules = {part: build(config) for part, config in parts.items()}
    finally:
        torch.set_default_dtype(before)
    for module in modules.values():
        module.requires_grad_(False).eval()
        for part in module.modules():  # from_pretrained, too, converts the buffers in a file
            for key, buffer in part._buffers.items():
                in_file = buffer is not None and key not in part._non_persistent_buffers_set
                if in_file and buffer.is_floating_point():
                    part._buffers[key] = buffer.to(dtype)
    absent = dict.fromkeys(inspect.signature(model_class.pipeline).parameters)
    pipe = model_class.pipeline(**absent | modules | {"scheduler": scheduler})
    return model_class(pipe, resolution, model_class.paper["solver"])


def made_up_text(model, device):
    """One encoded prompt of the largest size (models.Text of one row) for a published model."""
    config, limits = model.transformer.config, list(model.token_limits.values())
    tokens = model.pipeline_tokens if model.pipeline_text else limits[-1]
    if isinstance(model, models.SD3):
        tokens += limits[0]  # the tokens of CLIP stand before those of T5
    channels = config.get("caption_channels") or config.joint_attention_dim
    options = dict(device=device, dtype=torch.bfloat16)
    mask = pooled = None
    if isinstance(model, models.Sana):
        mask = torch.ones(1, tokens, device=device, dtype=torch.long)
    else:
        pooled = torch.randn(1, config.pooled_projection_dim, **options)
    return models.Text(torch.randn(1, tokens, channels, **options), mask, pooled)


def module_bytes(*modules):
    """Bytes of the parameters and buffers of modules; those that are shared count once."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


# ---------------------------------------------------------------------------------------------
# The GPU that does not exist


class Meter(TorchDispatchMode):
    """Watches everything that runs inside: `live` is the bytes of all tensors that are alive on the
    fake GPU, `peak` the largest that number has been, and `flops` the floating-point operations of
    matmuls, convolutions and attention. Raises TypeError if a matmul or a convolution mixes dtypes,
    which fake tensors allow and a GPU does not."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "gpu":
                self.see(tensor.untyped_storage())
        if function._overloadpacket in flop_registry:
            count = flop_registry[function._overloadpacket]
            self.flops += count(*args, **kwargs, out_val=result)
            dtypes = {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
            # The backward pass of attention rightly takes float32 and integers too.
            if len(dtypes) > 1 and "attention" not in function.name():
                raise TypeError(f"{function.name()} of {', '.join(sorted(map(str, dtypes)))}")
        return result

    def see(self, storage):
        """Add a storage, which several tensors may share, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size).atexit = False

    def forget(self, key, size):
        self.storages.remove(key)
        self.live -= size


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """scaled_dot_product_attention as a GPU runs it in BF16. Arguments are PyTorch's. The kernels
    keep no attention weights; the second one also takes masks and any head size."""
    scale, ops = options.get("scale"), torch.ops.aten
    if attn_mask is None and query.shape[-1] <= 256:
        flash = ops._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient, keep = ops._scaled_dot_product_efficient_attention, query.requires_grad
    return efficient(query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]


def without_numbers(create):
    """torch.tensor or torch.as_tensor for the fake GPU, to which no numbers can be copied."""

    def created(*args, device=None, **options):
        device = torch.device(device or torch.get_default_device())
        with torch.device("cpu"):
            tensor = create(*args, **options)
        if device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return created


def apply_to_tensors(module, function):
    """Module._apply, which Module.to calls. PyTorch's own exchanges the contents of two fake
    tensors, which fails; here the new tensor takes the place of the old one."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(function(p), p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


@contextlib.contextmanager
def fake_gpu():
    """Inside, tensors are fake, and the device GPU exists. Gives the Meter of its memory."""
    if torch._C._get_privateuse1_backend_name() != "gpu":  # can be named once in a process
        backend = backend_registration._DummyBackendModule()
        backend.get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpointing asks for it
        backend_registration._setup_privateuseone_for_python_backend("gpu", backend)
    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            (F, "scaled_dot_product_attention", attention),
            (torch, "tensor", without_numbers(torch.tensor)),
            (torch, "as_tensor", without_numbers(torch.as_tensor)),
            # AdamW asks a tensor for the number of its step.
            (torch.Tensor, "item", lambda self: 1.0),
            (nn.Module, "_apply", apply_to_tensors),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        # In the backward pass an error in a thread of its own would end the process.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Meter())


# ---------------------------------------------------------------------------------------------
# Transformer Engine's linear layer


def nvfp4_bytes(x):
    """Codes and scales (padded to 128 rows and 4 columns) of x (m, k), as Transformer Engine stores
    them in NVFP4."""
    (m, k), options = x.shape, dict(dtype=torch.uint8)
    scales = (-(-m // 128) * 128, -(-k // 64) * 4)
    return x.new_empty(m, k // 2, **options), x.new_empty(scales, **options)


class StandInLinear(nn.Module):
    """Holds what te.Linear holds and checks what it checks (tests/fake_te.py names the sources)."""

    def __init__(self, in_features, out_features, bias, params_dtype, device):
        super().__init__()
        options = dict(dtype=params_dtype, device=device)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None

    def forward(self, x, is_first_microbatch):
        assert x.dtype == self.weight.dtype == torch.bfloat16, f"te.Linear: {x.dtype}"
        assert x.device == self.weight.device, f"te.Linear: the input is on {x.device}"
        fits = len(x) % 16 == 0 and x.shape[1] % 32 == 0 and len(self.weight) % 16 == 0
        assert fits, f"te.Linear: no multiples of 16 and 32: {x.shape} and {self.weight.shape}"
        if is_first_microbatch:
            self.quantized = nvfp4_bytes(self.weight)
        quantized_input = nvfp4_bytes(x)  # alive until the matmul is done
        y = F.linear(x, self.weight, self.bias)
        del quantized_input
        return y


@contextlib.contextmanager
def stand_in_for_te():
    """Inside, support/te.py finds a Transformer Engine whose linear layer is the stand-in."""
    autocast = lambda enabled, recipe: contextlib.nullcontext()  # noqa: E731
    pytorch = types.SimpleNamespace(Linear=StandInLinear, autocast=autocast)
    found = dict(transformer_engine=types.SimpleNamespace(pytorch=pytorch, __version__="stand-in"))
    found |= dict(unusable=lambda *_: "", capability=lambda *_: (10, 0))
    found |= dict(recipe=lambda *_: None, self_check=lambda *_: None)
    with mock.patch.multiple(te, **found):
        yield


# ---------------------------------------------------------------------------------------------
# The stages of an iteration


class Use(NamedTuple):
    """What a call used."""

    kept: int  # bytes that it leaves on the GPU
    transient: int  # bytes on top of all that is there afterwards, at the peak
    flops: int


def measure(meter, function, *args):
    """The Use of function(*args)."""
    before, flops = meter.live, meter.flops
    meter.peak = before
    function(*args)
    return Use(meter.live - before, meter.peak - meter.live, meter.flops - flops)


class Stage(NamedTuple):
    """What a stage needs on top of what is resident: fixed + n * per_item bytes for n at once."""

    micro_batch: int  # images, or (sample, time) pairs, at once
    fixed: float  # bytes
    per_item: float  # bytes per image or pair
    flops: float  # per image (in all its sampling steps) or per pair
    items: int  # images or pairs of an iteration

    def transient(self, n):
        return self.fixed + n * self.per_item


def measured_stage(meter, function, n, steps, items):
    """(The Stage that runs function(n), bytes that it leaves on the GPU). `function` runs one of
    the stage's `steps`. Memory is measured for n and n / 2, but for 8 and 4 where n is smaller,
    since the autoencoder decodes in pieces; between and beyond it is a line."""
    larger = max(n, 8)
    half = larger // 2
    kept = measure(meter, function, half).kept
    # Measured when all that it keeps is there: AdamW makes its moments after the first peak.
    first, second = measure(meter, function, half), measure(meter, function, larger)
    per_item = (second.transient - first.transient) / (larger - half)
    fixed = second.transient - larger * per_item
    return Stage(n, fixed, per_item, steps * second.flops / larger, items), kept


EXPLORERS = ("simulated", "Transformer Engine")
MERGED, ENCODERS = "old policy merged in BF16", "text encoders"
CLIP, LATENTS = "CLIPScore's CLIP in float32", "latents that are trained on"
# Stages that draw, and which of what is resident does. A run has one explorer. With --low_memory it
# has no merged copy, and the transformer regenerates.
DRAWS = {f"explore, {kind}": f"explorer, {kind}" for kind in EXPLORERS}
DRAWS |= {"regenerate": MERGED, "regenerate, LoRA not merged": "transformer"}


def run_stages(c, rollout, pairs_loss, num_timesteps, parts=None):
    """Run each stage of an iteration for the options c (a Config). Returns ({what: bytes that are
    resident}, {name: Stage}). num_timesteps: at how many times each image is trained; parts: as for
    published_model."""
    resident, stages, networks = {}, {}, {}
    with fake_gpu() as meter:
        model = published_model(c.model, c.resolution, GPU, parts=parts)
        model.pipeline_text = c.pipeline_text
        text, transformer = made_up_text(model, GPU), model.transformer
        resident["transformer"] = module_bytes(transformer)
        resident["VAE"] = module_bytes(model.vae)
        encoders = [part for name, part in model.pipe.components.items() if "text_enc" in name]
        resident[ENCODERS] = module_bytes(*encoders)

        def make(name, precision):
            networks[name], _ = rollout.make_copy(model, precision, model.keep_bf16, c.min_dim)

        resident[MERGED] = measure(meter, make, MERGED, "bf16").kept
        for kind, te_or_not in zip(EXPLORERS, (contextlib.nullcontext(), stand_in_for_te())):
            with te_or_not:
                name = f"explorer, {kind}"
                resident[name] = measure(meter, make, name, c.precision).kept
        add_lora = functools.partial(models.add_lora, model, c.lora_rank, 2 * c.lora_rank)
        resident["three LoRA adapters"] = measure(meter, add_lora).kept
        if c.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        for name, network in networks.items():
            resident[name] += measure(meter, rollout.sync, network, transformer, "old").kept

        real_scheduler = model.scheduler

        def scheduler(steps):
            with unset_fake_temporarily():  # it makes its times with numpy
                return real_scheduler(steps)

        def draw(network, n):
            no_decode = mock.patch.object(model, "decode", lambda latents: latents)
            with stand_in_for_te(), no_decode, models.policy(transformer, "old"):
                rollout.draw(model, network, text, list(range(n)), 1)

        def decode(n):
            model.decode(torch.randn(n, *model.latent_shape, device=GPU))

        def update(n):
            summed = torch.zeros(sum(p.numel() for p in policy), dtype=torch.float64, device=GPU)
            x_0, noise = torch.randn(2, n, *model.latent_shape, device=GPU)
            t, advantages = torch.rand(2, n, device=GPU)
            loss, _ = pairs_loss(c, model, text, x_0, noise, t, advantages)
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in policy])
            summed += torch.cat([p.grad.flatten() for p in policy])
            optimizer.step()
            optimizer.zero_grad()

        model.scheduler = scheduler
        explored, kept = c.prompts_per_step * c.pool, c.prompts_per_step * c.keep
        for stage, name in DRAWS.items():
            work = (c.explore_steps, explored) if "explore" in stage else (c.rollout_steps, kept)
            function = functools.partial(draw, networks.get(name, transformer))
            stages[stage], left = measured_stage(meter, function, c.micro_batch, *work)
            resident[name] += left  # Transformer Engine quantizes a weight when it is used
        stages["decode"], _ = measured_stage(meter, decode, c.micro_batch, 1, explored + kept)
        policy = models.lora_parameters(transformer, "default")
        optimizer = torch.optim.AdamW(policy, lr=c.learning_rate)
        work = 1, kept * num_timesteps
        stages["update"], left = measured_stage(meter, update, c.train_micro_batch, *work)
        resident["AdamW's moments"] = left
        resident[LATENTS] = 4 * kept * math.prod(model.latent_shape)
    with torch.device("meta"):
        clip = build(published_configs()["clipscore"])
    resident[CLIP] = 4 * sum(p.numel() for p in clip.parameters())
    return resident, stages


# ---------------------------------------------------------------------------------------------
# The report


def peaks(resident, stages, kind, low_memory, draw, train):
    """{stage: bytes on the GPU at its peak} of a run with an explorer of a kind in EXPLORERS, with
    `draw` images and `train` pairs at once."""
    absent = {f"explorer, {other}" for other in EXPLORERS if other != kind}
    absent |= {MERGED, ENCODERS} if low_memory else set()
    held = sum(size for name, size in resident.items() if name not in absent)
    regenerate = "regenerate, LoRA not merged" if low_memory else "regenerate"
    encode = {"encode prompts": held + resident[ENCODERS]} if low_memory else {}
    return encode | {
        "explore": held + stages[f"explore, {kind}"].transient(draw),
        "regenerate": held + stages[regenerate].transient(draw),
        "decode": held + stages["decode"].transient(draw),
        "update": held + stages["update"].transient(train),
    }


def largest_micro_batches(resident, stages, kind, low_memory, limit, most):
    """The largest (micro_batch, train_micro_batch) with which every stage stays below `limit`
    bytes, up to the two numbers `most`; 0 is one that does not fit at all."""

    def fits(n):
        needed = peaks(resident, stages, kind, low_memory, draw=n, train=n)
        update = needed.pop("update")
        return max(needed.values()) <= limit, update <= limit

    return [
        max((n for n in range(1, top + 1) if fits(n)[i]), default=0) for i, top in enumerate(most)
    ]


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(config, rollout, pairs_loss, num_timesteps, parts=None):
    """Print the dry run for the options `config` (a Config) in Markdown. rollout: the module;
    pairs_loss, num_timesteps: train.py's; parts: as for published_model. Raises InputError if the
    options are not those of Sol-RL with a published model."""
    c = config
    known = c.pretrained == "published" and c.algorithm == "sol_rl" and "nvfp4" in c.precision
    require(known, "--dry_run: needs --pretrained without a value, sol_rl and nvfp4")
    resident, stages = run_stages(c, rollout, pairs_loss, num_timesteps, parts)
    micro_batches = c.micro_batch, c.train_micro_batch
    simulated, engine = (
        peaks(resident, stages, kind, c.low_memory, *micro_batches) for kind in EXPLORERS
    )
    on = lambda option: "on" if option else "off"  # noqa: E731
    say(
        f"{models.MODELS[c.model].published} at {c.resolution} x {c.resolution} pixels in BF16, "
        f"LoRA of rank {c.lora_rank}, gradient checkpointing {on(c.gradient_checkpointing)}, "
        f"--low_memory {on(c.low_memory)}, prompts of the largest length. Memory is that of one "
        f"GPU that draws and trains all {c.prompts_per_step} prompts of an iteration, 1 GB is 10^9 "
        "bytes. It is measured at the micro-batch and at half of it; other micro-batches are on "
        "the straight line through the two. FLOPs are those of the whole iteration.\n"
    )
    of_stage = {"explore": stages["explore, simulated"]}
    of_stage["regenerate"] = stages["regenerate, LoRA not merged" if c.low_memory else "regenerate"]
    of_stage |= {name: stages[name] for name in ("decode", "update")}
    flops = {name: stage.flops * stage.items for name, stage in of_stage.items()}
    rows = []
    for name in simulated:
        row = [name, "", f"{simulated[name] / GB:.1f}", f"{engine[name] / GB:.1f}", "", "", ""]
        if name in of_stage:
            stage, unit = of_stage[name], "pair" if name == "update" else "image"
            row[1], row[4] = stage.micro_batch, f"{stage.per_item / GB:.3f} GB per {unit}"
            row[5] = f"{stage.flops / 1e12:.1f} per {unit}"
            row[6] = f"{flops[name] / sum(flops.values()):.0%}"
        rows.append(row)
    header = ["stage", "micro-batch", *(f"peak GB, {kind}" for kind in EXPLORERS)]
    say(table([*header, "grows by", "TFLOPs", "share of FLOPs"], rows))
    say(
        f"\nAn iteration takes {sum(flops.values()) / 1e15:.4g} PFLOPs, without those of the "
        "reward and the text encoders.\n"
    )
    sizes = [[name, f"{size / GB:.1f}"] for name, size in resident.items()]
    say(table(["on the GPU all the time", "GB"], sizes))
    say(
        "\nA run has one of the two explorers. With --low_memory there is no merged copy, and the "
        "text encoders are on the GPU only while they encode.\n"
    )
    rows = []
    for card in CARDS:
        limit = USABLE * card * GB
        for kind, needed in zip(EXPLORERS, (simulated, engine)):
            largest_stage = max(needed, key=needed.get)
            fits = needed[largest_stage] <= limit
            row = [f"{card} GB", kind, "yes" if fits else f"no: {largest_stage}"]
            for low_memory in (False, True):
                most = c.pool, c.keep * num_timesteps
                largest = largest_micro_batches(resident, stages, kind, low_memory, limit, most)
                row.append("{} and {}".format(*largest) if all(largest) else "none")
            rows.append(row)
    header = ["card", "explorer", "these options fit", "largest that fit (see below)"]
    say(table([*header, "the same with --low_memory"], rows))
    say(
        f"\n{USABLE:.0%} of a card counts; the rest is for fragmentation, CUDA's context and "
        "workspaces. The largest that fit: --micro_batch, at most the pool, and "
        "--train_micro_batch, at most the pairs of a prompt. Transformer Engine's FP4 needs a "
        "Blackwell card."
    )
