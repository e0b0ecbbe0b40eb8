"""The tensors of a packed checkpoint as vLLM's models know them: dense, one at a time. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..nn import SparseLinear
from ..pattern import Pattern


def recorded_name(path: str, layers: Mapping[str, Any]) -> str | None:
    """The name by which `layers`, whose names begin below the decoder, record the layer that a model has at `path`."""
    names = path.split(".")
    return next((name for i in range(len(names)) if (name := ".".join(names[i:])) in layers), None)


def dense_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layers: Mapping[str, Mapping[str, Any]],
    in_features: Mapping[str, set[int]],
    transposed: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a packed checkpoint with each packed weight made dense, [out, in], when its mask has come too.

    Args:
        tensors: of the checkpoint, by name.
        layers: what its config records of the sparse layers.
        in_features: what each of them may have, by recorded name; those without an entry are left out.
        transposed: give weights as [in, out], as `Conv1D` stores them.

    Raises:
        ValueError: a tensor is missing, or values, mask and record do not fit; names it.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    complete = set()
    for key, tensor in tensors:
        path, _, kind = key.rpartition(".")
        name = recorded_name(path, layers)
        if name is None or kind not in ("weight", "weight_mask"):
            yield key, tensor
            continue
        part = parts.setdefault(path, {})
        part[kind] = tensor
        if len(part) == 2:
            complete.add(name)
            del parts[path]
            if name in in_features:
                weight = _dense_weight(path, part, layers[name], in_features[name])
                yield f"{path}.weight", weight.T if transposed else weight
    for path, part in parts.items():
        kind, tensor = part.popitem()
        if kind == "weight_mask" or recorded_name(path, layers) not in complete:
            other = "weight" if kind == "weight_mask" else "weight_mask"
            raise ValueError(f"tensor {path}.{other} is missing from the checkpoint, which has {path}.{kind}")
        yield f"{path}.weight", tensor  # of a layer of another tower of the model that has the same name
    if missing := layers.keys() - complete:
        raise ValueError(f"tensors of {len(missing)} recorded layers are missing, among them {min(missing)}.weight")


def _dense_weight(
    path: str, part: Mapping[str, torch.Tensor], record: Mapping[str, Any], in_features: set[int]
) -> torch.Tensor:
    out_features, width = part["weight_mask"].shape
    fitting = next((size for size in in_features if -(-size // 8) == width), None)
    if fitting is None:
        sizes = " or ".join(str(-(-size // 8)) for size in sorted(in_features))
        raise ValueError(f"tensor {path}.weight_mask has {width} bytes in a row, the model needs {sizes}")
    try:
        pattern, num_values = Pattern(record["pattern"]), record["num_values"]
        sparse = SparseLinear(fitting, out_features, False, pattern=pattern, num_values=num_values, device="meta")
        sparse.load_state_dict(dict(part), assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"tensors {path}.weight and {path}.weight_mask do not fit: {error}") from None
    return sparse.to_dense_weight()
