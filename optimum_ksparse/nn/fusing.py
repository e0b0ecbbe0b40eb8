"""Sparse layers that read the same input, as q, k and v, or gate and up, run as one product.

The layers stay what they are: their packed weights become rows of one tensor that the group holds, so that neither the
checkpoint nor the memory changes, and the product of that tensor gives all their outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import kernels
from .linear import SparseLinear


class FusedGroup:
    """Layers that read the same input. The first that is called computes for all; the others take their share if they
    are called with the same tensor, and compute alone otherwise.

    Args:
        members: in the order in which they are called; in_features, pattern, dtype and device are the same, and all
            have a bias or none has.
    """

    def __init__(self, members: list[SparseLinear]) -> None:
        self.members = members
        self.sizes = [member.out_features for member in members]
        self._joined: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """The output of a member, by its number; None where it must compute alone."""
        if x is self._input and index in self._outputs:
            y = self._outputs.pop(index)
            if not self._outputs:
                self._input = None
            return y
        if not self._join():
            self._input, self._outputs = None, {}
            return None
        assert self._joined is not None
        values, bits, bias = self._joined
        first = self.members[0]
        weight = kernels.PackedWeight(values, bits, first.in_features, str(first.pattern))
        y = kernels.apply(x, weight, bias, first.kernel, self.sizes)
        parts = dict(enumerate(y.split(self.sizes, -1)))
        mine = parts.pop(index)
        self._input, self._outputs = x, parts
        return mine

    def part(self) -> None:
        """Forgets the joined weight, as where members move or load; it is joined again when it is next needed."""
        self._joined, self._input, self._outputs = None, None, {}

    def _join(self) -> bool:
        """Makes the members' weights rows of one tensor, where they are not. False where that cannot be."""
        if torch.compiler.is_compiling():
            return self._joined is not None
        if self._joined is not None and self._is_joined():
            return True
        self.part()
        first = self.members[0]
        weights = [member.weight for member in self.members]
        alike = all(w.dtype == first.weight.dtype and w.device == first.weight.device for w in weights)
        if not alike or any(w.is_meta or type(w.data) is not torch.Tensor for w in weights):
            return False
        values = torch.cat([weight.detach() for weight in weights])
        bits = torch.cat([member.weight_mask for member in self.members])
        rows = zip(self.members, values.split(self.sizes), bits.split(self.sizes), strict=True)
        for member, own_values, own_bits in rows:
            member.weight.data, member.weight_mask = own_values, own_bits
        # Biases are small: a copy of them is kept, and made anew where one of them changes.
        bias = None if first.bias is None else torch.cat([member.bias.detach() for member in self.members])
        self._joined = values, bits, bias
        self._biases = self._bias_state()
        return True

    def _is_joined(self) -> bool:
        assert self._joined is not None
        values, bits, _ = self._joined
        at_values, at_bits = values.data_ptr(), bits.data_ptr()
        for member in self.members:
            if member.weight.data_ptr() != at_values or member.weight_mask.data_ptr() != at_bits:
                return False
            at_values += member.weight.nbytes
            at_bits += member.weight_mask.nbytes
        return self._biases == self._bias_state()

    def _bias_state(self) -> list[tuple[int, int]]:
        biases = [member.bias for member in self.members if member.bias is not None]
        return [(bias.data_ptr(), 0 if bias.is_inference() else bias._version) for bias in biases]


def fuse_shared_inputs(root: nn.Module, run: Callable[[], Any]) -> list[list[str]]:
    """Fuses the sparse layers under `root` that read the same input.

    Args:
        run: makes a small forward pass, by which it is found out which layers read what, and then that fused layers
            give the same outputs to the bit; a tensor, or a tuple of tensors, comes back.

    Returns:
        The names of the layers of each group. Unstructured patterns, layers that accelerate offloads, and layers of
        different kinds stay apart.
    """
    unfuse(root)
    with torch.no_grad():
        expected, inputs = _watched(root, run)
        groups = _groups(root, inputs)
        for names in groups:
            _fuse(root, names)
        if groups and not _same(run, expected):
            # Rare (a model that changes an input in place, say): find out which group it is.
            unfuse(root)
            groups = [names for names in groups if _fuses_alone(root, names, run, expected)]
            for names in groups:
                _fuse(root, names)
    return groups


def unfuse(root: nn.Module) -> None:
    """Lets every sparse layer under `root` compute alone, with a weight of its own."""
    for module in root.modules():
        if isinstance(module, SparseLinear) and module._group is not None:
            module._group[0].part()
            module._group = None
            module.weight.data, module.weight_mask = module.weight.data.clone(), module.weight_mask.clone()


def _watched(root: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """What `run` returns, and the tensors that each sparse layer was called with, in the order of the calls."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in root.named_modules():
        if isinstance(module, SparseLinear):

            def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                inputs.setdefault(name, []).append(args[0])

            hooks.append(module.register_forward_pre_hook(note))
    try:
        return run(), inputs
    finally:
        for hook in hooks:
            hook.remove()


def _groups(root: nn.Module, inputs: dict[str, list[torch.Tensor]]) -> list[list[str]]:
    """Layers of one parent that were called once, with the same tensor, and are of one kind."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensors in inputs.items():
        module = root.get_submodule(name)
        assert isinstance(module, SparseLinear)
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        if len(tensors) == 1 and module.pattern.is_structured and not offloaded:
            weight = module.weight
            kind = module.in_features, str(module.pattern), weight.dtype, weight.device, module.bias is None
            groups.setdefault((name.rpartition(".")[0], id(tensors[0]), *kind), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _fuse(root: nn.Module, names: list[str]) -> None:
    members = [root.get_submodule(name) for name in names]
    group = FusedGroup(members)  # type: ignore[arg-type]
    for index, member in enumerate(members):
        member._group = (group, index)  # type: ignore[assignment]


def _fuses_alone(root: nn.Module, names: list[str], run: Callable[[], Any], expected: Any) -> bool:
    _fuse(root, names)
    same = _same(run, expected)
    unfuse(root)
    return same


def _same(run: Callable[[], Any], expected: Any) -> bool:
    try:
        found = run()
    except (RuntimeError, ValueError):  # a view that needs contiguous memory, say
        return False
    pairs = zip(*([one] if isinstance(one, torch.Tensor) else one for one in (found, expected)), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)
