"""Minutes of abuse, too long for pytest: a miniature run killed, starved, split and fuzzed.

python tests/soak.py kill       # 50 runs of 6 steps, SIGKILL at random moments, resumed
python tests/soak.py write      # 20 more, killed inside the writing of a checkpoint
python tests/soak.py disk       # a disk that is full at every write in turn
python tests/soak.py ranks      # 1, 2 and 3 processes; killed, hanging, failing, stopped ones
python tests/soak.py fuzz       # 300 command lines and prompts files
python tests/soak.py memory     # 200 steps: resident size and open files
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import MINIATURE, PROJECT, lines, outcome

import train

SIX = [*MINIATURE, "--steps", "6", "--eval_every", "3"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


def run(*command):
    """A command of Python: its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def forked(*options, timeout=None):
    """train.py in a child that has its imports already, killed after so many seconds; exit code."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        os._exit(train.main([str(option) for option in options]))
    if timeout is not None:
        time.sleep(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def to_the_end(folder, timeouts):
    """Start a run, or resume it, again and again until it is done; how often it was killed."""
    kills = 0
    while True:
        options = ["--resume", folder]
        if not list((folder / "checkpoints").glob("step_*")):
            shutil.rmtree(folder, ignore_errors=True)
            options = [*SIX, "--output_dir", folder]
        code = forked(*options, timeout=next(timeouts))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code
        kills += 1


def kill(root, runs=50):
    start = time.monotonic()
    assert forked(*SIX, "--output_dir", root / "whole") == 0
    seconds, expected = time.monotonic() - start, outcome(root / "whole")
    draw, kills, same = random.Random(0), 0, 0
    for i in range(runs):
        timeouts = iter(lambda: draw.uniform(0.2, 1.1) * seconds, 0)
        kills += to_the_end(root / "run", timeouts)
        same += outcome(root / "run") == expected
        shutil.rmtree(root / "run")
        print(f"{i + 1} runs, {kills} kills, {same} identical", flush=True)
    assert same == runs


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
import checkpoint, train

at, count = int(sys.argv[1]), 0

def counted(owner, name, file=None):
    real = getattr(owner, name)
    def write(*arguments, **named):
        global count
        inside = "checkpoints/unfinished" in str(arguments) or name == "fsync"
        count += inside
        if inside and count == at:
            if file is not None:
                real(*arguments, **named)
                os.truncate(arguments[file], os.stat(arguments[file]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    setattr(owner, name, write)

counted(checkpoint, "save_file", file=1)
counted(Path, "write_text", file=0)
counted(Path, "mkdir")
counted(Path, "rename")
counted(os, "fsync")
sys.exit(train.main(sys.argv[2:]))
"""


def write(root, runs=20):
    """Of the writes of the checkpoints, about a dozen each, one is cut by SIGKILL."""
    (root / "killed.py").write_text(KILLED_WRITING)
    assert run(PROJECT / "train.py", *SIX, "--output_dir", root / "whole")[0] == 0
    draw, same = random.Random(0), 0
    for i in range(runs):
        at, folder = draw.randint(1, 70), root / "run"
        code, said = run(root / "killed.py", at, *SIX, "--output_dir", folder)
        assert code == -signal.SIGKILL, said
        there = sorted(p.name for p in (folder / "checkpoints").iterdir())
        to_the_end(folder, iter(lambda: None, 0))
        same += outcome(folder) == outcome(root / "whole")
        left = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert left == ["step_000005", "step_000006"], left
        shutil.rmtree(folder)
        print(f"killed at write {at}, left {there}; {same} of {i + 1} identical", flush=True)
    assert same == runs


def disk(root):
    """The disk is full at each write of a resumed run in turn, from its header to its LoRA."""
    from test_checkpoint import full_disk

    def main(*options):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return train.main([str(option) for option in options])

    import pytest

    options = [*MINIATURE, "--output_dir", root / "whole"]
    assert main(*options) == 0
    at = 0
    while True:
        at += 1
        folder = root / "run"
        shutil.copytree(root / "whole", folder)
        shutil.rmtree(folder / "checkpoints" / "step_000002")
        shutil.rmtree(folder / "lora")
        with pytest.MonkeyPatch.context() as patch:
            done = full_disk(patch, at)
            code = main("--resume", folder)
        if len(done) < at:
            break
        unfinished = [p for p in folder.rglob("*") if "unfinished" in p.name]
        again = main("--resume", folder)
        equal = outcome(folder) == outcome(root / "whole")
        print(f"write {at}, {done[-1]}: exit {code}, then {again}; {equal}")
        assert code == 1 and again == 0 and equal and not unfinished
        shutil.rmtree(folder)
    assert at > 15


TROUBLE = """
import os, signal, sys, time
from datetime import timedelta
import torch
import distributed, train

what, distributed.TIMEOUT = sys.argv[1], timedelta(seconds=20)

def update(run, *rest):
    if rest[-1] == 2 and distributed.RANK == 1:
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            time.sleep(1000)
        if what == "nan":
            at = ("velocity", torch.tensor(float("nan")), "update", "a prompt", 3, "bf16")
            distributed.fail(train.NonFinite(*at))
        if what == "fails":
            raise train.RewardError("reward mine: no answer")
        if what == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)
    return real(run, *rest)

real, train.update = train.update, update
sys.exit(train.main(sys.argv[2:]))
"""


