"""`EvaluationResults`: what was measured of a sparse model and of the dense model it was made from; saved as
`evaluation_results.json` beside the weights."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import check_keys
from ..report import RESULTS_NAME
from ..staging import write_text
from .kobest import mean_f1
from .kobest_data import KOBEST_TASKS, STUDY_TASKS

SCHEMA_VERSION = 1

# What a row of `evaluate_perplexity` or `evaluate_kobest` holds: field → types and smallest and largest value.
_SHARE = (int, float), 0.0, 1.0
_OPTIONAL_SHARE = (int, float, type(None)), 0.0, 1.0
_COUNT = (int,), 1, None
_PERPLEXITY_METRICS = {
    "perplexity": ((int, float, type(None)), 1.0, None),  # null: too large for a float, which JSON cannot hold
    "bits_per_byte": ((int, float), 0.0, None),
}
_KOBEST_METRICS = {"acc": _SHARE, "acc_stderr": _OPTIONAL_SHARE, "f1": _SHARE}
_OPTIONAL_METRICS = {"acc_norm": _SHARE}
_PERPLEXITY_PROTOCOL = {
    "texts": ((dict,), None, None),
    "seq_len": ((int,), 2, None),
    "stride": ((int, type(None)), 1, None),
    "max_tokens": ((int, type(None)), 2, None),
    "num_windows": _COUNT,
    "num_tokens": _COUNT,
    "num_bytes": ((int,), 0, None),
    "prepend_bos": ((bool,), None, None),
    "dtype": ((str,), None, None),
}
_KOBEST_PROTOCOL = {
    "task": ((str,), None, None),
    "task_version": ((int, float, str), None, None),
    "num_fewshot": ((int,), 0, None),
    "limit": ((int, type(None)), 1, None),
    "data": ((dict,), None, None),
    "split": ((str,), None, None),
    "num_samples": _COUNT,
    "items_sha256": ((str,), None, None),
    "prepend_bos": ((bool,), None, None),
    "dtype": ((str,), None, None),
}
_ENVIRONMENT = {"device": ((str,), None, None), "batch_size": _COUNT, "versions": ((dict,), None, None)}


@dataclass
class Measurement:
    """One figure and how it came about.

    Attributes:
        name: `"perplexity"`, or a task of KoBEST.
        metrics: `perplexity` and `bits_per_byte`, or `acc`, `acc_stderr` and `f1`.
        protocol: what must be equal for two measurements to be comparable: the data, the number of items or tokens,
            shots, limit, version of the task, windows, dtype.
        environment: device, batch size and versions of libraries, which move a figure by rounding only.
    """

    name: str
    metrics: dict[str, Any]
    protocol: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def from_row(cls, name: str, row: Mapping[str, Any]) -> Measurement:
        """Sorts what `evaluate_perplexity` or `evaluate_kobest` returned into its three parts."""
        metrics, optional, protocol = _schema(name)
        return cls(
            name,
            {key: None if row[key] == math.inf else row[key] for key in (*metrics, *optional) if key in row},
            {key: row[key] for key in protocol},
            {key: row[key] for key in _ENVIRONMENT},
        )

    @property
    def num_fewshot(self) -> int:
        return int(self.protocol.get("num_fewshot", 0))

    def recovered(self, metric: str, dense: Measurement) -> float | None:
        """The share of the dense model's figure: for perplexity and bits per byte, where less is better, dense ÷
        sparse. None where a figure is missing, or would be divided by zero."""
        ours, theirs = self.value(metric), dense.value(metric)
        share = (theirs, ours) if metric in _PERPLEXITY_METRICS else (ours, theirs)
        if share[0] is None or share[0] == math.inf or not share[1]:
            return None
        return share[0] / share[1]

    def value(self, metric: str) -> float | None:
        """A figure; a perplexity too large for a float is infinite, None is one that was not measured."""
        value = self.metrics.get(metric)
        if value is None and metric == "perplexity" and metric in self.metrics:
            return math.inf
        return None if value is None else float(value)

    def differences(self, other: Measurement) -> list[str]:
        """The parts of the protocol in which the two differ; none where they are comparable."""
        keys = dict.fromkeys((*self.protocol, *other.protocol))
        return [key for key in keys if self.protocol.get(key) != other.protocol.get(key)]

    def num_differences(self, other: Measurement) -> int:
        return len(self.differences(other))

    def follows(self, request: Mapping[str, Any]) -> bool:
        """Whether this was measured as `request`, a part of a protocol, asks."""
        for key, asked in request.items():
            found = self.protocol.get(key)
            # A name on the Hub is known before its text is read, and the text's SHA-256 only after.
            if isinstance(asked, Mapping) and isinstance(found, Mapping):
                found = {part: found.get(part) for part in asked}
            if found != asked:
                return False
        return True


@dataclass
class EvaluationResults:
    """What was measured of a sparse model (`sparse`) and of the dense model it was made from (`dense`).

    Attributes:
        fingerprint: of the sparse model's weights (`fingerprint(model)`): the results are of these alone.
        sparse, dense: measurements, at most one for each name and number of shots.
        dense_model: the dense model as it was named, a local folder by its last part; `dense_revision`: its commit.
    """

    fingerprint: str
    sparse: list[Measurement] = field(default_factory=list)
    dense: list[Measurement] = field(default_factory=list)
    dense_model: str | None = None
    dense_revision: str | None = None
    schema_version: int = SCHEMA_VERSION

    def pairs(self) -> list[tuple[Measurement | None, Measurement | None]]:
        """Each measurement of the sparse model with that of the dense model by the same protocol, or, where there is
        none, one of the same name by another (see `Measurement.differences`); then those of the dense model alone."""
        found: list[tuple[Measurement | None, Measurement | None]] = []
        for ours in self.sparse:
            others = [other for other in self.dense if other.name == ours.name]
            found.append((ours, min(others, key=ours.num_differences, default=None)))
        taken = [other for _, other in found]
        return found + [(None, other) for other in self.dense if other not in taken]

    def comparable(self) -> list[tuple[Measurement, Measurement]]:
        """The pairs that were measured by the same protocol: sparse, dense."""
        pairs = [(ours, other) for ours, other in self.pairs() if ours is not None and other is not None]
        return [(ours, other) for ours, other in pairs if not ours.differences(other)]

    def mean_f1(self, part: str, num_fewshot: int = 0) -> float | None:
        """Mean macro F1 of `part` ("sparse" or "dense") over the study's four tasks; None where not all were
        measured in one way."""
        rows = [row for row in getattr(self, part) if row.name in STUDY_TASKS and row.num_fewshot == num_fewshot]
        if len({tuple(row.protocol[key] for key in ("limit", "split", "dtype", "prepend_bos")) for row in rows}) > 1:
            return None
        return mean_f1({row.name: row.metrics for row in rows})

    def add(self, part: str, measurement: Measurement) -> None:
        """Adds a measurement to `part`, in the place of an earlier one of the same name and number of shots."""
        rows: list[Measurement] = getattr(self, part)
        same = [r for r in rows if (r.name, r.num_fewshot) == (measurement.name, measurement.num_fewshot)]
        for row in same:
            rows.remove(row)
        rows.append(measurement)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `evaluation_results.json` into `directory`, whole or not at all."""
        write_text(Path(directory) / RESULTS_NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResults:
        """Reads results from their file.

        Raises:
            ValueError: the file is damaged, of a newer schema, or edited so that a field cannot be right; names it.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError(f"it holds {type(data).__name__}, not an object")
            _check_field("schema_version", data.get("schema_version"), (int,), 1, None)
            if data["schema_version"] > SCHEMA_VERSION:
                raise ValueError(f"schema_version={data['schema_version']} is newer than {SCHEMA_VERSION}: upgrade")
            check_keys(data, [f.name for f in fields(cls)], "the results")
            _check_field("fingerprint", data.get("fingerprint"), (str,), None, None)
            for name in ("dense_model", "dense_revision"):
                _check_field(name, data.get(name), (str, type(None)), None, None)
            for part in ("sparse", "dense"):
                _check_field(part, data.get(part), (list,), None, None)
                data[part] = [_read_measurement(f"{part}[{i}]", row) for i, row in enumerate(data[part])]
                _check_unique(part, data[part])
            return cls(**data)
        except (ValueError, RecursionError) as error:  # JSON and encoding errors are ValueErrors
            raise ValueError(f"{os.path.basename(path)} is not a results file of optimum-ksparse: {error}") from None


def _schema(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Metrics, those that may be missing, and protocol of a measurement."""
    if name == "perplexity":
        return _PERPLEXITY_METRICS, {}, _PERPLEXITY_PROTOCOL
    if name in KOBEST_TASKS:
        return _KOBEST_METRICS, _OPTIONAL_METRICS, _KOBEST_PROTOCOL
    raise ValueError(f"name={name!r} is not known; allowed: perplexity, {', '.join(KOBEST_TASKS)}")


def _read_measurement(where: str, row: Any) -> Measurement:
    _check_field(where, row, (dict,), None, None)
    check_keys(row, [f.name for f in fields(Measurement)], where)
    _check_field(f"{where}.name", row.get("name"), (str,), None, None)
    try:
        metrics, optional_metrics, protocol = _schema(row["name"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    parts = {"metrics": (metrics, optional_metrics), "protocol": (protocol, {}), "environment": (_ENVIRONMENT, {})}
    for part, (required, optional) in parts.items():
        found = row.get(part)
        _check_field(f"{where}.{part}", found, (dict,), None, None)
        check_keys(found, [*required, *optional], f"{where}.{part}")
        for key, (types, least, most) in {**required, **optional}.items():
            if key in found:
                _check_field(f"{where}.{part}.{key}", found[key], types, least, most)
            elif key in required:
                raise ValueError(f"{where}.{part}.{key} is missing")
    if row["name"] == "perplexity":
        texts = row["protocol"]["texts"]
        _check_field(f"{where}.protocol.texts.sha256", texts.get("sha256"), (str,), None, None)
    return Measurement(**row)


def _check_unique(part: str, rows: list[Measurement]) -> None:
    seen = set()
    for i, row in enumerate(rows):
        key = row.name, row.num_fewshot
        if key in seen:
            raise ValueError(f"{part}[{i}] is a second measurement of {row.name} with {row.num_fewshot} shots")
        seen.add(key)


def _check_field(where: str, value: Any, types: tuple[type, ...], least: Any, most: Any) -> None:
    """Raises ValueError that names the field, what was found and what is allowed."""
    names = " or ".join({"NoneType": "null", "dict": "object"}.get(t.__name__, t.__name__) for t in types)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{where} is {value!r}, must be {names}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if abs(value) > sys.float_info.max or value != value:  # integers may be larger than any float
        raise ValueError(f"{where} is {value!r}, must be finite")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = f"from {least} to {most}" if most is not None else f"at least {least}"
        raise ValueError(f"{where} is {value!r}, must be {limits}")
