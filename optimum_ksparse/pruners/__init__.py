"""One file a method, pure tensor maths: `(weight, statistics, pattern, **settings) -> (weight, mask)`.

`weight` is [out, in] in any floating dtype and is not changed; `statistics` are those of its inputs, and `pattern`
says what to keep. The returned weight [out, in] has the dtype of `weight` and is zero where the returned mask ([out,
in], bool, True = kept) is False. A method says by `note` what the user should know, such as a raised damping; the
block loop writes it into the report. To add a method: its file, its line in `METHODS`, a test; flags, help, checks,
the README's table and the card's citation come from these. `sweep` and `sweep_kernel` are the inner loop of SparseGPT,
in torch and for a GPU; `scaled` is what `admm` and `alps` share; `solve` and `swaps` are what `refine` lets follow on
any of them, `rounding` makes integers of what is kept at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..pattern import Pattern
from . import admm, alps, existing, magnitude, solve, sparsegpt, swaps, wanda
from .notes import collected_notes
from .settings import Setting, settings_of
from .statistics import ColumnNorms, GramMatrix


@dataclass(frozen=True)
class Method:
    """A pruning method: its function, the statistics it reads, and over what it ranks an unstructured pattern. Where
    it takes the zeros that a weight has, what finds their pattern (None: the weight is dense). The least share of a
    sample's first position in the statistics: every later one attends to it, so that its errors are read by all."""

    prune: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    statistics: type[ColumnNorms] | None
    scope: str
    recognise: Callable[[torch.Tensor], Pattern | None] | None = None
    first_position_share: float = 0

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The keyword settings that the method takes: keys of `SparsityConfig(method_settings=...)`, and flags."""
        return settings_of(self.prune)

    @property
    def summary(self) -> str:
        """What it does, for help texts and tables: the first sentence of its file, behind the method's name."""
        sentence = str(inspect.getdoc(inspect.getmodule(self.prune))).split(". ")[0].removesuffix(".")
        return " ".join(sentence.partition(": ")[2].split())

    @property
    def citation(self) -> str:
        """The BibTeX entry of its paper, `CITATION` in its file."""
        return str(getattr(inspect.getmodule(self.prune), "CITATION", ""))


METHODS = {
    "magnitude": Method(magnitude.prune, None, "whole layer"),
    "wanda": Method(wanda.prune, ColumnNorms, "output row"),
    "sparsegpt": Method(sparsegpt.prune, GramMatrix, "block of columns over all rows"),
    "admm": Method(admm.prune, GramMatrix, "output row", first_position_share=0.1),
    "alps": Method(alps.prune, GramMatrix, "whole layer"),
    "existing": Method(existing.prune, None, "nothing", existing.recognise),
}
# What may follow any method, on the same statistics: the best weights on its mask, or a better mask.
REFINEMENTS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"exact": solve.exact, "swaps": swaps.swap}


def statistics_of(method: str, refine: Sequence[str] = (), quantised: bool = False) -> type[ColumnNorms] | None:
    """The statistics that a method with refinements reads, and the rounding that may follow; None where no data are
    read."""
    statistics = METHODS[method].statistics
    return GramMatrix if refine or (quantised and statistics is not None) else statistics


def prune(
    method: str,
    weight: torch.Tensor,
    statistics: ColumnNorms | None,
    pattern: Pattern,
    *,
    refine: Sequence[str] = (),
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes `weight` [out, in] by a method and then by each refinement in its turn.

    Args:
        method: one of `METHODS`.
        statistics: of the inputs, of the class that `statistics_of` gives.
        refine: of `REFINEMENTS`.
        settings: of the method; those that are left out have its defaults.
    """
    pruned, mask = METHODS[method].prune(weight, statistics, pattern, **settings)
    for name in refine:
        pruned, mask = REFINEMENTS[name](weight, statistics, pattern, pruned, mask)
    return pruned, mask
