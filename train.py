"""Sol-RL: explore in FP4, train in BF16 (arXiv 2604.06916).

    python train.py --model sana              # the tiny SANA, two minutes on a laptop; flux, sd3
    torchrun --nproc_per_node=8 train.py ...  # on 8 GPUs

One iteration. Steps 1 to 3 are done for each of P prompts, and in them the old policy draws.
    1. Explore      an NVFP4 copy draws N images, one per seed, in few steps; they get proxy rewards
    2. Select       keep the seeds of the K / 2 best and the K / 2 worst, and nothing else
    3. Regenerate   a BF16 copy draws K images x_0 from the noise of these seeds; they get rewards R
    4. Update       compute advantages A from R alone; make one optimizer step on the DiffusionNFT
                    loss of all P K images; the old policy and the EMA follow the policy

Symbols, the same in every file
    x_0, x_t, noise   a sample, (1 - t) x_0 + t noise, standard normal noise; (n, c, h, w)
    t                 time in [0, 1]; 1 is noise
    v, v_old, v_ref   velocity (noise - x_0) by the policy, the old policy, the base model
    R, A, r           reward; advantage; A mapped to [0, 1], as the loss uses it
    beta, kl          policy mix (see nft_loss), weight of the KL term against the base model
    eta               old <- eta old + (1 - eta) policy after each iteration

Four policies share one network: the frozen base model and three LoRA adapters on it. The policy
("default") learns, the old policy ("old") draws, the EMA ("ema") is evaluated and saved.

Departures from the authors' code that change figures (docs/models.md lists all of them)
 1. FP4 is NVFP4 (NVFP4BlockScaling). The authors ask for DelayedScaling with E2M1, which runs FP8.
 2. The last of SD3.5's 10 sampling times is .25. Theirs is .009, where an image hardly changes.
 3. The tiny models have settings of their own (TINY_DEFAULTS).
"""

import dataclasses
import importlib.util
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support import checkpoint, distributed, models, world  # before torch: support prepares OpenMP

# isort: split

import torch

import quant
import rollout
from reward import Reward, build_reward
from support.clock import Clock
from support.distributed import say
from support.errors import Stopped, check_finite, exit_code, require
from support.options import check, constant, option, parse
from support.prompts import split_prompts
from support.report import UPDATE_COST, Report, evaluates_after, reward_metrics

# `import select` may give the standard library's module of that name: load ours by its path.
_spec = importlib.util.spec_from_file_location(
    "selection", Path(__file__).resolve().with_name("select.py")
)
selection = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(selection)

# ---------------------------------------------------------------------------------------------
# Algorithms and options


class Stage(NamedTuple):
    """A rollout of the old policy. The first stage draws the pool; a later stage draws the seeds
    that the stage before it kept."""

    name: str  # in the log
    precision: str  # of quant.PRECISIONS, in which the old policy draws
    steps: int  # of the sampler
    num_kept: int = None  # how many --select keeps; None keeps all, in their order


# The paper's four rollout families: functions of the options that return the size of the pool and
# the stages. The K candidates (--keep) that the last stage leaves are trained on.
ALGORITHMS = {
    "sol_rl": lambda c: (
        c.pool,
        [
            Stage("explore", c.precision, c.explore_steps, c.keep),
            Stage("regenerate", "bf16", c.rollout_steps),
        ],
    ),
    "naive_scaling": lambda c: (c.pool, [Stage("explore", "bf16", c.rollout_steps, c.keep)]),
    "naive_quant": lambda c: (c.pool, [Stage("explore", c.precision, c.rollout_steps, c.keep)]),
    "diffusionnft": lambda c: (c.keep, [Stage("explore", "bf16", c.rollout_steps, c.keep)]),
}


