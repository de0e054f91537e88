"""Prompts files: what is read of them, what is held out, and what is wrong with a bad one."""

import json

import pytest

from support.errors import InputError
from support.prompts import Prompts, read_prompts, split_prompts

GENEVAL = b'{"prompt": "a red ring", "tag": "colors"}\n\n{"prompt": " a cross"}\r\n'


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("missing.txt", None, ": cannot be read as UTF-8"),
        ("latin1.txt", "caf\xe9".encode("latin-1"), ": cannot be read as UTF-8"),
        ("empty.txt", b"\n \n", ": has no prompt"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', ", line 3: has no valid 'prompt'"),
        ("no_string.jsonl", b'{"prompt": 1}', ", line 1: "),
        ("empty.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', ", line 2: "),
        ("array.jsonl", b'[{"prompt": "a red ring"}]', ", line 1: "),
        ("capital.jsonl", b'{"Prompt": "a red ring"}', ", line 1: "),
        ("halfemoji.jsonl", rb'{"prompt": "a cat \ud83d", "n": 1}', ", line 1: "),
        ("geneval.jsonl.txt", b"\n" + GENEVAL, ", line 2: looks like JSON; give a .txt"),
        ("array.txt", b'[\n "a red ring"\n]', ", line 1: looks like JSON"),
        ("geneval.ndjson", GENEVAL, ": is no .txt and no .jsonl file; give a .txt"),
        ("hps.json", b'[\n "a red ring"\n]', ": is no .txt"),
    ],
)
def test_a_bad_prompts_file_is_one_line(name, content, says, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for option, files in (("--prompts", (path, "")), ("--eval_prompts", ("", path))):
        with pytest.raises(InputError) as error:
            split_prompts(*files, ["a cat"], ["a dog"])
        assert str(error.value).startswith(f"{option} {path}{says}")
        assert "\n" not in str(error.value)


def test_a_prompt_has_the_other_fields_of_its_line_as_metadata(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GENEVAL)
    expected = [("a red ring", {"tag": "colors"}), ("a cross", {})]
    assert read_prompts(tmp_path / "p.jsonl") == (expected, [])


@pytest.mark.parametrize("name", ["p.txt", "p.TXT"])
def test_the_lines_of_a_text_file_are_prompts(name, tmp_path):
    text = b'\xef\xbb\xbfa cat\r\n\n [caf\xc3\xa9], "new" \n'  # byte order mark, CRLF
    (tmp_path / name).write_bytes(text)
    assert read_prompts(tmp_path / name) == ([("a cat", {}), ('[caf\xe9], "new"', {})], [])


def test_equal_rows_are_used_once_and_this_is_said(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": " a", "n": 1, "m": 2}\n{"m": 2, "n": 1, "prompt": "a"}\n{"prompt": "a"}'
    )
    rows, notes = read_prompts(tmp_path / "p.jsonl")
    assert rows == [("a", {"n": 1, "m": 2}), ("a", {})]
    assert notes == [f"{tmp_path / 'p.jsonl'}: 1 repeated prompts are left out"]


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
