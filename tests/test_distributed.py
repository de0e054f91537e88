"""Many processes give the run of one, and end together."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import MINIATURE, PROJECT, outcome
from safetensors import SafetensorError

import checkpoint
import train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


def torchrun(n, *command):
    """A command on n processes; (exit code, what they said)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, f"--nproc_per_node={n}", *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


PRIMITIVES = """
import json, os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import distributed as d

d.TIMEOUT = timedelta(seconds=4)
said = {"rank": d.RANK}
try:
    with d.group():
        items = list(range(7))
        said["gathered"] = d.gather([10 * i for i in d.mine(items)])
        said["few"] = d.gather([str(i) for i in d.mine(items[:1])])
        tensor = torch.full((2,), 10.0**d.RANK, dtype=torch.float64)
        d.total(tensor)
        said["total"] = tensor.tolist()
        with d.first_on_its_node():
            time.sleep(0.5 * (d.LOCAL_RANK == 0))
            said["at"] = time.monotonic()
        said["errors"] = []
        for error in (ValueError("a b"), KeyError(lambda: 0)):  # one cannot be sent as it is
            try:
                if d.RANK == 1:
                    d.fail(error)
                d.exchange("others are here")
            except Exception as e:
                said["errors"].append([type(e).__name__, str(e)[:12], e.rank])
        if d.RANK == 1:
            time.sleep(6)
        d.exchange(0)
except d.Lost as error:
    said["lost"] = str(error)
os.write(1, f"SAID{json.dumps(said)}\\n".encode())  # print would mix the lines of processes
"""


def test_exchanges_totals_errors_and_a_rank_that_hangs(tmp_path):
    (tmp_path / "script.py").write_text(PRIMITIVES)
    code, text = torchrun(3, tmp_path / "script.py")
    said = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("SAID")]
    said.sort(key=lambda each: each["rank"])
    assert len(said) == 3, text
    for each in said:
        assert each["gathered"] == [0, 10, 20, 30, 40, 50, 60] and each["few"] == ["0"]
        assert each["total"] == [111, 111]
        assert each["errors"] == [["ValueError", "a b", 1], ["RuntimeError", "KeyError: <f", 1]]
        assert "another process died or did not answer for 0:00:04" in each["lost"]
    assert all(each["at"] >= said[0]["at"] for each in said)


@pytest.mark.parametrize(
    "error",
    [
        *(kind("a line") for kind in (*train.BAD_INPUT, SafetensorError, checkpoint.Ended)),
        checkpoint.Stopped(15),
        train.NonFinite("loss", torch.tensor(1.0), "update", "a cat", 3, "bf16"),
        train.NonFiniteScores("mine", torch.ones(2), "a cat"),
        OSError(28, "No space left on device", "a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_reaches_the_others_as_it_is(error):
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error) and str(other) == str(error)


KILLED = """
import os, signal, sys
import distributed, train

def killed(run, *rest):
    if rest[-1] == 2 and distributed.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, *rest)

update, train.update = train.update, killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_of_three_processes_one_of_which_dies_then_of_two_is_that_of_one(tmp_path, world):
    options = [*MINIATURE, "--steps", "3", "--prompts_per_step", "4", "--micro_batch", "3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main([*options, "--output_dir", str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)

    (tmp_path / "killed.py").write_text(KILLED)
    folder = tmp_path / "many"
    code, said = torchrun(3, tmp_path / "killed.py", *options, "--output_dir", folder)
    assert code != 0 and said.count("explored in nvfp4") == 1
    assert "rank 0: another process died" in said and "rank 2: another process died" in said
    assert [step for step, _ in checkpoint.found(folder)] == [1, 2]
    code, said = torchrun(2, PROJECT / "train.py", "--resume", folder)
    assert code == 0, said
    assert outcome(folder) == outcome(tmp_path / "one")


LAST = """
import os, sys
import distributed, train

def fails_at_its_end(config):
    if distributed.RANK == 0:
        raise OSError("the disk is full")
    return 0

train.train = fails_at_its_end
os.write(1, f"CODE {train.main(sys.argv[1:])}\\n".encode())
"""


def test_the_first_processs_last_error_ends_all_and_is_said_once(tmp_path):
    (tmp_path / "last.py").write_text(LAST)
    code, said = torchrun(2, tmp_path / "last.py", "--output_dir", tmp_path / "run")
    assert code == 0 and said.count("CODE 2") == 2, said
    assert said.count("train.py: error: the disk is full") == 1


def test_each_process_takes_the_gpu_of_its_own(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(train.distributed, "LOCAL_RANK", 3)
    for device in ("cuda", "cuda:1"):
        assert train.main(["--device", device]) == 2  # there is none here
    assert taken == [3, 1]
    monkeypatch.setattr(train.distributed, "WORLD", 4)
    monkeypatch.setattr(train.distributed, "group", train.contextlib.nullcontext)
    assert train.main(["--device", "cuda:1"]) == 2
    assert "--device cuda:1: one for 4 processes; give cuda" in capsys.readouterr().err
    assert train.main(["--prompts_per_step", "3"]) == 2
    assert "--prompts_per_step 3: fewer than the 4 processes" in capsys.readouterr().err
