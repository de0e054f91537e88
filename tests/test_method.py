"""The method, statement by statement: which policy draws what, what is trained on, what follows.

Two iterations of a tiny run are recorded and compared with a second, naive computation. So that no
two things are equal by accident, the policy, the old policy, the EMA and the base are four
different networks, every candidate has its own scripted reward, and the explorer's rewards order
the candidates otherwise than the final ones do. All networks compute in float32 and the explorer
is not quantized here, so that a velocity shows which policy it is of.

The naive computation has its own LoRA (W + alpha / rank * B A, written out), its own loss (the
paper's equations, one sample at a time) and its own gradient (the chain rule through B A); what
it computes of the update it computes in float64.
"""

import types
from dataclasses import dataclass, field

import pytest
import torch
from conftest import MODEL_NAMES, PROJECT, load

import train
from rollout import (
    Candidates,
    candidate_seeds,
    evaluation_seeds,
    initial_noise,
    sample,
    sampling_times,
    sync,
)
from support import models

RANK, SEED, STEP = 16, 7, 3
UNQUANTIZED = 999_999  # as min_dim: no layer of the explorer is quantized
BETA, A_MAX, KL = 0.7, 0.8, 0.5  # so that each has an effect that shows
OPTIONS = (
    "--prompts_per_step 2 --pool 6 --keep 4 --explore_steps 2 --rollout_steps 5 --micro_batch 3 "
    f"--eval_steps 3 --lora_rank {RANK} --seed {SEED} --kl {KL} "
    "--max_grad_norm 1e9 --device cpu --prompts"
).split() + [str(PROJECT / "tests" / "prompts.txt")]

# Rewards of the six candidates that are explored for each of the two prompts, and of the four that
# are drawn again. Best and worst of the first prompt: candidates 3 and 4, then 1 and 2.
PROXIES = [[0.3, 0.1, 0.2, 0.6, 0.5, 0.4], [0.9, 0.1, 0.8, 0.2, 0.7, 0.3]]
KEPT = [[3, 4, 1, 2], [0, 2, 1, 3]]
REWARDS = [[1.0, 2.0, 3.0, 6.0], [14.0, 18.0, 10.0, 10.0]]
# Their means are 3 and 13. The deviation of all eight is the root of 258 / 8.
STD = (258 / 8) ** 0.5 + 1e-4
ADVANTAGES = [[-2 / STD, -1 / STD, 0, 3 / STD], [1 / STD, A_MAX, -3 / STD, -3 / STD]]  # 5 clipped


# ---------------------------------------------------------------------------------------------
# The naive computation


def lora(transformer, adapter):
    """{layer: [A, B]} of an adapter, copies."""
    pairs = {}
    for name, p in transformer.named_parameters():
        if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name:
            pairs.setdefault(name.split(".lora_")[0], []).append(p.detach().clone())
    return pairs


class Naive:
    """The base model with W + 2 B A written into its layers; alpha / rank is 2 in the paper."""

    def __init__(self, name="sana", dtype=torch.float32):
        self.model = models.load(name)  # rounded to BF16, as the run's is
        self.transformer = self.model.transformer.to(dtype)
        self.base = {k: v.detach().clone() for k, v in self.transformer.state_dict().items()}

    def become(self, pairs, merged=False):
        """Take the weights of the policy with these LoRA pairs; the base's for {}. merged: as a
        copy that draws has them, rounded to BF16."""
        self.transformer.load_state_dict(self.base)
        for layer, (a, b) in pairs.items():
            weight = self.transformer.get_submodule(layer).weight
            weight.data += 2 * b.to(weight.dtype) @ a.to(weight.dtype)
            if merged:
                weight.data = weight.data.bfloat16().to(weight.dtype)

    def velocity(self, x_t, t, text):
        return self.model.velocity(self.transformer, x_t, t, text)

    def gradient(self, pairs, loss_of_v, *at):
        """d loss / d (A, B) for each layer, by the chain rule through W = base + 2 B A."""
        self.become(pairs)
        weights = [self.transformer.get_submodule(layer).weight for layer in pairs]
        for w in weights:
            w.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of_v(self.velocity(*at)), weights)
        for w in weights:
            w.requires_grad_(False)
        return {
            layer: (2 * b.to(g).T @ g, 2 * g @ a.to(g).T)
            for (layer, (a, b)), g in zip(pairs.items(), gradients)
        }


