"""Many processes: the same run on one GPU or on many, on one node or on more.

    torchrun --nproc_per_node=8 train.py ...

Every rank holds the whole model and draws its share of the prompts; everything else is the same
computation on each, from the same numbers, so the ranks cannot drift apart. Two collectives are
all there is: `exchange`, of small Python objects, and `total`, of gradients. Prompts, and not
images, are split, and gradients are summed in float64: whichever rank draws a prompt, in whatever
company, its micro-batches are the same, and so are the sums.

A rank that cannot go on joins the next exchange with its error instead of a value, and all raise
it there. One that dies, or does not come within TIMEOUT, is Lost to the others, who end.
"""

import contextlib
import os
import pickle
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these four
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
TIMEOUT = timedelta(minutes=30)  # how long ranks wait for one that downloads, pretrains or hangs


class Lost(RuntimeError):
    """Another process died or did not answer."""


@contextlib.contextmanager
def group():
    """All processes of a run, together; an exception that leaves one leaves all."""
    if WORLD == 1:
        yield
        return
    both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _lost():
        dist.init_process_group(both, timeout=TIMEOUT)
    try:
        yield
        exchange(None)  # leave together: the last error of one is one of all
    except Exception as error:
        if not (hasattr(error, "rank") or isinstance(error, Lost)):  # those all know of
            fail(error)
        raise
    finally:
        dist.destroy_process_group()


def say(text, **how):
    """A line on the console, from the first process alone."""
    if RANK == 0:
        tqdm.write(text, **how)


def mine(items):
    """This rank's share of a list."""
    return items[RANK::WORLD]


def gather(share):
    """Everyone's results for `mine(items)` -> the results for items, in their order."""
    shares = exchange(share)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def exchange(value):
    """Each rank's value, by rank; if that of a rank is an exception, all raise it, with the rank
    as its `rank`. Raises Lost."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    with _lost():
        dist.all_gather_object(values, value)
    for rank, value in enumerate(values):
        if isinstance(value, Exception):
            value.rank = rank
            raise value
    return values


def total(tensor):
    """Sum a tensor over the ranks, in place, in one collective; every rank gets the same. Raises
    Lost."""
    if WORLD > 1:
        with _lost():
            dist.all_reduce(tensor)


def fail(error):
    """Raise an error here and, at their next exchange, in all other ranks."""
    if WORLD > 1:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Lost):  # then what is wrong here says more
            exchange(error)
    raise error


@contextlib.contextmanager
def first_on_its_node():
    """One rank of each node does this before the others: what it downloads or trains they find."""
    if LOCAL_RANK:
        exchange(None)
    yield
    if not LOCAL_RANK:
        exchange(None)


@contextlib.contextmanager
def _lost():
    try:
        yield
    except (RuntimeError, ValueError) as error:  # the latter where RANK is not torchrun's
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Lost(
            f"rank {RANK}: another process died or did not answer for {TIMEOUT}, its own lines say "
            f"why; the last checkpoint is whole ({line})"
        ) from error
