"""Select: which candidates of a pool are kept (step 2), and how well a proxy ranks (Table 8).

A rule is a function (rewards, k) -> k indices. To add one, write it and add it to RULES; then
`python train.py --select NAME` uses it.

The standard library has a module `select` too, which subprocess and asyncio import. Where it is not
built into the interpreter (pyenv, python.org, conda), they get this file, because a script's folder
comes first on the path. This file therefore imports nothing heavy, and its last lines hand on the
names of the real module. train.py loads this file by its path, under the name `selection`.
"""


def _checked(rewards, k):
    """The rewards as a list of floats. Raises ValueError if k of them cannot be kept."""
    values = [float(r) for r in (rewards.tolist() if hasattr(rewards, "tolist") else rewards)]
    if not values:
        raise ValueError("the pool is empty")
    if any(v != v for v in values):
        raise ValueError(f"reward {[v != v for v in values].index(True)} of the pool is NaN")
    if not 1 <= k <= len(values):
        raise ValueError(f"cannot keep {k} of {len(values)}")
    return values


def _from_highest(values):
    """Indices from the highest value to the lowest; of equal values the lower index is first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def best_worst(rewards, k):
    """The paper's rule: the k // 2 highest in falling order, then the k - k // 2 lowest in rising
    order. rewards: n numbers as a tensor, an array or a list. Returns a list of k indices; of equal
    rewards the lower index is taken. Raises ValueError on k < 1, k > n, an empty pool or NaN, as
    all rules do."""
    values = _checked(rewards, k)
    best = _from_highest(values)[: k // 2]
    worst = [i for i in _from_highest([-v for v in values]) if i not in set(best)]
    return best + worst[: k - k // 2]


def random_subset(rewards, k, seed=0):
    """k at random: the baseline that does not look for contrast, at the same cost of training. The
    seed is fixed: the same places of every pool, whose candidates are random."""
    from random import Random

    return Random(seed).sample(range(len(_checked(rewards, k))), k)


def mean_deviation(rewards, k):
    """The k that are farthest from the mean of the pool, above it or below it."""
    values = _checked(rewards, k)
    mean = sum(values) / len(values)
    return _from_highest([abs(v - mean) for v in values])[:k]


def extremes_random(rewards, k, seed=0):
    """The highest, the lowest and k - 2 random ones of the others, as in the authors' code."""
    from random import Random

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
    top_match, bottom_match: share of the proxy's best (worst) k that are truly among them;
    top_rank, bottom_rank: mean true rank, 1 = best, of the proxy's best (worst) k.
    Raises ValueError as the rules do, and on different lengths.
    """
    x, y = _checked(proxy, k), _checked(truth, k)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} proxy rewards but {len(y)} true ones")
    sign = lambda a: (a > 0) - (a < 0)  # noqa: E731
    pairs = [(sign(x[i] - x[j]), sign(y[i] - y[j])) for i in range(len(x)) for j in range(i)]
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    best_by_truth, worst_by_truth = _from_highest(y), _from_highest([-v for v in y])
    rank = {i: place + 1 for place, i in enumerate(best_by_truth)}
    best, worst = _from_highest(x)[:k], _from_highest([-v for v in x])[:k]
    return {
        "kendall_tau": sum(a * b for a, b in pairs) / untied**0.5 if untied else float("nan"),
        "spearman_rho": _correlation(_mean_ranks(x), _mean_ranks(y)),
        "top_match": len(set(best) & set(best_by_truth[:k])) / k,
        "bottom_match": len(set(worst) & set(worst_by_truth[:k])) / k,
        "top_rank": sum(rank[i] for i in best) / k,
        "bottom_rank": sum(rank[i] for i in worst) / k,
    }


def _mean_ranks(values):
    """Ranks from 1; equal values share the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def _correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    norm = (sum(a * a for a in dx) * sum(b * b for b in dy)) ** 0.5
    return sum(a * b for a, b in zip(dx, dy)) / norm if norm else float("nan")


def _standard_select():
    """The standard library's module: found on sys.path among compiled modules only, so that no
    select.py can be taken for it."""
    import sys
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
    from importlib.util import module_from_spec

    for folder in sys.path:
        spec = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("select")
        if spec:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("the standard library's select module is not on sys.path")


if __name__ == "select":  # imported in the place of the standard library's module
    names = vars(_standard_select()).items()
    globals().update({name: value for name, value in names if not name.startswith("__")})
