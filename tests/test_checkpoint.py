"""Runs that are stopped, damaged, filled up or fed with NaN: no earlier checkpoint is lost."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, error_line, lines, outcome
from safetensors import SafetensorError
from safetensors.torch import save_file

import train
from support import checkpoint, distributed, errors
from support.errors import InputError, Stopped
from support.report import reward_metrics

# ---------------------------------------------------------------------------------------------
# Checkpoints by themselves


def small_run(seed=0, steps=1):
    """(policies of two parameters each, AdamW on "default" after so many steps)."""
    generator = torch.Generator().manual_seed(seed)
    policies = {
        name: [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((2, 3), 4)]
        for name in ("default", "old", "ema")
    }
    optimizer = torch.optim.AdamW(policies["default"], lr=0.1)
    for _ in range(steps):
        sum(p.square().sum() for p in policies["default"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policies, optimizer


def save(folder, step, run=None, **options):
    return checkpoint.save(folder, step, *(run or small_run()), options)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def equal(one, other):
    """Whether two dicts of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("steps", [0, 3])  # AdamW has no state before its first step
def test_what_is_restored_is_what_was_saved_and_goes_on_as_it_would_have(steps, tmp_path):
    run = small_run(0, steps)
    path = save(tmp_path, 3, run, pool=96)
    assert contents(path).keys() == {"state.safetensors", "run.json"}
    names = {f"{policy}.{i}" for policy in ("default", "old", "ema") for i in range(2)}
    entries = {f"optimizer.{i}.{n}" for i in range(2) for n in ("step", "exp_avg", "exp_avg_sq")}
    saved = checkpoint.state_tensors(*run)
    assert saved.keys() == names | (entries if steps else set())

    found = checkpoint.newest(tmp_path)
    assert (found.path, found.step, found.options, found.notes) == (path, 3, {"pool": 96}, [])
    other = small_run(1, 0)
    checkpoint.restore(found, *other)
    assert equal(checkpoint.state_tensors(*other), saved)
    for policies, optimizer in (run, other):
        sum(p.sin().sum() for p in policies["default"]).backward()
        optimizer.step()
    assert equal(checkpoint.state_tensors(*run), checkpoint.state_tensors(*other))


