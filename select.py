"""Which candidates of a pool are kept, and how well a proxy ranks (Table 8).

Plain Python on plain numbers: pools are small, and the file's name is also that of a module of
the standard library, which subprocess, selectors and asyncio import. Where that one is not built
into the interpreter, this folder comes first on the path and they all get this file, so it hands
on the real module's names (the end of the file) and imports nothing that is not needed for that.
The project itself loads this file by its path, under the name `selection`; see train.py.
"""


def _numbers(rewards):
    return [float(r) for r in (rewards.tolist() if hasattr(rewards, "tolist") else rewards)]


def _check(rewards, k):
    values = _numbers(rewards)
    if not values:
        raise ValueError("the pool is empty")
    if any(v != v for v in values):
        raise ValueError(f"reward {[v != v for v in values].index(True)} of the pool is NaN")
    if not 1 <= k <= len(values):
        raise ValueError(f"cannot keep {k} of {len(values)}")
    return values


def _order(values):
    """Indices from the highest value to the lowest; ties by the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def best_worst(rewards, k):
    """The paper's rule: the k // 2 highest in falling order, then the k - k // 2 lowest in rising
    order. rewards: n numbers as a tensor, an array or a list; returns k indices (a list of int).
    Ties by the lower index. Raises ValueError on k < 1, k > n, an empty pool or NaN; so do the
    other rules."""
    values = _check(rewards, k)
    best = _order(values)[: k // 2]
    worst = [i for i in _order([-v for v in values]) if i not in set(best)]
    return best + worst[: k - k // 2]


def random_subset(rewards, k, seed=0):
    """k at random: the control that shows what contrast buys at equal cost of training."""
    from random import Random

    return Random(seed).sample(range(len(_check(rewards, k))), k)


def mean_deviation(rewards, k):
    """The k farthest from the pool's mean, on whichever side."""
    values = _check(rewards, k)
    mean = sum(values) / len(values)
    return _order([abs(v - mean) for v in values])[:k]


def extremes_random(rewards, k, seed=0):
    """best_worst for k // 2 of the k, random ones of the remaining candidates for the rest."""
    values = _check(rewards, k)
    extremes = best_worst(values, k // 2) if k > 1 else []
    rest = [i for i in range(len(values)) if i not in set(extremes)]
    return extremes + [rest[i] for i in random_subset(rest, k - len(extremes), seed)]


def rank_fidelity(proxy, truth, k):
    """How well `proxy` ranks n candidates whose true rewards are `truth`: a dict of

    kendall_tau (tau-b), spearman_rho: in [-1, 1], NaN where one side is constant;
    top_match, bottom_match: share of the proxy's best (worst) k that are truly among them;
    top_rank, bottom_rank: mean true rank, 1 = best, of the proxy's best (worst) k.
    Raises ValueError as the rules do, and on different lengths.
    """
    x, y = _check(proxy, k), _check(truth, k)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} proxy rewards but {len(y)} true ones")
    sign = lambda a: (a > 0) - (a < 0)  # noqa: E731
    pairs = [(sign(x[i] - x[j]), sign(y[i] - y[j])) for i in range(len(x)) for j in range(i)]
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    by_truth, worst_first = _order(y), _order([-v for v in y])
    rank = {i: place + 1 for place, i in enumerate(by_truth)}
    best, worst = _order(x)[:k], _order([-v for v in x])[:k]
    return {
        "kendall_tau": sum(a * b for a, b in pairs) / untied**0.5 if untied else float("nan"),
        "spearman_rho": _correlation(_mean_ranks(x), _mean_ranks(y)),
        "top_match": len(set(best) & set(by_truth[:k])) / k,
        "bottom_match": len(set(worst) & set(worst_first[:k])) / k,
        "top_rank": sum(rank[i] for i in best) / k,
        "bottom_rank": sum(rank[i] for i in worst) / k,
    }


def _mean_ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def _correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    norm = (sum(a * a for a in dx) * sum(b * b for b in dy)) ** 0.5
    return sum(a * b for a, b in zip(dx, dy)) / norm if norm else float("nan")


def _real_select():
    """The standard library's extension module, found on sys.path among extension modules only, so
    that neither this file nor another select.py can be taken for it."""
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


if __name__ == "select":  # imported in its place, not loaded by path
    globals().update({k: v for k, v in vars(_real_select()).items() if not k.startswith("__")})
