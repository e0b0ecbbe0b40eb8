"""One commit with a folder's files and its card, and what to tell the user where the Hub refuses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from ..checkpoint import is_weight_file
from ..report import REPORT_NAME, RESULTS_NAME
from .figures import ERROR_FIGURE, RESULTS_FIGURE
from .writing import CARD_NAME, write_card

# Beside the weights; on the Hub they go when a push has none of them any more.
_OWNED = (REPORT_NAME, RESULTS_NAME, ERROR_FIGURE, RESULTS_FIGURE)
_MOST_TRIES = 3


def commit_folder(
    api: HfApi,
    repo_id: str,
    folder: Path,
    model: Any,
    card: dict[str, Any],
    message: str,
    description: str | None,
    revision: str | None,
    *,
    create_pr: bool = False,
) -> CommitInfo:
    """One commit with the folder's files and the card (`card` are arguments of `write_card`), on top of what is there.
    Where somebody else commits at the same time, the card is made anew from theirs."""
    for attempt in range(1, _MOST_TRIES + 1):
        with hub_errors(repo_id):
            head = api.repo_info(repo_id, revision=revision).sha
            there = set(api.list_repo_files(repo_id, revision=head))
            existing = _remote_card(api, repo_id, head) if CARD_NAME in there else ""
        write_card(model, folder, existing=existing, **card)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        stale = [name for name in there - set(files) if is_weight_file(name) or name in _OWNED]
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in files]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        try:
            with hub_errors(repo_id):
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head,
                )
        except _OutrunError:
            if attempt == _MOST_TRIES:
                raise
    raise AssertionError("unreachable")


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=cache)
        return Path(path).read_text(encoding="utf-8")


class _OutrunError(ConnectionError):
    """Somebody else committed first."""


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Says what the user can do, instead of which request failed."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise PermissionError(
                f"the Hub does not accept the token, or there is none (401), for {repo_id}: log in with "
                "`hf auth login` or pass token="
            ) from error
        if status == 403:
            raise PermissionError(
                f"the token may not write to {repo_id} (403): use one with write access there, or create_pr=True"
            ) from error
        if status == 412:
            raise _OutrunError(f"somebody else keeps committing to {repo_id}; push again") from error
        raise ConnectionError(_broken(repo_id, error)) from error
    # Uploads of large files fail with a RuntimeError, downloads without a network with a LocalEntryNotFoundError.
    except (HTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        raise ConnectionError(_broken(repo_id, error)) from error


def _broken(repo_id: str, error: Exception) -> str:
    cause = error.__cause__ or error
    return (
        f"the push to {repo_id} broke off ({type(cause).__name__}: {cause}); nothing of it is published, model and "
        "results are as they were: push again"
    )