def ranks(root, steps=5):
    """LoRAs equal to 1e-5, whatever happens to a process an end within the time, and then the same
    run."""
    from safetensors.torch import load_file

    (root / "trouble.py").write_text(TROUBLE)
    options = [*MINIATURE, "--steps", steps, "--prompts_per_step", 4, "--micro_batch", 3]
    torchrun = ("-m", "torch.distributed.run", "--standalone")
    folders = []
    for n in (1, 2, 3):
        folders.append(root / f"world{n}")
        code, said = run(
            *torchrun,
            f"--nproc_per_node={n}",
            PROJECT / "train.py",
            *(*options, "--output_dir", folders[-1]),
        )
        assert code == 0, said
        loras = [load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in folders]
        apart = max(float((loras[0][k] - loras[-1][k]).abs().max()) for k in loras[0])
        moved = max(float(v.abs().max()) for k, v in loras[0].items() if "lora_B" in k)
        same = outcome(folders[0])[0] == outcome(folders[-1])[0]
        print(f"{n} processes: LoRA apart {apart} of {moved:.2g}, same log: {same}", flush=True)
        assert apart < 1e-5 < moved and same
    for what in ("killed", "hangs", "nan", "fails", "stopped"):
        folder, start = root / what, time.monotonic()
        command = [*torchrun, "--nproc_per_node=2", root / "trouble.py", what]
        code, said = run(*command, *options, "--output_dir", folder)
        said = [line for line in said.replace("\r", "\n").splitlines() if "train.py: " in line]
        print(f"{what}: exit {code} after {time.monotonic() - start:.0f} s; {said}")
        assert code != 0 and time.monotonic() - start < 120
        code, said = run(*torchrun, "--nproc_per_node=2", PROJECT / "train.py", "--resume", folder)
        assert code == 0 and outcome(folder) == outcome(folders[0]), said
        print("  resumed: the same", flush=True)


def fuzz(root, count=300):
    """Command lines of good and bad words; a run that would start ends before its first step."""
    os.chdir(root)
    draw = random.Random(0)
    words = ["", "0", "1", "2", "-1", "7", "1e9", "nan", "inf", "é", "a b", "\x00", "../..", "/"]
    words += "sana flux sd3 clipscore none nvfp4 bf16 P Q D mine.py:f".split()
    (root / "D").mkdir()
    (root / "mine.py").write_text("def f(i, p, m): return [0.0] * len(p)\n")
    usual = vars(train.parse(["--output_dir", "x"]))
    lived = 0
    reached = type("Reached", (Exception,), {})

    def stop(*_, **__):
        raise reached

    train.models.load = stop
    for i in range(count):
        for name in "PQ":
            pieces = [b"a cat\n", b"\xff\xfe", b"", b"\n", b"{}", b'{"prompt": "x", "n": [1]}\n']
            pieces += [b'{"prompt": 3}\n', b"\x00\n", "日本\n".encode(), b"[" * 2000, b"x" * 9999]
            (root / name).write_bytes(b"".join(draw.choices(pieces, k=draw.randint(0, 4))))
            shutil.copy(root / name, root / (name + ".jsonl"))
        line = []
        for _ in range(draw.randint(1, 4)):
            name = draw.choice(list(usual))
            word = usual[name] if draw.random() < 0.7 else draw.choice(words)
            line += [f"--{name}"] if isinstance(word, bool) else [f"--{name}", str(word)]
        if draw.random() < 0.5:
            line += ["--prompts", draw.choice(["P", "Q.jsonl", "D", "none"])]
            line += ["--prompts_per_step", "1"]
        before = sorted(p for p in root.rglob("*") if "__pycache__" not in p.parts)
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = train.main(line)
            except reached:
                code, lived = 0, lived + 1
        assert code in (0, 2), (line, code)
        assert code == 0 or error.getvalue().count("\n") == 1, (line, error.getvalue())
        assert sorted(p for p in root.rglob("*") if "__pycache__" not in p.parts) == before, line
    print(f"{count} command lines: {lived} would have run, the others were refused in a line")


def memory(root, steps=200):
    options = [*MINIATURE, "--steps", steps, "--eval_every", 50, "--checkpoint_every", 20]
    command = [sys.executable, PROJECT / "train.py", *options, "--output_dir", root / "run"]
    process = subprocess.Popen(
        list(map(str, command)),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proc, shown = Path(f"/proc/{process.pid}"), 0
    while process.poll() is None:
        time.sleep(1)
        if (root / "run" / "metrics.jsonl").exists() and proc.exists():
            done = lines(root / "run")[-1]["step"]
            if done >= shown:
                size = int((proc / "status").read_text().split("VmRSS:")[1].split()[0]) // 1024
                print(f"{done} steps: {size} MB, {len(list((proc / 'fd').iterdir()))} files")
                shown += 20
    assert process.returncode == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        todo = dict(kill=kill, write=write, disk=disk, ranks=ranks, fuzz=fuzz, memory=memory)
        todo[sys.argv[1]](Path(folder))
