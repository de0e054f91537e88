"""What an iteration logs, and runs of the command line at miniature size."""

import json

import pytest
import torch
from conftest import MINIATURE, MODEL_NAMES, error_line, lines, load
from safetensors.torch import load_file

import rollout
import train
from support import models


def scripted(*numbers):
    """A reward that hands out these numbers in turn."""
    left = iter(numbers)
    return lambda images, prompts, metadata: [float(next(left)) for _ in prompts]


def test_an_iteration_by_hand(monkeypatch):
    """The weighted sum a - 2 b selects. The log has means over prompts, parts and pairs."""
    options = "--prompts_per_step 2 --train_micro_batch 3".split()
    run = train.Run(train.parse_options([*MINIATURE, *options]))
    pools = [0, 1, 2, 3, 4, 5], [9, 1, 8, 2, 7, 3]
    a = scripted(*pools[0], 1, 2, 3, 8, *pools[1], 14, 18, 10, 10)
    b = scripted(0, 1, 0, 6, 5, 0, 0, 0, 0, 1, *[0] * 10)
    run.reward.parts = [("a", 1.0, a), ("b", -2.0, b)]
    losses = scripted(1, 5, 2, 10)  # of each prompt a micro-batch of 3 pairs and one of 1

    def nft_loss(v, *rest):
        (value,) = losses(None, [0], None)
        return 0 * v.sum(), {"loss": torch.tensor(value), "kl": torch.tensor(2 * value)}

    monkeypatch.setattr(train, "nft_loss", nft_loss)
    metrics, (explored, _) = train.iteration(run, 0)
    # The sums of the first pool are 0 -1 2 -9 -6 5, those of its kept seeds 1 2 3 6 in the end.
    assert explored.rewards.tolist() == [5, 2, -9, -6]
    expected = {"a": (3.5 + 13) / 2, "b": (0.25 + 0) / 2, "weighted_sum": 8, "mean": 8}
    expected |= {"best": (6 + 18) / 2, "worst": (1 + 10) / 2, "spread": (5 + 8) / 2}
    expected |= {"std": (258 / 8) ** 0.5, "zero_spread": 0}
    assert {name: metrics[f"reward/{name}"] for name in expected} == pytest.approx(expected)
    # The explorer ranks the first four with 5 of 6 pairs the other way round. Of the second four
    # it ranks 1 pair otherwise and 4 alike; one has equal rewards: tau-b is 3 / sqrt(6 * 5).
    taus = (1 - 5) / 6, (4 - 1) / 30**0.5
    assert metrics["fidelity/kept_kendall_tau"] == pytest.approx(sum(taus) / 2)
    mean = (3 * 1 + 5 + 3 * 2 + 10) / 8
    assert (metrics["loss"], metrics["kl"]) == pytest.approx((mean, 2 * mean))


def test_a_run_of_three_stages_writes_every_file(tmp_path, monkeypatch):
    """An algorithm is a list of stages. This one explores twice, the second time in FP8."""
    stages = [train.Stage("explore", "nvfp4", 1, 5), train.Stage("refine", "fp8", 1, 4)]
    stages.append(train.Stage("regenerate", "bf16", 2))
    config = train.parse_options([*MINIATURE, "--output_dir", str(tmp_path / "run")])
    monkeypatch.setitem(train.ALGORITHMS, "three_stages", lambda c: (c.pool, stages))
    config.algorithm = "three_stages"
    train.train(config)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = "config.json metrics.jsonl images curve.png before_after.png progress.webp lora"
    assert names == {*expected.split(), "checkpoints"}
    *_, last = lines(tmp_path / "run")
    assert last["step"] == 2 and {"reward/mean", "eval/gain", "loss", "time/refine"} <= last.keys()


def test_the_rule_the_layers_and_the_advantages_are_those_of_the_options(monkeypatch):
    """The rule keeps the last four of six. Layers of up to 128 features stay in BF16."""
    config, settings = train.parse_options(MINIATURE), []
    monkeypatch.setitem(train.selection.RULES, "last", lambda rewards, k: [5, 4, 3, 2])
    config.select, config.min_dim = "last", 128
    config.advantage_std, config.adv_clip = "prompt", 0.5
    advantages = train.group_advantages
    record = lambda R, *given: settings.append(given) or advantages(R, *given)  # noqa: E731
    monkeypatch.setattr(train, "group_advantages", record)
    run = train.Run(config)
    sizes = {outcome: set() for *_, outcome in run.layers}
    for _, *size, outcome in run.layers:
        sizes[outcome].add(max(size))
    assert sizes["kept: max(in, out) <= 128"] == {128} and sizes["nvfp4"] == {320, 640}
    assert [part[:2] for part in run.eval_reward.parts] == [
        ("clipscore", 1.0),
        ("accuracy", 0.0),
        ("clear", 0.0),
    ]
    _, (explored, regenerated) = train.iteration(run, 0)
    (index,) = train.step_prompts(config, len(run.train.prompts), 0)
    seeds = rollout.candidate_seeds(0, 0, index, 6)
    assert explored.seeds == regenerated.seeds == seeds[:1:-1] and settings == [(0.5, "prompt")]


