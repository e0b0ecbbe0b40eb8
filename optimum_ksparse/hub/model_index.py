"""The model index: what was measured, as the Hub reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation import Measurement, task_of, tuning_title

METRICS = ("perplexity", "accuracy", "f1", "exact_match")


@dataclass
class _Entry(EvalResult):
    """An entry that is written under the task of its own name: one after tuning is apart from the same before it. A
    client that reads the index and writes it anew puts them together."""

    @property
    def unique_identifier(self) -> tuple[Any, ...]:
        return (*super().unique_identifier, self.task_name)


def metric_types(row: Measurement) -> tuple[str, ...]:
    """The Hub's names of the metrics of a measurement."""
    if row.name == "perplexity":
        return ("perplexity",)
    hub = task_of(row.name).hub
    return () if hub is None else tuple(kind for kind, _ in hub.metrics.values())


def index_entries(row: Measurement) -> list[EvalResult]:
    """The entries of a measurement; none for a perplexity that is no number, and of a task that has no place there."""
    if row.name == "perplexity":
        return [] if row.metrics["perplexity"] is None else [_perplexity(row)]
    hub = task_of(row.name).hub
    if hub is None:
        return []
    data = row.protocol["data"]
    return [
        _Entry(
            **_task(hub.task_type, row),
            dataset_type=hub.dataset,
            dataset_name=hub.dataset_name,
            dataset_config=hub.dataset_config,
            dataset_split=row.protocol["split"],
            dataset_args=None if "name" in data else data,  # what tells local files from the data set on the Hub
            metric_type=kind,
            metric_name=name,
            metric_value=row.metrics[metric],
            metric_args=_arguments(row, *hub.arguments),
        )
        for metric, (kind, name) in hub.metrics.items()
    ]


def _perplexity(row: Measurement) -> EvalResult:
    texts = row.protocol["texts"]
    return _Entry(
        **_task("text-generation", row),
        dataset_type=texts.get("dataset", "local"),
        dataset_name="Korean Wikipedia" if texts.get("name") == "kowiki" else "local text",
        dataset_config=texts.get("configuration"),
        dataset_args={"sha256": texts.get("sha256")},
        metric_type="perplexity",
        metric_value=row.metrics["perplexity"],
        metric_args=_arguments(row, "seq_len", "stride", "prepend_bos", "num_tokens"),
    )


def _task(kind: str, row: Measurement) -> dict[str, Any]:
    title = tuning_title(row.tuning)
    name = None if title is None else f"{kind.replace('-', ' ')}, after {title} tuning"
    return {"task_type": kind, "task_name": name}


def _arguments(row: Measurement, *keys: str) -> dict[str, Any]:
    """Parts of the protocol, and the tuning where there was one."""
    tuned = {} if row.tuning is None else {"tuning": row.tuning}
    return {**{key: row.protocol[key] for key in keys}, **tuned}
