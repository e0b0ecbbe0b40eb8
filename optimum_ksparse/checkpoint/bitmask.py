"""Sparse checkpoints of compressed-tensors, whose values and bits are in our own order: reading them is renaming.

| tensor | `sparse-24-bitmask` | `sparse-bitmask` |
|---|---|---|
| `<layer>.compressed` | [out, in/2], our values | [nnz], our values |
| `<layer>.bitmask` | [out, ceil(in/8)] uint8, our bits | the same |
| `<layer>.shape` | [2, 1] int64: out, in | [2] int64 |
| `<layer>.row_offsets` | | [out] int64: where each row's values begin |

Everything else has the names and forms of the family's dense checkpoints. `storage="compressed-tensors"` writes them,
beside our own record in `config.json`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..blocks import decoder_of
from ..nn import SparseLinear, dense_weight, is_linear_map
from ..packing import check_bits, unpack_mask, values_shape
from ..pattern import Pattern
from ..pruners.existing import exact_groups, share_of_zeros
from ..records import BITMASK, COMPRESSED_TENSORS, TWO_OF_FOUR, printable
from .files import FLOATS, Header, read_headers
from .modules import MASK_SUFFIX, logical_parameters, sparse_layers, sparse_modules, stored_name

VALUES, BITS, SHAPE, OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"
BESIDE = (rf"\{SHAPE}$", rf"\{OFFSETS}$")  # what the model has no place for


def renamings() -> list[WeightRenaming]:
    """What makes our names of theirs; they come before those of the family."""
    return [WeightRenaming(rf"\{VALUES}$", ".weight"), WeightRenaming(rf"\{BITS}$", ".weight_mask")]


def read_layers(model: PreTrainedModel, files: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
    """The packed layers of a checkpoint: path in the decoder → pattern and number of values; none where all is dense.
    Their masks are read and checked, one at a time, before anything is made of them.

    Args:
        model: dense, on the meta device.
        files: the weight files of the checkpoint.

    Raises:
        ValueError: a layer is none of the decoder's linear maps, or a tensor of it is missing or cannot be right;
            names the tensor.
    """
    headers = read_headers(files)
    stored = sorted({name.rpartition(".")[0] for name in headers if name.endswith((BITS, VALUES))})
    has_offsets = any(name.endswith(OFFSETS) for name in headers)
    if not stored:
        return {}
    decoder = decoder_of(model)
    modules = dict(model.named_modules())
    root = next(name for name, module in modules.items() if module is decoder)
    with ExitStack() as stack:
        opened = {os.path.basename(p): stack.enter_context(safe_open(p, framework="pt")) for p in files}
        layers = {}
        for layer, path in zip(stored, _paths(model, stored), strict=True):
            module = _linear_map(modules, path, f"{root}.".lstrip("."), layer, type(model).__name__)
            tensors, (rows, columns) = _Tensors(layer, headers, opened), dense_weight(module).shape
            layers[path.removeprefix(f"{root}.".lstrip("."))] = _read_layer(tensors, rows, columns, has_offsets)
    return layers


def _paths(model: PreTrainedModel, stored: Sequence[str]) -> list[str]:
    """Where in the model the layers are that a checkpoint stores under these names."""
    conversions = get_model_conversion_mapping(model)
    names = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state: dict[str, Any] = dict(model.state_dict())
    paths = []
    for layer in stored:
        name, converter = rename_source_key(f"{layer}.weight", names, converters, model.base_model_prefix, state)
        if converter is not None:
            raise ValueError(
                f"tensor {layer}{BITS}: {type(model).__name__} keeps {layer} in another form than the checkpoint "
                "stores, which packed weights cannot be brought into"
            )
        paths.append(name.removesuffix(".weight"))
    return paths


def _linear_map(modules: dict[str, nn.Module], path: str, prefix: str, layer: str, kind: str) -> nn.Module:
    module: Any = modules.get(path)
    if not is_linear_map(module) or isinstance(module, Conv1D) or not path.startswith(prefix):
        what = "nothing" if module is None else type(module).__name__
        raise ValueError(
            f"tensor {layer}{BITS} packs {layer}, where {kind} has {what}: linear maps (nn.Linear) of "
            "the decoder alone can be packed; is the checkpoint for another model?"
        )
    return module


class _Tensors:
    """The tensors of a layer in the files of a checkpoint."""

    def __init__(self, layer: str, headers: dict[str, Header], opened: dict[str, Any]) -> None:
        self.layer, self._headers, self._opened = layer, headers, opened

    def __contains__(self, ending: str) -> bool:
        return self.layer + ending in self._headers

    def header(self, ending: str, dtypes: tuple[str, ...], shape: list[int] | None = None) -> Header:
        """Raises ValueError where the tensor is missing, or has another dtype or shape."""
        name = self.layer + ending
        if name not in self._headers:
            raise ValueError(f"tensor {name} is missing from the checkpoint, which packs {self.layer}")
        header = self._headers[name]
        if header.dtype not in dtypes or shape not in (None, header.shape):
            expected = "" if shape is None else f" {shape}"
            raise ValueError(
                f"tensor {name} is {header.dtype} {header.shape}, needed: {' or '.join(dtypes)}{expected}"
            )
        return header

    def read(self, ending: str) -> torch.Tensor:
        name = self.layer + ending
        tensor: torch.Tensor = self._opened[self._headers[name].file].get_tensor(name)
        return tensor


def _read_layer(tensors: _Tensors, rows: int, columns: int, has_offsets: bool) -> dict[str, Any]:
    """The record of a layer that is [rows, columns] in the model, once its tensors are known to be right."""
    layer = tensors.layer
    if ".weight" in tensors:
        raise ValueError(f"tensors {layer}.weight and {layer}{BITS} are both in the checkpoint: one has to go")
    tensors.header(BITS, ("U8",), [rows, -(-columns // 8)])
    stored = tensors.header(VALUES, FLOATS).shape
    tensors.header(SHAPE, ("I64",))
    shape = tensors.read(SHAPE).flatten().tolist()
    if shape != [rows, columns]:
        raise ValueError(f"tensor {layer}{SHAPE} says {shape}, the model's {layer} is {[rows, columns]}")
    count = torch.Size(stored).numel()
    pattern = share_of_zeros(count, rows * columns) if has_offsets else Pattern("2:4")
    try:
        expected = list(values_shape(pattern, rows, columns, count))
    except ValueError as error:
        raise ValueError(f"tensor {layer}{VALUES} {stored} does not fit {layer} {shape}: {error}") from None
    tensors.header(VALUES, FLOATS, expected)
    bits = tensors.read(BITS)
    check_bits(bits, pattern, columns, count, f"tensor {layer}{BITS}")
    if has_offsets:
        tensors.header(OFFSETS, ("I64",), [rows])
        if not torch.equal(tensors.read(OFFSETS), row_offsets(bits, columns)):
            raise ValueError(
                f"tensor {layer}{OFFSETS} does not say where the rows of {layer}{BITS} begin; the file is damaged"
            )
    return {"pattern": str(pattern), "num_values": count}


def row_offsets(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Where the values of each row of a mask [out, ceil(columns/8)] begin, [out] int64."""
    counts = unpack_mask(bits, columns).sum(-1)
    return counts.cumsum(0) - counts


