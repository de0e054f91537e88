"""Several processes, started by torchrun: the same run on one GPU or on many.

    torchrun --nproc_per_node=8 train.py ...

Every process holds the whole model and draws its share of an iteration's prompts. All else is the
same computation in each process, so that the policies stay equal. Prompts, and not images, are
shared out, and gradients are summed: the micro-batches and the sums are the same for any
number of processes. If a process fails, torchrun ends the others; the last checkpoint stays.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.errors import InputError

# torchrun sets these three. Without WORLD_SIZE the others mean nothing.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK, LOCAL_RANK = (
    int(os.environ.get(name) or 0) if WORLD > 1 else 0 for name in ("RANK", "LOCAL_RANK")
)


@contextlib.contextmanager
def group():
    """Inside, the processes of a run can exchange results; with one process it does nothing.
    Raises InputError without torchrun's variables."""
    if WORLD == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except ValueError as error:  # it names the variable that is missing
        raise InputError(f"WORLD_SIZE={WORLD}: unset it, or use torchrun ({error})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def say(text):
    """Print a line, in the first process only, above the progress bar. What the console cannot
    show, such as Chinese on Windows, becomes "?"."""
    if RANK == 0:
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))


def mine(items):
    """This process's share of a list."""
    return items[RANK::WORLD]


def gather(share):
    """The results that every process has for its share of a list, in the order of the list."""
    if WORLD == 1:
        return share
    shares = [None] * WORLD
    dist.all_gather_object(shares, share)
    results = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        results[rank::WORLD] = share
    return results


def total(tensor):
    """Sum a tensor over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)


@contextlib.contextmanager
def first_on_its_node():
    """One process of each computer does what is inside before the others do: what it downloads is
    then there for them."""
    if LOCAL_RANK:
        gather([None])
    yield
    if not LOCAL_RANK:
        gather([None])
