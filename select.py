"""Select: which candidates of a pool are kept (step 2), and how well a proxy ranks (Table 8).

A rule is a function (rewards, k) -> k indices. `python train.py --select NAME` takes one of RULES.
train.py loads this file by its path, as `selection`, because the standard library has a `select`
too. Where that is not built into Python (pyenv, conda), subprocess and asyncio find this file, so
its last lines put the real module in its place.
"""

from random import Random


def _checked(rewards, k):
    """The rewards as a list of floats. Raises ValueError if k of them cannot be kept."""
    values = [float(r) for r in rewards]
    if not 1 <= k <= len(values):
        raise ValueError(f"cannot keep {k} of {len(values)}")
    if any(v != v for v in values):
        raise ValueError(f"reward {[v != v for v in values].index(True)} of the pool is NaN")
    return values


def _from_highest(values):
    """Indices from the highest value to the lowest; of equal values the lower index is first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def best_worst(rewards, k):
    """The paper's rule: the k // 2 highest in falling order, then the k - k // 2 lowest in rising
    order. rewards: n numbers as a tensor, an array or a list. Returns a list of k indices; of equal
    rewards the lower index is taken. Raises ValueError on k < 1, k > n or NaN, as all rules do."""
    values = _checked(rewards, k)
    best = _from_highest(values)[: k // 2]
    rising = _from_highest([-v for v in values])
    return best + [i for i in rising if i not in best][: k - k // 2]


def random_subset(rewards, k, seed=0):
    """k positions, drawn once and the same for every pool. The seeds of a pool are random, so this
    is the baseline that ignores the rewards."""
    return Random(seed).sample(range(len(_checked(rewards, k))), k)


def mean_deviation(rewards, k):
    """The k that are farthest from the mean of the pool, above it or below it."""
    values = _checked(rewards, k)
    mean = sum(values) / len(values)
    return _from_highest([abs(v - mean) for v in values])[:k]


def extremes_random(rewards, k, seed=0):
    """The highest, the lowest and k - 2 random ones of the others, as in the authors' code."""
    values = _checked(rewards, k)
    extremes = best_worst(values, 2) if k > 1 else []
    rest = [i for i in range(len(values)) if i not in set(extremes)]
    return extremes + Random(seed).sample(rest, k - len(extremes))


RULES = {  # the names that --select takes
    "best_worst": best_worst,
    "random_subset": random_subset,
    "mean_deviation": mean_deviation,
    "extremes_random": extremes_random,
}


def rank_fidelity(proxy, truth, k):
    """How well `proxy` ranks n candidates whose true rewards are `truth`: a dict of

    kendall_tau (tau-b), spearman_rho: in [-1, 1], NaN if all values of one side are equal;
    top_match, bottom_match: share of the proxy's best (worst) k that are among the true ones;
    top_rank, bottom_rank: mean true rank, 1 = best, of the proxy's best (worst) k.
    The last four are expected values if equal rewards are put in random order on each side.
    Raises ValueError as the rules do, and on different lengths.
    """
    x, y = _checked(proxy, k), _checked(truth, k)
    # A row for each candidate: 1 for every other whose reward is lower, -1 if higher, 0 if equal.
    signs_x, signs_y = ([[(a > b) - (a < b) for b in values] for a in values] for values in (x, y))
    wins_x, wins_y = ([sum(row) for row in rows] for rows in (signs_x, signs_y))
    ranks = [(len(y) + 1 - wins) / 2 for wins in wins_y]  # equal rewards share their mean rank
    fidelity = {"kendall_tau": _cosine(sum(signs_x, []), sum(signs_y, []))}
    fidelity["spearman_rho"] = _cosine(wins_x, wins_y)
    for side, above in (("top", -1), ("bottom", 1)):
        kept, best = (_chances(rows, above, k) for rows in (signs_x, signs_y))
        fidelity[f"{side}_match"] = sum(a * b for a, b in zip(kept, best)) / k
        fidelity[f"{side}_rank"] = sum(a * rank for a, rank in zip(kept, ranks)) / k
    return fidelity


def _chances(signs, above, k):
    """Each candidate's chance to be among the first k, where `above` marks those before it."""
    return [min(max((k - row.count(above)) / row.count(0), 0), 1) for row in signs]


def _cosine(x, y):
    norm = (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    return sum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else float("nan")


if __name__ == "select":  # imported in the place of the standard library's module
    import sys
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
    from importlib.util import module_from_spec

    # Only compiled modules are looked for, so that no select.py can be found again.
    finders = (FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES)) for path in sys.path)
    spec = next(filter(None, (finder.find_spec("select") for finder in finders)))
    sys.modules["select"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])
