import os
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))  # flat scripts: works from any working directory
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def world():
    """The folder of the pretrained tiny models (made on first use, then cached)."""
    import tiny

    return tiny.ensure(progress=False)


@pytest.fixture(scope="session")
def sana(world):
    """The tiny SANA in float32."""
    import torch

    import models

    return models.load("sana", world / "sana", dtype=torch.float32)
