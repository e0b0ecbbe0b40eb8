"""What an unfinished run has left is used only where it is still what was written: every file that is read again is
compared with its checksum in the journal first."""

from __future__ import annotations

import os
from pathlib import Path

from ...checkpoint.files import sha256_of
from ...checkpoint.staging import remove
from .journal import FINAL, Journal


def is_whole(path: Path, sha256: str | None) -> bool:
    """Whether there is a file, and no link to one, with that checksum."""
    return sha256 is not None and path.is_file() and not path.is_symlink() and sha256_of(path) == sha256


def keep_what_is_whole(journal: Journal, folder: Path) -> list[str]:
    """Takes out of the journal of a run, and out of its folder, what is no longer what was written, and what follows
    from it: the run goes on from the last block that is whole.

    Returns:
        Names of the files that have to be made anew.
    """
    for entry in folder.iterdir():
        has_its_kind = entry.is_dir() if entry.name == FINAL else entry.is_file()
        if entry.is_symlink() or not has_its_kind:
            remove(entry)
    _remove_others(folder / FINAL, {name for name in journal.checksums if name.startswith(f"{FINAL}/")})
    damaged = [name for name, sha256 in journal.checksums.items() if not is_whole(folder / name, sha256)]
    for name in damaged:
        remove(folder / name)
        del journal.checksums[name]
    blocks = [is_whole(folder / block.file, block.sha256) for block in journal.blocks]
    files = [f"{FINAL}/{name}" for name in journal.weight_names()[1:]]
    finished = [name in journal.checksums for name in files]
    lost = [block.file for block, *there in zip(journal.blocks, blocks, finished, strict=True) if not any(there)]
    measured = [name for name in damaged if not name.startswith(f"{FINAL}/")]
    if lost or measured:
        # A block in its final form, if that is another one, cannot be gone on from.
        as_it_was = [
            whole or journal.checksums.get(name) == block.sha256
            for whole, name, block in zip(blocks, files, journal.blocks, strict=True)
        ]
        _go_back(journal, folder, 0 if measured else [*as_it_was, False].index(False))
        if measured:  # one measurement follows from another, and all blocks from them
            journal.checksums.clear()
        return [*measured, *lost]
    if journal.phase == "complete" and damaged:
        journal.phase = "finishing"
    # A block that was about to take its place is recorded there already.
    moving = {name for name, whole in zip(files, blocks, strict=True) if whole}
    return [name for name in damaged if name not in moving or journal.phase == "complete"]


def _remove_others(final: Path, names: set[str]) -> None:
    """Removes from the folder of finished files all whose names are not recorded, and links."""
    for parent, folders, files in os.walk(final, topdown=False):
        for path in (Path(parent, name) for name in (*folders, *files)):
            is_folder = path.is_dir() and not path.is_symlink()
            name = path.relative_to(final.parent).as_posix()
            if not (any(path.iterdir()) if is_folder else name in names):
                remove(path)


def _go_back(journal: Journal, folder: Path, number: int) -> None:
    """To the time when `number` blocks were done."""
    for block, name in zip(journal.blocks[:number], journal.weight_names()[1:], strict=False):
        if not (folder / block.file).exists():
            os.replace(folder / FINAL / name, folder / block.file)
    remove(folder / FINAL)
    for name in [name for name in journal.checksums if name.startswith(f"{FINAL}/")]:
        del journal.checksums[name]
    journal.blocks, journal.phase = journal.blocks[:number], "pruning"
    if journal.snapshot is not None and journal.snapshot.block > number:
        journal.snapshot = None
