"""Single files on the disk: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_OS_ERROR = re.compile(r"os error (\d+)")  # how safetensors words one of the system's


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; it is on the disk when this returns."""

    def write(unfinished: Path) -> None:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    _write_whole(path, write)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all; it is on the disk when this returns.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with system_errors(path):
        _write_whole(path, lambda unfinished: save_file(tensors, unfinished, {"format": "pt", **(metadata or {})}))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    _remove_leftovers(path)
    # A name of this thread's own: another writer of the same file neither takes it away nor writes into it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    try:
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes of this machine left of the same file."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-\d+\.unfinished")
    for entry in path.parent.iterdir():
        if (match := pattern.fullmatch(entry.name)) and not _is_running(int(match[1])):
            entry.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Within it, a full disk, or another error of the system, is an OSError that names `path`, not safetensors'
    own."""
    try:
        yield
    except SafetensorError as error:
        if (match := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def remove(path: Path) -> None:
    """Removes whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder is on the disk with all that is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with suppress(FileNotFoundError):  # a link that leads nowhere
                sync(Path(parent, name))
        sync(Path(parent))
