"""An order of a layer's input channels that lets `n:m` keep more: channels whose scores are high in the same rows go
into different groups."""

from __future__ import annotations

import torch

from .scaled import cholesky_factor, scale
from .statistics import ColumnNorms, GramMatrix

_DAMPING = 0.01
_SWEEPS = 4
_GROUPS = 1024  # that are dealt with at a time: an assignment takes groups³
_WORK = 2**30  # rows · groups², of a slot: more rows are sampled


def importance(weight: torch.Tensor, statistics: ColumnNorms) -> torch.Tensor:
    """What a layer loses by each weight, [out, in] float32: W²·diag H, Wanda's score squared, or with a Gram matrix
    W² / diag H⁻¹, SparseGPT's. `weight` [out, in] in any floating dtype."""
    if not isinstance(statistics, GramMatrix):
        return weight.float().square() * statistics.squared_norms.to(weight.device)
    problem = scale(weight, statistics, _DAMPING)
    return problem.weight.square() / torch.cholesky_inverse(cholesky_factor(problem.gram)).diagonal()


def best_order(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Which column each place takes, [columns], so that groups of m neighbours keep much of `scores` [rows, columns]
    with their n largest in each row.

    Columns are dealt out by their sums, the largest first into different groups. Then, place after place, the columns
    that have it in all groups are assigned anew by what each would add to each group, Σ_i max(0, S_ic − t_ig) with
    t_ig the n-th largest of the others in row i (Zhang et al., Plug-and-Play, ICLR 2024). An order that keeps no more
    than the one that was there is not taken.

    m must divide the number of columns, and n be less than m.
    """
    columns = scores.shape[1]
    members = scores.sum(0).argsort(descending=True, stable=True).view(m, -1)  # [place, group]
    members[1::2] = members[1::2].flip(1)
    parts = [_swept(scores, part, n) for part in members.split(_GROUPS, dim=1)]
    found = torch.cat(parts, dim=1)
    as_it_is = torch.arange(columns, device=scores.device).view(-1, m).T
    return (found if _kept(scores, found, n) > _kept(scores, as_it_is, n) else as_it_is).T.flatten()


def _swept(scores: torch.Tensor, members: torch.Tensor, n: int) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment

    m, groups = members.shape
    scores = scores[:: max(1, len(scores) * groups**2 // _WORK)]
    members, last = members.clone(), _kept(scores, members, n)
    for _ in range(_SWEEPS):
        for place in range(m):
            others = members[torch.arange(m, device=members.device) != place]
            threshold = scores[:, others].topk(n, dim=1).values[:, -1]  # [rows, groups]
            gain = scores.new_zeros(groups, groups)  # [column, group]
            for columns, least in zip(scores[:, members[place]].split(8), threshold.split(8), strict=True):
                gain += (columns[:, :, None] - least[:, None]).relu_().sum(0)
            _, column = linear_sum_assignment(gain.T.cpu().numpy(), maximize=True)
            members[place] = members[place][torch.as_tensor(column, device=members.device)]
        kept = _kept(scores, members, n)
        if kept < 1.001 * last:
            break
        last = kept
    return members


def _kept(scores: torch.Tensor, members: torch.Tensor, n: int) -> float:
    return float(scores[:, members].topk(n, dim=1).values.sum(dtype=torch.float64))
