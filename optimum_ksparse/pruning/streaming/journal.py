"""The journal of a run: what it was asked to do, and which blocks are done. It is written anew after each block, whole
or not at all, so that a run that was killed at any moment goes on from the last one; every file that is read again is
compared with its checksum first."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ...checkpoint.files import sha256_of
from ...checkpoint.staging import remove, write_text
from ...config import LayerRecord
from ...records import Amount, As, Count, RelativePath, Version, build, printable, read_json, to_json
from ...report import BlockReport, LayerReport

_NAME = "journal.json"
_VERSION = 6
_REMEDY = "; start over with resume=False"
FINAL = "final"  # the folder of the finished checkpoint's files


def is_whole(path: Path, sha256: str | None) -> bool:
    """Whether there is a file, and no link to one, with that checksum."""
    return sha256 is not None and path.is_file() and not path.is_symlink() and sha256_of(path) == sha256


@dataclass
class FinishedBlock:
    """A pruned block.

    Attributes:
        file: its state, in the workspace.
        sha256: of that file.
        layers: its sparse layers, as in the model's config.
        digests: of the tensors of each of its modules, in the order of `block.modules()`.
        rows: of the report, one for each layer; reconstruction: and one of the block, where it was reconstructed.
    """

    file: RelativePath
    sha256: str
    layers: dict[str, Annotated[dict[str, Any], As(LayerRecord)]]
    digests: list[list[str]]
    rows: list[LayerReport]
    reconstruction: BlockReport | None = None


@dataclass
class Snapshot:
    """The calibration activations at the input of `block`, in files of all processes, each with its checksum;
    `originals`: and those of the dense model, where they are needed."""

    block: Count
    files: dict[RelativePath, str]
    originals: dict[RelativePath, str] = field(default_factory=dict)


@dataclass
class Journal:
    """What is known of a run.

    Attributes:
        job: source and settings; a run with others does not go on with this one.
        environment: versions, number of threads and of processes, which may change the last bits.
        blocks: the finished ones, in order.
        checksums: SHA-256 of all other files that a later run may read, by their paths in the workspace.
        snapshot: the latest activations that were saved.
        seconds: how long all processes that worked on it have taken, one after another.
        peak_memory_bytes: the most that a process which worked on it has used.
        phase: "pruning"; "complete": only the files of the checkpoint have still to be moved to their places.
    """

    job: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    blocks: list[FinishedBlock] = field(default_factory=list)
    checksums: dict[RelativePath, str] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    seconds: Amount = 0.0
    peak_memory_bytes: dict[str, Count] = field(default_factory=dict)
    phase: str = "pruning"
    version: Annotated[int, Version(_VERSION, _VERSION)] = _VERSION

    def save(self, folder: Path) -> None:
        """Writes the journal, with a checksum of its own."""
        data = json.loads(to_json(self))
        write_text(folder / _NAME, to_json({**data, "sha256": _checksum(data)}, indent=1))

    @staticmethod
    def is_in(folder: Path) -> bool:
        return os.path.lexists(folder / _NAME)

    @staticmethod
    def remove(folder: Path) -> None:
        remove(folder / _NAME)

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal in a folder; None where there is none. Raises ValueError where it is damaged or of another
        version."""
        path = folder / _NAME
        if not cls.is_in(folder):
            return None
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{path} is damaged: it is no file{_REMEDY}")
        try:
            data = read_json(path)
            checksum = data.pop("sha256", None) if isinstance(data, dict) else None
            journal: Journal = build(cls, data)
            if checksum != _checksum(data):
                raise ValueError("its checksum is another one")
        except ValueError as error:
            raise ValueError(printable(f"{path} is damaged: {error}{_REMEDY}")) from None
        return journal

    def keep_what_is_whole(self, folder: Path) -> list[str]:
        """Takes out of the journal, and out of the folder of the run, what is no longer what was written, and what
        follows from it: the run goes on from the last block before which all are whole.

        Returns:
            Names of the files that have to be made anew.
        """
        for entry in folder.iterdir():
            has_its_kind = entry.is_dir() if entry.name == FINAL else entry.is_file()
            if entry.is_symlink() or not has_its_kind:
                remove(entry)
        final = {name: sha256 for name, sha256 in self.checksums.items() if name.startswith(f"{FINAL}/")}
        damaged: list[str] = []
        if self.phase == "complete":
            there = [path for path in (folder / FINAL).rglob("*") if path.is_symlink() or not path.is_dir()]
            names = {*final, *(path.relative_to(folder).as_posix() for path in there)}
            damaged = [name for name in sorted(names) if not is_whole(folder / name, final.get(name))]
            if not damaged:
                return []
        # The files of the checkpoint are made of the blocks, all of them anew.
        self.phase = "pruning"
        remove(folder / FINAL)
        self.checksums = {name: sha256 for name, sha256 in self.checksums.items() if name not in final}
        measured = [name for name, sha256 in self.checksums.items() if not is_whole(folder / name, sha256)]
        blocks = [is_whole(folder / block.file, block.sha256) for block in self.blocks]
        damaged += [*measured, *(block.file for block, whole in zip(self.blocks, blocks, strict=True) if not whole)]
        if measured:  # one measurement follows from another, and all blocks from them
            self.checksums.clear()
        self.blocks = self.blocks[: 0 if measured else [*blocks, False].index(False)]
        if self.snapshot is not None and self.snapshot.block > len(self.blocks):
            self.snapshot = None
        return damaged

    def weight_names(self) -> list[str]:
        """Names of the finished checkpoint's weight files: one for everything else, then one for each block."""
        total = len(self.blocks) + 1
        return [f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