def test_each_image_is_scored_with_its_own_prompt_and_metadata(tmp_path):
    """Of "cat 7" with the number 7 the reward is 7, in micro-batches of several prompts, too."""
    (tmp_path / "mine.py").write_text(
        "def number(images, prompts, metadata):\n"
        "    rows = [row['number'] for row in metadata]\n"
        "    return [n if prompt == f'cat {n}' else -1 for n, prompt in zip(rows, prompts)]\n"
        "def blue(images, prompts, metadata): return images[:, 2].mean(dim=(1, 2))\n"
    )
    for file, numbers in (("train", range(3)), ("held_out", range(10, 12))):
        rows = [json.dumps({"prompt": f"cat {n}", "number": n}) + "\n" for n in numbers]
        (tmp_path / f"{file}.jsonl").write_text("".join(rows))
    options = ["--reward", f"{tmp_path}/mine.py:number", "--micro_batch", "3"]
    options += ["--eval_prompts", f"{tmp_path}/held_out.jsonl", "--eval_rewards"]
    options += [f"{tmp_path}/mine.py:blue:7", "--prompts", f"{tmp_path}/train.jsonl"]
    assert train.main([*MINIATURE, *options, "--output_dir", str(tmp_path / "run")]) == 0
    log = lines(tmp_path / "run")
    assert [line["eval/rewards"] for line in log] == [[10, 11]] * 3
    for line in log[1:]:
        assert line["reward/best"] == line["reward/worst"] in (0, 1, 2)
    assert 0 < log[0]["eval/mine.py:blue"] < 1 and "reward/mine.py:blue" not in log[1]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_saved_lora_gives_the_ema_policys_images_in_a_stock_pipeline(name, tmp_path, capsys):
    """The model card's code draws as training did, and a run may start from the LoRA."""
    options = [*MINIATURE, "--model", name, "--learning_rate", "0.05"]
    options += ["--eval_steps", "3", "--output_dir"]  # of one step the time is 1 for any shift
    assert train.main([*options, str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "lora"
    card = (folder / "README.md").read_text().replace("torch.bfloat16", "torch.float32")
    code, call = card.split("```python\n")[1].split("```")[0].split("image = pipe(")
    exec(code, names := {})
    model = load(name)
    names["latents"] = noise = rollout.initial_noise([1], model.latent_shape)
    if name == "flux":
        names["latents"] = model.pipe._pack_latents(noise, 1, *noise.shape[1:])
    call = f"pipe({call.split(').images')[0]}latents=latents, output_type='pt').images"
    models.add_lora(model, rank=16, alpha=32)
    state = load_file(tmp_path / "run" / "checkpoints" / "step_000002" / "state.safetensors")
    for i, p in enumerate(models.lora_parameters(model.transformer, "ema")):
        p.data.copy_(state[f"ema.{i}"])
    drawn = {}
    for adapter in ("ema", "base"):
        with models.policy(model.transformer, adapter) as network:
            text = model.encode(["a prompt"])
            drawn[adapter] = rollout.draw(model, network, text, [1], 3)[1]
    away = {adapter: (eval(call, names) - image).abs().mean() for adapter, image in drawn.items()}
    assert away["ema"] < 1e-5 < 1e-3 < away["base"]

    capsys.readouterr()
    second = [*options, str(tmp_path / "second"), "--lora", str(folder)]
    assert train.main([*second, "--lora_rank", "8"]) == 2
    said = error_line(capsys.readouterr().err)
    assert str(folder) in said and "give --lora_rank 16" in said
    assert not (tmp_path / "second").exists() and train.main(second) == 0
    first, second = (lines(tmp_path / run) for run in ("run", "second"))
    assert second[0]["eval/rewards"] == pytest.approx(first[-1]["eval/rewards"], abs=5e-3)
    assert second[0]["eval/rewards"] != pytest.approx(first[0]["eval/rewards"], abs=2e-2)
