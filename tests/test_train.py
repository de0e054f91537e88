"""The update, and runs of the command line at miniature size."""

import json

import pytest
import torch
from safetensors.torch import load_file

import models
import train

MINIATURE = (
    "--steps 2 --prompts_per_step 1 --pool 6 --keep 4 --explore_steps 1 --rollout_steps 2 "
    "--eval_steps 1 --eval_images 1 --eval_every 1 --micro_batch 36 --device cpu"
).split()


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


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", list(train.FAMILIES))
def test_every_family_runs_and_leaves_its_folder(family, tmp_path, world, capsys):
    out = tmp_path / "run"
    assert train.main([*MINIATURE, "--family", family, "--output_dir", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    expected = "config.json metrics.jsonl images curve.png lora checkpoints"
    assert names == set(expected.split())
    steps = lines(out)
    assert [line["step"] for line in steps] == [0, 1, 2] and "reward/mean" in steps[2]
    assert "standard errors" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_resuming_changes_nothing(tmp_path, world):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*MINIATURE, "--output_dir", str(whole)]) == 0
    assert train.main([*MINIATURE, "--output_dir", str(parts), "--steps", "1"]) == 0
    assert train.main(["--resume", str(parts), "--steps", "2"]) == 0
    without_time = [
        [{k: v for k, v in line.items() if "time/" not in k} for line in lines(folder)]
        for folder in (whole, parts)
    ]
    assert without_time[0] == without_time[1]
    name = "lora/pytorch_lora_weights.safetensors"
    first, second = load_file(whole / name), load_file(parts / name)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert train.main(["--resume", str(parts)]) == 2  # nothing left to do
    assert train.main(["--resume", str(parts), "--seed", "9"]) == 2  # another run


def test_a_saved_lora_gives_the_trained_policys_images_in_a_stock_pipeline(tmp_path, world):
    options = [*MINIATURE, "--learning_rate", "0.05", "--ema_decay", "0", "--seed", "3"]
    assert train.main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    sana = models.load("sana", world / "sana", dtype=torch.float32)
    how = dict(latents=noise, num_inference_steps=4, guidance_scale=1.0, height=32, width=32)
    how |= dict(use_resolution_binning=False, output_type="latent")
    sana.pipe.set_progress_bar_config(disable=True)
    prompts = ["a small plain red ring at the top"] * 2
    base = sana.pipe(prompts, **how).images
    sana.pipe.load_lora_weights(tmp_path / "run" / "lora")
    loaded = sana.pipe(prompts, **how).images
    sana.pipe.unload_lora_weights()

    # The same tensors in the adapter that training used, alpha = 2 * rank included.
    models.add_lora(sana, rank=16, alpha=32)
    state = load_file(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    for i, p in enumerate(models.lora_parameters(sana.transformer, "ema")):
        p.data.copy_(state[f"ema.{i}"])
    with models.policy(sana.transformer, "ema"):
        trained = sana.pipe(prompts, **how).images
    assert torch.allclose(loaded, trained, atol=1e-4)
    assert (loaded - base).abs().max() > 1e-2  # and it is not simply the base


def test_policies_switch_and_switch_back(world):
    sana = models.load("sana", world / "sana", dtype=torch.float32)
    explorer, _ = models.make_explorer(sana, "bf16")
    models.add_lora(sana, 4, 8)
    transformer = sana.transformer
    for p in models.lora_parameters(transformer, "default"):
        p.data.add_(0.05)
    models.follow(transformer, "old", eta=0.25)
    text = sana.encode(["a small plain red ring at the top"])
    x, t = torch.randn(1, *sana.latent_shape), torch.tensor([0.5])

    def velocity(which):
        with torch.no_grad():
            return sana.velocity(which, x, t, text)

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
    assert torch.allclose(velocity(explorer), got["old"], atol=1e-5)


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
        ("--timestep_fraction 2", "--timestep_fraction"),
        ("--device cuda:77", "--device"),
        ("--device banana", "--device"),
        ("--prompts missing.txt", "missing.txt"),
        ("--prompts EMPTY", "no prompt"),
        ("--prompts LATIN1", "UTF-8"),
        ("--prompts BROKEN.jsonl", "line 2"),
        ("--prompts LIST.jsonl", "line 1"),
        ("--reward nothing", "nothing"),
        ("--reward REWARD.py:absent", "absent"),
        ("--reward REWARD.py:raises", "raised ValueError: no"),
        ("--reward REWARD.py:short", "shape"),
        ("--reward REWARD.py:nan", "NaN"),
        ("--output_dir TAKEN", "--resume"),
        ("--output_dir /dev/null/x", "--output_dir"),
        ("--resume nowhere", "nowhere"),
        ("--pretrained", "--prompts"),
        ("--pretrained nowhere --prompts GOOD --prompts_per_step 1", "nowhere"),
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
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and error.startswith("train.py: error: ")
    ignore = {"__pycache__"}
    after = [p for p in sorted(tmp_path.rglob("*")) if not ignore & set(p.parts)]
    assert after == before


def test_ctrl_c_ends_with_what_was_kept(tmp_path, world, monkeypatch, capsys):
    real = train.iteration

    def interrupted(run, step):
        if step == 1:
            raise KeyboardInterrupt
        return real(run, step)

    monkeypatch.setattr(train, "iteration", interrupted)
    assert train.main([*MINIATURE, "--output_dir", str(tmp_path / "run")]) == 130
    assert "interrupted after 1 steps; continue with --resume" in capsys.readouterr().out


def test_prompts_files(tmp_path):
    from config import read_prompts

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "n": 1}\n\n{"prompt": "b"}\n{"prompt": "a"}\n')
    assert read_prompts(path) == (["a", "b"], [{"n": 1}, {}])


def test_a_prompts_file_of_ones_own_trains(tmp_path, world):
    path = tmp_path / "p.txt"
    path.write_text("a red cat\na blue dog\n")
    out = tmp_path / "run"
    assert train.main([*MINIATURE, "--prompts", str(path), "--output_dir", str(out)]) == 0
