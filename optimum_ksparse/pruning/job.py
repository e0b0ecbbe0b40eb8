"""One model on its way through the pipeline, and the place that it comes from and goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import Activations, BlockReplay, DecoderBlocks, ExpertStack
from ..checkpoint import put
from ..config import SparsityConfig
from ..data import CalibrationTokens
from ..pruners import METHODS
from ..pruners.allocation import Allocation
from ..report import PrunedBlock
from .distributed import Processes
from .loss import HELD_OUT
from .targets import Layer

T = TypeVar("T")

# Batches of a process that may be inside a block at a time, with `true_sequential`. Each has a thread, and with that,
# on a GPU, a workspace of cuBLAS.
SIDE_BY_SIDE = 16


@dataclass
class Replaced:
    """What pruning has replaced so far, to be put back on an error: the dense module, or parameter, of each pruned
    layer by its path in the decoder, and parameters that stay in the model, each with its value before."""

    layers: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    tuned: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def restore(self, decoder: nn.Module) -> None:
        """Gives the decoder its dense layers and its values back."""
        for path, dense in self.layers.items():
            put(decoder, path, dense)
        for parameter, value in self.tuned:
            parameter.data = value


@dataclass
class Place:
    """Where the dense model comes from and where the sparse one goes: here a loaded model, which is pruned in place.

    Attributes:
        model: whose blocks are replaced. blocks: of the model.
        processes: which share the work.
        tokenizer: gives the one for calibration text.
        done: blocks that an earlier run has pruned.
    """

    model: PreTrainedModel
    blocks: DecoderBlocks
    processes: Processes
    tokenizer: Callable[[], PreTrainedTokenizerBase | None]
    done: Sequence[PrunedBlock] = ()

    def resident(self, index: int) -> AbstractContextManager[None]:
        """Within it the weights of a block are there."""
        return nullcontext()

    def check_space(self, targets: list[dict[str, Layer]]) -> None:
        """Raises OSError where there is too little room for the result."""

    def tokens(self, draw: Callable[[], CalibrationTokens]) -> CalibrationTokens:
        """The calibration samples, the same ones in all processes."""
        return self.processes.once(draw)

    def activations(self, num_batches: int, name: str) -> Activations:
        """Where calibration activations are kept; under that name where they are in files."""
        return Activations(num_batches)

    def measured(self, name: str, kind: type[T], measure: Callable[[], T]) -> T:
        """What is measured before the first block is pruned, by a replay of that name."""
        return measure()

    def resume(self, replay: BlockReplay | None, original: BlockReplay | None, config: SparsityConfig) -> None:
        """Puts the blocks that are done into the model, and brings activations from the first block to the one after
        them: `replay` those of the pruned model, `original` those of the dense one."""

    def block_is_done(
        self, index: int, pruned: PrunedBlock, replay: BlockReplay | None, original: BlockReplay | None
    ) -> None:
        """Takes a pruned block, which is resident, and notes the activations, which are at the next one."""


@dataclass
class Job:
    """One model on its way through the stages.

    Attributes:
        place, config: from the caller; `seq_len` fits the model's context.
        replaced: is given what was there before, as soon as it is replaced; None where nothing is to be put back.
        targets: for each block its layers to prune, by name; emptied on the way.
        skipped: layers that stay dense → reason.
        data: calibration samples; None where none are read.
        allocation: what was measured and decided, where that was asked for.
        num_parameters: before anything is packed.
        pruned: what there is to report of each block.
        permute: reorders the channels of a block by its number, where that was asked for: `Permutation`.
        groups: what one tensor feeds in blocks of these layers; None where they cannot be pruned in one pass.
    """

    place: Place
    config: SparsityConfig
    replaced: Replaced | None = None
    targets: list[dict[str, Layer]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    data: CalibrationTokens | None = None
    allocation: Allocation | None = None
    num_parameters: int = 0
    pruned: list[PrunedBlock] = field(default_factory=list)
    permute: Callable[..., dict[str, list[str]]] | None = None
    groups: dict[tuple[str, ...], list[list[str]] | None] = field(default_factory=dict)

    @property
    def blocks(self) -> DecoderBlocks:
        return self.place.blocks

    @property
    def processes(self) -> Processes:
        return self.place.processes

    def config_of(self, path: str) -> SparsityConfig:
        """The settings of the layer at `path` in the decoder, which may have a pattern of its own."""
        pattern = None if self.allocation is None else self.allocation.patterns.get(path)
        return self.config if pattern is None else self.config.changed(pattern=pattern)

    @property
    def has_stacks(self) -> bool:
        """Whether experts that are fused into one parameter are to be pruned."""
        return any(isinstance(layer, ExpertStack) for layers in self.targets for layer in layers.values())

    @property
    def batch_size(self) -> int:
        """Samples in a batch: `config.batch_size`, or less where some batches are to be held out."""
        config = self.config
        if config.reconstruct is None:
            return config.batch_size
        return max(1, min(config.batch_size, config.num_samples // HELD_OUT))

    def _first_weight(self, positions: int) -> float:
        """How many positions the first one of a sample of so many counts as in the statistics."""
        assert self.data is not None
        if self.data.begins_with_bos and self.config.method_setting("bos_in_statistics") is False:
            return 0
        share = self.config.method_setting("first_position_share")
        share = METHODS[self.config.method].first_position_share if share is None else share
        return max(1, share / (1 - share) * (positions - 1))

    def replay(self, name: str = "activations") -> BlockReplay:
        """This process's calibration activations at the first block; under that name where they are in files.

        Raises:
            ValueError: there are more processes than samples.
        """
        assert self.data is not None
        config, place, ids = self.config, self.place, self.data.ids
        if len(ids) < self.processes.size:
            raise ValueError(
                f"{self.processes.size} processes share num_samples={len(ids)} calibration samples: start at most "
                f"{len(ids)} processes, or use more samples"
            )
        ids = ids[self.processes.share(len(ids))]
        batch_size = self.batch_size
        if config.true_sequential and config.reconstruct is None:
            batch_size = max(batch_size, -(-len(ids) // SIDE_BY_SIDE))
        return BlockReplay(
            place.blocks,
            ids,
            batch_size,
            self._first_weight(ids.shape[1]),
            place.resident,
            place.activations(-(-len(ids) // batch_size), name),
            None if config.calibration_dtype is None else getattr(torch, config.calibration_dtype),
        )
