"""One iteration, looked at: the pictures and the numbers of docs/walkthrough.md.

    python experiments/walkthrough.py    # about a minute on two cores

The iteration is the first one of `python train.py --model sana`. Each function of the second part
draws one picture into docs/walkthrough and returns its caption. The captions hold every number that
is measured for the page: the program prints them and puts them into the page.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from tqdm import trange

import quant
import rollout
import train
from experiments.paper import evaluations, provenance, replace_section
from support import world
from support.errors import written_whole
from support.report import COLOURS

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
UPDATES = 20  # the first of which is that of the iteration looked at
LAYER = "transformer_blocks.2.ff.conv_inverted"  # one of the largest; LoRA does not adapt it
BEST, WORST = slice(12), slice(12, 24)  # among the 24 that best_worst keeps
FRAMES = [COLOURS["best"]] * 12 + [COLOURS["worst"]] * 12  # their colours

# ---------------------------------------------------------------------------------------------
# The iteration, by the functions of train.py


def drawn(run, stage, index, text, seeds):
    """The Candidates of a training prompt that a stage draws from these seeds."""
    copy, indices = run.copies[stage.precision], [index] * len(seeds)
    return train.draw(run, stage.name, copy, indices, text, seeds, stage.steps)


def draw_pools(run):
    """Of each prompt of the iteration, the Candidates of its whole pool in NVFP4 and in BF16. (The
    algorithm draws in BF16 only the seeds that it keeps.)"""
    prompts, pools = train.step_prompts(run.config, len(run.train.prompts), 0), []
    texts = run.model.encode([run.train.prompts[prompt] for prompt in prompts])
    for network in run.copies.values():
        rollout.sync(network, run.model.transformer, "old")
    for i, prompt in enumerate(prompts):
        seeds = rollout.candidate_seeds(run.config.seed, 0, prompt, run.num_candidates)
        pools.append([drawn(run, stage, prompt, texts.take(i), seeds) for stage in run.stages])
    return pools


def kept_samples(run, pools):
    """Of each prompt, the BF16 Candidates that are trained on, with their advantages."""
    samples = [
        truth.take(train.selection.best_worst(proxy.rewards, run.config.keep))
        for proxy, truth in pools
    ]
    rewards = torch.stack([sample.rewards for sample in samples])
    for sample, row in zip(samples, train.group_advantages(rewards)):
        sample.advantages = row
    return samples


@torch.no_grad()
def look(run, truth, sample):
    """(The pool drawn in BF16 by the old policy as it is now; the policy's velocity (144, c, h, w)
    at the x_t that the first update trains on; each candidate's mean squared error there, (24,))"""
    rollout.sync(run.copies["bf16"], run.model.transformer, "old")
    pool = drawn(run, run.stages[-1], truth.indices[0], truth.text, truth.seeds)
    ((rows, t, noise),) = train.training_pairs(run.config, run.model, sample, step=0)
    x_0, t = sample.latents[rows], t[:, None, None, None]
    x_t = torch.lerp(x_0, noise, t)
    v = run.model.velocity(run.model.transformer, x_t, t.flatten(), sample.text)
    return pool, v, ((x_t - t * v - x_0) ** 2).mean(dim=(1, 2, 3)).reshape(24, -1).mean(dim=1)


def train_and_look(run, truth, sample):
    """({number of updates: what `look` returns}, [seconds of each iteration by stage])"""
    looks, seconds = {0: look(run, truth, sample)}, []
    for step in trange(UPDATES):
        run.clock.take()
        train.iteration(run, step)
        seconds.append(run.clock.take())
        if step in (0, UPDATES - 1):
            looks[step + 1] = look(run, truth, sample)
    return looks, seconds


# ---------------------------------------------------------------------------------------------
# The pictures


def matches(run, candidates):
    """Whether each candidate's picture matches its prompt, bool (n,)."""
    prompts = [run.train.prompts[candidates.indices[0]]] * len(candidates.seeds)
    return world.judge(run.model.decode(candidates.latents), prompts)["accuracy"].bool()


def relative_change(before, after):
    """Root mean square of the change over that of `before`."""
    return float((after - before).norm() / before.norm())


def show(run, candidates, axes, frames):
    """The candidates' pictures in frames of these colours, under their rewards."""
    images, right = run.model.decode(candidates.latents), matches(run, candidates)
    for i, (axis, frame) in enumerate(zip(axes, frames)):
        axis.imshow(images[i].permute(1, 2, 0))
        axis.set_title(f"{candidates.rewards[i]:.2f}" + " ✓" * bool(right[i]), fontsize=8, pad=3)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=frame, linewidth=3)