def naive_loss(v, v_old, v_ref, x_t, x_0, t, advantage):
    """One sample's loss, as the paper writes it (DiffusionNFT, arXiv 2509.16117; the weights w are
    Sol-RL's)."""
    r = min(max(float(advantage) / A_MAX, -1), 1) / 2 + 1 / 2
    total = 0
    for share, v_sign in (
        (r, BETA * v + (1 - BETA) * v_old),
        (1 - r, (1 + BETA) * v_old - BETA * v),
    ):
        x_0_hat = x_t - t * v_sign
        w = max((x_0_hat - x_0).detach().abs().mean().item(), 1e-5)
        total = total + share * ((x_0_hat - x_0) ** 2 / w).mean()
    return A_MAX / BETA * total + KL * ((v - v_ref) ** 2).mean()


# ---------------------------------------------------------------------------------------------
# The recording


@dataclass
class Recording:
    """What one iteration did."""

    step: int
    before: dict  # adapter -> its LoRA pairs when the iteration began
    after: dict = None
    calls: list = field(default_factory=list)  # of the network, outside of the update
    decoded: list = field(default_factory=list)  # latents that became images
    losses: list = field(default_factory=list)  # the arguments of nft_loss
    gradient: dict = None  # layer -> (dA, dB) that the optimizer was given
    metrics: dict = None


def prepared(algorithm="sol_rl", options=(), min_dim=UNQUANTIZED):
    """A run of SANA whose four policies differ, in float32."""
    config = train.parse_options(["--algorithm", algorithm, *OPTIONS, *options])
    config.adv_clip, config.nft_beta, config.eval_images, config.min_dim = A_MAX, BETA, 2, min_dim
    run = train.Run(config)
    run.model.transformer.float()
    for precision, merged in run.copies.items():
        if precision == "bf16" or min_dim == UNQUANTIZED:
            merged.float()
    g = torch.Generator().manual_seed(0)
    for adapter in models.ADAPTERS:
        for p in models.lora_parameters(run.model.transformer, adapter):
            p.data = 0.07 * torch.randn(p.shape, generator=g)
    return run


def scripted(run, rewards):
    """Let the run's reward hand out these numbers in turn."""
    numbers = iter([float(r) for row in rewards for r in row])
    part = ("scripted", 1.0, lambda i, p, m: [next(numbers) for _ in p])
    run.reward.parts = run.eval_reward.parts = [part]


def iterate(run, step, rewards):
    """Record one iteration."""
    transformer = run.model.transformer
    adapters = lambda: {a: lora(transformer, a) for a in models.ADAPTERS}  # noqa: E731
    seen = Recording(step, adapters())
    velocity, decode, nft_loss = run.model.velocity, run.model.decode, train.nft_loss
    scripted(run, rewards)

    def recorded_velocity(network, x_t, t, text):
        v = velocity(network, x_t, t, text)
        if not seen.losses:  # what comes later is the update
            by_explorer = network is run.copies.get("nvfp4")
            seen.calls.append((by_explorer, x_t.clone(), t, text, v.detach()))
        return v

    def recorded_decode(latents):
        seen.decoded.append(latents.clone())
        return decode(latents)

    def recorded_loss(v, v_old, v_ref, x_t, x_0, t, advantages, *settings):
        if not seen.losses:
            del seen.calls[-3:]  # v_old, v_ref and v of the first loss
        given = [v, v_old, v_ref, x_t, x_0, t, advantages]
        seen.losses += zip(*[part.detach().clone() for part in given])
        return nft_loss(*given, *settings)

    def before_the_step(optimizer, *_):
        grads = [p.grad.clone() for p in models.lora_parameters(transformer, "default")]
        seen.gradient = dict(zip(seen.before["default"], zip(grads[0::2], grads[1::2])))

    hook = run.optimizer.register_step_pre_hook(before_the_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.model, "velocity", recorded_velocity)
        patch.setattr(run.model, "decode", recorded_decode)
        patch.setattr(train, "nft_loss", recorded_loss)
        seen.metrics, _ = train.iteration(run, step)
    hook.remove()
    seen.after = adapters()
    return seen


