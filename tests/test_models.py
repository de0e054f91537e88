"""The models: the same numbers as diffusers' own pipelines; loading, LoRA and policies."""

import copy
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL_NAMES, PROJECT, load, with_policies
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import LoraConfig

import quant
from experiments.pretrain_world import latents_of
from rollout import initial_noise, sample, sampling_times
from support import dry_run, models
from support.errors import InputError
from support.world import TINY, TRAIN_PROMPTS, draw

TOKENS = 10  # of a prompt, which the tokenizers of the tiny FLUX.1 and SD3.5 keep


@pytest.mark.parametrize("solver", models.SOLVERS)
def test_sample_gives_what_the_pipeline_gives(model, solver, monkeypatch):
    """Bit for bit in float32, from the same prompt, noise and scheduler, the pipeline told what
    the model card says: size, steps, no guidance and, for SANA's Euler solver, the times."""
    monkeypatch.setattr(model, "solver", solver)
    prompt, pipe = "a large plain red circle in the middle", model.pipe
    noise = initial_noise([1, 2], model.latent_shape)
    got = sample(model, model.transformer, model.encode([prompt]).take([0, 0]), noise, 10)

    monkeypatch.setattr(pipe, "scheduler", stock_scheduler(pipe, solver))
    pipe.set_progress_bar_config(disable=True)
    options = dict(height=32, width=32, guidance_scale=1.0, num_inference_steps=10)
    if isinstance(model, models.Sana):
        options |= dict(use_resolution_binning=False)
        if solver == "euler":
            options |= dict(sigmas=np.linspace(1, 0.1, 10))
        # The model pads to its longest prompt; the pipeline pads to 300 and masks it.
        embeds, mask, _ = model.encode([prompt])
        options |= dict(prompt_embeds=embeds, prompt_attention_mask=mask)
    else:
        options |= dict(prompt=prompt, max_sequence_length=TOKENS)
    if isinstance(model, models.Flux):
        noise = pipe._pack_latents(noise, 2, *model.latent_shape)
    expected = pipe(latents=noise, num_images_per_prompt=2, output_type="latent", **options).images
    if isinstance(model, models.Flux):
        expected = pipe._unpack_latents(expected, 32, 32, pipe.vae_scale_factor)
    assert torch.equal(got, expected)


def stock_scheduler(pipe, solver):
    """What the documentation of diffusers says to write to change a pipeline's scheduler. SANA's
    Euler solver has no shift, as in the authors' code."""
    if solver == "euler":
        shift = pipe.scheduler.config.get("shift", 1.0)
        return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=shift)
    shift = pipe.scheduler.config.get("flow_shift", pipe.scheduler.config.get("shift"))
    return DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=shift,
    )


def test_sana_is_sampled_at_times_without_a_shift(sana, monkeypatch):
    """The authors' linspace(1, 0, n + 1) without its last, whatever shift is published."""
    monkeypatch.setattr(sana.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert sampling_times(sana, 10).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("as_the_pipeline", [False, True])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(model, as_the_pipeline, monkeypatch):
    """For SANA without the instruction that its pipeline adds, unless --pipeline_text is given."""
    monkeypatch.setattr(model, "pipeline_text", as_the_pipeline)
    prompts = ["a large plain red circle in the middle", "a small plain red ring"]
    ours, pipe = model.encode(prompts), model.pipe
    if isinstance(model, models.Sana):  # which pads to its longest prompt, the pipeline to 300
        instruction = model.instruction if as_the_pipeline else None
        how = dict(complex_human_instruction=instruction, max_sequence_length=300)
        embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **how)
        assert mask.sum(dim=1).tolist() == ours.mask.sum(dim=1).tolist()
        for i in range(2):
            # Padded otherwise, float32 sums may have another order, which is 1e-6 of numbers up to
            # 3; two prompts are 2.5 apart.
            theirs, found = embeds[i][mask[i] == 1], ours.embeds[i][ours.mask[i] == 1]
            torch.testing.assert_close(found, theirs, rtol=0, atol=3e-5)
        return
    if isinstance(model, models.Flux):
        embeds, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None, max_sequence_length=TOKENS)
    else:
        more = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=TOKENS, **more)
    assert torch.equal(embeds, ours.embeds) and torch.equal(pooled, ours.pooled)


