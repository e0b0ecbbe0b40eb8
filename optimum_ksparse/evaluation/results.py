"""`EvaluationResults`: what was measured of a sparse model and of the dense model it was made from; saved as
`evaluation_results.json` beside the weights."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..checkpoint.staging import locked, write_text
from ..records import RESULTS_NAME, As, Count, Positive, Version, build, build_fields, read_record, to_json
from .kobest import STUDY_TASKS, mean_f1
from .table import results_html
from .tasks import DATA, TASKS, task_of

# 2: kinds beside perplexity and KoBEST, and `tuning`, which files of version 1 lack: they are of models before it.
SCHEMA_VERSION = 2
_PARTS = ("sparse", "dense")
_ENVIRONMENT = {"device": str, "batch_size": Positive, "versions": dict[str, str]}
_LATER_ENVIRONMENT = {"product_dtype": str}  # which files of earlier versions lack


class _Row(TypedDict, total=False):
    """What is known of the protocol of any row."""

    num_fewshot: Count
    data: DATA
    tuning: dict[str, Any] | None


_ANY_PROTOCOL = Annotated[dict[str, Any], As(_Row, is_open=True)]


@dataclass
class Measurement:
    """Figures of a task and how they came about.

    Attributes:
        name: of a task in the table: `"perplexity"`, `"copa"`, …; rows of others are kept as they are.
        protocol: what must be equal for two measurements to be comparable: the data, the number of items or tokens,
            shots, limit, version of the task, windows, dtype; `tuning`: task and settings of the tuning that the model
            went through, missing or None before tuning.
        environment: device, batch size, `product_dtype` (in which products ran: float32 on a CPU that is slow in the
            model's dtype) and versions of libraries, which move a figure by rounding only.
    """

    name: str
    metrics: dict[str, Any]
    protocol: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def from_row(cls, name: str, row: Mapping[str, Any]) -> Measurement:
        """Sorts what measuring a task returned into its three parts."""
        metrics, environment = task_of(name).metrics, {**_ENVIRONMENT, **_LATER_ENVIRONMENT}
        return cls(
            name,
            {key: None if row[key] == math.inf else row[key] for key in metrics if key in row},
            {key: value for key, value in row.items() if key not in metrics and key not in environment},
            {key: row[key] for key in environment if key in row},
        )

    def check_record(self, where: str) -> None:
        """Raises ValueError where a row from a file is not what its task has; what another package's task has is not
        known where that is not imported."""
        self.environment = build_fields(_ENVIRONMENT, _LATER_ENVIRONMENT, self.environment, f"{where}.environment")
        if self.name not in TASKS:
            self.metrics = build(dict[str, float | None], self.metrics, f"{where}.metrics")
            self.protocol = build(_ANY_PROTOCOL, self.protocol, f"{where}.protocol")
            return
        task = TASKS[self.name]
        metrics = {key: kind for key, kind in task.metrics.items() if key not in task.optional}
        optional = {key: task.metrics[key] for key in task.optional}
        tuning = {"tuning": dict[str, Any] | None}
        self.metrics = build_fields(metrics, optional, self.metrics, f"{where}.metrics")
        self.protocol = build_fields(task.protocol, tuning, self.protocol, f"{where}.protocol")

    @property
    def num_fewshot(self) -> int:
        return int(self.protocol.get("num_fewshot", 0))

    @property
    def tuning(self) -> dict[str, Any] | None:
        """Task and settings of the tuning that the model went through; None before tuning."""
        return self.protocol.get("tuning")

    @property
    def key(self) -> tuple[str, int, bool]:
        """What one of the rows of a model stands for: name, shots, and whether it was measured after tuning."""
        return self.name, self.num_fewshot, self.tuning is not None

    def recovered(self, metric: str, dense: Measurement) -> float | None:
        """The share of the dense model's figure: for perplexity and bits per byte, where less is better, dense ÷
        sparse. None where a figure is missing, or would be divided by zero."""
        ours, theirs = self.value(metric), dense.value(metric)
        share = (theirs, ours) if metric in ("perplexity", "bits_per_byte") else (ours, theirs)
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

    def follows(self, request: Mapping[str, Any]) -> bool:
        """Whether this was measured as `request`, a part of a protocol, asks."""
        for key, asked in request.items():
            value = self.protocol.get(key)
            # A name on the Hub is known before its text is read, and the text's SHA-256 only after.
            if isinstance(asked, Mapping) and isinstance(value, Mapping):
                value = {part: value.get(part) for part in asked}
            if value != asked:
                return False
        return True


@dataclass
class EvaluationResults:
    """What was measured of a sparse model (`sparse`) and of the dense model it was made from (`dense`).

    Attributes:
        fingerprint: of the sparse model's weights (`fingerprint(model)`): the results are of these alone, but for
            those before tuning, which are of the model that was tuned, and those after it that were taken over with
            `take_tuned`, which are of what was made of this model.
        sparse, dense: measurements, at most one for each name and number of shots, before tuning and after it.
        dense_model: the dense model as it was named, a local folder by its last part; `dense_revision`: its commit.
    """

    fingerprint: str
    sparse: list[Measurement] = field(default_factory=list)
    dense: list[Measurement] = field(default_factory=list)
    dense_model: str | None = None
    dense_revision: str | None = None
    schema_version: Annotated[int, Version(SCHEMA_VERSION)] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self._on_disk: frozenset[tuple[str, Any]] = frozenset()  # `_keys` of what its file held last

    def pairs(self) -> list[tuple[Measurement | None, Measurement | None]]:
        """Each measurement of the sparse model with that of the dense model by the same protocol, or, where there is
        none, one of the same name by another (see `Measurement.differences`); then those of the dense model alone.
        What was measured before tuning stands beside what was before it, and after it beside after."""
        pairs: list[tuple[Measurement | None, Measurement | None]] = []
        for ours in self.sparse:
            others = [row for row in self.dense if (row.name, row.key[2]) == (ours.name, ours.key[2])]
            pairs.append((ours, min(others, key=lambda row: len(ours.differences(row)), default=None)))
        taken = [other for _, other in pairs]
        return pairs + [(None, other) for other in self.dense if other not in taken]

    def comparable(self) -> list[tuple[Measurement, Measurement]]:
        """The pairs that were measured by the same protocol: sparse, dense."""
        pairs = [(ours, other) for ours, other in self.pairs() if ours is not None and other is not None]
        return [(ours, other) for ours, other in pairs if not ours.differences(other)]

    def mean_f1(self, part: str, num_fewshot: int = 0, tuned: bool = False) -> float | None:
        """Mean macro F1 of `part` ("sparse" or "dense"), before or after tuning, over the study's four tasks; None
        where not all were measured in one way."""
        rows = [row for row in getattr(self, part) if row.name in STUDY_TASKS and row.key[1:] == (num_fewshot, tuned)]
        if len({tuple(row.protocol[key] for key in ("limit", "split", "dtype", "prepend_bos")) for row in rows}) > 1:
            return None
        if any(row.tuning != rows[0].tuning for row in rows):
            return None
        return mean_f1({row.name: row.metrics for row in rows})

    def add(self, part: str, measurement: Measurement) -> None:
        """Adds a measurement to `part`, in the place of an earlier one of the same name and number of shots, both
        before tuning or both after it."""
        rows: list[Measurement] = getattr(self, part)
        for row in [row for row in rows if row.key == measurement.key]:
            rows.remove(row)
        rows.append(measurement)

    def take_before(self, other: EvaluationResults) -> None:
        """Takes over what `other`, of the model that was tuned, holds from before tuning: its own column, and the
        dense model's, unless another dense model was measured here. What was measured here stays."""
        self._take(other, lambda part, row: row.tuning is None)

    def _take(self, other: EvaluationResults, wanted: Callable[[str, Measurement], bool]) -> None:
        """Takes over `wanted` rows of what was not measured here; of a dense model only while it is the same one."""
        theirs = other.dense_model, other.dense_revision
        same = (self.dense_model, self.dense_revision) == theirs
        for part in _PARTS:
            rows: list[Measurement] = getattr(self, part)
            if part == "dense" and not same and any(row.tuning is None for row in rows):
                continue
            keys = {row.key for row in rows}
            new = [row for row in getattr(other, part) if row.key not in keys and wanted(part, row)]
            rows.extend(copy.deepcopy(new))
            if part == "dense" and new:
                self.dense_model, self.dense_revision = theirs

    def take_baseline(self, other: EvaluationResults) -> None:
        """Takes the dense column from `other`, of a dense model: of one that was tuned as this one was, say. What it
        holds from before tuning goes in the place of all from then that was here, and what it holds from after it in
        the place of rows of the same kind. Raises ValueError where `other` is of a sparse model, or holds nothing of a
        dense one."""
        if other.sparse or not other.dense:
            raise ValueError(
                f"{RESULTS_NAME} to take the dense column from must be of a dense model; it holds {len(other.sparse)} "
                f"rows of a sparse model and {len(other.dense)} of a dense one"
            )
        taken = {row.key for row in other.dense}
        replaced = {row.key[2] for row in other.dense}
        # Before tuning it may be another dense model; after it each task has its own.
        kept = [row for row in self.dense if row.key not in taken and (row.key[2] or False not in replaced)]
        if self.dense_model is None or False in replaced:
            self.dense_model, self.dense_revision = other.dense_model, other.dense_revision
        self.dense[:] = [*kept, *copy.deepcopy(other.dense)]

    def take_tuned(self, other: EvaluationResults) -> None:
        """Takes over what `other` holds from after a tuning of this very model, which cannot be measured by itself
        because the tuning gave it another head, as for KorQuAD. It goes in the place of rows of the same kind. Raises
        ValueError where `other` is of a model with other weights, or holds nothing from after tuning."""
        rows = [(part, row) for part in _PARTS for row in getattr(other, part) if row.tuning is not None]
        if not rows or other.fingerprint != self.fingerprint:
            why = "were measured on a model tuned from other weights" if rows else "hold nothing from after tuning"
            raise ValueError(f"the {RESULTS_NAME} to take rows after tuning from {why}")
        for part, row in rows:
            self.add(part, copy.deepcopy(row))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `evaluation_results.json` into `directory`, whole or not at all. Rows of the same weights that
        another process has written there since this one read or wrote the file are taken over."""
        path = Path(directory) / RESULTS_NAME
        with locked(path.with_name(f".{RESULTS_NAME}.lock")):
            with suppress(FileNotFoundError, ValueError):
                theirs, seen = EvaluationResults.load(path), self._on_disk
                if theirs.fingerprint == self.fingerprint:
                    self._take(theirs, lambda part, row: (part, row.key) not in seen)
            write_text(path, to_json(self))
            self._on_disk = self._keys()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResults:
        """Reads results from their file. Raises ValueError, which names the field, where it is damaged, of a newer
        schema, or edited so that a field cannot be right."""
        results: EvaluationResults = read_record(cls, path, "is not a results file of optimum-ksparse")
        results.schema_version = SCHEMA_VERSION
        results._on_disk = results._keys()
        return results

    def _keys(self) -> frozenset[tuple[str, Any]]:
        """Part and key of each row."""
        return frozenset((part, row.key) for part in _PARTS for row in getattr(self, part))

    def _repr_html_(self) -> str:
        return results_html(self)

    def check_record(self, where: str) -> None:
        """Raises ValueError where a measurement is there twice."""
        for part in _PARTS:
            keys = [row.key for row in getattr(self, part)]
            if len(set(keys)) < len(keys):
                i = next(i for i, key in enumerate(keys) if key in keys[:i])
                name, shots, tuned = keys[i]
                after = " after tuning" if tuned else ""
                raise ValueError(f"{part}[{i}] is a second measurement of {name} with {shots} shots{after}")
