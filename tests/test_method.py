"""The method: two iterations of a tiny run, against a second, naive computation of them.

So that no two things are equal by accident, the policy, the old policy, the EMA and the base are
four different networks, every candidate has its own scripted reward, and the explorer's rewards
order the candidates otherwise than the final ones do.

The naive computation has its own LoRA (W + alpha / rank * B A, written out), its own Euler steps,
selection and advantages, its own loss (the paper's equations, one sample at a time) and its own
gradient (the chain rule through B A).
"""

import copy
import types
from itertools import pairwise
from statistics import mean, pstdev

import pytest
import torch
from conftest import MODEL_NAMES, PROJECT, load

import quant
import train
from rollout import (
    Candidates,
    candidate_seeds,
    evaluation_seeds,
    initial_noise,
    sample,
    sampling_times,
)
from support import models
from support.report import reward_metrics

RANK, SEED = 16, 7
BETA, A_MAX, KL = 0.7, 0.8, 0.5  # so that each has an effect that shows
OPTIONS = (
    "--prompts_per_step 2 --pool 6 --keep 4 --explore_steps 2 --rollout_steps 5 --micro_batch 4 "
    f"--eval_steps 3 --train_micro_batch 5 --lora_rank {RANK} --seed {SEED} --kl {KL} "
    "--gradient_checkpointing true --device cpu --prompts"
).split() + [str(PROJECT / "tests" / "prompts.txt")]

# Rewards of the candidates that are explored for each of the two prompts, and of the final ones.
PROXIES = [[0.3, 0.1, 0.2, 0.6, 0.5, 0.4], [0.9, 0.1, 0.8, 0.2, 0.7, 0.3]]
REWARDS = [[1.0, 2.0, 3.0, 6.0], [14.0, 18.0, 9.0, 11.0]]
ALGORITHMS = {  # the table "Rollout families" of the paper: precision, steps, rewards
    "sol_rl": [("nvfp4", 2, PROXIES), ("bf16", 5, REWARDS)],
    "naive_scaling": [("bf16", 5, PROXIES)],
    "naive_quant": [("nvfp4", 5, PROXIES)],
    "diffusionnft": [("bf16", 5, REWARDS)],
}
MAX_GRAD_NORM = {0: 1e9, 701: 0.1}  # by step: the gradient of the second iteration is clipped


# ---------------------------------------------------------------------------------------------
# The naive computation


class Naive:
    """The base model with W + 2 B A written into its layers; alpha / rank is 2 in the paper."""

    def __init__(self):
        self.model = models.load("sana", dtype=torch.float32)
        self.transformer = self.model.transformer
        self.base = copy.deepcopy(self.transformer.state_dict())

    def become(self, pairs, merged=False):
        """Take the weights of the policy with these LoRA pairs {layer: (A, B)}; the base's for {}.
        merged: as a copy that draws has them, rounded to BF16."""
        self.transformer.load_state_dict(self.base)
        for layer, (a, b) in pairs.items():
            weight = self.transformer.get_submodule(layer).weight
            weight.data += 2 * b @ a
            if merged:
                weight.data = weight.data.bfloat16().float()

    @torch.no_grad()
    def draw(self, precision, text, seeds, steps):
        """x_0 for each seed, by Euler's steps of equal length from t = 1 to t = 0. The images of a
        micro-batch of 4 share the scale of NVFP4."""
        if len(seeds) > 4 and len(text.embeds) == 1:
            parts = seeds[:4], seeds[4:]
            return torch.cat([self.draw(precision, text, part, steps) for part in parts])
        network = copy.deepcopy(self.transformer)
        quant.quantize_linears(network, precision, self.model.keep_bf16)
        x = initial_noise(seeds, self.model.latent_shape)
        for t, t_next in pairwise(torch.linspace(1, 0, steps + 1)):
            x = x + (t_next - t) * self.model.velocity(network, x, t.expand(len(x)), text)
        return x

    def gradient(self, pairs, loss_of_v, *at):
        """d loss / d (A, B) for each layer, by the chain rule through W = base + 2 B A."""
        self.become(pairs)
        weights = [self.transformer.get_submodule(layer).weight for layer in pairs]
        for w in weights:
            w.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of_v(self.velocity(*at)), weights)
        for w in weights:
            w.requires_grad_(False)
        both = [(2 * b.T @ g, 2 * g @ a.T) for (a, b), g in zip(pairs.values(), gradients)]
        return sum(both, ())

    def velocity(self, x_t, t, text):
        return self.model.velocity(self.transformer, x_t, t, text)


