"""Sol-RL: explore in FP4, train in BF16 (arXiv 2604.06916).

    python train.py --model sana              # the tiny SANA, a few minutes on a laptop; flux, sd3
    torchrun --nproc_per_node=8 train.py ...  # on 8 GPUs
    python train.py --help                    # every option and its default

One iteration; steps 1 to 3 are for each of P prompts:
    1. Explore      the NVFP4 copy of the old policy draws N seeds in few steps; they are scored
    2. Select       the K / 2 best and the K / 2 worst seeds; the FP4 images are thrown away
    3. Regenerate   the BF16 copy of the old policy draws K images from the noise of these seeds in
                    more steps; they are scored again
    4. Update       advantages from the BF16 rewards; the DiffusionNFT loss on these K images, in
                    BF16 with LoRA; one optimizer step for all prompts; then the old policy and
                    the EMA follow the policy

Symbols, the same in every file
    x_0, x_t, noise   a sample, (1 - t) x_0 + t noise, standard normal noise; (n, c, h, w)
    t                 time in [0, 1]; 1 is noise
    v, v_old, v_ref   velocity (noise - x_0) by the policy, the old policy, the base model
    R, A, r           reward; advantage; A mapped to [0, 1], as the loss uses it
    N, K, P           pool (96), kept (24), prompts per iteration (48)
    beta, kl          policy mix (Config.nft_beta), weight of the KL term against the base model
    eta               old <- eta * old + (1 - eta) * policy after each iteration

Four policies share one network: the base model, and three LoRA adapters on it. The policy
("default") learns, the old policy ("old") draws, the EMA ("ema") is evaluated and saved. Images are
drawn by copies of the network with the LoRA of the old policy (or the EMA) merged into the weights.
A CPU without fast BF16 computes with the same BF16 weights in float32 (docs/precision.md).
With --low_memory the network itself draws those in BF16.

Departures. The authors' code is the authority where it differs from the paper's text; there, too,
the old policy draws.
 1. Quantized layers. Authors: q, k and v are one layer, SANA's feed-forward is linear layers. Here:
    diffusers' layout, where q, k and v are apart and that feed-forward is 1x1 convolutions, which
    count as linear layers. The k and v of SANA's cross-attention are then too small for the paper's
    rule (Config.min_dim) and stay in BF16.
 2. FP4. Authors: Transformer Engine's DelayedScaling with E2M1, which runs FP8. Here:
    NVFP4BlockScaling.
 3. SD3.5's times. Authors: spaced down to nearly 0; the last of 10 is .009, where an image hardly
    changes. Here: the last is .25.
 4. The LoRA in the update of FLUX.1 and SD3.5. Authors: under BF16 autocast. Here, as for SANA in
    both: float32 between BF16 layers. (Float32 matmuls use TF32 on a GPU.)
 5. The autoencoders of FLUX.1 and SD3.5. Authors: float32 under autocast. Here: BF16.
 6. CLIPScore's picture. Authors: resized in floating point, bilinear. Here: to 8 bits, bicubic, as
    CLIP was trained.
 7. SANA's text. Authors: padded to 300 tokens. Here: to the longest prompt of the step; padding is
    masked in both.
 8. Evaluation. Authors: one image a prompt, the first GPU's share of the prompts, for SANA by a
    stochastic solver. Here: two images, all held-out prompts, the solver of the rollout.
 9. The tiny models have settings of their own (TINY_DEFAULTS in support/options.py).
"""

import sys
from pathlib import Path

from support.options import answer_at_once

if __name__ == "__main__":
    answer_at_once(sys.argv[1:], __doc__)  # --help and wrong options, before torch is loaded

import dataclasses
import importlib.util
from collections import Counter
from typing import NamedTuple

import torch

import quant
import rollout
from reward import build_reward, read_spec
from support import checkpoint, distributed, models, world
from support.clock import Clock
from support.distributed import say
from support.errors import InputError, NonFinite, Stopped, check_finite, exit_code, require
from support.options import parse
from support.prompts import split_prompts
from support.report import Report, reward_metrics

# `import select` may give the standard library's module of that name: load ours by its path.
_spec = importlib.util.spec_from_file_location("selection", Path(__file__).with_name("select.py"))
selection = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(selection)