def show_kept(run, rows, name):
    """A row of pictures for each (label, Candidates of the kept seeds): 5 best, 5 worst."""
    figure, axes = plt.subplots(len(rows), 10, figsize=(8, 1.05 * len(rows)))
    for row, (label, candidates) in zip(axes, rows):
        show(run, candidates.take([*range(5), *range(12, 17)]), row, FRAMES[:5] + FRAMES[-5:])
        row[0].set_ylabel(label)
    save(figure, name)


def save(figure, name):
    PAGE.with_suffix("").mkdir(exist_ok=True)
    figure.savefig(PAGE.with_suffix("") / f"{name}.png", dpi=100)


def pool(run, proxy):
    """The whole pool in NVFP4, from the highest proxy reward to the lowest."""
    ordered = proxy.take(proxy.rewards.argsort(descending=True))
    figure, axes = plt.subplots(8, 12, figsize=(8, 6.4))
    show(run, ordered, axes.flat, FRAMES[BEST] + ["white"] * 72 + FRAMES[WORST])
    save(figure, "pool")
    right, rewards = matches(run, ordered), ordered.rewards
    random = proxy.rewards[train.selection.random_subset(proxy.rewards, 24)].sort().values
    return (
        f'"{run.train.prompts[proxy.indices[0]]}", ordered by proxy reward. A tick: the picture '
        f"matches the prompt. {right.sum()} of 96 do; {right[:12].sum()} of the 12 best (blue), "
        f"{right[-12:].sum()} of the 12 worst (orange). The mean rewards of the 12 best and the 12 "
        f"worst are {rewards[:12].mean() - rewards[-12:].mean():.2f} apart, those of the better "
        f"and the worse half of 24 random ones {random[12:].mean() - random[:12].mean():.2f}."
    )


def ranking(proxy, truth, kept):
    """Proxy rewards against BF16 rewards."""
    figure, axis = plt.subplots(figsize=(6, 5.2))
    axis.scatter(proxy.rewards, truth.rewards, s=18, color=COLOURS["bf16"], label="not kept")
    for part, label in ((BEST, "12 best"), (WORST, "12 worst")):
        x, y = proxy.rewards[kept[part]], truth.rewards[kept[part]]
        axis.scatter(x, y, s=36, color=FRAMES[part], label=label)
    axis.axline((0, 0), slope=1, color="lightgrey", linewidth=1, zorder=0)
    axis.set(xlabel="proxy reward: NVFP4, 6 steps", ylabel="reward: BF16, 10 steps")
    axis.legend()
    save(figure, "ranking")
    fidelity = train.selection.rank_fidelity(proxy.rewards, truth.rewards, 12)
    top, bottom = (round(12 * fidelity[f"{side}_match"]) for side in ("top", "bottom"))
    distance = (proxy.rewards - truth.rewards).abs()
    return (
        f"96 seeds: Spearman's rho {fidelity['spearman_rho']:.3f}, Kendall's tau "
        f"{fidelity['kendall_tau']:.3f}. Of the 12 best by proxy {top} are among the 12 best in "
        f"BF16, of the 12 worst {bottom} among the 12 worst. The two rewards of a seed differ by "
        f"{distance.median():.3f} (median), at most by {distance.max():.2f}."
    )


def precisions(run, proxy, truth, kept):
    """Kept seeds in NVFP4, in BF16 with as few steps, and as the algorithm draws them again."""
    few_steps = train.Stage("few steps", "bf16", run.config.explore_steps)
    middle = drawn(run, few_steps, proxy.indices[0], proxy.text, proxy.seeds)
    rows = {"NVFP4\n6 steps": proxy, "BF16\n6 steps": middle, "BF16\n10 steps": truth}
    show_kept(run, [(label, pool.take(kept)) for label, pool in rows.items()], "precisions")
    texts = [
        f"{(matches(run, pool) == matches(run, truth)).sum()} pictures get the same verdict, match "
        f"or no match, and the latents differ by "
        f"{relative_change(truth.latents, pool.latents):.0%} (root mean square)"
        for pool in (proxy, middle)
    ]
    return (
        f"The five best and the five worst seeds. Of all 96, compared with BF16 in 10 steps: in "
        f"NVFP4 and 6 steps {texts[0]}; in BF16 and 6 steps {texts[1]}."
    )


