"""Prompts files: what is read of them, what is held out, and what is wrong with a bad one."""

import json

import pytest

import train
from support.errors import InputError
from support.prompts import Prompts, read_prompts, split_prompts

BAD_FILES = {
    "EMPTY": b"\n \n",
    "LATIN1": "caf\xe9".encode("latin-1"),
    "BROKEN.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
    "LIST.jsonl": b"[1]\n",
    "NUMBER.jsonl": b'{"prompt": 1}\n',
    "NONE.jsonl": b'{"text": "a"}\n',
}


@pytest.mark.parametrize(
    "path, says",
    [
        ("missing.txt", "missing.txt: cannot be read as UTF-8 text: [Errno 2]"),
        ("FOLDER", "Is a directory"),
        ("a\0b", "embedded null byte"),
        ("LATIN1", "cannot be read as UTF-8 text"),
        ("EMPTY", "EMPTY: has no prompt"),
        ("BROKEN.jsonl", "BROKEN.jsonl, line 2: must be a JSON object whose 'prompt' is a text"),
        ("LIST.jsonl", "LIST.jsonl, line 1"),
        ("NUMBER.jsonl", "NUMBER.jsonl, line 1"),
        ("NONE.jsonl", "NONE.jsonl, line 1"),
    ],
)
def test_a_bad_prompts_file_is_one_line(path, says, tmp_path, monkeypatch):
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    for option, files in (("--prompts", (path, "")), ("--eval_prompts", ("", path))):
        with pytest.raises(InputError) as error:
            split_prompts(*files, ["a cat"], ["a dog"])
        assert says in str(error.value) and str(error.value).startswith(f"{option} {path}")
        assert "\n" not in str(error.value)


def test_prompts_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": " a", "n": 1}\n\n{"prompt": "b"}\n{"n": 1, "prompt": "a"}\n')
    prompts, metadata, notes = read_prompts(path)
    assert (prompts, metadata) == (["a", "b"], [{"n": 1}, {}])
    assert notes == [f"{path}: 1 repeated lines are used once"]
    path.write_text('{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}\n')
    assert read_prompts(path) == (["a", "a"], [{"n": 1}, {"n": 2}], [])
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\n caf\xc3\xa9 \n")  # with a mark, CRLF
    assert read_prompts(tmp_path / "p.txt")[0] == ["a cat", "caf\xe9"]


def test_what_is_held_out_is_a_tenth_of_the_prompts_or_a_file(tmp_path):
    path, other = tmp_path / "p.txt", tmp_path / "eval.txt"
    path.write_text("\n".join(f"cat {i % 20}" for i in range(40)))
    other.write_text("dog\ncat 3\n")
    train, held_out, notes = split_prompts(path, "", [], [])
    assert held_out.prompts == ["cat 0", "cat 10"] and len(train.prompts) == 18
    assert held_out.metadata == [{}, {}] and notes == [f"{path}: 20 repeated lines are used once"]
    train, held_out, notes = split_prompts(path, other, [], [])
    assert held_out.prompts == ["dog", "cat 3"] and len(train.prompts) == 20
    assert notes[1] == "1 of the 2 held-out prompts are trained on too"
    path.write_text("\n".join(f"cat {i}" for i in range(1000)))
    parts = split_prompts(path, "", [], [])[:2]
    assert [len(part.prompts) for part in parts] == [937, 63]  # every 16th
    path.write_text("one cat")
    train, held_out, notes = split_prompts(path, "", [], [])
    assert train.prompts == held_out.prompts == ["one cat"]
    assert notes == ["1 of the 1 held-out prompts are trained on too"]


def test_a_prompt_with_two_metadata_counts_once_and_is_held_out_with_both(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"cat {i}", "n": n} for i in range(11) for n in (1, 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, held_out, _ = split_prompts(path, "", [], [])
    prompts = ["cat 0", "cat 0", "cat 10", "cat 10"]
    assert held_out == Prompts(prompts, [{"n": 1}, {"n": 2}] * 2)
    prompts = [f"cat {i}" for i in range(1, 10) for _ in range(2)]
    assert train == Prompts(prompts, [{"n": 1}, {"n": 2}] * 9)


def test_without_a_file_the_prompts_are_the_tiny_worlds():
    train, held_out, notes = split_prompts("", "", [f"{n}" for n in range(7)], ["a"])
    assert (len(train.prompts), len(train.metadata), held_out.prompts, notes) == (7, 7, ["a"], [])


def test_a_step_has_at_most_as_many_prompts_as_there_are_to_train_on(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join("abcdef"))  # the first one is held out

    def run(n):
        options = f"--prompts {path} --prompts_per_step {n} --pretrained nowhere".split()
        return train.Run(train.parse_options(options))

    with pytest.raises(InputError, match="^--prompts_per_step 6: there are 5 training prompts; "):
        run(6)
    with pytest.raises(InputError, match="nowhere"):  # the next mistake
        run(5)
