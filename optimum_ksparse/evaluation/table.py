"""Results as the rows of a table: dense, sparse, recovered."""

from __future__ import annotations

from dataclasses import dataclass

from .kobest_data import KOBEST_TASKS
from .results import EvaluationResults, Measurement

TASK_TITLES = {"boolq": "BoolQ", "copa": "COPA", "hellaswag": "HellaSwag", "sentineg": "SentiNeg", "wic": "WiC"}
MEAN_TITLE = "mean (COPA, HellaSwag, BoolQ, SentiNeg)"


@dataclass
class ResultRow:
    """One line of the results table. `differences` names what keeps the two from being comparable."""

    task: str
    metric: str
    num_fewshot: int
    dense: float | None
    sparse: float | None
    recovered: float | None
    stderr: tuple[float | None, float | None]
    differences: list[str]


def result_rows(results: EvaluationResults | None) -> list[ResultRow]:
    """Perplexity, then the tasks of KoBEST in their order; what was not measured has no figures."""
    rows: list[ResultRow] = []
    pairs = results.pairs() if results is not None else []
    for name in ("perplexity", *KOBEST_TASKS):
        metrics = ("perplexity", "bits_per_byte") if name == "perplexity" else ("acc", "f1")
        measured = [pair for pair in pairs if name in (row.name for row in pair if row is not None)]
        for metric in metrics:
            rows += [_result_row(name, metric, *pair) for pair in measured] or [_result_row(name, metric, None, None)]
    everything = [*results.sparse, *results.dense] if results is not None else []
    for shots in sorted({row.num_fewshot for row in everything if row.name in KOBEST_TASKS}) or [0]:
        sparse = results.mean_f1("sparse", shots) if results is not None else None
        dense = results.mean_f1("dense", shots) if results is not None else None
        tasks = [row for row in rows if row.metric == "f1" and row.num_fewshot == shots and row.task != "WiC"]
        differences = (
            list(dict.fromkeys(name for row in tasks for name in row.differences)) if sparse and dense else []
        )
        recovered = sparse / dense if sparse is not None and dense and not differences else None
        rows.append(ResultRow("mean", "f1", shots, dense, sparse, recovered, (None, None), differences))
    return rows


def _result_row(name: str, metric: str, ours: Measurement | None, other: Measurement | None) -> ResultRow:
    known = [row for row in (ours, other) if row is not None]
    differences, recovered = [], None
    if ours is not None and other is not None:
        differences = ours.differences(other)
        recovered = None if differences else ours.recovered(metric, other)
    dense, sparse = (row.value(metric) if row is not None else None for row in (other, ours))
    errors = [row.metrics.get("acc_stderr") if row is not None and metric == "acc" else None for row in (other, ours)]
    return ResultRow(
        task=TASK_TITLES.get(name, name),
        metric=metric,
        num_fewshot=known[0].num_fewshot if known else 0,
        dense=dense,
        sparse=sparse,
        recovered=recovered,
        stderr=(errors[0], errors[1]),
        differences=differences,
    )


def results_table(results: EvaluationResults) -> str:
    """A table for a terminal."""
    rows: list[tuple[str, ...]] = [("", "", "dense", "sparse", "recovered")]
    for row in result_rows(results):
        if row.dense is None and row.sparse is None:
            continue
        title = MEAN_TITLE if row.task == "mean" else row.task
        shots = f", {row.num_fewshot}-shot" if row.num_fewshot else ""
        figures = ["not evaluated" if value is None else f"{value:.4f}" for value in (row.dense, row.sparse)]
        recovered = "" if row.recovered is None else f"{100 * row.recovered:.1f} %"
        differences = f"not comparable: {', '.join(row.differences)}" if row.differences else recovered
        rows.append((title + shots, row.metric, *figures, differences))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
