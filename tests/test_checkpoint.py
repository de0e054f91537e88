"""Runs that are stopped, damaged, filled up or fed with NaN: nothing of them is lost."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, lines, outcome
from safetensors.torch import load_file, save_file

import checkpoint
import models
import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world):
    """A run of two steps that nothing happened to; its reward draws from every global generator."""
    root = tmp_path_factory.mktemp("whole")
    (root / "dice.py").write_text(
        "import random, numpy, torch\n"
        "def dice(images, prompts, metadata):\n"
        "    luck = random.random() + numpy.random.rand() + float(torch.rand(()))\n"
        "    return images.mean(dim=(1, 2, 3)) + torch.randn(len(prompts)) / 10 + luck\n"
    )
    options = [*MINIATURE, "--reward", f"{root / 'dice.py'}:dice"]
    assert train.main([*options, "--output_dir", str(root / "run")]) == 0
    return root / "run", options


@pytest.fixture
def started(whole, tmp_path):
    """A copy of that run as it was after its first step."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    shutil.rmtree(folder / "lora")
    return folder


def resume(folder, *options):
    return train.main(["--resume", str(folder), *options])


# ---------------------------------------------------------------------------------------------
# Stopping and continuing


@pytest.mark.parametrize(
    "where, number, code",
    [
        ("evaluate", signal.SIGINT, 130),
        ("rollout", signal.SIGTERM, 143),
        ("update", signal.SIGINT, 130),
    ],
)
def test_a_signal_finishes_the_micro_batch_and_what_is_resumed_is_the_unstopped_run(
    where, number, code, whole, tmp_path, monkeypatch, capsys
):
    real, calls, folder = getattr(train, where), [], tmp_path / "run"

    def signalled(run, *arguments):
        calls.append(where)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # clusters send several
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, where, signalled)
        assert train.main([*whole[1], "--output_dir", str(folder)]) in (code, 143)
    said = capsys.readouterr()
    assert f"continue with: python train.py --resume {folder}" in said.out
    assert said.err.count("stopping after this micro-batch") == 1
    assert resume(folder) == 0
    assert outcome(folder) == outcome(whole[0])


def test_a_second_ctrl_c_leaves_at_once(whole, tmp_path, monkeypatch, capsys):
    def twice(run, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(train, "iteration", twice)
    assert train.main([*whole[1], "--output_dir", str(tmp_path / "run")]) == 130
    assert "left at once; the last checkpoint, if any, is whole" in capsys.readouterr().err
    assert [s for s, _ in checkpoint.found(tmp_path / "run")] == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_run_continues_to_the_same_log_and_lora_random_rewards_included(whole, started):
    assert resume(started) == 0
    assert outcome(started) == outcome(whole[0])


def test_a_run_killed_after_its_last_step_writes_its_results(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "lora")
    assert resume(folder) == 0 and outcome(folder) == outcome(whole[0])
    assert "all 2 steps are done" in capsys.readouterr().out


def test_latest_is_the_newest_run_and_changed_options_are_named(
    whole, started, monkeypatch, capsys
):
    def error(*options):
        assert train.main([*options]) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(started.parent)
    assert "no run with checkpoints" in error("--resume", "latest")
    shutil.move(started, "runs/one")
    said = error("--resume", "latest", "--seed", "9", "--pool", "8", "--micro_batch", "36")
    assert (
        "--resume runs/one: --pool was 6 and is 8, --seed was 0 and is 9; --force pool,seed" in said
    )
    assert "--pool was" not in error(
        "--resume", "latest", "--seed", "9", "--force", "seed", "--keep", "2"
    )
    assert "--force sed" in error("--resume", "latest", "--seed", "9", "--force", "sed")
    capsys.readouterr()
    assert resume("latest", "--learning_rate", "0.5", "--force", "learning_rate") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " was " in line]
    assert said == ["--learning_rate was 0.001 and is 0.5"]
    assert outcome(Path("runs/one"))[1] != outcome(whole[0])[1]


# ---------------------------------------------------------------------------------------------
# Checkpoints that are not as they were written


def test_every_byte_flipped_or_cut_is_noticed_or_harmless(whole, tmp_path):
    path = whole[0] / "checkpoints" / "step_000002"
    draw, copy = random.Random(0), tmp_path / path.name
    manifest = json.loads((path / "manifest.json").read_text())
    shutil.copytree(path, copy)
    checkpoint.read(copy)
    for i in range(200):
        victim = copy / draw.choice([*checkpoint.FILES, "manifest.json"])
        data = bytearray((path / victim.name).read_bytes())
        where = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[where] ^= 1 << draw.randrange(8)
        else:
            del data[where : where + draw.randint(1, len(data))]
        victim.write_bytes(data)
        try:
            checkpoint.read(copy)
        except checkpoint.CheckpointError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
        else:  # the spaces between the manifest's words
            assert json.loads((copy / "manifest.json").read_text()) == manifest, victim
        shutil.copy(path / victim.name, victim)


