"""Sparse models on disk and in accelerate's keeping: which layers are sparse, packed and dense storage.

| key in a packed checkpoint | shape | dtype |
|---|---|---|
| `<layer>.weight` | n:m: [out, in·n/m]; unstructured: [nnz] | the model's |
| `<layer>.weight_mask` | [out, ceil(in/8)] | uint8 |
| `<layer>.bias` | [out] | the model's |

Experts stacked in one parameter have `<parameter>.weight` and `<parameter>.weight_mask`, with the number of the expert
as one more dimension before these.

A dense checkpoint holds its tensors as any other model does, with their zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .calibration import DecoderBlocks, decoder_of, use_eager_experts
from .config import DENSE_CONFIG_KEY, SparsityConfig, describe_source
from .nn import SparseExperts, SparseLinear, dense_weight, is_linear_map
from .pattern import Pattern, lowest

_MASK_SUFFIX = ".weight_mask"


SparseModule = SparseLinear | SparseExperts


def sparse_modules(root: nn.Module) -> dict[str, SparseModule]:
    """All sparse modules under `root` by path."""
    return {name: module for name, module in root.named_modules() if isinstance(module, SparseModule)}


def sparse_layers(root: nn.Module) -> dict[str, SparseLinear]:
    """All sparse linear maps under `root` by path."""
    return {name: module for name, module in root.named_modules() if isinstance(module, SparseLinear)}


def sparse_experts(root: nn.Module) -> dict[str, SparseExperts]:
    """All stacks of sparse matrices under `root` by path."""
    return {name: module for name, module in root.named_modules() if isinstance(module, SparseExperts)}


def made_with(model: PreTrainedModel) -> SparsityConfig | None:
    """The settings with which a sparse model, or a dense one that has lost blocks, was made; None for any other."""
    settings = getattr(model.config, "quantization_config", None)
    if isinstance(settings, SparsityConfig):
        return settings
    return SparsityConfig.from_dict(getattr(model.config, DENSE_CONFIG_KEY)) if has_lost_blocks(model) else None


def has_lost_blocks(model: PreTrainedModel) -> bool:
    """Whether it is a dense model, from which this package has dropped blocks."""
    return is_dense_record(getattr(model.config, DENSE_CONFIG_KEY, None)) and not sparse_modules(model)


def is_dense_record(settings: Any) -> bool:
    """Whether settings, as a `config.json` keeps them, are those of a dense model that has merely lost blocks."""
    return isinstance(settings, Mapping) and bool(settings.get("drop_layers")) and settings.get("pattern", "") is None


def layer_records(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `config.json` says of each sparse layer: path in the decoder → pattern and number of values."""
    return {
        name: {"pattern": str(module.pattern), "num_values": module.weight.numel()}
        for name, module in sparse_modules(decoder_of(model)).items()
    }