def found_pattern(layer: SparseLinear) -> Pattern:
    """The pattern of a packed layer: `n:m` too where the mask of an unstructured one keeps to it exactly."""
    if layer.pattern.is_semi_structured or layer.weight_mask.is_meta:
        return layer.pattern
    return exact_groups(unpack_mask(layer.weight_mask, layer.in_features)) or layer.pattern


def take_pattern(layer: SparseLinear) -> None:
    """Gives a packed layer the pattern that it is found to have, for which there may be better kernels."""
    if (pattern := found_pattern(layer)) != layer.pattern:
        layer.pattern = pattern
        values = layer.weight.detach().view(layer.out_features, -1)
        layer.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)


def check_targets(model: nn.Module, targets: Any) -> None:
    """Raises ValueError where the `targets` of a sparsity config (names of layers or of classes, or `re:` and a
    regular expression) name one that is not in the model."""
    names = {name: type(module) for name, module in model.named_modules()}
    kinds = {kind.__name__ for cls in names.values() for kind in cls.__mro__}
    for target in targets if isinstance(targets, list) else []:
        if not isinstance(target, str) or (not target.startswith("re:") and target not in kinds | names.keys()):
            raise ValueError(
                f"sparsity_config.targets of the checkpoint's config names {printable(target)!r}, which "
                f"{type(model).__name__} does not have; is the config for another model?"
            )


def check_writable(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Raises ValueError where layers of a model, by path in it, have no form that compressed-tensors reads."""
    for path, layer in layers.items():
        is_linear = isinstance(layer, nn.Linear) and getattr(layer, "dense_type", nn.Linear) is not Conv1D
        if not is_linear or _paths(model, [path]) != [path]:
            raise ValueError(
                f"{path} is {type(layer).__name__}, and compressed-tensors packs nn.Linear alone, by the names of "
                'modules: write the model with storage="dense", which loads everywhere'
            )


def compressed_state_dict(
    model: PreTrainedModel, root: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state`, that of the submodule `root` of a model by names in the model, with its sparse layers as
    compressed-tensors stores them."""
    stored, is_two_of_four = dict(state), _format(model) == TWO_OF_FOUR
    layers = {f"{root}.{path}".lstrip("."): layer for path, layer in sparse_modules(model.get_submodule(root)).items()}
    check_writable(model, layers)
    for path, layer in layers.items():
        name = stored_name(path)
        values, bits = stored.pop(f"{name}.weight"), stored.pop(f"{name}{MASK_SUFFIX}")
        shape = torch.tensor([layer.out_features, layer.in_features])
        stored[name + VALUES] = values if is_two_of_four else values.flatten()
        stored[name + BITS] = bits
        stored[name + SHAPE] = shape.unsqueeze(1) if is_two_of_four else shape
        if not is_two_of_four:
            stored[name + OFFSETS] = row_offsets(bits, layer.in_features)
    return stored


def foreign_record(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` by which compressed-tensors 0.14 reads what `compressed_state_dict` gives."""
    sparse = sparse_layers(model)
    dense = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in sparse]
    num_zeros = sum(m.out_features * m.in_features - m.num_values for m in sparse.values())
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "dense",
        "config_groups": {},
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "quantization_status": "frozen",
        "sparsity_config": {
            "format": _format(model),
            "sparsity_structure": "2:4" if _format(model) == TWO_OF_FOUR else "unstructured",
            "global_sparsity": num_zeros / max(1, logical_parameters(model)),
            "targets": ["Linear"],
            "ignore": dense,
            "registry_requires_subclass": False,
        },
        "version": "0.14.0",
    }


def _format(model: PreTrainedModel) -> str:
    """There is one for a whole model: 2:4 where all its layers are, otherwise the one that holds any mask."""
    patterns = {module.pattern for module in sparse_layers(model).values()}
    return TWO_OF_FOUR if patterns == {Pattern("2:4")} else BITMASK
