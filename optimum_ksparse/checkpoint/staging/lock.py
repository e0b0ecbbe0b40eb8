"""A lock between processes that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)

# (file, thread) of the locks that this process holds: a signal handler that saves would wait for its own thread.
_held: set[tuple[str, int]] = set()
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds the lock whose file is `path`, which is there only as long (or until the next one, after a kill).

    Args:
        busy: what to say where another process holds it; None waits for it.

    Raises:
        BlockingIOError: another process, or thread, holds it.
        OSError: the file cannot be made.
    """
    mine = os.path.abspath(path), threading.get_ident()
    if mine in _held:
        raise BlockingIOError(f"this thread is writing into {path.parent} already")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if busy is not None:
            raise BlockingIOError(busy) from None
        logger.warning(f"Waiting for another process, which is writing into {path.parent}.")
        lock.acquire()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            f"{path.parent} lies on a file system without locks ({error.strerror}): see to it that one process at a "
            "time writes there."
        )
    _held.add(mine)
    try:
        yield
    finally:
        _held.discard(mine)
        try:
            with suppress(OSError):
                path.unlink(missing_ok=True)  # before it is let go, so that it is nobody else's
        finally:
            lock.release()


@contextmanager
def claimed(folder: Path, name: str, busy: str) -> Iterator[None]:
    """Makes a folder, which goes again if nothing comes into it, and holds the lock `name` in it, where this thread
    does not hold it already.

    Raises:
        BlockingIOError: another process, or thread, holds it: says `busy`.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    held = (os.path.abspath(folder / name), threading.get_ident()) in _held
    try:
        with nullcontext() if held else locked(folder / name, busy):
            yield
    finally:
        if created:
            with suppress(OSError):  # where there is something in it
                folder.rmdir()
