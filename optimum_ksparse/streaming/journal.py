"""The journal of a run: what it was asked to do, and which blocks are done. It is written anew after each block, whole
or not at all, so that a run that was killed at any moment goes on from the last one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..config import LayerRecord
from ..records import Amount, As, Count, RelativePath, Version, read_record, to_json
from ..report import BlockReport, LayerReport
from ..staging import write_text

_NAME = "journal.json"
_VERSION = 2


@dataclass
class FinishedBlock:
    """A pruned block.

    Attributes:
        file: its state, in the workspace.
        sha256: of that file.
        layers: its sparse layers, as in the model's config.
        rows: of the report, one for each layer; reconstruction: and one of the block, where it was reconstructed.
    """

    file: RelativePath
    sha256: str
    layers: dict[str, Annotated[dict[str, Any], As(LayerRecord)]]
    rows: list[LayerReport]
    reconstruction: BlockReport | None = None


@dataclass
class Snapshot:
    """The calibration activations at the input of `block`, in one file for each process; `originals`: and those of the
    dense model, where they are needed."""

    block: Count
    files: list[RelativePath]
    originals: list[RelativePath] = field(default_factory=list)


@dataclass
class Journal:
    """What is known of a run.

    Attributes:
        job: source and settings; a run with others does not go on with this one.
        blocks: the finished ones, in order.
        snapshot: the latest activations that were saved.
        seconds: how long all processes that worked on it have taken, one after another.
        peak_memory_bytes: the most that a process which worked on it has used.
        phase: "pruning"; "finishing": all blocks are done, and files of the checkpoint are being made of them;
            "complete": only the files have still to be moved to their places.
    """

    job: dict[str, Any]
    blocks: list[FinishedBlock] = field(default_factory=list)
    snapshot: Snapshot | None = None
    seconds: Amount = 0.0
    peak_memory_bytes: dict[str, Count] = field(default_factory=dict)
    phase: str = "pruning"
    version: Annotated[int, Version(_VERSION, _VERSION)] = _VERSION

    def save(self, folder: Path) -> None:
        write_text(folder / _NAME, to_json(self, indent=1))

    @staticmethod
    def is_in(folder: Path) -> bool:
        return (folder / _NAME).exists()

    @staticmethod
    def remove(folder: Path) -> None:
        (folder / _NAME).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """None where there is none. Raises ValueError where it is damaged or of another version."""
        try:
            return read_record(cls, folder / _NAME, "is damaged", "; start over with resume=False")
        except FileNotFoundError:
            return None

    def differences(self, job: dict[str, Any]) -> list[str]:
        """Where `job` is not the one of this journal, in words."""
        now, then = _flat(json.loads(json.dumps(job))), _flat(self.job)
        return [
            f"{name}: was {then.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*now, *then})
            if now.get(name) != then.get(name)
        ]

    def keep_whole_blocks(self, folder: Path) -> None:
        """Forgets the first block whose file is missing or damaged, and all after it. Only while the run is pruning:
        later on the files go to their places one by one."""
        if self.phase != "pruning":
            return
        for number, block in enumerate(self.blocks):
            path = folder / block.file
            if not path.is_file() or sha256_of(path) != block.sha256:
                del self.blocks[number:]
                break
        if self.snapshot is not None and self.snapshot.block > len(self.blocks):
            self.snapshot = None


def _flat(job: dict[str, Any]) -> dict[str, Any]:
    """Settings one level down: `settings.pattern`."""
    flat: dict[str, Any] = {}
    for name, value in job.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
