"""The names of a model's tensors on disk: whether what is saved leads back to the model when it is loaded."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from ..blocks import decoder_of
from ..records import COMPRESSED_TENSORS
from .bitmask import VALUES, read_layers
from .files import read_headers
from .loading import check_headers
from .modules import dense_layer, install_layers, sparse_modules, stored_tensors
from .records import layer_records, made_with

_UNWRAP = (
    "Modules that were wrapped or replaced since (by an adapter, by torch.compile) have to be unwrapped first: merge "
    "or unload an adapter, or save it by itself; put `_orig_mod` back in the place of a compiled module, or compile "
    "with module.compile(); and let the config say how many blocks and rows there are."
)


def forget_conversions(model: PreTrainedModel) -> None:
    """Makes transformers save the model in the usual format of its family. Otherwise it reverts what it did to the
    tensors when it loaded them, among them what dequantized those of another quantizer."""
    vars(model).pop("_weight_conversions", None)


def check_reversible(model: PreTrainedModel) -> None:
    """Raises ValueError where a dense model, saved in the usual format of its family, would not be found whole when it
    is loaded. Reads no weights."""
    noted = vars(model).pop("_weight_conversions", None)
    tensors = dict(stored_tensors(model))
    try:
        stored = revert_weight_conversion(
            model, {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        )
        lost = _unfilled(model, tensors, stored, get_model_conversion_mapping(model))
    except Exception as error:  # of any kind, by the conversions of a family
        lost = [f"any ({type(error).__name__}: {error})"]
    finally:
        if noted is not None:
            vars(model)["_weight_conversions"] = noted
    if lost:
        raise ValueError(
            f"transformers stores {type(model).__name__} in a form that does not lead back to {lost[0]}: with "
            "storage='dense' the pruned model could not be loaded again; use storage='packed'"
        )


def check_saved(model: PreTrainedModel, folder: Path, storage: str) -> None:
    """Checks the headers of the weight files of a sparse model that have just been written to `folder` against the
    model that loading makes of its config: modules that were wrapped, replaced or deleted since have other names.

    Raises:
        ValueError: a tensor is missing, has another shape, or would not be found by loading; names it.
    """
    packed, files = storage == "packed", sorted(folder.glob("*.safetensors"))
    headers = read_headers(files)
    try:
        with torch.device("meta"):  # what loading makes, still dense
            anew: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config))
    except Exception:  # of any kind: code that came with the model may take more than a config
        if packed:
            check_headers(headers, sparse_modules(model))
        return
    decoder, layers = decoder_of(anew), layer_records(model)
    try:
        if packed:
            settings = made_with(model)
            install_layers(anew, layers, **({} if settings is None else settings.quantisation))
            check_headers(headers, sparse_modules(decoder))
        if storage == COMPRESSED_TENSORS and read_layers(anew, files).keys() != layers.keys():
            raise ValueError("the packed layers are others than those of the model.")
        for name in () if packed else layers:
            dense_layer(decoder, name, type(model).__name__)
    except ValueError as error:
        raise ValueError(f"nothing could load what was to be saved: {error} {_UNWRAP}") from error
    values = {f"{name.removesuffix(VALUES)}.weight" for name in headers if name.endswith(VALUES)}
    tensors = dict(stored_tensors(anew))
    conversions = [] if packed else get_model_conversion_mapping(anew)
    lost = _unfilled(anew, tensors, {*headers, *values}, conversions)
    if not any(isinstance(entry, WeightConverter) for entry in conversions):  # else they may be stored transposed
        lost += [name for name in tensors if name in headers and list(tensors[name].shape) != headers[name].shape]
    if lost:
        raise ValueError(
            f"{len(lost)} tensors of {type(model).__name__} are not in what was to be saved, or have another shape "
            f"than its config says, among them {lost[0]}, and nothing could load it: pass save_pretrained a "
            f"state_dict with all of them, or none. {_UNWRAP}"
        )


def _unfilled(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    stored: Iterable[str],
    conversions: list[WeightTransform],
) -> list[str]:
    """Those of the `tensors` of a model, by name, that loading tensors called `stored` would leave initialised. What
    is tied to a loaded one, or may be missing, is none of them."""
    filled = _loaded_names(model, tensors, stored, conversions)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    filled |= {source for target, source in tied.items() if target in filled}
    filled |= {target for target, source in tied.items() if source in filled}
    same = {id(tensors[name]) for name in filled if name in tensors}
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return sorted(
        name
        for name, tensor in tensors.items()
        if name not in filled and id(tensor) not in same and not any(re.search(key, name) for key in ignored)
    )


def _loaded_names(
    model: PreTrainedModel, names: Mapping[str, object], stored: Iterable[str], conversions: list[WeightTransform]
) -> set[str]:
    """Which tensors `names` of a model loading fills from tensors called `stored`, as transformers finds them."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    meta = dict(names)
    filled: set[str] = set()
    for key in sorted(stored):
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name not in meta and key in meta:
            name, source = key, None
        if source is None:
            filled.add(name)
            continue
        first, *others = by_source[source].target_patterns
        filled |= {name, *(name.replace(first, other) for other in others)}
    patterns = [name for name in filled if "*" in name]
    return filled | {name for pattern in patterns for name in fnmatch.filter(meta, pattern)}
