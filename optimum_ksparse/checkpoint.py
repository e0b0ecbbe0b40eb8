"""Sparse models on disk and in accelerate's keeping: which layers are sparse, packed and dense storage.

| key in a packed checkpoint | shape | dtype |
|---|---|---|
| `<layer>.weight` | n:m: [out, in·n/m]; unstructured: [nnz] | the model's |
| `<layer>.weight_mask` | [out, ceil(in/8)] | uint8 |
| `<layer>.bias` | [out] | the model's |

A dense checkpoint holds `<layer>.weight` as any other model does, with its zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .calibration import DecoderBlocks, decoder_of
from .config import describe_source
from .nn import SparseLinear, dense_weight, is_linear_map
from .pattern import Pattern

_MASK_SUFFIX = ".weight_mask"


def sparse_modules(root: nn.Module) -> dict[str, SparseLinear]:
    """All sparse linear modules under `root` by path."""
    return {name: module for name, module in root.named_modules() if isinstance(module, SparseLinear)}


def layer_records(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `config.json` says of each sparse layer: path in the decoder → pattern and number of values."""
    return {
        name: {"pattern": str(module.pattern), "num_values": module.weight.numel()}
        for name, module in sparse_modules(decoder_of(model)).items()
    }


def install_layers(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts an empty `SparseLinear` on the meta device in the place of each layer that a checkpoint records.

    Raises:
        ValueError: a record names no linear map of the model, or cannot be true of its shape.
    """
    decoder = decoder_of(model)
    for name, record in layers.items():
        linear = _linear_map(decoder, name, type(model).__name__)
        try:
            sparse = SparseLinear.empty_like(linear, Pattern(record["pattern"]), record["num_values"], "meta")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's record of layer {name} cannot be right: {error}") from error
        # transformers initialises what it has not loaded, by rules for dense weights; here everything must be loaded.
        sparse._is_hf_initialized = True  # type: ignore[assignment]
        decoder.set_submodule(name, sparse)


def _linear_map(decoder: nn.Module, name: str, kind: str) -> nn.Module:
    try:
        linear = decoder.get_submodule(name)
    except AttributeError:
        linear = None
    if linear is None or not is_linear_map(linear):
        found = "nothing" if linear is None else type(linear).__name__
        raise ValueError(
            f"the checkpoint records a sparse layer {name}, where {kind} has {found}; is it for another model?"
        )
    return linear


def check_files(files: Iterable[str], modules: Mapping[str, SparseLinear]) -> None:
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
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(key)
                    headers[key] = (view.get_shape(), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{os.path.basename(path)} is truncated or damaged: {error}") from error
    # Only sparse layers have masks: the towers of a multimodal model may hold layers of the same names.
    layers = [key.removesuffix(_MASK_SUFFIX) for key in headers if key.endswith(_MASK_SUFFIX)]
    stored = {layer.split(".", depth)[-1]: layer for layer in layers for depth in range(layer.count(".") + 1)}
    for name, module in modules.items():
        layer = stored.get(name, name)
        for tensor, expected, dtypes in (
            (f"{layer}{_MASK_SUFFIX}", module.weight_mask, ("U8",)),
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
    prefix = blocks.name_in_model(0, "").removesuffix("0.")
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    missing += sorted(str(name) for name in info.get("mismatched_keys", ()) if prefix in str(name))
    if missing:
        raise ValueError(
            f"{len(missing)} weights of the decoder of {type(blocks.model).__name__} are not in the checkpoint and "
            f"would be random, among them {missing[0]}: load it with the class that it was saved from"
        )


def commit_of(source: Any, file_name: str = CONFIG_NAME, **hub_arguments: Any) -> str | None:
    """Commit of the repository on the Hub that a model is, or was, loaded from; None for a folder."""
    try:
        path = cached_file(source, file_name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    except OSError:
        return None
    # A file of a Hub snapshot lies in a folder named after its commit.
    commit: str | None = extract_commit_hash(path, None)
    return commit


def describe_model(model: PreTrainedModel) -> str | None:
    """Where a model was loaded from, as a report or a card may name it: a local folder by its last part."""
    name = model.name_or_path
    # Noted when it was loaded: from elsewhere a relative path reads like a name on the Hub.
    if name and getattr(model, "is_from_folder", False):
        return os.path.basename(os.path.normpath(name))
    return describe_source(name)


def storage_state_dict(
    model: PreTrainedModel, root: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state`, that of the submodule `root` of a sparse model by names in the model, as `save_pretrained` would store
    it: packed or written out dense, in the form and by the names of the checkpoints of this architecture."""
    settings: Any = model.config.quantization_config
    stored = dict(state)
    if settings.storage == "dense":
        stored = {f"{root}.{name}": tensor for name, tensor in dense_state_dict(model.get_submodule(root)).items()}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, stored)
    return reverted


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict with every packed weight written out dense, in the layout of the module it came from."""
    state = dict(model.state_dict())
    for name, module in sparse_modules(model).items():
        with aligned(module):
            for key, tensor in module.to_dense().state_dict().items():
                state[f"{name}.{key}"] = tensor
        del state[f"{name}{_MASK_SUFFIX}"]
    return state


def sparsify_dense(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes sparse modules of the layers of a dense checkpoint whose weights hold the zeros of a recorded pattern.

    Raises:
        ValueError: the weights do not have the recorded pattern (any more); names the layer. The model is not changed.
    """
    decoder = decoder_of(model)
    linears = {name: _linear_map(decoder, name, type(model).__name__) for name in layers}
    for name, linear in linears.items():
        with aligned(linear):
            Pattern(layers[name]["pattern"]).verify(dense_weight(linear), f"{name}.weight")
    for name, linear in linears.items():
        pattern = Pattern(layers[name]["pattern"])
        with aligned(linear):
            weight = dense_weight(linear)
            # A kept weight may be zero: groups are filled up to n, an unstructured mask needs no filling.
            mask = pattern.mask(weight.abs()) if pattern.is_structured else weight != 0
            replace_module(decoder, name, SparseLinear.from_dense(linear, mask, pattern))


def aligned(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, the parameters of a module that accelerate has offloaded are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of `root`'s submodule `name`. Where accelerate keeps that one (on another device,
    offloaded to memory or to disk), it keeps the new one in the same way."""
    old = root.get_submodule(name)
    root.set_submodule(name, module)
    hook = getattr(old, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    for hook in hooks:
        if isinstance(hook, AlignDevicesHook):
            moved = AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=hook.offload,
                io_same_device=hook.io_same_device,
                weights_map=_offloaded(module, hook.weights_map) if hook.offload else None,
                offload_buffers=hook.offload_buffers,
                place_submodules=hook.place_submodules,
                skip_keys=hook.skip_keys,
            )
            add_hook_to_module(module, moved)


def _offloaded(module: nn.Module, old: Any) -> Mapping[str, torch.Tensor]:
    """A weights map for accelerate: on disk in the offload folder where the old one is there, otherwise in memory."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight

    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    loader = getattr(old, "dataset", None)
    folder = getattr(loader, "save_folder", None)
    if folder is None or f"{old.prefix}weight" in loader.state_dict:  # type: ignore[union-attr]
        return tensors
    index: dict[str, Any] = {}
    for name, tensor in tensors.items():
        # Another name than the old one's, whose file may still be mapped.
        offload_weight(tensor.contiguous(), f"{old.prefix}{type(module).__name__}.{name}", folder, index)
    return PrefixedDataset(
        OffloadedWeightsLoader(save_folder=folder, index=index), f"{old.prefix}{type(module).__name__}."
    )
