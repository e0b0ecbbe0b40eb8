"""Rounding: kept values as integers, each of which times the scale of its row and group of columns is the weight.

Rounded to nearest, a row's output error is the sum of what its weights lose; rounded one after the other, what a
column loses is made good by those still to come, as in GPTQ (Frantar et al. 2022, arXiv 2210.17323) and in SparseGPT's
sweep. Then each integer is chosen again with all others given, column by column (coordinate descent: QuantEase, Behdin
et al. 2023, arXiv 2309.01885, equation 4), which holds on any mask, and each scale with its integers given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..quantization import GROUP_STEP, LIMITS, by_column, groups_of_row, to_integers
from .sparsegpt import inverse_factor
from .statistics import GramMatrix
from .sweep import one_thread

# Scales that are tried for a group: shares of the one by which its largest weight is the greatest integer.
_SHARES = torch.linspace(1.0, 0.4, 17)[:-1].tolist()
_ROUNDS = 2
# In the sweep as a share of the mean of the diagonal of H, in the descent of each of its entries.
_DAMPING = 0.1


@dataclass(frozen=True)
class OutputErrors:
    """Root mean squares over the tokens: of ‖X(Ŵ − W)ᵀ‖ with weights rounded to nearest and with these, of ‖XWᵀ‖."""

    nearest: float
    reached: float
    dense: float


@dataclass(frozen=True)
class Rounded:
    """Attributes:
    integers: [out, in] int8, zero outside the mask.
    scale: [out, ceil(in / group_size)], in the dtype of the weight.
    errors: None without data.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    errors: OutputErrors | None = None


def quantise(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    mask: torch.Tensor,
    statistics: GramMatrix | None,
    values: str,
    group_size: int,
) -> Rounded:
    """Rounds the kept weights so that the outputs stay near those of the dense ones. No row ends with a larger output
    error than by rounding to nearest.

    Memory: eight matrices [out, in] and what the factor of the Gram matrix takes, as in `sparsegpt`. Time: a sweep as
    there and five products [out, in] x [in, in].

    Args:
        weight: W [out, in] in any floating dtype, the dense weight.
        pruned: [out, in], what a method has made of it: zero outside the mask.
        mask: [out, in] bool, True where a weight is kept.
        statistics: of the inputs. None: without data, each group has the scale of the least squared error.
        values: type of the integers. group_size: so many columns share a scale.

    Raises:
        ArithmeticError: the damped Gram matrix is singular.
    """
    grid = Grid(*LIMITS[values], pruned.dtype)
    if statistics is None:
        even = pruned.new_ones(pruned.shape[1], dtype=torch.float32)
        scale = _searched(pruned, even, group_size, grid)
        return Rounded(to_integers(pruned, scale, group_size, values), scale)
    gram = statistics.gram.to(weight.device)
    problem = _Problem(weight, mask, gram, grid, group_size)
    problem.sweep(pruned, *(tensor.to(weight.device) for tensor in inverse_factor(statistics, _DAMPING)))
    for _ in range(_ROUNDS):
        problem.descend()
    scale = grid.reaching(_groups(pruned.float(), group_size).abs().amax(-1) / grid.greatest)
    integers = to_integers(pruned, scale, group_size, values)
    nearest = _errors(integers * by_column(scale.float(), group_size, len(gram)), weight, gram)
    reached = _errors(problem.rounded.T, weight, gram)
    worse = ~(reached < nearest).unsqueeze(1)  # or both overflow
    errors = nearest, torch.where(worse.squeeze(1), nearest, reached), _errors(torch.zeros_like(pruned), weight, gram)
    return Rounded(
        torch.where(worse, integers, problem.integers.T.to(torch.int8)),
        torch.where(worse, scale, problem.scale.T.to(scale.dtype)),
        OutputErrors(*(float(error.sum().clamp(min=0).sqrt()) for error in errors)),
    )


