"""What annotations of a record may say beside Python's types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from ..pattern import Pattern


@dataclass(frozen=True)
class Between:
    """Limits of a number, both included."""

    least: float
    most: float | None = None

    def __call__(self, value: Any) -> Any:
        if value < self.least or (self.most is not None and value > self.most):
            raise ValueError(
                f"must be at least {self.least}" if self.most is None else f"must be from {self.least} to {self.most}"
            )
        return value


@dataclass(frozen=True)
class Version:
    """Versions of a schema that this package reads. The field must be there, whatever its default, and is read first:
    a newer schema has other fields."""

    newest: int
    oldest: int = 1

    def check(self, name: str, value: int) -> None:
        if value > self.newest:
            raise ValueError(f"{name}={value} is newer than {self.newest}: upgrade optimum-ksparse")


@dataclass(frozen=True)
class As:
    """Says more of a value than its type for Python: `Annotated[dict[str, Any], As(SomeTypedDict)]`. An `is_open`
    object may have other fields too."""

    kind: Any
    is_open: bool = False


def _relative_path(value: str) -> str:
    parts = PurePosixPath(value).parts
    if not parts or value.startswith("/") or ".." in parts or re.search(r"[\\:~$%*?]", value) or len(value) > 255:
        raise ValueError("must be a relative path without '..'")
    return value


def check_revision(value: str, name: str = "") -> str:
    """What can be a commit, a branch or a tag, and could stand in a card as it is; raises ValueError otherwise."""
    part = r"\w[\w.-]*(?<!\.)(?<!\.lock)"
    if not re.fullmatch(rf"{part}(/{part})*", value, re.ASCII) or ".." in value or len(value) > 255:
        said = f"{name}={value!r} " if name else ""
        raise ValueError(f"{said}must be a commit, a branch or a tag: letters, digits, '.', '_', '-' and '/'")
    return value


def _pattern(value: str) -> str:
    return str(Pattern(value))


Count = Annotated[int, Between(0)]
Positive = Annotated[int, Between(1)]
Amount = Annotated[float, Between(0.0)]
Share = Annotated[float, Between(0.0, 1.0)]
Revision = Annotated[str, check_revision]
PatternText = Annotated[str, _pattern]
RelativePath = Annotated[str, _relative_path]  # stays below where it starts, on any system
