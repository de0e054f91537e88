"""Sol-RL: explore in FP4, train in BF16 (arXiv 2604.06916).

    python train.py --model sana                        # tiny SANA, a few minutes on a laptop
    python train.py --model flux                        # tiny FLUX.1; --model sd3: tiny SD3.5
    python train.py --model sana --family diffusionnft  # the baseline without a pool
    torchrun --nproc_per_node=8 train.py ...            # the same run on 8 GPUs
    python train.py --help                              # every option and its default

Departures from the paper
 1. The old policy draws (explore and regenerate), as in DiffusionNFT; the paper's text says the
    policy, which at its eta the old one follows closely.
 2. Quantized layers are chosen by the paper's rule in diffusers' layout, which keeps q, k and v
    apart and writes SANA's feed-forward as 1x1 convolutions; these count as linear. SANA's
    cross-attention keys and values, narrower apart than fused, then stay in BF16.
 3. The tiny models have settings of their own (TINY in config.py); the method is the same.

Symbols, the same in every file
    x_0, x_t, noise   a sample, (1 - t) x_0 + t noise, standard normal noise; (n, c, h, w)
    t                 time in [0, 1], 1 is noise
    v, v_old, v_ref   velocity (noise - x_0) by the policy, the old policy, the base model
    r, A              reward; advantage
    N, K, P           pool (--pool), kept (--keep), prompts an iteration (--prompts_per_step)
    beta, kl, eta     policy mix (--nft_beta), KL weight, share of itself the old policy keeps
"""

import contextlib
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

import checkpoint
import distributed
import models
from config import FAMILIES, OptionError, parse, resuming, split_prompts
from engine import EngineError
from report import Report, alone
from reward import NonFiniteScores, RewardError, build_reward, read_spec
from rollout import candidate_seeds, draw, initial_noise, sample, sampling_times, seed_globals

# `import select` may give the standard library's module of that name: load ours by its path.
_spec = importlib.util.spec_from_file_location("selection", Path(__file__).with_name("select.py"))
selection = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(selection)

BAD_INPUT = (OptionError, RewardError, models.ModelError, EngineError, checkpoint.CheckpointError)

# Places in (run seed, step, prompt) that no training prompt takes.
UPDATE, EVALUATION, ORDER = 2**32 - 1, 2**32 - 2, 2**32 - 3


# ---------------------------------------------------------------------------------------------
# The loss (DiffusionNFT, arXiv 2509.16117)


def group_advantages(rewards, adv_clip=5.0, std_over="all"):
    """A = (r - mean over the prompt's K) / (std + 1e-4), clipped; rewards (P, K) -> (P, K).

    std_over: "all", the paper's, is one std for all prompts, so that a prompt whose candidates
    hardly differ keeps small advantages; "prompt" is each prompt's own, as in GRPO. A prompt whose
    candidates are all equal has 0, whatever rounding does to their mean."""
    differ = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)) * differ
    over = dict(dim=1, keepdim=True) if std_over == "prompt" else {}
    return (centred / (rewards.std(**over, correction=0) + 1e-4)).clamp(-adv_clip, adv_clip)


def nft_loss(v, v_old, v_ref, x_t, x_0, t, advantages, beta=1.0, adv_clip=5.0, kl=1e-4):
    """The DiffusionNFT loss with the paper's self-normalized weights; all (B, ...) but t and
    advantages (B,). Returns (scalar loss, dict of detached scalar metrics).

    Gradients flow through v alone. With beta = 1 and v = v_old the value does not depend on the
    advantages; the gradient does, as 2 r - 1.
    """
    v_old, v_ref = v_old.detach(), v_ref.detach()
    t = t.reshape(-1, *[1] * (x_0.dim() - 1))
    r = (advantages / adv_clip).clamp(-1, 1) / 2 + 0.5  # (B,) in [0, 1]

    def distance(v_sign):
        x_0_hat = x_t - t * v_sign
        error = (x_0_hat - x_0).flatten(1)
        w = error.detach().abs().mean(dim=1, keepdim=True).clamp(min=1e-5)
        return (error**2 / w).mean(dim=1)  # (B,)

    l_plus = distance(beta * v + (1 - beta) * v_old)
    l_minus = distance((1 + beta) * v_old - beta * v)
    policy_loss = (adv_clip / beta * (r * l_plus + (1 - r) * l_minus)).mean()
    divergence = ((v - v_ref) ** 2).mean()
    loss = policy_loss + kl * divergence
    metrics = {"loss": loss, "loss/policy": policy_loss, "kl": divergence}
    metrics["old_divergence"] = ((v - v_old) ** 2).mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------