@pytest.mark.parametrize(
    "name, last_tokenizer, tokens, pipelines_tokens",
    [
        ("sana", "tokenizer", 300, 300),
        ("flux", "tokenizer_2", 128, 512),
        ("sd3", "tokenizer_3", 128, 256),
    ],
)
def test_prompts_have_as_many_tokens_as_the_authors_or_the_pipelines(
    name, last_tokenizer, tokens, pipelines_tokens, monkeypatch
):
    """Told to the pipeline's encode_prompt, and by the model card to its user."""
    model = load(name)
    monkeypatch.setattr(getattr(model.pipe, last_tokenizer), "model_max_length", 10_000)
    call = inspect.signature(model.pipeline.__call__).parameters
    assert call["max_sequence_length"].default == pipelines_tokens
    for pipeline_text, expected in ((False, tokens), (True, pipelines_tokens)):
        monkeypatch.setattr(model, "pipeline_text", pipeline_text)
        assert model.token_limit(last_tokenizer) == expected
        if name == "sana":
            said = model.call(10).get("complex_human_instruction", "the pipeline's own")
            assert said == ("the pipeline's own" if pipeline_text else None)
        else:
            assert model.call(10)["max_sequence_length"] == expected
            assert model.encode(["a red ring"]).embeds.shape[1] in (expected, expected + TOKENS)


def test_with_low_memory_text_encoders_are_on_the_device_only_while_they_encode(sana, monkeypatch):
    """The device is played by "meta" in what is recorded: where the encoder is sent, and when."""
    sent, encode_batch = [], sana.encode_batch
    monkeypatch.setattr(sana.pipe.text_encoder, "to", lambda device: sent.append(str(device)))
    monkeypatch.setattr(
        sana, "encode_batch", lambda *of: [sent.append("encodes"), encode_batch(*of)][1]
    )
    sana.encode(["a red ring"])
    assert sent == ["cpu", "encodes"]  # the transformer's device, where it stays
    monkeypatch.setattr(sana, "low_memory", True)
    sana.encode(["a red ring"])
    assert sent[2:] == ["cpu", "encodes", "cpu"]


@pytest.mark.parametrize("at_once", [1, 3 * 32 * 32])
def test_images_are_the_pipelines_whatever_is_decoded_at_once(model, at_once, monkeypatch):
    """From noise to pixels, by the pipeline's own decoding."""
    monkeypatch.setattr(models, "DECODED_PIXELS", at_once)
    noise, text = initial_noise([3, 4, 5, 6], model.latent_shape), model.encode(["a red ring"])
    x_0 = sample(model, model.transformer, text.take([0] * 4), noise, 2)
    how = dict(height=32, width=32, guidance_scale=1.0, num_inference_steps=2, output_type="pt")
    if isinstance(model, models.Sana):
        how |= dict(use_resolution_binning=False, sigmas=[1.0, 0.5], complex_human_instruction=None)
    else:
        how |= dict(max_sequence_length=TOKENS)
    if isinstance(model, models.Flux):
        noise = model.pipe._pack_latents(noise, 4, *model.latent_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.pipe, "scheduler", stock_scheduler(model.pipe, model.solver))
        expected = model.pipe("a red ring", latents=noise, num_images_per_prompt=4, **how).images
    # SANA's padding differs, and with it the last bits.
    assert torch.allclose(model.decode(x_0), expected, atol=1e-4)


def test_flux_schnell_has_no_shift_that_depends_on_the_size(tmp_path):
    shutil.copytree(TINY / "flux", tmp_path / "flux")
    path = tmp_path / "flux" / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift": 1.0}
    path.write_text(json.dumps(settings))
    for solver, last in (("euler", 0.1), ("dpm", 0.1)):
        model = models.load("flux", tmp_path / "flux", 32, solver)
        assert sampling_times(model, 10)[-1] == pytest.approx(last, abs=2e-3), solver


def test_a_copy_whose_text_encoder_is_a_variant_only_loads_like_the_published_one(tmp_path):
    shutil.copytree(TINY / "sana", tmp_path / "sana")
    encoder = tmp_path / "sana" / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.bf16.safetensors")
    prompts = ["a large plain red circle in the middle"]
    texts = [models.load("sana", f, 32).encode(prompts) for f in (TINY / "sana", tmp_path / "sana")]
    assert torch.equal(texts[0].embeds, texts[1].embeds)