def test_only_the_first_process_writes_but_all_know_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "RANK", 1)
    path = save(tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(distributed, "RANK", 0)
    assert save(tmp_path / "run", 1) == path and path.is_dir()


def test_the_last_two_up_to_the_step_stay_and_one_is_written_again(tmp_path):
    for step in (0, 5, 10, 15):
        save(tmp_path, step)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    save(tmp_path, 10, small_run(7), again=True)  # the newest was damaged, say
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    shutil.rmtree(tmp_path / "checkpoints" / "step_000015")
    assert checkpoint.newest(tmp_path).options == {"again": True}
    assert equal(checkpoint.newest(tmp_path).tensors, checkpoint.state_tensors(*small_run(7)))


def test_of_a_damaged_newest_checkpoint_the_one_before_is_taken_and_said(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    draw = random.Random(0)
    whole = contents(second)
    for _ in range(100):
        name = draw.choice(checkpoint.FILES)
        (second / name).write_bytes(whole[name][: draw.randrange(len(whole[name]))])
        found = checkpoint.newest(tmp_path)
        assert found.path == first
        (note,) = found.notes
        assert str(second) in note and "the one before is taken" in note and "\n" not in note
        (second / name).write_bytes(whole[name])
    (first / "run.json").unlink()
    (second / "state.safetensors").unlink()
    with pytest.raises(InputError, match=f"no checkpoint can be read; {second}") as error:
        checkpoint.newest(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="there is no checkpoint in it"):
        checkpoint.newest(tmp_path / "nowhere")


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


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_full_at_any_write_of_a_checkpoint_harms_none_before(step, tmp_path, monkeypatch):
    """Writing the second step's, and the first's again, which is the only one."""
    run = small_run()
    for at in range(1, 99):
        folder = tmp_path / f"at_{at}"
        save(folder, 1, run)
        with monkeypatch.context() as patch:
            done = full_disk(patch, at)
            try:
                save(folder, step, run)
            except OSError:
                assert len(done) == at
            else:
                break
        paths = [path for _, path in checkpoint.list_checkpoints(folder)]
        assert set((folder / "checkpoints").iterdir()) == set(paths), "something half is left"
        found = checkpoint.newest(folder)
        assert not found.notes and equal(found.tensors, checkpoint.state_tensors(*run))
    assert at > 7 and checkpoint.newest(folder).step == step


# ---------------------------------------------------------------------------------------------
# Checkpoints that somebody else made


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def absurd_shape():
    header = {"default.0": dict(dtype="F32", shape=[2**40, 2**20], data_offsets=[0, 8])}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


HOSTILE = {
    "a pickle": lambda state, run, ran: state.write_bytes(pickle.dumps(Runs(ran))),
    "a torch file": lambda state, run, ran: torch.save(Runs(ran), state),
    "an absurd shape": lambda state, run, ran: state.write_bytes(absurd_shape()),
    "no file": lambda state, run, ran: (state.unlink(), state.mkdir()),
    "a deep nest": lambda state, run, ran: run.write_text("[" * 10**5),
    "a list": lambda state, run, ran: run.write_text("[1]"),
    "no options": lambda state, run, ran: run.write_text('{"step": 1}'),
    "options of no kind": lambda state, run, ran: run.write_text('{"step": 1, "options": [1]}'),
    "another step": lambda state, run, ran: run.write_text('{"step": 9, "options": {}}'),
    "no text": lambda state, run, ran: run.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_a_line_and_executes_nothing(what, tmp_path):
    path = save(tmp_path, 1)
    HOSTILE[what](path / "state.safetensors", path / "run.json", tmp_path / "ran")
    with pytest.raises(InputError) as error:
        checkpoint.newest(tmp_path)
    assert "no checkpoint can be read" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"old.1": torch.zeros(2)}, "its old.1 is ('torch.float32', [2]), this run's ('torch."),
        ({"ema.0": torch.zeros(2, 3).double()}, "its ema.0 is ('torch.float64', [2, 3])"),
        ({"../../more": torch.zeros(1)}, "its ../../more is ('torch.float32', [1]), this run's No"),
        ({"default.0": None}, "its default.0 is None"),
        ({"optimizer.1.exp_avg": None}, "its optimizer.1.exp_avg is None"),
        ({"optimizer.0.step": torch.zeros(9)}, "its optimizer.0.step is ('torch.float32', [9])"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed(changes, says, tmp_path):
    path = save(tmp_path, 1)
    tensors = checkpoint.newest(tmp_path).tensors | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "state.safetensors")
    run = small_run(5)
    before = {name: tensor.clone() for name, tensor in checkpoint.state_tensors(*run).items()}
    with pytest.raises(InputError) as error:
        checkpoint.restore(checkpoint.newest(tmp_path), *run)
    assert says in str(error.value) and str(path) in str(error.value)
    assert equal(checkpoint.state_tensors(*run), before)


# ---------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noticed_by_the_next_check_and_said_once(number, capfd):
    before = signal.getsignal(number)
    with checkpoint.StopFlag() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # clusters send several
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.signal == number and signal.getsignal(number) is before
    assert capfd.readouterr().err == "\nstopping after this micro-batch; Ctrl-C leaves at once\n"


def test_a_second_ctrl_c_leaves_at_once():
    with pytest.raises(KeyboardInterrupt), checkpoint.StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------------------------------------
# Runs that stop and continue


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
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
    """A copy of that run as it was after its first step; the log had got further."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    shutil.rmtree(folder / "lora")
    return folder


def resume(folder, *options):
    """Its reward is a file, which must be named again."""
    reward = json.loads((folder / "config.json").read_text())["config"]["reward"]
    return train.main(["--resume", str(folder), "--reward", reward, *options])


@pytest.mark.parametrize(
    "owner, where, number, code",
    [
        (train, "evaluate", signal.SIGINT, 130),
        (train.Run, "rollout", signal.SIGTERM, 143),
        (train, "update", signal.SIGINT, 130),
    ],
    ids=["evaluate", "rollout", "update"],
)
def test_a_signal_finishes_the_micro_batch_and_what_is_resumed_is_the_unstopped_run(
    owner, where, number, code, whole, tmp_path, monkeypatch, capfd
):
    real, calls, folder = getattr(owner, where), [], tmp_path / "run"

    def signalled(run, *arguments):
        calls.append(where)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # clusters send several
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, signalled)
        assert train.main([*whole[1], "--output_dir", str(folder)]) == code
    said = capfd.readouterr()
    assert f"--resume {folder} continues" in said.out
    assert said.err.count("stopping after this micro-batch") == 1
    assert resume(folder) == 0
    assert outcome(folder) == outcome(whole[0])


def test_a_second_ctrl_c_ends_a_run_and_leaves_its_checkpoints(
    whole, tmp_path, monkeypatch, capsys
):
    def twice(run, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "iteration", twice)
    assert train.main([*whole[1], "--output_dir", str(tmp_path / "run")]) == 130
    assert "stopped at once" in capsys.readouterr().err
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run")] == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_continues_to_the_same_log_and_lora_random_rewards_included(whole, started):
    with open(started / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # it was killed while it wrote
    assert resume(started) == 0
    assert outcome(started) == outcome(whole[0])


def test_a_run_killed_after_its_last_step_writes_its_results(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "lora")
    assert resume(folder) == 0 and outcome(folder) == outcome(whole[0])
    assert "all steps are done" in capsys.readouterr().out


def test_what_is_changed_stays_changed_when_the_run_stops_again(whole, started, monkeypatch):
    real = train.iteration

    def stopped(run, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "iteration", stopped)
        assert resume(started, "--steps", "3") == 143
    assert [step for step, _ in checkpoint.list_checkpoints(started)] == [1]
    assert resume(started) == 0
    assert [line["step"] for line in lines(started)] == [0, 1, 2, 3]


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    whole, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    damaged = folder / "checkpoints" / "step_000002" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert resume(folder) == 0 and outcome(folder) == outcome(whole[0])
    assert f"{damaged.parent}: cannot be read" in capsys.readouterr().out
    for path in (folder / "checkpoints").iterdir():
        (path / "run.json").unlink()
    before = sorted(folder.rglob("*"))
    assert resume(folder) == 2 and sorted(folder.rglob("*")) == before
    assert "no checkpoint can be read" in error_line(capsys.readouterr().err)


def test_a_reward_in_a_file_that_only_the_checkpoint_names_is_not_executed(
    started, tmp_path, capsys
):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = started / "checkpoints" / "step_000001" / "run.json"
    contents = json.loads(path.read_text())
    contents["options"]["reward"] = f"{tmp_path / 'evil.py'}:f"
    path.write_text(json.dumps(contents))
    before = {p: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(started)]) == 2
    assert "the run executes a file" in error_line(capsys.readouterr().err)
    assert before == {p: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_model_is_refused_by_the_run(started, capsys):
    path = started / "checkpoints" / "step_000001" / "state.safetensors"
    tensors = checkpoint.newest(started).tensors
    save_file(tensors | {"default.0": torch.zeros(2**12, 2)}, path)
    assert resume(started) == 2
    assert "its default.0 is ('torch.float32', [4096, 2])" in error_line(capsys.readouterr().err)
    assert not (started / "lora").exists()


def test_a_full_disk_ends_the_run_in_a_line_and_it_can_go_on(whole, started, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        full_disk(patch, 6)
        assert resume(started) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "train.py: [Errno 28] No space left on device"
    assert resume(started) == 0
    assert outcome(started) == outcome(whole[0])


# ---------------------------------------------------------------------------------------------
# Numbers gone wrong


def broken(run, where):
    """What to patch so that the run's next step meets a NaN there."""
    nan, rollout = lambda x: x * float("nan"), sys.modules["rollout"]  # noqa: E731
    draw, decode, nft_loss = rollout.draw, run.model.decode, train.nft_loss
    return {
        "latents": (rollout, "draw", lambda *a: (nan(draw(*a)[0]), draw(*a)[1])),
        "images": (run.model, "decode", lambda x: nan(decode(x))),
        "reward": (run.reward, "parts", [("bad", 1.0, lambda i, p, m: [float("inf")] * len(p))]),
        "loss": (train, "nft_loss", lambda *a: tuple([nan(x[0]), x[1]] for x in [nft_loss(*a)])[0]),
        "gradient": (torch.nn.utils, "get_total_norm", lambda g: torch.tensor(float("nan"))),
    }[where]


@pytest.mark.parametrize("where", ["latents", "images", "reward", "loss", "gradient"])
def test_nan_stops_the_run_before_the_optimizer_moves_and_says_where(
    where, whole, started, monkeypatch, capsys
):
    """The log and the checkpoint that it leaves are those from which the killed run above continues
    to the same results."""
    real, unmoved = train.iteration, []

    def iteration(run, step):
        before = [p.detach().clone() for p in run.policies["default"]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*broken(run, where))
            try:
                return real(run, step)
            finally:
                after = run.policies["default"]
                unmoved.append(all(torch.equal(a, b) for a, b in zip(before, after)))

    monkeypatch.setattr(train, "iteration", iteration)
    assert resume(started) == 1 and unmoved == [True]
    said = capsys.readouterr().err.strip().splitlines()[-1]
    stage = "update" if where in ("loss", "gradient") else "explore"
    for words in (f"NaN or infinity in the {where}", "prompt 'a", f"stage {stage}", "seed "):
        assert words in said
    assert lines(started) == lines(whole[0])[:2]
    (path,) = (started / "checkpoints").iterdir()
    saved = contents(whole[0] / "checkpoints" / path.name)
    assert contents(path)["state.safetensors"] == saved["state.safetensors"]


def test_nan_in_an_evaluation_ends_the_run_and_leaves_the_checkpoints_before(tmp_path, capsys):
    """A gradient that is finite may still ruin the policy."""
    folder = tmp_path / "run"
    options = [*MINIATURE, "--learning_rate", "1e20", "--output_dir", str(folder)]
    assert train.main(options) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "NaN or infinity in the " in said and "stage evaluate" in said and "prompt 'a" in said
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [0]


def test_equal_rewards_have_no_advantage_and_are_counted():
    rewards = torch.tensor([[0.1] * 3, [0.2, 0.3, 0.4]])
    advantages = train.group_advantages(rewards)
    assert advantages[0].tolist() == [0, 0, 0] and advantages[1].abs().max() > 0.5
    rank_fidelity = train.selection.rank_fidelity
    metrics = reward_metrics(rewards, {"weighted_sum": rewards}, rank_fidelity)
    assert metrics["reward/zero_spread"] == 1


def test_what_safetensors_says_of_a_full_disk_is_a_line_too(capsys):
    """A real full disk makes it raise its own error, which is no OSError."""

    def fails():
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    assert errors.exit_code("train.py", fails) == 1
    assert capsys.readouterr().err.startswith("train.py: Error while serializing: I/O error")
