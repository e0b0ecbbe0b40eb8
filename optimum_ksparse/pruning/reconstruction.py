"""Block reconstruction: when its layers are pruned, a block's kept weights, biases and norms are tuned together, so
that its outputs are those of the dense block. The masks stay.

Pruning layer by layer cannot trade errors across the non-linearities of a block; a few passes of gradient steps over
the same calibration tokens can. That a window with a non-linearity in it beats every layer-wise method was found in
arXiv 2510.14444; tuning a block to its outputs is from BRECQ (arXiv 2102.05426).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..blocks import Activations, BlockReplay
from ..config import SparsityConfig
from ..nn import SparseExperts, SparseLinear
from ..report import BlockReport
from .distributed import Processes

# One step of the optimizer sees at least so many tokens of each process, where it has as many.
_STEP_TOKENS = 2048
HELD_OUT = 8  # one batch in so many
_WARM_UP = 0.1  # of all steps
# The learning rate is a share of each tensor's root mean square; a tensor of zeros (a bias) counts as of this size.
_LEAST_SIZE = 1e-3
# No channel counts as having less than this share of the mean energy: one that hardly moves would outweigh all others.
_LEAST_ENERGY = 1e-3
_DIVERGED = 2.0  # times the loss at the beginning
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def reconstruct_block(
    index: int,
    block: nn.Module,
    replay: BlockReplay,
    targets: Activations,
    config: SparsityConfig,
    processes: Processes,
    replaced: list[tuple[nn.Parameter, torch.Tensor]] | None = None,
    elsewhere: Collection[int] = (),
) -> BlockReport:
    """Tunes a pruned block in place: the values of its sparse layers, its biases and its norms.

    The loss is the mean squared error of the outputs, each channel in units of its own energy, each token cut down to
    the median norm: otherwise the huge activation of a beginning token, or the few huge channels of a residual stream,
    would be all that counts. Adam, with a learning rate that is a share of each tensor's size, a warm-up and a cosine.
    Products are in bfloat16 where the model or `calibration_dtype` is in 16 bit; weights are float32 until the end.

    Every eighth batch is held out (of one sample alone, none): after each epoch the loss on these tells whether the
    weights are the best so far, and the best are kept, so that a block never ends worse than it began. The row's loss
    is that of these same batches; it says where more epochs lowered the loss on the other batches alone. Memory beside
    the activations: what is tuned, in float32, five times.

    Args:
        index, block: the block, its layers replaced by sparse ones.
        replay: at the inputs of the block.
        targets: the outputs that it is to give, batch by batch.
        config: `reconstruction_epochs`, `reconstruction_lr`, `seed`, `calibration_dtype`.
        processes: which share the samples; gradients are averaged over them.
        replaced: is given the parameters that stay in the model, each with its value before.
        elsewhere: ids of the parameters of other blocks; those that this one shares with them stay as they are.

    Returns:
        The block's row for the report.
    """
    started = time.perf_counter()
    problem = _Problem(OutputLoss(index, block, replay, targets, processes))
    before = problem.held_out_loss()
    tuned = [parameter for parameter in _tuned(block) if id(parameter) not in elsewhere]
    if not tuned:
        return BlockReport(index, before, before, round(time.perf_counter() - started, 4), "nothing to tune")
    original = [parameter.data.clone() for parameter in tuned]
    if replaced is not None:
        values = _values(block)
        replaced += [pair for pair in zip(tuned, original, strict=True) if id(pair[0]) not in values]
    best, lowest, learned, overfitted = original, before, math.inf, 0
    note = "" if problem.holds_out else "one sample alone: nothing was held out"
    with _in_float32(block, tuned):
        for epoch, (training, loss) in enumerate(_epochs(problem, tuned, config), start=1):
            if not loss <= _DIVERGED * before:
                note = f"diverged in epoch {epoch} and was stopped; a lower reconstruction_lr may help"
                break
            if loss < lowest:
                best, lowest, learned, overfitted = [parameter.data.clone() for parameter in tuned], loss, training, 0
            elif training < learned < math.inf:
                overfitted = overfitted or epoch
    if overfitted and not note:
        note = f"overfitted from epoch {overfitted} on, which was not kept; more calibration samples may help"
    _put(tuned, best, original)
    if best is not original and original[0].dtype in _LOW_PRECISION:
        lowest = problem.held_out_loss()  # rounded to 16 bit, a small gain may be none
    if best is original or not lowest < before:
        _put(tuned, original, original)
        lowest = before
        note = note or "no epoch was better than the beginning, on tokens held out: nothing was changed"
    return BlockReport(index, before, lowest, round(time.perf_counter() - started, 4), note)


def _values(block: nn.Module) -> set[int]:
    """Ids of the values of sparse layers."""
    return {id(m.weight) for m in block.modules() if isinstance(m, SparseLinear | SparseExperts)}


def _tuned(block: nn.Module) -> list[nn.Parameter]:
    """Values of sparse layers, biases and norms. What was left dense stays as it is."""
    values, small = _values(block), {id(p) for p in _small(block)}
    return [p for p in block.parameters() if id(p) in values or id(p) in small]


def _small(block: nn.Module) -> list[nn.Parameter]:
    """Parameters of one dimension, but for the values of sparse layers and for biases of convolutions, which must have
    the dtype of their weight."""
    values = _values(block)
    fixed = {
        id(p)
        for module in block.modules()
        if isinstance(module, _CONVOLUTIONS)
        for p in module.parameters(recurse=False)
    }
    return [p for p in block.parameters() if p.dim() == 1 and id(p) not in values | fixed]


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


@contextmanager
def _norms_in_float32(block: nn.Module) -> Iterator[None]:
    """Within it norms and biases are float32, as autocast has what they are applied to: a layer norm on a CPU takes
    no inputs of another dtype than its own."""
    small = [(p, p.data) for p in _small(block) if p.dtype in _LOW_PRECISION]
    try:
        for parameter, value in small:
            parameter.data = value.float()
        yield
    finally:
        for parameter, value in small:
            parameter.data = value


def _epochs(
    problem: _Problem, parameters: list[nn.Parameter], config: SparsityConfig
) -> Iterator[tuple[float, float]]:
    """Trains, and yields after each epoch the mean loss that its steps met, and the loss on what is held out."""
    sizes = [float(parameter.square().mean().sqrt()) or _LEAST_SIZE for parameter in parameters]
    epochs, rate_at_height = (config.method_setting(f"reconstruction_{name}") for name in ("epochs", "lr"))
    groups = [{"params": [p], "lr": rate_at_height * s} for p, s in zip(parameters, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    total = epochs * problem.num_steps
    warm_up = max(1, round(_WARM_UP * total))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(config.seed + problem.loss.index)
    for _ in range(epochs):
        met = []
        for batches in problem.steps(order):
            with torch.enable_grad():
                for batch in batches:
                    loss = problem.loss.of(batch)
                    (loss / len(batches)).backward()
                    met.append(loss.detach())
            problem.average_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield float(torch.stack(met).mean()), problem.held_out_loss()


class OutputLoss:
    """How far the outputs of a block are from its targets: mean squared error in units of each channel's energy.

    Args:
        index, block: the block.
        replay: its inputs.
        targets: what it is to give, batch by batch.
        processes: which share the samples.
    """

    def __init__(
        self, index: int, block: nn.Module, replay: BlockReplay, targets: Activations, processes: Processes
    ) -> None:
        self.index, self.processes, self.targets, self.batches = index, processes, targets, replay.batches
        self._block, self._replay = block, replay
        # Some keep the hidden states in float32 (Mamba).
        self._low = any(
            dtype in _LOW_PRECISION
            for dtype in (replay.dtype, targets[0].dtype, *(p.dtype for p in block.parameters()))
        )
        self._limit, self._energy = self._scales()

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The median norm of the targets' tokens, and the mean energy of each channel, [hidden] float32, where tokens
        are cut down to that norm."""
        norms = torch.cat([target.float().norm(dim=-1).flatten().cpu() for target in self.targets])
        limit = torch.cat(self.processes.gather(norms)).median().to(self.targets.device)
        energies = [(t.float() * _cut(t, limit)).square().flatten(0, -2).mean(0) for t in self.targets]
        energy = torch.stack(energies).mean(0)
        self.processes.average([energy])
        return limit, energy.clamp(min=max(_LEAST_ENERGY * float(energy.mean()), torch.finfo(torch.float32).tiny))

    def of(self, batch: int) -> torch.Tensor:
        """Of one batch, float32."""
        with self._precision(), _norms_in_float32(self._block):
            output = self._replay.output(self.index, self._block, batch, in_dtype=False)
        target = self.targets[batch]
        error = (output.float() - target.float()) * _cut(target, self._limit)
        return (error.square() / self._energy).mean()

    def mean(self, batches: Iterable[int]) -> float:
        """Mean over some batches of each process."""
        everyone = self.processes.gather([float(self.of(batch)) for batch in batches])
        losses = [loss for losses_of_one in everyone for loss in losses_of_one]
        return sum(losses) / len(losses)

    def _precision(self) -> AbstractContextManager[object]:
        """Of products of 16-bit inputs with weights that are float32 for now. float16 has no room for gradients."""
        return torch.autocast(self.targets.device.type, torch.bfloat16) if self._low else nullcontext()


