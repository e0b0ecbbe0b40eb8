"""Files written whole or not at all: one text, or a checkpoint that takes the place of an earlier one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .report import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME, TUNING_NAME

_WEIGHT_FILE = re.compile(r"model(\.[^.-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^.]+)?\.json)?")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def staged(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder in `directory`, whose files take their places there when the block ends without an error;
    weight files that they replace are removed. On an error, Ctrl-C or a full disk, `directory` is as it was.

    Raises:
        OSError: `directory` is not a folder, or cannot be written to.
    """
    directory = Path(directory)
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory))
    replaced = Path(tempfile.mkdtemp(prefix=".replaced-", dir=directory))
    try:
        yield staging
        _swap(directory, staging, replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if created and not any(directory.iterdir()):
            directory.rmdir()


def _swap(directory: Path, new: Path, old: Path) -> None:
    """Moves the files of `new` into `directory`, and those of an earlier checkpoint that they replace into `old`;
    undoes it where it is interrupted."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        moved.append((source, target))  # before the move, so that an interrupt between the two is undone as well
        os.replace(source, target)

    try:
        for file in (*(file for file in files if (directory / file).exists()), *_outdated(directory, files)):
            move(directory / file, old / file)
        for file in files:
            move(new / file, directory / file)
    except BaseException:
        for source, target in reversed(moved):
            if target.exists() and not source.exists():
                os.replace(target, source)
        raise


def outdated_weights(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Weight files, and their indexes, of an earlier checkpoint of the same variant, which `new` ones replace."""
    new = set(new)
    variants = {match[1] or match[4] for name in new if (match := _WEIGHT_FILE.fullmatch(name))}
    found = []
    for name in there:
        match = _WEIGHT_FILE.fullmatch(name)
        if match is not None and name not in new and (match[1] or match[4]) in variants:
            found.append(name)
    return sorted(found)


def _outdated(directory: Path, files: list[Path]) -> list[Path]:
    """What an earlier checkpoint of the same variant leaves that would be read beside the new files: other weight
    files, and a report or results where the new checkpoint has none."""
    new = {file.name for file in files}
    there = {path.name for path in directory.iterdir()}
    outdated = outdated_weights(there, new)
    if any(_WEIGHT_FILE.fullmatch(name) for name in new):
        outdated += [
            name for name in (REPORT_NAME, RESULTS_NAME, MERGE_REPORT_NAME, TUNING_NAME) if name in there - new
        ]
    return [Path(name) for name in outdated]