def _errors(rounded: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared output errors of the rows, [out] float64."""
    difference = rounded.float() - weight.float()
    return (difference @ gram).mul_(difference).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Grid:
    """The integers, and the dtype of the scales."""

    least: int
    greatest: int
    dtype: torch.dtype

    def representable(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales rounded to their dtype, in which each integer times its scale has room."""
        return self._with_room(scale).to(self.dtype)

    def reaching(self, scale: torch.Tensor) -> torch.Tensor:
        """As `representable`, none rounded down: float16 is coarse below 6e-5, and a weight that is the greatest
        integer times its scale would lose several of these."""
        wanted = self._with_room(scale)
        nearest = wanted.to(self.dtype)
        bits = nearest.view(getattr(torch, f"int{8 * self.dtype.itemsize}"))  # one more is the next number
        return (bits + (nearest < wanted)).view(self.dtype)

    def _with_room(self, scale: torch.Tensor) -> torch.Tensor:
        limits = torch.finfo(self.dtype)
        return scale.clamp(max=limits.max / -self.least * (1 - limits.eps))

    def round_(self, quotients: torch.Tensor) -> torch.Tensor:
        return quotients.round_().clamp_(self.least, self.greatest)


def _groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] → [out, groups, group_size], padded with zeros."""
    return F.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))


def _searched(weight: torch.Tensor, importance: torch.Tensor, group_size: int, grid: Grid) -> torch.Tensor:
    """Scales [out, groups] in their dtype, by which weights [out, in] rounded to nearest have the least squared error,
    that of each column weighted by its `importance` [in]."""
    groups, weights = _groups(weight.float(), group_size), _groups(importance.unsqueeze(0), group_size)
    whole = torch.maximum(groups.amax(-1) / grid.greatest, groups.amin(-1) / grid.least)
    groups = groups * _inverse(whole).unsqueeze(-1)  # in units of it squares do not overflow
    scale, lowest = torch.zeros_like(whole, dtype=grid.dtype), torch.full_like(whole, torch.inf)
    for share in _SHARES:
        tried = grid.reaching(share * whole)
        unit = (tried.float() * _inverse(whole)).unsqueeze(-1)
        rounded = grid.round_(groups * _inverse(unit)).mul_(unit)
        error = rounded.sub_(groups).square_().mul_(weights).sum(-1)
        better = error < lowest
        scale, lowest = torch.where(better, tried, scale), torch.where(better, error, lowest)
    return scale


def _by_halves(
    columns: slice,
    width: int,
    step: Callable[[slice], None],
    values: torch.Tensor,
    matrix: torch.Tensor,
    changes: torch.Tensor,
) -> None:
    """Steps from `width` columns to the next, with what all those before have added to `changes` [in, out], times
    their rows of `matrix` [in, in], taken off `values` [in, out] of the columns at the step. Most of the work is in
    few, large products."""
    number = -(-(columns.stop - columns.start) // width)
    if number <= 1:
        step(columns)
        return
    middle = columns.start + number // 2 * width
    done, behind = slice(columns.start, middle), slice(middle, columns.stop)
    _by_halves(done, width, step, values, matrix, changes)
    values[behind].addmm_(matrix[done, behind].T, changes[done], alpha=-1)
    _by_halves(behind, width, step, values, matrix, changes)


class _Problem:
    """tr((Q − W)H'(Q − W)ᵀ) on a mask, H' being H with its diagonal times 1 + damping, as in `admm`: it holds weights
    near the dense ones where the calibration knows little. All matrices are transposed, so that each column of the
    weight is contiguous in memory.

    Attributes:
        integers: [in, out] float32. scale: [groups, out] float32. rounded: Q, [in, out] float32.
    """

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, grid: Grid, size: int) -> None:
        self.weight, self.kept = _transposed(weight), _transposed(mask)
        self.gram, self.grid, self.group_size = gram.clone(), grid, size
        self.gram.diagonal().mul_(1 + _DAMPING)
        self.integers, self.rounded = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.scale = self.weight.new_zeros(groups_of_row(size, len(gram)), weight.shape[0])

    def sweep(self, pruned: torch.Tensor, factor: torch.Tensor, unit: torch.Tensor) -> None:
        """Rounds column by column from the pruned weight [out, in] on. `factor` and `unit` are U_jk/U_kk and U_jj, as
        in `sparsegpt`, in whose units the values are. A group's scale is found when the sweep reaches it."""
        values, units = _transposed(pruned) / unit, unit.flatten().tolist()
        errors = torch.empty_like(values)

        def group(columns: slice) -> None:
            at = columns.start // self.group_size
            wanted = (values[columns] * unit[columns]).mul_(self.kept[columns]).T
            importance = unit[columns].flatten().square().reciprocal()
            scale = self.scale[at] = _searched(wanted, importance, self.group_size, self.grid)[:, 0].float()
            inverse = _inverse(scale)

            def column(one: slice) -> None:
                j = one.start
                integers = self.grid.round_(values[j] * inverse * units[j]).mul_(self.kept[j])
                torch.mul(integers, scale, out=self.rounded[j])
                torch.sub(values[j], self.rounded[j], alpha=1 / units[j], out=errors[j])
                self.integers[j] = integers

            self._columns(columns, column, values, factor, errors)

        _by_halves(slice(0, len(values)), self.group_size, group, values, factor, errors)

    def descend(self) -> None:
        """One round of coordinate descent: each integer, and behind its group the scale, is the best one with all
        others given. What it minimises never grows."""
        inverse_diagonal = _inverse(self.gram.diagonal()).tolist()
        # Half of the gradient, and what is taken off the weights.
        gradient = self.gram @ (self.rounded - self.weight)
        changes = torch.empty_like(gradient)

        def group(columns: slice) -> None:
            scale = self.scale[columns.start // self.group_size]
            before, inverse = self.rounded[columns].clone(), _inverse(scale)
            first = gradient[columns].clone()

            def column(one: slice) -> None:
                j = one.start
                wanted = torch.sub(self.rounded[j], gradient[j], alpha=inverse_diagonal[j]).mul_(inverse)
                self.integers[j] = self.grid.round_(wanted).mul_(self.kept[j])
                torch.mul(self.integers[j], scale, out=wanted)
                torch.sub(self.rounded[j], wanted, out=changes[j])
                self.rounded[j] = wanted

            self._columns(columns, column, gradient, self.gram, changes)
            first.addmm_(self.gram[columns, columns], self.rounded[columns] - before)
            self._refit(columns, scale, first)
            torch.sub(before, self.rounded[columns], out=changes[columns])

        _by_halves(slice(0, len(gradient)), self.group_size, group, gradient, self.gram, changes)

    def _refit(self, columns: slice, scale: torch.Tensor, gradient: torch.Tensor) -> None:
        """The best scale [out] of a group with its integers z given, in place: s − zᵀg / zᵀHz."""
        integers = self.integers[columns]
        curvature = (self.gram[columns, columns] @ integers).mul_(integers).sum(0)
        wanted = scale - (gradient * integers).sum(0) * _inverse(curvature)
        # Of a parabola the representable number next to the lowest point is the lowest.
        scale.copy_(self.grid.representable(torch.where(wanted > 0, wanted, scale)))
        torch.mul(integers, scale, out=self.rounded[columns])

    def _columns(
        self,
        columns: slice,
        step: Callable[[slice], None],
        values: torch.Tensor,
        matrix: torch.Tensor,
        changes: torch.Tensor,
    ) -> None:
        def block(part: slice) -> None:
            with one_thread(values.device):
                _by_halves(part, 1, step, values, matrix, changes)

        _by_halves(columns, GROUP_STEP, block, values, matrix, changes)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _inverse(tensor: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 of what is not above 0."""
    return torch.where(tensor > 0, 1 / tensor, 0)
