"""Finds or compiles the library, opens it, and chooses its unit.

A wheel holds the library; elsewhere it is compiled when it is first needed and kept in the cache folder, under a
digest of what it was made from, beside a digest of itself. No file is opened that another user could have written.
Where none can be kept, the library is compiled for one process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

from ..cache import cache_folder, write_whole
from .build import LIBRARY, compile_library, source_digest

logger = logging.get_logger(__name__)

VERSION = 6  # of ksparse.c, that the Python side was written for
UNIT_VARIABLE = "KSPARSE_CPU"


def load_library() -> ctypes.CDLL:
    """The library, from the wheel, from the cache, or compiled.

    Raises:
        OSError: there is none, and none can be compiled; says why.
    """
    if os.name != "posix":
        raise OSError(f"native code is for Linux and macOS, this is {sys.platform}")
    library = _open(Path(__file__).parent / LIBRARY) or _open_kept(_kept_path())
    if library is not None:
        return library
    with tempfile.TemporaryDirectory(prefix="ksparse-") as folder:
        compiled, kept = Path(folder, LIBRARY), _kept_path()
        compile_library(compiled)
        try:
            _keep(compiled, kept)
        except OSError as error:
            logger.info(f"The native library was compiled for this process alone, for it cannot be kept: {error}")
        library = _open_kept(kept) or _open(compiled)
    if library is None:
        raise OSError("the compiled library cannot be loaded: is the compiler one for another machine?")
    return library


def choose_unit(library: ctypes.CDLL) -> tuple[int, str]:
    """Number and name of the unit to take: the one that the environment variable `KSPARSE_CPU` names, or the fastest
    that this CPU runs and that agrees with plain C on a small product.

    Raises:
        ValueError: the unit that was named cannot run; says why.
    """
    forced = os.environ.get(UNIT_VARIABLE)
    units = _units(library)
    if forced:
        if forced not in units:
            raise ValueError(f"{UNIT_VARIABLE}={forced!r} is no unit of this library; allowed: {', '.join(units)}")
        number, runs = units[forced]
        if not runs:
            raise ValueError(f"{UNIT_VARIABLE}={forced!r} needs instructions that this CPU does not have")
        if not library.ksparse_check(number):
            raise ValueError(f"{UNIT_VARIABLE}={forced!r} computes other results than plain C on this machine")
        return number, forced
    for name, (number, runs) in units.items():
        if runs and library.ksparse_check(number):
            return number, name
        if runs:
            logger.warning(f"The native code for {name} computes other results than plain C and is not used here.")
    raise OSError("no unit of the native library agrees with plain C")


def _units(library: ctypes.CDLL) -> dict[str, tuple[int, bool]]:
    """The units of a library by name, the fastest first: number, and whether this CPU runs it."""
    units: dict[str, tuple[int, bool]] = {}
    runs = ctypes.c_int32()
    library.ksparse_unit.restype = ctypes.c_char_p
    while name := library.ksparse_unit(len(units), ctypes.byref(runs)):
        units[name.decode()] = len(units), bool(runs.value)
    return units


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at `path`; None where there is none, one that cannot be loaded, or one of another version."""
    try:
        library = ctypes.CDLL(str(path))
        return library if library.ksparse_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def _kept_path() -> Path:
    return cache_folder() / f"native-{os.geteuid()}" / f"{source_digest()}-{LIBRARY}"


def _open_kept(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, where nobody else can have written it and it is whole."""
    try:
        _check_private(path.parent)
        _check_private(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() == _digest_path(path).read_text(encoding="ascii"):
            return _open(path)
    except (OSError, ValueError):
        pass
    return None


def _keep(compiled: Path, path: Path) -> None:
    """Copies a library to `path`, and its digest beside it. Other processes may do so at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(path.parent)
    content = compiled.read_bytes()
    write_whole(path, content)
    write_whole(_digest_path(path), hashlib.sha256(content).hexdigest().encode())


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _check_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others may write to it")
