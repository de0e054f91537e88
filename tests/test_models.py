"""The models: the same numbers as diffusers' own pipelines; loading, LoRA and policies."""

import copy
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import PROJECT, load, with_policies
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quant
from rollout import initial_noise, sample, sampling_times
from support import models
from support.errors import InputError
from support.world import TINY

PROMPT = "a large plain red circle in the middle"


@pytest.mark.parametrize("solver", models.SOLVERS)
def test_samples_and_images_are_those_of_the_pipeline(model, solver, monkeypatch):
    """Bit for bit in float32, from the same prompt, noise and scheduler, the pipeline told what
    the model card says: size, steps, no guidance and what `call` adds."""
    monkeypatch.setattr(model, "solver", solver)
    noise = initial_noise([1, 2], model.latent_shape)
    got = sample(model, model.transformer, model.encode([PROMPT]), noise, 10)

    pipe = model.pipe
    monkeypatch.setattr(pipe, "scheduler", stock_scheduler(pipe, solver))
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=32, width=32, guidance_scale=1.0, num_inference_steps=10)
    how |= {name: eval(str(value)) for name, value in model.call(10).items()}
    if isinstance(model, models.Sana):  # which pads to its longest prompt, the pipeline to 300
        embeds, mask, _ = model.encode([PROMPT])
        how |= dict(prompt_embeds=embeds, prompt_attention_mask=mask)
    else:
        how |= dict(prompt=PROMPT)
    packed = noise
    if isinstance(model, models.Flux):
        packed = pipe._pack_latents(noise, 2, *model.latent_shape)
    latents, images = (
        pipe(latents=packed, num_images_per_prompt=2, output_type=kind, **how).images
        for kind in ("latent", "pt")
    )
    if isinstance(model, models.Flux):
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    assert torch.equal(got, latents)
    for pixels in (32 * 32, 2 * 32 * 32):  # decoded at once: one image, both
        monkeypatch.setattr(models, "DECODED_PIXELS", pixels)
        assert torch.allclose(model.decode(got), images, atol=1e-5)


def stock_scheduler(pipe, solver):
    """What the documentation of diffusers says to write to change a pipeline's scheduler. SANA's
    Euler solver has no shift, as in the authors' code."""
    config = pipe.scheduler.config
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=config.get("shift", 1.0))
    shift = config.get("flow_shift", config.get("shift"))
    options = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    return DPMSolverMultistepScheduler.from_config(config, **options)