def install_layers(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts an empty sparse module on the meta device in the place of each layer that a checkpoint records.

    Raises:
        ValueError: a record names no linear map or stack of matrices of the model, or cannot be true of its shape.
    """
    decoder = decoder_of(model)
    for name, record in layers.items():
        dense = _dense_layer(decoder, name, type(model).__name__)
        try:
            sparse = empty_like(dense, Pattern(record["pattern"]), record["num_values"], "meta")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's record of layer {name} cannot be right: {error}") from error
        # transformers initialises what it has not loaded, by rules for dense weights; here everything must be loaded.
        sparse._is_hf_initialized = True  # type: ignore[assignment]
        put(decoder, name, sparse)
    if sparse_experts(decoder):
        use_eager_experts(model)


def empty_like(
    dense: nn.Module | nn.Parameter, pattern: Pattern, num_values: int, device: str | None = None
) -> SparseModule:
    """A sparse module that stands for a dense linear map, or for a parameter [experts, out, in], with a weight still
    to be filled in; on its device or on another one. Raises ValueError where `num_values` cannot be right."""
    if isinstance(dense, nn.Module):
        return SparseLinear.empty_like(dense, pattern, num_values, device)
    num_experts, out_features, in_features = dense.shape
    settings: dict[str, Any] = {"dtype": dense.dtype, "device": dense.device if device is None else device}
    return SparseExperts(num_experts, in_features, out_features, pattern=pattern, num_values=num_values, **settings)


def _dense_layer(decoder: nn.Module, name: str, kind: str) -> nn.Module | nn.Parameter:
    """What a record of a sparse layer stands for: a linear map, or a parameter [experts, out, in]."""
    owner, _, attribute = name.rpartition(".")
    try:
        holder = decoder.get_submodule(owner)
        found: Any = holder._modules.get(attribute, holder._parameters.get(attribute))
    except AttributeError:
        found = None
    if is_linear_map(found) or (isinstance(found, nn.Parameter) and found.dim() == 3):
        return found
    raise ValueError(
        f"the checkpoint records a sparse layer {name}, where {kind} has "
        f"{'nothing' if found is None else type(found).__name__}; is it for another model?"
    )


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
    """`state`, that of the submodule `root` of a model by names in the model, as `save_pretrained` would store it:
    packed or written out dense, in the form and by the names of the checkpoints of this architecture."""
    settings: Any = getattr(model.config, "quantization_config", None)
    stored = dict(state)
    if settings is not None and settings.storage == "packed" and sparse_experts(model):
        return stored  # the usual form would take packed experts apart as if they were dense
    if settings is not None and settings.storage == "dense":
        stored = {f"{root}.{name}": tensor for name, tensor in dense_state_dict(model.get_submodule(root)).items()}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, stored)
    return reverted


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict with every packed weight written out dense, in the layout of the module it came from."""
    state = dict(model.state_dict())
    for name, module in sparse_modules(model).items():
        del state[f"{name}.weight"], state[f"{name}{_MASK_SUFFIX}"]
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
    dense = {name: _dense_layer(decoder, name, kind) for name in layers}
    for name in dense:
        with _aligned_weight(decoder, name) as weight:
            _kept(weight, layers[name], name)
    for name, layer in dense.items():
        with _aligned_weight(decoder, name) as weight:
            mask, pattern = _kept(weight, layers[name], name), Pattern(layers[name]["pattern"])
            if isinstance(layer, nn.Parameter):
                replace_module(decoder, name, SparseExperts.from_dense(weight, mask, pattern))
            else:
                replace_module(decoder, name, SparseLinear.from_dense(layer, mask, pattern))


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
    if pattern.is_structured or pattern.block is not None:
        return pattern.mask(weight.abs())
    mask = weight != 0
    if weight.dim() == 3:
        flat, zeros = weight.abs().flatten(1), (weight.numel() - record["num_values"]) // len(weight)
        filled = ~lowest(flat, zeros).view_as(weight)
        if bool((mask & ~filled).any()):
            raise ValueError(f"{name}: a matrix has more nonzero weights than the recorded {flat.shape[1] - zeros}")
        mask = filled
    return mask


@contextmanager
def _aligned_weight(root: nn.Module, name: str) -> Iterator[torch.Tensor]:
    """The weight [out, in] of a dense linear map, or the parameter [experts, out, in], wherever accelerate keeps
    it."""
    owner, _, attribute = name.rpartition(".")
    found: Any = getattr(root.get_submodule(owner), attribute)
    stacked = isinstance(found, nn.Parameter)
    with aligned(root.get_submodule(owner) if stacked else found):
        yield getattr(root.get_submodule(owner), attribute) if stacked else dense_weight(found)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model elsewhere, and brings them in for a forward pass alone."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


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
    """Puts `new` in the place of `root`'s submodule or parameter `name`. Where accelerate keeps that one (on another
    device, offloaded to memory or to disk), it keeps the new one in the same way; a parameter takes the place of one
    that is not offloaded only."""
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    old: Any = getattr(owner, attribute)
    hook = getattr(owner if isinstance(old, nn.Parameter) else old, "_hf_hook", None)
    key = attribute if isinstance(old, nn.Parameter) else "weight"
    put(root, name, new)
    if hook is None or isinstance(new, nn.Parameter):
        return
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    for hook in hooks:
        if isinstance(hook, AlignDevicesHook):
            moved = AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=hook.offload,
                io_same_device=hook.io_same_device,
                weights_map=_offloaded(new, hook.weights_map, key) if hook.offload else None,
                offload_buffers=hook.offload_buffers,
                place_submodules=hook.place_submodules,
                skip_keys=hook.skip_keys,
            )
            add_hook_to_module(new, moved)


def _offloaded(module: nn.Module, old: Any, key: str) -> Mapping[str, torch.Tensor]:
    """A weights map for accelerate: on disk in the offload folder where the old weight, the map's `key`, is there,
    otherwise in memory."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight

    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    loader = getattr(old, "dataset", None)
    folder = getattr(loader, "save_folder", None)
    if folder is None or f"{old.prefix}{key}" in loader.state_dict:  # type: ignore[union-attr]
        return tensors
    index: dict[str, Any] = {}
    for name, tensor in tensors.items():
        # Another name than the old one's, whose file may still be mapped.
        offload_weight(tensor.contiguous(), f"{old.prefix}{key}.{type(module).__name__}.{name}", folder, index)
    loader = OffloadedWeightsLoader(save_folder=folder, index=index)
    return PrefixedDataset(loader, f"{old.prefix}{key}.{type(module).__name__}.")
