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
from conftest import MINIATURE, error_line, lines, outcome
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
    """Its reward is a file, which must be said anew."""
    reward = json.loads((folder / "config.json").read_text())["config"]["reward"]
    return train.main(["--resume", str(folder), "--reward", reward, *options])


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
    where, number, code, whole, tmp_path, monkeypatch, capfd
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
        assert train.main([*whole[1], "--output_dir", str(folder)]) == code
    said = capfd.readouterr()
    assert f"continue with: python train.py --resume {folder} --reward" in said.out
    assert said.err.count("stopping after this micro-batch") == 1
    assert resume(folder) == 0
    assert outcome(folder) == outcome(whole[0])


def test_a_second_ctrl_c_leaves_at_once(whole, tmp_path, monkeypatch, capsys):
    def twice(run, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "iteration", twice)
    assert train.main([*whole[1], "--output_dir", str(tmp_path / "run")]) == 130
    assert "left at once; the last checkpoint, if any, is whole" in capsys.readouterr().err
    assert [s for s, _ in checkpoint.found(tmp_path / "run")] == [0]
    assert signal.getsignal(signal.SIGINT) is before


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
    latest = ("--resume", "latest", *whole[1][-2:], "--seed", "9")
    said = error(*latest, "--pool", "8", "--micro_batch", "36")
    assert (
        "--resume runs/one: --pool was 6 and is 8, --seed was 0 and is 9; --force pool,seed" in said
    )
    assert "--seed was" not in error(*latest, "--force", "seed", "--keep", "2")
    assert "--force sed: names" in error(*latest, "--force", "sed")
    assert "; start a new run" in error(*latest, "--lora_rank", "3")
    assert "none of model, lora_rank" in error(*latest, "--lora_rank", "3", "--force", "lora_rank")
    assert "a run goes on in its folder" in error(*latest, "--output_dir", "elsewhere")
    assert "there is none" in error("--force", "seed")
    assert "give a run's folder" in error("--resume", "")
    assert f"say so by --reward {whole[1][-1]}" in error(
        "--resume", "runs/one"
    ) and "executes a file" in error("--resume", "runs/one", "--steps", "3")
    more = ["--learning_rate", "0.5", "--eval_rewards", "clipscore"]
    assert train.main([*latest[:4], *more, "--force", "learning_rate,eval_rewards"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " was " in line]
    assert said == [
        "--eval_rewards was '' and is 'clipscore'",
        "--learning_rate was 0.001 and is 0.5",
    ]
    assert outcome(Path("runs/one"))[1] != outcome(whole[0])[1]


def test_what_is_changed_stays_changed_when_the_run_stops_again(whole, started, monkeypatch):
    real = train.iteration

    def stopped(run, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "iteration", stopped)
        assert resume(started, "--steps", "3", "--keep_checkpoints", "1") == 143
    assert [p.name for _, p in checkpoint.found(started)] == ["step_000001"]
    assert resume(started) == 0
    assert [line["step"] for line in lines(started)] == [0, 1, 2, 3]


def test_a_checkpoint_whose_successor_is_not_there_yet_counts(started):
    path = checkpoint.found(started)[-1][1]
    aside = path.rename(path.with_name(path.name + checkpoint.ASIDE))
    assert checkpoint.newest(started).path == aside
    shutil.copytree(aside, path)
    assert checkpoint.newest(started).path == path


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
            assert victim.name == "manifest.json" and json.loads(victim.read_text()) == manifest
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
    assert "no checkpoint is intact" in error_line(capsys.readouterr().err)


def sign(path):
    """Make a checkpoint's manifest agree with its files, as who would harm us can."""
    files = {name: path / name for name in checkpoint.FILES}
    manifest = {k: [f.stat().st_size, checkpoint._hash(f)] for k, f in files.items()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def bare(folder):
    return train.main(["--resume", str(folder)])


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


def hostile_options(path, **changes):
    options = json.loads((path / "run.json").read_text())["options"]
    hostile_json(path, options=options | changes)


def hostile_lines(path, change):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    change(lines)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    "no file": lambda path, ran: (
        (path / "manifest.json").unlink(),
        os.mkfifo(path / "manifest.json"),
    ),
    "a link without an end": lambda path, ran: (
        (path / "manifest.json").unlink(),
        (path / "manifest.json").symlink_to("/dev/zero"),
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
    "an unknown option": lambda path, ran: hostile_options(path, shell="rm"),
    "an absurd option": lambda path, ran: hostile_options(path, pool=10**12),
    "a zero byte": lambda path, ran: hostile_options(path, prompts="a\0b"),
    "a reward in a file": lambda path, ran: (
        (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')"),
        hostile_options(path, reward=str(path / "evil.py") + ":f"),
    ),
    "another step": lambda path, ran: hostile_json(path, step=10**9),
    "other prompts": lambda path, ran: hostile_json(path, fingerprints={"prompts": "0"}),
    "no fingerprints": lambda path, ran: hostile_json(path, fingerprints=None),
    "a text for a number": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0].update({"eval/reward": "x"})
    ),
    "a number for numbers": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0].update({"eval/rewards": 1.0})
    ),
    "a number too many": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0]["eval/rewards"].append(1.0)
    ),
    "a number too large": lambda path, ran: hostile_lines(
        path, lambda lines: lines[1].update({"loss": 10**400})
    ),
    "no number": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0]["eval/rewards"].__setitem__(0, None)
    ),
    "an infinity": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0]["eval/rewards"].__setitem__(0, float("inf"))
    ),
    "prompts without end": lambda path, ran: hostile_options(path, prompts="/dev/zero"),
    "a link to elsewhere": lambda path, ran: (path.parents[1] / "lora").symlink_to("/"),
    "half an evaluation": lambda path, ran: hostile_lines(
        path, lambda lines: lines[0].pop("eval/standard_error")
    ),
    "no evaluation before": lambda path, ran: hostile_lines(path, lambda lines: lines.pop(0)),
    "a line twice": lambda path, ran: hostile_lines(path, lambda lines: lines.append(lines[1])),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_a_line_and_executes_nothing(
    what, started, tmp_path, capsys
):
    shutil.rmtree(started / "checkpoints" / "step_000000", ignore_errors=True)
    HOSTILE[what](started / "checkpoints" / "step_000001", tmp_path / "ran")
    before = {p: p.read_bytes() for p in started.rglob("*.json*") if p.parent == started}
    capsys.readouterr()
    # The reward's file is said, which alone is executed: the right one or, in its place, none.
    assert (resume if what != "a reward in a file" else bare)(started) == 2
    assert before == {p: p.read_bytes() for p in before}
    assert error_line(capsys.readouterr().err)
    assert not (tmp_path / "ran").exists() and not (started / "lora" / "README.md").exists()


