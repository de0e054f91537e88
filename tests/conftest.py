import os
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))  # flat scripts: works from any working directory
os.environ.setdefault("HF_HUB_OFFLINE", "1")


FAMILIES = ("sana", "flux", "sd3")


@pytest.fixture(scope="session")
def world():
    """The folder of the pretrained tiny models (made on first use, then cached)."""
    import tiny

    return tiny.ensure(*FAMILIES, progress=False)


def load(world, name, solver=None):
    """A fresh tiny model in float32."""
    import torch

    import models

    return models.load(name, world / name, 32, solver, dtype=torch.float32)


@pytest.fixture(scope="session")
def sana(world):
    return load(world, "sana")


@pytest.fixture(scope="session", params=FAMILIES)
def model(request, world):
    """Every tiny model, in float32; a test must leave it as it was."""
    return load(world, request.param)
