"""Names of models and tokenizers, as a file may hold them."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def describe_source(source: Any) -> str | None:
    """Where a model or tokenizer came from, without the path of a local folder."""
    if not source:
        return None
    source = os.fspath(source)
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) or os.path.isabs(source) else source


def is_repo_id(name: Any) -> bool:
    """Whether a name can be one of a repository on the Hub."""
    # Older clients let other letters and a line break at the end pass.
    if not isinstance(name, str) or not _REPO_ID.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def names_repository(described: str | None, commit: str | None = None) -> bool:
    """Whether what `describe_source` gave is a name on the Hub: with a commit, or of two parts, because a local folder
    is described by its last part alone (which may be somebody else's repository, as "gpt2" is)."""
    return is_repo_id(described) and (commit is not None or "/" in str(described))


def recorded_repository(described: str | None, commit: str | None = None) -> str | None:
    """The repository on the Hub that a file names, where it may be read without the user having named it: never a
    path, nor a name that would be read from a folder here. None otherwise."""
    return described if names_repository(described, commit) and not os.path.exists(str(described)) else None
