"""The update, and runs of the command line at miniature size."""

import dataclasses
import functools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import FAMILIES, MINIATURE, PROJECT, error_line, lines, load, outcome
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import config
import models
import train
from config import TINY, parse
from rollout import initial_noise, sample


def batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, v_old, v_ref, x_0, noise = (torch.randn(n, 2, 3, 3, generator=g) for _ in range(5))
    t, a = torch.rand(n, generator=g), torch.randn(n, generator=g)
    return v, v_old, v_ref, torch.lerp(x_0, noise, t[:, None, None, None]), x_0, t, a


def test_nft_loss_by_hand():
    # One sample of one element: x_t = 1, t = .5, v = 1, v_old = v_ref = 0, x_0 = 0, A = A_max.
    # r = 1; x_0_hat+ = 1 - .5 * 1 = .5, w = .5, l+ = .25 / .5 = .5; loss = 5 * .5 + kl * 1.
    one = lambda value: torch.full((1, 1, 1, 1), value)  # noqa: E731
    a = torch.tensor([5.0])
    loss, metrics = train.nft_loss(
        one(1.0), one(0.0), one(0.0), one(1.0), one(0.0), torch.tensor([0.5]), a, kl=0.1
    )
    assert loss.item() == pytest.approx(2.6) and metrics["kl"].item() == 1
    # The worst sample, r = 0: v- = -v, x_0_hat- = 1.5, w = 1.5, l- = 1.5; loss = 5 * 1.5.
    loss, _ = train.nft_loss(
        one(1.0), one(0.0), one(0.0), one(1.0), one(0.0), torch.tensor([0.5]), -a, kl=0.0
    )
    assert loss.item() == pytest.approx(7.5)
    # beta = .5 and v_old = -1: v+ = .5 * 1 - .5 = 0, x_0_hat+ = 1, l+ = 1; loss = 5 / .5 * 1.
    # v- = 1.5 * -1 - .5 * 1 = -2, x_0_hat- = 2, w = 2, l- = 2; loss = 10 * 2.
    for sign, expected in ((a, 10.0), (-a, 20.0)):
        loss, _ = train.nft_loss(
            one(1.0), one(-1.0), one(0.0), one(1.0), one(0.0), torch.tensor([0.5]), sign, 0.5, kl=0
        )
        assert loss.item() == pytest.approx(expected)


def test_at_the_old_policy_the_loss_does_not_show_the_reward_but_its_gradient_does():
    _, v_old, v_ref, x_t, x_0, t, a = batch()
    values, gradients = [], []
    for advantages in (a, -a, torch.zeros_like(a)):
        v = v_old.clone().requires_grad_()
        loss, _ = train.nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, kl=0.0)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, v)[0])
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    # 2 r - 1 = A / A_max: opposite for opposite advantages, nothing without any.
    assert torch.allclose(gradients[0], -gradients[1], atol=1e-6)
    assert gradients[0].abs().max() > 1e-3 and gradients[2].abs().max() < 1e-6


def test_the_policy_moves_towards_good_samples_and_away_from_bad_ones():
    _, v_old, v_ref, x_t, x_0, t, _ = batch()
    for sign in (1, -1):
        v = v_old.clone().requires_grad_()
        a = torch.full((6,), sign * 2.0)
        train.nft_loss(v, v_old, v_ref, x_t, x_0, t, a, kl=0.0)[0].backward()
        toward = (x_t - x_0) / t[:, None, None, None] - v_old  # the velocity that gives x_0
        assert ((-v.grad * toward).sum() > 0) == (sign > 0)


def test_advantages_have_zero_mean_a_prompt_one_std_and_a_clip():
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    std = rewards.std(correction=0).item()  # over all four: 0.7071
    assert std == pytest.approx(0.5**0.5)
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (std + 1e-4)
    assert torch.allclose(train.group_advantages(rewards), expected)
    assert train.group_advantages(rewards, adv_clip=0.5).abs().max() == 0.5
    assert train.group_advantages(torch.ones(2, 4)).abs().max() == 0  # no spread, no division by 0
    own = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (1 + 1e-4)  # the first prompt's own std is 1
    assert torch.allclose(train.group_advantages(rewards, std_over="prompt"), own)


