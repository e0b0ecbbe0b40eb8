"""The tensors of a packed checkpoint as vLLM's models know them: dense, one at a time. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..nn import SparseLinear
from ..packing import unpack, unpack_mask
from ..pattern import Pattern
from ..quantization import by_column, kept_integers


def recorded_name(path: str, layers: Mapping[str, Any]) -> str | None:
    """The name by which `layers`, whose names begin below the decoder, record the layer that a model has at `path`."""
    names = path.split(".")
    return next((name for i in range(len(names)) if (name := ".".join(names[i:])) in layers), None)


def dense_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layers: Mapping[str, Mapping[str, Any]],
    in_features: Mapping[str, set[int]],
    transposed: bool = False,
    quantisation: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a packed checkpoint with each packed weight made dense, [out, in], when its mask has come too.
    Of quantised values these are the integers, and `weight_scale` is that of each of them, [out, in] as well: so they
    are cut and joined alike.

    Args:
        tensors: of the checkpoint, by name.
        layers: what its config records of the sparse layers.
        in_features: what each of them may have, by recorded name; those without an entry are left out.
        transposed: give weights as [in, out], as `Conv1D` stores them.
        quantisation: that of `SparsityConfig`, where values are quantised.

    Raises:
        ValueError: a tensor is missing, or values, mask and record do not fit; names it.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    kinds, complete = ("weight", "weight_mask", *(["weight_scale"] if quantisation else [])), set()
    for key, tensor in tensors:
        path, _, kind = key.rpartition(".")
        name = recorded_name(path, layers)
        if name is None or kind not in kinds:
            yield key, tensor
            continue
        part = parts.setdefault(path, {})
        part[kind] = tensor
        if len(part) == len(kinds):
            complete.add(name)
            del parts[path]
            if name in in_features:
                sparse = _sparse_layer(path, part, layers[name], in_features[name], quantisation or {})
                for kind, tensor in _dense_tensors(sparse).items():
                    yield f"{path}.{kind}", tensor.T if transposed and kind == "weight" else tensor
    for path, part in parts.items():
        if part.keys() != {"weight"} or recorded_name(path, layers) not in complete:
            other, found = next(kind for kind in kinds if kind not in part), next(iter(part))
            raise ValueError(f"tensor {path}.{other} is missing from the checkpoint, which has {path}.{found}")
        yield f"{path}.weight", part["weight"]  # of a layer of another tower of the model that has the same name
    if missing := layers.keys() - complete:
        raise ValueError(f"tensors of {len(missing)} recorded layers are missing, among them {min(missing)}.weight")


def _sparse_layer(
    path: str,
    part: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    in_features: set[int],
    quantisation: Mapping[str, Any],
) -> SparseLinear:
    out_features, width = part["weight_mask"].shape
    fitting = next((size for size in in_features if -(-size // 8) == width), None)
    if fitting is None:
        sizes = " or ".join(str(-(-size // 8)) for size in sorted(in_features))
        raise ValueError(f"tensor {path}.weight_mask has {width} bytes in a row, the model needs {sizes}")
    try:
        options = {"pattern": Pattern(record["pattern"]), "num_values": record["num_values"], **quantisation}
        sparse = SparseLinear(fitting, out_features, False, device="meta", **options)
        sparse.load_state_dict(dict(part), assign=True)
    except (RuntimeError, ValueError) as error:
        names = " and ".join(f"{path}.{kind}" for kind in part)
        raise ValueError(f"tensors {names} do not fit: {error}") from None
    return sparse


def _dense_tensors(sparse: SparseLinear) -> dict[str, torch.Tensor]:
    """The dense weight of a layer; or its integers and the scale of each, [out, in] both."""
    if sparse.weight_scale is None:
        return {"weight": sparse.to_dense_weight()}
    bits, in_features = sparse.weight_mask, sparse.in_features
    integers = kept_integers(sparse.weight.detach(), unpack_mask(bits, in_features))
    scale = by_column(sparse.weight_scale, sparse.group_size, in_features)
    return {"weight": unpack(integers, bits, in_features), "weight_scale": scale.expand(-1, in_features)}
