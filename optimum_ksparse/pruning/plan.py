"""The pipeline, the only one: from a dense model and settings to a sparse model, wherever the model is.

`STAGES` names what happens, in its order. A stage reads and fills a `Job`; what differs between a
model in memory and a checkpoint on disk is up to the `Place`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import Activations, BlockReplay, DecoderBlocks, ExpertStack, eager_experts, evaluation_mode
from ..checkpoint import sparse_modules
from ..config import AUTO, SparsityConfig
from ..data import CalibrationTokens
from ..pruners.allocation import Allocation
from ..report import MethodChoice, PrunedBlock
from .block import Replaced
from .choosing import choose_method
from .distributed import Processes
from .loop import needs_original, prune_blocks
from .reconstruction import HELD_OUT
from .sensitivity import leave_dense, measure_allocation
from .targets import Layer, find_targets
from .tokens import draw_tokens

T = TypeVar("T")


class Place:
    """Where the dense model comes from and where the sparse one goes: here a loaded model, which is pruned in place.

    Attributes:
        model: whose blocks are replaced.
        blocks: of the model.
        processes: which share the work.
        replaced: is given what was there before, to be put back on an error; None where nothing has to be.
        done: blocks that an earlier run has pruned.
    """

    done: Sequence[PrunedBlock] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: DecoderBlocks,
        processes: Processes,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        restore_on_error: bool,
    ) -> None:
        self.model, self.blocks, self.processes, self.tokenizer = model, blocks, processes, tokenizer
        self.replaced = Replaced() if restore_on_error else None

    def undo(self, error: BaseException) -> None:
        """Gives the model its dense layers back, where they were kept; otherwise the error says what is left."""
        if self.replaced is not None:
            self.replaced.restore(self.blocks.decoder)
        elif sparse_modules(self.blocks.decoder):
            error.add_note(
                "The model is pruned in part and cannot be used or saved: load it again. With restore_on_error=True "
                "sparsify keeps its dense layers in memory and puts them back."
            )

    def resident(self, index: int) -> AbstractContextManager[None]:
        """Within it the weights of a block are there."""
        return nullcontext()

    def check_space(self, targets: list[dict[str, Layer]]) -> None:
        """Raises OSError where there is too little room for the result."""

    def tokens(self, draw: Callable[[], CalibrationTokens]) -> CalibrationTokens:
        """The calibration samples, the same ones in all processes."""
        return self.processes.once(draw)

    def activations(self, num_batches: int, folder: Path | None) -> Activations:
        """Where calibration activations are kept, in `folder` or the place's own where they are too many."""
        return Activations(num_batches)

    def measured(self, name: str, kind: type[T], measure: Callable[[Path | None], T]) -> T:
        """What is measured before the first block is pruned, given a folder for activations."""
        return measure(None)

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
        targets: for each block its layers to prune, by name.
        skipped: layers that stay dense → reason.
        data: calibration samples; None where none are read.
        allocation, choice: what was measured and decided, where that was asked for.
        num_parameters: before anything is packed.
        pruned: what there is to report of each block.
    """

    place: Place
    config: SparsityConfig
    targets: list[dict[str, Layer]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    data: CalibrationTokens | None = None
    allocation: Allocation | None = None
    choice: MethodChoice | None = None
    num_parameters: int = 0
    pruned: list[PrunedBlock] = field(default_factory=list)

    @property
    def patterns(self) -> dict[str, str]:
        """Of the layers that have their own, by path."""
        patterns = {} if self.allocation is None else self.allocation.patterns
        return {path: pattern for path, pattern in patterns.items() if pattern is not None}

    @property
    def batch_size(self) -> int:
        """Samples in a batch: `config.batch_size`, or less where some batches are to be held out."""
        config = self.config
        if config.reconstruct is None and config.method != AUTO:
            return config.batch_size
        return max(1, min(config.batch_size, config.num_samples // HELD_OUT))

    @property
    def has_stacks(self) -> bool:
        """Whether experts that are fused into one parameter are to be pruned."""
        return any(isinstance(layer, ExpertStack) for layers in self.targets for layer in layers.values())

    def replay(self, folder: Path | None = None) -> BlockReplay:
        """This process's calibration activations at the first block."""
        assert self.data is not None
        config, place = self.config, self.place
        return BlockReplay(
            place.blocks,
            ids := share_tokens(self.data.ids, place.processes),
            self.batch_size,
            self.data.begins_with_bos and not config.bos_in_statistics,
            place.resident,
            place.activations(-(-len(ids) // self.batch_size), folder),
            None if config.calibration_dtype is None else getattr(torch, config.calibration_dtype),
        )

    def measure(self, name: str, kind: type[T], function: Callable[..., T]) -> T:
        """The result of `function`, which runs the dense model."""
        place = self.place
        return place.measured(
            name,
            kind,
            lambda folder: function(replay=self.replay(folder), resident=place.resident, processes=place.processes),
        )


def find(job: Job) -> None:
    """What to prune, and what stays dense."""
    job.targets, job.skipped = find_targets(job.place.blocks, job.config)
    job.place.check_space(job.targets)
    job.num_parameters = job.place.model.num_parameters()


def draw(job: Job) -> None:
    """The calibration samples."""
    place, config = job.place, job.config
    if config.needs_data:
        job.data = place.tokens(lambda: draw_tokens(place.model, config, place.tokenizer()))


def allocate(job: Job) -> None:
    """Each layer's own pattern."""
    blocks, config = job.place.blocks, job.config
    if config.allocation == "owl":
        measure = partial(measure_allocation, blocks, job.targets, config)
        job.allocation = job.measure("allocation", Allocation, measure)
        job.skipped |= leave_dense(blocks, job.targets, job.allocation)


def choose(job: Job) -> None:
    """The method, where any is allowed."""
    if job.config.method == AUTO:
        measure = partial(choose_method, job.place.blocks, job.targets, job.config, patterns=job.patterns)
        job.choice = job.measure("choice", MethodChoice, measure)


def prune(job: Job) -> None:
    """Block by block, from the first that is not done."""
    place, config, choice = job.place, job.config, job.choice
    config = config if choice is None else config.as_chosen(choice.method, choice.reconstruct)
    unfinished = len(place.done) < len(place.blocks.blocks)
    replay = job.replay() if config.needs_data and unfinished else None
    original = replay.fork("original") if replay is not None and needs_original(config, replay) else None
    place.resume(replay, original, config)
    job.pruned = [*place.done]
    job.pruned += prune_blocks(
        place.blocks,
        job.targets,
        config,
        replay,
        place.replaced,
        original=original,
        resident=place.resident,
        finished=lambda index, block: place.block_is_done(index, block, replay, original),
        start=len(place.done),
        processes=place.processes,
        patterns=job.patterns,
    )
    for row in (row for block in job.pruned for row in block.layers):
        row.sensitivity = None if job.allocation is None else job.allocation.sensitivities[row.name]


STAGES: tuple[Callable[[Job], None], ...] = (find, draw, allocate, choose, prune)


@torch.no_grad()
def run(place: Place, config: SparsityConfig) -> Job:
    """Takes a dense model through all stages.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub, or another process has stopped.
    """
    job = Job(place, config)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(place.model))
        try:
            for stage in STAGES:
                if stage is allocate and job.has_stacks:  # the first that watches what reaches the layers
                    stack.enter_context(eager_experts(place.model))
                stage(job)
        except BaseException as error:
            place.undo(error)
            raise
    return job


def share_tokens(ids: torch.Tensor, processes: Processes) -> torch.Tensor:
    """This process's part of the samples [num_samples, seq_len]. Raises ValueError where it would have none."""
    if len(ids) < processes.size:
        raise ValueError(
            f"{processes.size} processes share num_samples={len(ids)} calibration samples: start at most "
            f"{len(ids)} processes, or use more samples"
        )
    return ids[processes.share(len(ids))]
