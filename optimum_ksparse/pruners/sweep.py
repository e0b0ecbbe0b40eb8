"""SparseGPT's sweep over one block of columns: what is pruned is made good by the columns still to come.

Everything is in units of U_jj: with v = w / U_jj a column's score is |v|, its error e = v where it is pruned, else 0,
and the columns behind it lose U_jk/U_kk · e. On a GPU one kernel does all of it (`sweep_kernel`); the same steps in
torch take a few operations a group of columns.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..kernels.hardware import runs_kernels
from ..pattern import Pattern

# The widest group of n:m that is ranked and solved in one go, and how many columns are where the mask is given.
WIDEST_GROUP = 16
_GIVEN = 4


def sweep(block: torch.Tensor, factor: torch.Tensor, pattern: Pattern, mask: torch.Tensor) -> torch.Tensor:
    """Sweeps one block of columns, in place.

    Args:
        block: [columns, out] float32, contiguous: the transposed weights in units of U_jj. The columns that are kept
            end up with what is to stay of them.
        factor: [columns, columns] float32, U_jk/U_kk in row j and column k > j, otherwise 0; may be part of a larger
            matrix.
        pattern: `n:m` chooses `mask` group by group; otherwise `mask` is taken as it is.
        mask: [columns, out] bool, contiguous.

    Returns:
        [columns, out] float32, the errors; what is behind the block loses their product with the rows of the factor.
    """
    if runs_kernels(block.device) and (pattern.m or 1) <= WIDEST_GROUP:
        from . import sweep_kernel

        return sweep_kernel.sweep(block, factor, pattern, mask)
    pruned = torch.empty_like(block) if pattern.is_semi_structured else (~mask).float()
    tile = _Block(block, factor, torch.empty_like(block), pruned)
    tile.sweep(pattern)
    if pattern.is_semi_structured:
        torch.eq(pruned, 0, out=mask)
    return tile.errors


class _OneThread:
    """Within it torch has one thread, and after it as many as before. Python threads that come in meanwhile would see
    the one: the number that counts is that from before the first of them."""

    def __init__(self) -> None:
        self._lock, self._inside, self._threads = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._threads = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._threads)


_ONE_THREAD = _OneThread()


def one_thread(device: torch.device) -> AbstractContextManager[None]:
    """The sweep's operations are too small to share over the threads of a CPU: waking these costs more than they
    save, and on a machine that is busy with something else ten times as much."""
    return _ONE_THREAD if device.type == "cpu" else nullcontext()


@dataclass
class _Block:
    """`values`, `errors` and `pruned` (1 or 0): [columns, out] float32; factor: [columns, columns]."""

    values: torch.Tensor
    factor: torch.Tensor
    errors: torch.Tensor
    pruned: torch.Tensor

    def sweep(self, pattern: Pattern) -> None:
        whole = slice(0, len(self.values))
        if pattern.m is None or pattern.n is None:
            self._walk(whole, _GIVEN, lambda columns: self._solve(columns, _GIVEN))
            return
        m, zeros = pattern.m, pattern.m - pattern.n

        def step(columns: slice) -> None:
            if m <= WIDEST_GROUP:
                self._choose(columns, m, zeros)
                self._solve(columns, zeros)
            else:
                self.pruned[columns] = (~pattern.mask(self.values[columns].abs().T).T).float()
                self._walk(columns, _GIVEN, lambda part: self._solve(part, _GIVEN))

        self._walk(whole, m, step)

    def _walk(self, whole: slice, width: int, step: Callable[[slice], None]) -> None:
        """Steps from `width` columns to the next, with all the errors before them taken off. As in halving: behind
        step 4 the errors of steps 1 to 4 come off steps 5 to 8, behind step 6 those of 5 and 6 off 7 and 8. So most
        of the work is in few, large products."""
        for count, start in enumerate(range(whole.start, whole.stop, width), 1):
            stop = min(start + width, whole.stop)
            step(slice(start, stop))
            if stop < whole.stop:
                span = (count & -count) * width  # the highest power of two that divides it
                done, behind = slice(stop - span, stop), slice(stop, min(stop + span, whole.stop))
                self.values[behind].addmm_(self.factor[done, behind].T, self.errors[done], alpha=-1)

    def _choose(self, columns: slice, m: int, zeros: int) -> None:
        """Marks the `zeros` lowest scores of a group, the earlier one first among equals."""
        pairs, signs, limit = _pairs(m, zeros, self.values.device)
        first, second = self.values[columns].abs().index_select(0, pairs).chunk(2)
        torch.lt(signs @ first.le_(second), limit, out=self.pruned[columns])

    def _solve(self, columns: slice, zeros: int) -> None:
        """Errors of a few columns, of which a row has at most `zeros` pruned: e = pruned · (v − factorᵀ·e). From e = 0
        each round makes one more of a row's errors final; the last one leaves what stays of the kept columns."""
        values, errors, pruned = self.values[columns], self.errors[columns], self.pruned[columns]
        corner = self.factor[columns, columns].T
        torch.mul(values, pruned, out=errors)
        for _ in range(zeros - 1):
            torch.mul(torch.addmm(values, corner, errors, alpha=-1), pruned, out=errors)
        values.addmm_(corner, errors, alpha=-1)


@functools.lru_cache
def _pairs(m: int, zeros: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """To rank m scores by comparing each pair (i, j), i < j, once: j ranks one higher where s_i ≤ s_j, otherwise i.

    Returns:
        Every i and then every j; [m, pairs] float32, by which the comparisons are summed up, 1 for j and −1 for i; and
        [m, 1], below which the sum of one of the `zeros` lowest is. i begins with a 1 for each pair that it is first
        of.
    """
    first, second = torch.triu_indices(m, m, 1, device=device)
    each = torch.arange(m, device=device).unsqueeze(1)
    is_first = (each == first).float()
    limit = zeros - 0.5 - is_first.sum(1, keepdim=True)
    return torch.cat([first, second]), (each == second).float() - is_first, limit
