"""Mistakes that the tests must catch: each is put into a copy of the project, alone, and the tests
are run on the copy. (pytest does not collect this file; it takes about half a minute a mistake.)

    python tests/mutants.py             # all; prints one line for each mistake
    python tests/mutants.py follow eta  # those whose description contains one of these words

A mistake is (description, file, what the file says, what it says instead). What is replaced must
stand in the file exactly once, so that a mistake that no longer fits the code is an error.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parent.parent
TESTS = ["tests/test_method.py", "tests/test_select.py", "tests/test_quant.py"]
OTHER_TESTS = {"models.py": ["tests/test_rollout.py"], "reward.py": ["tests/test_reward.py"]}

POLICY_OLD = """        with models.policy(transformer, "old"):
            drawer = run.explorer if family.quantized else run.drawer
"""
REGENERATE_OLD = """            with models.policy(transformer, "old"):
                samples = rollout(run, "regenerate", run.drawer, row, [seeds[i] for i in kept])
"""
V_OLD = """                with torch.no_grad(), models.policy(transformer, "old"):
                    v_old"""
V_REF = """                with torch.no_grad(), models.policy(transformer, "base"):
                    v_ref"""
STEP_AND_FOLLOW = """        metrics = update(run, [samples.latents for samples in trained], rows, advantages, step)
        models.follow(transformer, "old", eta=min(0.001 * (step + 1), 0.5))
