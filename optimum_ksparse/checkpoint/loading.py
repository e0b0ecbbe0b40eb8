"""Whether all that a model needs was in the checkpoint that it is loaded from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open

from ..calibration import DecoderBlocks
from .modules import SparseModule
from .storage import MASK_SUFFIX


def check_files(files: Iterable[str], modules: Mapping[str, SparseModule]) -> None:
    """Checks the headers of safetensors files against the (still empty) sparse modules, before any tensor is read.

    Args:
        files: paths of all weight files of the checkpoint.
        modules: sparse modules by their path in the decoder; a tensor's name may have something before that.

    Raises:
        ValueError: a file is truncated, or a tensor is missing or has another shape or dtype; names it.
    """
    headers: dict[str, tuple[list[int], str]] = {}
    for path in files:
        try:
            with open(path, "rb"), safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in headers:
                        raise ValueError(f"tensor {key} is in two files, one of them {os.path.basename(path)}")
                    view = file.get_slice(key)
                    headers[key] = (view.get_shape(), view.get_dtype())
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{os.path.basename(path)} is truncated or damaged: {error}") from error
    # Only sparse layers have masks: the towers of a multimodal model may hold layers of the same names.
    layers = [key.removesuffix(MASK_SUFFIX) for key in headers if key.endswith(MASK_SUFFIX)]
    stored = {layer.split(".", depth)[-1]: layer for layer in layers for depth in range(layer.count(".") + 1)}
    for name, module in modules.items():
        layer = stored.get(name, name)
        for tensor, expected, dtypes in (
            (f"{layer}{MASK_SUFFIX}", module.weight_mask, ("U8",)),
            (f"{layer}.weight", module.weight, ("F32", "F16", "BF16")),
        ):
            if tensor not in headers:
                raise ValueError(
                    f"tensor {tensor} is missing from the checkpoint, whose config records a sparse layer {name}"
                )
            shape, dtype = headers[tensor]
            if shape != list(expected.shape) or dtype not in dtypes:
                raise ValueError(
                    f"tensor {tensor} is {dtype} {shape}, the checkpoint's config and model need "
                    f"{' or '.join(dtypes)} {list(expected.shape)}"
                )


def check_loaded(blocks: DecoderBlocks, info: Mapping[str, Any]) -> None:
    """Raises ValueError where weights of the decoder blocks were not in the checkpoint and are random; `info` is what
    `from_pretrained` gives with `output_loading_info=True`."""
    inside = blocks.prefixes
    missing = sorted(name for name in info["missing_keys"] if name.startswith(inside))
    missing += sorted(str(name) for name in info.get("mismatched_keys", ()) if any(p in str(name) for p in inside))
    if missing:
        raise ValueError(
            f"{len(missing)} weights of the decoder of {type(blocks.model).__name__} are not in the checkpoint and "
            f"would be random, among them {missing[0]}: load it with the class that it was saved from"
        )
