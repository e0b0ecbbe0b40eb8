"""What an unfinished run has left is used only where it is still what was written: every file that is read again is
compared with its checksum in the journal first."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.files import sha256_of
from ...checkpoint.staging import remove
from .journal import FINAL, Journal


def is_whole(path: Path, sha256: str | None) -> bool:
    """Whether there is a file, and no link to one, with that checksum."""
    return sha256 is not None and path.is_file() and not path.is_symlink() and sha256_of(path) == sha256


def keep_what_is_whole(journal: Journal, folder: Path) -> list[str]:
    """Takes out of the journal of a run, and out of its folder, what is no longer what was written, and what follows
    from it: the run goes on from the last block before which all are whole.

    Returns:
        Names of the files that have to be made anew.
    """
    for entry in folder.iterdir():
        has_its_kind = entry.is_dir() if entry.name == FINAL else entry.is_file()
        if entry.is_symlink() or not has_its_kind:
            remove(entry)
    final = {name: sha256 for name, sha256 in journal.checksums.items() if name.startswith(f"{FINAL}/")}
    damaged: list[str] = []
    if journal.phase == "complete":
        there = [path for path in (folder / FINAL).rglob("*") if path.is_symlink() or not path.is_dir()]
        names = {*final, *(path.relative_to(folder).as_posix() for path in there)}
        damaged = [name for name in sorted(names) if not is_whole(folder / name, final.get(name))]
        if not damaged:
            return []
    # The files of the checkpoint are made of the blocks, all of them anew.
    journal.phase = "pruning"
    remove(folder / FINAL)
    journal.checksums = {name: sha256 for name, sha256 in journal.checksums.items() if name not in final}
    measured = [name for name, sha256 in journal.checksums.items() if not is_whole(folder / name, sha256)]
    blocks = [is_whole(folder / block.file, block.sha256) for block in journal.blocks]
    damaged += [*measured, *(block.file for block, whole in zip(journal.blocks, blocks, strict=True) if not whole)]
    if measured:  # one measurement follows from another, and all blocks from them
        journal.checksums.clear()
    journal.blocks = journal.blocks[: 0 if measured else [*blocks, False].index(False)]
    if journal.snapshot is not None and journal.snapshot.block > len(journal.blocks):
        journal.snapshot = None
    return damaged
