"""Several processes give the numbers of one."""

import io
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import MINIATURE, PROJECT, error_line, lines
from safetensors.torch import load_file

import train
from support import distributed


def test_a_run_of_two_processes_with_unequal_shares_is_that_of_one(tmp_path):
    """Gradients are summed in another order. In two steps AdamW and the rounding of merged weights
    to BF16 make 1e-5 of that. Gradient checkpointing, in one of the two runs, changes no number."""
    options = [*MINIATURE, "--prompts_per_step", "3", "--micro_batch", "3", "--output_dir"]
    assert train.main([*options, str(tmp_path / "one"), "--gradient_checkpointing"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, PROJECT / "train.py", *options, tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("explored in nvfp4") == 1  # only the first process speaks
    for two, one in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in [name for name in one if not name.startswith("time/")]:
            near = 1e-4 if name.startswith(("eval/", "reward/")) else 1e-6  # some losses are small
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=near), name
    two, one = (
        load_file(next((tmp_path / name / "lora").glob("*.s*s"))) for name in ("two", "one")
    )
    difference = torch.cat([(two[name] - values).abs().flatten() for name, values in one.items()])
    assert difference.mean() < 1e-5 and difference.max() < 1e-4


def test_several_processes_without_torchrun_are_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "WORLD", 2)
    assert train.main([]) == 2 and "torchrun" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("rank", ["", "1"])
def test_an_empty_variable_of_torchrun_is_as_none_and_a_rank_alone_means_nothing(rank, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", ""), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    found = runpy.run_path(distributed.__file__)
    assert (found["RANK"], found["WORLD"], found["LOCAL_RANK"]) == (0, 1, 0)


def test_what_a_console_cannot_show_does_not_end_a_run(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    distributed.say("wrote C:/运行: é")
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").strip() == "wrote C:/??: é"


@pytest.mark.parametrize("rank, order", [(2, ["load", "meet"]), (3, ["meet", "load"])])
def test_on_each_computer_one_process_downloads_before_the_others(rank, order, monkeypatch):
    """Here on the second of two computers, with two processes each."""
    seen = []
    monkeypatch.setattr(distributed, "RANK", rank)
    monkeypatch.setattr(distributed, "LOCAL_RANK", rank - 2)
    monkeypatch.setattr(distributed, "gather", lambda share: seen.append("meet"))
    with distributed.first_on_its_node():
        seen.append("load")
    assert seen == order