def naive_selection(rewards):
    """The places of the two best and of the two worst, which come last."""
    falling = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    return falling[:2] + falling[:-3:-1]


def naive_advantages(rewards):
    """The mean is a prompt's own, the standard deviation that of all rewards."""
    std = pstdev(sum(rewards, [])) + 1e-4
    return [min(max((r - mean(row)) / std, -A_MAX), A_MAX) for row in rewards for r in row]


def naive_loss(v, v_old, v_ref, x_t, x_0, t, advantage):
    """One sample's loss, as the paper writes it (DiffusionNFT, arXiv 2509.16117; the weights w are
    Sol-RL's)."""
    r = advantage / A_MAX / 2 + 1 / 2
    total = 0
    for share, v_branch in (
        (r, BETA * v + (1 - BETA) * v_old),
        (1 - r, (1 + BETA) * v_old - BETA * v),
    ):
        x_0_hat = x_t - t * v_branch
        w = (x_0_hat - x_0).detach().abs().mean()
        total = total + share * ((x_0_hat - x_0) ** 2 / w).mean()
    return A_MAX / BETA * total + KL * ((v - v_ref) ** 2).mean()


# ---------------------------------------------------------------------------------------------
# Two iterations


def prepared(*options):
    """A run of SANA whose four policies differ."""
    config = train.parse_options([*OPTIONS, *options])
    config.adv_clip, config.nft_beta, config.eval_images = A_MAX, BETA, 2
    run = train.Run(config)
    g = torch.Generator().manual_seed(0)
    for parameters in run.policies.values():
        for p in parameters:
            p.data = 0.07 * torch.randn(p.shape, generator=g)
    return run


def policies(run):
    """{adapter: {layer: (A, B)}} as they are now, copies; the base has none."""
    layers = [name for name, _ in models.lora_layers(run.model.transformer)]
    pairs = {"base": {}}
    for adapter, parameters in run.policies.items():
        parts = [p.detach().clone() for p in parameters]
        pairs[adapter] = dict(zip(layers, zip(parts[0::2], parts[1::2]), strict=True))
    return pairs


def watched(run, numbers, function, *arguments):
    """(images and prompts that the reward sees in function(run, ...), what the function returns).
    The reward hands out these numbers in turn."""
    images, prompts, left = [], [], iter(numbers)

    def scripted(part, of, metadata):
        images.append(part)
        prompts.extend(of)
        return [float(next(left)) for _ in of]

    run.reward.parts = run.eval_reward.parts = [("scripted", 1.0, scripted)]
    returned = function(run, *arguments)
    return torch.cat(images), prompts, returned


@pytest.fixture(scope="module")
def naive():
    return Naive()


@pytest.fixture(scope="module", params=ALGORITHMS)
def iterations(request, naive):
    """(A run, what happened in two of its iterations). Three processes are played by a gradient
    that is tripled."""
    run, stages = prepared("--algorithm", request.param), ALGORITHMS[request.param]
    numbers, made = [r for i in range(2) for *_, rewards in stages for r in rewards[i]], []

    def before_the_step(*_):
        seen.gradient = [p.grad.clone() for p in run.policies["default"]]

    run.optimizer.register_step_pre_hook(before_the_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.distributed, "total", lambda tensor: tensor.mul_(3))
        for step, norm in MAX_GRAD_NORM.items():
            run.config.max_grad_norm = norm
            seen = types.SimpleNamespace(step=step, before=policies(run))
            seen.images, seen.prompts, result = watched(run, numbers, train.iteration, step)
            seen.metrics, seen.after = result[0], policies(run)
            seen.rows = train.step_prompts(run.config, len(run.train.prompts), step)
            seen.texts = run.model.encode([run.train.prompts[row] for row in seen.rows])
            seen.naive = [rollouts(naive, seen, stages, i) for i in range(2)]
            made.append(seen)
    return run, made


