"""Settings as fields of a dataclass with their help, which are flags and keys of recipes by the same names."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, get_type_hints

from ..records.build import build_fields


def setting(default: Any, text: str) -> Any:
    """A field of a dataclass, with what it is."""
    return field(default=default, metadata={"help": text})


def help_texts(kind: type[Any]) -> dict[str, str]:
    """Name → what it is, of all settings of a dataclass."""
    return {f.name: f.metadata["help"] for f in fields(kind) if "help" in f.metadata}


def check_types(settings: Any) -> None:
    """Raises ValueError, which names the setting, where one is not of its annotated type, or out of its limits."""
    hints = {name: h for name, h in get_type_hints(type(settings), include_extras=True).items() if h is not Any}
    build_fields({}, hints, {name: getattr(settings, name) for name in hints}, "")