@dataclasses.dataclass
class Config:
    """Everything that can be set, with the paper's values. `option` makes an option of the command
    line; `constant` is changed here. A model's class overrides these values in `paper`."""

    model: str = option("sana", "SANA, FLUX.1 or Stable Diffusion 3.5", models.MODELS)
    algorithm: str = option("sol_rl", "the paper's rollout families", ALGORITHMS)
    pretrained: str = option(
        "", "diffusers folder or hub id; without a value: the published model", optional="published"
    )
    lora: str = option("", "a LoRA to start from, diffusers' or peft's: a folder, file or hub id")
    reward: str = option("clipscore", "NAME, NAME:WEIGHT,NAME:WEIGHT or path/to/file.py:function")
    eval_rewards: str = option("", "rewards that are only measured, on the held-out prompts")
    prompts: str = option("", "a .txt of prompts, or a .jsonl with 'prompt' and metadata")
    eval_prompts: str = option("", "file of held-out prompts; else every tenth prompt, at most 64")
    resolution: int = option(1024, "side of the images in pixels")

    steps: int = option(300, "iterations, with one optimizer step each")
    prompts_per_step: int = option(48, "P, prompts per iteration")
    pool: int = option(96, "N, candidates explored per prompt")
    keep: int = option(24, "K, candidates trained on per prompt; an even number")
    select: str = option("best_worst", "the rule that keeps K of N", selection.RULES)
    precision: str = option("nvfp4", "in which the pool is explored", quant.PRECISIONS)
    min_dim: int = constant(0)  # layers with max(inputs, outputs) up to this stay in BF16
    explore_steps: int = option(6, "sampling steps when exploring")
    rollout_steps: int = option(10, "sampling steps of the images that are trained on")
    eval_steps: int = option(40, "sampling steps when evaluating")
    eval_every: int = option(20, "iterations between evaluations")
    eval_images: int = constant(2)  # per held-out prompt
    micro_batch: int = option(24, "images drawn at once")

    learning_rate: float = option(3e-4, "learning rate of AdamW")
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm")
    lora_rank: int = option(32, "rank of the LoRA; its alpha is twice that")
    kl: float = option(1e-4, "weight of the KL term against the base model")
    train_micro_batch: int = option(16, "(image, time) pairs trained on at once")
    gradient_checkpointing: bool = option(True, "less memory, more time in the update")
    timestep_fraction: float = constant(0.6)  # share of the sampling times trained per image
    nft_beta: float = constant(1.0)  # beta of the NFT loss, the policy mix
    advantage_std: str = constant("all")  # std of the advantages over "all" rewards or a "prompt"'s
    adv_clip: float = constant(5.0)  # advantages are clipped to this on both sides
    ema_decay: float = constant(0.9)  # largest decay of the EMA

    seed: int = option(0, "every random number of the run follows from it")
    output_dir: str = option("", "the run's folder; default: runs/MODEL_ALGORITHM_TIME")
    checkpoint_every: int = option(5, "iterations between checkpoints")
    resume: str = option("", "a run's folder to continue, or latest: the newest run in runs/")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    report_to: str = option("none", "where metrics also go", ("none", "tensorboard", "wandb"))


TINY_DEFAULTS = dict(resolution=32, prompts_per_step=2, eval_steps=20)
TINY_DEFAULTS |= dict(micro_batch=96, train_micro_batch=144, gradient_checkpointing=False)
TINY_DEFAULTS |= dict(learning_rate=3e-3, lora_rank=16, kl=4e-2, min_dim=0, eval_images=4)
TINY_STEPS = {"sana": 40, "flux": 80, "sd3": 60}  # the tiny SANA learns faster than the others

# ---------------------------------------------------------------------------------------------
# Advantages and loss


def group_advantages(rewards, adv_clip=5.0, std_over="all"):
    """A = (R - mean over the prompt's K) / (std + 1e-4), clipped; rewards (P, K) -> float32 (P, K).

    std_over: "all" is the paper's, the std of all P * K rewards about their common mean, so that a
    prompt whose candidates hardly differ has small advantages; "prompt" is each prompt's own, as in
    GRPO. In float64 the mean of equal float32 rewards is exact, so their advantages are 0."""
    R = rewards.double()
    centred = R - R.mean(dim=1, keepdim=True)
    over = dict(dim=1, keepdim=True) if std_over == "prompt" else {}
    return (centred / (R.std(**over, correction=0) + 1e-4)).clamp(-adv_clip, adv_clip).float()


def nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, beta=1.0, adv_clip=5.0, kl=1e-4):
    """The DiffusionNFT loss (arXiv 2509.16117) with Sol-RL's self-normalized weights w. All tensors
    are (B, ...) but t and advantages, (B,). Returns (scalar loss, dict of detached scalar metrics).

    Gradients flow through v alone. At v = v_old the value of the loss does not depend on A. Its
    gradient does: it is proportional to 2 r - 1.
    """
    v_old, v_ref = v_old.detach(), v_ref.detach()
    t = t.reshape(-1, *[1] * (x_0.dim() - 1))
    r = (advantages / adv_clip).clamp(-1, 1) / 2 + 0.5  # (B,) in [0, 1]

    def weighted_error(v_branch):
        x_0_hat = x_t - t * v_branch
        error = (x_0_hat - x_0).flatten(1)
        w = error.detach().abs().mean(dim=1, keepdim=True).clamp(min=1e-5)
        return (error**2 / w).mean(dim=1)  # (B,)

    l_plus = weighted_error(beta * v + (1 - beta) * v_old)
    l_minus = weighted_error((1 + beta) * v_old - beta * v)
    policy_loss = (adv_clip / beta * (r * l_plus + (1 - r) * l_minus)).mean()
    divergence = ((v - v_ref) ** 2).mean()
    loss = policy_loss + kl * divergence
    metrics = {"loss": loss, "loss/policy": policy_loss, "kl": divergence}
    metrics["old_divergence"] = ((v - v_old) ** 2).mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------
# One iteration


def iteration(run, step):
    """One iteration of the algorithm. Returns its metrics and, for the picture, the Candidates of
    this process's first prompt that each stage kept."""
    c, model = run.config, run.model
    select = selection.RULES[c.select]
    indices = step_prompts(c, len(run.train.prompts), step)
    with run.clock("prepare"):
        texts = model.encode([run.train.prompts[index] for index in indices])
        for copy in run.copies.values():
            rollout.sync(copy, model.transformer, "old")

    drawn = []  # of each prompt, the Candidates that each stage kept
    for i, index in distributed.mine(list(enumerate(indices))):
        seeds = rollout.candidate_seeds(c.seed, step, index, run.num_candidates)
        text, kept = texts.take(i).to(c.device), []
        # In sol_rl: explore (NVFP4, 6 steps, K of N kept), then regenerate (BF16, 10 steps).
        for stage in run.stages:
            copy = run.copies[stage.precision]  # the old policy in this precision
            prompt_indices = [index] * len(seeds)
            candidates = draw(run, stage.name, copy, prompt_indices, text, seeds, stage.steps)
            # Select: nothing but the seeds reaches the next stage.
            if stage.num_kept:
                candidates = candidates.take(select(candidates.rewards, stage.num_kept))
            seeds = candidates.seeds
            kept.append(candidates)
        drawn.append(kept)

    # Advantages from the rewards of the last stage alone, over the prompts of all processes, in the
    # order of `indices`. The proxy, the first stage's reward of the same seeds, is only logged.
    scores = [kept[-1].scores | {"proxy": kept[0].rewards_of(kept[-1].seeds)} for kept in drawn]
    scores = distributed.gather(scores)
    rewards = torch.stack([of_prompt["weighted_sum"] for of_prompt in scores])  # (P, K)
    advantages = distributed.mine(group_advantages(rewards, c.adv_clip, c.advantage_std))

    with run.clock("train"):
        metrics = update(run, [kept[-1] for kept in drawn], advantages, step)
        s = step + 1  # the paper counts from 1
        models.follow(model.transformer, "old", eta=min(0.001 * s, 0.5))
        models.follow(model.transformer, "ema", eta=min((1 + s) / (10 + s), c.ema_decay))
    return metrics | reward_metrics(scores, selection.rank_fidelity), drawn[0]


