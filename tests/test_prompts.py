"""Prompts files: what is read of them, what is held out, and what is wrong with a bad one."""

import json

import pytest

from support.errors import InputError
from support.prompts import Prompts, read_prompts, split_prompts

GENEVAL = b'{"prompt": "a red ring", "tag": "colors"}\n{"prompt": "a cross"}\n'


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("missing.txt", None, "cannot be read as UTF-8 text: [Errno 2]"),
        ("latin1.txt", "caf\xe9".encode("latin-1"), "cannot be read as UTF-8 text"),
        ("empty.txt", b"\n \n", "has no prompt"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: has no valid 'prompt'"),
        ("number.jsonl", b'{"prompt": 1}\n', "line 1: "),
        ("halfemoji.jsonl", rb'{"prompt": "a cat \ud83d", "n": 1}', "line 1: "),
        ("hps.json", b'[\n "a red ring"\n]', "line 1: looks like JSON or a table; give a .txt"),
        ("drawbench.csv", b"Prompts,Category\na red ring,Colors\n", "line 1: looks like"),
        ("parti.TSV", b"Prompt\tCategory\na red ring\tAbstract\n", "line 1: looks like"),
        ("geneval.jsonl.txt", GENEVAL, "line 1: looks like"),
    ],
)
def test_a_bad_prompts_file_is_one_line(name, content, says, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for option, files in (("--prompts", (path, "")), ("--eval_prompts", ("", path))):
        with pytest.raises(InputError) as error:
            split_prompts(*files, ["a cat"], ["a dog"])
        assert str(error.value).startswith(f"{option} {path}") and says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_prompt_has_the_other_fields_of_its_line_as_metadata(tmp_path):
    for name in ("p.jsonl", "p.JSONL", "p.ndjson"):
        (tmp_path / name).write_bytes(GENEVAL)
        expected = [("a red ring", {"tag": "colors"}), ("a cross", {})]
        assert read_prompts(tmp_path / name) == (expected, [])


def test_empty_and_repeated_prompts_are_left_out_and_said(tmp_path):
    path, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    path.write_text(
        '{"prompt": " a", "n": 1, "m": 2}\n\n{"prompt": " "}\n'
        '{"m": 2, "n": 1, "prompt": "a"}\n{"prompt": "a"}'
    )
    notes = [f"{path}: 3 empty or repeated prompts are left out"]
    assert read_prompts(path) == ([("a", {"n": 1, "m": 2}), ("a", {})], notes)
    text.write_bytes(b"\xef\xbb\xbfa cat\r\n\n caf\xc3\xa9 \n")  # byte order mark, CRLF
    notes = [f"{text}: 1 empty or repeated prompts are left out"]
    assert read_prompts(text) == ([("a cat", {}), ("caf\xe9", {})], notes)


@pytest.mark.parametrize("n, step, num_held_out", [(20, 10, 2), (640, 10, 64), (1000, 16, 63)])
def test_every_tenth_prompt_at_most_64_is_held_out_with_all_its_metadata(
    n, step, num_held_out, tmp_path
):
    rows = [{"prompt": f"cat {i}", "n": n} for i in range(n) for n in (1, 2)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held_out, notes = split_prompts(tmp_path / "p.jsonl", "", [], [])
    expected = [f"cat {i}" for i in range(0, n, step) for _ in range(2)]
    assert held_out == Prompts(expected, [{"n": 1}, {"n": 2}] * num_held_out)
    assert len(train.prompts) == 2 * (n - num_held_out) and not set(train.prompts) & set(expected)
    assert notes == []


def test_held_out_prompts_that_are_trained_on_are_said(tmp_path):
    path, other = tmp_path / "p.txt", tmp_path / "eval.txt"
    path.write_text("\n".join(f"cat {i}" for i in range(20)))
    other.write_text("dog\ncat 3\n")
    train, held_out, notes = split_prompts(path, other, [], [])
    assert held_out.prompts == ["dog", "cat 3"] and len(train.prompts) == 20
    assert notes == ["1 of the 2 held-out prompts are trained on too"]
    path.write_text("one cat")
    train, held_out, notes = split_prompts(path, "", [], [])
    assert train == held_out == Prompts(["one cat"], [{}])
    assert notes == ["1 of the 1 held-out prompts are trained on too"]
    train, held_out, _ = split_prompts("", "", ["a", "b"], ["c"])
    assert (train, held_out) == (Prompts(["a", "b"], [{}, {}]), Prompts(["c"], [{}]))
