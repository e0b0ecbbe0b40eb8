"""What a method has to say of a layer besides its result: a line in the report, or a warning where nobody collects
them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Says `text` to whoever collects notes; a UserWarning where nobody does."""
    notes = _notes.get()
    if notes is None:
        warnings.warn(text, stacklevel=3)
    elif text not in notes:
        notes.append(text)


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Within it the notes of this thread go into a list, each once. Warnings, those of other libraries among them, go
    their own way."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