def test_nothing_is_written_through_a_link(started, tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("config.json", "metrics.jsonl", "curve.png"):
        (started / f"unfinished.{name}").symlink_to(tmp_path / "victim")
    assert resume(started) == 0 and (tmp_path / "victim").read_text() == "precious"


def test_two_runs_are_never_in_one_folder(whole, started, tmp_path, monkeypatch, capsys):
    with train.alone(train.parse([*whole[1], "--output_dir", str(tmp_path / "new")])):
        (tmp_path / "new" / "x").touch()
        with monkeypatch.context() as patch:  # both found it empty
            patch.setattr(Path, "iterdir", lambda path: iter(()))
            assert train.main([*whole[1], "--output_dir", str(tmp_path / "new")]) == 2
    assert "another run is in it" in capsys.readouterr().err
    with train.alone(train.parse(["--resume", str(started), *whole[1][-2:]])):
        assert resume(started) == 2
    assert "another run is in it" in capsys.readouterr().err and resume(started) == 0


def test_a_rewards_file_that_changed_is_noticed(started, whole, tmp_path, capsys):
    mine = Path(whole[1][-1].partition(":")[0])
    text = mine.read_text()
    try:
        mine.write_text(text + "# another\n")
        assert resume(started) == 2
        assert "not the reward of the run so far; --force reward goes on" in capsys.readouterr().err
        assert resume(started, "--force", "reward") == 0
    finally:
        mine.write_text(text)


def test_a_base_model_that_is_another_is_noticed(started, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "base_fingerprint", lambda transformer: "another")
        assert resume(started) == 2
    assert "not the base model of the run so far" in capsys.readouterr().err


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


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_full_at_any_write_of_a_checkpoint_harms_none_before(
    step, started, tmp_path, monkeypatch
):
    """Of the second step's, and of the first's when it is written again."""

    def contents(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    last = contents(checkpoint.found(started)[-1][1])
    for at in range(1, 99):
        folder = shutil.copytree(started, tmp_path / f"at_{at}")
        with monkeypatch.context() as patch:
            done = full_disk(patch, at)
            patch.setattr(checkpoint, "_tensors", lambda run: {"default.0": torch.zeros(2, 2)})
            try:
                checkpoint.save(Nothing(folder), '{"step": 0}\n', step)
            except OSError:
                assert len(done) == at
            else:
                break
        there = checkpoint.found(folder)
        assert {p for p in (folder / "checkpoints").iterdir()} == {p for _, p in there}, "half"
        assert last in [contents(path) for _, path in there]
    assert at > 10 and checkpoint.found(folder)[-1][0] == step
    assert not list((folder / "checkpoints").glob("*" + checkpoint.ASIDE))


class Nothing:
    """As much of a run as a checkpoint needs."""

    def __init__(self, folder):
        self.config = train.parse(["--output_dir", str(folder) + "_"])
        self.config.output_dir = str(folder)
        self.fingerprints = {}


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
        assert "No such file" in said and said.endswith("when that is mended, start again")
    else:
        assert f"mended, continue with: python train.py --resume {started} --reward" in said
        assert resume(started) == 0
        assert outcome(started) == outcome(whole[0])


# ---------------------------------------------------------------------------------------------
# Numbers gone wrong


def broken(run, where):
    """What to patch so that the run's next step meets a NaN there."""
    nan, model = lambda x: x * float("nan"), run.model  # noqa: E731
    draw, decode, velocity, nft = train.draw, model.decode, model.velocity, train.nft_loss

    def only_with_gradient(transformer, x, *rest):
        v = velocity(transformer, x, *rest)
        return nan(v) if torch.is_grad_enabled() else v

    return {
        "latents": (train, "draw", lambda *a: (nan(draw(*a)[0]), draw(*a)[1])),
        "images": (model, "decode", lambda x: nan(decode(x))),
        "reward": (run.reward, "parts", [("bad", 1.0, lambda i, p, m: [float("inf")] * len(p))]),
        "velocity": (model, "velocity", only_with_gradient),
        "loss": (train, "nft_loss", lambda *a: tuple([nan(x[0]), x[1]] for x in [nft(*a)])[0]),
        "gradient": (torch.nn.utils, "get_total_norm", lambda g: torch.tensor(float("nan"))),
    }[where]


@pytest.mark.parametrize(
    "where, choice",
    [
        ("latents", "skip"),
        ("images", "stop"),
        ("reward", "stop"),
        ("velocity", "stop"),
        ("loss", "stop"),
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


def test_nan_in_an_evaluation_ends_the_run_and_leaves_the_checkpoints_before(
    tmp_path, world, capsys
):
    """A gradient that is finite may still ruin the policy."""
    out = tmp_path / "run"
    options = "--learning_rate 1e20 --keep_checkpoints 1 --on_nonfinite skip".split()
    assert train.main([*MINIATURE, *options, "--output_dir", str(out)]) == 1
    said = capsys.readouterr()
    assert "NaN or infinity in the images, evaluate in bf16, prompt 'a" in said.err
    (dump,) = (out / "nonfinite").iterdir()
    assert not torch.isfinite(load_file(dump)["value"]).all()
    assert [step for step, _ in checkpoint.found(out)] == [0]
    forced = "--force learning_rate --learning_rate"
    assert f"continue with: python train.py --resume {out} {forced} LOWER" in said.out
    assert train.main(["--resume", str(out), *forced.split(), "0.001"]) == 0
    assert [line["step"] for line in lines(out)] == [0, 1, 2]


def test_a_run_of_which_every_step_was_skipped_goes_on(world, tmp_path, monkeypatch):
    """AdamW has no state then."""
    real, folder = train.iteration, tmp_path / "run"

    def iteration(run, step):
        if step == 0:
            raise train.NonFinite("loss", torch.tensor(float("nan")), "update", "a", 1, "bf16")
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    options = [*MINIATURE, "--on_nonfinite", "skip", "--output_dir", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "iteration", iteration)
        assert train.main(options) == 143
    assert train.main(["--resume", str(folder)]) == 0
    assert ["loss" in line for line in lines(folder)] == [False, False, True]
    assert "for 1 steps" in (folder / "lora" / "README.md").read_text()


def test_equal_rewards_have_no_advantage_and_are_counted(world, tmp_path):
    rewards = torch.tensor([[0.1] * 3, [0.2, 0.3, 0.4]])
    advantages = train.group_advantages(rewards)
    assert advantages[0].tolist() == [0, 0, 0] and advantages[1].abs().max() > 0.5
    metrics = train.reward_metrics(rewards, {"weighted_sum": rewards})
    assert metrics["reward/zero_spread"] == 1
