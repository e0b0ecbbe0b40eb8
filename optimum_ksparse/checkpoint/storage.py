"""Sparse models on disk: names, shapes and dtypes of packed and dense storage, and dense storage read back.

| key in a packed checkpoint | shape | dtype |
|---|---|---|
| `<layer>.weight` | n:m: [out, in·n/m]; unstructured: [nnz] | the model's |
| `<layer>.weight_mask` | [out, ceil(in/8)] | uint8 |
| `<layer>.weight_scale`, of quantised values | [out, ceil(in / group_size)] | the model's |
| `<layer>.bias` | [out] | the model's |

Quantised values are integers, of other dtypes and shapes (table in `quantization`). Experts stacked in one parameter
have `<parameter>.weight`, `<parameter>.weight_mask` and `<parameter>.weight_scale`, with the number of the expert as
one more dimension before these. A parameter that is stored transposed, [experts, in, out] (GPT-OSS, Llama 4, Aria), is
packed as [experts, out, in]: its shapes are those of the table, and patterns lie along the inputs as everywhere; only
the dense form has the parameter's own layout. Which it is follows from the model's class and is not recorded.

A packed checkpoint names all its tensors as the model's modules do, which `names="modules"` in its config records:
the renamings and conversions by which transformers stores some families are for dense tensors. Earlier versions
renamed, but stacked experts; what they wrote is read in the same way.

A dense checkpoint holds its tensors as any other model does, with their zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.distributed.utils import is_dtensor

from ..blocks import ExpertStack, decoder_of
from ..nn import SparseExperts, SparseLinear, dense_weight
from ..pattern import Pattern, lowest
from ..records import COMPRESSED_TENSORS
from .bitmask import compressed_state_dict
from .modules import (
    MASK_SUFFIX,
    SCALE_SUFFIX,
    aligned,
    dense_layer,
    is_offloaded,
    replace_module,
    sparse_experts,
    sparse_modules,
    stored_name,
)


def storage_state_dict(
    model: PreTrainedModel, root: str, state: Mapping[str, torch.Tensor], elsewhere: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """`state`, that of the submodule `root` of a model by names in the model, as `save_pretrained` would store it:
    packed, dense or for compressed-tensors, in the form and by the names of the checkpoints of this architecture,
    without what is stored `elsewhere` under another name."""
    settings: Any = getattr(model.config, "quantization_config", None)
    stored = dict(state)
    if settings is not None and settings.storage == "dense":
        stored = {f"{root}.{name}": tensor for name, tensor in dense_state_dict(model.get_submodule(root)).items()}
    elif settings is not None and settings.storage == COMPRESSED_TENSORS:
        stored = compressed_state_dict(model, root, state)
    stored = {name: tensor for name, tensor in stored.items() if name not in elsewhere}
    if settings is not None and settings.storage == "packed":
        return stored
    with dense_shapes(model):
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, stored)
    return reverted


@contextmanager
def dense_shapes(model: PreTrainedModel) -> Iterator[None]:
    """Within it transformers, when it converts dense tensors for a checkpoint, finds sparse experts where it asks for
    the shape of the parameter whose place they have."""

    def get_parameter(target: str) -> Any:
        return experts[target] if target in experts else type(model).get_parameter(model, target)

    experts = sparse_experts(model)
    vars(model)["get_parameter"] = get_parameter
    try:
        yield
    finally:
        del vars(model)["get_parameter"]


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict with every packed weight written out dense, in the layout of the module it came from."""
    state = dict(model.state_dict())
    for path, module in sparse_modules(model).items():
        name = stored_name(path)
        del state[f"{name}.weight"], state[f"{name}{MASK_SUFFIX}"]
        state.pop(f"{name}{SCALE_SUFFIX}", None)
        with aligned(module):
            dense = module.to_dense()
        if isinstance(dense, nn.Parameter):
            state[name] = dense.detach()
        else:
            state |= {f"{name}.{key}": tensor for key, tensor in dense.state_dict().items()}
    return state


def sparsify_dense(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes sparse modules of the layers of a dense checkpoint whose weights hold the zeros of a recorded pattern.

    Raises:
        ValueError: the weights do not have the recorded pattern (any more); names the layer. The model is not changed.
    """
    decoder, kind = decoder_of(model), type(model).__name__
    if is_offloaded(decoder):
        raise ValueError("accelerate has offloaded weights of it: store it packed, or load it without that")
    if any(map(is_dtensor, decoder.parameters())):
        raise ValueError("its weights are spread over processes: store it packed, or load it in one process")
    dense = {name: dense_layer(decoder, name, kind) for name in layers}
    for name, layer in dense.items():
        _kept(_weight(layer), layers[name], name)
    for name, layer in dense.items():
        mask, pattern = _kept(_weight(layer), layers[name], name), Pattern(layers[name]["pattern"])
        if isinstance(layer, ExpertStack):
            sparse: Any = SparseExperts.from_dense(layer.matrices, mask, pattern, layer.is_transposed)
        else:
            sparse = SparseLinear.from_dense(layer, mask, pattern)
        replace_module(decoder, name, sparse)


def _weight(layer: nn.Module | ExpertStack) -> torch.Tensor:
    """[out, in], or [experts, out, in]."""
    return layer.matrices if isinstance(layer, ExpertStack) else dense_weight(layer)


def _kept(weight: torch.Tensor, record: Mapping[str, Any], name: str) -> torch.Tensor:
    """The mask of a weight [out, in], or a stack of them, that holds the zeros of a recorded pattern. A kept weight
    may be zero: groups are filled up to n, and matrices of a stack, which are packed alike, to the same number; any
    other unstructured mask needs no filling.

    Raises:
        ValueError: it does not have that pattern.
    """
    pattern = Pattern(record["pattern"])
    for matrix in weight if weight.dim() == 3 else [weight]:
        pattern.verify(matrix, f"{name}.weight")
    if pattern.is_semi_structured or pattern.tile is not None:
        return pattern.mask(weight.abs())
    mask = weight != 0
    if weight.dim() == 3:
        flat, zeros = weight.abs().flatten(1), (weight.numel() - record["num_values"]) // len(weight)
        filled = ~lowest(flat, zeros).view_as(weight)
        if bool((mask & ~filled).any()):
            raise ValueError(f"{name}: a matrix has more nonzero weights than the recorded {flat.shape[1] - zeros}")
        mask = filled
    return mask