# One iteration


def iteration(run, step):
    """One iteration of the algorithm: (the step's metrics, what its picture shows)."""
    c, transformer = run.config, run.model.transformer
    family, keep = FAMILIES[c.family], getattr(selection, c.select)
    rows = run.prompts_of(step)  # P of them, split over the processes
    explored, trained = [], []
    if family.quantized:
        with run.clock("explore"):
            models.sync(run.explorer, transformer, "old")

    for row in distributed.mine(rows):
        # Explore: N candidates of the old policy, drawn cheaply and scored.
        seeds = candidate_seeds(c.seed, step, row, c.pool if family.explore else c.keep)
        with models.policy(transformer, "old"):
            drawer = run.explorer if family.quantized else run.drawer
            pool = rollout(run, "explore", drawer, row, seeds)

        # Select: the best and the worst; of a two-stage pool only their seeds survive.
        with run.clock("select"):
            kept = keep(run.weighed(pool.scores), c.keep)
        samples = pool.take(kept)
        explored.append(samples)

        # Regenerate: the kept seeds in BF16, from the same noise, scored again.
        if family.regenerate:
            with models.policy(transformer, "old"):
                samples = rollout(run, "regenerate", run.drawer, row, [seeds[i] for i in kept])
        trained.append(samples)
        if len(trained) > 1:  # the picture shows the first prompt's
            explored[-1].images.clear()
            trained[-1].images.clear()

    # Advantages: from the rewards of what is trained on, never from the explorer's.
    proxies, scores = zip(
        *distributed.gather([(e.rewards, t.scores) for e, t in zip(explored, trained)])
    )
    rewards = {name: torch.stack([part[name] for part in scores]) for name in scores[0]}  # (P, K)
    advantages = group_advantages(run.weighed(rewards), c.adv_clip, c.advantage_std)

    # Update the policy; then the old policy and the EMA follow it.
    with run.clock("train"):
        metrics = update(run, [samples.latents for samples in trained], rows, advantages, step)
        models.follow(transformer, "old", eta=min(0.001 * (step + 1), 0.5))
        models.follow(transformer, "ema", eta=c.ema_decay)

    metrics |= reward_metrics(proxies, rewards)
    if c.compile:  # of the process; a recompilation after the first step would show
        metrics["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return metrics, (rows[0], explored[0], trained[0])


@dataclasses.dataclass
class Candidates:
    """What is kept of one prompt's drawn candidates."""

    scores: dict  # name of a reward -> (n,) float32; "weighted_sum" is theirs
    latents: torch.Tensor  # (n, c, h, w) float32, or None where the images are thrown away
    images: dict  # index -> (3, H, W), of a few, for the picture

    @property
    def rewards(self):
        """The weighted sum, (n,) float32."""
        return self.scores["weighted_sum"]

    def take(self, kept):
        scores = {name: values[kept] for name, values in self.scores.items()}
        latents = None if self.latents is None else self.latents[kept]
        images = {place: self.images[i] for place, i in enumerate(kept) if i in self.images}
        return Candidates(scores, latents, images)


def rollout(run, stage, transformer, row, seeds):
    """Draw the candidates `seeds` of training prompt `row` and score them; stage "explore" or
    "regenerate" says with how many steps, and where the time is booked. The transformer must be
    the policy that is to draw."""
    c, text = run.config, run.train.text.take(row).to(run.config.device)
    explore, family = stage == "explore", FAMILIES[c.family]
    proxy = explore and family.regenerate
    steps = c.explore_steps if proxy else c.rollout_steps
    precision = c.precision if explore and family.quantized else "bf16"
    about = dict(stage=stage, precision=precision)
    seed_globals(seeds[0])
    rewards, scores, kept, shown = [], [], [], {}
    for start in range(0, len(seeds), c.micro_batch):  # a pool needs the memory of one of these
        run.stop.check()
        here = seeds[start : start + c.micro_batch]
        with run.clock(stage):
            latents, images = draw(run.model, transformer, text, here, steps)
        check_finite("latents", latents, here, [run.train.prompts[row]] * len(here), **about)
        scores.append(finite_scores(run, images, run.train, [row] * len(here), here, **about))
        rewards += scores[-1]["weighted_sum"].tolist()
        if not proxy:
            kept.append(latents.cpu())
        shown |= {start + i: image.cpu() for i, image in enumerate(images)}
        if explore:  # of the pool's images only those in the picture stay
            order = sorted(shown, key=lambda i: -rewards[i])
            shown = {i: shown[i] for i in order[:4] + order[-4:]}
    return Candidates(joined(scores), None if proxy else torch.cat(kept), shown)


class NonFinite(FloatingPointError):
    """A NaN or an infinity before the optimizer moved: what it is in, and whose it is. The seed is
    a candidate's; in the update that of the noise, or of the first noise of the micro-batch."""

    @property
    def stage(self):
        return self.args[2]

    def __str__(self):
        what, _, stage, prompt, seed, precision = self.args
        seed = f"{'noise ' if stage == 'update' else ''}seed {seed}"
        return f"NaN or infinity in the {what}, {stage} in {precision}, prompt {prompt!r}, {seed}"


def check_finite(what, tensor, seeds, prompts, stage, precision):
    """Raise NonFinite for the first of a batch's samples (n, ...) that holds a NaN or infinity."""
    bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(dim=1).nonzero()
    if len(bad):
        i = int(bad[0, 0])
        value = tensor[i].detach().cpu()
        distributed.fail(NonFinite(what, value, stage, prompts[i], seeds[i], precision))


def finite_scores(run, images, prompts, rows, seeds, stage, precision):
    """Scores {reward: (n,)} of images of these rows of Prompts. Raises NonFinite."""
    of = dict(seeds=seeds, prompts=[prompts.prompts[row] for row in rows])
    check_finite("images", images, **of, stage=stage, precision=precision)
    try:
        return run.score(images, prompts, rows, evaluation=stage == "evaluate")
    except NonFiniteScores as error:
        check_finite(error.name, error.scores, **of, stage=stage, precision=precision)


def joined(scores):
    """Scores {reward: (n,)} of batch after batch -> of all."""
    return {name: torch.cat([part[name] for part in scores]) for name in scores[0]}


def update(run, x_0, rows, advantages, step):
    """One optimizer step on samples of the prompts rows (P,): x_0, a list of (K, c, h, w) of this
    process's share of the prompts, and advantages (P, K) of all. Each sample is trained at a random
    share of the sampling times, each with its own noise."""
    c, model, transformer = run.config, run.model, run.model.transformer
    policy = models.lora_parameters(transformer, "default")
    times = sampling_times(model, c.rollout_steps)
    trained = max(1, round(c.timestep_fraction * c.rollout_steps))
    n = advantages.numel()
    seeds = candidate_seeds(c.seed, step, UPDATE, 1 + n * trained)
    shuffle = torch.Generator().manual_seed(seeds.pop(0))
    which = torch.rand(n, len(times), generator=shuffle).argsort(dim=1)[:, :trained]
    sizes = [p.numel() for p in policy]
    gradient = torch.zeros(sum(sizes), dtype=torch.float64, device=c.device)
    metrics = []
    for samples, place in zip(x_0, distributed.mine(range(len(rows)))):
        prompts = [run.train.prompts[rows[place]]] * c.micro_batch
        about = dict(prompts=prompts, stage="update", precision="bf16")
        metrics.append({})
        for part in torch.arange(c.keep).split(c.micro_batch):
            run.stop.check()
            text = run.train.text.take([rows[place]] * len(part)).to(c.device)
            share = len(part) / (n * trained)
            target, weight = samples[part].to(c.device), advantages[place, part].to(c.device)
            part = part + place * c.keep  # of the n samples
            for j in range(trained):
                t, here = times[which[part, j]].to(c.device), [seeds[i * trained + j] for i in part]
                noise = initial_noise(here, model.latent_shape).to(c.device)
                x_t = torch.lerp(target, noise, t[:, None, None, None])
                with torch.no_grad(), models.policy(transformer, "old"):
                    v_old = model.velocity(transformer, x_t, t, text)
                with torch.no_grad(), models.policy(transformer, "base"):
                    v_ref = model.velocity(transformer, x_t, t, text)
                v = model.velocity(transformer, x_t, t, text)
                loss, found = nft_loss(
                    v, v_old, v_ref, x_t, target, t, weight, c.nft_beta, c.adv_clip, c.kl
                )
                check_finite("velocity", v, here, **about)
                check_finite("loss", loss[None], here, **about)
                (loss * share).backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in policy])
                check_finite("gradient", norm[None], here, **about)
                for name, value in found.items():
                    metrics[-1][name] = metrics[-1].get(name, 0.0) + float(value) * share
        gradient += torch.cat([p.grad.flatten() for p in policy])
        run.optimizer.zero_grad()
    metrics = distributed.gather(metrics)
    distributed.total(gradient)
    for p, whole in zip(policy, gradient.split(sizes)):
        p.grad = whole.reshape(p.shape).to(p.dtype)
    norm = torch.nn.utils.clip_grad_norm_(policy, c.max_grad_norm)
    if not norm.isfinite():  # the sum of finite ones, the same in every process
        raise NonFinite("gradient", norm, "update", "all of them", seeds[0], "bf16")
    run.optimizer.step()
    run.optimizer.zero_grad()
    sums = {name: sum(prompt[name] for prompt in metrics) for name in metrics[0]}
    return sums | {"grad_norm": float(norm)}


