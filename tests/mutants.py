"""Mistakes that the tests must catch: each is put into a copy of the project, alone, and the tests
are run on the copy. (pytest does not collect this file; it takes about half a minute a mistake.)

    python tests/mutants.py             # all; prints one line for each mistake
    python tests/mutants.py follow eta  # those whose description contains one of these words

The old text of a mistake must stand in its file exactly once. A mistake that no longer fits the
code is an error before any test is run.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent
METHOD = ("tests/test_method.py", "tests/test_select.py", "tests/test_quant.py")
MODELS = (*METHOD, "tests/test_rollout.py", "tests/test_models.py")
RUNS = ("tests/test_train.py",)
RESUMED = ("tests/test_checkpoint.py",)
EXPERIMENTS = ("tests/test_paper.py",)


class Mistake(NamedTuple):
    description: str
    file: str
    old: str  # what the file says
    new: str  # what it says instead
    tests: tuple = METHOD


POOL = """            with models.policy(transformer, "old"):
                candidates ="""
V_OLD = """    with torch.no_grad(), models.policy(transformer, "old"):
        v_old"""
V_REF = """    with torch.no_grad(), models.policy(transformer, "base"):
        v_ref"""
STEP_AND_FOLLOW = """        metrics = update(run, samples, step)
        s = step + 1  # the paper counts from 1
        models.follow(transformer, "old", eta=min(0.001 * s, 0.5))
