"""What a row of results holds: an entry for each kind of measurement."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from .kobest_data import KOBEST_TASKS
from .nsmc import NUM_FEWSHOT as NSMC_FEWSHOT

Field = tuple[tuple[type, ...], Any, Any]  # types, smallest and largest value
Fields = dict[str, Field]

_SHARE: Field = (int, float), 0.0, 1.0
_OPTIONAL_SHARE: Field = (int, float, type(None)), 0.0, 1.0
_PER_CENT: Field = (int, float), 0.0, 100.0
_COUNT: Field = (int,), 1, None
_NATURAL: Field = (int,), 0, None
_FLAG: Field = (bool,), None, None
_TEXT: Field = (str,), None, None
_OBJECT: Field = (dict,), None, None


@dataclass(frozen=True)
class Schema:
    """One kind of measurement.

    Attributes:
        metrics: its figures; `optional_metrics`: those that may be missing. protocol: how it was measured.
        shown: metrics in tables, in their order. stderr: metric → that which is its standard error.
        usual_shots: number of shots that a table does not name.
    """

    metrics: Fields
    protocol: Fields
    shown: tuple[str, ...]
    optional_metrics: Fields = field(default_factory=dict)
    stderr: dict[str, str] = field(default_factory=dict)
    usual_shots: int = 0


_PERPLEXITY = Schema(
    metrics={
        "perplexity": ((int, float, type(None)), 1.0, None),  # null: too large for a float, which JSON cannot hold
        "bits_per_byte": ((int, float), 0.0, None),
    },
    protocol={
        "texts": _OBJECT,
        "seq_len": ((int,), 2, None),
        "stride": ((int, type(None)), 1, None),
        "max_tokens": ((int, type(None)), 2, None),
        "num_windows": _COUNT,
        "num_tokens": _COUNT,
        "num_bytes": _NATURAL,
        "prepend_bos": _FLAG,
        "dtype": _TEXT,
    },
    shown=("perplexity", "bits_per_byte"),
)
_KOBEST = Schema(
    metrics={"acc": _SHARE, "acc_stderr": _OPTIONAL_SHARE, "f1": _SHARE},
    optional_metrics={"acc_norm": _SHARE},
    protocol={
        "task": _TEXT,
        "task_version": ((int, float, str), None, None),
        "num_fewshot": _NATURAL,
        "limit": ((int, type(None)), 1, None),
        "data": _OBJECT,
        "split": _TEXT,
        "num_samples": _COUNT,
        "items_sha256": _TEXT,
        "prepend_bos": _FLAG,
        "dtype": _TEXT,
    },
    shown=("acc", "f1"),
    stderr={"acc": "acc_stderr"},
)
_NSMC = Schema(
    metrics={
        "accuracy": _SHARE,
        "accuracy_stderr": _OPTIONAL_SHARE,
        "macro_f1": _SHARE,
        "greedy_accuracy": _OPTIONAL_SHARE,  # null: both answers begin with the same token
    },
    protocol={
        "data": _OBJECT,
        "split": _TEXT,
        "num_samples": _COUNT,
        "num_fewshot": _NATURAL,
        "max_example_tokens": _COUNT,
        "seed": _NATURAL,
        "prompt": _TEXT,
        "example_labels": ((list,), None, None),
        "items_sha256": _TEXT,
        "greedy_note": ((str, type(None)), None, None),
        "prepend_bos": _FLAG,
        "dtype": _TEXT,
    },
    shown=("accuracy", "greedy_accuracy"),
    stderr={"accuracy": "accuracy_stderr"},
    usual_shots=NSMC_FEWSHOT,
)
_KORQUAD = Schema(
    metrics={"exact_match": _PER_CENT, "f1": _PER_CENT},
    protocol={
        "data": _OBJECT,
        "split": _TEXT,
        "num_samples": _COUNT,
        "seq_len": ((int,), 2, None),
        "max_question_tokens": _COUNT,
        "stride": _COUNT,
        "max_answer_tokens": _COUNT,
        "num_best": _COUNT,
        "prepend_bos": _FLAG,
        "dtype": _TEXT,
    },
    shown=("exact_match", "f1"),
)
SCHEMAS: dict[str, Schema] = {
    "perplexity": _PERPLEXITY,
    **dict.fromkeys(KOBEST_TASKS, _KOBEST),
    "nsmc_1": _NSMC,
    "nsmc_2": _NSMC,
    "korquad": _KORQUAD,
}
ENVIRONMENT: Fields = {"device": _TEXT, "batch_size": _COUNT, "versions": _OBJECT}
# Of every kind; missing where the model was not tuned.
OPTIONAL_PROTOCOL: Fields = {"tuning": ((dict, type(None)), None, None)}


def schema_of(name: str) -> Schema:
    """The schema of a measurement. Raises ValueError for a name that is not known."""
    if name not in SCHEMAS:
        raise ValueError(f"name={name!r} is not known; allowed: {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def check_field(where: str, value: Any, types: tuple[type, ...], least: Any, most: Any) -> None:
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
