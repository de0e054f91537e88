"""The exercises of docs/exercises.md: every solution is applied to a copy and checked.

    python tests/test_exercises.py 3     # check your own answer to exercise 3, in this folder

A check imports the changed file and tries it on small tensors, or makes one small iteration. It
fails on the files as they are without a solution, which is tested as well.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import MINIATURE, PROJECT

import rollout
import support
from experiments import paper
from support.world import TINY

SOLUTIONS = sorted((PROJECT / "tests" / "exercises").glob("[0-9]*"))
PAGE = (PROJECT / "docs" / "exercises.md").read_text()
FILES = ("train.py", "rollout.py", "select.py", "quant.py", "reward.py", "support/models.py")


def load(folder, name):
    """The module in folder/name.py. What it imports of the project is the project's own."""
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_run(train, *options):
    """A Run of the tiny SANA with a pool of 6, of which 4 are trained on."""
    return train.Run(train.parse_options([*MINIATURE, *options]))


def rule(folder, name):
    return load(folder, "select").RULES[name]


def algorithm(folder, name, **options):
    """(the pool, what the stages say but their names) of an algorithm with these options."""
    train = load(folder, "train")
    pool, stages = train.ALGORITHMS[name](train.Config(**options))
    return pool, [tuple(stage)[1:] for stage in stages]


# ---------------------------------------------------------------------------------------------
# The checks, each a function of the folder that holds the answer


def check_1(folder):
    half = torch.zeros(1, 3, 4, 4)
    half[..., 2:] = 1  # black on the left, white on the right
    images = torch.cat([half, 0.5 * half, half + half.flip(3)])
    scores = torch.as_tensor(load(folder, "mine").symmetry(images, ["a ring"] * 3, [{}] * 3))
    assert scores.tolist() == [-1, -0.5, 0], "minus the mean difference from the mirror image"


def check_2(folder):
    even_ranks, rewards = rule(folder, "even_ranks"), [5.0, 1.0, 3.0, 2.0, 4.0]
    assert sorted(even_ranks(rewards, 3)) == [0, 1, 2], "of 5 candidates those of rank 1, 3 and 5"
    assert sorted(even_ranks(rewards, 2)) == [0, 1], "both the best and the worst"
    for n, k in [(n, k) for n in range(1, 30) for k in range(1, n + 1)]:
        assert len(set(even_ranks(range(n), k))) == k, f"{k} different indices of {n}"
    with pytest.raises(ValueError):
        even_ranks([1.0, float("nan")], 1)


def check_3(folder):
    name = "no_regeneration"
    assert algorithm(folder, name) == (96, [("nvfp4", 6, 24)]), "draws 96, keeps 24"
    other = dict(pool=40, keep=10, explore_steps=4, precision="fp8")
    assert algorithm(folder, name, **other) == (40, [("fp8", 4, 10)]), "as the options say"


def check_4(folder):
    assert sorted(rule(folder, "best_only")([5.0, 1.0, 3.0, 2.0, 4.0], 3)) == [0, 2, 4]


def check_5(folder):
    train = load(folder, "train")
    run = small_run(train)
    before = [p.clone() for p in run.policies["default"]]
    train.iteration(run, 0)
    others = {"before": before, "old": run.policies["old"], "ema": run.policies["ema"]}
    equal = {n: all(map(torch.equal, run.policies["default"], p)) for n, p in others.items()}
    assert not equal["before"], "the policy must learn"
    assert equal["old"] and not equal["ema"], "the old policy must be the policy, not the EMA"


def check_6(folder):
    train, g = load(folder, "train"), torch.Generator().manual_seed(0)
    v, v_old, v_ref, x_t, x_0 = (torch.randn(2, 2, 3, 3, generator=g) for _ in range(5))
    t = torch.tensor([0.3, 0.8])
    error = (x_t - t.reshape(2, 1, 1, 1) * v - x_0).flatten(1)
    l_plus = (error**2).mean(dim=1) / error.abs().mean(dim=1)
    expected = 5 * l_plus.mean() + 1e-4 * ((v - v_ref) ** 2).mean()
    loss, _ = train.nft_loss(v, v_old, v_ref, x_t, x_0, t, torch.tensor([1.0, -2.0]))
    assert torch.allclose(loss, expected), "whatever the advantages are, r = 1 leaves l_plus"


