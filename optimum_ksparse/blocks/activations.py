"""The calibration activations between two blocks: in memory, or, where they are too many, in files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A file begins with a line of JSON, filled up with spaces to this many bytes; then one batch after another.
_HEADER_BYTES = 4096


class Activations:
    """Hidden states [batch, seq_len, hidden], one tensor for each batch, of which those of a block's outputs take the
    place of its inputs.

    Args:
        num_batches: how many there will be.
        limit: bytes that may stay in memory; more go to files. None sets no limit.
        folder: for the files, and for `save`. Two are used in turns, so that what was saved last stays whole while the
            outputs of the next block are written.
        name: of the files, before "-0" and "-1" (and "-first", of the inputs of the first block, which goes).
    """

    def __init__(
        self,
        num_batches: int,
        limit: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        name: str = "activations",
    ) -> None:
        self.num_batches = num_batches
        self._limit, self._name = limit, name
        self._folder = None if folder is None else Path(folder)
        self._memory: list[torch.Tensor] = []
        self._file: _BatchFile | None = None
        self._turn = 0
        self._device = torch.device("cpu")

    def sibling(self, name: str, num_batches: int) -> Activations:
        """Empty ones, which go where these go, under a name of their own."""
        return Activations(num_batches, self._limit, self._folder, f"{self._name}-{name}")

    def __len__(self) -> int:
        return len(self._memory if self._file is None else self._file)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._file is None:
            return self._memory[index]
        return self._file.read(index).to(self.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def device(self) -> torch.device:
        """Where the batches are when they are used."""
        return self._memory[0].device if self._memory else self._device

    @property
    def in_files(self) -> bool:
        return self._file is not None

    def has_room(self, num_bytes: float) -> bool:
        """Whether as many bytes may be in memory at a time."""
        return self._file is None and (self._limit is None or num_bytes <= self._limit)

    def append(self, hidden: torch.Tensor) -> None:
        """Adds the next batch. With the first one it is decided where all of them go."""
        if not len(self):
            self._device = hidden.device
            if self._limit is not None and self._folder is not None and hidden.nbytes * self.num_batches > self._limit:
                # Another name than the two that take turns: one of these may be what `load` will be asked for.
                self._file = _BatchFile(self._first_path())
        if self._file is None:
            self._memory.append(hidden)
        else:
            self._file.append(hidden)

    def replace(self, outputs: Iterable[torch.Tensor]) -> None:
        """Puts each of `outputs`, which are computed from the batches in their order, in the place of its batch."""
        if self._file is None:
            for index, output in enumerate(outputs):
                self._memory[index] = output
            return
        new = _BatchFile(self._next_path())
        for output in outputs:
            new.append(output)
        self._file = new
        self._first_path().unlink(missing_ok=True)

    def save(self, block: int) -> str:
        """Makes sure that the batches, which are the inputs of that block, are in a file that survives this process.

        Returns:
            Its name in the folder. It stays whole until the second `save` or `replace` after this one.
        """
        if self._file is not None:
            self._file.flush(block)
            return self._file.path.name
        saved = _BatchFile(self._next_path())
        for hidden in self._memory:
            saved.append(hidden)
        saved.flush(block)
        return saved.path.name

    def can_load(self, name: str, block: int) -> bool:
        """Whether the file that `save` of an earlier process named is there, whole, for that block, and of as many
        batches."""
        assert self._folder is not None
        file = _BatchFile.open(self._folder / name)
        return file is not None and file.block == block and len(file) == self.num_batches

    def load(self, name: str) -> None:
        """Takes the batches from such a file."""
        assert self._folder is not None
        file = _BatchFile.open(self._folder / name)
        assert file is not None
        self._turn = int(name[-1])  # the other file comes next
        if self._file is not None:
            self._file = file
            self._first_path().unlink(missing_ok=True)
        else:
            for index, batch in enumerate(file):
                self._memory[index] = torch.empty_like(batch).copy_(batch).to(self.device)

    def _first_path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-first"

    def _next_path(self) -> Path:
        assert self._folder is not None
        self._turn = 1 - self._turn
        return self._folder / f"{self._name}-{self._turn}"


class _BatchFile:
    """Batches of one dtype in a file. A batch is mapped into memory when it is read, and for as long as its tensor
    lives."""

    def __init__(self, path: Path) -> None:
        self.path, self.block = path, -1
        self._dtype = torch.float32
        self._shapes: list[list[int]] = []
        path.unlink(missing_ok=True)  # a batch of an earlier file of this name may still be mapped
        path.write_bytes(b" " * _HEADER_BYTES)

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.read(index) for index in range(len(self)))

    def append(self, hidden: torch.Tensor) -> None:
        self._dtype = hidden.dtype
        self._shapes.append(list(hidden.shape))
        with open(self.path, "ab") as file:
            file.write(_as_bytes(hidden.detach().cpu().contiguous()))

    def read(self, index: int) -> torch.Tensor:
        size = self._dtype.itemsize
        offset = _HEADER_BYTES + sum(map(math.prod, self._shapes[:index])) * size
        count = math.prod(self._shapes[index]) * size
        # Copied on writing: a block may write into its input, and the file must stay as it is.
        mapped = np.memmap(self.path, np.uint8, "c", offset, count)
        return torch.from_numpy(mapped).view(self._dtype).view(self._shapes[index])

    def flush(self, block: int) -> None:
        """Writes the header, without which a file is unfinished, when everything else is on the disk."""
        dtype = str(self._dtype).removeprefix("torch.")
        header = json.dumps({"block": block, "dtype": dtype, "shapes": _runs(self._shapes)})
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
            file.write(header.encode().ljust(_HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def open(cls, path: Path) -> _BatchFile | None:
        try:
            with open(path, "rb") as stream:
                header = json.loads(stream.read(_HEADER_BYTES))
            file = object.__new__(cls)
            file.path, file.block = path, header["block"]
            file._dtype = getattr(torch, header["dtype"])
            file._shapes = [shape for shape, count in header["shapes"] for _ in range(count)]
            size = _HEADER_BYTES + sum(map(math.prod, file._shapes)) * file._dtype.itemsize
            return file if path.stat().st_size == size else None
        except (OSError, ValueError, KeyError):
            return None


def _as_bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _runs(shapes: list[list[int]]) -> list[tuple[list[int], int]]:
    """Equal shapes counted: all batches but the last are alike."""
    runs: list[tuple[list[int], int]] = []
    for shape in shapes:
        if runs and runs[-1][0] == shape:
            runs[-1] = shape, runs[-1][1] + 1
        else:
            runs.append((shape, 1))
    return runs
