"""What runs once, before the first sparse module is made: libraries that must know of these modules, but whose import
costs time and memory, are told of them here, by rooms that come below this one."""

from __future__ import annotations

from collections.abc import Callable

# Emptied when the first sparse module is made, unpickled or copied.
before_first: list[Callable[[], None]] = []


def run_before_first() -> None:
    """Calls what waits for the first sparse module; afterwards there is nothing to call."""
    while before_first:
        before_first.pop(0)()
