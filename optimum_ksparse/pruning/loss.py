"""How well a block does: the distance of its outputs from those of the dense one, and the calibration batches that are
held out to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..blocks import Activations, BlockReplay
from ..nn import SparseExperts, SparseLinear
from .distributed import Processes

HELD_OUT = 8  # one batch in so many
# No channel counts as having less than this share of the mean energy: one that hardly moves would outweigh all others.
_LEAST_ENERGY = 1e-3
LOW_PRECISION = (torch.bfloat16, torch.float16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TINY = torch.finfo(torch.float32).tiny


class OutputLoss:
    """How far the outputs of a block are from its targets: mean squared error in units of each channel's energy."""

    def __init__(
        self, index: int, block: nn.Module, replay: BlockReplay, targets: Activations, processes: Processes
    ) -> None:
        self.index, self.block, self.processes, self.targets = index, block, processes, targets
        self.batches, self._replay = replay.batches, replay
        # Some keep the hidden states in float32 (Mamba).
        dtypes = {replay.dtype, targets[0].dtype, *(p.dtype for p in block.parameters())}
        self._low = not dtypes.isdisjoint(LOW_PRECISION)
        # The median norm of the targets' tokens, and the mean energy of each channel, [hidden], of tokens cut to it.
        norms = torch.cat([target.float().norm(dim=-1).flatten().cpu() for target in targets])
        self._limit = torch.cat(processes.gather(norms)).median().to(targets.device)
        energies = [(t.float() * _cut(t, self._limit)).square().flatten(0, -2).mean(0) for t in targets]
        energy = torch.stack(energies).mean(0)
        processes.average([energy])
        self._energy = energy.clamp(min=max(_LEAST_ENERGY * float(energy.mean()), _TINY))

    def of(self, batch: int) -> torch.Tensor:
        """The loss of one batch, float32."""
        # Products of 16-bit inputs with weights that are float32 for now. float16 has no room for gradients.
        precision = torch.autocast(self.targets.device.type, torch.bfloat16) if self._low else nullcontext()
        with precision, _norms_in_float32(self.block):
            output = self._replay.output(self.index, self.block, batch, in_dtype=False)
        target = self.targets[batch]
        error = (output.float() - target.float()) * _cut(target, self._limit)
        return (error.square() / self._energy).mean()

    def mean(self, batches: Iterable[int]) -> float:
        """Mean over some batches of each process."""
        everyone = self.processes.gather([float(self.of(batch)) for batch in batches])
        losses = [loss for losses_of_one in everyone for loss in losses_of_one]
        return sum(losses) / len(losses)


def held_out(batches: Sequence[int]) -> list[int]:
    """Which activations, of the batches of these numbers, are held out: all those of every eighth batch. Of one batch
    alone, that one, which then is not."""
    numbers = list(dict.fromkeys(batches))
    chosen = numbers[HELD_OUT - 1 :: HELD_OUT] or numbers[-1:]
    return [index for index, batch in enumerate(batches) if batch in chosen]


def _cut(target: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The factor of each token [..., 1] that brings its norm to at most `limit`."""
    return (limit / target.float().norm(dim=-1, keepdim=True).clamp(min=_TINY)).clamp(max=1)


def values_of(block: nn.Module) -> set[int]:
    """Ids of the values of sparse layers."""
    return {id(m.weight) for m in block.modules() if isinstance(m, SparseLinear | SparseExperts)}


def norms_and_biases(block: nn.Module) -> list[nn.Parameter]:
    """Parameters of one dimension, but for the values of sparse layers and for biases of convolutions, which must have
    the dtype of their weight."""
    convolutions = (module for module in block.modules() if isinstance(module, _CONVOLUTIONS))
    fixed = values_of(block) | {id(p) for module in convolutions for p in module.parameters(recurse=False)}
    return [p for p in block.parameters() if p.dim() == 1 and id(p) not in fixed]


@contextmanager
def _norms_in_float32(block: nn.Module) -> Iterator[None]:
    """Within it norms and biases are float32, as autocast has what they are applied to: a layer norm on a CPU takes
    no inputs of another dtype than its own."""
    small = [(p, p.data) for p in norms_and_biases(block) if p.dtype in LOW_PRECISION]
    try:
        for parameter, value in small:
            parameter.data = value.float()
        yield
    finally:
        for parameter, value in small:
            parameter.data = value
