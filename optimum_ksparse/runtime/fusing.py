"""Finding the sparse layers that read the same input, as q, k and v, or gate and up, and letting them run as one
product (`group`). What a model does is looked at, never its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..nn.group import FusedGroup
from ..nn.linear import SparseLinear

logger = logging.get_logger(__name__)

# The tensors that each layer was called with, and their versions, in the order of the calls.
_Inputs = dict[str, list[tuple[torch.Tensor, int | None]]]


def fuse_shared_inputs(root: nn.Module, run: Callable[[], Any]) -> list[list[str]]:
    """Fuses the sparse layers under `root` that read the same input.

    Args:
        run: makes a small forward pass, by which it is found out which layers read what, and then that fused layers
            give the same outputs to the bit; returns tensors, in containers of any kind.

    Returns:
        The names of the layers of each group. Unstructured patterns, layers that are called more than once, layers
        that accelerate offloads, and layers of different kinds stay apart, and so does a group with which `run` gives
        other outputs or fails.
    """
    unfuse(root)
    with torch.no_grad():
        expected, inputs = _watched(root, run)
        groups = _groups(root, inputs)
        inputs.clear()
        try:
            if _work(root, groups, run, expected):
                return groups
            # Rare, as for a model that changes an input in place: find out which groups it is.
            return [names for names in groups if _work(root, [names], run, expected)]
        except BaseException:  # interrupted
            unfuse(root)
            raise


def unfuse(root: nn.Module) -> None:
    """Lets every sparse layer under `root` compute alone, with a weight of its own. Layers elsewhere that ran together
    with one of these do so no longer."""
    for module in root.modules():
        if isinstance(module, SparseLinear) and module._group is not None:
            group, _ = module._group
            group.part()
            group.is_dissolved = True
            module._group, module._followers = None, ()
            _own_memory(module)


def _own_memory(layer: SparseLinear) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None and _is_part(parameter):
                parameter.data = parameter.detach().clone()
        if _is_part(layer.weight_mask):
            layer.weight_mask = layer.weight_mask.clone()


def _is_part(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes


def _watched(root: nn.Module, run: Callable[[], Any]) -> tuple[Any, _Inputs]:
    """What `run` returns, and the inputs of the sparse layers."""
    inputs: _Inputs = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            inputs.setdefault(name, []).append((x, None if x.is_inference() else x._version))

        return hook

    layers = [(name, module) for name, module in root.named_modules() if isinstance(module, SparseLinear)]
    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers]
    try:
        return run(), inputs
    finally:
        for hook in hooks:
            hook.remove()


def _groups(root: nn.Module, inputs: _Inputs) -> list[list[str]]:
    """Layers of one parent that were called once, with the same tensor, and are of one kind."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, calls in inputs.items():
        module = root.get_submodule(name)
        assert isinstance(module, SparseLinear)
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        if len(calls) == 1 and module.pattern.is_semi_structured and not offloaded and not module.weight.is_meta:
            ((x, version),) = calls
            weight = module.weight
            kind = module.in_features, str(module.pattern), weight.dtype, weight.device, module.bias is None
            groups.setdefault((name.rpartition(".")[0], id(x), version, *kind), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _work(root: nn.Module, groups: list[list[str]], run: Callable[[], Any], expected: Any) -> bool:
    """Fuses these groups too. Whether `run` then gives what is expected; where it does not, they are apart again."""
    for names in groups:
        _fuse(root, names)
    try:
        found = run() if groups else expected
        pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
        if all(_are_equal(*pair) for pair in pairs if isinstance(pair[0], torch.Tensor)):
            return True
    except Exception as error:  # a view that needs contiguous memory, say
        logger.debug(f"{groups} do not run as one product each: {error}")
    for names in groups:
        for name in names:
            unfuse(root.get_submodule(name))
    return False


def _fuse(root: nn.Module, names: list[str]) -> None:
    members = [module for name in names if isinstance(module := root.get_submodule(name), SparseLinear)]
    group = FusedGroup([member.out_features for member in members])
    for index, member in enumerate(members):
        member._group = (group, index)
    members[0]._followers = tuple(members[1:])


def _are_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.is_meta:
        return True
    return left.shape == right.shape and torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
