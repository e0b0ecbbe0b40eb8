"""`dataset`: every form in which calibration data may be given, checked, and described as JSON can hold it.

| form | described as |
|---|---|
| a name, such as "mc4-ko" | itself |
| a file, a list of texts, token ids | kind, size and SHA-256 |
| a `datasets.Dataset` | class, rows and its own fingerprint |
| a mix: `{"mc4-ko": 0.5, "texts.jsonl": 0.5}` | `{"mix": [{"dataset": <described>, "weight": 0.5}, …]}` |
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

import torch

from ..records.sources import check_no_token

DATASET_NAMES = ("mc4-ko", "c4", "kowiki", "self")
TEXT_SUFFIXES = (".txt", ".jsonl")
# A checkpoint's record of a mix has this key, and a list under it; in a mix that a user passes all values are numbers.
_RECORD_KEY = "mix"
_DATASET_FORMS = (
    f"one of {', '.join(map(repr, DATASET_NAMES))}; a path to a .txt or .jsonl file; a mix of both with weights, such "
    'as {"mc4-ko": 0.5, "self": 0.5}; in Python also a list of texts, a datasets.Dataset or token ids [samples, '
    "positions]"
)


def is_token_ids(dataset: Any) -> bool:
    """True for integer tensors, arrays and nested lists of integers."""
    if isinstance(dataset, list | tuple):
        return len(dataset) > 0 and isinstance(dataset[0], list | tuple)
    return isinstance(dataset, torch.Tensor) or type(dataset).__module__.split(".")[0] == "numpy"


def token_ids_shape(dataset: Any) -> tuple[int, int]:
    """[num_samples, seq_len] of token ids; ValueError where they are not two-dimensional integers."""
    try:
        ids = torch.as_tensor(dataset)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"dataset: token ids must be a rectangle [num_samples, seq_len] of integers: {error}"
        ) from None
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integers or ids.dim() != 2 or not ids.shape[0] or ids.shape[1] < 2:
        raise ValueError(
            f"dataset: token ids must be integers [num_samples, seq_len], found {ids.dtype} {list(ids.shape)}; "
            "seq_len must be at least 2"
        )
    return ids.shape[0], ids.shape[1]


def describe_dataset(dataset: Any) -> Any:
    """The dataset as JSON can hold it, by the table above. What this function returned before is returned
    unchanged."""
    if is_mix(dataset):
        return {_RECORD_KEY: [{"dataset": describe_dataset(part), "weight": w} for part, w in mix_parts(dataset)]}
    if dataset is None or isinstance(dataset, Mapping):
        return dataset
    if isinstance(dataset, str | os.PathLike):
        if dataset in DATASET_NAMES:
            return dataset
        with open(dataset, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": os.path.basename(dataset), "sha256": digest}
    if is_token_ids(dataset):
        ids = torch.as_tensor(dataset).to("cpu", torch.int64).contiguous()
        return {"token_ids": list(ids.shape), "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}
    if isinstance(dataset, list | tuple):
        hashed = hashlib.sha256()
        for text in dataset:
            encoded = text.encode("utf-8", "surrogatepass")
            hashed.update(len(encoded).to_bytes(8, "little") + encoded)
        return {"texts": len(dataset), "sha256": hashed.hexdigest()}
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    return {"dataset": type(dataset).__name__, "rows": rows, "fingerprint": getattr(dataset, "_fingerprint", None)}


def is_mix(dataset: Any) -> bool:
    """Whether `dataset` is a mix, as a user passes it or as a checkpoint records it."""
    if not isinstance(dataset, Mapping) or hasattr(dataset, "column_names") or _is_description(dataset):
        return False
    return _is_recorded_mix(dataset) or any(map(_is_number, dataset.values()))


def _is_recorded_mix(dataset: Any) -> bool:
    return isinstance(dataset, Mapping) and isinstance(dataset.get(_RECORD_KEY), list)


def mix_parts(dataset: Any) -> list[tuple[Any, float]]:
    """Data and weight of each part of a mix; all of the weight where it is none. Their order is that of what they are
    described as: no mapping's own order, which JSON and YAML do not keep, and no folder's name changes what is
    drawn."""
    if not is_mix(dataset):
        return [(dataset, 1.0)]
    if _is_recorded_mix(dataset):
        parts = [(part["dataset"], float(part["weight"])) for part in dataset[_RECORD_KEY]]
    else:
        parts = [(part, float(weight)) for part, weight in dataset.items()]
    return sorted(parts, key=lambda part: (json.dumps(describe_dataset(part[0]), sort_keys=True), part[1]))


def split_samples(num_samples: int, weights: Sequence[float]) -> list[int]:
    """`num_samples` shared out by weights, by largest remainders: each share is less than one away from the exact one,
    and their sum is exact. Among equal remainders the earlier weight goes first."""
    total = sum(map(Fraction, weights))
    exact = [num_samples * Fraction(weight) / total for weight in weights]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in order[: num_samples - sum(shares)]:
        shares[i] += 1
    return shares


def mix_shares(dataset: Any, num_samples: int) -> list[tuple[Any, int]]:
    """Data and number of samples of each part of a mix, in the order of `mix_parts`.

    Raises:
        ValueError: a part would get none; says how many samples are enough.
    """
    parts = mix_parts(dataset)
    shares = split_samples(num_samples, [weight for _, weight in parts])
    for (part, weight), share in zip(parts, shares, strict=True):
        if not share:
            raise ValueError(
                f"dataset: weight {weight} of {_name(part)} gives no sample of num_samples={num_samples}: use "
                f"num_samples={math.ceil(1 / min(weight for _, weight in parts))}, a larger weight, or leave it out"
            )
    return [(part, share) for (part, _), share in zip(parts, shares, strict=True)]


def holds(dataset: Any, name: str) -> bool:
    """Whether the data are those of `name`, or a mix with them."""
    return any(isinstance(part, str) and part == name for part, _ in mix_parts(dataset))


def needs_tokenizer(dataset: Any) -> bool:
    """Whether there is text to tokenise: everything but token ids, and text that the model itself writes as ids."""
    return not all(is_token_ids(part) or (isinstance(part, str) and part == "self") for part, _ in mix_parts(dataset))


def check_dataset(dataset: Any) -> None:
    """Raises TypeError, ValueError or FileNotFoundError for what is no calibration data, naming what is."""
    check_no_token("dataset", dataset)
    if isinstance(dataset, str | os.PathLike):
        name = os.fspath(dataset)
        if name not in DATASET_NAMES and not name.endswith(TEXT_SUFFIXES):
            raise ValueError(f"dataset={name!r} is not known; allowed: {_DATASET_FORMS}")
        if name not in DATASET_NAMES and not os.path.isfile(name):
            raise FileNotFoundError(f"dataset={name!r}: there is no such file; allowed: {_DATASET_FORMS}")
    elif is_token_ids(dataset):
        token_ids_shape(dataset)
    elif isinstance(dataset, list | tuple):
        if not dataset:
            raise ValueError(f"dataset is an empty list; allowed: {_DATASET_FORMS}")
        for i, text in enumerate(dataset):
            if not isinstance(text, str):
                raise TypeError(f"dataset[{i}] is {type(text).__name__}, must be a text; allowed: {_DATASET_FORMS}")
    elif hasattr(dataset, "column_names"):
        if hasattr(dataset, "keys"):
            raise TypeError(f"dataset is a DatasetDict with the splits {', '.join(dataset.keys())}: pass one of them")
    elif isinstance(dataset, Mapping):
        _check_mapping(dataset)
    else:
        raise TypeError(f"dataset is {type(dataset).__name__}; allowed: {_DATASET_FORMS}")


def recorded_dataset(dataset: Any) -> Any:
    """Data as a file records them, which may come from anywhere. Raises ValueError for what would be opened to be
    described, and for a mix that is none."""
    if _is_recorded_mix(dataset):
        _check_mapping(dataset)
        return dataset
    names = [dataset] if isinstance(dataset, str) else dataset if is_mix(dataset) else []
    if any(name not in DATASET_NAMES for name in names):
        raise ValueError("which is no name of data, and a checkpoint's own path is not opened")
    return dataset


def _is_description(dataset: Mapping[Any, Any]) -> bool:
    """Whether a mapping is what `describe_dataset` gives for data that JSON cannot hold. Among these keys a mix has
    nothing but weights."""
    return any(key in dataset and not _is_number(dataset[key]) for key in ("sha256", "fingerprint"))


def _check_mapping(dataset: Mapping[Any, Any]) -> None:
    """A mix, what a checkpoint records of one, or of data that JSON cannot hold."""
    if _RECORD_KEY in dataset and not _is_number(dataset[_RECORD_KEY]):
        record = dataset[_RECORD_KEY]
        parts = [_recorded_part(part) for part in (record if isinstance(record, list) else [record])]
    elif is_mix(dataset):
        parts = list(dataset.items())
        for part, weight in parts:
            if not isinstance(part, str | os.PathLike):
                raise TypeError(f"dataset: the keys of a mix are names and files, found {part!r}")
            check_dataset(part)
            if not _is_number(weight):
                raise TypeError(f"dataset: the weight of {_name(part)} must be a number, found {weight!r}")
    elif _is_description(dataset):
        return
    else:
        raise ValueError(
            f"dataset is a dict without the checksum that a checkpoint records; allowed: {_DATASET_FORMS}"
        )
    for part, weight in parts:
        if not 0 < weight < math.inf:
            raise ValueError(f"dataset: the weight of {_name(part)} is {weight}: it must be positive, or leave it out")
    total = math.fsum(float(weight) for _, weight in parts)
    if abs(total - 1) > 1e-6:
        scaled = ", ".join(f"{_name(part)}: {float(weight) / (total or 1):.4g}" for part, weight in parts)
        raise ValueError(f"dataset: the weights of a mix must sum to one, they sum to {total:g}: use {scaled}")


def _recorded_part(part: Any) -> tuple[Any, Any]:
    data, weight = (part.get("dataset"), part.get("weight")) if isinstance(part, Mapping) else (None, None)
    is_data = data in DATASET_NAMES if isinstance(data, str) else isinstance(data, Mapping) and _is_description(data)
    if not is_data or not _is_number(weight):
        raise ValueError(f"dataset: {part!r} is no part of a mix as a checkpoint records it")
    return data, weight


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _name(part: Any) -> str:
    """A part of a mix as messages name it."""
    return repr(part.get("file", part) if isinstance(part, Mapping) else os.fspath(part))