def update(run, samples, advantages, step):
    """One optimizer step on the mean NFT loss over all (sample, time) pairs. Returns metrics.

    samples: the Candidates of each prompt of this process; advantages: theirs, (K,) each. To change
    the update rule, replace `pairs_loss`. To change the optimizer, replace AdamW in `Run`."""
    c, model = run.config, run.model
    policy = models.lora_parameters(model.transformer, "default")
    num_pairs = c.prompts_per_step * c.keep * num_timesteps(c)
    totals = Counter()
    for candidates, A in zip(samples, advantages):
        for chosen, t, noise in training_pairs(c, model, candidates, step):
            x_0, share = candidates.latents[chosen], len(chosen) / num_pairs
            with models.attention_for_training(c.device):
                A_of_pairs = A[chosen].to(c.device)
                loss, values = pairs_loss(c, model, candidates.text, x_0, noise, t, A_of_pairs)
                (loss * share).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in policy])
            prompt, seed = run.train.prompts[candidates.indices[0]], candidates.seeds[chosen[0]]
            check_finite("update", [prompt], [seed], loss=loss[None], gradient=norm[None])
            run.stop_flag.check()
            run.advance(UPDATE_COST * len(chosen))
            for name, value in values.items():
                totals[name] += float(value) * share
    for p in policy:
        distributed.total(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(policy, c.max_grad_norm, error_if_nonfinite=True)
    run.optimizer.step()
    run.optimizer.zero_grad()
    shares = distributed.gather([totals])
    return {name: sum(s[name] for s in shares) for name in totals} | {"grad_norm": float(norm)}


def pairs_loss(c, model, text, x_0, noise, t, advantages):
    """nft_loss of a micro-batch of B (sample, time) pairs of one prompt.

    text: models.Text of one row; x_0, noise: (B, c, h, w); t, advantages: (B,); all on the model's
    device."""
    transformer = model.transformer
    x_t = torch.lerp(x_0, noise, t[:, None, None, None])  # (1 - t) x_0 + t noise
    with torch.no_grad(), models.policy(transformer, "old"):
        v_old = model.velocity(transformer, x_t, t, text)
    with torch.no_grad(), models.policy(transformer, "base"):
        v_ref = model.velocity(transformer, x_t, t, text)
    with models.policy(transformer, "default"):
        v = model.velocity(transformer, x_t, t, text)
    return nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, c.nft_beta, c.adv_clip, c.kl)


def num_timesteps(c):
    """The number of sampling times at which each sample is trained."""
    return max(1, int(c.timestep_fraction * c.rollout_steps))


def training_pairs(c, model, candidates, step):
    """Micro-batches of a prompt's (sample, time) pairs: (indices of the samples (B,), times t (B,),
    noise (B, c, h, w)). Each sample is trained at a random choice of the sampling times, without
    repetition, each with fresh noise. The numbers follow from run seed, step and prompt."""
    times, n = rollout.sampling_times(model, c.rollout_steps), num_timesteps(c)
    g = rollout.generator("update", c.seed, step, candidates.indices[0])
    # n distinct places among the times for each sample
    places = torch.rand(len(candidates.seeds), len(times), generator=g).argsort(dim=1)[:, :n]
    chosen, t = torch.arange(len(places)).repeat_interleave(n), times[places].flatten()
    noise = torch.randn(len(chosen), *model.latent_shape, generator=g)
    for start in range(0, len(chosen), c.train_micro_batch):
        batch = slice(start, start + c.train_micro_batch)
        yield chosen[batch], t[batch].to(c.device), noise[batch].to(c.device)


