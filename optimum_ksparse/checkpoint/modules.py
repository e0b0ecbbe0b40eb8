"""Sparse modules in a model and in accelerate's keeping: found, made empty for a checkpoint, put in others' places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..blocks import ExpertStack, decoder_of, use_eager_experts
from ..nn import SparseExperts, SparseLinear, is_linear_map, onloaded
from ..pattern import Pattern

MASK_SUFFIX, SCALE_SUFFIX = ".weight_mask", ".weight_scale"
SparseModule = SparseLinear | SparseExperts
_WRAPPER = re.compile(r"\b_(checkpoint|fsdp)_wrapped_module\.")


def sparse_modules(root: nn.Module) -> dict[str, SparseModule]:
    """All sparse modules under `root` by path."""
    return {name: module for name, module in root.named_modules() if isinstance(module, SparseModule)}


def sparse_layers(root: nn.Module) -> dict[str, SparseLinear]:
    """All sparse linear maps under `root` by path."""
    return {name: module for name, module in sparse_modules(root).items() if isinstance(module, SparseLinear)}


def sparse_experts(root: nn.Module) -> dict[str, SparseExperts]:
    """All sparse stacks of matrices under `root` by path."""
    return {name: module for name, module in sparse_modules(root).items() if isinstance(module, SparseExperts)}


def stored_name(name: str) -> str:
    """The name in a state dict of a module, or a tensor, that PyTorch has wrapped for FSDP or to recompute
    activations: these wrappers leave no trace there."""
    return _WRAPPER.sub("", name)


def logical_parameters(model: PreTrainedModel) -> int:
    """How many parameters the model has, the zeros that its sparse modules do not store included."""
    modules = sparse_modules(model).values()
    stored = sum(p.numel() for module in modules for name, p in module.named_parameters() if name != "bias")
    return int(model.num_parameters()) - stored + sum(module.shape.numel() for module in modules)


def install_layers(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]], **quantisation: Any) -> None:
    """Puts an empty sparse module on the meta device in the place of each layer that a checkpoint records.

    Args:
        quantisation: that of `SparsityConfig`.

    Raises:
        ValueError: a record names no linear map or stack of matrices of the model, or cannot be true of its shape.
    """
    decoder = decoder_of(model)
    for name, record in layers.items():
        dense = dense_layer(decoder, name, type(model).__name__)
        try:
            sparse = empty_like(dense, Pattern(record["pattern"]), record["num_values"], "meta", **quantisation)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's record of layer {name} cannot be right: {error}") from error
        # transformers initialises what it has not loaded, by rules for dense weights; here everything must be loaded.
        sparse._is_hf_initialized = True  # type: ignore[assignment]
        put(decoder, name, sparse)
    if sparse_experts(decoder):
        use_eager_experts(model)


def empty_like(
    layer: nn.Module | ExpertStack, pattern: Pattern, num_values: int, device: str | None = None, **quantisation: Any
) -> SparseModule:
    """A sparse module that stands for a linear map, or for a parameter [experts, out, in], dense or sparse itself,
    with a weight still to be filled in; on its device or on another one; with the `quantisation` of `SparsityConfig`.
    Raises ValueError where `num_values` cannot be right."""
    if isinstance(layer, nn.Module) and not isinstance(layer, SparseExperts):
        return SparseLinear.empty_like(layer, pattern, num_values, device, **quantisation)
    if isinstance(layer, ExpertStack):
        shape, dtype, transposed = layer.matrices.shape, layer.weight.dtype, layer.is_transposed
    else:
        shape, dtype, transposed = layer.shape, layer.dtype, layer.transposed
    options: dict[str, Any] = {"dtype": dtype, "device": device or layer.weight.device, **quantisation}
    return SparseExperts(shape, pattern=pattern, num_values=num_values, transposed=transposed, **options)


def dense_layer(decoder: nn.Module, name: str, kind: str) -> nn.Module | ExpertStack:
    """What a record of a sparse layer stands for: a linear map, or a parameter [experts, out, in]; it may be sparse
    already."""
    owner, _, attribute = name.rpartition(".")
    try:
        holder = decoder.get_submodule(owner)
        dense: Any = holder._modules.get(attribute, holder._parameters.get(attribute))
    except AttributeError:
        dense = None
    if is_linear_map(dense) or isinstance(dense, SparseExperts):
        return dense
    if isinstance(dense, nn.Parameter) and dense.dim() == 3:
        return ExpertStack(holder, attribute)
    raise ValueError(
        f"the checkpoint records a sparse layer {name}, where {kind} has "
        f"{'nothing' if dense is None else type(dense).__name__}; is it for another model?"
    )


def stored_tensors(root: nn.Module, fetch: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that belong into a checkpoint, by name; under each of its names what has several. What
    accelerate has offloaded is on the meta device, or read where `fetch` is set."""
    for path, module in root.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), onloaded(module, name) if fetch else tensor


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model elsewhere, and brings them in for a forward pass alone."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def is_elsewhere(model: nn.Module) -> bool:
    """Whether some weights of the model are neither in it nor in accelerate's keeping."""
    return not is_offloaded(model) and any(tensor.is_meta for _, tensor in stored_tensors(model))


def aligned(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, the parameters of a module that accelerate has offloaded are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def put(root: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    """Puts `new` in the place of `root`'s submodule or parameter `name`."""
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    if isinstance(new, nn.Parameter) or attribute in owner._parameters:
        delattr(owner, attribute)  # a module does not take a parameter's place, nor the other way round
    setattr(owner, attribute, new)
    if isinstance(new, SparseExperts):  # in one order, whatever order they come in: the fingerprint follows it
        for stack in sorted(key for key, module in owner._modules.items() if isinstance(module, SparseExperts)):
            owner._modules[stack] = owner._modules.pop(stack)


def replace_module(root: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    """Puts `new` in the place of `root`'s submodule or parameter `name`. Where accelerate moves that one's inputs to
    its device, it moves the new one's too. Raises ValueError where accelerate has offloaded it."""
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    old: Any = getattr(owner, attribute)
    hooked = owner if isinstance(old, nn.Parameter) else old
    hook = getattr(hooked, "_hf_hook", None)
    if is_offloaded(hooked):
        raise ValueError(f"{name} is offloaded by accelerate: load the model without that")
    put(root, name, new)
    if hook is not None and not isinstance(new, nn.Parameter):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
