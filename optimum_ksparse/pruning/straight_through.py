"""Tuning quantised values: weights and scales are learned, and the block computes with what is rounded from them.

A gradient goes past the rounding as if it were not there (the straight-through estimator), and to the scale as in LSQ
(Esser et al. 2019, arXiv 1902.08153, equation 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..nn import SparseExperts, SparseLinear
from ..packing import unpack_mask
from ..pruners.rounding import Grid
from ..quantization import LIMITS, pack_integers


class StraightThrough:
    """The values of a sparse module while they are tuned: the module holds them as ordinary ones, float32, which are
    integers times scales after each step.

    Attributes:
        weight: of the module; is given gradients.
        learned: shaped as the weight: what it is rounded from.
        growth: of each scale, from 1 on, so that steps are shares of the scales.
    """

    def __init__(self, module: SparseLinear | SparseExperts) -> None:
        assert module.values is not None and module.weight_scale is not None
        self._module, self._values, self._group_size = module, module.values, module.group_size
        self._grid = Grid(*LIMITS[module.values], module.dtype)
        self._first, groups = module.weight_scale, module.weight_scale.shape[-1]
        mask = unpack_mask(module.weight_mask, module.in_features).flatten(0, -2)
        rows, columns = mask.nonzero(as_tuple=True)
        module.dequantize_values()
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        # Of each value the place of its scale.
        self._places = (rows * groups + columns // self._group_size).view(self.weight.shape)
        self.learned = nn.Parameter(self.weight.detach().float())
        self.growth = nn.Parameter(torch.ones_like(self._first, dtype=torch.float32))

    @property
    def scale(self) -> torch.Tensor:
        return self._grid.representable(self._first.float() * self.growth.detach().clamp(min=0))

    def _quotients(self, values: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """Each value divided by its scale, which is to be rounded, and the scale."""
        scale = self.scale.float().view(-1)[self._places]
        return (values.detach().float() / scale).nan_to_num_(0, 0, 0), scale

    def round_(self) -> None:
        """Gives the module the values as they are rounded now."""
        quotients, scale = self._quotients(self.learned)
        self.weight.data = self._grid.round_(quotients).mul_(scale)

    def pass_on_gradient(self) -> None:
        """Gives the gradient of the weight, where there is one, to what is learned."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            return
        quotients, _ = self._quotients(self.learned)
        rounded = self._grid.round_(quotients.clone())
        inside = quotients.round() == rounded
        self.learned.grad = gradient * inside
        of_scale = gradient * (rounded - quotients * inside)
        summed = torch.zeros(self._first.numel(), device=gradient.device)
        summed.index_add_(0, self._places.flatten(), of_scale.flatten())
        self.growth.grad = summed.view_as(self._first) * self._first.float()

    def finish(self) -> None:
        """Gives the module integers and scales: those that its weight, which may have another dtype, was made of."""
        integers = self._grid.round_(self._quotients(self.weight)[0]).to(torch.int8)
        self._module.take_integers(pack_integers(integers, self._values), self.scale, self._group_size)


@contextmanager
def straight_through(block: nn.Module) -> Iterator[list[StraightThrough]]:
    """Within it the sparse modules of a block whose values are quantised hold ordinary ones; after it, integers."""
    modules = [module for module in block.modules() if isinstance(module, SparseLinear | SparseExperts)]
    quantised = [StraightThrough(module) for module in modules if module.values is not None]
    try:
        yield quantised
    finally:
        for one in quantised:
            one.finish()