@pytest.mark.parametrize("family", list(train.FAMILIES))
def test_every_family_runs_and_leaves_its_folder(family, tmp_path, world, capsys):
    out = tmp_path / "run"
    assert train.main([*MINIATURE, "--family", family, "--output_dir", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    expected = "config.json metrics.jsonl images curve.png lora checkpoints"
    assert names == set(expected.split())
    steps = lines(out)
    assert [line["step"] for line in steps] == [0, 1, 2] and "reward/mean" in steps[2]
    gains = [b - a for a, b in zip(steps[0]["eval/rewards"], steps[2]["eval/rewards"])]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert steps[2]["eval/gain"] == pytest.approx(sum(gains) / len(gains))
    assert steps[2]["eval/gain_standard_error"] == pytest.approx(error)
    assert f"{steps[2]['eval/gain'] / error:.1f} standard errors" in capsys.readouterr().out


def test_a_weighted_sum_trains_and_each_part_is_logged_and_others_are_only_measured(
    tmp_path, world, monkeypatch
):
    (tmp_path / "mine.py").write_text(
        "def red(i, p, m): return i[:, 0].mean(dim=(1, 2))\n"
        "def blue(i, p, m): return i[:, 2].mean(dim=(1, 2))\n"
    )
    mine = tmp_path / "mine.py"
    options = ["--reward", f"clipscore:2,{mine}:red:-1", "--eval_rewards", f"{mine}:blue:7"]
    options += ["--z_score", "--advantage_std", "prompt"]
    seen = []
    for module, name in ((train, "group_advantages"), (train.selection, "best_worst")):
        real = getattr(module, name)
        spy = lambda r, *more, real=real: seen.append((r, *more)) or real(r, *more)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    assert train.main([*MINIATURE, *options, "--output_dir", str(tmp_path / "run")]) == 0
    (pool, keep), (kept, _, over) = seen[:2]
    assert (pool.shape, keep, kept.shape, over) == ((6,), 4, (1, 4), "prompt")
    assert abs(pool.mean()) < 1e-3 and abs(kept.mean()) < 1e-3  # z-scored, and logged raw:
    before, first, _ = lines(tmp_path / "run")
    for line, kind in ((first, "reward"), (before, "eval")):
        parts = 2 * line[f"{kind}/clipscore"] - line[f"{kind}/mine.py:red"]
        assert line[f"{kind}/weighted_sum"] == pytest.approx(parts, abs=1e-5)
    assert first["reward/mean"] == first["reward/weighted_sum"]
    assert before["eval/reward"] == before["eval/weighted_sum"]
    assert 0 < before["eval/mine.py:blue"] < 1 and "reward/mine.py:blue" not in first
    assert (tmp_path / "run" / "curve.png").stat().st_size > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_lora_gives_the_trained_policys_images_in_a_stock_pipeline(name, tmp_path, world):
    options = [*MINIATURE, "--model", name, "--learning_rate", "0.05", "--ema_decay", "0"]
    options += ["--eval_steps", "4"]
    assert train.main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    pipe = DiffusionPipeline.from_pretrained(world / name)  # in float32
    pipe.set_progress_bar_config(disable=True)
    how = dict(num_inference_steps=4, guidance_scale=1.0, height=32, width=32, output_type="pt")
    sana = dict(use_resolution_binning=False)
    how |= sana if name == "sana" else dict(max_sequence_length=16)

    def images(of):
        generator = torch.Generator().manual_seed(0)
        return of(["a small plain red ring at the top"] * 2, generator=generator, **how).images

    base = images(pipe)
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    loaded = images(pipe)

    # The same tensors in the adapter that training used, alpha = 2 * rank included.
    model = load(world, name)
    models.add_lora(model, rank=16, alpha=32)
    state = load_file(
        sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.safetensors"
    )
    for i, p in enumerate(models.lora_parameters(model.transformer, "ema")):
        p.data.copy_(state[f"ema.{i}"])
    model.pipe.set_progress_bar_config(disable=True)
    with models.policy(model.transformer, "ema"):
        trained = images(model.pipe)
    assert torch.allclose(loaded, trained, atol=1e-4)
    assert (loaded - base).abs().max() > 1e-2  # and it is not simply the base

    # The model card's few lines draw as training did: its solver, and noise for noise. Here they
    # do so in float32, whose rounding is far below the difference between two solvers.
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "torch_dtype=torch.bfloat16" in card
    card = card.replace("torch.bfloat16", "torch.float32")
    card = card.replace("path/to/the/tiny/model", str(world / name))
    code = card.replace("path/to/this/folder", str(tmp_path / "run" / "lora"))
    exec(code.split("```python\n")[1].split("```")[0], names := {})
    assert names["image"].size == (32, 32)
    call = code.split("pipe(")[1].split(").images")[0]
    ours = load(world, name)
    names["latents"] = noise = initial_noise([1], ours.latent_shape)
    if name == "flux":
        names["latents"] = FluxPipeline._pack_latents(noise, 1, *noise.shape[1:])
    theirs = eval(f"pipe({call}, latents=latents, output_type='pt').images", names)
    models.add_lora(ours, rank=16, alpha=32)
    for i, p in enumerate(models.lora_parameters(ours.transformer, "ema")):
        p.data.copy_(state[f"ema.{i}"])
    with models.policy(ours.transformer, "ema") as ema:
        x_0 = sample(ours, ema, ours.encode(["a prompt"]), noise, 4)
    names["pipe"].scheduler = pipe.scheduler  # the stock one, which is the other solver
    others = eval(f"pipe({call}, latents=latents, output_type='pt').images", names)
    away, others_away = ((x - ours.decode(x_0)).abs().mean() for x in (theirs, others))
    assert away < 1e-5 and others_away > 1e-4  # 2e-7; 1e-3 or more, where solvers agree best


def test_the_model_card_holds_the_command_that_gives_the_run(tmp_path, world, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*MINIATURE, "--seed", "3", "--reward", "clipscore:0.5", "--gradient_checkpointing"]
    assert train.main([*options, "--output_dir", "run"]) == 0
    card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
    assert card.data.library_name == "diffusers" and "clipscore:0.5" in card.text
    line = next(line for line in card.text.splitlines() if line.startswith("python train.py"))
    assert "--device" not in line and "--output_dir" not in line
    again = parse([*shlex.split(line)[2:], "--device", "cpu", "--output_dir", "other"])
    ran = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert dataclasses.asdict(again) == ran | {"output_dir": "other"}


def test_a_pretrained_folder_takes_the_very_code_of_the_tiny_model(tmp_path, world):
    """The tiny FLUX.1 as a user's folder: the same numbers as from --model flux alone."""
    (tmp_path / "red.py").write_text("def red(i, p, m): return i[:, 0].mean(dim=(1, 2))\n")
    (tmp_path / "p.txt").write_text("\n".join(f"{n} red cats" for n in range(12)))
    options = [*MINIATURE, "--model", "flux", "--prompts", str(tmp_path / "p.txt")]
    options += ["--reward", f"{tmp_path / 'red.py'}:red", "--output_dir"]
    assert train.main([*options, str(tmp_path / "tiny")]) == 0
    own = [f"--{k}={v}" for k, v in TINY.items() if f"--{k}" not in MINIATURE and v is not False]
    own += ["--no-gradient_checkpointing", "--pretrained", str(world / "flux")]
    assert train.main([*options, str(tmp_path / "folder"), *own]) == 0
    assert outcome(tmp_path / "tiny") == outcome(tmp_path / "folder")


def test_checkpointing_gradients_changes_nothing_but_memory(tmp_path, world, monkeypatch):
    real, checkpointed = train.update, []

    def update(run, *arguments):
        checkpointed.append(run.model.transformer.is_gradient_checkpointing)
        return real(run, *arguments)

    monkeypatch.setattr(train, "update", update)
    for name, flag in (("with", "--gradient_checkpointing"), ("without", "--micro_batch=36")):
        options = [*MINIATURE, "--model", "sd3", flag, "--output_dir", str(tmp_path / name)]
        assert train.main(options) == 0
    assert checkpointed == [True, True, False, False]
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


def test_compiled_it_draws_the_same_and_is_compiled_in_the_first_step_alone(
    tmp_path, world, monkeypatch
):
    """sync must copy into the weights that the compiled explorer reads. (Graphs are captured and
    guarded as ever; turning them into machine code, which takes a minute, is left out.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for name, flag in (("eager", "--no-compile"), ("compiled", "--compile")):
        options = [*MINIATURE, "--steps", "3", "--learning_rate", "0.01", flag, "--eval_every", "3"]
        assert train.main([*options, "--output_dir", str(tmp_path / name)]) == 0
    eager, compiled = (lines(tmp_path / name)[1:] for name in ("eager", "compiled"))
    graphs = [line["compiled_graphs"] for line in compiled]
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    for a, b in zip(eager, compiled):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_policies_switch_and_switch_back(name, world):
    model = load(world, name)
    explorer, _ = models.make_explorer(model, "bf16")
    models.add_lora(model, 4, 8)
    transformer = model.transformer
    for p in models.lora_parameters(transformer, "default"):
        p.data.add_(0.05)
    models.follow(transformer, "old", eta=0.25)
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
    assert torch.allclose(got["base"], velocity(explorer), atol=1e-6)
    trainable = [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)
    models.sync(explorer, transformer, "old")  # merged into the explorer it is the old policy
    assert torch.allclose(velocity(explorer), got["old"], atol=1e-4)


@pytest.mark.parametrize("name, adapted", [("sana", 32), ("flux", 14), ("sd3", 23)])
def test_lora_adapts_the_attention_layers_of_the_paper(name, adapted, world):
    model = load(world, name)
    models.add_lora(model, 4, 8)
    layers = {n.split(".lora_")[0] for n, _ in model.transformer.named_parameters() if "lora_" in n}
    assert len(layers) == adapted and all("attn" in layer for layer in layers)


@pytest.mark.parametrize(
    "options, says",
    [
        ("--pol 3", "--pol"),
        ("--model dalle", "--model"),
        ("--pool many", "--pool"),
        ("--keep 24 --pool 12", "--keep 24"),
        ("--keep 1", "--keep 1"),
        ("--keep 7", "--keep 7"),
        ("--steps 0", "--steps 0"),
        ("--explore_steps -1", "--explore_steps -1"),
        ("--learning_rate nan", "--learning_rate"),
        ("--learning_rate 1e300", "at most 1e+30"),
        ("--kl -1", "--kl -1"),
        ("--min_dim -1", "--min_dim -1"),
        ("--ema_decay 1", "--ema_decay 1"),
        ("--timestep_fraction 2", "--timestep_fraction"),
        ("--device cuda:77", "--device"),
        ("--device banana", "--device"),
        ("--device meta", "--device"),
        ("--seed 99999999999999999999999", "--seed"),
        ("--prompts missing.txt", "missing.txt"),
        ("--prompts EMPTY", "no prompt"),
        ("--prompts LATIN1", "UTF-8"),
        ("--prompts BROKEN.jsonl", "line 2"),
        ("--prompts LIST.jsonl", "line 1"),
        ("--prompts HALF.jsonl", "line 1: 'prompt' is not a text"),
        ("--prompts /dev/zero", "not a file"),
        ("--prompts \udcff", "--prompts '\\udcff'"),
        ("--eval_prompts missing.txt", "--eval_prompts missing.txt"),
        ("--reward nothing", "nothing"),
        ("--reward REWARD.py:absent", "absent"),
        ("--reward REWARD.py:raises", "raised ValueError: no"),
        ("--reward REWARD.py:short", "shape"),
        ("--reward REWARD.py:nan", "NaN"),
        ("--reward clipscore,clipscore:2", "twice"),
        ("--reward clipscore:1e999", "finite"),
        ("--reward pickscore --reward_weights TAKEN", "hf download"),
        ("--eval_rewards nothing", "--eval_rewards"),
        ("--eval_rewards clipscore", "trained on"),
        ("--output_dir TAKEN", "choose another, or delete it"),
        ("--output_dir /dev/null/x", "--output_dir"),
        ("--resume nowhere", "nowhere"),
        ("--pretrained", "--prompts"),
        ("--pretrained nowhere --prompts GOOD --prompts_per_step 1", "nowhere"),
        ("--pretrained a/b/c --prompts GOOD --prompts_per_step 1", "such a model on the hub"),
        ("--pretrained TAKEN --prompts GOOD --prompts_per_step 1", "model_index.json"),
        ("--resolution 0", "--resolution 0"),
        ("--resolution 36", "multiple of 8"),
        ("--model sd3 --resolution 96", "positions up to 64"),
        ("--eval_prompts EMPTY", "no prompt"),
        ("--prompts GOOD", "--prompts_per_step 6"),
        ("--prompts_per_step 649", "648 training prompts"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    options, says, tmp_path, world, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files = {
        "EMPTY": b"\n \n",
        "LATIN1": "caf\xe9".encode("latin-1"),
        "BROKEN.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
        "LIST.jsonl": b"[1]\n",
        "HALF.jsonl": b'{"prompt": "\\ud800"}\n',
        "GOOD": b"a cat\n",
        "REWARD.py": b"def raises(i, p, m): raise ValueError('no')\n"
        b"def short(i, p, m): return [1.0]\n"
        b"def nan(i, p, m): return [float('nan')] * len(p)\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert train.main(options.split()) == 2
    assert says in error_line(capsys.readouterr().err)
    ignore = {"__pycache__"}
    after = [p for p in sorted(tmp_path.rglob("*")) if not ignore & set(p.parts)]
    assert after == before


def test_out_of_memory_is_a_line_that_says_what_would_do(tmp_path, world, monkeypatch, capsys):
    def iteration(run, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(train, "iteration", iteration)
    assert train.main([*MINIATURE, "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "train.py: CUDA out of memory; lower --micro_batch or --resolution"


def test_another_familys_folder_is_named_and_so_is_what_is_broken(world, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "red.py").write_text("def red(i, p, m): return i[:, 0].mean(dim=(1, 2))\n")
    options = ["--prompts", str(tmp_path / "p.txt"), "--prompts_per_step", "1", "--output_dir"]
    options += [str(tmp_path / "run"), "--reward", f"{tmp_path / 'red.py'}:red"]
    options += ["--model", "flux", "--pretrained"]

    def error(folder):
        assert train.main([*options, str(folder)]) == 2
        said = error_line(capsys.readouterr().err)
        assert str(folder) in said and not (tmp_path / "run").exists()
        return said

    assert "is a SanaPipeline, not --model flux; try --model sana" in error(world / "sana")
    for number, (victim, damage) in enumerate(
        [
            ("transformer", shutil.rmtree),
            ("tokenizer_2", shutil.rmtree),
            ("text_encoder_2/model.safetensors", lambda p: p.unlink()),
            ("vae/config.json", lambda p: p.write_text("{")),
            ("transformer/config.json", lambda p: p.write_text('{"num_layers": 3}')),
            ("vae/diffusion_pytorch_model.safetensors", lambda p: p.write_bytes(b"x" * 99)),
            (
                "transformer/diffusion_pytorch_model.safetensors",
                lambda p: p.write_bytes(p.read_bytes()[:-1]),
            ),
            ("model_index.json", lambda p: p.write_text("[]")),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(world / "flux", folder)
        damage(folder / victim)
        error(folder)


def test_nothing_in_a_pretrained_folder_is_executed(world, tmp_path):
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
        shutil.copytree(world / "flux", folder)
        how(folder, what)
        with pytest.raises(models.ModelError, match="cannot be loaded") as error:
            models.load("flux", folder, 32)
        assert "\n" not in str(error.value) and not (tmp_path / "ran").exists(), (how, what)


def test_a_hub_that_refuses_or_is_not_there_is_one_line(tmp_path):
    answers = {
        "a/gated": (403, "GatedRepo"),
        "a/absent": (401, "RepoNotFound"),
        "a/broken": (500, ""),
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = next(answers[name] for name in answers if name in self.path)
            self.send_response(status)
            for item in {"X-Error-Code": code, "Content-Length": "0"}.items():
                self.send_header(*item)
            self.end_headers()
            if code == "":  # and nobody listens from then on
                threading.Thread(target=lambda: (server.shutdown(), server.server_close())).start()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "p.txt").write_text("a cat")
    options = ["--model", "flux", "--prompts", "p.txt", "--prompts_per_step", "1", "--pretrained"]
    code = (
        "import sys, train\n"
        "for name in ('gated', 'absent', 'broken', 'gone'):\n"
        "    print(train.main([*sys.argv[1:], 'a/' + name]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "empty")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2"] * 4 and not (tmp_path / "runs").exists()
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    gated, absent, broken, gone = ours  # beside them, packages such as torchao have their own lines
    assert "gated; accept its licence" in gated and "such a model on the hub" in absent
    assert "the hub cannot be asked" in broken and "the hub cannot be asked" in gone


def test_prompts_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "n": 1}\n\n{"prompt": "b"}\n{"n": 1, "prompt": "a"}\n')
    prompts, metadata, notes = config.read_prompts(path)
    assert (prompts, metadata) == (["a", "b"], [{"n": 1}, {}])
    assert "1 repeated lines" in notes[0]
    path.write_text('{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}\n')
    assert config.read_prompts(path) == (["a", "a"], [{"n": 1}, {"n": 2}], [])


def test_what_is_held_out_is_a_tenth_of_the_prompts_or_a_file(tmp_path):
    path, other = tmp_path / "p.txt", tmp_path / "eval.txt"
    path.write_text("\n".join(f"cat {i % 20}" for i in range(40)))
    other.write_text("dog\ncat 3\n")
    options = ["--prompts", str(path)]
    rows, held_out, notes = config.split_prompts(parse(options))
    assert held_out.prompts == ["cat 0", "cat 10"] and len(rows.prompts) == 18
    assert notes == [f"{path}: 20 repeated lines are used once"]
    rows, held_out, notes = config.split_prompts(parse([*options, "--eval_prompts", str(other)]))
    assert held_out.prompts == ["dog", "cat 3"] and len(rows.prompts) == 20
    assert notes[1] == "1 of the 2 held-out prompts are trained on too"


def test_a_prompts_file_of_ones_own_trains_and_long_prompts_are_cut_off_and_said(
    tmp_path, world, capsys
):
    path = tmp_path / "p.txt"
    path.write_text("a red cat\n" + "a very " * 30 + "blue dog\n")
    out = tmp_path / "run"
    options = [*MINIATURE, "--model", "sd3", "--prompts", str(path), "--output_dir", str(out)]
    assert train.main(options) == 0
    said = capsys.readouterr().out
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert f"1 prompts lose what comes after 16 tokens ({name})" in said
