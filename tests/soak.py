"""Minutes of abuse, too long for pytest: a miniature run that is killed, split, fuzzed and watched.

python tests/soak.py kill       # 50 runs of 6 steps, SIGKILL at random moments, resumed
python tests/soak.py ranks      # 1, 2 and 3 processes; one of them killed, failing or stopped
python tests/soak.py fuzz       # 300 wrong command lines and prompts files
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
from test_distributed import ENVIRONMENT, torchrun

import train

SIX = [*MINIATURE, "--steps", "6", "--eval_every", "3"]


def train_in_a_child(*options, kill_after=None):
    """train.py in a forked process, which has its imports already. SIGKILL ends it after so many
    seconds. Returns its exit code."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(train.main([str(option) for option in options]))
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(root, runs=50):
    """Each run is started, killed and resumed until it is done; its log without times and its LoRA
    are those of the run that was not killed, bit for bit."""
    start = time.monotonic()
    assert train_in_a_child(*SIX, "--output_dir", root / "whole") == 0
    seconds, expected = time.monotonic() - start, outcome(root / "whole")
    generator, kills, folder = random.Random(0), 0, root / "run"
    for i in range(runs):
        code = None
        while code != 0:
            options = ["--resume", folder]
            if not list((folder / "checkpoints").glob("step_*")):
                shutil.rmtree(folder, ignore_errors=True)
                options = [*SIX, "--output_dir", folder]
            code = train_in_a_child(*options, kill_after=generator.uniform(0.2, 1.1) * seconds)
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
        assert outcome(folder) == expected
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {"step_000005", "step_000006"}, names
        shutil.rmtree(folder)
        print(f"{i + 1} runs, {kills} kills, all identical", flush=True)


TROUBLE = """
import os, signal, sys
import train
from support import distributed
from support.errors import InputError, NonFinite

def update(run, samples, step):
    if step == 2 and distributed.RANK == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "nan":
            raise NonFinite("loss", "a prompt", "update", 3)
        if sys.argv[1] == "fails":
            raise InputError("reward mine: no answer")
        if sys.argv[1] == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)
    return real(run, samples, step)

real, train.update = train.update, update
sys.exit(train.main(sys.argv[2:]))
"""


def ranks(root, steps=5):
    """Any number of processes gives the same run, bit for bit. If one of them fails, torchrun ends
    all within two minutes, and the resumed run is again the same."""
    (root / "trouble.py").write_text(TROUBLE)
    options = [*MINIATURE, "--steps", steps, "--prompts_per_step", 4, "--micro_batch", 3]
    folders = [root / f"world{n}" for n in (1, 2, 3)]
    for n, folder in enumerate(folders, 1):
        code, text = torchrun(n, PROJECT / "train.py", *options, "--output_dir", folder)
        assert code == 0, text
        assert outcome(folder) == outcome(folders[0])
        print(f"{n} processes: the same log and LoRA", flush=True)
    for trouble in ("killed", "nan", "fails", "stopped"):
        folder, start = root / trouble, time.monotonic()
        code, text = torchrun(2, root / "trouble.py", trouble, *options, "--output_dir", folder)
        errors = [line for line in text.replace("\r", "\n").splitlines() if "train.py: " in line]
        print(f"{trouble}: exit {code} after {time.monotonic() - start:.0f} s; {errors}")
        assert code != 0 and time.monotonic() - start < 120
        code, text = torchrun(2, PROJECT / "train.py", "--resume", folder)
        assert code == 0 and outcome(folder) == outcome(folders[0]), text
        print("  resumed: the same", flush=True)


def fuzz(root, count=300):
    """Command lines of good and bad words. Each is refused in one line and leaves nothing behind,
    or gets as far as loading the model, which is cut off here."""
    os.chdir(root)
    generator, accepted = random.Random(0), 0
    words = ["", "0", "1", "2", "-1", "7", "1e9", "nan", "inf", "é", "a b", "\x00", "../..", "/"]
    words += "sana flux sd3 clipscore none nvfp4 bf16 P Q D mine.py:f".split()
    (root / "D").mkdir()
    (root / "mine.py").write_text("def f(i, p, m): return [0.0] * len(p)\n")
    usual = vars(train.parse_options(["--output_dir", "x"]))
    reached = type("Reached", (Exception,), {})

    def stop(*_, **__):
        raise reached

    def files():
        return sorted(p for p in root.rglob("*") if "__pycache__" not in p.parts)

    train.models.load = stop
    for _ in range(count):
        for name in "PQ":
            pieces = [b"a cat\n", b"\xff\xfe", b"", b"\n", b"{}", b'{"prompt": "x", "n": [1]}\n']
            pieces += [b'{"prompt": 3}\n', b"\x00\n", "日本\n".encode(), b"[" * 2000, b"x" * 9999]
            content = b"".join(generator.choices(pieces, k=generator.randint(0, 4)))
            (root / name).write_bytes(content)
            (root / f"{name}.jsonl").write_bytes(content)
        line = []
        for _ in range(generator.randint(1, 4)):
            name = generator.choice(list(usual))
            word = usual[name] if generator.random() < 0.7 else generator.choice(words)
            line += [f"--{name}"] if isinstance(word, bool) else [f"--{name}", str(word)]
        if generator.random() < 0.5:
            line += ["--prompts", generator.choice(["P", "Q.jsonl", "D", "none"])]
            line += ["--prompts_per_step", "1"]
        before, error = files(), io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = train.main(line)
            except reached:
                code, accepted = 0, accepted + 1
        assert code in (0, 2), (line, code)
        assert code == 0 or error.getvalue().count("\n") == 1, (line, error.getvalue())
        assert files() == before, line
    print(f"{count} command lines: {accepted} would have run, the others were refused in a line")


def memory(root, steps=200):
    """Neither the resident size nor the number of open files grows with the steps."""
    options = [*MINIATURE, "--steps", steps, "--eval_every", 50, "--checkpoint_every", 20]
    command = [sys.executable, PROJECT / "train.py", *options, "--output_dir", root / "run"]
    nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, **nowhere)
    proc, shown = Path(f"/proc/{process.pid}"), 0
    while process.poll() is None:
        time.sleep(1)
        if (root / "run" / "metrics.jsonl").exists() and proc.exists():
            step = lines(root / "run")[-1]["step"]
            if step >= shown:
                size = int((proc / "status").read_text().split("VmRSS:")[1].split()[0]) // 1024
                print(f"{step} steps: {size} MB, {len(list((proc / 'fd').iterdir()))} files")
                shown += 20
    assert process.returncode == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        experiments = dict(kill=kill, ranks=ranks, fuzz=fuzz, memory=memory)
        experiments[sys.argv[1]](Path(folder))
