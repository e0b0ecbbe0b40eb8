"""The calibration activations between two blocks: in memory, or, where they are too many, in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Activations:
    """Hidden states [batch, seq_len, hidden], one tensor for each batch, of which those of a block's outputs take the
    place of its inputs.

    Args:
        num_batches: how many there will be.
        limit: bytes that may stay in memory; more go to files. None sets no limit.
        folder: for the files, and for `save`: one for each batch and block, whose inputs it holds. What was written
            last stays whole while the outputs of the next block are written, and goes after that.
        name: what the names of the files begin with.
        block: whose inputs they are; each `replace` counts it up.
    """

    def __init__(
        self,
        num_batches: int,
        limit: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        name: str = "activations",
        block: int = 0,
    ) -> None:
        self.num_batches, self.block, self.in_files = num_batches, block, False
        self._limit, self._name = limit, name
        self._folder = None if folder is None else Path(folder)
        self._memory: list[torch.Tensor] = []
        self._length = 0
        self._written: int | None = None  # the last block whose inputs were written, or read
        self._device = torch.device("cpu")

    def sibling(self, name: str, num_batches: int) -> Activations:
        """Empty ones, which go where these go, under a name of their own."""
        return Activations(num_batches, self._limit, self._folder, f"{self._name}-{name}", self.block)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.in_files:
            return self._memory[index]
        return _read(self._path(self.block, index)).to(self._device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def device(self) -> torch.device:
        """Where the batches are when they are used."""
        return self._memory[0].device if self._memory else self._device

    def has_room(self, num_bytes: float) -> bool:
        """Whether as many bytes may be in memory at a time."""
        return not self.in_files and (self._limit is None or num_bytes <= self._limit)

    def append(self, hidden: torch.Tensor) -> None:
        """Adds the next batch. With the first one it is decided where all of them go."""
        if not self._length:
            self._device = hidden.device
            too_many = self._limit is not None and hidden.nbytes * self.num_batches > self._limit
            self.in_files = too_many and self._folder is not None
        self._length += 1
        if self.in_files:
            self._write(self.block, [hidden], self._length - 1)
        else:
            self._memory.append(hidden)

    def replace(self, outputs: Iterable[torch.Tensor]) -> None:
        """Puts each of `outputs`, which are computed from the batches in their order, in the place of its batch."""
        if self.in_files:
            self._write(self.block + 1, outputs)
        else:
            for index, output in enumerate(outputs):
                self._memory[index] = output
        self.block += 1

    def save(self) -> list[Path]:
        """Makes sure that the batches are in files that survive this process, until the second `save` or `replace`
        after this one."""
        if not self.in_files:
            self._write(self.block, self._memory)
        for path in self.paths(self.block):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return self.paths(self.block)

    def load(self, block: int) -> None:
        """Takes the batches from the files that `save` of an earlier process has written as the inputs of `block`."""
        self.block = self._written = block
        if not self.in_files:
            self._memory = [_read(path).to(self.device, copy=True) for path in self.paths(block)]

    def paths(self, block: int) -> list[Path]:
        """The files that hold the inputs of `block`, or will."""
        return [self._path(block, index) for index in range(self.num_batches)]

    def _path(self, block: int, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{block:05d}-{index:05d}.safetensors"

    def _write(self, block: int, batches: Iterable[torch.Tensor], start: int = 0) -> None:
        if self._written is not None and self._written != block:
            kept = {*self.paths(block), *self.paths(self._written)}
            for path in self._path(0, 0).parent.glob(f"{self._name}-[0-9]*-[0-9]*.safetensors"):
                if path not in kept:
                    path.unlink()
        self._written = block
        for index, batch in enumerate(batches, start):
            path = self._path(block, index)
            path.unlink(missing_ok=True)  # a batch of an earlier file of this name may still be mapped
            save_file({"hidden": batch.detach().cpu().contiguous()}, path)


def _read(path: Path) -> torch.Tensor:
    """A batch, mapped for as long as its tensor lives; copied on writing: a block may write into its input."""
    return load_file(path)["hidden"]
