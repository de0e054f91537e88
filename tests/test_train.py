"""The update, and runs of the command line at miniature size."""

import json

import pytest
import torch
from conftest import MINIATURE, MODEL_NAMES, error_line, lines, load
from safetensors.torch import load_file

import rollout
import train
from support import models, world
from support.report import reward_metrics


def prepared(*options, **constants):
    """A miniature Run without a reward, whose old policy is not the base model."""
    config = train.parse_options([*MINIATURE, *map(str, options)])
    vars(config).update(constants)
    run = train.Run(config)
    for p in run.policies["old"]:
        p.data.add_(0.05)
    return run


def scripted(*numbers):
    """A reward that hands out these numbers in turn."""
    left = iter(numbers)
    return lambda images, prompts, metadata: [float(next(left)) for _ in prompts]


# ---------------------------------------------------------------------------------------------
# Loss, advantages, update


def test_nft_loss_by_hand():
    """x_t = 1, x_0 = 0, t = 1/2: a branch with velocity u has x_0_hat = w = l = 1 - u / 2."""

    def loss(v, v_old, v_ref, advantage, **settings):
        numbers = torch.tensor([v, v_old, v_ref, 1.0, 0.0]).reshape(5, 1, 1, 1, 1)
        t, advantages = torch.tensor([0.5]), torch.tensor([advantage])
        return train.nft_loss(*numbers, t, advantages, **settings)[0].item()

    # The best sample, r = 1: u = v. The worst, r = 0: u = 2 v_old - v = -1. A_max is 5.
    assert loss(1.0, 0.0, 3.0, 5.0, kl=0.1) == pytest.approx(5 * 0.5 + 0.1 * (1 - 3) ** 2)
    assert loss(1.0, 0.0, 3.0, -5.0, kl=0.0) == pytest.approx(5 * 1.5)
    # beta = 1/2: u = (v + v_old) / 2 = 0, and u = 3/2 v_old - v / 2 = -2.
    assert loss(1.0, -1.0, 0.0, 5.0, beta=0.5, kl=0.0) == pytest.approx(5 / 0.5 * 1)
    assert loss(1.0, -1.0, 0.0, -5.0, beta=0.5, kl=0.0) == pytest.approx(5 / 0.5 * 2)


def test_advantages_by_hand():
    """The mean is a prompt's own, the deviation that of all rewards (paper) or the prompt's."""
    rewards = torch.tensor([[0.0, 2.0], [3.0, 3.0]])  # the variance of all four is 3 / 2
    of_all = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (1.5**0.5 + 1e-4)
    assert torch.allclose(train.group_advantages(rewards), of_all)
    assert train.group_advantages(rewards, adv_clip=0.5).tolist() == [[-0.5, 0.5], [0, 0]]
    own = train.group_advantages(rewards, std_over="prompt")
    assert own[0].tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001])


@pytest.mark.parametrize("reward", [0.1, 1000.1, -3e38])
def test_equal_rewards_have_no_advantage_and_are_counted(reward):
    """In float32 the mean of 24 rewards of 1000.1 is another number. In float64 it is exact."""
    equal = torch.full((2, 24), reward)
    assert train.group_advantages(equal).tolist() == [[0.0] * 24] * 2
    scores = [{"weighted_sum": row, "proxy": row} for row in (equal[0], torch.arange(24.0))]
    metrics = reward_metrics(scores, train.selection.rank_fidelity)
    assert metrics["reward/zero_spread"] == 1


# ---------------------------------------------------------------------------------------------
# An iteration


def test_an_iteration_by_hand(monkeypatch):
    """The weighted sum a - 2 b selects. The log has means over prompts, parts and pairs."""
    run = prepared("--prompts_per_step", 2, "--train_micro_batch", 3)
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


def test_each_stage_draws_with_the_old_policy_as_it_is_now_from_the_first_step_on():
    """A run that starts from a LoRA has another old policy than the base model at step 0."""
    run = prepared("--gradient_checkpointing", "true")
    assert run.model.transformer.is_gradient_checkpointing
    make = {"nvfp4": dict(skip=run.model.keep_bf16), "bf16": {}}
    copies = {p: rollout.make_copy(run.model, p, **skip)[0] for p, skip in make.items()}
    for copy in copies.values():
        rollout.sync(copy, run.model.transformer, "old")
    _, kept = train.iteration(run, 0)
    seeds = rollout.candidate_seeds(0, 0, kept[0].indices[0], 6)
    text, order = kept[0].text, [seeds.index(seed) for seed in kept[0].seeds]
    explored, _ = rollout.draw(run.model, copies["nvfp4"], text, seeds, 1)
    assert torch.equal(kept[0].latents, explored[order])
    regenerated, _ = rollout.draw(run.model, copies["bf16"], text, kept[0].seeds, 2)
    assert torch.equal(kept[1].latents, regenerated) and kept[1].seeds == kept[0].seeds


