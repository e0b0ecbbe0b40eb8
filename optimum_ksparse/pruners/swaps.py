"""SparseSwaps: a mask made better by exchanging weights one for one. Zimmer et al. 2025, arXiv 2512.10922."""

from __future__ import annotations

import torch

from ..pattern import Pattern
from .statistics import GramMatrix

# Rows of the weight at a time, so that the pairs of an unstructured row fit into memory.
_PAIR_ELEMENTS = 2**25
# Of an unstructured row so many of the best weights to restore, and to prune, are paired.
_CANDIDATES = 64
_MOST_SWAPS = 100  # in each row


def swap(
    weight: torch.Tensor, statistics: GramMatrix, pattern: Pattern, pruned: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In each row, restores one weight and prunes another as long as that lowers the row's output error, the best pair
    first. A weight that is restored gets its dense value; those that stay kept are not changed.

    With r = w − ŵ and c = Hr, restoring p and pruning u changes the error by
    −2w_p·c_p + w_p²·H_pp + 2ŵ_u·c_u + ŵ_u²·H_uu − 2w_p·ŵ_u·H_pu. Pairs lie in one group for `n:m`, where all of them
    are looked at; of an unstructured row those of the best 64 to restore with the best 64 to prune.

    Memory: five matrices [out, in]. Time: for each swap of a row a pass over the row, and over its m·in (or
    64²) pairs; all rows go at once, so that the most swaps that any row needs count.

    Args:
        weight: W [out, in] in any floating dtype: the dense weight.
        statistics: with the Gram matrix H = XᵀX / tokens, [in, in].
        pattern: of the mask.
        pruned: Ŵ [out, in]: kept weights as they are or as a method has updated them, zero outside the mask.
        mask: [out, in] bool, True where a weight is kept.

    Returns:
        Ŵ in the dtype of `pruned`, and its mask, both [out, in]. The output error of no row is above what it was.
    """
    target, values = weight.float(), pruned.float().clone()
    gram, mask = statistics.gram.to(target), mask.clone()
    diagonal = gram.diagonal()
    rows = torch.arange(len(target), device=target.device)
    correlation = (target - values) @ gram  # c, of the rows at work
    for _ in range(_MOST_SWAPS):
        w, v, kept = target[rows], values[rows], mask[rows]
        # What restoring or pruning one weight alone would cost.
        restore = ((diagonal * w - 2 * correlation) * w).masked_fill_(kept, torch.inf)
        remove = ((diagonal * v + 2 * correlation) * v).masked_fill_(~kept, torch.inf)
        if pattern.m is None:
            change, p, u = _best_of_row(restore, remove, w, v, gram)
        else:
            change, p, u = _best_of_groups(restore, remove, w, v, gram, pattern.m)
        # Below the rounding of the sums a gain is none; without this two weights could be swapped for ever.
        better = change < -1e-6 * (w * w * diagonal).sum(1)
        if not bool(better.any()):
            break
        rows, p, u, correlation = rows[better], p[better], u[better], correlation[better]
        restored, removed = target[rows, p], values[rows, u]
        correlation += removed.unsqueeze(1) * gram[u] - restored.unsqueeze(1) * gram[p]
        values[rows, p], values[rows, u] = restored, 0.0
        mask[rows, p], mask[rows, u] = True, False
    return values.to(pruned.dtype), mask


_Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _best_of_groups(
    restore: torch.Tensor, remove: torch.Tensor, w: torch.Tensor, v: torch.Tensor, gram: torch.Tensor, m: int
) -> _Best:
    """For each row the best change of its error by a pair within a group of m, and the columns p and u, [rows]."""
    columns = torch.arange(gram.shape[0], device=gram.device).view(-1, m)
    inside = gram[columns.unsqueeze(2), columns.unsqueeze(1)]  # [groups, m, m]
    best = restore.new_full((len(restore),), torch.inf)
    place = torch.zeros(len(restore), dtype=torch.long, device=gram.device)
    for first in range(m):  # the place of p in its group
        p = columns[:, first]
        change = restore[:, p].unsqueeze(2) + remove.unflatten(1, (-1, m))
        change -= 2 * w[:, p].unsqueeze(2) * v.unflatten(1, (-1, m)) * inside[:, first]
        lowest, at = change.flatten(1).min(1)
        better = lowest < best
        best = torch.where(better, lowest, best)
        place = torch.where(better, at * m + first, place)
    return best, place // m // m * m + place % m, place // m


def _best_of_row(
    restore: torch.Tensor, remove: torch.Tensor, w: torch.Tensor, v: torch.Tensor, gram: torch.Tensor
) -> _Best:
    """As `_best_of_groups`, of the pairs of the best candidates of the whole row."""
    number = min(_CANDIDATES, gram.shape[0])
    gains, p = restore.topk(number, dim=1, largest=False)
    losses, u = remove.topk(number, dim=1, largest=False)
    best, first, second = [], [], []
    for part in torch.arange(len(w), device=w.device).split(max(1, _PAIR_ELEMENTS // number**2)):
        change = gains[part].unsqueeze(2) + losses[part].unsqueeze(1)
        pairs = gram[p[part].unsqueeze(2), u[part].unsqueeze(1)]
        change -= 2 * w[part].gather(1, p[part]).unsqueeze(2) * v[part].gather(1, u[part]).unsqueeze(1) * pairs
        lowest, at = change.flatten(1).min(1)
        best.append(lowest)
        first.append(p[part].gather(1, (at // number).unsqueeze(1)).squeeze(1))
        second.append(u[part].gather(1, (at % number).unsqueeze(1)).squeeze(1))
    return torch.cat(best), torch.cat(first), torch.cat(second)
