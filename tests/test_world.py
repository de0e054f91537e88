"""The tiny world: its captions and pictures, and where its models are kept."""

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

from support import world
from support.errors import InputError

# VERSION -> hash of the code that made the tiny models of that version.
PRETRAINING_CODE = {2: "92521016e917cc2c"}


def test_a_tenth_of_the_captions_is_held_out():
    assert len(set(world.CAPTIONS)) == 2 * 2 * 6 * 6 * 5 == 720
    held_out, train = set(world.HELD_OUT_PROMPTS), set(world.TRAIN_PROMPTS)
    assert len(held_out) == 72 and held_out.isdisjoint(train)
    assert held_out | train == set(world.CAPTIONS)


def test_pictures_show_what_the_captions_say():
    prompts = [
        "a large plain red circle in the middle",
        "a small plain blue circle in the middle",
        "a large plain green ring in the middle",
        "a small plain red square on the left",
        "a large striped yellow square in the middle",
    ]
    images = world.draw(prompts, torch.Generator().manual_seed(0))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    centre = images[:, :, 16, 16]
    assert centre[0].argmax() == 0 and centre[1].argmax() == 2  # red, blue
    assert centre[2].min() > 0.8  # a ring has the paper's colour in its middle
    inked = (images.amin(dim=1) < 0.7).flatten(1).sum(dim=1)
    assert inked[0] > 2 * inked[1]  # radius 9.5 and 5.5
    columns = (images[3].amin(dim=0) < 0.7).nonzero()[:, 1].float()
    assert columns.mean() == pytest.approx(10, abs=1.5)  # 6 left of the middle
    rows = images[4, 0, 10:22, 10:22]
    assert rows.max() - rows.min() > 0.5  # stripes


def test_the_same_generator_draws_the_same_pictures():
    prompts = world.HELD_OUT_PROMPTS
    first, second, other = (
        world.draw(prompts, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_models_are_in_a_cache_folder_named_after_version_and_pretraining(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SOL_RL_CACHE", str(tmp_path))
    before = world.models_folder()
    assert before.parent == tmp_path and re.fullmatch(r"tiny-v\d+-[0-9a-f]{8}", before.name)
    monkeypatch.setitem(world.PRETRAINING, "sana", (271, 2e-3))
    assert world.models_folder() != before
    monkeypatch.delenv("SOL_RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert world.models_folder().parent == tmp_path / "xdg" / "sol_rl"


def test_what_is_missing_is_pretrained_by_a_program_of_its_own(monkeypatch, tmp_path, capsys):
    """First, at the same time, the parts that others are built on; then the others."""
    monkeypatch.setenv("SOL_RL_CACHE", str(tmp_path))
    folder, built, exit_code = world.models_folder(), [], 0

    class Popen:
        def __init__(self, command):
            assert command[:2] == [sys.executable, str(program)]
            (self.part,) = command[2:]
            built.append(self.part)

        def wait(self):
            (folder / self.part).mkdir(parents=True)
            return exit_code

    program = PROJECT / "experiments" / "pretrain_world.py"
    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert world.ensure_models() == folder and built == ["clip"]
    assert world.ensure_models("sana", "flux") == folder
    assert built == ["clip", "autoencoder_kl", "sana", "flux"]
    assert "first use: pretraining sana, flux" in capsys.readouterr().out
    assert world.ensure_models("sana") == folder and len(built) == 4  # nothing is missing
    exit_code = 1
    with pytest.raises(InputError, match="pretraining in .* failed"):
        world.ensure_models("sd3")


def test_a_part_is_complete_or_absent_and_does_not_depend_on_the_time(monkeypatch, tmp_path):
    """An autoencoder in two training steps, twice; and one whose writing fails."""
    from safetensors.torch import load_file

    monkeypatch.setitem(world.PRETRAINING, "autoencoder_dc", (2, 4e-3))
    pretrain_world = load_pretrain_world()
    weights = []
    for name in ("first", "second"):
        monkeypatch.setenv("SOL_RL_CACHE", str(tmp_path / name))
        folder = pretrain_world.Builder().part("autoencoder_dc")
        weights.append(load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    class Failing:
        def save_pretrained(self, folder):
            (Path(folder) / "half").write_text("")
            raise OSError("disk full")

    monkeypatch.setitem(pretrain_world.PARTS, "sana", lambda builder: [Failing()])
    with pytest.raises(OSError, match="disk full"):
        pretrain_world.Builder().part("sana")
    assert [path.name for path in folder.parent.iterdir()] == ["autoencoder_dc"]


def load_pretrain_world():
    from experiments import pretrain_world

    return pretrain_world


def test_the_version_is_raised_with_the_code_that_makes_the_models():
    assert PRETRAINING_CODE.get(world.VERSION) == pretraining_code(), (
        "The code that makes the tiny models has changed. If it makes other models now, raise "
        "VERSION in support/world.py; else users keep those they have. In both cases write "
        f"{{VERSION: {pretraining_code()!r}}} into PRETRAINING_CODE in tests/test_world.py."
    )


def pretraining_code():
    """Hash of experiments/pretrain_world.py and world.draw, without comments and docstrings."""
    program = ast.parse((PROJECT / "experiments" / "pretrain_world.py").read_text())
    statements = ast.parse(Path(world.__file__).read_text()).body
    draw = next(node for node in statements if getattr(node, "name", "") == "draw")
    text = []
    for node in [*ast.walk(program), *ast.walk(draw)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0].value.value = ""
        # Not ast.dump, whose text is not the same in all versions of Python.
        values = [
            value for _, value in ast.iter_fields(node) if isinstance(value, str | int | float)
        ]
        text.append(f"{type(node).__name__} {values}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
