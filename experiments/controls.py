"""Controls: train.py with one of its functions replaced.

    python experiments/controls.py negated -- --model sana --seed 1

What stands after `--` are train.py's own options. Several controls are joined by `+`, as in
every_layer+weights_one. If the reward rises as much under a control as without it, then the part of
the method that the control removes is not the cause of the rise. `python experiments/paper.py
controls` and `naive_fp4` compare them.

Nothing in a run's folder says which control made it: put the control's name into --output_dir, and
resume such a run with this program only.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import rollout
import train
from rollout import make_copy  # the originals, under names that stay as they are
from support import models
from support.errors import InputError, exit_code, require
from support.models import follow
from train import group_advantages, nft_loss, update


def negated(rewards, *settings):
    """Advantages with the other sign: the worst candidates are imitated, the best avoided."""
    return -group_advantages(rewards, *settings)


def weights_one(rewards, adv_clip=5.0, std_over="all"):
    """Advantages that make r = 1 for every sample: fine-tuning on one's own samples."""
    return torch.full_like(rewards, adv_clip)


def advantage_weighted(v, v_old, v_ref, x_t, x_0, t, advantages, beta=1.0, adv_clip=5.0, kl=1e-4):
    """Advantage-weighted regression: only l_plus, weighted by the advantage where it is positive.
    The gradient of the KL term is weighted too. The arguments are those of nft_loss."""
    weight = (advantages / adv_clip).clamp(0, 1).reshape(-1, *[1] * (v.dim() - 1))
    v = v.detach() + weight * (v - v.detach())  # the same values; their gradients are weighted
    r_is_one = torch.full_like(advantages, adv_clip)
    return nft_loss(v, v_old, v_ref, x_t, x_0, t, r_is_one, beta, adv_clip, kl)


def other_text(run, samples, step):
    """An update in which each prompt's samples have the text of another prompt of the step. (For
    runs in one process: `samples` are those of this process's prompts.)"""
    require(len(samples) > 1, "--prompts_per_step 1: other_text needs at least 2")
    texts = [candidates.text for candidates in samples]
    pairs = zip(samples, texts[1:] + texts[:1])
    return update(run, [dataclasses.replace(sample, text=text) for sample, text in pairs], step)


def old_fixed(transformer, follower, eta):
    """eta = 1 for the old policy: what draws candidates stays the base model."""
    follow(transformer, follower, 1.0 if follower == "old" else eta)


def every_layer(model, precision, skip=(), min_dim=0):
    """A copy of the transformer in which no linear layer stays in BF16."""
    return make_copy(model, precision)


CONTROLS = {  # name -> (module, the name of its function that is replaced, what replaces it)
    "negated": (train, "group_advantages", negated),
    "weights_one": (train, "group_advantages", weights_one),
    "advantage_weighted": (train, "nft_loss", advantage_weighted),
    "other_text": (train, "update", other_text),
    "old_fixed": (models, "follow", old_fixed),
    "every_layer": (rollout, "make_copy", every_layer),
}


def replace_functions(names):
    """Replace the functions of these controls, joined by +. Raises InputError."""
    for name in names.split("+"):
        known = ", ".join(CONTROLS)
        require(name in CONTROLS, f"{name}: must be one of {known}, or several joined by +")
        setattr(*CONTROLS[name])


def main(argv):
    if argv[1:2] != ["--"]:
        raise InputError("usage: controls.py NAME -- train.py's options")
    replace_functions(argv[0])
    sys.exit(train.main(argv[2:]))


if __name__ == "__main__":
    sys.exit(exit_code("controls.py", lambda: main(sys.argv[1:])))