"""
FOLLOW_FIRST = "".join(STEP_AND_FOLLOW.splitlines(keepends=True)[i] for i in (1, 2, 0))
TIMES = "torch.rand(num_samples, len(times), generator=generator).argsort(dim=1)"
CLIP = (
    "    norm = torch.nn.utils.clip_grad_norm_(policy, c.max_grad_norm, error_if_nonfinite=True)\n"
)
SUM = "    distributed.total(gradient)\n"
CLIP_FIRST = "    gradient *= min(1.0, c.max_grad_norm / float(gradient.norm()))\n" + SUM
LAST_ZERO = "        run.optimizer.zero_grad()\n" + SUM
UPDATED = "    run.optimizer.step()\n    run.optimizer.zero_grad()\n"
GATHERED = "[result for results in rounds for result in results if result is not missing]"
EVALUATED = 'prompts = self.held_out if stage == "evaluate" else self.train'

MISTAKES = [
    # iteration
    Mistake(
        "advantages from the explorer's rewards",
        "train.py",
        'group_advantages(rewards["weighted_sum"],',
        "group_advantages(torch.stack(proxies),",
    ),
    Mistake(
        "old policy follows before the optimizer step", "train.py", STEP_AND_FOLLOW, FOLLOW_FIRST
    ),
    Mistake("eta of the iteration before", "train.py", "min(0.001 * s,", "min(0.001 * step,"),
    Mistake("eta without its cap", "train.py", "min(0.001 * s, 0.5)", "0.001 * s"),
    Mistake(
        "EMA without warm-up", "train.py", "min((1 + s) / (10 + s), c.ema_decay)", "c.ema_decay"
    ),
    Mistake("EMA of the iteration before", "train.py", "(1 + s) / (10 + s)", "s / (9 + s)"),
    Mistake(
        "EMA without the cap of its decay",
        "train.py",
        "min((1 + s) / (10 + s), c.ema_decay)",
        "(1 + s) / (10 + s)",
    ),
    Mistake(
        "copies given the policy's weights",
        "train.py",
        'sync(merged, transformer, "old")',
        'sync(merged, transformer, "default")',
    ),
    Mistake(
        "copies synced in the first iteration only",
        "train.py",
        "for merged in run.copies.values():",
        "for merged in run.copies.values() if step == 0 else ():",
    ),
    Mistake(
        "regenerating with the explorer",
        "train.py",
        "self.networks[stage.precision], self",
        "list(self.networks.values())[-1], self",
    ),
    Mistake(
        "regenerating with explore_steps",
        "train.py",
        'Stage("regenerate", "bf16", c.rollout_steps)',
        'Stage("regenerate", "bf16", c.explore_steps)',
    ),
    Mistake(
        "exploring with rollout_steps",
        "train.py",
        'Stage("explore", c.precision, c.explore_steps,',
        'Stage("explore", c.precision, c.rollout_steps,',
    ),
    Mistake(
        "pool drawn by the policy",
        "train.py",
        POOL,
        POOL.replace('"old"', '"old" if kept else "default"'),
    ),
    Mistake(
        "kept seeds drawn again by the policy",
        "train.py",
        POOL,
        POOL.replace('"old"', '"default" if kept else "old"'),
    ),
    Mistake(
        "the same candidates each step",
        "train.py",
        "candidate_seeds(c.seed, step, prompt,",
        "candidate_seeds(c.seed, 0, prompt,",
    ),
    Mistake(
        "the same candidates for each prompt",
        "train.py",
        "candidate_seeds(c.seed, step, prompt,",
        "candidate_seeds(c.seed, step, 0,",
    ),
    Mistake(
        "kept seeds drawn again in another order than kept",
        "train.py",
        "seeds = candidates.seeds",
        "seeds = sorted(candidates.seeds)",
    ),
    Mistake(
        "other seeds drawn again than kept",
        "train.py",
        "seeds = candidates.seeds",
        "seeds = seeds[: len(candidates.seeds)]",
    ),
    Mistake(
        "candidates of a stage not passed on to the next",
        "train.py",
        "            seeds = candidates.seeds\n",
        "",
    ),
    Mistake(
        "rewards of the kept in another order",
        "rollout.py",
        "scores = {name: values[kept] for",
        "scores = {name: values[sorted(kept)] for",
    ),
    Mistake(
        "seeds of the kept in another order than their latents",
        "rollout.py",
        "[self.seeds[i] for i in kept]",
        "[self.seeds[i] for i in sorted(kept)]",
    ),
    Mistake(
        "latents of the kept in another order than their rewards",
        "rollout.py",
        "self.latents[kept]",
        "self.latents[sorted(kept)]",
    ),
    Mistake(
        "another selection rule",
        "train.py",
        "selection.RULES[c.select]",
        "selection.mean_deviation",
    ),
    Mistake(
        "policy never follows into the EMA",
        "train.py",
        "eta=min((1 + s) / (10 + s), c.ema_decay)",
        "eta=1.0",
    ),
    # advantages
    Mistake(
        "mean over all prompts",
        "train.py",
        "rewards - rewards.mean(dim=1, keepdim=True)",
        "rewards - rewards.mean()",
    ),
    Mistake("sample deviation", "train.py", "std(**over, correction=0)", "std(**over)"),
    Mistake("advantages not clipped", "train.py", ".clamp(-adv_clip, adv_clip)", ""),
    Mistake(
        "deviation of each prompt",
        "train.py",
        'if std_over == "prompt" else {}',
        "if std_over else {}",
    ),
    Mistake(
        "advantages of another prompt than the process's own",
        "train.py",
        "zip(samples, distributed.mine(advantages))",
        "zip(samples, distributed.mine(advantages).flip(0))",
    ),
    # update
    Mistake(
        "noise shared by all times of a sample",
        "train.py",
        "seeds[of_prompt].flatten()",
        "seeds[of_prompt, :1].expand(-1, n).flatten()",
    ),
    Mistake(
        "noise shared by all samples",
        "train.py",
        "seeds[of_prompt].flatten()",
        "seeds[:1].expand(c.keep, -1).flatten()",
    ),
    Mistake(
        "the same noise at each step",
        "train.py",
        "candidate_seeds(c.seed, step, UPDATE,",
        "candidate_seeds(c.seed, 0, UPDATE,",
    ),
    Mistake(
        "the same times for all samples",
        "train.py",
        TIMES,
        "torch.rand(1, len(times), generator=generator).argsort(dim=1).expand(num_samples, -1)",
    ),
    Mistake(
        "always the first times",
        "train.py",
        TIMES,
        "torch.arange(len(times)).expand(num_samples, -1)",
    ),
    Mistake(
        "the same times with repetition",
        "train.py",
        TIMES,
        "torch.randint(len(times), (num_samples, len(times)), generator=generator)",
    ),
    Mistake("v_old of the policy", "train.py", V_OLD, V_OLD.replace('"old"', '"default"')),
    Mistake("v_ref of the old policy", "train.py", V_REF, V_REF.replace('"base"', '"old"')),
    Mistake(
        "KL against the old policy",
        "train.py",
        "divergence = ((v - v_ref) ** 2)",
        "divergence = ((v - v_old) ** 2)",
    ),
    Mistake(
        "x_t with sample and noise exchanged",
        "train.py",
        "torch.lerp(x_0, noise,",
        "torch.lerp(noise, x_0,",
    ),
    Mistake(
        "gradient summed and not averaged",
        "train.py",
        "(loss * share).backward()",
        "(loss * len(rows)).backward()",
    ),
    Mistake(
        "gradient averaged over prompts and not over pairs",
        "train.py",
        "share = len(rows) / (num_samples * num_timesteps(c))",
        "share = len(rows) / num_samples",
    ),
    Mistake(
        "another prompt's text",
        "train.py",
        "c, model, candidates.text, x_0",
        "c, model, samples[0].text, x_0",
    ),
    Mistake(
        "another prompt's advantages",
        "train.py",
        "candidates.advantages[rows]",
        "samples[0].advantages[rows]",
    ),
    Mistake(
        "advantages of the samples in another order",
        "train.py",
        "candidates.advantages[rows]",
        "candidates.advantages[rows.flip(0)]",
    ),
    Mistake(
        "max_grad_norm ignored", "train.py", CLIP, CLIP.replace("c.max_grad_norm", "float('inf')")
    ),
    Mistake("clipped before the sum over processes", "train.py", SUM, CLIP_FIRST),
    Mistake("gradient of the step before stays", "train.py", UPDATED, "    run.optimizer.step()\n"),
    Mistake("gradient of a prompt counted again with the next one", "train.py", LAST_ZERO, SUM),
    Mistake("no weight decay", "train.py", "weight_decay=1e-4", "weight_decay=0"),
    Mistake(
        "all times of one sample with the first time's t",
        "train.py",
        "times[chosen[of_prompt]].flatten()",
        "times[chosen[of_prompt, :1].expand(-1, n)].flatten()",
    ),
    # loss
    Mistake("the weight w not detached", "train.py", "error.detach().abs()", "error.abs()"),
    Mistake("w without its least value", "train.py", ".clamp(min=1e-5)", ""),
    Mistake("r not halved", "train.py", ".clamp(-1, 1) / 2 + 0.5", ".clamp(-1, 1) + 0.5"),
    Mistake(
        "signs exchanged",
        "train.py",
        "(r * l_plus + (1 - r) * l_minus)",
        "(r * l_minus + (1 - r) * l_plus)",
    ),
    Mistake("v- without beta", "train.py", "(1 + beta) * v_old - beta * v", "2 * v_old - v"),
    Mistake("A_max / beta left out", "train.py", "(adv_clip / beta * (", "(1.0 * ("),
    Mistake(
        "x_0_hat with the wrong sign",
        "train.py",
        "x_0_hat = x_t - t * v_branch",
        "x_0_hat = x_t + t * v_branch",
    ),
    Mistake(
        "w of the whole batch", "train.py", ".abs().mean(dim=1, keepdim=True)", ".abs().mean()"
    ),
    # policies
    Mistake(
        "EMA follows the old policy",
        "support/models.py",
        'default = lora_parameters(transformer, "default")',
        'default = lora_parameters(transformer, "old")',
        MODELS,
    ),
    Mistake(
        "adapters differ at the start",
        "support/models.py",
        "            p.data = value.data.float().clone()",
        "            p.data = p.data.float().clone()",
        MODELS,
    ),
    Mistake("alpha is the rank", "train.py", "2 * c.lora_rank", "c.lora_rank"),
    Mistake(
        "follow the wrong way",
        "support/models.py",
        "p.lerp_(new, 1 - eta)",
        "p.lerp_(new, eta)",
        MODELS,
    ),
    Mistake(
        "base is the policy",
        "support/models.py",
        "        transformer.disable_adapters()\n",
        "        pass\n",
        MODELS,
    ),
    Mistake(
        "merged with half of the LoRA",
        "rollout.py",
        "layer.get_delta_weight(adapter).float())",
        "layer.get_delta_weight(adapter).float() / 2)",
        MODELS,
    ),
    # evaluation
    Mistake(
        "the policy evaluated and not its EMA",
        "train.py",
        'models.policy(run.model.transformer, "ema")',
        'models.policy(run.model.transformer, "default")',
    ),
    Mistake(
        "evaluation's noise depends on the run's seed",
        "train.py",
        "candidate_seeds(0, EVALUATION, i, c.eval_images)",
        "candidate_seeds(c.seed, EVALUATION, i, c.eval_images)",
    ),
    Mistake(
        "before and after drawn from different noise",
        "train.py",
        "candidate_seeds(0, EVALUATION, i, 1)",
        "candidate_seeds(len(rows), EVALUATION, i, 1)",
    ),
    Mistake(
        "accuracy counted when only four attributes match",
        "support/world.py",
        "right.all(dim=1)",
        "(right.sum(dim=1) >= 4)",
        ("tests/test_world.py",),
    ),
    Mistake(
        "evaluation at rollout_steps", "train.py", "noise, c.eval_steps)", "noise, c.rollout_steps)"
    ),
    Mistake(
        "evaluation draws training prompts",
        "train.py",
        "run.model.encode(run.held_out.prompts)",
        "run.model.encode(run.train.prompts)",
    ),
    Mistake(
        "evaluation of the old policy",
        "train.py",
        'rollout.sync(run.copies["bf16"], transformer, "ema")',
        "pass",
    ),
    Mistake(
        "evaluation leaves its weights in the copy that regenerates",
        "train.py",
        "for merged in run.copies.values():",
        "for merged in list(run.copies.values())[1:]:",
    ),
    Mistake(
        "a copy writes into the base model's weights",
        "rollout.py",
        "        elif copied_layer.weight is base:\n"
        "            copied_layer.weight = torch.nn.Parameter(weight, requires_grad=False)\n",
        "",
        MODELS,
    ),
    Mistake(
        "SANA's times with the published shift", "support/models.py", "shift=1.0, ", "", MODELS
    ),
    Mistake(
        "SANA's prompts with the pipeline's instruction",
        "support/models.py",
        "self.instruction if self.pipeline_text else None",
        "self.instruction",
        MODELS,
    ),
    Mistake(
        "as many T5 tokens as the pipeline",
        "support/models.py",
        '"tokenizer_2": 128}',
        '"tokenizer_2": 512}',
        MODELS,
    ),
    Mistake(
        "a LoRA to start from reaches one policy only",
        "support/models.py",
        "p.data = value.data.float().clone()",
        "p.data = p.data.float()",
        RUNS,
    ),
    Mistake(
        "the micro-batch of the rollout in the update",
        "train.py",
        "part.split(c.train_micro_batch)",
        "part.split(c.micro_batch)",
    ),
    Mistake(
        "evaluation scored with training prompts",
        "train.py",
        EVALUATED,
        "prompts = self.train",
        RUNS,
    ),
    # rollout
    Mistake(
        "sampling times are not those of sample",
        "rollout.py",
        "return model.scheduler(steps).timesteps.float() / 1000",
        "return torch.linspace(1, 1 / steps, steps)",
    ),
    Mistake(
        "noise depends on its place in the micro-batch",
        "rollout.py",
        "torch.Generator().manual_seed(s)) for s in seeds]",
        "torch.Generator().manual_seed(s + i)) for i, s in enumerate(seeds)]",
    ),
    # prompts
    Mistake(
        "prompts shuffled anew at each step",
        "train.py",
        "step // (n // P), ORDER",
        "step, ORDER",
    ),
    Mistake("every pass in the same order", "train.py", "step // (n // P), ORDER", "0, ORDER"),
    Mistake(
        "prompts of a pass overlap",
        "train.py",
        "order[step % (n // P) * P :][:P]",
        "order[step % (n // P) :][:P]",
    ),
    # selection and the format, of which more mistakes are caught than are listed here
    Mistake(
        "only the best are kept",
        "select.py",
        "best = _from_highest(values)[: k // 2]",
        "best = _from_highest(values)[:k]",
    ),
    Mistake(
        "ties to the higher index",
        "select.py",
        "key=lambda i: (-values[i], i)",
        "key=lambda i: (-values[i], -i)",
    ),
    Mistake(
        "scale without 1/6",
        "quant.py",
        "scales = block_amax * (s_enc * (1 / E2M1_MAX))",
        "scales = block_amax * s_enc / 4",
    ),
    Mistake(
        "ties to the odd code",
        "quant.py",
        "torch.where(tie_down % 2 == 0, tie_down, tie_up)",
        "torch.where(tie_down % 2 == 1, tie_down, tie_up)",
    ),
    Mistake(
        "weights in 1x16 blocks",
        "quant.py",
        "values, scale = _exact_values(weight, precision, (16, 16))",
        "values, scale = _exact_values(weight, precision, (1, 16))",
    ),
    Mistake(
        "a layer keeps its old weight",
        "quant.py",
        "        self.values.copy_(values)",
        "        values",
    ),
    # a run
    Mistake(
        "layers of the model's own list quantized too",
        "train.py",
        "self.model, precision, self.model.keep_bf16, c.min_dim",
        "self.model, precision, (), c.min_dim",
        RUNS,
    ),
    Mistake(
        "proxy's ranks are those of the last stage",
        "train.py",
        "kept[0].rewards_of(seeds)",
        "kept[-1].rewards_of(seeds)",
        (*METHOD, *RUNS),
    ),
    Mistake(
        "the policy's LoRA saved and not the EMA's",
        "train.py",
        'models.save_lora(run.model, "ema",',
        'models.save_lora(run.model, "default",',
        RUNS,
    ),
    Mistake(
        "old policy restored from the policy",
        "support/checkpoint.py",
        "policies[owner][int(i)].copy_(tensor)",
        'policies[owner][int(i)].copy_(checkpoint.tensors[f"default.{i}"])',
        RESUMED,
    ),
    Mistake(
        "a resumed run begins one step later",
        "train.py",
        "done, c.checkpoint = c.checkpoint.step, None",
        "done, c.checkpoint = c.checkpoint.step + 1, None",
        RESUMED,
    ),
    Mistake(
        "results gathered process by process",
        "support/distributed.py",
        GATHERED,
        "[result for share in shares for result in share]",
        ("tests/test_distributed.py",),
    ),
    # experiments
    Mistake(
        "experiments: leads have the other sign",
        "experiments/paper.py",
        "reference.rewards[-1] - run.rewards[-1]),",
        "run.rewards[-1] - reference.rewards[-1]),",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: a milestone is the evaluation after it",
        "experiments/paper.py",
        "return step + (target - value) / (next_value - value) * (next_step - step)",
        "return next_step",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: regenerating is not counted as a cost",
        "experiments/paper.py",
        "for stage in stages:",
        "for stage in stages[:1]:",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: a run that does not get there is left out of a mean",
        "experiments/paper.py",
        "missing = sum(not math.isfinite(value) for value in values)",
        "values, missing = [value for value in values if math.isfinite(value)], 0",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: other_text gives the prompt's own text",
        "experiments/controls.py",
        "zip(samples, texts[1:] + texts[:1])",
        "zip(samples, texts)",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: weights_one makes r one half",
        "experiments/controls.py",
        "torch.full_like(rewards, adv_clip)",
        "torch.zeros_like(rewards)",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: advantage-weighted regression avoids the worst",
        "experiments/controls.py",
        "(advantages / adv_clip).clamp(0, 1)",
        "(advantages / adv_clip).clamp(-1, 1)",
        EXPERIMENTS,
    ),
    Mistake(
        "experiments: old_fixed holds the EMA too",
        "experiments/controls.py",
        'follow(transformer, follower, 1.0 if follower == "old" else eta)',
        "follow(transformer, follower, 1.0)",
        EXPERIMENTS,
    ),
]


def text_with(mistake):
    """The text of the mistake's file with the mistake in it. Raises SystemExit if none fits."""
    text = (PROJECT / mistake.file).read_text()
    if text.count(mistake.old) != 1:
        count = f"stands {text.count(mistake.old)} times in {mistake.file}"
        raise SystemExit(f"{mistake.description}: {count}: {mistake.old!r}")
    return text.replace(mistake.old, mistake.new)


def survives(mistake):
    """Whether the tests pass on a copy of the project with this mistake in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", ".hypothesis")
        shutil.copytree(PROJECT, copy, ignore=ignore)
        (copy / mistake.file).write_text(text_with(mistake))
        run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mistake.tests]
        done = subprocess.run(run, cwd=copy, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result = "SURVIVED" if done.returncode == 0 else "caught"
    print(f"{result:8}  {mistake.description}", *failed[:1], flush=True)
    return done.returncode == 0


def main(words):
    for mistake in MISTAKES:
        text_with(mistake)
    chosen = [m for m in MISTAKES if not words or any(word in m.description for word in words)]
    survivors = [mistake.description for mistake in chosen if survives(mistake)]
    print(f"{len(survivors)} of {len(chosen)} survived: {', '.join(survivors) or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