def test_every_random_number_follows_from_seed_step_and_prompt():
    run = prepared()

    def numbers(seed, step, prompt):
        """Seeds of candidates, and times and noise of the update."""
        run.config.seed = seed
        candidates = rollout.Candidates([prompt], None, [0] * 12)
        ((_, t, noise),) = train.training_pairs(run.config, run.model, candidates, step)
        return rollout.candidate_seeds(seed, step, prompt, 4), t.tolist(), noise.tolist()

    first = numbers(1, 2, 3)
    assert numbers(1, 2, 3) == first
    others = [numbers(2, 2, 3), numbers(1, 2, 4)] + [numbers(1, step, 3) for step in range(3, 103)]
    for kind in range(3):
        assert first[kind] != others[0][kind] and first[kind] != others[1][kind]
    assert first[0] not in [other[0] for other in others]
    assert first[2] not in [other[2] for other in others]
    weights = [prepared("--seed", seed).policies["default"][0] for seed in (0, 0, 1)]
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("algorithm", [*train.ALGORITHMS, "three_stages"])
def test_every_algorithm_runs_and_leaves_its_folder(algorithm, tmp_path, monkeypatch):
    """An algorithm is a list of stages. Here another one explores twice, then in FP8."""
    stages = [train.Stage("explore", "nvfp4", 1, 5), train.Stage("refine", "fp8", 1, 4)]
    stages.append(train.Stage("regenerate", "bf16", 2))
    config = train.parse_options([*MINIATURE, "--output_dir", str(tmp_path / "run")])
    monkeypatch.setitem(train.ALGORITHMS, "three_stages", lambda c: (c.pool, stages))
    config.algorithm = algorithm
    train.train(config)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = "config.json metrics.jsonl images curve.png before_after.png progress.webp lora"
    assert names == {*expected.split(), "checkpoints"}
    *_, last = lines(tmp_path / "run")
    assert last["step"] == 2 and {"reward/mean", "eval/gain", "loss", "time/explore"} <= last.keys()
    assert ("time/refine" in last) == (algorithm == "three_stages")


def test_the_classifier_judges_each_image_by_its_own_prompt_and_is_no_reward(monkeypatch):
    run = prepared("--micro_batch", 3, eval_images=2)
    held_out = run.held_out.prompts
    judged = {"accuracy": lambda p: p == held_out[1], "clear": lambda p: p != held_out[2]}

    def judge(images, prompts):
        return {name: torch.tensor([float(f(p)) for p in prompts]) for name, f in judged.items()}

    monkeypatch.setattr(world, "judge", judge)
    scores = {name: values.tolist() for name, values in train.evaluate(run).scores.items()}
    assert scores["accuracy"][:7] == [0, 0, 1, 1, 0, 0, 0]
    assert scores["clear"][:7] == [1, 1, 1, 1, 0, 0, 1]
    assert scores["weighted_sum"] == scores["clipscore"]
    assert [name for name, *_ in run.reward.parts] == ["clipscore"]


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
    options = [*MINIATURE, "--model", name, "--learning_rate", "0.05", "--output_dir"]
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
            drawn[adapter] = rollout.draw(model, network, text, [1], 1)[1]
    away = {adapter: (eval(call, names) - image).abs().mean() for adapter, image in drawn.items()}
    assert away["ema"] < 1e-5 < 1e-3 < away["base"]

    capsys.readouterr()
    second = [*options, str(tmp_path / "second"), "--lora", str(folder)]
    assert train.main([*second, "--lora_rank", "8"]) == 2
    assert f"--lora {folder} has rank 16; give that" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "second").exists() and train.main(second) == 0
    first, second = (lines(tmp_path / run) for run in ("run", "second"))
    assert second[0]["eval/rewards"] == pytest.approx(first[-1]["eval/rewards"], abs=5e-3)
    assert second[0]["eval/rewards"] != pytest.approx(first[0]["eval/rewards"], abs=2e-2)