@pytest.mark.parametrize(
    "name, billions, quantized, adapted",
    [("sana", 1.6, 40, 160), ("flux", 11.9, 495, 190), ("sd3", 8.1, 76, 303)],
)
def test_at_published_size_the_papers_layers_are_quantized_and_adapted(
    name, billions, quantized, adapted
):
    """SANA: the two 1x1 convolutions of 20 feed-forwards. FLUX.1: 14 layers of 19 double blocks, 6
    of 38 single ones, the last. SD3.5: the two of 38 feed-forwards. (Meta: shapes, no numbers.)"""
    with torch.device("meta"):
        transformer = dry_run.build(dry_run.published_configs()[name]["transformer"])
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(
        billions, abs=0.1
    )
    model_class = models.MODELS[name]
    rows = quant.quantize_linears(
        copy.deepcopy(transformer), "nvfp4", model_class.keep_bf16, model_class.paper["min_dim"]
    )
    assert [outcome for *_, outcome in rows].count("nvfp4") == quantized
    transformer.add_adapter(LoraConfig(r=4, target_modules=list(model_class.lora_targets)))
    assert sum("lora_A" in parameter for parameter, _ in transformer.named_parameters()) == adapted


def test_a_stock_pipeline_draws_the_prompt(sana):
    """The path a user of diffusers takes: prompt in, picture out, red where it should be."""
    sana.pipe.set_progress_bar_config(disable=True)
    images = sana.pipe(
        "a large plain red square in the middle",
        num_images_per_prompt=4,
        num_inference_steps=10,
        guidance_scale=1.0,
        height=32,
        width=32,
        use_resolution_binning=False,
        complex_human_instruction=None,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    r, g, b = np.moveaxis(images[:, 10:22, 10:22], -1, 0)
    assert (r.mean() > 0.6) and (g.mean() < 0.5) and (b.mean() < 0.5)


def test_velocity_is_noise_minus_data_at_times_from_0_to_1(model, monkeypatch):
    """The flow loss of the pretrained model is low; with a wrong sign, time or guidance it is
    not."""
    g = torch.Generator().manual_seed(1)
    prompts = [TRAIN_PROMPTS[i] for i in torch.randperm(len(TRAIN_PROMPTS), generator=g)[:128]]
    x_0 = latents_of(model, draw(prompts, g))
    text = model.encode(prompts)
    noise, t = torch.randn(x_0.shape, generator=g), torch.rand(len(x_0), generator=g)
    x_t = torch.lerp(x_0, noise, t[:, None, None, None])

    @torch.no_grad()
    def loss(time, sign=1):
        v = sign * model.velocity(model.transformer, x_t, time, text)
        return ((v - (noise - x_0)) ** 2).mean()

    right, nothing = loss(t), ((noise - x_0) ** 2).mean()
    assert right < 0.4 * nothing  # 0.19 to 0.27, a little different on each machine
    assert loss(t, sign=-1) > nothing
    for wrong in (t / 1000, t * 1000, 1 - t):
        assert loss(wrong) > 1.3 * right
    if isinstance(model, models.Flux):
        monkeypatch.setattr(model, "guidance", 3.5)
        assert loss(t) > 1.3 * right


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_policies_switch_and_switch_back(name):
    model = load(name)
    base = copy.deepcopy(model.transformer)
    transformer = with_policies(model)
    text = model.encode(["a small plain red ring at the top"])
    x, t = torch.randn(1, *model.latent_shape), torch.tensor([0.5])

    def velocity(which):
        with torch.no_grad():
            return model.velocity(which, x, t, text)

    default = velocity(transformer)
    got = {}
    for adapter in ("base", "old", "ema"):
        with models.policy(transformer, adapter):
            got[adapter] = velocity(transformer)
    assert torch.equal(velocity(transformer), default)
    assert not torch.allclose(got["old"], got["base"]) and not torch.allclose(got["old"], default)
    assert torch.allclose(got["base"], velocity(base), atol=1e-6)
    trainable = [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_lora_adapts_the_attention_layers_of_the_paper(name):
    model = load(name)
    config = model.transformer.config
    adapted = {  # q, k, v and out of each attention
        "sana": lambda: 8 * config.num_layers,
        "flux": lambda: 4 * config.num_layers + 3 * config.num_single_layers,  # which have no out
        "sd3": lambda: 8 * config.num_layers - 1,  # the last block has no out for the text
    }[name]()
    models.add_lora(model, 4, 8)
    layers = {n.split(".lora_")[0] for n, _ in model.transformer.named_parameters() if "lora_" in n}
    assert len(layers) == adapted and all("attn" in layer for layer in layers)


def test_a_lora_that_cannot_be_merged_is_refused(tmp_path):
    """DoRA scales the merged weight, which peft's get_delta_weight leaves out."""
    model = load("sana")
    dora = LoraConfig(r=4, target_modules=["to_q"], use_dora=True)
    model.transformer.add_adapter(dora, adapter_name="default")
    models.save_lora(model, "default", tmp_path)
    with pytest.raises(InputError, match=f"--lora {tmp_path}: a DoRA"):
        models.add_lora(load("sana"), 4, 8, str(tmp_path))


def test_nothing_in_a_pretrained_folder_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    def pickled(folder, victim):
        (folder / victim).unlink()
        name = victim.replace("model.safetensors", "pytorch_model.bin")
        name = name.replace("diffusion_pytorch_pytorch_model", "diffusion_pytorch_model")
        torch.save(Evil(), folder / name)

    def code(folder, part):
        (folder / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = 1\n")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {part: ["evil", "Evil"]}))

    def automatic(folder, part):
        """As transformers' Auto classes take it, where `trust_remote_code` is given."""
        code(folder, part)
        kind = "AutoModel" if "encoder" in part else "AutoTokenizer"
        index = json.loads((folder / "model_index.json").read_text())
        index |= {part: ["transformers", kind]}
        (folder / "model_index.json").write_text(json.dumps(index))
        file = folder / part / ("config.json" if "encoder" in part else "tokenizer_config.json")
        config = json.loads(file.read_text())
        config |= {"auto_map": {kind: "evil.Evil"}, "model_type": "evil"}
        file.write_text(json.dumps(config))

    weights = "diffusion_pytorch_model.safetensors"
    for number, (how, what) in enumerate(
        [
            (pickled, f"vae/{weights}"),
            (pickled, f"transformer/{weights}"),
            (pickled, "text_encoder/model.safetensors"),
            (code, "transformer"),
            (code, "text_encoder"),
            (code, "tokenizer"),
            (automatic, "text_encoder"),
            (automatic, "tokenizer"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(TINY / "flux", folder)
        how(folder, what)
        with pytest.raises(InputError, match="cannot be loaded") as error:
            models.load("flux", folder, 32)
        assert "\n" not in str(error.value) and not (tmp_path / "ran").exists(), (how, what)


def test_another_models_folder_and_a_broken_one_are_named_in_a_line(tmp_path):
    shutil.copytree(TINY / "flux", tmp_path / "broken")
    (tmp_path / "broken" / "text_encoder_2" / "model.safetensors").write_bytes(b"x" * 99)
    for folder, says in (
        (TINY / "sana", "is a SanaPipeline, not --model flux; try --model sana"),
        (tmp_path / "broken", "cannot be loaded"),
        (tmp_path, "no readable model_index.json"),
        (tmp_path / "absent", "neither a folder nor such a model on the hub"),
    ):
        with pytest.raises(InputError, match=says) as error:
            models.load("flux", folder)
        assert str(error.value).startswith(f"--pretrained {folder}")
        assert "\n" not in str(error.value)


def test_a_text_encoder_without_some_of_its_weights_is_refused(tmp_path):
    """transformers fills in random numbers, and diffusers does not tell."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY / "flux", tmp_path / "flux")
    path = tmp_path / "flux" / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    missing = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != missing}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"text_encoder_2 lacks {missing}"):
        models.load("flux", tmp_path / "flux")


def test_a_hub_that_does_not_answer_is_given_up_after_seconds(tmp_path):
    code = (
        "import time\n"
        "from support import errors, models\n"
        "since = time.time()\n"
        "try:\n"
        "    models.check_pretrained('flux', 'a/silent')\n"
        "except errors.InputError as error:\n"
        "    print(f'{time.time() - since:.1f} {error}')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
        )
    seconds, line = done.stdout.strip().split(" ", 1)
    assert float(seconds) < 15 and "\n" not in line
    assert line.startswith("--pretrained a/silent: the hub cannot be asked")


def test_importing_the_models_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "from support import models"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