class Stage(NamedTuple):
    """A rollout of the old policy: the first stage draws the pool; a later stage draws the seeds
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

# For the progress bar: an (image, time) pair of the update takes about as long as this many
# evaluations of the network in a rollout. Three are forward and one backward, which counts twice.
UPDATE_COST = 5

# Numbers that candidate_seeds gets in the place of a step or a prompt, which are never this large.
UPDATE, EVALUATION, ORDER = 2**32 - 1, 2**32 - 2, 2**32 - 3


# ---------------------------------------------------------------------------------------------
# Advantages and loss


def group_advantages(rewards, adv_clip=5.0, std_over="all"):
    """A = (R - mean over the prompt's K) / (std + 1e-4), clipped; rewards (P, K) -> (P, K).

    std_over: "all" is the paper's, the std of all P * K rewards about their common mean, so that a
    prompt whose candidates hardly differ has small advantages; "prompt" is each prompt's own, as in
    GRPO. If all rewards of a prompt are equal, rounding of the mean must not give it advantages."""
    differ = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)) * differ
    over = dict(dim=1, keepdim=True) if std_over == "prompt" else {}
    return (centred / (rewards.std(**over, correction=0) + 1e-4)).clamp(-adv_clip, adv_clip)


def nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, beta=1.0, adv_clip=5.0, kl=1e-4):
    """The DiffusionNFT loss (arXiv 2509.16117) with Sol-RL's self-normalized weights w. All tensors
    are (B, ...) but t and advantages, (B,). Returns (scalar loss, dict of detached scalar metrics).

    Gradients flow through v alone. At v = v_old the value does not depend on the advantages, but
    the gradient does, as 2 r - 1.
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
    c, transformer = run.config, run.model.transformer
    select = selection.RULES[c.select]

    # Sync: the copies that draw get the weights of the old policy, merged with its LoRA; the
    # explorer's are quantized.
    prompts = run.prompts_of(step)
    with run.clock("prepare"):
        for merged in run.copies.values():
            rollout.sync(merged, transformer, "old")
        texts = run.model.encode([run.train.prompts[prompt] for prompt in prompts])

    samples, proxies, shown = [], [], None
    for i, prompt in distributed.mine(list(enumerate(prompts))):
        text = texts.take(i).to(c.device)
        seeds = rollout.candidate_seeds(c.seed, step, prompt, run.num_candidates)
        kept = []
        for stage in run.stages:
            # Explore or regenerate: the old policy draws these seeds, quantized or in BF16.
            with models.policy(transformer, "old"):
                candidates = run.rollout(stage, prompt, text, seeds)

            # Select: the next stage gets only the seeds of the kept candidates.
            if stage.num_kept:
                candidates = candidates.take(select(candidates.rewards, stage.num_kept))
            seeds = candidates.seeds
            kept.append(candidates)
        samples.append(candidates)  # of the last stage
        proxies.append(kept[0].rewards_of(seeds))
        shown = shown or kept

    # Advantages: from the rewards of the last stage, whose candidates are trained on.
    scores = distributed.gather([candidates.scores for candidates in samples])
    rewards = {name: torch.stack([part[name] for part in scores]) for name in scores[0]}  # (P, K)
    advantages = group_advantages(rewards["weighted_sum"], c.adv_clip, c.advantage_std)
    for candidates, row in zip(samples, distributed.mine(advantages)):
        candidates.advantages = row

    # Update the policy; then the old policy and the EMA follow it.
    with run.clock("train"):
        metrics = update(run, samples, step)
        s = step + 1  # the paper counts from 1
        models.follow(transformer, "old", eta=min(0.001 * s, 0.5))
        models.follow(transformer, "ema", eta=min((1 + s) / (10 + s), c.ema_decay))

    proxies = distributed.gather(proxies)
    metrics |= reward_metrics(proxies, rewards, selection.rank_fidelity)
    return metrics, shown


def update(run, samples, step):
    """One optimizer step on the mean NFT loss over all (sample, time) pairs. samples: a list of
    Candidates with advantages, of this process's prompts. Returns metrics."""
    c, model = run.config, run.model
    policy = models.lora_parameters(model.transformer, "default")
    num_samples = sum(distributed.gather([len(candidates.seeds) for candidates in samples]))
    sizes = [p.numel() for p in policy]
    gradient = torch.zeros(sum(sizes), dtype=torch.float64, device=c.device)
    metrics = []
    for candidates, pairs in zip(samples, training_pairs(c, model, step)):
        prompt, sums = run.train.prompts[candidates.prompt], Counter()
        for rows, t, seeds in pairs:  # a micro-batch of (sample, time) pairs, each with fresh noise
            noise = rollout.initial_noise(seeds, model.latent_shape).to(c.device)
            x_0, advantages = candidates.latents[rows], candidates.advantages[rows].to(c.device)
            share = len(rows) / (num_samples * num_timesteps(c))
            with models.attention_for_training(c.device):
                loss, values = pairs_loss(
                    c, model, candidates.text, x_0, noise, t.to(c.device), advantages
                )
                (loss * share).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in policy])
            run.guard("update", [prompt], seeds, loss=loss[None], gradient=norm[None])
            run.advance(UPDATE_COST * len(rows))
            for name, value in values.items():
                sums[name] += float(value) * share
        metrics.append(sums)
        # In float64, so that the sum is the same however prompts are shared out over processes.
        gradient += torch.cat([p.grad.flatten() for p in policy])
        run.optimizer.zero_grad()
    distributed.total(gradient)
    for p, summed in zip(policy, gradient.split(sizes)):
        p.grad = summed.reshape(p.shape).to(p.dtype)
    norm = torch.nn.utils.clip_grad_norm_(policy, c.max_grad_norm, error_if_nonfinite=True)
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics = distributed.gather(metrics)
    totals = {name: sum(sums[name] for sums in metrics) for name in metrics[0]}
    return totals | {"grad_norm": float(norm)}