TWO_STAGES = [PROXIES[0], REWARDS[0], PROXIES[1], REWARDS[1]]
POOLS = {"sol_rl": TWO_STAGES, "naive_scaling": PROXIES, "naive_quant": PROXIES}
POOLS["diffusionnft"] = REWARDS


@pytest.fixture(scope="module")
def recordings():
    """(A run of an algorithm, its recorded iterations STEP and STEP + 1), made when asked for."""
    made = {}

    def get(algorithm):
        if algorithm not in made:
            run = prepared(algorithm)
            made[algorithm] = run, [iterate(run, STEP + i, POOLS[algorithm]) for i in range(2)]
        return made[algorithm]

    return get


@pytest.fixture(scope="module")
def naive():
    return Naive()


@dataclass
class Rollout:
    """Candidates of one prompt, drawn together."""

    row: int  # of the training prompts
    by_explorer: bool
    policy: str
    noise: torch.Tensor
    times: list


def prompts_of(run, step):
    return train.step_prompts(run.config, len(run.train.prompts), step)


def rollouts(run, seen, naive):
    """The rollouts of a recorded iteration, micro-batches joined."""
    found, rows = [], prompts_of(run, seen.step)
    texts = run.model.encode([run.train.prompts[row] for row in rows])
    for (by_explorer, x_t, t, text, _), policy in zip(seen.calls, policies(seen, naive)):
        same = [torch.equal(text.embeds[0], e) for e in texts.embeds]
        assert sum(same) == len(text.embeds) == 1
        row, time = rows[same.index(True)], float(t[0])
        if time == 1 and found and (found[-1].row, found[-1].by_explorer) == (row, by_explorer):
            found[-1].noise = torch.cat([found[-1].noise, x_t])
            found[-1].times.append([])
        elif time == 1:
            found.append(Rollout(row, by_explorer, policy, x_t, [[]]))
        assert found[-1].policy == policy
        found[-1].times[-1].append(time)
    return found


def policies(seen, naive):
    """The policy that each recorded call is of: the one whose velocity, by the naive computation,
    is the recorded one."""
    names = [None] * len(seen.calls)
    for name, pairs in (seen.before | {"base": {}}).items():
        naive.become(pairs, merged=True)
        for i, (_, x_t, t, text, v) in enumerate(seen.calls):
            # The first is tried alone: if it is not of this policy the others need not be.
            if torch.allclose(naive.velocity(x_t, t, text), v, atol=1e-4):
                names[i] = name
            elif i == 0:
                break
    return names


# ---------------------------------------------------------------------------------------------
# Exploring and regenerating


@pytest.mark.parametrize(
    "algorithm, stages",
    [  # the table "Rollout families" of the paper: by the explorer?, candidates, steps
        ("sol_rl", [(True, 6, 2), (False, 4, 5)]),
        ("naive_scaling", [(False, 6, 5)]),
        ("naive_quant", [(True, 6, 5)]),
        ("diffusionnft", [(False, 4, 5)]),
    ],
)
def test_the_old_policy_draws_what_the_algorithm_says(algorithm, stages, recordings, naive):
    """In both iterations: the copies are given the old policy's weights at each."""
    run, iterations = recordings(algorithm)
    for seen in iterations:
        drawn = rollouts(run, seen, naive)
        rows = prompts_of(run, seen.step)
        assert [r.row for r in drawn] == [row for row in rows for _ in stages]
        for r, (by_explorer, candidates, steps) in zip(drawn, 2 * stages):
            assert (r.policy, r.by_explorer, len(r.noise)) == ("old", by_explorer, candidates)
            times = sampling_times(run.model, steps).tolist()
            assert r.times == [pytest.approx(times)] * len(r.times)


