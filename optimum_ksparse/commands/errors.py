"""What a user reads when a command fails: one line, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ..records import printable

_MOST_CHARACTERS = 700
# Errors that say by themselves what to do; the name of any other stands before its message.
_PLAIN = (OSError, ValueError, TypeError, ArithmeticError, ImportError)
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)


class UsageError(ValueError):
    """The words of a command, or its recipe, cannot be: status 2."""


def describe_error(error: BaseException, flags: Mapping[str, str], switches: Collection[str] = ()) -> str:
    """An error in one line. `flags` has for each setting how the command line writes it: its flag, or its own name
    where it has none. `switches` are those whose flag has no value."""
    text = printable(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None and text.startswith("[Errno"):
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    elif isinstance(error, MemoryError) or _MEMORY.search(text):
        text = (
            f"the memory does not suffice ({text.partition('. ')[0]}): take a smaller --batch-size, --num-samples or "
            "--seq-len, another --device-map, or prune with --stream"
        )
    elif not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}"
    if len(text) > _MOST_CHARACTERS:  # such as transformers' list of all classes
        text = f"{text[:_MOST_CHARACTERS].rpartition(' ')[0]} …"
    return in_flags(text, flags, switches)


def in_flags(text: str, flags: Mapping[str, str], switches: Collection[str]) -> str:
    """A message in which settings are written as flags: `seq_len=512` as `--seq-len 512`, `resume=False` as
    `--resume false`, the switch `overwrite=True` as `--overwrite`. A bare word is taken for a setting where it can be
    nothing else: with `_` in it, or first."""
    for name, flag in sorted(flags.items(), key=lambda item: -len(item[0])):
        word = rf"(?<![\w.\-/'\"?&]){re.escape(name)}"
        if name in switches:
            text = re.sub(rf"{word}=True\b", flag, text)
        for python, written in _WORDS.items():
            text = re.sub(rf"{word}={python}\b", f"{flag} {written}", text)
        text = re.sub(rf"{word}=(?=[\w'\"<\[({{.\-/…])", f"{flag} ", text)
        text = re.sub(rf"{word}=", flag, text)
        if "_" in name and flag.startswith("-"):
            text = re.sub(rf"{word}(?![\w.(\-/'\"])", flag, text)
        text = re.sub(rf"^{re.escape(name)}(?= (must|has|is|needs)\b|:|\[)", flag, text)
    return re.sub(r"\bTrue or False\b", "true or false", text)


_WORDS = {"True": "true", "False": "false", "None": "none"}
