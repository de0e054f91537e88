"""A run of several processes gives the numbers of a run of one."""

import json
import os
import subprocess
import sys

import torch
from conftest import MINIATURE, PROJECT, outcome

import train
from support import checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


def torchrun(n, *command):
    """Run a command on n processes: (exit code, their output)."""
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
import json, os, time
import torch
from support import distributed as d

with d.group():
    items = list(range(7))
    result = {"rank": d.RANK, "gathered": d.gather([10 * i for i in d.mine(items)])}
    result["few"] = d.gather([str(i) for i in d.mine(items[:1])])
    tensor = torch.full((2,), 10.0**d.RANK, dtype=torch.float64)
    d.total(tensor)
    result["total"] = tensor.tolist()
    with d.first_on_its_node():
        time.sleep(0.5 * (d.LOCAL_RANK == 0))
        result["time"] = time.monotonic()
    d.say("once")
os.write(1, f"RESULT{json.dumps(result)}\\n".encode())  # print would mix the lines of processes
"""


def test_items_are_shared_out_results_gathered_in_their_order_and_tensors_summed(tmp_path):
    (tmp_path / "script.py").write_text(PRIMITIVES)
    code, text = torchrun(3, tmp_path / "script.py")
    results = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("RESULT")]
    results.sort(key=lambda result: result["rank"])
    assert code == 0 and [result["rank"] for result in results] == [0, 1, 2], text
    for result in results:
        assert result["gathered"] == [0, 10, 20, 30, 40, 50, 60] and result["few"] == ["0"]
        assert result["total"] == [111, 111]
    assert all(result["time"] >= results[0]["time"] for result in results)
    assert text.count("once") == 1


KILLED = """
import os, signal, sys
import train
from support import distributed

def killed(run, *rest):
    if rest[-1] == 2 and distributed.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, *rest)

update, train.update = train.update, killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_of_three_processes_one_of_which_dies_then_of_two_is_that_of_one(tmp_path):
    options = [*MINIATURE, "--steps", "3", "--prompts_per_step", "4", "--micro_batch", "3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main([*options, "--output_dir", str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)

    (tmp_path / "killed.py").write_text(KILLED)
    folder = tmp_path / "many"
    code, text = torchrun(3, tmp_path / "killed.py", *options, "--output_dir", folder)
    assert code != 0 and text.count("explored in nvfp4") == 1, text
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [1, 2]
    code, text = torchrun(2, PROJECT / "train.py", "--resume", folder)
    assert code == 0, text
    assert outcome(folder) == outcome(tmp_path / "one")
