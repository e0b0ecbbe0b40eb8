"""Block reconstruction: when its layers are pruned, a block's kept weights, biases and norms are tuned together, so
that its outputs are those of the dense block. The masks stay.

Pruning layer by layer cannot trade errors across the non-linearities of a block; a few passes of gradient steps over
the same calibration tokens can. That a window with a non-linearity in it beats every layer-wise method was found in
arXiv 2510.14444; tuning a block to its outputs is from BRECQ (arXiv 2102.05426).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..blocks import Activations, BlockReplay
from ..config import SparsityConfig
from ..report import BlockReport
from .distributed import Processes
from .job import Job
from .loss import LOW_PRECISION, OutputLoss, held_out, norms_and_biases, values_of
from .straight_through import StraightThrough, straight_through

# One step of the optimizer sees at least so many tokens of each process, where it has as many.
_STEP_TOKENS = 2048
_WARM_UP = 0.1  # of all steps
# The learning rate is a share of each tensor's root mean square; a tensor of zeros (a bias) counts as of this size.
_LEAST_SIZE = 1e-3
_DIVERGED = 2.0  # times the loss at the beginning


@torch.no_grad()
def reconstruct_block(job: Job, index: int, replay: BlockReplay, targets: Activations) -> BlockReport:
    """Tunes a pruned block in place: the values of its sparse layers, its biases and its norms.

    The loss is the mean squared error of the outputs, each channel in units of its own energy, each token cut down to
    the median norm: otherwise the huge activation of a beginning token, or the few huge channels of a residual stream,
    would be all that counts. Adam, with a learning rate that is a share of each tensor's size, a warm-up and a cosine.
    Products are in bfloat16 where the model or `calibration_dtype` is in 16 bit; weights are float32 until the end.

    Every eighth batch is held out (of one sample alone, none): after each epoch the loss on these tells whether the
    weights are the best so far, and the best are kept, so that a block never ends worse than it began. The row's loss
    is that of these same batches; it says where more epochs lowered the loss on the other batches alone. Memory beside
    the activations: what is tuned, in float32, five times.

    Values that are quantised already are tuned with their scales, and are integers times scales in each of these
    losses (`straight_through`).

    Gradients are averaged over processes. Parameters that the block shares with others stay as they are. Gives the
    block's row for the report.
    """
    with straight_through(job.blocks.blocks[index]) as quantised:
        return _reconstruct(job, index, replay, targets, quantised)


def _reconstruct(
    job: Job, index: int, replay: BlockReplay, targets: Activations, quantised: list[StraightThrough]
) -> BlockReport:
    started, block = time.perf_counter(), job.blocks.blocks[index]
    loss = OutputLoss(index, block, replay, targets, job.processes)
    steps = _Steps(loss)
    before = loss.mean(steps.held_out)

    def row(after: float, note: str) -> BlockReport:
        return BlockReport(index, before, after, round(time.perf_counter() - started, 4), note)

    tuned = _tuned(job, index)
    if not tuned:
        return row(before, "nothing to tune")
    quantised = [one for one in quantised if any(one.weight is parameter for parameter in tuned)]
    tuned += [one.growth for one in quantised]
    original = [parameter.data.clone() for parameter in tuned]
    if job.replaced is not None:
        values = values_of(block)
        job.replaced.tuned += [pair for pair in zip(tuned, original, strict=True) if id(pair[0]) not in values]
    best, lowest, learned, overfitted = original, before, math.inf, 0
    note = "" if steps.holds_out else "one sample alone: nothing was held out"
    with _in_float32(block, tuned):
        for epoch, (training, judged) in enumerate(_epochs(loss, steps, tuned, quantised, job.config), 1):
            if not judged <= _DIVERGED * before:
                note = f"diverged in epoch {epoch} and was stopped; a lower reconstruction_lr may help"
                break
            if judged < lowest:
                best, lowest, learned, overfitted = [p.data.clone() for p in tuned], judged, training, 0
            elif training < learned < math.inf:
                overfitted = overfitted or epoch
    if overfitted and not note:
        note = f"overfitted from epoch {overfitted} on, which was not kept; more calibration samples may help"
    _put(tuned, best, original)
    if best is not original and original[0].dtype in LOW_PRECISION:
        lowest = loss.mean(steps.held_out)  # rounded to 16 bit, a small gain may be none
    if best is original or not lowest < before:
        _put(tuned, original, original)
        return row(before, note or "no epoch was better than the beginning, on tokens held out: nothing was changed")
    return row(lowest, note)


@torch.no_grad()
def output_loss(job: Job, index: int, replay: BlockReplay, targets: Activations) -> float:
    """The loss of a block as it is, on the batches that `reconstruct_block` holds out."""
    loss = OutputLoss(index, job.blocks.blocks[index], replay, targets, job.processes)
    return loss.mean(_Steps(loss).held_out)


def _tuned(job: Job, index: int) -> list[nn.Parameter]:
    """Values of sparse layers, biases and norms that no other block has. What was left dense stays as it is."""
    block = job.blocks.blocks[index]
    others = [other for i, other in enumerate(job.blocks.blocks) if i != index]
    elsewhere = {id(parameter) for other in others for parameter in other.parameters()}
    chosen = (values_of(block) | {id(p) for p in norms_and_biases(block)}) - elsewhere
    return [p for p in block.parameters() if id(p) in chosen]


def _put(parameters: list[nn.Parameter], values: list[torch.Tensor], like: list[torch.Tensor]) -> None:
    for parameter, value, original in zip(parameters, values, like, strict=True):
        parameter.data = value.to(original.dtype)


@contextmanager
def _in_float32(block: nn.Module, tuned: list[nn.Parameter]) -> Iterator[None]:
    """Within it what is tuned is float32 and wants gradients, and nothing else of the block does; after it all is as
    before, without the gradients."""
    before = [(parameter, parameter.dtype, parameter.requires_grad) for parameter in block.parameters()]
    try:
        block.requires_grad_(False)
        for parameter in tuned:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, dtype, requires_grad in before:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _epochs(
    loss: OutputLoss,
    steps: _Steps,
    tuned: list[nn.Parameter],
    quantised: list[StraightThrough],
    config: SparsityConfig,
) -> Iterator[tuple[float, float]]:
    """Trains, and yields after each epoch the mean loss that its steps met, and the loss on what is held out."""
    learned = {one.weight: one.learned for one in quantised}
    parameters = [learned.get(parameter, parameter) for parameter in tuned]
    sizes = [float(parameter.square().mean().sqrt()) or _LEAST_SIZE for parameter in parameters]
    epochs, rate_at_height = (config.method_setting(f"reconstruction_{name}") for name in ("epochs", "lr"))
    groups = [{"params": [p], "lr": rate_at_height * s} for p, s in zip(parameters, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    total = epochs * steps.number
    warm_up = max(1, round(_WARM_UP * total))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(config.seed + loss.index)
    for _ in range(epochs):
        met = []
        for batches in steps.drawn(order):
            with torch.enable_grad():
                for batch in batches:
                    error = loss.of(batch)
                    (error / len(batches)).backward()
                    met.append(error.detach())
            for one in quantised:
                one.pass_on_gradient()
            _average_gradients(parameters, loss.processes)
            optimizer.step()
            optimizer.zero_grad()
            for one in quantised:
                one.round_()
            schedule.step()
        yield float(torch.stack(met).mean()), loss.mean(steps.held_out)


class _Steps:
    """The batches that a block is tuned on, and those that are held out.

    Attributes:
        held_out: batches. holds_out: whether any batch of any process is.
        number: steps of an epoch, the same in all processes.
    """

    def __init__(self, loss: OutputLoss) -> None:
        gather, self.held_out = loss.processes.gather, held_out(loss.batches)
        batches = [batch for batch in range(len(loss.targets)) if batch not in self.held_out]
        self.holds_out = any(gather(bool(batches)))
        self._batches = batches or self.held_out
        self._size = max(1, min(len(self._batches), _STEP_TOKENS // loss.targets[0].shape[:-1].numel()))
        self.number = max(gather(-(-len(self._batches) // self._size)))

    def drawn(self, order: torch.Generator) -> Iterator[list[int]]:
        """The batches of each step of an epoch, in an order drawn anew. A process with fewer batches than others
        begins again."""
        drawn = [self._batches[i] for i in torch.randperm(len(self._batches), generator=order)]
        for step in range(self.number):
            first = step * self._size % len(drawn)
            yield drawn[first : first + self._size]


def _average_gradients(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Averages gradients over the processes; a process without one, whose tokens did not reach an expert, has zero."""
    if processes.size > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        processes.average([parameter.grad for parameter in parameters if parameter.grad is not None])
