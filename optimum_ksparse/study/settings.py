"""Settings as fields of a dataclass with their help, which are flags and keys of recipes by the same names."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def setting(default: Any, text: str) -> Any:
    """A field of a dataclass, with what it is."""
    return field(default=default, metadata={"help": text})


def help_texts(kind: type[Any]) -> dict[str, str]:
    """Name → what it is, of all settings of a dataclass."""
    return {f.name: f.metadata["help"] for f in fields(kind) if "help" in f.metadata}