def pairs_loss(config, model, text, x_0, noise, t, advantages):
    """nft_loss of a micro-batch of B (sample, time) pairs of one prompt.

    text: models.Text of one row; x_0, noise: (B, c, h, w); t, advantages: (B,); all on the model's
    device."""
    transformer, text = model.transformer, text.take([0] * len(x_0))
    x_t = torch.lerp(x_0, noise, t[:, None, None, None])  # (1 - t) x_0 + t noise
    with torch.no_grad(), models.policy(transformer, "old"):
        v_old = model.velocity(transformer, x_t, t, text)
    with torch.no_grad(), models.policy(transformer, "base"):
        v_ref = model.velocity(transformer, x_t, t, text)
    v = model.velocity(transformer, x_t, t, text)
    settings = config.nft_beta, config.adv_clip, config.kl
    return nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, *settings)


def num_timesteps(config):
    """The number of sampling times at which each sample is trained."""
    return max(1, int(config.timestep_fraction * config.rollout_steps))


def training_pairs(config, model, step):
    """For each prompt of this process, its micro-batches of (sample, time) pairs: (indices of the
    prompt's samples, times t (n,), seeds of the noise). Each sample has a random choice of the
    sampling times without repetition, and noise of its own for each."""
    c, num_samples = config, config.prompts_per_step * config.keep
    times, n = rollout.sampling_times(model, c.rollout_steps), num_timesteps(c)
    first, *seeds = rollout.candidate_seeds(c.seed, step, UPDATE, 1 + num_samples * n)
    generator = torch.Generator().manual_seed(first)
    chosen = torch.rand(num_samples, len(times), generator=generator).argsort(dim=1)[:, :n]
    seeds = torch.tensor(seeds).reshape(num_samples, n)
    for prompt in distributed.mine(range(c.prompts_per_step)):
        of_prompt = slice(prompt * c.keep, (prompt + 1) * c.keep)
        rows = torch.arange(c.keep).repeat_interleave(n)
        pairs = rows, times[chosen[of_prompt]].flatten(), seeds[of_prompt].flatten()
        micro_batches = zip(*(part.split(c.train_micro_batch) for part in pairs))
        yield [(i, t, noise_seeds.tolist()) for i, t, noise_seeds in micro_batches]


