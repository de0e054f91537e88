"""The update, and runs of the command line at miniature size."""

import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import MINIATURE, MODEL_NAMES, PROJECT, error_line, lines, load, outcome
from diffusers import DiffusionPipeline, FluxPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import test_method

import train
from rollout import initial_noise, sample
from support import models, world
from support.options import TINY_DEFAULTS, Config


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
    own_std = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (
        1 + 1e-4
    )  # the first prompt's own std is 1
    assert torch.allclose(train.group_advantages(rewards, std_over="prompt"), own_std)


def test_what_is_logged_of_rewards_and_of_how_the_explorer_ranked_the_same_candidates():
    metrics = test_method.iterate(test_method.prepared(), 0, test_method.TWO_STAGES).metrics
    # The rewards of the kept candidates are 1 2 3 6 and 14 18 10 10.
    expected = {"mean": 8, "best": (6 + 18) / 2, "worst": (1 + 10) / 2, "zero_spread": 0}
    expected |= {"spread": (5 + 8) / 2, "std": (258 / 8) ** 0.5}
    for name, value in expected.items():
        assert metrics[f"reward/{name}"] == pytest.approx(value), name
    # The explorer gave them .6 .5 .1 .2, where 5 of 6 pairs are the other way round, and
    # .9 .8 .1 .2, where 1 is, 4 are not, and one has equal rewards: tau-b is 3 / sqrt(6 * 5).
    taus = (1 - 5) / 6, (4 - 1) / 30**0.5
    assert metrics["fidelity/kept_kendall_tau"] == pytest.approx(sum(taus) / 2)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_explorer_of_a_run_has_the_layers_that_the_paper_quantizes(name):
    run = train.Run(train.parse_options(["--model", name, "--device", "cpu"]))
    config = run.model.transformer.config
    quantized = {
        "sana": lambda: 7 * config.num_layers,
        "flux": lambda: 14 * config.num_layers + 6 * config.num_single_layers + 1,  # proj_out
        "sd3": lambda: 10 * config.num_layers,  # the last block has one less; there is proj_out
    }[name]()
    assert [outcome for *_, outcome in run.layers].count("nvfp4") == quantized
    assert list(run.copies) == ["bf16", "nvfp4"] and run.networks == run.copies


