"""How layers that read the same input run as one product (`fusing` finds them).

They stay what they are: their packed weights become rows of one tensor, so that neither the checkpoint nor the memory
changes, and the product of that tensor gives all their outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import kernels

if TYPE_CHECKING:
    from .linear import SparseLinear

# What a group keeps joined: values, masks, and biases where there are some.
_Joined = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class FusedGroup:
    """What layers of one input share. The one that is called first in a forward pass, number 0, computes for all; the
    others take their share if they are called with the same tensor, and compute alone otherwise.

    Attributes:
        sizes: rows of each layer, in the order in which they are called.
        is_dissolved: whether the layers run alone from now on.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.is_dissolved = False
        self._is_joined = False  # apart from the tensors, which a compiled graph must not depend on
        self._joined: _Joined | None = None
        self._addresses: list[int] = []
        # The input (weakly: what an exception leaves behind goes with it), its version, and what was not taken yet. It
        # is replaced as a whole: threads that run the same model never take each other's outputs.
        self._left: tuple[Any, int | None, dict[int, torch.Tensor]] | None = None

    def output(self, index: int, x: torch.Tensor, members: tuple[SparseLinear, ...]) -> torch.Tensor | None:
        """The output of layer `index` for x [..., in]; None where it must compute alone. `members`: for number 0, all
        layers."""
        # The meta device has no autocast.
        if self.is_dissolved or x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
            return None
        if index:
            return self._take(index, x)
        self._left = None
        y = self._compute(x, members) if _run_alike(members) else None
        if y is None:
            return None
        outputs = dict(enumerate(y.split(self.sizes, -1)))
        mine = outputs.pop(0)
        if torch.compiler.is_compiling():
            self._left = x, None, outputs
        else:
            version = None if x.is_inference() else x._version
            self._left = weakref.ref(x, self._forget), version, outputs
        return mine

    def part(self) -> None:
        """Forgets the joined tensors, as where layers move or load; they are joined again when they next run."""
        self._joined, self._is_joined, self._left = None, False, None

    def _compute(self, x: torch.Tensor, members: tuple[SparseLinear, ...]) -> torch.Tensor | None:
        first = members[0]
        pattern = str(first.pattern)
        if torch.compiler.is_compiling():
            if not self._is_joined:
                return None
            biases = [] if first.bias is None else [member.bias for member in members]
            values, bits = [member.weight for member in members], [member.weight_mask for member in members]
            return kernels.fused_linear(x, values, bits, biases, first.in_features, pattern, first.kernel)
        joined = self._join(members) if kernels.runs_plainly(x) and _has_kernels(first) else None
        if joined is None:
            return None
        weight = kernels.PackedWeight(joined[0], joined[1], first.in_features, pattern)
        return kernels.compute_fused(x, weight, joined[2], first.kernel, self.sizes)

    def _take(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        left = self._left
        if left is None:
            return None
        source, version, outputs = left
        if isinstance(source, weakref.ref):
            source = source()
        if source is not x or (version is not None and x._version != version):
            return None
        y = outputs.pop(index, None)
        if not outputs and self._left is left:
            self._left = None
        return y

    def _forget(self, reference: object) -> None:
        if self._left is not None and self._left[0] is reference:
            self._left = None

    def _join(self, members: tuple[SparseLinear, ...]) -> _Joined | None:
        """Makes the layers' tensors rows of one, where they are not. None where that cannot be."""
        columns: list[Sequence[torch.Tensor]]
        columns = [[member.weight for member in members], [member.weight_mask for member in members]]
        biases = [member.bias for member in members if member.bias is not None]
        columns += [biases] if biases else []
        addresses = [tensor.data_ptr() for column in columns for tensor in column]
        if self._joined is not None and addresses == self._addresses:
            return self._joined
        self.part()
        if not all(_can_join(column, len(members)) for column in columns):
            return None
        # Tensors that are made in inference mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            joined = [_rows_of_one(column, self.sizes) for column in columns]
            for column, whole in zip((columns[0], *columns[2:]), (joined[0], *joined[2:]), strict=True):
                for parameter, own in zip(column, whole.split(self.sizes), strict=True):
                    parameter.data = own
            for member, own in zip(members, joined[1].split(self.sizes), strict=True):
                member.weight_mask = own
        self._joined = joined[0], joined[1], joined[2] if biases else None
        self._is_joined = True
        self._addresses = [tensor.data_ptr() for whole in joined for tensor in whole.split(self.sizes)]
        return self._joined


def _run_alike(members: Sequence[SparseLinear]) -> bool:
    """Whether the layers would compute in one way: a hook before one of them may change its weight or input."""
    first = members[0]
    return all(
        member.kernel == first.kernel
        and member._formed is None
        and member._dense_weight is None
        and not member._forward_pre_hooks
        for member in members
    )


def _has_kernels(layer: SparseLinear) -> bool:
    """Whether one product could ever give the same bits: libraries, on the CPU for one, choose the order of a sum by
    the shape, and do not tell."""
    return kernels.KERNELS["gemv"].why_not(layer.packed().problem(1)) is None


def _can_join(tensors: Sequence[torch.Tensor], number: int) -> bool:
    """Not where accelerate has offloaded some, nor where the model was made in inference mode: such parameters cannot
    take the memory of ordinary tensors."""
    first = tensors[0]
    return len(tensors) == number and all(
        tensor.dtype == first.dtype
        and tensor.device == first.device
        and tensor.shape[1:] == first.shape[1:]
        and not tensor.is_meta
        and not tensor.is_inference()
        and type(tensor.data) is torch.Tensor
        for tensor in tensors
    )


def _rows_of_one(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    whole = kernels.below_each_other([tensor.detach() for tensor in tensors])
    return torch.cat([tensor.detach() for tensor in tensors]) if whole is None else whole