def test_sana_is_sampled_at_times_without_a_shift(sana, monkeypatch):
    """The authors' linspace(1, 0, n + 1) without its last, whatever shift is published."""
    monkeypatch.setattr(sana.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert sampling_times(sana, 10).tolist() == pytest.approx(expected)


def test_of_a_folders_scheduler_only_the_shift_reaches_the_rollout(model, monkeypatch):
    """Other settings would make the solver stochastic or change its times without a word."""
    pipe = model.pipe
    other = dict(algorithm_type="sde-dpmsolver++", stochastic_sampling=True)
    other |= dict(use_karras_sigmas=True, solver_order=3, final_sigmas_type="sigma_min")
    if not isinstance(model, models.Flux):
        other |= dict(use_dynamic_shifting=True)
    for solver in models.SOLVERS:
        monkeypatch.setattr(model, "solver", solver)
        expected, published = model.scheduler(10), pipe.scheduler
        with monkeypatch.context() as patch:
            patch.setattr(pipe, "scheduler", type(published).from_config(published.config, **other))
            assert model.scheduler(10).config == expected.config
            assert torch.equal(model.scheduler(10).sigmas, expected.sigmas)


def test_a_model_draws_by_the_papers_solver_and_shift(model, monkeypatch):
    """The last of 10 times is .1 s / (1 + .1 (s - 1)) with the shift s: 1.5 for the tiny SD3.5, 3
    for the published one; exp(.353) for FLUX.1; 1 for SANA, whose shift the authors do not use."""
    name = type(model).__name__
    solver, last = {"Sana": ("euler", 0.1), "Flux": ("dpm", 0.136), "SD3": ("dpm", 0.142)}[name]
    assert model.solver == solver and sampling_times(model, 10)[-1] == pytest.approx(last, abs=1e-3)
    if name == "SD3":
        published = FlowMatchEulerDiscreteScheduler(shift=3.0)
        monkeypatch.setattr(model.pipe, "scheduler", published)
        assert sampling_times(model, 10)[-1] == pytest.approx(0.25, abs=2e-3)


def test_flux_schnell_has_no_shift_that_depends_on_the_size():
    for solver in models.SOLVERS:
        pipe = (model := load("flux", solver)).pipe
        settings = dict(use_dynamic_shifting=False, shift=1.0)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
        assert sampling_times(model, 10)[-1] == pytest.approx(0.1, abs=2e-3), solver


def test_sanas_prompts_are_encoded_without_the_instruction_that_its_pipeline_adds(sana):
    prompts = [PROMPT, "a small plain red ring"]
    ours = sana.encode(prompts)
    how = dict(do_classifier_free_guidance=False, complex_human_instruction=None)
    embeds, mask, *_ = sana.pipe.encode_prompt(prompts, **how)
    assert mask.sum(dim=1).tolist() == ours.mask.sum(dim=1).tolist()
    # Padded to 300 tokens, float32 sums may have another order, which is 1e-6 of numbers up to 3;
    # two prompts are 2.5 apart.
    theirs, found = embeds[mask == 1], ours.embeds[ours.mask == 1]
    torch.testing.assert_close(found, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "name, tokenizer, tokens",
    [("sana", "tokenizer", 300), ("flux", "tokenizer_2", 128), ("sd3", "tokenizer_3", 128)],
)
def test_prompts_have_as_many_tokens_as_in_the_authors_code(name, tokenizer, tokens, monkeypatch):
    """And the model card tells the pipeline so, which else reads 300, 512 and 256."""
    model, prompts = load(name), ["a red ring", "red " * 400]
    monkeypatch.setattr(getattr(model.pipe, tokenizer), "model_max_length", 10_000)
    default = inspect.signature(model.pipeline.__call__).parameters["max_sequence_length"].default
    assert model.call(10).get("max_sequence_length", default) == tokens
    of_clip = 10 if name == "sd3" else 0
    assert model.encode(prompts).embeds.shape[1] == tokens + of_clip
    line = f"1 prompts lose what comes after {tokens} tokens ({tokenizer})"
    assert line in model.cut_off(prompts)


def test_a_string_is_no_list_of_prompts(model):
    with pytest.raises(TypeError, match="list of prompts"):
        model.encode(PROMPT)


def test_text_encoders_are_on_the_device_only_while_they_encode(monkeypatch):
    model, sent = load("sd3"), []
    encode, encoders = model.encode_batch, ("text_encoder", "text_encoder_2", "text_encoder_3")
    for encoder in encoders:
        to = lambda device, encoder=encoder: sent.append((encoder, str(device)))  # noqa: E731
        monkeypatch.setattr(getattr(model.pipe, encoder), "to", to)
    monkeypatch.setattr(model, "encode_batch", lambda *of: [sent.append("encodes"), encode(*of)][1])
    assert model.encode(["a red ring"]).embeds.device.type == "cpu"
    there_and_back = [(encoder, "cpu") for encoder in encoders]
    assert sent == [*there_and_back, "encodes", *there_and_back]


def test_a_copy_whose_text_encoder_is_a_variant_only_loads_like_the_published_one(tmp_path):
    shutil.copytree(TINY / "sana", tmp_path / "sana")
    encoder = tmp_path / "sana" / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.bf16.safetensors")
    ours, copied = (models.load("sana", f, 32).encode([PROMPT]) for f in (None, tmp_path / "sana"))
    assert torch.equal(ours.embeds, copied.embeds)


SD35 = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")


@pytest.mark.parametrize(
    "name, kind, config, billions, quantized, adapted",
    [
        ("sana", diffusers.SanaTransformer2DModel, {}, 1.6, 40, 160),
        ("flux", diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, 11.9, 495, 190),
        ("sd3", diffusers.SD3Transformer2DModel, SD35, 8.1, 76, 303),
    ],
)
def test_at_published_size_the_papers_layers_are_quantized_and_adapted(
    name, kind, config, billions, quantized, adapted
):
    """SANA: the two 1x1 convolutions of 20 feed-forwards. FLUX.1: 14 layers of 19 double blocks, 6
    of 38 single ones, the last. SD3.5: the two of 38 feed-forwards. (Meta: shapes, no numbers;
    where a size is not named, diffusers' default is that of the published model.)"""
    with torch.device("meta"):
        transformer = kind(**config)
    parameters = sum(p.numel() for p in transformer.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.1)
    model_class, explorer = models.MODELS[name], copy.deepcopy(transformer)
    settings = model_class.keep_bf16, model_class.paper["min_dim"]
    rows = quant.quantize_linears(explorer, "nvfp4", *settings)
    assert [outcome for *_, outcome in rows].count("nvfp4") == quantized
    transformer.add_adapter(LoraConfig(r=4, target_modules=list(model_class.lora_targets)))
    layers = [n for n, _ in transformer.named_parameters() if "lora_A" in n]
    assert len(layers) == adapted and all("attn" in layer for layer in layers)


LAYER = "transformer_blocks.0.attn1.to_q"  # of the tiny SANA


def lora_file(folder, changes=None, metadata=None, prefix="transformer"):
    """Save a LoRA of LAYER whose lora_A and lora_B are random. Returns lora_B lora_A."""
    A, B = torch.randn(4, 128), torch.randn(128, 4)
    state = {f"{prefix}.{LAYER}.lora_A.weight": A, f"{prefix}.{LAYER}.lora_B.weight": B}
    state = {name: value for name, value in (state | (changes or {})).items() if value is not None}
    if metadata:
        metadata = {f"transformer.{name}": value for name, value in metadata.items()}
        metadata = {"lora_adapter_metadata": json.dumps(metadata)}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "pytorch_lora_weights.safetensors", metadata)
    return B @ A


