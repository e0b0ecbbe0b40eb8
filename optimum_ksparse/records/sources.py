"""Names of models and tokenizers, as a file may hold them; and access tokens: what looks like one is never shown, and
never taken for a name."""

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


# Tokens of users and of organisations: 34 letters and digits on the Hub. hf_quantizer and hf_llama3 are none.
_TOKEN = r"(?:hf|api_org)_(?:(?=[A-Za-z0-9]*[A-Z])(?=[A-Za-z]*[0-9])[A-Za-z0-9]{8,}|[A-Za-z0-9]{16,})"
_SECRETS = (
    (re.compile(_TOKEN), "hf_…"),
    (re.compile(r"(?i)(\bbearer\s+)[^\s'\"]+"), r"\1…"),
    (re.compile(r"(?i)\b((?:access_?|hf_?)?token=['\"]?)(?!None|True|False|…)[^\s'\"&,;)<…]+"), r"\1…"),
    (re.compile(r"(\w://)[^\s/@]+@"), r"\1…@"),  # user and password in a URL
)


def redact(text: str, *secrets: str | None) -> str:
    """A text without what looks like a token or a password in it, and without these secrets."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "…")
    for expression, instead in _SECRETS:
        text = expression.sub(instead, text)
    return text


def clean_token(token: Any) -> Any:
    """A token as it is read from a file, with a line break at its end, could not be sent, and would be shown; anything
    but a text as it is. Raises ValueError for what cannot be one."""
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token is empty, or has signs in it that a token cannot have")
    return token


def check_no_token(name: str, value: Any) -> None:
    """Raises ValueError, which does not show it, where a name or a path holds what looks like an access token: it
    would be sent as the name of a repository, and kept in reports and cards."""
    if isinstance(value, str) and redact(value) != value and not os.path.exists(value):
        raise ValueError(
            f"{name} looks like an access token, or holds one, and is not used: pass it with token= alone, or log in "
            "with `hf auth login`; if it was shown or saved anywhere, revoke it"
        )
