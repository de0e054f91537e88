"""Files from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import errors, model_info, snapshot_download

from support.errors import InputError, one_line


def fetch(repository, patterns, whole=False):
    """The folder on this machine that holds the files of a repository, downloaded where needed.
    If the hub cannot be reached, the hub's cache will do. whole: more than these files is needed
    later, so errors advise to download the whole repository. Raises InputError."""
    files = "".join(f" --include '{pattern}'" for pattern in patterns if not whole)
    advice = (
        f"on a machine with network run: hf download {repository}{files}; "
        "then copy its ~/.cache/huggingface/hub here and set HF_HUB_OFFLINE=1"
    )
    unreachable = None
    try:
        model_info(repository, timeout=5)  # snapshot_download by itself can wait for minutes
    except errors.HfHubHTTPError:
        pass  # The hub answers; if it refuses, snapshot_download says why.
    except Exception as error:  # Several libraries raise their own when there is no network.
        unreachable = error
    options = dict(allow_patterns=list(patterns), local_files_only=unreachable is not None)
    try:
        folder = Path(snapshot_download(repository, **options))
    except errors.GatedRepoError:
        problem = "gated; accept its licence on the hub and log in with `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = "neither a folder nor such a model on the hub"
    except Exception as error:
        problem = f"the hub cannot be asked for it; {advice} ({one_line(unreachable or error)})"
    else:
        missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
        if not missing:
            return folder
        problem = f"there is no {folder / missing[0]}; {advice}"
    raise InputError(f"{repository}: {problem}")