class _Problem:
    """The batches that a block is tuned on, those that are held out, and the loss.

    Attributes:
        num_steps: of an epoch, the same in all processes.
        holds_out: whether any batch of any process is.
    """

    def __init__(self, loss: OutputLoss) -> None:
        self.loss, self.processes = loss, loss.processes
        self._held_out = held_out(loss.batches)
        self._batches = [batch for batch in range(len(loss.targets)) if batch not in self._held_out] or self._held_out
        self.holds_out = any(self.processes.gather(self._batches != self._held_out))
        tokens = loss.targets[0].shape[:-1].numel()
        self._per_step = max(1, min(len(self._batches), _STEP_TOKENS // tokens))
        self.num_steps = max(self.processes.gather(-(-len(self._batches) // self._per_step)))

    def steps(self, order: torch.Generator) -> Iterator[list[int]]:
        """The batches of each step of an epoch, in an order drawn anew. A process with fewer batches than others
        begins again."""
        drawn = [self._batches[i] for i in torch.randperm(len(self._batches), generator=order)]
        for step in range(self.num_steps):
            first = step * self._per_step % len(drawn)
            yield drawn[first : first + self._per_step]

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Over the processes. An expert that no token of a process reached has none there."""
        if self.processes.size > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.processes.average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def held_out_loss(self) -> float:
        """Mean over the batches that are held out, of all processes."""
        return self.loss.mean(self._held_out)


def held_out(batches: Sequence[int]) -> list[int]:
    """Which of some activations are held out: all those of every eighth batch. Of one batch alone, that one, which
    then is not.

    Args:
        batches: of each activation, the number of its batch.
    """
    numbers = list(dict.fromkeys(batches))
    chosen = numbers[HELD_OUT - 1 :: HELD_OUT] or numbers[-1:]
    return [index for index, batch in enumerate(batches) if batch in chosen]


def _cut(target: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """By what each token [..., 1] is multiplied so that its norm is at most `limit`."""
    return (limit / target.float().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
