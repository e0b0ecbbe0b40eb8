"""Checks of arguments: each gives the value back, or raises an error that names the argument, what was found and what
is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

# What other programs call a setting → what it is called here.
_MEANT = {"sparsity": "pattern", "sparsity_ratio": "pattern", "bits": "values"}


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The one of `allowed`, which may be flags, that was most likely meant; None where none is alike."""
    options = {_plain(option): option for option in allowed}
    plain = _plain(name)
    near = [meant] if (meant := _MEANT.get(plain)) in options else difflib.get_close_matches(plain, options, n=1)
    return options[near[0]] if near else None


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")


def _hint(name: str, allowed: Iterable[str]) -> str:
    near = nearest(name, allowed)
    return f"did you mean {near!r}? " if near else ""


def check_keys(settings: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raises ValueError for a key of `settings` that is not allowed, naming the nearest one that is."""
    for key in settings:
        if key not in allowed:
            raise ValueError(
                f"{where} has no setting {key!r}: {_hint(str(key), allowed)}allowed: {', '.join(allowed)}"
            )


def check_one_of(name: str, value: Any, allowed: Any) -> str:
    """A string, one of `allowed`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, found {type(value).__name__}; allowed: {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; {_hint(value, allowed)}allowed: {', '.join(allowed)}")
    return value


def check_integer(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {least}, found {value!r}")
    if value < least:
        raise ValueError(f"{name}={value} is too small, it must be at least {least}")
    return value


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """A number from `least` to `most`, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number from {least} to {most}, found {value!r}")
    if not least <= float(value) <= most:
        raise ValueError(f"{name}={value} is out of range, it must be from {least} to {most}")
    return float(value)


def check_share(name: str, value: Any) -> float:
    """A number between 0 and 1, both excluded, as a float."""
    share = check_number(name, value, 0, 1)
    if share in (0, 1):
        raise ValueError(f"{name}={value} is out of range, it must be between 0 and 1, both excluded")
    return share


def check_boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {value!r}")
    return value


def check_names(name: str, value: Any) -> list[str] | None:
    """A list of strings, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of strings or None, found {value!r}")
    return list(value)