def rollouts(naive, seen, stages, i):
    """The naive rollouts of a step's prompt i: (the x_0 of all its stages, the Candidates that are
    trained on, their rewards)."""
    naive.become(seen.before["old"], merged=True)
    row, text, pool, drawn = seen.rows[i], seen.texts.take(i), stages[0][2], []
    seeds = candidate_seeds(SEED, seen.step, row, len(pool[i]))
    for precision, steps, rewards in stages:
        x_0 = naive.draw(precision, text, seeds, steps)
        drawn.append(x_0)
        kept = naive_selection(rewards[i]) if rewards is pool else range(4)
        seeds = [seeds[k] for k in kept]
    return drawn, Candidates([row], None, seeds, x_0[kept]), [rewards[i][k] for k in kept]


def test_the_old_policy_draws_what_the_algorithm_says(iterations):
    """For each prompt its seeds in each stage: the precision, steps and noise of the paper."""
    run, made = iterations
    for seen in made:
        drawn = [torch.cat(stages) for stages, _, _ in seen.naive]
        expected = run.model.decode(torch.cat(drawn))
        assert seen.images.shape == expected.shape
        assert (seen.images - expected).abs().max() < 1e-4
        rows = [row for row, x_0 in zip(seen.rows, drawn) for _ in x_0]
        assert seen.prompts == [run.train.prompts[row] for row in rows]


