"""Results as the rows of a table: dense, sparse, recovered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..records import aligned, as_html
from .kobest import KOBEST_TASKS, STUDY_TASKS
from .tasks import TASKS, task_of
from .tuning import tuning_title

if TYPE_CHECKING:
    from .results import EvaluationResults, Measurement

    Pair = tuple[Measurement | None, Measurement | None]

MEAN_TITLE = "KoBEST mean (COPA, HellaSwag, BoolQ, SentiNeg)"


@dataclass
class ResultRow:
    """One line of the results table. `name` is the measurement's, or "mean"; tables name its shots unless they are the
    `usual_shots`; `tuning` is the title of the tuning that it was measured after, None before; `differences` names
    what keeps the two from being comparable."""

    name: str
    title: str
    metric: str
    num_fewshot: int
    dense: float | None
    sparse: float | None
    recovered: float | None
    stderr: tuple[float | None, float | None]
    differences: list[str]
    tuning: str | None = None
    usual_shots: int = 0
    per_cent: bool = False


def result_rows(results: EvaluationResults | None) -> list[ResultRow]:
    """What was measured: perplexity, the tasks of KoBEST in their order and their means, then all else. Of each kind
    what was measured before tuning comes first."""
    if results is None:
        return []
    pairs = results.pairs()
    first = ("perplexity", *KOBEST_TASKS)
    names = dict.fromkeys([*TASKS, *(_measured(pair).name for pair in pairs)])
    rows = _rows_of(first, pairs)
    return [*rows, *_means(results, rows), *_rows_of([name for name in names if name not in first], pairs)]


def _rows_of(names: list[str] | tuple[str, ...], pairs: list[Pair]) -> list[ResultRow]:
    rows: list[ResultRow] = []
    for name in names:
        measured = [pair for pair in pairs if _measured(pair).name == name]
        measured.sort(key=lambda pair: _measured(pair).tuning is not None)
        shown = task_of(name).shown or dict.fromkeys(key for pair in measured for key in _measured(pair).metrics)
        rows += [_result_row(metric, *pair) for metric in shown for pair in measured]
    return [row for row in rows if row.dense is not None or row.sparse is not None]


def _means(results: EvaluationResults, rows: list[ResultRow]) -> list[ResultRow]:
    """Mean F1 of KoBEST where all of its tasks were measured, for each number of shots, before and after tuning."""
    everything = [*results.sparse, *results.dense]
    ways = {row.key[1:]: tuning_title(row.tuning) for row in everything if row.name in KOBEST_TASKS}
    means = []
    for (shots, tuned), tuning in sorted(ways.items()):
        dense, sparse = (results.mean_f1(part, shots, tuned) for part in ("dense", "sparse"))
        if dense is None and sparse is None:
            continue
        tasks = [row for row in rows if row.name in STUDY_TASKS and row.metric == "f1"]
        tasks = [row for row in tasks if (row.num_fewshot, row.tuning is not None) == (shots, tuned)]
        differences = list(dict.fromkeys(name for row in tasks for name in row.differences))
        if dense is None or sparse is None:
            differences = []
        recovered = sparse / dense if sparse is not None and dense and not differences else None
        figures = (dense, sparse, recovered, (None, None), differences, tuning)
        means.append(ResultRow("mean", MEAN_TITLE, "f1", shots, *figures))
    return means


def _measured(pair: Pair) -> Measurement:
    """The sparse model's measurement of a pair, or, where there is none, the dense model's."""
    row = pair[0] or pair[1]
    assert row is not None
    return row


def _result_row(metric: str, ours: Measurement | None, other: Measurement | None) -> ResultRow:
    row = _measured((ours, other))
    task = task_of(row.name)
    differences, recovered = [], None
    if ours is not None and other is not None:
        differences = ours.differences(other)
        recovered = None if differences else ours.recovered(metric, other)
    dense, sparse = (side.value(metric) if side is not None else None for side in (other, ours))
    errors = [side.metrics.get(task.stderr.get(metric, "")) if side is not None else None for side in (other, ours)]
    figures = (row.num_fewshot, dense, sparse, recovered, (errors[0], errors[1]), differences)
    how = (tuning_title(row.tuning), task.usual_shots, task.is_per_cent(metric))
    return ResultRow(row.name, task.full_title, metric, *figures, *how)


def results_table(results: EvaluationResults) -> str:
    """A table for a terminal."""
    return "\n".join(aligned(_cells(results)))


def results_html(results: EvaluationResults) -> str:
    """A table for a notebook, with a bar for what the sparse model recovers of the dense one's figure."""
    title = f"evaluation, dense: {results.dense_model}" if results.dense_model else "evaluation"
    return as_html(_cells(results), title, bars={4: [row.recovered for row in result_rows(results)]})


def _cells(results: EvaluationResults) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "", "dense", "sparse", "recovered")]
    for row in result_rows(results):
        shots = f", {row.num_fewshot}-shot" if row.num_fewshot != row.usual_shots else ""
        figures = ["not evaluated" if value is None else f"{value:.4f}" for value in (row.dense, row.sparse)]
        recovered = "" if row.recovered is None else f"{100 * row.recovered:.1f}%"
        differences = f"not comparable: {', '.join(row.differences)}" if row.differences else recovered
        tuning = f", after {row.tuning} tuning" if row.tuning is not None else ""
        rows.append((row.title + shots + tuning, row.metric, *figures, differences))
    return rows