def test_with_low_memory_the_transformer_itself_draws_in_bf16():
    run = train.Run(train.parse_options(["--low_memory", "--device", "cpu"]))
    assert list(run.copies) == ["nvfp4"] and run.networks["bf16"] is run.model.transformer


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("algorithm", train.ALGORITHMS)
def test_every_algorithm_runs_and_leaves_its_folder(algorithm, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*MINIATURE, "--algorithm", algorithm, "--output_dir", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    expected = "config.json metrics.jsonl images curve.png before_after.png lora checkpoints"
    assert names == set(expected.split())
    steps = lines(out)
    assert [line["step"] for line in steps] == [0, 1, 2] and "reward/mean" in steps[2]
    gains = [b - a for a, b in zip(steps[0]["eval/rewards"], steps[2]["eval/rewards"])]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert steps[2]["eval/gain"] == pytest.approx(sum(gains) / len(gains))
    assert steps[2]["eval/gain_standard_error"] == pytest.approx(error)
    assert f"{steps[2]['eval/gain'] / error:.1f} standard errors" in capsys.readouterr().out


def test_a_weighted_sum_trains_and_each_part_is_logged_and_others_are_only_measured(
    tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(
        "def red(i, p, m): return i[:, 0].mean(dim=(1, 2))\n"
        "def blue(i, p, m): return i[:, 2].mean(dim=(1, 2))\n"
    )
    mine = tmp_path / "mine.py"
    options = ["--reward", f"clipscore:2,{mine}:red:-1", "--eval_rewards", f"{mine}:blue:7"]
    monkeypatch.setitem(TINY_DEFAULTS, "advantage_std", "prompt")
    seen = []

    def spy(function):
        return lambda rewards, *more: seen.append((rewards, *more)) or function(rewards, *more)

    monkeypatch.setattr(train, "group_advantages", spy(train.group_advantages))
    monkeypatch.setitem(train.selection.RULES, "best_worst", spy(train.selection.best_worst))
    assert train.main([*MINIATURE, *options, "--output_dir", str(tmp_path / "run")]) == 0
    (pool, keep), (kept, _, over) = seen[:2]
    assert (pool.shape, keep, kept.shape, over) == ((6,), 4, (1, 4), "prompt")
    before, first, _ = lines(tmp_path / "run")
    assert first["reward/mean"] == pytest.approx(float(kept.mean()))
    for line, kind in ((first, "reward"), (before, "eval")):
        parts = 2 * line[f"{kind}/clipscore"] - line[f"{kind}/mine.py:red"]
        assert line[f"{kind}/weighted_sum"] == pytest.approx(parts, abs=1e-5)
    assert first["reward/mean"] == first["reward/weighted_sum"]
    assert before["eval/reward"] == before["eval/weighted_sum"]
    assert 0 < before["eval/mine.py:blue"] < 1 and "reward/mine.py:blue" not in first
    assert (tmp_path / "run" / "curve.png").stat().st_size > 0


def test_accuracy_is_measured_on_captions_of_the_tiny_world_and_not_weighed_into_the_reward(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        world,
        "judge",
        lambda images, prompts: {"accuracy": torch.ones(len(prompts)), "clear": images[:, 0, 0, 0]},
    )
    (tmp_path / "own.txt").write_text("a cat\na small plain red ring at the top\n")
    for name, options in (("captions", []), ("own", ["--eval_prompts", str(tmp_path / "own.txt")])):
        assert train.main([*MINIATURE, *options, "--output_dir", str(tmp_path / name)]) == 0
    judged, own = lines(tmp_path / "captions"), lines(tmp_path / "own")
    for line in judged:
        assert line["eval/accuracy"] == 1 and 0 < line["eval/clear"] < 1
        assert line["eval/reward"] == pytest.approx(line["eval/clipscore"])
    assert not any("eval/accuracy" in line for line in own)
    assert "accuracy" not in " ".join(own[0]) and "reward/accuracy" not in judged[1]
    assert capsys.readouterr().out.count("pictures that match their prompt: 100% before") == 1


def test_each_image_is_scored_with_its_own_prompt_and_metadata(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def record(images, prompts, metadata):\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
        "        file.write(json.dumps([prompts, metadata]) + '\\n')\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    for file, numbers in (("train", range(3)), ("held_out", range(10, 12))):
        rows = [json.dumps({"prompt": f"cat {n}", "number": n}) + "\n" for n in numbers]
        (tmp_path / f"{file}.jsonl").write_text("".join(rows))
    options = ["--reward", f"{tmp_path / 'mine.py'}:record", "--micro_batch", "4"]
    options += ["--eval_prompts", str(tmp_path / "held_out.jsonl")]
    options += ["--prompts", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert train.main([*MINIATURE, *options]) == 0
    images = Counter()
    for line in (tmp_path / "seen").read_text().splitlines():
        prompts, metadata = json.loads(line)
        assert [f"cat {row['number']}" for row in metadata] == prompts
        images.update("held out" if row["number"] >= 10 else "training" for row in metadata)
    # Two are tried before the first step; then 6 explored and 4 drawn again in each of two steps,
    # and 4 of each held-out prompt in each of three evaluations; the last picture has one of each
    # before and one after training.
    assert images == {"training": 2 + 2 * (6 + 4), "held out": 2 + 3 * 2 * 4 + 2 * 2}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_saved_lora_gives_the_ema_policys_images_in_a_stock_pipeline(name, tmp_path):
    options = [*MINIATURE, "--model", name, "--learning_rate", "0.05", "--eval_steps", "4"]
    assert train.main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    pipe = DiffusionPipeline.from_pretrained(world.TINY / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=4, guidance_scale=1.0, height=32, width=32, output_type="pt")
    sana = dict(use_resolution_binning=False)
    call |= sana if name == "sana" else dict(max_sequence_length=16)

    def images(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(["a small plain red ring at the top"] * 2, generator=generator, **call).images

    base = images(pipe)
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    loaded = images(pipe)

    # The EMA's tensors in the adapter that training used, alpha = 2 * rank included.
    model = load(name)
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
    assert " dtype=torch.bfloat16" in card
    card = card.replace("torch.bfloat16", "torch.float32")
    card = card.replace(f"support/tiny/{name}", str(world.TINY / name))
    code = card.replace("path/to/this/folder", str(tmp_path / "run" / "lora"))
    exec(code.split("```python\n")[1].split("```")[0], names := {})
    assert names["image"].size == (32, 32)
    call = code.split("pipe(")[1].split(").images")[0]
    ours = load(name)
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
    call = re.sub(r"sigmas=\[.*?\], ", "", call)
    others = eval(f"pipe({call}, latents=latents, output_type='pt').images", names)
    away, others_away = ((x - ours.decode(x_0)).abs().mean() for x in (theirs, others))
    assert away < 1e-5 and others_away > 1e-4  # 2e-7; 1e-3 or more, where solvers agree best


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_training_starts_from_a_lora_that_training_wrote(name, tmp_path, capsys):
    """The evaluation before the first step is that of the policy that was saved."""
    options = [*MINIATURE, "--model", name, "--learning_rate", "0.05", "--output_dir"]
    assert train.main([*options, str(tmp_path / "first")]) == 0
    lora = tmp_path / "first" / "lora"
    assert train.main([*options, str(tmp_path / "second"), "--lora", str(lora)]) == 0
    first, second = (lines(tmp_path / run) for run in ("first", "second"))
    assert second[0]["eval/rewards"] == pytest.approx(first[-1]["eval/rewards"], abs=5e-3)
    assert second[0]["eval/rewards"] != pytest.approx(first[0]["eval/rewards"], abs=2e-2)
    transformer = train.Run(
        train.parse_options(["--model", name, "--lora", str(lora)])
    ).model.transformer
    saved = load_file(lora / "pytorch_lora_weights.safetensors")
    for adapter in models.ADAPTERS:
        loaded = get_peft_model_state_dict(transformer, adapter_name=adapter)
        assert {f"transformer.{layer}" for layer in loaded} == saved.keys()
        for layer, values in loaded.items():
            expected = saved[f"transformer.{layer}"].to(transformer.dtype).float()
            assert values.dtype == torch.float32 and torch.equal(values, expected)

    capsys.readouterr()
    refused = {"rank": ["--lora", str(lora), "--lora_rank", "8"], "absent": ["--lora", "nowhere"]}
    says = {
        "rank": f"--lora_rank 8: --lora {lora} has rank 16; give that",
        "absent": "--lora nowhere: cannot be loaded",
    }
    for what, wrong in refused.items():
        assert train.main([*options, str(tmp_path / what), *wrong]) == 2
        assert error_line(capsys.readouterr().err).startswith(says[what])
        assert not (tmp_path / what).exists()


def test_on_a_gpu_float32_matmuls_use_tf32(monkeypatch):
    """The rewards and the LoRA compute in float32. The run itself ends where it would begin."""

    class Ended(Exception):
        pass

    def begin(config):
        raise Ended

    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(train, "Run", begin)
    config = train.parse_options(["--device", "cpu"])
    for device, expected in (("cpu", []), ("cuda", ["high"])):
        config.device = device
        with pytest.raises(Ended):
            train.train(config)
        assert chosen == expected


START = """
import resource, sys, time
import train
for path in sys.argv[1:]:
    config = train.parse_options(["--model", "flux", "--prompts", path, "--device", "cpu"])
    since = time.perf_counter()
    train.Run(config)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(time.perf_counter() - since, memory)
"""


def test_a_run_starts_with_25_000_prompts_as_with_100(tmp_path):
    """Its prompts are encoded in the step that draws them: not at the start, and not all kept."""
    paths = [tmp_path / f"{n}.txt" for n in (100, 25_000)]
    for path in paths:
        path.write_text("".join(f"{i} red cats\n" for i in range(int(path.stem))))
    done = subprocess.run(
        [sys.executable, "-c", START, *paths], cwd=PROJECT, capture_output=True, text=True
    )
    (_, few), (seconds, many) = (map(float, line.split()) for line in done.stdout.splitlines()[-2:])
    assert many - few < 1 and seconds < 60  # gigabytes


def test_a_pretrained_folder_takes_the_very_code_of_the_tiny_model(tmp_path, monkeypatch):
    """The tiny FLUX.1 as a user's folder: the same numbers as from --model flux alone."""
    # The two that are no options.
    monkeypatch.setitem(TINY_DEFAULTS, "eval_images", Config.eval_images)
    monkeypatch.setitem(models.Flux.paper, "min_dim", TINY_DEFAULTS["min_dim"])
    (tmp_path / "red.py").write_text("def red(i, p, m): return i[:, 0].mean(dim=(1, 2))\n")
    (tmp_path / "p.txt").write_text("\n".join(f"{n} red cats" for n in range(12)))
    options = [*MINIATURE, "--model", "flux", "--prompts", str(tmp_path / "p.txt")]
    options += ["--reward", f"{tmp_path / 'red.py'}:red", "--output_dir"]
    assert train.main([*options, str(tmp_path / "tiny")]) == 0
    own = TINY_DEFAULTS.keys() - {"eval_images", "min_dim", "gradient_checkpointing"}
    tiny = [f"--{name}={TINY_DEFAULTS[name]}" for name in own if f"--{name}" not in MINIATURE]
    tiny += ["--no-gradient_checkpointing", "--pretrained", str(world.TINY / "flux")]
    assert train.main([*options, str(tmp_path / "folder"), *tiny]) == 0
    assert outcome(tmp_path / "tiny") == outcome(tmp_path / "folder")


def test_checkpointing_gradients_changes_nothing_but_memory(tmp_path, monkeypatch):
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


def test_compiled_it_draws_the_same_and_is_compiled_in_the_first_step_alone(tmp_path, monkeypatch):
    """sync must copy into the weights that the compiled explorer reads. (Graphs are captured and
    guarded as ever; turning them into machine code, which takes a minute, is left out.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    real, graphs = train.iteration, {"eager": [], "compiled": []}
    for name, flag in (("eager", "--no-compile"), ("compiled", "--compile")):

        def iteration(run, step, name=name):
            result = real(run, step)
            graphs[name].append(counters["stats"]["unique_graphs"])
            return result

        counters.clear()
        monkeypatch.setattr(train, "iteration", iteration)
        options = [*MINIATURE, "--steps", "3", "--learning_rate", "0.01", flag, "--eval_every", "3"]
        assert train.main([*options, "--output_dir", str(tmp_path / name)]) == 0
    eager, compiled = (lines(tmp_path / name)[1:] for name in ("eager", "compiled"))
    assert graphs["eager"] == [0] * 3
    first = graphs["compiled"][0]
    assert first > 0 and graphs["compiled"] == [first] * 3
    for a, b in zip(eager, compiled):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=0.02)


# ---------------------------------------------------------------------------------------------
# Bad input, too little memory


REWARD = """
def raises(i, p, m): raise ValueError('no')
def short(i, p, m): return [1.0]
def nan(i, p, m): return [float('nan')] * len(p)
"""
MODEL = "--prompts GOOD --prompts_per_step 1 --pretrained"


@pytest.mark.parametrize(
    "options, says",
    [
        ("--pol 3", "--pol"),
        ("--model dalle", "--model dalle: must be one of sana, flux, sd3"),
        ("--algorithm ppo", "must be one of sol_rl, naive_scaling, naive_quant, diffusionnft"),
        ("--select all", "must be one of best_worst, random_subset, mean_deviation, extremes_"),
        ("--precision fp3", "must be one of nvfp4, nvfp4_4over6, nvfp4_row, fp8, bf16"),
        ("--prompts missing.txt", "missing.txt"),
        ("--eval_prompts missing.txt", "--eval_prompts missing.txt"),
        ("--reward nothing", "nothing"),
        ("--reward REWARD.py:absent", "absent"),
        ("--reward REWARD.py:raises", "raised ValueError: no"),
        ("--reward REWARD.py:short", "shape"),
        ("--reward REWARD.py:nan", "NaN"),
        ("--reward clipscore,clipscore:2", "twice"),
        ("--reward clipscore:1e999", "finite"),
        ("--reward pickscore", "--reward pickscore"),
        ("--eval_rewards nothing", "--eval_rewards"),
        ("--eval_rewards clipscore", "trained on"),
        (f"{MODEL} nowhere", "nowhere"),
        (f"{MODEL} a/b/c", "such a model on the hub"),
        (f"{MODEL} TAKEN", "model_index.json"),
        ("--resolution 36", "multiple of 8"),
        ("--model sd3 --resolution 96", "positions up to 64"),
        ("--prompts GOOD", f"--prompts_per_step {TINY_DEFAULTS['prompts_per_step']}"),
        ("--prompts_per_step 649", "648 training prompts"),
        ("--resume nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "GOOD").write_text("a cat\n")
    (tmp_path / "REWARD.py").write_text(REWARD)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(train, "iteration", None)  # a run that is not refused fails at once
    assert train.main(options.split()) == 2
    assert says in error_line(capsys.readouterr().err)
    ignore = {"__pycache__"}
    after = [p for p in sorted(tmp_path.rglob("*")) if not ignore & set(p.parts)]
    assert after == before


def test_out_of_memory_is_a_line_that_says_what_would_do(tmp_path, monkeypatch, capsys):
    def iteration(run, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(train, "iteration", iteration)
    assert train.main([*MINIATURE, "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    advice = "lower --micro_batch, --train_micro_batch or --resolution, or give --low_memory"
    assert said == f"train.py: CUDA out of memory; {advice}"


def test_another_models_folder_is_named_and_so_is_what_is_broken(tmp_path, capsys):
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

    assert "is a SanaPipeline, not --model flux; try --model sana" in error(world.TINY / "sana")
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
        shutil.copytree(world.TINY / "flux", folder)
        damage(folder / victim)
        error(folder)


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


def test_a_prompts_file_of_ones_own_trains_and_long_prompts_are_cut_off_and_said(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("a red cat\n" + "a very " * 30 + "blue dog\n")
    out = tmp_path / "run"
    options = [*MINIATURE, "--model", "sd3", "--prompts", str(path), "--output_dir", str(out)]
    assert train.main(options) == 0
    said = capsys.readouterr().out
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert f"1 prompts lose what comes after 10 tokens ({name})" in said


def test_another_algorithm_is_another_list_of_stages(tmp_path, monkeypatch):
    """Two explorations, the second in FP8, before the kept seeds are drawn in BF16: the log and the
    picture have the stages by their names, and prompts without advantages may be left out."""
    stages = [
        train.Stage("explore", "nvfp4", 1, 5),
        train.Stage("refine", "fp8", 1, 4),
        train.Stage("regenerate", "bf16", 2),
    ]
    monkeypatch.setitem(train.ALGORITHMS, "three_stages", lambda c: (c.pool, stages))
    real, trained_on = train.update, []

    def update(run, samples, step):
        samples = [candidates for candidates in samples if candidates.prompt != skipped[step]]
        trained_on.append([(candidates.prompt, len(candidates.seeds)) for candidates in samples])
        return real(run, samples, step)

    def prompts_of(run, step):
        skipped.append(prompts(run, step)[0])
        return prompts(run, step)

    skipped, prompts = [], train.Run.prompts_of
    monkeypatch.setattr(train.Run, "prompts_of", prompts_of)
    monkeypatch.setattr(train, "update", update)
    options = [*MINIATURE, "--algorithm", "three_stages", "--prompts_per_step", "2"]
    assert train.main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    assert [len(part) for part in trained_on] == [1, 1] and trained_on[0][0][1] == 4
    assert {"time/explore", "time/refine", "time/regenerate"} <= lines(tmp_path / "run")[1].keys()
    assert (tmp_path / "run" / "images" / "step_0002.png").stat().st_size > 0
