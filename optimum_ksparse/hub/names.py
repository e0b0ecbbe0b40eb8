"""Names that the Hub allows, and that could stand in a card as they are."""

from __future__ import annotations

from typing import Any

from ..records import is_repo_id
from ..records.kinds import check_revision

LANGUAGES = ("en", "ko")


def check_repository(repo_id: Any) -> None:
    """Raises ValueError for a name that the Hub does not allow."""
    if not is_repo_id(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} cannot be a name on the Hub; use \"user/name\": letters, digits, '-', '_' and '.', "
            "neither of them twice in a row, nor '-' or '.' at an end, at most 96 in all"
        )


def check_target(
    repo_id: str, revision: str | None = None, dense_revision: str | None = None, create_pr: bool = False
) -> None:
    """Raises ValueError for names that the Hub does not allow, or that do not go together."""
    check_repository(repo_id)
    for argument, branch in (("revision", revision), ("dense_revision", dense_revision)):
        if branch is not None:
            check_revision(branch, argument)
    if dense_revision is not None and dense_revision == (revision or "main"):
        raise ValueError(f"dense_revision={dense_revision!r} is where the packed model goes; name another branch")
    if dense_revision is not None and create_pr:
        raise ValueError("dense_revision and create_pr do not go together: push the dense variant to its branch")