def advantages(run, pools, samples):
    """Both prompts' BF16 rewards, and the advantages of the kept candidates."""
    figure, axes = plt.subplots(len(samples), figsize=(8, 5.6), sharex=True)
    bins = [i / 30 for i in range(-20, 31)]
    for axis, (_, truth), sample in zip(axes, pools, samples):
        halves = [sample.rewards[BEST], sample.rewards[WORST]]
        style = dict(color=[FRAMES[0], FRAMES[-1]], label=["kept as best", "kept as worst"])
        axis.hist(truth.rewards, bins, color=COLOURS["bf16"], alpha=0.4, label="all 96")
        axis.hist(halves, bins, stacked=True, **style)
        axis.axvline(sample.rewards.mean(), color="black", linestyle=":", label="mean of the 24")
        axis.set(title=run.train.prompts[sample.indices[0]], ylabel="candidates")
        right = axis.twinx()
        right.plot(sample.rewards, sample.advantages, "k.")
        right.axhline(0, color="lightgrey", linewidth=1, zorder=0)
        right.set(ylabel="advantage (dots)", ylim=(-2.3, 2.3))
    axes[0].legend(loc="upper left")
    axes[-1].set_xlabel("BF16 reward")
    save(figure, "advantages")
    rewards = torch.stack([sample.rewards for sample in samples])
    texts = [
        f"mean {sample.rewards.mean():.3f}, advantages from {sample.advantages.min():.2f} to "
        f"{sample.advantages.max():.2f}, above 0 for {(sample.advantages[WORST] > 0).sum()} of the "
        f"12 kept as worst"
        for sample in samples
    ]
    deviation = f"Standard deviation of all 48 rewards: {rewards.std(correction=0):.3f}."
    return f"First prompt: {texts[0]}. Second: {texts[1]}. {deviation}"


def error_bound(u, unit_over_d=torch.tensor(0.0)):
    """The bound on |x - Q(x)| / d where |x| = u d, as at the top of quant.py."""
    h = torch.where(u < 2, 0.25, torch.where(u < 4, 0.5, torch.where(u <= 5, 1.0, 6 - u)))
    above = torch.maximum(u / 17, 6 * 2.0**-10 * unit_over_d)
    return torch.where(u <= 6, h, above).minimum(u)


def numbers(run, proxy):
    """The E2M1 grid; the errors of a weight and of an activation against their bound."""
    layer, inputs = run.copies["nvfp4"].get_submodule(LAYER), []
    hook = layer.matmul.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    drawn(run, run.stages[0], proxy.indices[0], proxy.text, proxy.seeds)
    hook.remove()
    weight = run.model.transformer.get_submodule(LAYER).weight.flatten(1)
    figure, texts, line = plt.figure(figsize=(8, 5.4)), [], torch.linspace(0, 6.375, 641)
    axes = figure.subplot_mosaic([["grid", "grid"], ["weight", "input"]], height_ratios=(1, 2.5))
    for name, x, block in (("weight", weight, (16, 16)), ("input", inputs[-1], (1, 16))):
        tensor, x, axis = quant.quantize_nvfp4(x, block), x.float(), axes[name]
        unit = tensor.amax / (quant.E2M1_MAX * quant.E4M3_MAX)
        d = (tensor.scales.float() * unit).repeat_interleave(16, dim=1)
        u, error = x.abs() / d, (x - tensor.dequantize()).abs() / d
        bound = error_bound(u, unit / d)
        share = (error / bound)[bound > 0]
        axis.hexbin(u.flatten(), error.flatten(), bins="log", gridsize=70, cmap="Greys")
        axis.plot(line, error_bound(line), color=COLOURS["nvfp4"], label="proven bound")
        axis.set(title=f"{name}: {x.numel():,} elements", xlabel="u = |x| / d", ylim=(0, 1.1))
        texts.append(
            f"{name}: error / bound at most {share.max():.4f}, mean {share.mean():.2f}; root mean "
            f"square error of the tensor {relative_change(x, tensor.dequantize()):.1%}"
        )
    axes["weight"].set_ylabel("error |x - Q(x)| / d; darker: more elements")
    axes["weight"].legend()
    codes = [*(-code for code in quant.E2M1[:0:-1]), *quant.E2M1]
    axes["grid"].plot(codes, [0] * len(codes), "k|", markersize=16)
    block = torch.stack([x[0, :16], tensor.dequantize()[0, :16]]) / d[0, :16]
    axes["grid"].plot(block, [1, 0], ".-", color=COLOURS["nvfp4"])
    axes["grid"].set(title="a block of 16 inputs as x / d (above) becomes codes (below)")
    axes["grid"].set(yticks=[], ylim=(-0.4, 1.3))
    axes["grid"].set_xticks(codes, [f"{code:g}" for code in codes])
    save(figure, "numbers")
    return f"{LAYER} and its input at the last of 6 steps. {texts[0]}. {texts[1]}."