def test_the_kept_seeds_are_drawn_again_from_the_same_noise_in_the_same_order(recordings, naive):
    run, iterations = recordings("sol_rl")
    for seen in iterations:
        drawn = rollouts(run, seen, naive)
        for explored, regenerated, kept in zip(drawn[0::2], drawn[1::2], KEPT):
            seeds = candidate_seeds(SEED, seen.step, explored.row, 6)  # of run, step and prompt
            assert torch.equal(explored.noise, initial_noise(seeds, run.model.latent_shape))
            assert torch.equal(regenerated.noise, explored.noise[kept])


def test_the_explorer_differs_from_the_policy_in_precision_alone():
    """And it holds the old policy: in NVFP4 its velocity is nearest to that one's."""
    run = prepared(min_dim=0)
    explorer = run.copies["nvfp4"]
    sync(explorer, run.model.transformer, "old")
    text = run.model.encode(run.train.prompts[:1]).take([0] * 8)
    noise, t = initial_noise(range(8), run.model.latent_shape), torch.full((8,), 0.7)
    naive = Naive()
    with torch.no_grad():
        v = run.model.velocity(explorer, noise, t, text)
        policies = {a: lora(run.model.transformer, a) for a in models.ADAPTERS} | {"base": {}}
        away = {}
        for name, pairs in policies.items():
            naive.become(pairs)
            away[name] = (naive.velocity(noise, t, text) - v).norm()
    assert 0 < away["old"] < min(away[a] for a in ("default", "ema", "base"))


