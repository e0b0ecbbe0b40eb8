"""The model index: what was measured, as the Hub reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation import HubEntry, Measurement, task_of, tuning_title

METRICS = ("perplexity", "accuracy", "f1", "exact_match")


@dataclass
class _Entry(EvalResult):
    """An entry that is written under the task of its own name: one after tuning is apart from the same before it. A
    client that reads the index and writes it anew puts them together."""

    @property
    def unique_identifier(self) -> tuple[Any, ...]:
        return (*super().unique_identifier, self.task_name)


def index_entries(row: Measurement) -> list[EvalResult]:
    """The entries of a measurement; none for a perplexity that is no number, and of a task that has no place there."""
    hub = task_of(row.name).hub
    if hub is None:
        return []
    title = tuning_title(row.tuning)
    task_name = None if title is None else f"{hub.task_type.replace('-', ' ')}, after {title} tuning"
    arguments = {key: row.protocol[key] for key in hub.arguments}
    return [
        _Entry(
            task_type=hub.task_type,
            task_name=task_name,
            **_dataset(row, hub),
            metric_type=kind,
            metric_name=name,
            metric_value=row.metrics[metric],
            metric_args=arguments if row.tuning is None else {**arguments, "tuning": row.tuning},
        )
        for metric, (kind, name) in hub.metrics.items()
        if row.metrics[metric] is not None
    ]


def _dataset(row: Measurement, hub: HubEntry) -> dict[str, Any]:
    """What of an entry says on what was measured."""
    if (texts := row.protocol.get("texts")) is not None:
        name = "Korean Wikipedia" if texts.get("name") == "kowiki" else hub.dataset_name
        place = {"dataset_type": texts.get("dataset", hub.dataset), "dataset_config": texts.get("configuration")}
        return {**place, "dataset_name": name, "dataset_args": {"sha256": texts.get("sha256")}}
    data = row.protocol["data"]
    place = {"dataset_type": hub.dataset, "dataset_config": hub.dataset_config, "dataset_split": row.protocol["split"]}
    # What tells local files from the data set on the Hub.
    return {**place, "dataset_name": hub.dataset_name, "dataset_args": None if "name" in data else data}
