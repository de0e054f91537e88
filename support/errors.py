"""How a run ends early, and files that are written whole or not at all."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

OUT_OF_MEMORY = "out of memory|can't allocate memory"  # what torch says, on a GPU and on a CPU


class InputError(ValueError):
    """Bad input: one line that names the option, its value and what would do. Exit code 2."""


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to stop. Its argument is the number of the signal."""


class NonFinite(FloatingPointError):
    """NaN or infinity, found before the optimizer moved."""


def require(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def check_finite(stage, prompts, seeds, **tensors):
    """Raise NonFinite for the first of n samples, with these n prompts and seeds, for which one of
    the tensors (n, ...) holds NaN or infinity. stage: of the rollout, or "update" or "evaluate"."""
    for what, tensor in tensors.items():
        bad = (~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).tolist()
        if True in bad:
            i = bad.index(True)
            where = f"prompt {prompts[i]!r}, stage {stage}, seed {seeds[i]}"
            raise NonFinite(f"NaN or infinity in the {what}, {where}")


def exit_code(program, function):
    """Call the function; returns 0, or the exit code of what ended it, after one line on stderr:
    2 for bad input, 1 for NaN, a full disk or too little memory, 130 for Ctrl-C, 143 for SIGTERM.
    An error of the program itself keeps its traceback."""
    try:
        function()
        return 0
    except SystemExit as request:  # --help
        return request.code or 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except InputError as error:
        code, line = 2, f"error: {one_line(error)}"
    except (NonFinite, OSError, SafetensorError) as error:  # the last one is also of a full disk
        code, line = 1, one_line(error)
    except KeyboardInterrupt:
        code, line = 130, "stopped at once; checkpoints written before can be used"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = one_line(error).split(". ")[0]
        advice = "lower --micro_batch, --train_micro_batch or --resolution"
        code, line = 1, f"{reason}; {advice}"
    print(f"{program}: {line}", file=sys.stderr)  # torchrun itself says which process failed
    return code


def one_line(error):
    """The text of an exception in one line of at most 400 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 400 else line[:400] + " ..."


@contextlib.contextmanager
def written_whole(path):
    """A temporary name beside `path`. The file or folder that is written there becomes `path` when
    the block ends; if the block fails, nothing is left of it."""
    path = Path(path)
    temporary = path.with_name(f"unfinished.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