def evaluate(run):
    """{reward, "accuracy" or "clear": list of its means on each held-out prompt}, for images that
    the EMA policy draws in BF16, from noise that is the same in every run."""
    c, n = run.config, len(run.held_out.prompts)
    rows = [i for i in range(n) for _ in range(c.eval_images)]
    seeds = [s for i in range(n) for s in rollout.candidate_seeds(0, EVALUATION, i, c.eval_images)]
    scores = []
    with models.policy(run.model.transformer, "ema") as transformer, run.clock("evaluate"):
        if not c.low_memory:
            rollout.sync(run.copies["bf16"], transformer, "ema")
        texts = run.model.encode(run.held_out.prompts)
        for i in distributed.mine(range(0, len(rows), c.micro_batch)):
            batch = slice(i, i + c.micro_batch)
            _, batch_scores = draw_held_out(
                run, run.networks["bf16"], texts, rows[batch], seeds[batch]
            )
            scores.append(batch_scores)
            run.advance(len(rows[batch]) * c.eval_steps)
    scores = rollout.join_scores(distributed.gather(scores))
    return {name: v.reshape(n, -1).mean(dim=1).tolist() for name, v in scores.items()}


def before_after(run):
    """(At most 8 held-out prompts; a row (label, images, scores) of the base model and one of the
    EMA policy). Both draw the first evaluation image of each prompt; rounding may differ."""
    c, n = run.config, len(run.held_out.prompts)
    chosen, pictures = sorted({i * n // 8 for i in range(8)}), []
    seeds = [rollout.candidate_seeds(0, EVALUATION, i, 1)[0] for i in chosen]
    texts = run.model.encode(run.held_out.prompts)
    for label, policy in (("base model", "base"), (f"after {c.steps} steps", "ema")):
        images, scores = [], []
        with models.policy(run.model.transformer, policy) as transformer:
            for i in range(0, len(chosen), c.micro_batch):
                batch = slice(i, i + c.micro_batch)
                drawn = draw_held_out(run, transformer, texts, chosen[batch], seeds[batch])
                images.append(drawn[0])
                scores.append(drawn[1])
        pictures.append((label, torch.cat(images), rollout.join_scores(scores)))
    return [run.held_out.prompts[i] for i in chosen], pictures


def draw_held_out(run, network, texts, rows, seeds):
    """(images, scores) of a micro-batch of held-out prompts, with these indices and seeds. texts:
    models.Text of all held-out prompts."""
    rollout.seed_globals(seeds[0])
    noise = rollout.initial_noise(seeds, run.model.latent_shape)
    text = texts.take(rows).to(run.config.device)
    x_0 = rollout.sample(run.model, network, text, noise, run.config.eval_steps)
    images = run.model.decode(x_0)
    return images, run.score("evaluate", rows, seeds, x_0, images)


# ---------------------------------------------------------------------------------------------
# A run


class Run:
    """What an iteration works with: model, prompts, reward, optimizer, and {precision: the network
    that draws images in it}, `networks`. These are merged copies of the transformer (`copies`) or,
    in BF16 with --low_memory, the transformer itself."""

    def __init__(self, config):
        c = self.config = config
        self.clock, self.stop_flag = Clock(c.device), checkpoint.StopFlag()
        self.num_candidates, self.stages = ALGORITHMS[c.algorithm](c)
        self.advance = lambda work: None  # moves the progress bar; work: in network evaluations
        self.reward_names = [name for name, *_ in read_spec(c.reward)]
        eval_parts = read_spec(c.eval_rewards, "--eval_rewards") if c.eval_rewards else []
        self.eval_reward_names = [name for name, *_ in eval_parts]
        for name in set(self.reward_names) & set(self.eval_reward_names):
            raise InputError(f"--eval_rewards {name}: is trained on, so it is measured anyway")
        N, P = self.num_candidates, c.prompts_per_step
        require(c.keep <= N, f"--keep {c.keep}: must be at most --pool {N}")
        self.train, self.held_out, self.notes = split_prompts(
            c.prompts, c.eval_prompts, world.TRAIN_PROMPTS, world.HELD_OUT_PROMPTS
        )
        self.notes += c.checkpoint.notes if c.checkpoint else []
        n = len(self.train.prompts)
        require(P <= n, f"--prompts_per_step {P}: there are {n} training prompts; give at most {n}")
        folder = models.MODELS[c.model].published if c.pretrained == "published" else c.pretrained
        if folder:
            models.check_pretrained(c.model, folder)
        with distributed.first_on_its_node():
            clip = None if folder else world.TINY / "clip"
            self.reward, self.eval_reward = build_reward(c.reward, c.device, clip), None
            if c.eval_rewards:
                self.eval_reward = build_reward(c.eval_rewards, c.device, clip, "--eval_rewards")
            self.model = models.load(c.model, folder or None, c.resolution, device=c.device)
        self.model.pipeline_text, self.model.low_memory = c.pipeline_text, c.low_memory
        captions = world.ATTRIBUTES.keys() >= set(self.held_out.prompts)
        self.can_judge = captions and not folder and c.resolution == world.SIDE
        transformer = self.model.transformer
        for stage, prompts in (("first trial", self.train), ("evaluate", self.held_out)):
            self.notes += self.model.cut_off(prompts.prompts)
            # Two images: a model or a reward that fails should fail before anything is written.
            rows, noise = [0, -1], rollout.initial_noise([0, 1], self.model.latent_shape)
            text = self.model.encode([prompts.prompts[i] for i in rows]).to(c.device)
            x_0 = rollout.sample(self.model, transformer, text, noise, 1)
            try:
                self.score(stage, rows, [0, 1], x_0, self.model.decode(x_0))
            except NonFinite as error:
                raise InputError(f"with the untrained model: {error}") from error
        if c.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.copies, self.layers, self.backend = {}, [], "explored in BF16"
        if not c.low_memory:
            self.copies["bf16"], _ = rollout.make_copy(self.model, "bf16")
        for precision in sorted({stage.precision for stage in self.stages} - {"bf16"}):
            self.copies[precision], layers = rollout.make_copy(
                self.model, precision, self.model.keep_bf16, c.min_dim
            )
            self.layers += layers
            quantized = sum(outcome == precision for *_, outcome in layers)
            _, line = quant.backend(precision, c.device)
            self.backend = f"explored in {line}: {quantized} of {len(layers)} layers"
        self.bf16 = "bf16" if transformer.dtype == torch.bfloat16 else "float32"
        if self.bf16 == "float32":
            self.backend += "; BF16 weights, computed in float32: this CPU has no fast BF16"
        torch.manual_seed(c.seed)
        models.add_lora(self.model, c.lora_rank, 2 * c.lora_rank, c.lora)
        self.networks = {"bf16": transformer} | self.copies
        if c.compiled:
            self.networks = {p: torch.compile(n) for p, n in self.networks.items()}
        self.policies = {a: models.lora_parameters(transformer, a) for a in models.ADAPTERS}
        self.optimizer = torch.optim.AdamW(
            self.policies["default"], lr=c.learning_rate, weight_decay=1e-4
        )

    def work(self):
        """This process's network evaluations: (of an iteration, of an evaluation)."""
        c, drawn = self.config, self.num_candidates
        of_a_prompt = c.keep * num_timesteps(c) * UPDATE_COST
        for stage in self.stages:
            of_a_prompt += drawn * stage.steps
            drawn = stage.num_kept or drawn
        prompts = distributed.mine(range(c.prompts_per_step))
        images = range(len(self.held_out.prompts) * c.eval_images)
        batches = distributed.mine([images[i : i + c.micro_batch] for i in images[:: c.micro_batch]])
        return len(prompts) * of_a_prompt, sum(map(len, batches)) * c.eval_steps

    def prompts_of(self, step):
        """Indices of the P training prompts of a step. The prompts are shuffled for each epoch; the
        rest of an epoch that does not fill a step is dropped."""
        P, n = self.config.prompts_per_step, len(self.train.prompts)
        (seed,) = rollout.candidate_seeds(self.config.seed, step // (n // P), ORDER, 1)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return order[step % (n // P) * P :][:P].tolist()

    def rollout(self, stage, prompt, text, seeds):
        """The Candidates of a training prompt that a stage draws from these seeds."""

        def score(batch_seeds, latents, images):
            self.advance(len(batch_seeds) * stage.steps)
            return self.score(stage.name, [prompt] * len(batch_seeds), batch_seeds, latents, images)

        rollout.seed_globals(seeds[0])
        network, micro_batch = self.networks[stage.precision], self.config.micro_batch
        with self.clock(stage.name):
            latents, scores = rollout.draw_and_score(
                self.model, network, text, seeds, stage.steps, micro_batch, score
            )
        return rollout.Candidates(prompt, text, seeds, latents, scores)

    def score(self, stage, rows, seeds, latents, images):
        """Scores {reward: (n,)} of a micro-batch of images of these prompts; in an evaluation those
        of --eval_rewards too, and what the tiny world's classifier says."""
        prompts = self.held_out if stage == "evaluate" else self.train
        texts, metadata = ([part[i] for i in rows] for part in (prompts.prompts, prompts.metadata))
        self.guard(stage, texts, seeds, latents=latents, images=images)
        with self.clock("evaluate" if stage == "evaluate" else "reward"):
            try:
                scores = self.reward.scores(images, texts, metadata)
                if stage == "evaluate" and self.eval_reward:
                    scores = self.eval_reward.scores(images, texts, metadata) | scores
                if stage == "evaluate" and self.can_judge:
                    scores |= world.judge(images, texts)
            except NonFinite as error:
                raise NonFinite(error.what, error.prompt, stage, seeds[error.index]) from error
        return scores

    def guard(self, stage, prompts, seeds, **tensors):
        """After each micro-batch, before the optimizer moves: raise Stopped if a signal asked for
        it, and NonFinite if a tensor holds NaN or infinity."""
        self.stop_flag.check()
        check_finite(stage, prompts, seeds, **tensors)


def parse_options(argv=None):
    """The command line as a checked Config. Raises InputError."""
    choices = dict(model=models.MODELS, algorithm=ALGORITHMS, select=selection.RULES)
    choices["precision"] = quant.PRECISIONS
    return parse(argv, choices, {name: m.paper for name, m in models.MODELS.items()}, __doc__)


def train(config):
    """The whole run, or with --dry_run what it would need. A step in which a signal stops the run,
    or NaN is found, is thrown away; a resumed run draws it again."""
    c = config
    if c.dry_run:
        from support import dry_run  # here, because it changes PyTorch

        return dry_run.report(c, rollout, pairs_loss, num_timesteps(c))
    c.output_dir = distributed.gather([c.output_dir])[0]  # its default holds the time
    if c.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    run, done, options = Run(c), 0, dataclasses.asdict(c)
    names = run.reward_names, run.eval_reward_names
    with run.stop_flag, Report(options, *names, run.work()) as report:
        run.advance = report.bar.update
        lines = [
            f"an iteration: {c.prompts_per_step} prompts x {run.num_candidates} "
            f"candidates, {c.keep} of each prompt trained on at {num_timesteps(c)} times, one "
            f"optimizer step; {len(run.train.prompts)} training and {len(run.held_out.prompts)} "
            f"held-out prompts; guidance is off",
            f"an evaluation, the first of them now: {c.eval_images} images of each held-out prompt "
            f"in {c.eval_steps} steps",
        ]
        if c.checkpoint:
            checkpoint.restore(c.checkpoint, run.policies, run.optimizer)
            done, c.checkpoint = c.checkpoint.step, None  # its tensors are in place
            report.resume(done)
        report.begin(run.backend, run.layers, [*lines, *run.notes])
        try:
            while True:
                last = done == c.steps
                if (done % c.eval_every == 0 or last) and not report.is_evaluated(done):
                    scores = evaluate(run)
                    report.evaluated(done, scores, run.clock.take()["evaluate"])
                if done % c.checkpoint_every == 0 or last:
                    checkpoint.save(c.output_dir, done, run.policies, run.optimizer, options)
                if last:
                    break
                metrics, shown = iteration(run, done)
                done += 1
                report.step(done, metrics, run.clock.take())
                if done % c.eval_every == 0 or done == c.steps:
                    precisions = [s.precision.replace("bf16", run.bf16) for s in run.stages]
                    labels = [f"{s.name}, {p}" for s, p in zip(run.stages, precisions)]
                    prompt = run.train.prompts[shown[0].prompt]
                    report.picture(done, prompt, list(zip(labels, shown)), run.model.decode)
        except Stopped:
            path = checkpoint.save(c.output_dir, done, run.policies, run.optimizer, options)
            say(f"stopped after {done} steps; --resume {c.output_dir} continues from {path}")
            raise
        if distributed.RANK == 0:
            models.save_lora(run.model, "ema", Path(c.output_dir) / "lora")
            report.card(run.model, report.finish())
            report.before_after(*before_after(run))


def main(argv=None):
    """Run the command line; returns the exit code: 0; 2 on bad input; 1 if numbers, memory or the
    disk failed; 130 after Ctrl-C; 143 after SIGTERM."""
    with distributed.group():
        return exit_code("train.py", lambda: train(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
