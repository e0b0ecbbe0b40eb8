"""The model index: what was measured, as the Hub reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation import KOBEST_TASKS, Measurement, tuning_title
from ..evaluation.kobest_data import KOBEST_DATASET
from ..evaluation.nsmc_data import NSMC_DATASET

METRICS = ("perplexity", "accuracy", "f1", "exact_match")
KORQUAD_DATASET = "KorQuAD/squad_kor_v1"


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
    if row.name in KOBEST_TASKS:
        return ("accuracy", "f1")
    return ("exact_match", "f1") if row.name == "korquad" else ("accuracy",)


def index_entries(row: Measurement) -> list[EvalResult]:
    """The entries of a measurement; none for a perplexity that is no number."""
    if row.name == "perplexity":
        return [] if row.metrics["perplexity"] is None else [_perplexity(row)]
    if row.name in KOBEST_TASKS:
        return _kobest(row)
    return _korquad(row) if row.name == "korquad" else [_nsmc(row)]


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


def _kobest(row: Measurement) -> list[EvalResult]:
    kind = "text-classification" if row.name in ("boolq", "sentineg", "wic") else "multiple-choice"
    common: dict[str, Any] = {
        **_task(kind, row),
        "dataset_type": KOBEST_DATASET,
        "dataset_name": "KoBEST",
        "dataset_config": row.name,
        "metric_args": _arguments(row, "num_fewshot", "limit", "num_samples"),
        **_data(row),
    }
    return [
        _Entry(metric_type="accuracy", metric_value=row.metrics["acc"], **common),
        _Entry(metric_type="f1", metric_name="macro F1", metric_value=row.metrics["f1"], **common),
    ]


def _nsmc(row: Measurement) -> EvalResult:
    return _Entry(
        **_task("text-classification", row),
        **_data(row),
        dataset_type=NSMC_DATASET,
        dataset_name="NSMC",
        metric_type="accuracy",
        metric_name=f"accuracy, prompt {row.name.removeprefix('nsmc_')}",
        metric_value=row.metrics["accuracy"],
        metric_args=_arguments(row, "num_fewshot", "num_samples", "seed", "prompt"),
    )


def _korquad(row: Measurement) -> list[EvalResult]:
    common: dict[str, Any] = {
        **_task("question-answering", row),
        **_data(row),
        "dataset_type": KORQUAD_DATASET,
        "dataset_name": "KorQuAD 1.0",
        "metric_args": _arguments(row, "seq_len", "stride", "num_samples"),
    }
    return [_Entry(metric_type=metric, metric_value=row.metrics[metric], **common) for metric in ("exact_match", "f1")]


def _task(kind: str, row: Measurement) -> dict[str, Any]:
    title = tuning_title(row.tuning)
    name = None if title is None else f"{kind.replace('-', ' ')}, after {title} tuning"
    return {"task_type": kind, "task_name": name}


def _arguments(row: Measurement, *keys: str) -> dict[str, Any]:
    """Parts of the protocol, and the tuning where there was one."""
    tuned = {} if row.tuning is None else {"tuning": row.tuning}
    return {**{key: row.protocol[key] for key in keys}, **tuned}


def _data(row: Measurement) -> dict[str, Any]:
    """Split, and what tells local files from the data set on the Hub."""
    data = row.protocol["data"]
    return {"dataset_split": row.protocol["split"], "dataset_args": None if "name" in data else data}
