import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))  # flat scripts: works from any working directory
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: on tensors this small, two threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How many examples a property test without a number of its own looks at; --hypothesis-profile.
settings.register_profile("quick", max_examples=300, deadline=None)
settings.register_profile("thorough", max_examples=20_000, deadline=None)
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, as with -n 2, unless -n says otherwise."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # this is one of the two
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if whole and config.getoption("numprocesses", 2) is None and not config.getoption("usepdb"):
        config.option.numprocesses = 2


MODEL_NAMES = ("sana", "flux", "sd3")
MINIATURE = (
    "--steps 2 --prompts_per_step 1 --pool 6 --keep 4 --explore_steps 1 --rollout_steps 2 "
    "--eval_steps 1 --eval_every 1 --micro_batch 36 --device cpu --checkpoint_every 1 --prompts"
).split() + [str(PROJECT / "tests" / "prompts.txt")]


def lines(folder):
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def error_line(said, program="train.py"):
    """The error on a program's stderr, which must be one line. Packages may print before it."""
    _, ours, error = said.partition(f"{program}: error: ")
    assert ours and "\n" not in error.strip(), said
    return error.strip()


def outcome(folder):
    """All that must be equal in equal runs: the log without seconds, the LoRA's tensors."""
    from safetensors.torch import load_file

    log = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(folder)]
    lora = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    return log, {name: tensor.tolist() for name, tensor in lora.items()}


def load(name, solver=None):
    """A fresh tiny model in float32."""
    import torch

    from support import models

    return models.load(name, solver=solver, dtype=torch.float32)


def with_policies(model):
    """Add LoRA to a model. Returns its transformer, whose policy, old policy and base differ."""
    from support import models

    models.add_lora(model, 4, 8)
    for p in models.lora_parameters(model.transformer, "default"):
        p.data.add_(0.05)
    models.follow(model.transformer, "old", eta=0.25)
    return model.transformer


@pytest.fixture(scope="session")
def sana():
    return load("sana")


@pytest.fixture(scope="session", params=MODEL_NAMES)
def model(request):
    """Every tiny model, in float32; a test must leave it as it was."""
    return load(request.param)