def one_update(sample, looks):
    """What one update changes for each candidate that it trained on."""
    (_, v, error), (_, new_v, new_error) = looks[0], looks[1]
    change = 100 * (new_error / error - 1)
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.scatter(sample.advantages, change, s=36, c=FRAMES)
    axis.axhline(0, color="lightgrey", linewidth=1, zorder=0)
    axis.axvline(0, color="lightgrey", linewidth=1, zorder=0)
    axis.set(xlabel="advantage", ylabel="change of the prediction's squared error (%)")
    save(figure, "one_update")
    correlation = torch.corrcoef(torch.stack([sample.advantages, change]))[0, 1]
    return (
        f"The first prompt's 24 samples, each at the 6 times that it is trained at. Mean change: "
        f"{change[BEST].mean():+.1f}% for those kept as best, {change[WORST].mean():+.1f}% for "
        f"those kept as worst; correlation with the advantage {correlation:.2f}. The velocity "
        f"changed by {relative_change(v, new_v):.1%} (root mean square)."
    )


def training(run, looks, kept):
    """Kept seeds, drawn before and after updates."""
    pools = {f"{n} update" + "s" * (n != 1): pool for n, (pool, *_) in looks.items()}
    show_kept(run, [(label, pool.take(kept)) for label, pool in pools.items()], "training")
    texts = []
    for label, pool in pools.items():
        best, worst = pool.rewards[kept[BEST]].mean(), pool.rewards[kept[WORST]].mean()
        texts.append(
            f"after {label} {pool.rewards.mean():.3f} ({best:.3f}, {worst:.3f}), "
            f"{matches(run, pool).sum()} match"
        )
    return (
        "Mean reward of all 96 seeds (of the 12 once best, of the 12 once worst), and how many of "
        f"the 96 pictures match: {'; '.join(texts)}."
    )


def cost(run, pools, seconds):
    """Seconds and evaluations of the model by stage."""
    c, N, P = run.config, run.num_candidates, run.config.prompts_per_step
    counts = {"prepare": 0, "explore": P * N * c.explore_steps, "reward": 0}
    counts |= {"regenerate": P * c.keep * c.rollout_steps, "train": P * evaluations(c)[1]}
    medians = {s: statistics.median(times[s] for times in seconds[1:]) for s in counts}
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.4), sharey=True)
    for axis, values, form in zip(axes, (medians, counts), ("%.2f", "%d")):
        colours = [COLOURS["nvfp4" if stage == "explore" else "bf16"] for stage in values]
        bars = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set_xlim(0, 1.2 * max(values.values()))
    axes[0].set_xlabel(f"seconds (median of {len(seconds) - 1} iterations)")
    axes[1].set_xlabel("evaluations of the model")
    axes[0].invert_yaxis()
    save(figure, "cost")
    times = {"nvfp4": [], "bf16": []}
    for precision in [*times] * 5:
        stage = train.Stage(precision, precision, c.explore_steps)
        for candidates, _ in pools:
            drawn(run, stage, candidates.indices[0], candidates.text, candidates.seeds)
        times[precision].append(run.clock.take()[precision])
    nvfp4, bf16 = map(statistics.median, times.values())
    return (
        f"An iteration of two prompts, with decoding. In {c.explore_steps} steps the two pools "
        f"take {nvfp4:.2f} s in simulated NVFP4 and {bf16:.2f} s in BF16 (medians of 5 runs of "
        f"each): {nvfp4 / bf16:.1f} times as long."
    )


@plt.rc_context({"font.size": 9, "figure.constrained_layout.use": True})
def main():
    started = time.perf_counter()
    run = train.Run(train.parse_options(["--model=sana", "--device=cpu"]))
    pools = draw_pools(run)
    samples, (proxy, truth) = kept_samples(run, pools), pools[0]
    kept = train.selection.best_worst(proxy.rewards, run.config.keep)
    captions = {
        "pool": pool(run, proxy),
        "ranking": ranking(proxy, truth, kept),
        "precisions": precisions(run, proxy, truth, kept),
        "advantages": advantages(run, pools, samples),
        "numbers": numbers(run, proxy),
    }
    looks, seconds = train_and_look(run, truth, samples[0])
    captions["one_update"] = one_update(samples[0], looks)
    captions["training"] = training(run, looks, kept)
    captions["cost"] = cost(run, pools, seconds)
    made = "commit {commit}; {machine}; {seconds:.0f} s".format_map(provenance(started))
    made += f"; threads: {torch.get_num_threads()}; seed {run.config.seed}"
    captions["made"] = f"`python experiments/walkthrough.py` ({made})"
    page = PAGE.read_text()
    for name, caption in captions.items():
        print(f"{name}: {caption}\n")
        page = replace_section(page, name, f"{caption}\n")
    with written_whole(PAGE) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
