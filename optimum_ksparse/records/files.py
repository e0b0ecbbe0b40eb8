"""JSON files: read within limits, written without what is no JSON; and foreign text for a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .build import build, clean
from .sources import redact

# Names of the records and other files of the package that lie beside a model's weights.
REPORT_NAME = "sparsity_report.json"
RESULTS_NAME = "evaluation_results.json"  # what was measured; see `evaluation.EvaluationResults`
TUNING_NAME = "finetuning.json"  # how a model was fine-tuned; beside the adapter or the weights
MERGE_REPORT_NAME = "merge_report.json"  # what merging an adapter did; see `adapters.MergeReport`
MASKS_NAME = "ksparse_adapter.json"  # which masks an adapter was trained over; see `adapters.masks`
HEAD_NAME = "korquad_head.safetensors"  # of a span model; see `study.finetuning.korquad.model`

# Metadata of a field that is left out where it is None, so that earlier versions, which do not know it, read the file.
UNWRITTEN = {"where": "not None"}

_MOST_BYTES = 64 * 2**20  # a report of 100,000 layers is half as large
_MOST_LEVELS = 32
_MOST_CHARACTERS = 2**17  # of one text


def printable(text: Any) -> str:
    """Foreign text for a terminal, as one line: without control characters, tokens and passwords."""
    return redact(" ".join(clean(str(text)).split()))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def to_json(value: Any, indent: int | None = 2) -> str:
    """A dataclass, or a value, as the text of a JSON file. NaN and Inf, which are no JSON, become null."""
    return json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which a job differs from an `earlier` one, which was read from a file, in words; those of a
    mapping in it are named by both, as `settings.pattern`."""
    was, is_now = _flat(earlier), _flat(json.loads(json.dumps(now)))
    return [
        f"{name}: was {was.get(name)!r}, is {is_now.get(name)!r}"
        for name in sorted({*was, *is_now})
        if was.get(name) != is_now.get(name)
    ]


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in job.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        written = [item.name for item in dataclasses.fields(value) if _is_written(item, value)]
        return _without_nan({name: getattr(value, name) for name in written})
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_written(item: dataclasses.Field[Any], value: Any) -> bool:
    return item.metadata != UNWRITTEN or getattr(value, item.name) is not None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises OSError where it cannot be read; ValueError, which does not name the file,
    where it is too large, no JSON, has a key twice, or is nested too deeply."""
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep") from None
    check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Programs differ in which of two values of one key they take."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return value


def check_depth(value: Any, where: str = "it") -> None:
    """Raises ValueError for a value that holds others in more levels than any record does, before recursion
    fails, or a text longer than any."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MOST_LEVELS:
            raise ValueError(f"{where} is nested more than {_MOST_LEVELS} levels deep")
        if any(isinstance(item, str) and len(item) > _MOST_CHARACTERS for item in level):
            raise ValueError(f"{where} holds a text of more than {_MOST_CHARACTERS} characters")
        holders = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in holders for inner in (item.values() if isinstance(item, dict) else item)]


def read_record(
    kind: Any,
    path: str | os.PathLike[str],
    what: str,
    remedy: str = "",
    earlier: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Any:
    """What a JSON file holds, as `kind` (see `build`). `what` messages say of a file that is none, as "is no report of
    optimum-ksparse", and the `remedy`; `earlier` makes what this version reads of what earlier ones wrote. Raises
    OSError where it cannot be read, ValueError, which names the file, without its folder, and the field, where it is
    no such record or of a newer schema."""
    try:
        value = read_json(path)
        return build(kind, earlier(value) if isinstance(value, dict) else value)
    except ValueError as error:  # those of JSON and of the encoding are too
        raise ValueError(printable(f"{os.path.basename(path)} {what}: {error}{remedy}")) from None