@pytest.mark.parametrize("solver", models.SOLVERS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_sampling_times_are_those_at_which_a_sample_is_drawn(name, solver):
    model, seen = load(name, solver), []
    velocity = model.velocity

    def recorded(transformer, x_t, t, text):
        seen.append(t.tolist())
        return velocity(transformer, x_t, t, text)

    model.velocity = recorded
    text = model.encode(["a small plain red ring at the top"])
    sample(model, model.transformer, text, initial_noise([1], model.latent_shape), 5)
    assert [t for (t,) in seen] == pytest.approx(sampling_times(model, 5).tolist())


# ---------------------------------------------------------------------------------------------
# The update


def trained(run, seen):
    """{(prompt, candidate): its rows of `losses`}. A sample is known by its x_0, which must be one
    of those that the prompt's last rollout drew."""
    n = {"sol_rl": 4, "diffusionnft": 4}.get(run.config.algorithm, 6)
    drawn = torch.cat(seen.decoded).split(len(torch.cat(seen.decoded)) // 2)
    samples = [x_0 for prompt in drawn for x_0 in prompt[-n:]]
    rows = {}
    for loss in seen.losses:
        (i,) = [i for i, x_0 in enumerate(samples) if torch.equal(x_0, loss[4])]
        rows.setdefault(divmod(i, n), []).append(loss)
    return rows


def by_candidate(values):
    """Two prompts' values -> {(prompt, candidate): value}"""
    return {(i, k): value for i, row in enumerate(values) for k, value in enumerate(row)}


# The kept rewards of PROXIES are .6 .5 .1 .2 and .9 .8 .1 .2: their means are .35 and .5, the
# deviation of all eight the root of .715 / 8.
POOL_STD = (0.715 / 8) ** 0.5 + 1e-4
POOL_ADVANTAGES = {
    (0, 3): A_MAX,  # .25 / POOL_STD is .836, clipped
    (0, 4): 0.15 / POOL_STD,
    (0, 1): -A_MAX,
    (0, 2): -0.15 / POOL_STD,
    (1, 0): A_MAX,
    (1, 2): A_MAX,
    (1, 1): -A_MAX,
    (1, 3): -A_MAX,
}


@pytest.mark.parametrize(
    "algorithm, expected",
    [
        ("sol_rl", by_candidate(ADVANTAGES)),  # not of the explorer's rewards
        ("diffusionnft", by_candidate(ADVANTAGES)),
        ("naive_scaling", POOL_ADVANTAGES),  # here the pool itself is trained on
        ("naive_quant", POOL_ADVANTAGES),
    ],
)
def test_each_sample_has_the_advantage_of_its_own_reward(algorithm, expected, recordings):
    run, iterations = recordings(algorithm)
    for seen in iterations:
        rows = trained(run, seen)
        assert rows.keys() == expected.keys()
        for key, losses in rows.items():
            assert [float(loss[6]) for loss in losses] == pytest.approx([expected[key]] * 3)


def test_each_sample_is_trained_at_random_times_each_with_noise_of_its_own(recordings):
    """3 of 5 times (timestep_fraction 0.6). x_t = (1 - t) x_0 + t noise: what is left of x_t when
    (1 - t) x_0 is taken away is t times standard normal noise, never the same twice."""
    run, iterations = recordings("sol_rl")
    times, noises, chosen = sampling_times(run.model, 5).tolist(), [], []
    for seen in iterations:
        for losses in trained(run, seen).values():
            chosen.append(sorted(times.index(float(t)) for *_, t, _ in losses))
            assert len(set(chosen[-1])) == 3
            for _, _, _, x_t, x_0, t, _ in losses:
                noises.append(((x_t - (1 - t) * x_0) / t).flatten())
    noises = torch.stack(noises)
    assert noises.mean(dim=1).abs().max() < 0.25 and (noises.std(dim=1) - 1).abs().max() < 0.25
    alike = torch.corrcoef(noises) - torch.eye(len(noises))
    assert len(noises) == 2 * 8 * 3 and alike.abs().max() < 0.4
    assert len({tuple(c) for c in chosen[:8]}) > 2 and chosen[:8] != chosen[8:]
    assert {i for c in chosen for i in c} == set(range(5))


def test_a_sample_does_not_dwarf_its_noise(recordings):
    """The test above would see nothing else if it did not hold."""
    run, iterations = recordings("sol_rl")
    assert all(0.2 < loss[4].std() < 20 for seen in iterations for loss in seen.losses)


def test_velocities_of_the_three_policies_and_the_gradient_are_the_naive_ones(recordings):
    """The gradient that the optimizer is given is the mean over all (sample, time) pairs: of the
    policy's own parameters, each prompt with its own text, v_old and v_ref of old policy and
    base, nothing left of the iteration before."""
    run, iterations = recordings("sol_rl")
    naive = Naive(dtype=torch.float64)
    for seen in iterations:
        rows = prompts_of(run, seen.step)
        losses = [(i, loss) for (i, _), part in trained(run, seen).items() for loss in part]
        v, v_old, v_ref, x_t, x_0, t, advantages = (
            torch.stack(parts) for parts in zip(*[loss for _, loss in losses])
        )
        texts = run.model.encode([run.train.prompts[row] for row in rows])
        at = (x_t, t, texts.take([i for i, _ in losses]))
        velocities = {}
        for name, recorded in (("default", v), ("old", v_old), ("base", v_ref)):
            naive.become({} if name == "base" else seen.before[name])
            velocities[name] = naive.velocity(*at)
            assert torch.allclose(recorded, velocities[name], atol=1e-4), name

        def mean_loss(v):
            given = (v, velocities["old"], velocities["base"], x_t, x_0, t, advantages)
            return sum(naive_loss(*sample) for sample in zip(*[g.double() for g in given])) / 24

        assert len(losses) == 24
        total = naive.gradient(seen.before["default"], mean_loss, *at)
        for layer, pair in total.items():
            for expected, got in zip(pair, seen.gradient[layer]):
                assert (got - expected).norm() < 1e-4 * expected.norm(), layer
        norm = torch.cat([g.flatten() for pair in total.values() for g in pair]).norm()
        assert seen.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_after_the_optimizer_step_the_old_policy_and_the_ema_follow_the_new_policy(recordings):
    """old <- eta old + (1 - eta) policy with eta = min(0.001 i, 0.5) in iteration i = step + 1;
    EMA with decay (1 + i) / (10 + i), as in the authors' code, until that is 0.9. The optimizer is
    AdamW with the paper's settings."""
    run, iterations = recordings("sol_rl")
    parameters = {k: [p.clone() for p in v] for k, v in iterations[0].before["default"].items()}
    flat = [p.requires_grad_() for pair in parameters.values() for p in pair]
    settings = dict(lr=run.config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    assert settings.items() <= run.optimizer.param_groups[0].items()  # the decay alone is too small
    adamw = torch.optim.AdamW(flat, **settings)
    for seen in iterations:
        for p, g in zip(flat, [g for pair in seen.gradient.values() for g in pair]):
            p.grad = g
        adamw.step()
        i = seen.step + 1
        eta, decay = 0.001 * i, (1 + i) / (10 + i)
        for layer, pair in parameters.items():
            for j, new in enumerate(pair):
                old = eta * seen.before["old"][layer][j] + (1 - eta) * new
                ema = decay * seen.before["ema"][layer][j] + (1 - decay) * new
                for adapter, expected in (("default", new), ("old", old), ("ema", ema)):
                    assert torch.allclose(seen.after[adapter][layer][j], expected, atol=1e-7)


def test_late_in_a_run_the_old_policy_keeps_half_of_itself_and_the_ema_nine_tenths():
    """The old policy from iteration 500 on, the EMA from iteration 80 on."""
    run = prepared(algorithm="diffusionnft")
    for step in (90, 700):
        seen = iterate(run, step, REWARDS)
        shares = {"old": min(0.001 * (step + 1), 0.5), "ema": 0.9}
        for adapter, share in shares.items():
            for layer, pair in seen.after[adapter].items():
                for i, after in enumerate(pair):
                    before, new = seen.before[adapter][layer][i], seen.after["default"][layer][i]
                    assert torch.allclose(after, share * before + (1 - share) * new, atol=1e-7)


@pytest.fixture
def updated():
    """A function that gives the (gradient, logged norm) of an update on fixed samples, by options;
    its learning rate is 0, so that the policy stays what it is."""
    run = prepared()
    run.optimizer.param_groups[0]["lr"] = 0.0
    texts = run.model.encode(run.train.prompts[:2])
    g = torch.Generator().manual_seed(1)
    x_0 = [torch.randn(4, *run.model.latent_shape, generator=g) for _ in range(2)]

    def update(**options):
        vars(run.config).update(options)
        policy, seen = models.lora_parameters(run.model.transformer, "default"), []
        hook = run.optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in policy]))
        )
        samples = [Candidates([i] * 4, texts.take(i), [0] * 4, x_0[i]) for i in range(2)]
        metrics = train.update(run, samples, torch.tensor(ADVANTAGES), STEP)
        hook.remove()
        return seen[0], metrics["grad_norm"]

    return update


