"""Whether all that a model needs is in the checkpoint that it is loaded from, and fit for use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..blocks import DecoderBlocks
from ..nn import local
from ..quantization import check_cast
from .files import FLOATS, Header
from .modules import MASK_SUFFIX, SCALE_SUFFIX, SparseModule, stored_tensors

# Set to "1", a sparse model whose weights hold NaN or infinity is loaded all the same.
NONFINITE_VARIABLE = "KSPARSE_ALLOW_NONFINITE"

# What headers call the dtypes.
_INTEGERS = {torch.int8: ("I8",), torch.uint8: ("U8",)}


def check_headers(headers: Mapping[str, Header], modules: Mapping[str, SparseModule]) -> None:
    """Checks the headers of safetensors files against the (still empty) sparse modules, before any tensor is read.

    Args:
        headers: of all weight files of the checkpoint.
        modules: sparse modules by their path in the decoder; a tensor's name may have something before that.

    Raises:
        ValueError: a tensor is missing or has another shape or dtype; names it.
    """
    # Only sparse layers have masks: the towers of a multimodal model may hold layers of the same names.
    layers = [key.removesuffix(MASK_SUFFIX) for key in headers if key.endswith(MASK_SUFFIX)]
    stored = {layer.split(".", depth)[-1]: layer for layer in layers for depth in range(layer.count(".") + 1)}
    for name, module in modules.items():
        layer = stored.get(name, name)
        needed: list[tuple[str, torch.Tensor, tuple[str, ...]]] = [
            (f"{layer}{MASK_SUFFIX}", module.weight_mask, ("U8",)),
            (f"{layer}.weight", module.weight, _INTEGERS.get(module.weight.dtype, FLOATS)),
        ]
        if module.weight_scale is not None:
            needed.append((f"{layer}{SCALE_SUFFIX}", module.weight_scale, FLOATS))
        for tensor, expected, dtypes in needed:
            if tensor not in headers:
                raise ValueError(
                    f"tensor {tensor} is missing from the checkpoint, whose config records a sparse layer {name}"
                )
            shape, dtype, _ = headers[tensor]
            if shape != list(expected.shape) or dtype not in dtypes:
                raise ValueError(
                    f"tensor {tensor} is {dtype} {shape}, the checkpoint's config and model need "
                    f"{' or '.join(dtypes)} {list(expected.shape)}"
                )


def check_scales(files: Iterable[str], modules: Iterable[SparseModule]) -> None:
    """Warns, naming the layer, where scales in weight files have no room in the dtype that the (still empty) modules
    have. float16 alone has less than the others; of other models nothing is read."""
    scaled = next((module for module in modules if module.weight_scale is not None), None)
    if scaled is None or scaled.dtype is not torch.float16:
        return
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(SCALE_SUFFIX) and file.get_slice(key).get_dtype() != "F16":
                    check_cast(file.get_tensor(key), torch.float16, str(scaled.values), key.removesuffix(SCALE_SUFFIX))


def random_weights(model: PreTrainedModel) -> list[str]:
    """Names of weights of a model that `from_pretrained` did not find in the checkpoint, or in another shape, by the
    marks that it leaves. What is tied, offloaded or expected to be missing is left out."""
    ignored = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ())
    return [
        name
        for name, tensor in stored_tensors(model)
        if not (
            tensor.is_meta or getattr(tensor, "_is_hf_initialized", False) or (ignored and re.search(ignored, name))
        )
    ]


def check_loaded(blocks: DecoderBlocks, missing: Iterable[str], *, new_head: bool = False) -> None:
    """Raises ValueError where weights of a model were not in the checkpoint, or had another shape there, and are
    random. A head that the class of the model has beside what the checkpoint was saved from may be new; that of a
    language model may not.

    Args:
        blocks: of the model that was loaded.
        missing: names of such weights.
        new_head: the head may be new in the class that was saved too, as with `ignore_mismatched_sizes`.
    """
    model = blocks.model
    new_head = new_head or type(model).__name__ not in (model.config.architectures or ())
    random = [name for name in missing if not (new_head and _is_new_head(model, name))]
    if random:
        raise ValueError(
            f"{len(random)} weights of {type(model).__name__} are not in the checkpoint, or have another shape "
            f"there, and would be random, among them {min(random)}: load it with the class that it was saved from, "
            "or download or copy it again"
        )


def _is_new_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is of a part that classes for tasks, other than those of language models, add to the base
    model."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model or name.startswith(prefix):
        return name.removeprefix(prefix).startswith("pooler.")
    return model.get_output_embeddings() is None


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError, naming the tensor, where one that was in the checkpoint holds NaN or infinity. One pass over
    the weights, wherever accelerate keeps them, without copies of their size."""
    if os.environ.get(NONFINITE_VARIABLE) == "1":
        return
    ranges = [
        (name, torch.stack(torch.aminmax(tensor)))
        for name, tensor in ((name, local(tensor)) for name, tensor in stored_tensors(model, fetch=True))
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta
    ]
    bad = [name for name, values in ranges if not values.isfinite().all()]
    if bad:
        raise ValueError(
            f"tensor {bad[0]} of the checkpoint holds NaN or infinity"
            + (f", and so do {len(bad) - 1} more" if len(bad) > 1 else "")
            + f": it is damaged, or was saved when training had diverged; {NONFINITE_VARIABLE}=1 in the environment "
            "loads it all the same"
        )
