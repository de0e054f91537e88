"""Minutes of abuse, too long for pytest: a miniature run killed, cut, flipped and fuzzed.

python tests/soak.py kill       # 50 runs of 6 steps, SIGKILL at random moments, resumed
python tests/soak.py damage     # 200 bytes of a checkpoint flipped or cut
python tests/soak.py memory     # 200 steps: resident size and open files
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

MINIATURE = (
    "--prompts_per_step 1 --pool 6 --keep 4 --explore_steps 1 --rollout_steps 2 --eval_steps 1 "
    "--eval_images 1 --eval_every 3 --checkpoint_every 1 --device cpu"
).split()


def command(*options):
    return [sys.executable, str(PROJECT / "train.py"), *map(str, options)]


def outcome(folder):
    """All that must be equal: the log without seconds, the LoRA's bytes by tensor."""
    from safetensors.torch import load_file

    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in log]
    lora = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    return log, {k: v.numpy().tobytes() for k, v in lora.items()}


def kill(root, runs=50, steps=6):
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = root / "whole"
    start = time.monotonic()
    subprocess.run(
        command(*MINIATURE, "--steps", steps, "--output_dir", whole), check=True, **quiet
    )
    seconds, expected, same, kills = time.monotonic() - start, outcome(whole), 0, 0
    draw = random.Random(0)
    for i in range(runs):
        folder = root / f"run{i}"
        while True:
            fresh = not list((folder / "checkpoints").glob("step_*"))
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            options = [*MINIATURE, "--steps", steps, "--output_dir", folder]
            process = subprocess.Popen(
                command(*(options if fresh else ["--resume", folder])), **quiet
            )
            try:
                _, error = process.communicate(timeout=draw.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            done = process.returncode == 0 or "it has done" in error
            assert done, error
            break
        same += outcome(folder) == expected
        shutil.rmtree(folder)
        print(f"{i + 1} runs, {kills} kills, {same} identical", flush=True)
    assert same == runs


def damage(root, places=200):
    import checkpoint

    subprocess.run(command(*MINIATURE, "--steps", 1, "--output_dir", root / "run"), check=True)
    path = sorted((root / "run" / "checkpoints").iterdir())[-1]
    draw, noticed = random.Random(0), 0
    for _ in range(places):
        copy = root / path.name
        shutil.copytree(path, copy)
        victim = draw.choice([p for p in sorted(copy.iterdir())])
        data = bytearray(victim.read_bytes())
        where = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[where] ^= 1 << draw.randrange(8)
        else:
            del data[where : where + draw.randint(1, len(data))]
        victim.write_bytes(data)
        try:
            checkpoint.read(copy)
        except checkpoint.CheckpointError:
            noticed += 1
        else:  # harmless: the manifest's spaces
            assert json.loads((path / "manifest.json").read_text()) == json.loads(
                (copy / "manifest.json").read_text()
            ), victim
        shutil.rmtree(copy)
    print(f"{noticed} of {places} noticed, the others harmless")


def memory(root, steps=200):
    options = [*MINIATURE, "--steps", steps, "--eval_every", 50, "--checkpoint_every", 20]
    process = subprocess.Popen(
        command(*options, "--output_dir", root / "run"), stdout=subprocess.DEVNULL
    )
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(10)
        log = root / "run" / "metrics.jsonl"
        if log.exists() and proc.exists():
            status = (proc / "status").read_text()
            size = int(status.split("VmRSS:")[1].split()[0]) // 1024
            files = len(list((proc / "fd").iterdir()))
            print(f"{len(log.read_text().splitlines()) - 1} steps: {size} MB, {files} files")
    assert process.returncode == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        {"kill": kill, "damage": damage, "memory": memory}[sys.argv[1]](Path(folder))
