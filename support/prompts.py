"""Prompts: read from a file, and split into training and held-out prompts."""

import collections
import json
from pathlib import Path

from support.errors import InputError, one_line, require

Prompts = collections.namedtuple("Prompts", "prompts metadata")  # n strings, n dictionaries


def read_prompts(path, option="--prompts"):
    """A .txt or .jsonl file -> (rows (prompt, metadata), notes for the user). Equal rows are used
    once, and empty lines are skipped. option: the option that errors name. Raises InputError."""
    where, kind, rows = f"{option} {path}", Path(path).suffix.lower(), []
    advice = 'give a .txt of prompts, or a .jsonl of lines like {"prompt": "a cat"}'
    require(kind in (".txt", ".jsonl"), f"{where}: is no .txt and no .jsonl file; {advice}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as UTF-8 text: {one_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            metadata = json.loads(line) if kind == ".jsonl" else {"prompt": line}
            prompt = metadata.pop("prompt").strip()
            prompt.encode()  # raises for half an emoji, such as \ud83d, which no tokenizer reads
        except (ValueError, KeyError, AttributeError, TypeError):
            prompt = ""
        is_json = kind == ".txt" and not rows and prompt[0] in "{["
        reason = "looks like JSON" if is_json else "has no valid 'prompt'"
        require(prompt and not is_json, f"{where}, line {number}: {reason}; {advice}")
        rows.append((prompt, metadata))
    distinct = {json.dumps(row, sort_keys=True): row for row in rows}
    require(distinct, f"{where}: has no prompt; {advice}")
    repeated = len(rows) - len(distinct)
    notes = [f"{path}: {repeated} repeated prompts are left out"] if repeated else []
    return list(distinct.values()), notes


def split_prompts(prompts_file, eval_file, train_prompts, held_out_prompts):
    """(training Prompts, held-out Prompts, notes for the user), by default of the two lists.

    Every tenth prompt of a file, at most 64, is held out, unless another file has the held-out
    ones; a single prompt serves as both. Raises InputError."""
    train, held_out = ([(p, {}) for p in part] for part in (train_prompts, held_out_prompts))
    notes = []
    if prompts_file:
        train, notes = read_prompts(prompts_file)
        unique = list(dict.fromkeys(prompt for prompt, _ in train))
        chosen = [] if eval_file else unique[:: max(10, -(-len(unique) // 64))]
        held_out = [row for row in train if row[0] in chosen]
        train = [row for row in train if row[0] not in chosen] or train
    if eval_file:
        held_out, more = read_prompts(eval_file, "--eval_prompts")
        notes += more
    train, held_out = (Prompts(*map(list, zip(*rows))) for rows in (train, held_out))
    if shared := len(set(train.prompts) & set(held_out.prompts)):
        notes.append(f"{shared} of the {len(held_out.prompts)} held-out prompts are trained on too")
    return train, held_out, notes
