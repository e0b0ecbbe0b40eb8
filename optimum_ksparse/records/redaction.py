"""Access tokens: what looks like one is never shown, and never taken for a name."""

from __future__ import annotations

import os
import re
from typing import Any

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


def check_no_token(name: str, value: Any) -> None:
    """Raises ValueError, which does not show it, where a name or a path holds what looks like an access token: it
    would be sent as the name of a repository, and kept in reports and cards."""
    if isinstance(value, str) and redact(value) != value and not os.path.exists(value):
        raise ValueError(
            f"{name} looks like an access token, or holds one, and is not used: pass it with token= alone, or log in "
            "with `hf auth login`; if it was shown or saved anywhere, revoke it"
        )
