"""experiments/compare.py: groups, means and costs by hand, and wrong input."""

import dataclasses
import json

import pytest
from conftest import error_line

import train
from experiments import compare


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that writes a run with two evaluations and returns the name of its folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, reward, argv):
        (tmp_path / name).mkdir()
        options = dataclasses.asdict(train.parse_options(argv.split()))
        (tmp_path / name / "config.json").write_text(json.dumps({"config": options}))
        first = {"step": 0, "eval/reward": 0.5, "eval/accuracy": 0.25, "time/evaluate": 9.0}
        last = {"step": 2, "eval/reward": reward, "eval/accuracy": 0.5, "time/evaluate": 9.0}
        steps = [{"step": 1, "time/explore": 3.0, "time/train": 4.0}, last | {"time/train": 5.0}]
        log = "\n".join(map(json.dumps, [first, *steps]))
        (tmp_path / name / "metrics.jsonl").write_text(log)
        return name

    return write


def test_runs_of_a_group_differ_in_the_seed_alone(run, capsys, tmp_path):
    """sol_rl: 2 updates x 2 prompts x (96 x 6 + 24 x 10 + 24 x 6 x 5) = 6,144 evaluations of the
    network; diffusionnft: 3,840. Seconds: 3 + 4 + 5. Mean 0.7, standard error 0.1."""
    names = [run("a", 0.6, "--seed=1"), run("b", 0.8, "--seed=2 --output_dir=b")]
    names += ["mine=" + run("c", 0.9, "--seed=1 --algorithm=diffusionnft")]
    compare.main([*names, "--output=x.svg"])
    sol_rl, mine = capsys.readouterr().out.splitlines()[2:4]
    assert sol_rl.startswith(
        "| algorithm sol_rl | 2 | 2 | 6 | 12 | 0.5000 ± 0.0000 | 0.7000 ± 0.1000"
    )
    assert mine == "| mine | 1 | 2 | 4 | 12 | 0.5000 | 0.9000 | 0.2500 | 0.5000 |"
    assert (tmp_path / "x.svg").stat().st_size > 10_000


def test_wrong_input_is_one_line(run, capsys):
    a, b = run("a", 0.6, "--seed=1"), run("b", 0.6, "--seed=1")
    for words in (f"{a} {b}", "none", f"{a} --output=none/x.png", f"{a} --output=x.txt"):
        assert compare.exit_code("compare.py", lambda words=words: compare.main(words.split())) == 2
        assert error_line(capsys.readouterr().err, "compare.py")