@pytest.mark.parametrize("scale", ["none", "key", "metadata", "root", "peft"])
def test_a_run_starts_from_the_change_of_weights_that_a_lora_with_its_own_alpha_makes(
    scale, tmp_path
):
    """Its layers get adapters with the method's alpha and without the dropout of the file."""
    settings = dict(r=4, lora_alpha=12, lora_dropout=0.5, target_modules=["to_q"])
    if scale == "key":
        change = lora_file(tmp_path, {f"transformer.{LAYER}.alpha": torch.tensor(12.0)})
    elif scale == "peft":  # as by get_peft_model(transformer, ...).save_pretrained(folder)
        change = lora_file(tmp_path, prefix="base_model.model")
        LoraConfig(**settings).save_pretrained(tmp_path)
    else:
        settings |= dict(use_rslora=scale == "root")
        change = lora_file(tmp_path, metadata=settings if scale != "none" else None)
    models.add_lora(model := load("sana"), 4, 8, str(tmp_path))
    ((name, layer),) = models.lora_layers(model.transformer)
    expected = {"none": 1.0, "root": 12 / 4**0.5}.get(scale, 12 / 4) * change
    for adapter in models.ADAPTERS:
        torch.testing.assert_close(layer.get_delta_weight(adapter), expected)
        assert isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
        assert layer.scaling[adapter] == 2 and name == LAYER


