"""What to prune in a model: its linear maps and stacks of matrices, and why some of them cannot be pruned."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..blocks import DecoderBlocks, ExpertStack, find_read, find_routers
from ..blocks.experts import find_stacks
from ..config import SparsityConfig
from ..nn import SparseExperts, SparseLinear, dense_weight, is_linear_map
from ..pattern import Pattern
from ..pruners import METHODS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Layer = nn.Module | ExpertStack


def weight_of(layer: Layer) -> torch.Tensor:
    """The weight of a layer, [out, in] or [experts, out, in]; of a sparse one, with its zeros written out."""
    if isinstance(layer, SparseLinear | SparseExperts):
        return layer.to_dense_weight()
    return layer.matrices if isinstance(layer, ExpertStack) else dense_weight(layer)


def stored_bytes(layer: Layer) -> int:
    """Bytes of the weight of a layer as it is."""
    if isinstance(layer, SparseLinear | SparseExperts):
        return layer.packed_bytes
    return weight_of(layer).nbytes


def find_targets(blocks: DecoderBlocks, config: SparsityConfig) -> tuple[list[dict[str, Layer]], dict[str, str]]:
    """What to prune: for each block its linear maps and stacks of matrices by name, and the ones left dense (path in
    the decoder → reason). Layers that route tokens, and those whose weight the model reads by itself, stay dense
    without an error.

    Raises:
        ValueError: a linear map or a stack cannot be pruned and `skip_unsupported` is False, a name in
            `modules_to_not_convert` matches nothing, or nothing is left to prune.
    """
    recognises = METHODS[config.method].recognise is not None  # then no pattern has to fit
    pattern = None if recognises else Pattern(config.pattern)
    targets: list[dict[str, Layer]] = []
    skipped: dict[str, str] = {}
    read = find_read(blocks)
    candidates = [_candidates(block) for block in blocks.blocks]
    owners: dict[int, list[str]] = {}  # by the id of a weight: paths of the layers that use it
    for index, layers in enumerate(candidates):
        for name, layer in layers.items():
            owners.setdefault(id(layer.weight), []).append(blocks.name_in_decoder(index, name))
    for index, block in enumerate(blocks.blocks):
        targets.append({})
        routers = find_routers(blocks.model, block)
        for name, layer in candidates[index].items():
            path = blocks.name_in_decoder(index, name)
            if not should_convert_module(blocks.name_in_model(index, name), config.modules_to_not_convert):
                skipped[path] = "in modules_to_not_convert"
            elif path in read:
                skipped[path] = "the model reads its weight instead of calling it"
            elif name in routers and not config.prune_routers:
                skipped[path] = "it routes tokens to experts; prune_routers=True prunes it"
            elif (reason := _unsupported(layer, pattern, owners[id(layer.weight)], path)) is None:
                targets[index][name] = layer
            elif config.skip_unsupported or recognises:
                skipped[path] = reason
            else:
                raise ValueError(
                    f"{path} cannot be pruned: {reason}; leave it dense with modules_to_not_convert=[{name!r}], "
                    "or every such layer with skip_unsupported=True"
                )
    if not any(targets):
        where = f"{len(blocks.blocks)} x {type(blocks.blocks[0]).__name__} in {', '.join(blocks.list_names)}"
        raise ValueError(
            f"there is no linear map to prune in {where}" + (f", {len(skipped)} are left out" if skipped else "")
        )
    _check_names(blocks, candidates, config.modules_to_not_convert)
    return targets, skipped


def _candidates(block: nn.Module) -> dict[str, Layer]:
    """The linear maps and the stacks of a block by name; sparse ones too."""
    modules = block.named_modules(remove_duplicate=False)  # one module at two places is shared
    layers = {name: module for name, module in modules if is_linear_map(module) or isinstance(module, SparseExperts)}
    stacks = {name: stack for name, stack in find_stacks(block).items() if not isinstance(stack.owner, SparseExperts)}
    return {**layers, **stacks}


def _unsupported(layer: Layer, pattern: Pattern | None, owners: list[str], path: str) -> str | None:
    """Why a layer cannot be pruned; None where it can. `owners`: paths of all that use its weight."""
    if isinstance(layer, SparseLinear | SparseExperts):
        return None if pattern is None else "it is sparse already; model.dequantize() makes it dense"
    weight, each = weight_of(layer), "it"
    if isinstance(layer, ExpertStack):
        each = f"it is one parameter {list(weight.shape)}, a stack of matrices (such as fused experts), each of which"
        if weight.dim() != 3 or not layer.reads_matrices():
            return (
                f"{each} may be stored or multiplied in another way: {type(layer.owner).__name__} reads it neither "
                f"as F.linear(x, self.{layer.name}[expert]) nor as x @ self.{layer.name}[expert]"
            )
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; supported: float32, bfloat16, float16"
    if pattern is not None and (misfit := pattern.misfit(*weight.shape[-2:])) is not None:
        return f"{each} {misfit}"
    if not weight.is_meta and not bool(weight.isfinite().all()):
        return "its weight holds NaN or Inf"
    shared = [owner for owner in owners if owner != path]
    if shared:
        return f"it shares its weight with {shared[0]}"
    if isinstance(layer, ExpertStack) or _is_plain(layer):
        return None
    return f"{type(layer).__name__} computes something else than x·Wᵀ + b"


def _is_plain(linear: nn.Module) -> bool:
    """True where a subclass's own forward is still x·Wᵀ + b, tried on random inputs."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if dense_weight(linear).is_meta:  # still on the disk
        linear = _with_random_weights(linear)
    weight = dense_weight(linear)
    x = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = F.linear(x, weight, linear.bias)  # type: ignore[arg-type]
        try:
            output = linear(x)
        except Exception:  # it takes something else as well
            return False
        if not isinstance(output, torch.Tensor) or output.shape != expected.shape:
            return False
        return bool(torch.allclose(output, expected, rtol=0.05, atol=float(0.05 * expected.abs().max())))


def _with_random_weights(linear: nn.Module) -> nn.Module:
    tried = copy.copy(linear)
    tried.__dict__.pop("forward", None)  # accelerate leaves one that belongs to the module copied from
    tried._parameters = {}
    for name, parameter in linear._parameters.items():
        values = None if parameter is None else nn.Parameter(torch.rand(parameter.shape, dtype=parameter.dtype), False)
        tried._parameters[name] = values
    return tried


def _check_names(blocks: DecoderBlocks, candidates: list[dict[str, Layer]], names: list[str] | None) -> None:
    """Raises ValueError for a name that leaves nothing dense: most likely it is misspelt. What is outside the blocks
    (the output head) is dense anyway and may be named."""
    inside = {blocks.name_in_model(index, name) for index, layers in enumerate(candidates) for name in layers}
    outside = {name for name, _ in blocks.model.named_modules() if not f"{name}.".startswith(blocks.prefixes)}
    for name in names or []:
        if all(should_convert_module(module, [name]) for module in {*inside, *outside}):
            kinds = sorted({layer for layers in candidates for layer in layers})
            raise ValueError(f"modules_to_not_convert: {name!r} matches nothing; the blocks hold {', '.join(kinds)}")
