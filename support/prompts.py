"""Prompts: read from a file, and split into those that are trained on and those held out."""

import dataclasses
import json
from pathlib import Path

from support.errors import InputError, one_line, require


@dataclasses.dataclass
class Prompts:
    """n prompts (str) and their metadata (dicts)."""

    prompts: list
    metadata: list


def read_prompts(path, option="--prompts"):
    """A prompts file -> (prompts, their metadata, notes for the user). A line that repeats prompt
    and metadata of an earlier one is left out. option: its name in errors. Raises InputError."""
    prefix = f"{option} {path}"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{prefix}: cannot be read as UTF-8 text: {one_line(error)}") from error
    distinct, repeated = {}, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            metadata = json.loads(line) if str(path).endswith(".jsonl") else {"prompt": line}
            prompt = metadata.pop("prompt").strip()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            form = "must be a JSON object whose 'prompt' is a text"
            raise InputError(f"{prefix}, line {number}: {form}") from error
        key = prompt, json.dumps(metadata, sort_keys=True)
        repeated += key in distinct
        distinct[key] = metadata
    require(distinct, f"{prefix}: has no prompt")
    notes = [f"{path}: {repeated} repeated lines are used once"] if repeated else []
    return [prompt for prompt, _ in distinct], list(distinct.values()), notes


def split_prompts(prompts_file, eval_file, train_prompts, held_out_prompts):
    """(training Prompts, held-out Prompts, notes for the user).

    Without a file (--prompts "") they are the two lists. Of a file every tenth prompt, at most 64,
    is held out, unless another file (--eval_prompts) has the held-out ones; a single prompt serves
    as both. Raises InputError.
    """
    train, held_out = ([(p, {}) for p in part] for part in (train_prompts, held_out_prompts))
    notes = []
    if prompts_file:
        prompts, metadata, notes = read_prompts(prompts_file)
        rows, unique = list(zip(prompts, metadata)), list(dict.fromkeys(prompts))
        chosen = set() if eval_file else set(unique[:: max(10, -(-len(unique) // 64))])
        train = [row for row in rows if row[0] not in chosen] or rows
        held_out = [row for row in rows if row[0] in chosen]
    if eval_file:
        prompts, metadata, more = read_prompts(eval_file, "--eval_prompts")
        held_out, notes = list(zip(prompts, metadata)), notes + more
    train, held_out = (Prompts(*map(list, zip(*rows))) for rows in (train, held_out))
    shared = len(set(train.prompts) & set(held_out.prompts))
    if shared:
        notes.append(f"{shared} of the {len(held_out.prompts)} held-out prompts are trained on too")
    return train, held_out, notes