def test_micro_batches_change_nothing(updated, monkeypatch):
    """Of one (sample, time) pair, of five, or of a prompt's twelve: the same noise, the same
    gradient up to rounding. The micro-batch of the update is not that of the rollout."""
    real, sizes = train.nft_loss, []

    def recorded(v, *more):
        sizes.append(len(v))
        return real(v, *more)

    gradient, _ = updated()
    monkeypatch.setattr(train, "nft_loss", recorded)
    for size in (1, 5):
        sizes.clear()
        other, _ = updated(train_micro_batch=size)
        assert max(sizes) == size and sum(sizes) == 24
        assert (other - gradient).norm() < 1e-4 * gradient.norm()


def test_the_gradient_is_clipped_after_it_is_summed_over_processes(updated, monkeypatch):
    """A second process is played by one that has twice this one's gradient. What is logged is the
    norm before clipping."""
    gradient, norm = updated()
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    monkeypatch.setattr(train.distributed, "total", lambda tensor: tensor.mul_(3))
    for most in (1e9, norm / 2):
        clipped, logged = updated(max_grad_norm=most)
        assert logged == pytest.approx(3 * norm, rel=1e-4)
        assert float(clipped.norm()) == pytest.approx(min(most, 3 * norm), rel=1e-4)
        direction = clipped / clipped.norm() - gradient / gradient.norm()
        assert direction.norm() < 1e-4