"""
FOLLOW_FIRST = "\n".join(reversed(STEP_AND_FOLLOW.rstrip("\n").split("\n"))) + "\n"
NOISE = "                noise = initial_noise(here, model.latent_shape).to(c.device)\n"
TEXT = "            text = run.train.text.take([rows[place]] * len(part)).to(c.device)\n"
CLIP = "    norm = torch.nn.utils.clip_grad_norm_(policy, c.max_grad_norm)\n"
SUM = "    distributed.total(gradient)\n"
CLIP_FIRST = "    gradient *= min(1.0, c.max_grad_norm / float(gradient.norm()))\n" + SUM
SCORES = "zip(*[(e.rewards, t.scores) for e, t in zip(explored, trained)])"

MISTAKES = [
    # iteration
    (
        "advantages from the explorer's rewards",
        "train.py",
        "[(e.rewards, t.scores) for e, t in zip(explored, trained)]",
        "[(e.rewards, e.scores) for e, t in zip(explored, trained)]",
    ),
    ("old policy follows before the optimizer step", "train.py", STEP_AND_FOLLOW, FOLLOW_FIRST),
    ("eta of the iteration before", "train.py", "0.001 * (step + 1)", "0.001 * step"),
    ("eta without its cap", "train.py", "min(0.001 * (step + 1), 0.5)", "0.001 * (step + 1)"),
    (
        "explorer given the policy's weights",
        "train.py",
        'models.sync(run.explorer, transformer, "old")',
        'models.sync(run.explorer, transformer, "default")',
    ),
    (
        "explorer synced in the first iteration only",
        "train.py",
        "    if family.quantized:\n        with run.clock",
        "    if family.quantized and step == 0:\n        with run.clock",
    ),
    (
        "regenerating with the explorer",
        "train.py",
        REGENERATE_OLD,
        REGENERATE_OLD.replace("run.drawer", "run.explorer"),
    ),
    (
        "regenerating with explore_steps",
        "train.py",
        "c.explore_steps if proxy else c.rollout_steps",
        "c.explore_steps",
    ),
    (
        "exploring with rollout_steps",
        "train.py",
        "c.explore_steps if proxy else c.rollout_steps",
        "c.rollout_steps",
    ),
    ("pool drawn by the policy", "train.py", POLICY_OLD, POLICY_OLD.replace('"old"', '"default"')),
    (
        "kept seeds drawn again by the policy",
        "train.py",
        REGENERATE_OLD,
        REGENERATE_OLD.replace('"old"', '"default"'),
    ),
    (
        "the same candidates each step",
        "train.py",
        "seeds = candidate_seeds(c.seed, step, row, c.pool",
        "seeds = candidate_seeds(c.seed, 0, row, c.pool",
    ),
    (
        "the same candidates for each prompt",
        "train.py",
        "seeds = candidate_seeds(c.seed, step, row, c.pool",
        "seeds = candidate_seeds(c.seed, step, 0, c.pool",
    ),
    (
        "kept seeds drawn again in another order than kept",
        "train.py",
        "[seeds[i] for i in kept]",
        "[seeds[i] for i in sorted(kept)]",
    ),
    (
        "other seeds drawn again than kept",
        "train.py",
        "[seeds[i] for i in kept]",
        "seeds[: len(kept)]",
    ),
    (
        "rewards of the kept in another order",
        "train.py",
        "scores = {name: values[kept] for",
        "scores = {name: values[sorted(kept)] for",
    ),
    (
        "another selection rule",
        "train.py",
        "getattr(selection, c.select)",
        "selection.mean_deviation",
    ),
    ("policy never follows into the EMA", "train.py", "eta=c.ema_decay", "eta=1.0"),
    # advantages
    (
        "mean over all prompts",
        "train.py",
        "rewards - rewards.mean(dim=1, keepdim=True)",
        "rewards - rewards.mean()",
    ),
    ("sample deviation", "train.py", "std(**over, correction=0)", "std(**over)"),
    ("advantages not clipped", "train.py", ".clamp(-adv_clip, adv_clip)", ""),
    (
        "deviation of each prompt",
        "train.py",
        'if std_over == "prompt" else {}',
        "if std_over else {}",
    ),
    # update
    (
        "noise shared by all times of a sample",
        "train.py",
        "[seeds[i * trained + j] for i in part]",
        "[seeds[i * trained] for i in part]",
    ),
    (
        "noise shared by all samples",
        "train.py",
        "[seeds[i * trained + j] for i in part]",
        "[seeds[j] for i in part]",
    ),
    (
        "the same noise at each step",
        "train.py",
        "candidate_seeds(c.seed, step, UPDATE, 1 + n * trained)",
        "candidate_seeds(c.seed, 0, UPDATE, 1 + n * trained)",
    ),
    (
        "the same times for all samples",
        "train.py",
        "torch.rand(n, len(times), generator=shuffle).argsort(dim=1)",
        "torch.rand(1, len(times), generator=shuffle).argsort(dim=1).expand(n, -1)",
    ),
    (
        "always the first times",
        "train.py",
        "torch.rand(n, len(times), generator=shuffle).argsort(dim=1)",
        "torch.arange(len(times)).expand(n, -1)",
    ),
    (
        "the same times with repetition",
        "train.py",
        "torch.rand(n, len(times), generator=shuffle).argsort(dim=1)",
        "torch.randint(len(times), (n, len(times)), generator=shuffle)",
    ),
    ("v_old of the policy", "train.py", V_OLD, V_OLD.replace('"old"', '"default"')),
    ("v_ref of the old policy", "train.py", V_REF, V_REF.replace('"base"', '"old"')),
    (
        "KL against the old policy",
        "train.py",
        "divergence = ((v - v_ref) ** 2)",
        "divergence = ((v - v_old) ** 2)",
    ),
    (
        "x_t with sample and noise exchanged",
        "train.py",
        "torch.lerp(target, noise,",
        "torch.lerp(noise, target,",
    ),
    (
        "gradient summed and not averaged",
        "train.py",
        "(loss * share).backward()",
        "(loss * len(part)).backward()",
    ),
    (
        "gradient averaged over prompts and not over pairs",
        "train.py",
        "share = len(part) / (n * trained)",
        "share = len(part) / n",
    ),
    (
        "another prompt's text",
        "train.py",
        TEXT,
        TEXT.replace("rows[place]", "rows[place - 1]"),
    ),
    (
        "another prompt's advantages",
        "train.py",
        "advantages[place, part]",
        "advantages[place - 1, part]",
    ),
    (
        "advantages of the samples in another order",
        "train.py",
        "advantages[place, part]",
        "advantages[place, part.flip(0)]",
    ),
    (
        "max_grad_norm ignored",
        "train.py",
        CLIP,
        CLIP.replace("c.max_grad_norm", "float('inf')"),
    ),
    ("clipped before the sum over processes", "train.py", SUM, CLIP_FIRST),
    (
        "gradient of the step before stays",
        "train.py",
        "        run.optimizer.zero_grad()\n    metrics = distributed",
        "    metrics = distributed",
    ),
    ("no weight decay", "train.py", "weight_decay=1e-4", "weight_decay=0"),
    (
        "all times of one sample with the first time's t",
        "train.py",
        "t, here = times[which[part, j]]",
        "t, here = times[which[part, 0]]",
    ),
    # loss
    ("the weight w not detached", "train.py", "error.detach().abs()", "error.abs()"),
    ("w without its least value", "train.py", ".clamp(min=1e-5)", ""),
    ("r not halved", "train.py", ".clamp(-1, 1) / 2 + 0.5", ".clamp(-1, 1) + 0.5"),
    (
        "signs exchanged",
        "train.py",
        "(r * l_plus + (1 - r) * l_minus)",
        "(r * l_minus + (1 - r) * l_plus)",
    ),
    ("v- without beta", "train.py", "(1 + beta) * v_old - beta * v", "2 * v_old - v"),
    ("A_max / beta left out", "train.py", "(adv_clip / beta * (", "(1.0 * ("),
    (
        "x_0_hat with the wrong sign",
        "train.py",
        "x_0_hat = x_t - t * v_sign",
        "x_0_hat = x_t + t * v_sign",
    ),
    ("w of the whole batch", "train.py", ".abs().mean(dim=1, keepdim=True)", ".abs().mean()"),
    # policies
    (
        "EMA follows the old policy",
        "models.py",
        'lora_parameters(transformer, follower), lora_parameters(transformer, "default")',
        'lora_parameters(transformer, follower), lora_parameters(transformer, "old")',
    ),
    (
        "adapters differ at the start",
        "models.py",
        "            p.data = first.data.float().clone()",
        "            p.data = p.data.float().clone()",
    ),
    ("alpha is the rank", "train.py", "alpha=2 * c.lora_rank", "alpha=c.lora_rank"),
    ("follow the wrong way", "models.py", "p.lerp_(new, 1 - eta)", "p.lerp_(new, eta)"),
    (
        "base is the policy",
        "models.py",
        "        transformer.disable_adapters()\n",
        "        pass\n",
    ),
    (
        "merged with half of the LoRA",
        "models.py",
        "layer.get_delta_weight(adapter).float())",
        "layer.get_delta_weight(adapter).float() / 2)",
    ),
    # evaluation
    (
        "the policy evaluated and not its EMA",
        "train.py",
        'models.policy(run.model.transformer, "ema")',
        'models.policy(run.model.transformer, "default")',
    ),
    (
        "evaluation's noise depends on the run's seed",
        "train.py",
        "candidate_seeds(0, EVALUATION, i, c.eval_images)",
        "candidate_seeds(c.seed, EVALUATION, i, c.eval_images)",
    ),
    ("evaluation at rollout_steps", "train.py", "noise, c.eval_steps)", "noise, c.rollout_steps)"),
    # rollout
    (
        "sampling times are not those of sample",
        "rollout.py",
        "return model.scheduler(steps).timesteps.float() / 1000",
        "return torch.linspace(1, 1 / steps, steps)",
    ),
    (
        "noise depends on its place in the micro-batch",
        "rollout.py",
        "torch.Generator().manual_seed(s)) for s in seeds]",
        "torch.Generator().manual_seed(s + i)) for i, s in enumerate(seeds)]",
    ),
    # prompts
    ("prompts shuffled anew at each step", "train.py", "step // in_pass, ORDER", "step, ORDER"),
    ("every pass in the same order", "train.py", "step // in_pass, ORDER", "0, ORDER"),
    (
        "prompts of a pass overlap",
        "train.py",
        "order[step % in_pass * P :][:P]",
        "order[step % in_pass :][:P]",
    ),
    # selection and the format, of which more mistakes are caught than are listed here
    (
        "only the best are kept",
        "select.py",
        "best = _order(values)[: k // 2]",
        "best = _order(values)[:k]",
    ),
    (
        "ties to the higher index",
        "select.py",
        "key=lambda i: (-values[i], i)",
        "key=lambda i: (-values[i], -i)",
    ),
    (
        "scale without 1/6",
        "quant.py",
        "scales = block_amax * (s_enc * (1 / E2M1_MAX))",
        "scales = block_amax * s_enc / 4",
    ),
    (
        "ties to the odd code",
        "quant.py",
        "torch.where(below % 2 == 0, below, above)",
        "torch.where(below % 2 == 1, below, above)",
    ),
    (
        "weights in 1x16 blocks",
        "quant.py",
        "values, scale = _exact_values(weight, precision, (16, 16))",
        "values, scale = _exact_values(weight, precision, (1, 16))",
    ),
    (
        "a layer keeps its old weight",
        "quant.py",
        "        self.values.copy_(values)  # in place: a compiled model goes on reading these\n",
        "",
    ),
]


def survives(description, file, old, new):
    """Whether the tests pass on a copy of the project with this mistake in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", ".hypothesis")
        shutil.copytree(PROJECT, copy, ignore=ignore)
        text = (copy / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{description}: stands {text.count(old)} times in {file}: {old!r}")
        (copy / file).write_text(text.replace(old, new))
        tests = TESTS + OTHER_TESTS.get(file, [])
        run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(run, cwd=copy, capture_output=True, text=True)
        last = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(
            f"{'SURVIVED' if done.returncode == 0 else 'caught':8}  {description}",
            *last[:1],
            flush=True,
        )
        return done.returncode == 0


def main(words):
    chosen = [m for m in MISTAKES if not words or any(word in m[0] for word in words)]
    survivors = [m[0] for m in chosen if survives(*m)]
    print(f"{len(survivors)} of {len(chosen)} survived: {', '.join(survivors) or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