def reward_metrics(proxies, rewards):
    """What is logged of the rewards {name: (P, K)} that were trained on, each under its own name,
    and of how the explorer had ranked the same candidates: proxies, P times (K,)."""
    metrics = {f"reward/{name}": values.mean() for name, values in rewards.items()}
    rewards = rewards["weighted_sum"]
    metrics |= {
        "reward/mean": rewards.mean(),
        "reward/best": rewards.amax(dim=1).mean(),
        "reward/worst": rewards.amin(dim=1).mean(),
        "reward/std": rewards.std(correction=0),
        "reward/spread": (rewards.amax(dim=1) - rewards.amin(dim=1)).mean(),
        "reward/zero_spread": (rewards.amax(dim=1) == rewards.amin(dim=1)).sum(),
    }
    ranks = [
        selection.rank_fidelity(proxy, truth, rewards.shape[1] // 2)
        for proxy, truth in zip(proxies, rewards)
    ]
    for name in ("kendall_tau", "spearman_rho"):
        metrics[f"fidelity/{name}"] = sum(rank[name] for rank in ranks) / len(ranks)
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------
# A run


class Clock:
    """Seconds by stage: `with clock("explore"): ...`"""

    def __init__(self, device):
        self.device = torch.device(device)
        stages = "explore select regenerate reward train evaluate".split()
        self.seconds = dict.fromkeys(stages, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - start


class Run:
    """What an iteration works with: model, explorer, prompts, reward, optimizer, clock."""

    def __init__(self, config):
        c = self.config = config
        # What is wrong there should not wait for models.
        trained_on = [name for name, *_ in read_spec(c.reward)]
        for name, *_ in read_spec(c.eval_rewards, "--eval_rewards") if c.eval_rewards else ():
            if name in trained_on:
                raise RewardError(f"--eval_rewards {name}: trained on, and so measured anyway")
        self.train, self.held_out, self.notes = split_prompts(c)
        self.fingerprints = {}
        prompts = checkpoint.prompts_fingerprint(self.train, self.held_out)
        self.as_before("prompts", prompts, "give the file it had, or start a new run")
        rewards = checkpoint.rewards_fingerprint(c.reward, c.eval_rewards)
        forced = "reward" in c.force.split(",")
        self.as_before("reward", rewards, "--force reward goes on with the file as it is", forced)
        folder = models.MODELS[c.model].published if c.pretrained == "published" else c.pretrained
        if folder:
            models.check_pretrained(c.model, folder)
        how = dict(device=c.device, tiny=not folder, weights=c.reward_weights)
        with distributed.first_on_its_node():
            self.reward, self.eval_rewards = build_reward(c.reward, **how), None
            if c.eval_rewards:
                self.eval_rewards = build_reward(c.eval_rewards, **how, option="--eval_rewards")
            if not folder:
                import tiny  # with its training code, which a pretrained model does without

                folder = tiny.ensure(c.model) / c.model
            self.model = models.load(c.model, folder, c.resolution, c.solver, c.device)
        base = checkpoint.base_fingerprint(self.model.transformer)
        self.as_before("base model", base, f"its cache or folder ({folder}) must be the one it had")
        self.clock = Clock(c.device)
        for part in (self.train, self.held_out):
            part.text = self.model.encode(part.prompts)
            for name, (limit, n) in self.model.cut_off(part.prompts).items():
                if n:
                    self.notes.append(f"{n} prompts lose what comes after {limit} tokens ({name})")
            # Two pictures: a model or a reward that fails should do so before anything is written.
            rows = [0, len(part.prompts) - 1]
            noise = initial_noise([0, 1], self.model.latent_shape)
            text = part.text.take(rows).to(c.device)
            x_0 = sample(self.model, self.model.transformer, text, noise, 1)
            self.score(self.model.decode(x_0), part, rows, evaluation=part is self.held_out)
        self.model.free_text_encoders()
        if c.gradient_checkpointing:
            self.model.transformer.enable_gradient_checkpointing()
        self.explorer, self.layers = None, []
        if FAMILIES[c.family].quantized:
            rule = {} if c.quantize_all else dict(skip=self.model.keep_bf16, min_dim=c.min_dim)
            self.explorer, self.layers = models.make_explorer(
                self.model, c.precision, **rule, wanted=c.precision_backend
            )
        torch.manual_seed(c.seed)
        models.add_lora(self.model, c.lora_rank, alpha=2 * c.lora_rank)
        self.drawer = self.model.transformer  # what draws in BF16, as the policy switched on
        if c.compile:
            self.drawer = torch.compile(self.drawer)
            if FAMILIES[c.family].quantized:
                self.explorer = torch.compile(self.explorer)
        self.optimizer = torch.optim.AdamW(
            models.lora_parameters(self.model.transformer, "default"),
            lr=c.learning_rate,
            weight_decay=1e-4,
        )

    def as_before(self, name, fingerprint, advice, forced=False):
        """Note what a continued run must find as it was; raises CheckpointError where it does not,
        unless it is forced."""
        self.fingerprints[name], c = fingerprint, self.config
        if c.resume and not forced:
            if c.checkpoint.about["fingerprints"].get(name) != fingerprint:
                raise checkpoint.CheckpointError(
                    f"--resume {c.resume}: not the {name} of the run so far; {advice}"
                )

    def prompts_of(self, step):
        """Rows of the P training prompts of a step: one pass after another over all of them, each
        in an order of its own; what is left of a pass and does not fill a step is left out."""
        P = self.config.prompts_per_step
        in_pass = len(self.train.prompts) // P
        seed = candidate_seeds(self.config.seed, step // in_pass, ORDER, 1)[0]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train.prompts), generator=generator)
        return order[step % in_pass * P :][:P].tolist()

    def weighed(self, scores):
        """What selection and advantages go by of scores {reward: values}."""
        if self.config.z_score:
            return self.reward.z_scored_sum(scores)
        return scores["weighted_sum"]

    def score(self, images, prompts, rows, evaluation=False):
        """Scores {reward: (n,)} of images of these rows; in evaluation of --eval_rewards too."""
        said = [prompts.prompts[i] for i in rows], [prompts.metadata[i] for i in rows]
        with self.clock("evaluate" if evaluation else "reward"):
            scores = self.reward.scores(images, *said)
            if evaluation and self.eval_rewards:
                scores = self.eval_rewards.scores(images, *said) | scores
        return scores


def evaluate(run):
    """{reward: a list of the EMA policy's on each held-out prompt}: means over the prompt's images,
    whose noise is the same in every run."""
    c, n = run.config, len(run.held_out.prompts)
    rows = [i for i in range(n) for _ in range(c.eval_images)]
    seeds = [s for i in range(n) for s in candidate_seeds(0, EVALUATION, i, c.eval_images)]
    scores = []
    with models.policy(run.model.transformer, "ema") as ema:
        for i in distributed.mine(range(0, len(rows), c.micro_batch)):
            run.stop.check()
            seed_globals(seeds[i])
            part, here = rows[i : i + c.micro_batch], seeds[i : i + c.micro_batch]
            with run.clock("evaluate"):
                noise = initial_noise(here, run.model.latent_shape)
                text = run.held_out.text.take(part).to(c.device)
                x_0 = sample(run.model, ema, text, noise, c.eval_steps)
                images = run.model.decode(x_0)
            about = dict(stage="evaluate", precision="bf16")
            scores.append(finite_scores(run, images, run.held_out, part, here, **about))
    scores = joined(distributed.gather(scores))
    return {k: v.reshape(n, -1).mean(dim=1).tolist() for k, v in scores.items()}


def train(config):
    """The whole run; returns the exit code. What a signal, a kill or a NaN leaves of a step is
    thrown away, and the step is drawn again."""
    c, run, done = config, Run(config), 0
    if c.resume:
        checkpoint.load(run, c.checkpoint.path)
    distributed.exchange(None)  # all are ready; nothing is written before
    continuing = checkpoint.resumable(c.output_dir, resuming(c))
    with checkpoint.Stop() as run.stop, continuing, alone(c), Report(run) as report:
        if c.resume:
            done = report.resumed(c.checkpoint)
        report.begin(done)
        try:
            while True:
                last = done == c.steps
                try:
                    if (done % c.eval_every == 0 or last) and not report.is_evaluated(done):
                        report.evaluated(done, evaluate(run))
                    if done % c.checkpoint_every == 0 or last:
                        checkpoint.save(run, report.log(), done)
                    if last:
                        report.finish()
                        return 0
                    metrics, picture = iteration(run, done)
                except NonFinite as error:
                    run.optimizer.zero_grad()
                    report.nonfinite(done, error)
                    if c.on_nonfinite == "stop" or error.stage == "evaluate":
                        report.given_up(checkpoint.found(c.output_dir), error.stage)
                        return 1
                    done += 1
                    report.skipped(done)
                else:
                    done += 1
                    report.step(done, metrics)
                    if done % c.eval_every == 0 or done == c.steps:
                        report.picture(done, *picture)
        except checkpoint.Stopped as stopped:
            report.stopped(checkpoint.save(run, report.log(), done))
            return 128 + stopped.args[0]


def main(argv=None):
    """Run the command line; returns the exit code: 0; 2 on bad input; 1 where numbers, memory, the
    disk, a reward or another process failed; 130 on Ctrl-C, 143 on SIGTERM."""
    try:
        with distributed.group():
            config = distributed.exchange(parse(argv, __doc__))[0]  # the first one's for all
            return train(config)
    except SystemExit as request:  # --help
        return request.code or 0
    except (distributed.Lost, checkpoint.Ended) as error:
        ended, code, line = error, 1, str(error)
    except (*BAD_INPUT, OSError, SafetensorError) as error:
        ended, code, line = error, 2, f"error: {(str(error).splitlines() or [repr(error)])[0]}"
    except (MemoryError, RuntimeError) as error:  # of the CPU torch raises a plain one
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not short and "can't allocate memory" not in str(error):
            raise
        about = str(error).split(". ")[0] or "out of memory"
        ended, code, line = error, 1, f"{about}; lower --micro_batch or --resolution"
    except KeyboardInterrupt as error:
        ended, code, line = error, 130, "left at once; the last checkpoint, if any, is whole"
    if getattr(ended, "rank", 0):
        line = f"rank {ended.rank}: {line}"
    if distributed.RANK == 0 or not hasattr(ended, "rank"):  # others know of it too
        print(f"train.py: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