def step_prompts(c, num_prompts, step):
    """Indices of the P training prompts of a step. The prompts are shuffled for each epoch; the
    rest of an epoch that does not fill a step is dropped."""
    epoch, place = divmod(step, num_prompts // c.prompts_per_step)
    order = torch.randperm(num_prompts, generator=rollout.generator("order", c.seed, epoch))
    return order[place * c.prompts_per_step :][: c.prompts_per_step].tolist()


def draw(run, stage, transformer, indices, text, seeds, steps):
    """Draw images with `transformer` and score them, one micro-batch after the other: Candidates.

    stage: "evaluate" or the name of a Stage; indices: the prompt's index for each seed, among the
    held-out or the training prompts; text: models.Text of one row for all seeds, or of a row for
    each of at most micro_batch seeds."""
    evaluating, size, parts = stage == "evaluate", run.config.micro_batch, []
    dataset, reward = (run.held_out, run.eval_reward) if evaluating else (run.train, run.reward)
    for start in range(0, len(seeds), size):
        batch = slice(start, start + size)
        part = rollout.Candidates(indices[batch], text, seeds[batch])
        with run.clock(stage):
            part.latents, images = rollout.draw(run.model, transformer, text, part.seeds, steps)
        prompts = [dataset.prompts[i] for i in part.indices]
        metadata = [dataset.metadata[i] for i in part.indices]
        check_finite(stage, prompts, part.seeds, latents=part.latents, images=images)
        rollout.seed_globals(part.seeds[0])  # a user's reward may use the global generators
        with run.clock("evaluate" if evaluating else "reward"):
            part.scores = reward.scores(images, prompts, metadata)
        named = {f"reward {name}": values for name, values in part.scores.items()}
        check_finite(stage, prompts, part.seeds, **named)
        run.stop_flag.check()
        run.advance(len(part.seeds) * steps)
        parts.append(part)
    return rollout.join(parts)


# ---------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run):
    """The Candidates of all held-out prompts, eval_images of each, side by side. The BF16 copy
    draws them with the EMA's weights, from noise that is the same in every run. Their scores are
    the reward, --eval_rewards and, for the tiny models, "accuracy" and "clear"."""
    c, n = run.config, len(run.held_out.prompts)
    indices = [i for i in range(n) for _ in range(c.eval_images)]
    seeds = [seed for i in range(n) for seed in rollout.evaluation_seeds(i, c.eval_images)]
    with run.clock("evaluate"):
        rollout.sync(run.copies["bf16"], run.model.transformer, "ema")
        texts, parts = run.model.encode(run.held_out.prompts), []
        for i in distributed.mine(range(0, len(seeds), c.micro_batch)):
            batch = slice(i, i + c.micro_batch)
            text = texts.take(indices[batch]).to(c.device)
            copy, steps = run.copies["bf16"], c.eval_steps
            part = draw(run, "evaluate", copy, indices[batch], text, seeds[batch], steps)
            parts.append(dataclasses.replace(part, text=None, latents=part.latents.cpu()))
        return rollout.join(distributed.gather(parts))


# ---------------------------------------------------------------------------------------------
# A run


class Run:
    """What an iteration works with: prompts, rewards, model, optimizer, and {precision: the merged
    copy of the transformer that draws in it}, `copies`."""

    def __init__(self, config):
        c = self.config = check(config)  # again, for a Config that was made by hand
        self.clock, self.stop_flag = Clock(c.device), checkpoint.StopFlag()
        self.advance = lambda work: None  # moves the progress bar; work: in network evaluations
        self.num_candidates, self.stages = ALGORITHMS[c.algorithm](c)
        worlds = world.TRAIN_PROMPTS, world.HELD_OUT_PROMPTS
        self.train, self.held_out, self.notes = split_prompts(c.prompts, c.eval_prompts, *worlds)
        N, P, n = self.num_candidates, c.prompts_per_step, len(self.train.prompts)
        require(c.keep <= N, f"--keep {c.keep}: must be at most --pool {N}")
        require(P <= n, f"--prompts_per_step {P}: there are {n} training prompts; give at most {n}")
        clip = None if c.pretrained else world.TINY / "clip"
        measured = []  # rewards that are not trained on
        with distributed.first_on_its_node():
            self.model = models.load(c.model, c.pretrained or None, c.resolution, device=c.device)
            self.reward = build_reward(c.reward, c.device, clip)
            if c.eval_rewards:
                measured += build_reward(c.eval_rewards, c.device, clip, "--eval_rewards").parts
        if not c.pretrained:
            prompts = self.train.prompts, self.held_out.prompts
            judges, notes = world.judges(*prompts, c.resolution)
            measured, self.notes = measured + judges, self.notes + notes
        trained = {name for name, *_ in self.reward.parts}
        measured = [(n + " (measured)" * (n in trained), 0.0, f) for n, _, f in measured]
        self.eval_reward = Reward([*self.reward.parts, *measured])
        self.copies, self.layers, self.backends = {}, [], []
        for precision in dict.fromkeys(["bf16", *(stage.precision for stage in self.stages)]):
            skip, min_dim = self.model.keep_bf16, c.min_dim
            self.copies[precision], rows = rollout.make_copy(self.model, precision, skip, min_dim)
            if c.pretrained and c.device.startswith("cuda"):
                self.copies[precision].compile()
            if precision != "bf16":
                self.layers += rows
                quantized = sum(outcome == precision for *_, outcome in rows)
                _, backend = quant.backend(precision, c.device)
                self.backends.append(f"explored in {backend}: {quantized} of {len(rows)} layers")
        if self.model.computes_in == "float32":
            self.backends.append("BF16 weights, computed in float32: this is a CPU")
        self.notes += self.model.cut_off(self.train.prompts)
        if c.gradient_checkpointing:
            self.model.transformer.enable_gradient_checkpointing()
        torch.manual_seed(c.seed)
        models.add_lora(self.model, c.lora_rank, 2 * c.lora_rank, c.lora)
        parameters = partial(models.lora_parameters, self.model.transformer)
        self.policies = {adapter: parameters(adapter) for adapter in models.ADAPTERS}
        self.optimizer = torch.optim.AdamW(
            parameters("default"), c.learning_rate, weight_decay=1e-4
        )


def train(config):
    """The whole run. A step in which a signal stops the run, or NaN is found, is thrown away; a
    resumed run draws it again."""
    c, step = config, 0
    if c.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    run = Run(c)
    saved = dataclasses.asdict(c)
    with run.stop_flag, Report(run, saved, num_timesteps(c)) as report:
        if c.resume:
            step = checkpoint.restore(c.checkpoint, run.policies, run.optimizer)
            report.resume(step)
        try:
            while True:
                last = step == c.steps
                if evaluates_after(c, step) and not report.is_evaluated(step):
                    report.evaluated(step, evaluate(run))
                if step % c.checkpoint_every == 0 or last:
                    checkpoint.save(c.output_dir, step, run.policies, run.optimizer, saved)
                if last:
                    break
                metrics, kept = iteration(run, step)
                step += 1
                report.step(step, metrics, kept)
        except Stopped:
            if report.lines:  # before the first evaluation nothing is written
                path = checkpoint.save(c.output_dir, step, run.policies, run.optimizer, saved)
                report.finish()
                say(f"stopped after {step} steps; --resume {c.output_dir} continues from {path}")
            raise
        report.finish()


def parse_options(argv=()):
    """A command line, a list of words, as a checked Config. Raises InputError."""
    paper = {name: model.paper for name, model in models.MODELS.items()}
    tiny = {
        name: paper[name] | TINY_DEFAULTS | dict(steps=steps, eval_every=steps // 4)
        for name, steps in TINY_STEPS.items()
    }
    return parse(Config, argv, paper, tiny)


def main(argv=None):
    """Run a command line (None: the program's own); returns the exit code: 0; 2 on bad input; 1 if
    numbers, memory or the disk failed; 130 after Ctrl-C; 143 after SIGTERM."""

    def run():
        with distributed.group():
            train(parse_options(sys.argv[1:] if argv is None else argv))

    return exit_code("train.py", run)


if __name__ == "__main__":
    sys.exit(main())
