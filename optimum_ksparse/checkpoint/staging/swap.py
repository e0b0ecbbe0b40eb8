"""The files of a checkpoint take the places of an earlier one's: all of them or none, whatever happens meanwhile.

| path in the folder | what it is |
|---|---|
| `.ksparse-saving/` | the new files, while they are written |
| `.ksparse-saving.json` | the record of a save whose files are complete: where they lie, their names, what goes |
| `.ksparse-saving.lock` | the lock of the process that saves |

Until the record is there, which takes one rename, the earlier checkpoint has not been touched. From then on the new
one counts: its files are moved to their places, the earlier one's go, and at last the record. All of that may be done
twice; so what a killed process left is finished (or, without a record, removed) by whoever saves into the folder, or
loads from it (`recover`), next. Files and folders are synced before the record is, and before what they replace goes,
so that the same holds for a power failure.

A reader without this package sees files of both between the first of the moves and the last: some renames long, unless
the process is killed just then.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.utils import CONFIG_NAME, logging

from .disk import sync, sync_tree, system_errors, write_text
from .lock import locked
from .outputs import outdated

logger = logging.get_logger(__name__)

_STAGING, _RECORD, _LOCK = ".ksparse-saving", ".ksparse-saving.json", ".ksparse-saving.lock"


@dataclass
class _Swap:
    """What the record says: paths in the folder, `files` from `staging`, and `gone`, names of files that go."""

    staging: str
    files: list[str]
    gone: list[str]


@contextmanager
def staged(directory: str | os.PathLike[str], gone: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder in `directory`, whose files take their places there when the block ends without an error;
    what they make outdated is removed. On an error, Ctrl-C or a full disk, `directory` is as it was. Waits for
    another process that saves there.

    Args:
        gone: names of files that go as well, unless they are among the new ones.

    Raises:
        OSError: `directory` is not a folder, or cannot be written to, or the disk is full.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; name a folder")
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / _LOCK), system_errors(directory):
            _put_right(directory)
            staging = directory / _STAGING
            try:
                staging.mkdir()
                yield staging
                for path in created:
                    sync(path.parent)
                _commit(directory, staging, gone)
            finally:
                if not os.path.lexists(directory / _RECORD):  # else it is the next one's to finish
                    shutil.rmtree(staging, ignore_errors=True)
    finally:
        if created:
            with suppress(OSError):  # where there is something in it
                directory.rmdir()


def publish(directory: Path, staging: Path) -> None:
    """The files of `staging`, a folder anywhere in a hidden folder of `directory`, take their places in `directory`,
    and the hidden folder is removed."""
    with locked(directory / _LOCK):
        _put_right(directory)
        _commit(directory, staging, ())


def recover(directory: str | os.PathLike[str]) -> None:
    """Puts right what a save into `directory` that was cut off has left, and says so: for whoever reads there.

    Raises:
        OSError: its files are at their places in part, and nothing can be written there.
        ValueError: its record is damaged.
    """
    directory = Path(directory)
    if not any(os.path.lexists(directory / name) for name in (_STAGING, _RECORD, _LOCK)):
        return
    is_mixed = os.path.lexists(directory / _RECORD)
    try:
        # Without a record the earlier files are whole, and a save that is going on need not be waited for.
        with locked(directory / _LOCK, None if is_mixed else "another process is saving"):
            _put_right(directory)
    except OSError as error:
        if is_mixed:
            raise OSError(
                error.errno or errno.EIO,
                f"a save into {directory} was cut off while its files took their places, and cannot be finished here "
                f"({error.strerror or error}): make the folder writable, or copy it, hidden files included, and load "
                "it again",
            ) from error


def _put_right(directory: Path) -> None:
    """`recover`, for a caller that holds the lock."""
    swap = _read_record(directory)
    if swap is not None:
        _carry_out(directory, swap)
        logger.warning(f"A save into {directory} was cut off at its end; it is finished now, the newer files count.")
    elif os.path.lexists(directory / _STAGING):
        shutil.rmtree(directory / _STAGING)
        logger.warning(
            f"A save into {directory} was cut off, and what it left has been removed: the files are those from before."
        )


def _commit(directory: Path, staging: Path, gone: Iterable[str]) -> None:
    """Makes the record, and does what it says."""
    for path in staging.glob(f"*{_RECORD}*"):
        path.unlink()  # of one who was killed before it counted
    files = [
        path.relative_to(staging) for path in sorted(staging.rglob("*")) if not path.is_dir() or path.is_symlink()
    ]
    if not files:
        return
    files.sort(key=lambda file: file == Path(CONFIG_NAME))  # a new folder is no model before all is there
    names = {file.as_posix() for file in files}
    there = (path.name for path in directory.iterdir())
    going = [name for name in dict.fromkeys([*outdated(there, names), *gone]) if name not in names]
    swap = _Swap(staging.relative_to(directory).as_posix(), [file.as_posix() for file in files], going)
    _check(directory, swap)
    sync_tree(staging)
    write_text(staging / _RECORD, json.dumps(asdict(swap), indent=1) + "\n")
    sync(directory)
    os.replace(staging / _RECORD, directory / _RECORD)
    try:
        sync(directory)
        _carry_out(directory, swap)
    except BaseException:
        with suppress(OSError):
            _carry_out(directory, swap)  # once more; where that fails too, the next one who reads there does it
        raise


def _carry_out(directory: Path, swap: _Swap) -> None:
    staging = directory / swap.staging
    for name in swap.files:
        if os.path.lexists(staging / name):  # otherwise it has been moved before
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, directory / name)
    for name in swap.gone:
        (directory / name).unlink(missing_ok=True)
    for folder in {(directory / name).parent for name in swap.files}:
        sync(folder)
    sync(directory)
    hidden = directory / Path(swap.staging).parts[0]
    if hidden.exists():
        shutil.rmtree(hidden)
    (directory / _RECORD).unlink(missing_ok=True)
    sync(directory)


def _read_record(directory: Path) -> _Swap | None:
    """The record in a folder; None where there is none. It may have been downloaded with the folder: it must not move
    anything out of the folder, or into it."""
    path = directory / _RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        swap = _Swap(**data)
        lists = isinstance(swap.files, list) and isinstance(swap.gone, list)
        if not lists or not all(isinstance(name, str) for name in (swap.staging, *swap.files, *swap.gone)):
            raise ValueError("it holds other things than names")
        _check(directory, swap)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError, RecursionError, FileExistsError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): what is whole in the folder cannot be told; remove that file to load what "
            "is there, or save anew"
        ) from None
    return swap


def _check(directory: Path, swap: _Swap) -> None:
    """Raises ValueError for a path that leaves the folder, and FileExistsError where a file cannot take its place."""
    root = directory.resolve()
    staging = Path(swap.staging)
    if not staging.parts or not staging.parts[0].startswith(".ksparse-") or ".." in staging.parts:
        raise ValueError(f"{swap.staging!r} is no folder of a save")
    for name in (*swap.files, *swap.gone):
        path = Path(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is no name in the folder")
        for parent in ((directory / path).parent, (directory / staging / path).parent):
            if not parent.resolve().is_relative_to(root):
                raise ValueError(f"{parent} leads out of the folder")
        if (directory / path).is_dir() and not (directory / path).is_symlink():
            raise FileExistsError(f"{directory / path} is a folder, where a file has to be: move it away")
