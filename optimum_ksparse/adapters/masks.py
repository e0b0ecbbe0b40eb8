"""Which masks an adapter was trained over: a file beside it says so, and merging into other masks is refused."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from transformers.utils import cached_file, logging

from .. import records
from ..blocks import decoder_of
from ..checkpoint import SparseModule, aligned, describe_model, sparse_modules
from ..checkpoint.staging import write_text
from ..records import As

logger = logging.get_logger(__name__)

_NOTICED_LOSS = 0.005  # masked LoRA and HiRA lose what float32 rounds
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def mask_fingerprint(model: Any) -> str | None:
    """SHA-256 over the masks of all sparse layers by their path in the decoder, adapters or not; None where there is
    none. The values do not count."""
    layers = _plain_layers(_plain_model(model))
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
    found = mask_fingerprint(model)
    if found is not None:
        content = {"base_model": describe_model(_plain_model(model)), "mask_sha256": found}
        write_text(Path(folder) / records.MASKS_NAME, records.to_json(content))


def read_record(source: str | os.PathLike[str], **hub_arguments: Any) -> dict[str, Any] | None:
    """The record beside an adapter, in a folder or on the Hub; None where there is none, as beside those that plain
    PEFT saved. Raises ValueError where it is damaged."""
    known = {name: value for name, value in hub_arguments.items() if name in _HUB_ARGUMENTS and value is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, records.MASKS_NAME, **quiet, **known)
    if path is None:
        return None
    return records.read_record(Annotated[dict[str, Any], As(_MaskRecord, is_open=True)], path, "is damaged")


def check_record(model: Any, known: dict[str, Any] | None, name: str) -> None:
    """Raises ValueError where the record of the adapter `name` is of other masks than those of `model`. Adapters
    without a record pass."""
    if known is not None and known["mask_sha256"] != mask_fingerprint(model):
        raise ValueError(
            f"adapter {name!r} was trained over other masks than this base has (that one was called "
            f"{known.get('base_model')!r}): merge it into the sparse model that it was trained on, or train it anew"
        )


def check_adapters(model: Any, configs: Mapping[str, Any], names: Iterable[str]) -> None:
    """The same for adapters of a model that were loaded from somewhere: `configs` are the settings of those that it
    has now, of which some may have taken the name of a loaded one."""
    for name in names:
        config, known = getattr(model, "mask_records", {}).get(name, (None, None))
        if config is not None and config is configs.get(name):
            check_record(model, known, name)


def changes(model: Any, tuner: Any) -> list[tuple[Any, str, Any]]:
    """What to assign to PEFT's classes (class, name, value): `save_pretrained` of the model class writes the record,
    `load_adapter` remembers it and warns of other masks, and the tuner's own ways to merge refuse these, and say what
    they lose."""
    return [
        (model, "save_pretrained", _with_record(model.save_pretrained)),
        (model, "load_adapter", _with_memory(model.load_adapter)),
        (tuner, "merge_adapter", _with_check(tuner.merge_adapter)),
        (tuner, "_unload_and_optionally_merge", _with_check(tuner._unload_and_optionally_merge)),
    ]


def _with_record(save: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["is_main_process"] and mask_fingerprint(self) is not None:
            for name in given.arguments["selected_adapters"] or list(self.peft_config):
                folder = Path(given.arguments["save_directory"])
                record(self, folder if name == "default" else folder / name)

    return save_pretrained


def _with_memory(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        given, plain = signature.bind(self, *args, **kwargs).arguments, _plain_model(self)
        if _plain_layers(plain):
            known, name = read_record(given["model_id"], **given.get("kwargs", {})), given["adapter_name"]
            # With its settings: another adapter may take the name later.
            plain.mask_records = {**getattr(plain, "mask_records", {}), name: (self.peft_config[name], known)}
            try:
                check_record(plain, known, name)
            except ValueError as error:
                logger.warning(str(error))
        return result

    return load_adapter


def _with_check(merge: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(merge)

    @functools.wraps(merge)
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("merge", True):
            names = given.get("adapter_names") or self.active_adapters
            check_adapters(self.model, self.peft_config, names)
            _warn_of_loss(self.model, names)
        return merge(self, *args, **kwargs)

    return merge_adapter


def _warn_of_loss(model: Any, names: list[str]) -> None:
    """One warning for a model of which adapters are merged as PEFT does it, where that throws something away."""
    losses = [layer.merging_loss(list(names)) for layer in model.modules() if hasattr(layer, "merging_loss")]
    lost, total = (sum(parts) for parts in zip(*losses, strict=True)) if losses else (0.0, 0.0)
    share = (max(lost, 0.0) / total) ** 0.5 if total else 0.0
    if share > _NOTICED_LOSS:
        warnings.warn(
            f"merging {', '.join(names)} throws away {share:.0%} of what the adapter adds to the sparse layers (by "
            "Frobenius norm), because it lies where their weights are zero: optimum_ksparse.merge_adapter(model, "
            'method="solve", dataset=...) makes up for it',
            stacklevel=3,
        )


def _plain_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