def test_a_saved_lora_holds_the_change_itself_so_that_no_reader_needs_an_alpha(tmp_path):
    model = load("sana")
    with_policies(model)
    models.save_lora(model, "default", tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["transformer.lora_alpha"] == metadata["transformer.r"] == 4
        for name, layer in models.lora_layers(model.transformer):
            A, B = (file.get_tensor(f"transformer.{name}.lora_{part}.weight") for part in "AB")
            assert torch.equal(B @ A, layer.get_delta_weight("default"))
    models.add_lora(again := load("sana"), 4, 8, str(tmp_path))
    first, second = (models.lora_parameters(m.transformer, "default") for m in (model, again))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_lora_of_which_any_tensor_has_no_place_is_refused_and_the_first_one_named(tmp_path):
    A, B = f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"
    tensor = torch.ones(4, 128)
    for i, (changes, says) in enumerate(
        [
            ({A.replace("blocks.0", "blocks.9"): tensor}, "1 .*blocks.9"),
            ({f"text_encoder.{LAYER}.lora_A.weight": tensor}, "text_encoder"),
            ({f"transformer.{LAYER}.lora_magnitude_vector": tensor}, "magnitude"),  # a DoRA
            ({B: None}, "lora_A"),
            ({A: None, B: None}, "0 tensors"),
            ({A: torch.full((4, 128), torch.nan)}, "NaN"),
            ({f"transformer.{LAYER}.alpha": torch.tensor(torch.nan)}, "NaN"),
            ({A: torch.ones(4, 9)}, "shape"),
            ({B: torch.ones(128, 3)}, "cannot be loaded"),
            ({A: torch.ones(2, 128), B: torch.ones(128, 2)}, "give --lora_rank 2"),
        ]
    ):
        path = tmp_path / str(i)
        lora_file(path, changes)
        with pytest.raises(InputError, match=f"^--lora {path}: .*{says}"):
            models.add_lora(model := load("sana"), 4, 8, str(path))
        assert not models.lora_layers(model.transformer)
    shutil.copy(path / "pytorch_lora_weights.safetensors", path / "other.safetensors")
    with pytest.raises(InputError, match="other.safetensors.*pytorch_lora_weights.safetensors"):
        models.add_lora(model, 4, 8, str(path))


def test_nothing_in_a_pretrained_folder_is_executed(tmp_path):
    """Neither pickled weights nor code that model_index.json names."""
    ran = tmp_path / "ran"
    pickled = type("Evil", (), {"__reduce__": lambda self: (open, (str(ran), "w"))})()
    for part in ("transformer", "text_encoder"):
        (weights,) = (TINY / "flux" / part).glob("*.safetensors")
        stem = "pytorch_model" if part == "text_encoder" else weights.stem
        for way in ("pickle", "module"):
            folder = shutil.copytree(TINY / "flux", tmp_path / f"{way}_{part}")
            (folder / part / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nEvil = 1\n")
            index = json.loads((folder / "model_index.json").read_text())
            if way == "pickle":
                (folder / part / weights.name).unlink()
                torch.save(pickled, folder / part / f"{stem}.bin")
            else:
                index[part] = ["evil", "Evil"]
            (folder / "model_index.json").write_text(json.dumps(index))
            with pytest.raises(InputError, match="cannot be loaded"):
                models.load("flux", folder, 32)
            assert not ran.exists(), (way, part)


def test_a_folder_that_cannot_be_loaded_is_named_in_a_line(tmp_path):
    """transformers fills missing weights with random numbers, and diffusers does not tell."""
    encoder = "text_encoder_2/model.safetensors"
    broken, incomplete = (shutil.copytree(TINY / "flux", tmp_path / str(i)) for i in range(2))
    (broken / encoder).write_bytes(b"x" * 99)
    weights = load_file(incomplete / encoder)
    missing, _ = weights.popitem()
    save_file(weights, incomplete / encoder, {"format": "pt"})
    for folder, says in (
        (TINY / "sana", "SanaPipeline"),
        (broken, "cannot be loaded"),
        (incomplete, f"text_encoder_2 lacks .*{missing}"),
        (tmp_path, "model_index.json"),
        (tmp_path / "absent", "neither a folder nor such a model on the hub"),
    ):
        with pytest.raises(InputError, match=f"^--pretrained {folder}: .*{says}"):
            models.load("flux", folder)


def test_a_hub_that_does_not_answer_is_given_up_after_seconds(tmp_path):
    code = "from support import models\nmodels.load('flux', 'a/silent')"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
        done = python(code, env=os.environ | settings, timeout=60)  # most of it for imports
    assert "InputError: --pretrained a/silent: " in done.stderr and "timed out" in done.stderr


def test_a_cpu_computes_in_float32_and_a_gpu_in_bf16():
    assert models.load("sana").transformer.dtype == models.compute_dtype("cpu") == torch.float32
    assert models.compute_dtype("cuda:0") == torch.bfloat16


def test_importing_train_prints_nothing_and_leaves_the_figures_of_a_notebook_alone():
    code = "import matplotlib\nmatplotlib.use('svg')\nimport train\nprint(matplotlib.get_backend())"
    done = python(code)
    assert (done.stdout, done.stderr) == ("svg\n", "")


def python(code, **settings):
    """The finished process in which Python ran the code."""
    settings |= dict(cwd=PROJECT, capture_output=True, text=True)
    return subprocess.run([sys.executable, "-c", code], **settings)
