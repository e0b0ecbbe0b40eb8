"""Which masks an adapter was trained over: a file beside it says so, and merging into other masks is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, TypedDict

from .. import records
from ..blocks import decoder_of
from ..checkpoint import SparseModule, aligned, describe_model, sparse_modules, without_peft
from ..checkpoint.staging import write_text
from ..data import find_file
from ..records import As


def mask_digest(model: Any) -> str | None:
    """SHA-256 over the masks of all sparse layers by their path in the decoder, adapters or not; None where there is
    none. The values do not count."""
    layers = _plain_layers(without_peft(model))
    if not layers:
        return None
    hashed = hashlib.sha256()
    for name in sorted(layers):
        with aligned(layers[name]):
            bits = layers[name].weight_mask.cpu().contiguous()
            hashed.update(f"{name} {list(bits.shape)} {layers[name].in_features};".encode())
            hashed.update(bits.numpy().data)
    return hashed.hexdigest()


class _MaskRecord(TypedDict):
    mask_sha256: str


def record(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes `ksparse_adapter.json` beside an adapter on a sparse model; nothing for a dense one."""
    digest = mask_digest(model)
    if digest is not None:
        content = {"base_model": describe_model(without_peft(model)), "mask_sha256": digest}
        write_text(Path(folder) / records.MASKS_NAME, records.to_json(content))


def read_record(source: str | os.PathLike[str], **loading: Any) -> dict[str, Any] | None:
    """The record beside an adapter, in a folder or on the Hub; None where there is none, as beside those that plain
    PEFT saved. Raises ValueError where it is damaged."""
    path = find_file(source, records.MASKS_NAME, quiet=True, **loading)
    if path is None:
        return None
    return records.read_record(Annotated[dict[str, Any], As(_MaskRecord, is_open=True)], path, "is damaged")


def mismatch(model: Any, recorded: dict[str, Any] | None, name: str) -> str | None:
    """Why the adapter `name` cannot be merged into `model`: its record is of other masks. Adapters without a record
    pass."""
    if recorded is None or recorded["mask_sha256"] == mask_digest(model):
        return None
    return (
        f"adapter {name!r} was trained over other masks than this base has (that one was called "
        f"{recorded.get('base_model')!r}): merge it into the sparse model that it was trained on, or train it anew"
    )


def _plain_layers(model: Any) -> dict[str, SparseModule]:
    """The sparse modules of a model by their path in the decoder without PEFT's wrappers; of a module that PEFT trains
    as a whole the original."""
    if not hasattr(model, "get_decoder"):
        return {}
    layers = {}
    for name, module in sparse_modules(decoder_of(model)).items():
        parts = name.split(".")
        if "modules_to_save" not in parts:
            layers[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = module
    return layers