# ---------------------------------------------------------------------------------------------
# The loss, by hand


def one_element(v, v_old, v_ref, advantage, **settings):
    """The loss of one sample of one element with x_t = 1, x_0 = 0, t = 1/2, and its gradient."""
    v = torch.tensor([[[[v]]]], dtype=torch.float64, requires_grad=True)
    of = lambda value: torch.full((1, 1, 1, 1), value, dtype=torch.float64)  # noqa: E731
    t, a = torch.tensor([0.5]), torch.tensor([advantage])
    loss, metrics = train.nft_loss(v, of(v_old), of(v_ref), of(1.0), of(0.0), t, a, **settings)
    loss.backward()
    return loss.item(), v.grad.item(), metrics


def test_the_gradient_of_the_loss_by_hand():
    # A = A_max, so r = 1: x_0_hat = 1 - 1/2 * 1 = 1/2 is also the error and the weight w.
    # w is a constant: d (error^2 / w) / dv = 2 error / w * (-1/2) = -1, and A_max = 5 of it.
    # KL: 0.1 (1 - (-2))^2 = 0.9, its gradient 0.1 * 2 * 3 = 0.6.
    loss, gradient, metrics = one_element(1.0, 0.0, -2.0, 5.0, kl=0.1)
    assert loss == pytest.approx(5 * 0.5 + 0.9) and gradient == pytest.approx(-5 + 0.6)
    assert metrics["kl"] == pytest.approx(9) and metrics["loss/policy"] == pytest.approx(2.5)
    assert metrics["old_divergence"] == pytest.approx(1)
    # A = -A_max / 5, so r = 0.4: 0.4 of the above, and 0.6 of v- = 2 * 0 - 1 = -1, which has
    # x_0_hat = w = 1.5, l = 1.5 and d l / dv = 2 * 1.5 / 1.5 * (+1/2) = 1.
    loss, gradient, _ = one_element(1.0, 0.0, -2.0, -1.0, kl=0.0)
    assert loss == pytest.approx(5 * (0.4 * 0.5 + 0.6 * 1.5))
    assert gradient == pytest.approx(5 * (0.4 * -1 + 0.6 * 1))
    # A beyond A_max counts as A_max. With A_max = 2 and beta = 1/2, v+ = 1/2 (1 + 0): 1 - 1/4 is
    # error and w; the loss 2 / (1/2) * 3/4, the gradient 4 * 2 * (-1/2) * 1/2.
    loss, gradient, _ = one_element(1.0, 0.0, 1.0, 9.0, beta=0.5, adv_clip=2.0)
    assert loss == pytest.approx(3) and gradient == pytest.approx(-2)


def test_a_perfect_prediction_has_no_loss_and_no_division_by_zero():
    loss, gradient, _ = one_element(2.0, 2.0, 2.0, 5.0)  # x_0_hat = 1 - 1/2 * 2 = x_0, r = 1
    assert loss == gradient == 0


def test_the_loss_is_a_mean_over_elements_and_samples():
    """Each sample has its own w, the mean of its own |errors|."""
    x_0, v = torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)
    x_t = torch.tensor([[1.0, 3.0], [10.0, 10.0]]).reshape(2, 1, 1, 2)  # errors, as v = 0
    t, a = torch.tensor([0.5, 0.5]), torch.zeros(2)
    loss, _ = train.nft_loss(v, v, v, x_t, x_0, t, a, adv_clip=1.0, kl=0.0)
    # (1 + 9) / 2 / 2 = 2.5 and 100 / 10 = 10, each the same for v+ and v-
    assert loss.item() == pytest.approx((2.5 + 10) / 2)


# ---------------------------------------------------------------------------------------------
# Policies, evaluation, prompts


