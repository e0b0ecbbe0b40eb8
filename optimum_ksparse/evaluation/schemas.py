"""What a row of results holds: an entry for each kind of measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from ..records import As, Between, Count, Positive, Share
from .kobest_data import KOBEST_TASKS
from .nsmc import NUM_FEWSHOT as NSMC_FEWSHOT

Fields = dict[str, Any]  # name → annotation, as `records.build` takes it

_PerCent = Annotated[float, Between(0.0, 100.0)]
_Length = Annotated[int, Between(2)]


class _Named(TypedDict, total=False):
    """Data as they are described, so far as cards and the model index show it."""

    name: str
    dataset: str
    configuration: str
    slice: str
    file: str


class _Texts(_Named):
    """With the SHA-256 of what was read."""

    sha256: str


_DATA = Annotated[dict[str, Any], As(_Named, is_open=True)]
_TEXTS = Annotated[dict[str, Any], As(_Texts, is_open=True)]


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
        "perplexity": Annotated[float, Between(1.0)] | None,  # null: too large for a float, which JSON cannot hold
        "bits_per_byte": Annotated[float, Between(0.0)],
    },
    protocol={
        "texts": _TEXTS,
        "seq_len": _Length,
        "stride": Positive | None,
        "max_tokens": _Length | None,
        "num_windows": Positive,
        "num_tokens": Positive,
        "num_bytes": Count,
        "prepend_bos": bool,
        "dtype": str,
    },
    shown=("perplexity", "bits_per_byte"),
)
_KOBEST = Schema(
    metrics={"acc": Share, "acc_stderr": Share | None, "f1": Share},
    optional_metrics={"acc_norm": Share},
    protocol={
        "task": str,
        "task_version": int | float | str,
        "num_fewshot": Count,
        "limit": Positive | None,
        "data": _DATA,
        "split": str,
        "num_samples": Positive,
        "items_sha256": str,
        "prepend_bos": bool,
        "dtype": str,
    },
    shown=("acc", "f1"),
    stderr={"acc": "acc_stderr"},
)
_NSMC = Schema(
    metrics={
        "accuracy": Share,
        "accuracy_stderr": Share | None,
        "macro_f1": Share,
        "greedy_accuracy": Share | None,  # null: both answers begin with the same token
    },
    protocol={
        "data": _DATA,
        "split": str,
        "num_samples": Positive,
        "num_fewshot": Count,
        "max_example_tokens": Positive,
        "seed": Count,
        "prompt": str,
        "example_labels": list[Any],
        "items_sha256": str,
        "greedy_note": str | None,
        "prepend_bos": bool,
        "dtype": str,
    },
    shown=("accuracy", "greedy_accuracy"),
    stderr={"accuracy": "accuracy_stderr"},
    usual_shots=NSMC_FEWSHOT,
)
_KORQUAD = Schema(
    metrics={"exact_match": _PerCent, "f1": _PerCent},
    protocol={
        "data": _DATA,
        "split": str,
        "num_samples": Positive,
        "seq_len": _Length,
        "max_question_tokens": Positive,
        "stride": Positive,
        "max_answer_tokens": Positive,
        "num_best": Positive,
        "prepend_bos": bool,
        "dtype": str,
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
ENVIRONMENT: Fields = {"device": str, "batch_size": Positive, "versions": dict[str, str]}
# Of every kind; missing where the model was not tuned.
OPTIONAL_PROTOCOL: Fields = {"tuning": dict[str, Any] | None}


def schema_of(name: str) -> Schema:
    """The schema of a measurement. Raises ValueError for a name that is not known."""
    if name not in SCHEMAS:
        raise ValueError(f"name={name!r} is not known; allowed: {', '.join(SCHEMAS)}")
    return SCHEMAS[name]