def check_7(folder):
    quant = load(folder, "quant")
    x = torch.zeros(1, 72)  # two blocks of 32 and one of 8
    x[0, :4] = torch.tensor([7.0, -2.4, 0.3, 0.2])  # 7 < 8: the scale is 1; 7 becomes code 6
    x[0, 20] = 0.1  # in the same block, so it becomes 0
    x[0, 32:34] = torch.tensor([1000.0, 100.0])  # the scale is 128; the codes are 6 and 1
    x[0, 64] = 0.01  # the scale is 2^-9; 5.12 becomes code 6
    expected = torch.zeros(1, 72)
    expected[0, :4] = torch.tensor([6.0, -2.0, 0.5, 0.0])
    expected[0, 32:34], expected[0, 64] = torch.tensor([768.0, 128.0]), 6 * 2.0**-9
    # Powers of two are exact in MXFP4, so a product with the identity is the quantized x.
    for weight, inputs, product in ((torch.eye(72), x, expected), (x, torch.eye(72), expected.T)):
        matmul = quant.SimulatedMatmul(weight, None, quant.PRECISIONS["mxfp4"])
        assert torch.equal(matmul(inputs), product), "weights and inputs have blocks of 1 x 32"
    network = torch.nn.Sequential(torch.nn.Linear(72, 8))
    assert quant.quantize_linears(network, "mxfp4") == [("0", 72, 8, "mxfp4")]


def check_8(folder):
    expected = [("nvfp4", 2, 48), ("nvfp4", 6, 24), ("bf16", 10, None)]
    assert algorithm(folder, "three_stages") == (96, expected)
    _, stages = algorithm(folder, "three_stages", precision="fp8")
    assert [precision for precision, *_ in stages] == ["fp8", "fp8", "bf16"], "as the option says"
    train = load(folder, "train")
    run = small_run(train, *"--algorithm three_stages --pool 8 --keep 2".split())
    first, second, third = (candidates.seeds for candidates in train.iteration(run, 0)[1])
    assert len(first) == 4 and len(second) == 2 and set(second) < set(first) and third == second


def check_9(folder):
    train, g = load(folder, "train"), torch.Generator().manual_seed(0)
    v, v_ref, x_t, x_0 = (0.1 * torch.randn(3, 2, 2, 2, generator=g) for _ in range(4))
    v.requires_grad_()
    # v_old is not v_ref, and the last argument weights a KL term, which dpo_loss has not.
    tensors = v, v + 7, v_ref, x_t, x_0, torch.tensor([0.2, 0.5, 0.9])
    for advantages, reason in (
        ([1.0, -1.0, 0.5], "the mean over all pairs, with gradients through v"),
        ([0.0, 0.0, 0.0], "no pair of different advantages: 0, not NaN"),
    ):
        arguments = *tensors, torch.tensor(advantages), 1.0, 5.0, 9.0
        loss, expected = (f(*arguments)[0] for f in (train.dpo_loss, paper.pairwise_dpo))
        assert torch.isclose(loss, expected), reason
        (gradient,), (correct,) = (torch.autograd.grad(of, v) for of in (loss, expected))
        assert torch.allclose(gradient, correct), reason
    assert "dpo_loss" in train.pairs_loss.__code__.co_names, "pairs_loss must call it"


def check_10(folder):
    train = load(folder, "train")
    run = small_run(train, "--prompts_per_step", "2")
    first, second = train.step_prompts(run.config, len(run.train.prompts), 0)

    def update(run, samples, advantages, step):
        pairs = zip(samples, advantages, strict=True)
        return {"trained": [candidates.indices[0] for candidates, _ in pairs]}

    train.update = update
    for spreads, expected, reason in (
        ((0.04, 1), [second], "0.04 is less than a tenth of the mean"),
        ((0.06, 1), [first, second], "0.06 is more than a tenth of the mean"),
        ((0, 0), [first, second], "without any spread all prompts are kept"),
    ):
        spread = dict(zip((run.train.prompts[first], run.train.prompts[second]), spreads))
        scripted = lambda images, of, _: spread[of[0]] * torch.linspace(0, 1, len(of))  # noqa
        run.reward.parts = [("scripted", 1.0, scripted)]
        assert train.iteration(run, 0)[0]["trained"] == expected, reason