def test_the_three_adapters_begin_equal_and_as_the_base_model():
    """peft's gaussian init: A has deviation 1 / rank, B is 0; alpha is twice the rank."""
    run = train.Run(train.parse_options(["--model", "sana", *OPTIONS]))
    pairs = {adapter: lora(run.model.transformer, adapter) for adapter in models.ADAPTERS}
    for layer, (a, b) in pairs["default"].items():
        assert a.dtype == torch.float32 and a.std() == pytest.approx(1 / RANK, rel=0.2)
        assert b.abs().max() == 0
        for adapter in ("old", "ema"):
            assert torch.equal(pairs[adapter][layer][0], a)
            assert torch.equal(pairs[adapter][layer][1], b)
    config = run.model.transformer.peft_config["default"]
    assert (config.r, config.lora_alpha) == (RANK, 2 * RANK)
    learning = [p for group in run.optimizer.param_groups for p in group["params"]]
    policy = models.lora_parameters(run.model.transformer, "default")
    assert [id(p) for p in learning] == [id(p) for p in policy]


def test_follow_by_hand():
    """eta = 1/4 of a policy at 1 takes an adapter at 0 to 3/4, then to 15/16."""
    transformer = load("sana").transformer
    models.add_lora(types.SimpleNamespace(transformer=transformer, lora_targets=["to_q"]), 2, 4)
    values = {"default": 1.0, "old": 0.0, "ema": 5.0}
    for adapter, value in values.items():
        for p in models.lora_parameters(transformer, adapter):
            p.data.fill_(value)
    for expected in (3 / 4, 15 / 16):
        models.follow(transformer, "old", eta=1 / 4)
        for adapter, value in (values | {"old": expected}).items():
            assert all((p == value).all() for p in models.lora_parameters(transformer, adapter))


def recorded(run, function):
    """(x_t, t, text, v) of each call of the network in function(run), and its result."""
    seen, velocity = [], run.model.velocity

    def recorded_velocity(network, x_t, t, text):
        v = velocity(network, x_t, t, text)
        seen.append((x_t.clone(), t, text, v))
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.model, "velocity", recorded_velocity)
        return seen, function(run)


def test_the_ema_policy_is_evaluated_from_noise_that_no_seed_changes(naive):
    """Two images of each held-out prompt, each from its own noise, with its prompt's text, at
    eval_steps steps."""
    noises = []
    for seed in ("0", "1"):
        run = prepared(options=["--seed", seed, "--micro_batch", "5"])
        scripted(run, [range(100)])
        calls, drawn = recorded(run, train.evaluate)
        n = len(run.held_out.prompts)
        assert len(calls) == 3 * -(-2 * n // 5)
        naive.become(lora(run.model.transformer, "ema"), merged=True)
        for x_t, t, text, v in calls[:3]:
            assert torch.allclose(naive.velocity(x_t, t, text), v, atol=1e-4)
        assert [float(t[0]) for _, t, _, _ in calls[:3]] == pytest.approx(
            sampling_times(run.model, 3).tolist()
        )
        noises.append(torch.cat([x_t for x_t, t, _, _ in calls if t[0] == 1]))
        texts = torch.cat([text.embeds for _, t, text, _ in calls if t[0] == 1])
        rows = [i for i in range(n) for _ in range(2)]
        expected = run.model.encode(run.held_out.prompts).take(rows)
        assert torch.equal(texts, expected.embeds)
        assert drawn.indices == rows and drawn.rewards.tolist() == list(range(2 * n))
        assert drawn.seeds == [seed for i in range(n) for seed in evaluation_seeds(i, 2)]
    assert torch.equal(*noises) and len({tuple(x.flatten().tolist()) for x in noises[0]}) == 2 * n


def test_a_pass_over_the_prompts_takes_each_once_in_an_order_of_its_own():
    """28 training prompts, 5 a step: in 5 steps 25 different ones; the next pass is another."""
    c = train.parse_options([*OPTIONS, "--prompts_per_step", "5"])
    passes = [[train.step_prompts(c, 28, 5 * i + j) for j in range(5)] for i in range(2)]
    for steps in passes:
        rows = [row for step in steps for row in step]
        assert [len(step) for step in steps] == [5] * 5
        assert len(set(rows)) == 25 and set(rows) <= set(range(28)) and rows != sorted(rows)
    assert passes[0] != passes[1]
    c.seed += 1
    assert train.step_prompts(c, 28, 0) != passes[0][0]
