"""One commit with a folder's files and its card, and what to tell the user where the Hub refuses.

The client tries again by itself where an upload or a listing stumbles. What it does not do is to look at a repository
anew where somebody else has committed since."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME, logging

from ..checkpoint.staging import outdated
from .figures import FIGURES
from .writing import CARD_NAME, read_card

logger = logging.get_logger(__name__)

_TRIES = 3
_CHANGED = 412  # somebody else committed between our look at the repository and our commit


def commit_folder(
    api: HfApi, repo_id: str, folder: Path, write_card: Callable[[str | None], Any], **commit: Any
) -> CommitInfo:
    """One commit with the folder's files and the card, on top of what is there; where somebody else commits meanwhile
    on top of that. `write_card` writes the card into the folder, on from the one that is given, None where there is
    none; `commit` are `revision`, `create_pr`, `commit_message`, … as in huggingface_hub."""
    for left in reversed(range(_TRIES)):
        head = api.repo_info(repo_id, revision=commit.get("revision")).sha
        there = set(api.list_repo_files(repo_id, revision=head))
        card = None
        if CARD_NAME in there:
            with tempfile.TemporaryDirectory() as cache:
                card = read_card(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=head, cache_dir=cache)))
        write_card(card)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        stale = outdated(there, files)
        if CONFIG_NAME in files:  # a model of its own, in the place of what was there, and not an adapter beside it
            stale += [name for name in FIGURES if name in there - set(files)]
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in files]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        try:
            return api.create_commit(repo_id, operations, parent_commit=head, **commit)
        except HfHubHTTPError as error:
            if _status(error) != _CHANGED or not left:
                raise
            logger.warning(f"Somebody else has committed to {repo_id}; the commit is made on top of theirs.")
    raise AssertionError("unreachable")


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Within it errors of the Hub say what the user can do: PermissionError where it does not accept the token, or the
    token may not do this; ConnectionError where it cannot be reached, or refuses."""
    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, HTTPError):
            raise  # uploads of large files fail with a RuntimeError, but so do other things
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        refusals = {
            401: f"the Hub does not accept the token, or there is none (401), for {repo_id}: log in with "
            "`hf auth login` or pass token=",
            403: f"the token may not write to {repo_id} (403): use one with write access there, or create_pr=True",
        }
        if (status := _status(cause)) in refusals:
            raise PermissionError(refusals[status]) from error
        raise ConnectionError(
            f"the push to {repo_id} broke off ({type(cause).__name__}: {' '.join(str(cause).split())}); a commit is "
            "there whole or not at all, model and results are as they were: push again; without a network "
            "save_pretrained and write_card work"
        ) from error


def _status(error: BaseException | None) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