def check_11(folder):
    rewards = torch.tensor([[0.0, 1.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    std = rewards.std(correction=0) + 1e-4
    expected = torch.tensor([[-1.5, -0.5, 0.5, 7.5], [0.0, 0.0, 0.0, 0.0]]) / std
    advantages = load(folder, "train").group_advantages(rewards)
    assert torch.allclose(advantages, expected), "the median is 1.5"


def check_12(folder):
    module = load(folder / "support", "models")
    with tempfile.TemporaryDirectory() as tiny, pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "models", module)
        auraflow().save_pretrained(tiny)
        model = module.load("auraflow", tiny, 32, dtype=torch.float32)
        (Path(tiny) / "mine.py").write_text("def red(images, *_): return images[:, 0, 0, 0]")
        options = (
            f"--model=auraflow --pretrained={tiny} --resolution=32 --reward={tiny}/mine.py:red"
        )
        train = load(folder, "train")
        run = small_run(train, *options.split())
    # The sampler gives what diffusers' own pipeline gives for the same noise.
    noise = rollout.initial_noise([1, 2], model.latent_shape)
    got = rollout.sample(model, model.transformer, model.encode(["a red ring"]), noise, 4)
    options = dict(height=32, width=32, num_images_per_prompt=2, output_type="latent")
    options |= dict(guidance_scale=1.0, num_inference_steps=4, latents=noise)
    expected = model.pipe("a red ring", **options, **model.call(4)).images
    assert torch.equal(got, expected), (got - expected).abs().max()
    # One iteration: layers are quantized, LoRA is found and learns.
    assert any(outcome == "nvfp4" for *_, outcome in run.layers), run.layers
    adapted = [name for name, _ in module.lora_layers(run.model.transformer)]
    assert any("add_q_proj" in name for name in adapted), "LoRA for the text's stream as well"
    before = [p.clone() for p in run.policies["default"]]
    train.iteration(run, 0)
    assert not any(map(torch.equal, before[1::2], run.policies["default"][1::2]))


def auraflow():
    """A tiny AuraFlow pipeline of random weights."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "sd3" / "tokenizer_3")
    sizes = dict(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    config = transformers.UMT5Config(vocab_size=len(tokenizer), **sizes)
    vae = dict(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=2)
    vae |= dict(down_block_types=["DownEncoderBlock2D"] * 3)
    vae |= dict(up_block_types=["UpDecoderBlock2D"] * 3)
    sizes = dict(num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, sample_size=8)
    sizes |= dict(num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=32)
    return diffusers.AuraFlowPipeline(
        tokenizer,
        transformers.UMT5EncoderModel(config),
        diffusers.AutoencoderKL(**vae),
        diffusers.AuraFlowTransformer2DModel(pos_embed_max_size=64, **sizes),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


# ---------------------------------------------------------------------------------------------
# The solutions


def check(number, folder):
    globals()[f"check_{number}"](folder)


def changed_lines(solution):
    """The number of lines that a patch adds or removes, or of all lines of a file."""
    lines = solution.read_text().splitlines()
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    return len(lines if solution.suffix == ".py" else changed)


@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_passes_its_check_and_the_unchanged_files_do_not(solution, tmp_path):
    (tmp_path / "support").mkdir()
    for name in FILES:
        shutil.copy(PROJECT / name, tmp_path / name)
    number = int(solution.name[:2])
    with pytest.raises((AssertionError, AttributeError, LookupError, OSError)):
        check(number, tmp_path)
    if solution.suffix == ".py":
        shutil.copy(solution, tmp_path / "mine.py")
    else:
        subprocess.run(["git", "apply", solution], cwd=tmp_path, check=True)
    check(number, tmp_path)


def test_the_page_has_every_exercise_with_the_lines_of_its_solution():
    stated = re.findall(r"^## (\d+)\.[\s\S]*?\*\*Lines:\*\* (\d+), at most (\d+)", PAGE, re.M)
    expected = [(str(int(path.name[:2])), str(changed_lines(path))) for path in SOLUTIONS]
    assert [(number, lines) for number, lines, _ in stated] == expected
    for number, lines, limit in stated:
        assert int(lines) <= int(limit) == {8: 20, 12: 60}.get(int(number), 15)


if __name__ == "__main__":
    try:
        check(int(sys.argv[1]), PROJECT)
    except (AttributeError, LookupError, OSError) as error:
        sys.exit(f"exercise {sys.argv[1]}: a name that it gives is missing: {error}")
    print(f"exercise {sys.argv[1]}: right")
