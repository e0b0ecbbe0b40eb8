"""One commit with a folder's files and its card, and what to tell the user where the Hub refuses."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME, logging

from ..checkpoint.staging import outdated
from ..data import is_unreachable
from .figures import ERROR_FIGURE, RESULTS_FIGURE
from .writing import CARD_NAME, read_card, write_card_of

logger = logging.get_logger(__name__)

_T = TypeVar("_T")
# Of the card; on the Hub they go when a push has none of them any more.
_FIGURES = (ERROR_FIGURE, RESULTS_FIGURE)
# Seconds between tries. The client itself retries uploads, but neither commits nor look-ups.
_WAITS = (1, 2, 4)
# Too many requests, time-outs, and 412: somebody else committed between our look at the repository and our commit.
_PASSING = (408, 412, 429)


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
    """One commit with the folder's files and the card (`card` are arguments of `write_card_of`), on top of what is
    there. A retry begins with what is there then: where somebody else committed, the card is made anew from theirs,
    and where our commit had arrived after all, there is nothing left to do."""

    def attempt() -> CommitInfo:
        head = api.repo_info(repo_id, revision=revision).sha
        there = set(api.list_repo_files(repo_id, revision=head))
        existing = _remote_card(api, repo_id, head) if CARD_NAME in there else card["existing"]
        write_card_of(model, folder, **{**card, "existing": existing})
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        stale = outdated(there, files)
        if CONFIG_NAME in files:  # a model of its own, in the place of what was there, and not an adapter beside it
            stale += [name for name in _FIGURES if name in there - set(files)]
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in files]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )

    return with_retries(repo_id, attempt, once=create_pr)


def with_retries(repo_id: str, action: Callable[[], _T], *, once: bool = False) -> _T:
    """Calls `action`, and calls it again where the network or the server stumbles; with `once` not where it may have
    arrived, because the answer to a request was lost.

    Raises:
        PermissionError: the Hub does not accept the token, or the token may not do this.
        ConnectionError: it did not work out in four tries, in two where the Hub cannot be reached, or the Hub
            refuses; says what the user can do.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except (HTTPError, LocalEntryNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error.__cause__, HTTPError):
                raise  # uploads of large files fail with a RuntimeError, but so do other things
            _check_access(repo_id, error)
            lost = once and isinstance(error, HTTPError) and _status(error) is None
            gone = is_unreachable(error) and wait not in _WAITS[:1]  # it cannot be reached twice
            if wait is None or lost or gone or not _passes(error):
                what = "the pull request may be there or not" if lost else "nothing of it is published"
                offline = "" if _status(error) else "; without a network save_pretrained and write_card work"
                raise ConnectionError(
                    f"the push to {repo_id} broke off ({_reason(error)}); {what}, model and results are as they were: "
                    f"push again{offline}"
                ) from error
            logger.warning(f"The Hub stumbled ({_reason(error)}); trying again in {wait} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _passes(error: Exception) -> bool:
    status = _status(error)
    return status is None or status in _PASSING or status >= 500


def _check_access(repo_id: str, error: Exception) -> None:
    status = _status(error)
    if status == 401:
        raise PermissionError(
            f"the Hub does not accept the token, or there is none (401), for {repo_id}: log in with `hf auth login` "
            "or pass token="
        ) from error
    if status == 403:
        raise PermissionError(
            f"the token may not write to {repo_id} (403): use one with write access there, or create_pr=True"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=cache)
        return read_card(Path(path))
