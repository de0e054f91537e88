"""Files from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import errors, model_info, snapshot_download

from support.errors import InputError, one_line


def fetch(repository, patterns, whole=False, optional=()):
    """The folder with a repository's files of these patterns, from the hub or else its cache.
    whole: errors advise to download the whole repository; optional: patterns of files that may be
    missing. Raises InputError."""
    reason = "a file is missing"
    for local in (False, True):
        try:
            if not local:
                model_info(repository, timeout=5)  # snapshot_download alone can wait for minutes
            options = dict(allow_patterns=[*patterns, *optional], local_files_only=local)
            folder = Path(snapshot_download(repository, **options))
            if all(any(folder.glob(pattern)) for pattern in patterns):
                return folder
        except Exception as error:  # Several libraries raise their own when there is no network.
            reason = error if not local else reason
    if isinstance(reason, errors.GatedRepoError):
        problem = "gated; accept its licence on the hub and log in with `hf auth login`"
    elif isinstance(reason, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        problem = "neither a folder nor such a model on the hub"
    else:
        files = "".join(f" --include '{pattern}'" for pattern in patterns if not whole)
        problem = (
            f"{patterns[-1]} is missing, or the hub cannot be asked; on a machine with network "
            f"run: hf download {repository}{files}; then copy its ~/.cache/huggingface/hub here "
            f"and set HF_HUB_OFFLINE=1 ({one_line(reason)})"
        )
    raise InputError(f"{repository}: {problem}")
