"""Where the package may write: the one rule of all commands and functions that have an output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

# What a folder may hold beforehand: a repository's own files, and hidden ones.
_HARMLESS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_HUB_CACHE = re.compile(r"(models|datasets|spaces)--.+")


def check_output(
    output: str | os.PathLike[str],
    *,
    reads: Iterable[object] = (),
    ours: Iterable[str] = (),
    overwrite: bool | None = False,
) -> None:
    """Raises an error where nothing may be written into the folder `output`; called before any work.

    It may be a new or an empty folder (but for a README, a licence and hidden files), or one with what an earlier run
    of the same kind left there. With `overwrite` it may be any folder but the Hub's cache: files of the same names are
    replaced, and what would be read beside the new ones goes (`outdated`); what else is there stays.

    Args:
        reads: what the caller reads from there on: folders and files are looked at, names on the Hub passed over.
        ours: names of files by which an earlier run of the same kind is known.
        overwrite: None where the caller has no such setting.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: it is, holds, or lies in one of `reads`; or it is in the Hub's cache.
        FileExistsError: it holds something else, such as another model.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output={os.fspath(output)!r} is a file; pass a folder")
    if any(_HUB_CACHE.fullmatch(part) for part in path.resolve().parts):
        raise ValueError(f"output={os.fspath(output)!r} is in the Hub's cache; pass a folder of your own")
    if overwrite:
        return
    check_apart(output, reads)
    if not path.exists() or any(os.path.lexists(path / name) for name in ours):
        return
    other = sorted(entry.name for entry in path.iterdir() if entry.name not in _HARMLESS and entry.name[0] != ".")
    if other:
        raise FileExistsError(
            f"output={os.fspath(output)!r} holds something else ({', '.join(other[:3])}"
            f"{', …' if len(other) > 3 else ''}); pass an empty folder, or one that does not exist yet"
            + ("" if overwrite is None else "; or set overwrite (--overwrite) to write over it")
        )


def check_apart(output: str | os.PathLike[str], reads: Iterable[object]) -> None:
    """Raises ValueError where the folder `output` is, holds, or lies in something that is read meanwhile."""
    target = Path(output).resolve()
    for source in reads:
        if not isinstance(source, str | os.PathLike) or not os.path.exists(source):
            continue
        path = Path(source).resolve()
        folder = path if path.is_dir() else path.parent
        if target == folder or (target.exists() and os.path.samefile(target, folder)):
            relation = "is" if path.is_dir() else "holds"
        elif path.is_relative_to(target):
            relation = "holds"
        elif path.is_dir() and target.is_relative_to(folder):
            relation = "lies in"
        else:
            continue
        raise ValueError(
            f"output={os.fspath(output)!r} {relation} the source {os.fspath(source)!r}; pass another folder"
        )
