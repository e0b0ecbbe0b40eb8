"""The pipeline, the only one: from a dense model and settings to a sparse model, wherever the model is.

`STAGES` names what happens, in its order. A stage reads and fills a `Job`; what differs between a model in memory and
a checkpoint on disk is up to the `Place`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..blocks import eager_experts, evaluation_mode
from ..checkpoint import logical_parameters
from ..checkpoint.bitmask import check_writable
from ..config import SparsityConfig
from ..data import CalibrationTokens, calibration_tokens, tell_default_text
from ..pruners import METHODS
from ..pruners.allocation import Allocation
from ..records import COMPRESSED_TENSORS
from .job import Job, Place, Replaced
from .loop import needs_original, prune_blocks
from .permutation import Permutation
from .recognition import recognise_patterns
from .sensitivity import leave_dense, measure_allocation
from .targets import find_targets

logger = logging.get_logger(__name__)


def find(job: Job) -> None:
    """What to prune, and what stays dense."""
    job.targets, job.skipped = find_targets(job.blocks, job.config)
    if job.config.storage == COMPRESSED_TENSORS:
        for index, layers in enumerate(job.targets):
            check_writable(job.place.model, {job.blocks.name_in_model(index, name): layers[name] for name in layers})
    job.place.check_space(job.targets)
    job.num_parameters = logical_parameters(job.place.model)


def draw(job: Job) -> None:
    """The calibration samples."""
    place, config = job.place, job.config
    if config.needs_data:
        job.data = place.tokens(lambda: draw_tokens(place.model, config, place.tokenizer()))


def draw_tokens(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationTokens:
    """The calibration samples. Raises ValueError where they cannot be drawn, or some of them alone would lose their
    first position."""
    if "dataset" not in config.given and tokenizer is not None:
        logger.warning(tell_default_text(config.dataset, tokenizer))
    tokens = calibration_tokens(config.calibration, model, tokenizer)
    counts = config.method_setting("bos_in_statistics")
    if counts is False and len({part["begins_with_bos"] for part in tokens.description.get("parts", ())}) > 1:
        raise ValueError(
            "bos_in_statistics=False leaves out the first position of every sample, and in this mix the samples of "
            "'self' alone begin with the beginning token: pass prepend_bos=True, or bos_in_statistics=True"
        )
    tokens.description["bos_in_statistics"] = counts is not False
    return tokens


def allocate(job: Job) -> None:
    """Each layer's own pattern."""
    if job.config.allocation == "owl":
        name = "allocation"
        job.allocation = job.place.measured(name, Allocation, lambda: measure_allocation(job, job.replay(name)))
        job.skipped |= leave_dense(job.blocks, job.targets, job.allocation)
    elif METHODS[job.config.method].recognise is not None:
        recognise_patterns(job)


def prune(job: Job) -> None:
    """Block by block, from the first that is not done."""
    place, config = job.place, job.config
    unfinished = len(place.done) < len(job.blocks.blocks)
    if config.permute is not None and unfinished:
        job.permute = Permutation(job)
    replay = job.replay() if config.needs_data and unfinished else None
    original = replay.fork("original") if replay is not None and needs_original(config, replay) else None
    place.resume(replay, original, config)
    job.pruned = [*place.done, *prune_blocks(job, replay, original)]
    for row in (row for block in job.pruned for row in block.layers):
        row.sensitivity = None if job.allocation is None else job.allocation.sensitivities.get(row.name)


STAGES: tuple[Callable[[Job], None], ...] = (find, draw, allocate, prune)


@torch.no_grad()
def run(place: Place, config: SparsityConfig, restore_on_error: bool = False) -> Job:
    """Takes a dense model through all stages.

    Args:
        restore_on_error: keep the dense layers, and put them back on an error.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub, or another process has stopped.
    """
    job = Job(place, config, Replaced() if restore_on_error else None)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(place.model))
        try:
            for stage in STAGES:
                if stage is allocate and job.has_stacks:  # the first that watches what reaches the layers
                    stack.enter_context(eager_experts(place.model))
                stage(job)
        except BaseException:
            if job.replaced is not None:
                job.replaced.restore(job.blocks.decoder)
            raise
    return job