def test_the_gradient_is_the_naive_one(iterations, naive):
    """The mean over 2 prompts x 4 samples x 3 times, each prompt with its own text, summed over
    processes and then clipped. The norm that is logged is that before clipping."""
    run, made = iterations
    for seen in made:
        pairs = []
        for i, (_, candidates, _) in enumerate(seen.naive):
            parts = train.training_pairs(run.config, run.model, candidates, seen.step)
            pairs += [(4 * i + k, *pair) for part in parts for k, *pair in zip(*part)]
        chosen, t, noise = (torch.stack(parts) for parts in zip(*pairs))
        x_0 = torch.cat([candidates.latents for _, candidates, _ in seen.naive])[chosen]
        advantages = naive_advantages([rewards for *_, rewards in seen.naive])
        advantages = torch.tensor(advantages)[chosen]
        x_t = torch.stack([(1 - s) * x + s * n for x, n, s in zip(x_0, noise, t)])
        at, velocities = (x_t, t, seen.texts.take(chosen // 4)), []
        for policy in ("old", "base"):
            naive.become(seen.before[policy])
            velocities.append(naive.velocity(*at).detach())

        def loss(v):
            samples = zip(v, *velocities, x_t, x_0, t, advantages)
            return sum(naive_loss(*sample) for sample in samples) / 24

        total = naive.gradient(seen.before["default"], loss, *at)
        norm = 3 * torch.cat([g.flatten() for g in total]).norm().item()
        assert seen.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
        scale = 3 * min(1, MAX_GRAD_NORM[seen.step] / norm)
        for expected, got in zip(total, seen.gradient, strict=True):
            assert (got - scale * expected).norm() < 1e-4 * scale * expected.norm()


def test_after_the_optimizer_step_the_old_policy_and_the_ema_follow_the_new_policy(iterations):
    """The optimizer is AdamW with the paper's settings. Then old <- eta old + (1 - eta) policy with
    eta = min(0.001 i, 0.5) in iteration i = step + 1; EMA with decay (1 + i) / (10 + i), as in the
    authors' code, until that is 0.9."""
    run, made = iterations
    learning = [p.clone().requires_grad_() for p in sum(made[0].before["default"].values(), ())]
    settings = dict(lr=run.config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    assert settings.items() <= run.optimizer.param_groups[0].items()  # the decay alone is too small
    adamw = torch.optim.AdamW(learning, **settings)
    for seen, (eta, decay) in zip(made, ((0.001, 2 / 11), (0.5, 0.9))):
        for p, gradient in zip(learning, seen.gradient):
            p.grad = gradient
        adamw.step()
        for adapter, share in (("default", 0), ("old", eta), ("ema", decay)):
            before, after = (sum(of[adapter].values(), ()) for of in (seen.before, seen.after))
            for p, was, new in zip(after, before, learning, strict=True):
                assert torch.allclose(p, share * was + (1 - share) * new, atol=1e-7)


# ---------------------------------------------------------------------------------------------
# Loss and advantages, by hand


def one_element(v, v_old, v_ref, advantage, **settings):
    """The loss of one sample of one element with x_t = 1, x_0 = 0, t = 1/2, its gradient and its
    metrics. A branch with velocity u has x_0_hat = 1 - u / 2, which is also the error and w."""
    v, *others = torch.tensor([v, v_old, v_ref, 1.0, 0.0]).reshape(5, 1, 1, 1, 1)
    v.requires_grad_(True)
    t, a = torch.tensor([0.5]), torch.tensor([advantage])
    loss, metrics = train.nft_loss(v, *others, t, a, **settings)
    loss.backward()
    return loss.item(), v.grad.item(), metrics


def test_the_loss_and_its_gradient_by_hand():
    # A = A_max, so r = 1: u = v = 1, x_0_hat = 1/2. w is a constant: d (error^2 / w) / dv =
    # 2 error / w * (-1/2) = -1, and A_max = 5 of it. KL: 0.1 (1 - (-2))^2 and 0.1 * 2 * 3.
    loss, gradient, metrics = one_element(1.0, 0.0, -2.0, 5.0, kl=0.1)
    assert loss == pytest.approx(5 * 0.5 + 0.9) and gradient == pytest.approx(-5 + 0.6)
    assert metrics["kl"] == pytest.approx(9) and metrics["loss/policy"] == pytest.approx(2.5)
    assert metrics["old_divergence"] == pytest.approx(1)
    # A = -A_max / 5, so r = 0.4: 0.4 of the above, and 0.6 of u = 2 * 0 - 1 = -1, x_0_hat = 1.5.
    loss, gradient, _ = one_element(1.0, 0.0, -2.0, -1.0, kl=0.0)
    assert loss == pytest.approx(5 * (0.4 * 0.5 + 0.6 * 1.5))
    assert gradient == pytest.approx(5 * (0.4 * -1 + 0.6 * 1))
    # A beyond A_max = 2 counts as 2. With beta = 1/2, u = 1/2 (1 + 0): x_0_hat = 3/4.
    loss, gradient, _ = one_element(1.0, 0.0, 1.0, 9.0, beta=0.5, adv_clip=2.0)
    assert loss == pytest.approx(2 / 0.5 * 3 / 4) and gradient == pytest.approx(-2)
    # A perfect prediction, 1 - 1/2 * 2 = 0, has no loss, and there is no division by zero.
    assert one_element(2.0, 2.0, 2.0, 5.0)[:2] == (0, 0)


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
# Policies, evaluation, random numbers, prompts


def test_the_three_adapters_begin_equal_and_as_the_base_model():
    """peft's gaussian init, which follows from the seed: A has deviation 1 / rank, B is 0."""
    runs = [train.Run(train.parse_options([*OPTIONS, "--seed", seed])) for seed in "001"]
    assert all(run.model.transformer.is_gradient_checkpointing for run in runs)
    first, second, other = map(policies, runs)
    for layer, (a, b) in first["default"].items():
        assert a.dtype == torch.float32 and a.std() == pytest.approx(1 / RANK, rel=0.2)
        assert b.abs().max() == 0
        for pairs in (first["old"], first["ema"], second["default"]):
            assert torch.equal(pairs[layer][0], a) and torch.equal(pairs[layer][1], b)
        assert not torch.equal(other["default"][layer][0], a)


def test_the_ema_policy_is_evaluated_from_noise_that_no_seed_changes(naive):
    """Two images of each held-out prompt, each from its own noise, with its prompt's text, at
    eval_steps steps."""
    for seed in "01":
        run = prepared("--seed", seed)
        prompts = [prompt for prompt in run.held_out.prompts for _ in range(2)]
        seeds = [s for i in range(len(prompts) // 2) for s in evaluation_seeds(i, 2)]
        images, seen, drawn = watched(run, range(len(prompts)), train.evaluate)
        text = run.model.encode(prompts)
        naive.become(policies(run)["ema"], merged=True)
        expected = run.model.decode(naive.draw("bf16", text, seeds, 3))
        assert seen == prompts and (images - expected).abs().max() < 1e-4
        assert drawn.rewards.tolist() == list(range(len(prompts)))
        assert [run.held_out.prompts[i] for i in drawn.indices] == prompts and drawn.seeds == seeds


def test_each_sample_is_trained_at_random_times_each_with_noise_of_its_own():
    """3 of 5 times (timestep_fraction 0.6), without repetition."""
    run = prepared()
    parts = list(train.training_pairs(run.config, run.model, Candidates([3], None, [0] * 8), 2))
    assert [len(samples) for samples, _, _ in parts] == [5, 5, 5, 5, 4]  # --train_micro_batch
    samples, t, noise = map(torch.cat, zip(*parts))
    assert samples.tolist() == [i for i in range(8) for _ in range(3)]
    chosen = [frozenset(times) for times in t.reshape(8, 3).tolist()]
    assert all(len(times) == 3 for times in chosen) and len(set(chosen)) > 2
    assert frozenset.union(*chosen) == set(sampling_times(run.model, 5).tolist())
    noise = noise.flatten(1)
    assert noise.mean(dim=1).abs().max() < 0.25 and (noise.std(dim=1) - 1).abs().max() < 0.25
    assert (torch.corrcoef(noise) - torch.eye(24)).abs().max() < 0.4


def test_every_random_number_follows_from_seed_step_and_prompt():
    run = prepared()

    def numbers(seed, step, prompt):
        """Seeds of candidates, and times and noise of the update."""
        run.config.seed = seed
        candidates = Candidates([prompt], None, [0] * 12)
        pairs = train.training_pairs(run.config, run.model, candidates, step)
        _, t, noise = map(torch.cat, zip(*pairs))
        return candidate_seeds(seed, step, prompt, 4), t.tolist(), noise.tolist()

    first, *others = (numbers(*of) for of in ((1, 2, 3), (2, 2, 3), (1, 2, 4)))
    others += [numbers(1, step, 3) for step in range(3, 103)]
    assert numbers(1, 2, 3) == first
    for kind in range(3):
        assert first[kind] not in [other[kind] for other in others]


def test_a_pass_over_the_prompts_takes_each_once_in_an_order_of_its_own():
    """28 training prompts, 5 a step: in 5 steps 25 different ones; the next pass is another."""
    c = train.parse_options([*OPTIONS, "--prompts_per_step", "5"])
    passes = [[train.step_prompts(c, 28, 5 * i + j) for j in range(5)] for i in range(2)]
    for steps in passes:
        rows = sum(steps, [])
        assert len(rows) == len(set(rows)) == 25 and set(rows) <= set(range(28))
        assert rows != sorted(rows)
    assert passes[0] != passes[1]
    c.seed += 1
    assert train.step_prompts(c, 28, 0) != passes[0][0]


@pytest.mark.parametrize("solver", models.SOLVERS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_sampling_times_are_those_at_which_a_sample_is_drawn(name, solver):
    model, seen = load(name, solver), []
    model.velocity = lambda transformer, x_t, t, text: seen.append(t.item()) or 0 * x_t
    text = model.encode(["a small plain red ring at the top"])
    sample(model, model.transformer, text, initial_noise([1], model.latent_shape), 5)
    assert seen == pytest.approx(sampling_times(model, 5).tolist())