def test_of_a_damaged_newest_checkpoint_the_one_before_is_taken_and_said(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    damaged = folder / "checkpoints" / "step_000002" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert resume(folder) == 0 and outcome(folder) == outcome(whole[0])
    assert f"{damaged.parent}: state.safetensors is not what" in capsys.readouterr().out
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    before = sorted(folder.rglob("*"))
    assert resume(folder) == 2 and sorted(folder.rglob("*")) == before
    said = capsys.readouterr().err
    assert "no checkpoint is intact" in said and said.count("\n") == 1


def sign(path):
    """Make a checkpoint's manifest agree with its files, as who would harm us can."""
    files = {name: path / name for name in checkpoint.FILES}
    manifest = {k: [f.stat().st_size, checkpoint._hash(f)] for k, f in files.items()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile_tensors(path, change):
    name = path / "state.safetensors"
    tensors = load_file(name)
    save_file(change(tensors), name)
    sign(path)


def hostile_json(path, **changes):
    about = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(about | changes))
    sign(path)


def header(path):
    """A safetensors file that claims an absurd shape."""
    text = json.dumps({"default.0": dict(dtype="F32", shape=[2**40, 2**20], data_offsets=[0, 8])})
    (path / "state.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text.encode() + bytes(8)
    )
    sign(path)


def first(tensors):
    return next(k for k in sorted(tensors) if k.startswith("default"))


HOSTILE = {
    "a pickle": lambda path, ran: (
        (path / "state.safetensors").write_bytes(pickle.dumps(Runs(ran))),
        sign(path),
    ),
    "a torch file": lambda path, ran: (
        torch.save(Runs(ran), path / "state.safetensors"),
        sign(path),
    ),
    "an absurd shape": lambda path, ran: header(path),
    "another shape": lambda path, ran: hostile_tensors(
        path, lambda t: t | {first(t): torch.zeros(2**12, 2)}
    ),
    "another dtype": lambda path, ran: hostile_tensors(
        path, lambda t: t | {first(t): t[first(t)].double()}
    ),
    "one tensor more": lambda path, ran: hostile_tensors(
        path, lambda t: t | {"../../more": torch.zeros(1)}
    ),
    "a path out of it": lambda path, ran: (path / "manifest.json").write_text(
        json.dumps({"../../../config.json": [1, ""]})
    ),
    "a link": lambda path, ran: (
        shutil.move(path / "run.json", path.parent / "elsewhere"),
        (path / "run.json").symlink_to(path.parent / "elsewhere"),
    ),
    "10 GB in a line": lambda path, ran: os.truncate(path / "metrics.jsonl", 10 * 2**30),
    "10 GB of options": lambda path, ran: os.truncate(path / "run.json", 10 * 2**30),
    "10 GB of manifest": lambda path, ran: os.truncate(path / "manifest.json", 10 * 2**30),
    "a deep nest": lambda path, ran: ((path / "run.json").write_text("[" * 10**5), sign(path)),
    "no options": lambda path, ran: hostile_json(path, options=[]),
    "an option of no kind": lambda path, ran: hostile_json(path, options={"pool": "many"}),
    "an unknown option": lambda path, ran: hostile_json(path, options={"shell": "rm"}),
    "another step": lambda path, ran: hostile_json(path, step=10**9),
    "other prompts": lambda path, ran: hostile_json(path, prompts="0"),
    "texts for numbers": lambda path, ran: (
        (path / "metrics.jsonl").write_text('{"step": 0, "eval/reward": "x"}\n'),
        sign(path),
    ),
    "half an evaluation": lambda path, ran: (
        (path / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 1}\n{"step": 1}\n'),
        sign(path),
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_a_line_and_executes_nothing(
    what, started, tmp_path, capsys
):
    shutil.rmtree(started / "checkpoints" / "step_000000", ignore_errors=True)
    HOSTILE[what](started / "checkpoints" / "step_000001", tmp_path / "ran")
    capsys.readouterr()
    assert resume(started) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ") and said.count("\n") == 1, said
    assert not (tmp_path / "ran").exists() and not (started / "lora").exists()


# ---------------------------------------------------------------------------------------------
# A disk that is full, a folder that goes


def full_disk(monkeypatch, at):
    """Let the write number `at` fill the disk half way; returns the list of what was written."""
    done = []

    def limited(owner, name, writes):
        real = getattr(owner, name)

        def write(*arguments, **named):
            done.append(name)
            if len(done) == at:
                if writes:
                    real(*arguments, **named)
                    os.truncate(writes(*arguments), 7)
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, write)

    limited(checkpoint, "save_file", lambda tensors, path: path)
    limited(Path, "write_text", lambda path, text, *_: path)
    limited(Path, "mkdir", None)
    limited(Path, "rename", None)
    limited(os, "replace", None)
    limited(os, "fsync", None)
    return done


def test_a_disk_full_at_any_write_of_a_checkpoint_harms_none_before(
    whole, started, monkeypatch, capsys
):
    """Of the second step's; its log and picture are written by the same rule."""
    last = checkpoint.found(started)[-1][1]
    kept = {p: p.read_bytes() for p in last.iterdir()}
    for at in range(1, 99):
        with monkeypatch.context() as patch:
            done = full_disk(patch, at)
            patch.setattr(train, "Run", Nothing)
            patch.setattr(checkpoint, "_tensors", lambda run: {"default.0": torch.zeros(2, 2)})
            try:
                checkpoint.save(Nothing(started), '{"step": 2}\n', 2)
            except OSError:
                assert len(done) == at
                there = {p for p in (started / "checkpoints").iterdir()}
                assert there == {p for _, p in checkpoint.found(started)}, "half-written"
                assert {p: p.read_bytes() for p in last.iterdir()} == kept
            else:
                break
        shutil.rmtree(started / "checkpoints" / "step_000002", ignore_errors=True)
    assert at > 10


class Nothing:
    """As much of a run as a checkpoint needs."""

    def __init__(self, folder):
        self.config = train.parse(["--output_dir", str(folder) + "_"])
        self.config.output_dir = str(folder)
        self.train = self.held_out = train.split_prompts(self.config)[0]


@pytest.mark.parametrize("trouble", ["full", "deleted", "reward"])
def test_what_fails_a_run_from_outside_says_how_it_goes_on(
    trouble, whole, started, monkeypatch, capsys
):
    def iteration(run, step):
        if trouble == "deleted":
            shutil.rmtree(started)
        if trouble == "reward":
            raise train.RewardError("reward mine: no answer")
        return real(run, step)

    real = train.iteration
    with monkeypatch.context() as patch:
        patch.setattr(train, "iteration", iteration)
        if trouble == "full":
            full_disk(patch, 4)  # the log's, after config.json's
        assert resume(started) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if trouble == "deleted":
        assert "No such file" in said and said.endswith("when that is mended start again")
    else:
        assert said.endswith(f"when that is mended --resume {started} goes on from step 1")
        assert resume(started) == 0
        assert trouble == "reward" or outcome(started) == outcome(whole[0])


# ---------------------------------------------------------------------------------------------
# Numbers gone wrong


def broken(run, where):
    """What to patch so that the run's next step meets a NaN there."""
    nan, model = lambda x: x * float("nan"), run.model  # noqa: E731
    draw, decode, velocity = train.draw, model.decode, model.velocity

    def only_with_gradient(transformer, x, *rest):
        v = velocity(transformer, x, *rest)
        return nan(v) if torch.is_grad_enabled() else v

    return {
        "latents": (train, "draw", lambda *a: ((nan(x), y) for x, y in draw(*a))),
        "images": (model, "decode", lambda x: nan(decode(x))),
        "reward": (run.reward, "parts", [("bad", 1.0, lambda i, p, m: [float("inf")] * len(p))]),
        "velocity": (model, "velocity", only_with_gradient),
        "gradient": (torch.nn.utils, "get_total_norm", lambda g: torch.tensor(float("nan"))),
    }[where]


@pytest.mark.parametrize(
    "where, choice",
    [
        ("latents", "skip"),
        ("images", "stop"),
        ("reward", "stop"),
        ("velocity", "stop"),
        ("gradient", "skip"),
    ],
)
def test_nan_stops_the_step_before_the_optimizer_moves_and_says_where(
    where, choice, tmp_path, world, monkeypatch, capsys
):
    real, out, unmoved = train.iteration, tmp_path / "run", []

    def iteration(run, step):
        if step != 1:
            return real(run, step)
        policy = models.lora_parameters(run.model.transformer, "default")
        before = [p.detach().clone() for p in policy]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*broken(run, where))
            try:
                return real(run, step)
            finally:
                unmoved.append(all(torch.equal(a, b) for a, b in zip(before, policy)))

    with monkeypatch.context() as patch:
        patch.setattr(train, "iteration", iteration)
        options = [*MINIATURE, "--steps", "3", "--on_nonfinite", choice, "--output_dir", str(out)]
        assert train.main(options) == (1 if choice == "stop" else 0)
    assert unmoved == [True]
    said = capsys.readouterr().err
    for word in (where, "prompt 'a", "seed", "nothing was updated"):
        assert word in said
    (dump,) = (out / "nonfinite").iterdir()
    assert not torch.isfinite(load_file(dump)["value"]).all()
    log = lines(out)
    if choice == "skip":
        assert [line["step"] for line in log] == [0, 1, 2, 3]
        assert log[2]["nonfinite/skipped"] == 1 and "loss" in log[3]
    else:
        assert [line["step"] for line in log] == [0, 1]
        assert [step for step, _ in checkpoint.found(out)] == [0, 1]


def test_equal_rewards_have_no_advantage_and_are_counted(world, tmp_path):
    rewards = torch.tensor([[0.1] * 3, [0.2, 0.3, 0.4]])
    advantages = train.group_advantages(rewards)
    assert advantages[0].tolist() == [0, 0, 0] and advantages[1].abs().max() > 0.5
    scores = [({"weighted_sum": r}, {"weighted_sum": r}) for r in rewards]
    assert train.reward_metrics(scores, rewards)["reward/zero_spread"] == 1
