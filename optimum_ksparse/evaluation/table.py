"""Results as the rows of a table: dense, sparse, recovered."""

from __future__ import annotations

from dataclasses import dataclass

from .kobest_data import KOBEST_TASKS, STUDY_TASKS
from .results import EvaluationResults, Measurement
from .schemas import SCHEMAS
from .tuning import tuning_title

TASK_TITLES = {"boolq": "BoolQ", "copa": "COPA", "hellaswag": "HellaSwag", "sentineg": "SentiNeg", "wic": "WiC"}
OTHER_TITLES = {"nsmc_1": "NSMC, prompt 1", "nsmc_2": "NSMC, prompt 2", "korquad": "KorQuAD"}
MEAN_TITLE = "mean (COPA, HellaSwag, BoolQ, SentiNeg)"
Pair = tuple[Measurement | None, Measurement | None]
_FIRST = ("perplexity", *KOBEST_TASKS)


@dataclass
class ResultRow:
    """One line of the results table. `name` is the measurement's, or "mean"; tables name its shots unless they are the
    `usual_shots`; `tuning` is the title of the tuning that it was measured after, None before; `differences` names
    what keeps the two from being comparable."""

    name: str
    task: str
    metric: str
    num_fewshot: int
    dense: float | None
    sparse: float | None
    recovered: float | None
    stderr: tuple[float | None, float | None]
    differences: list[str]
    tuning: str | None = None
    usual_shots: int = 0


def result_rows(results: EvaluationResults | None) -> list[ResultRow]:
    """What was measured: perplexity, the tasks of KoBEST in their order and their means, then all else. Of each kind
    what was measured before tuning comes first."""
    if results is None:
        return []
    pairs = results.pairs()
    rows = _rows_of(_FIRST, pairs)
    rows += _means(results, rows)
    return rows + _rows_of(tuple(name for name in SCHEMAS if name not in _FIRST), pairs)


def _rows_of(names: tuple[str, ...], pairs: list[Pair]) -> list[ResultRow]:
    rows: list[ResultRow] = []
    for name in names:
        measured = [pair for pair in pairs if _measured(pair).name == name]
        measured.sort(key=lambda pair: _measured(pair).tuning is not None)
        rows += [_result_row(name, metric, *pair) for metric in SCHEMAS[name].shown for pair in measured]
    return [row for row in rows if row.dense is not None or row.sparse is not None]


def _means(results: EvaluationResults, rows: list[ResultRow]) -> list[ResultRow]:
    """Mean F1 of KoBEST where all of its tasks were measured, for each number of shots, before and after tuning."""
    everything = [*results.sparse, *results.dense]
    found = {row.key[1:]: tuning_title(row.tuning) for row in everything if row.name in KOBEST_TASKS}
    means = []
    for shots, tuned in sorted(found):
        title = found[shots, tuned]
        sparse, dense = (results.mean_f1(part, shots, tuned) for part in ("sparse", "dense"))
        if sparse is None and dense is None:
            continue
        tasks = [
            row
            for row in rows
            if row.name in STUDY_TASKS
            and row.metric == "f1"
            and (row.num_fewshot, row.tuning is not None) == (shots, tuned)
        ]
        differences, recovered = [], None
        if sparse is not None and dense is not None:
            differences = list(dict.fromkeys(name for row in tasks for name in row.differences))
            recovered = sparse / dense if dense and not differences else None
        means.append(
            ResultRow("mean", "mean", "f1", shots, dense, sparse, recovered, (None, None), differences, title)
        )
    return means


def _measured(pair: Pair) -> Measurement:
    """The sparse model's measurement of a pair, or, where there is none, the dense model's."""
    found = pair[0] or pair[1]
    assert found is not None
    return found


def _result_row(name: str, metric: str, ours: Measurement | None, other: Measurement | None) -> ResultRow:
    schema = SCHEMAS[name]
    known = _measured((ours, other))
    differences, recovered = [], None
    if ours is not None and other is not None:
        differences = ours.differences(other)
        recovered = None if differences else ours.recovered(metric, other)
    dense, sparse = (row.value(metric) if row is not None else None for row in (other, ours))
    error = schema.stderr.get(metric, "")
    errors = [row.metrics.get(error) if row is not None else None for row in (other, ours)]
    return ResultRow(
        name=name,
        task=TASK_TITLES.get(name) or OTHER_TITLES.get(name, name),
        metric=metric,
        num_fewshot=known.num_fewshot,
        dense=dense,
        sparse=sparse,
        recovered=recovered,
        stderr=(errors[0], errors[1]),
        differences=differences,
        tuning=tuning_title(known.tuning),
        usual_shots=schema.usual_shots,
    )


def results_table(results: EvaluationResults) -> str:
    """A table for a terminal."""
    rows: list[tuple[str, ...]] = [("", "", "dense", "sparse", "recovered")]
    for row in result_rows(results):
        title = MEAN_TITLE if row.task == "mean" else row.task
        shots = f", {row.num_fewshot}-shot" if row.num_fewshot != row.usual_shots else ""
        figures = ["not evaluated" if value is None else f"{value:.4f}" for value in (row.dense, row.sparse)]
        recovered = "" if row.recovered is None else f"{100 * row.recovered:.1f}%"
        differences = f"not comparable: {', '.join(row.differences)}" if row.differences else recovered
        tuning = f", after {row.tuning} tuning" if row.tuning is not None else ""
        rows.append((title + shots + tuning, row.metric, *figures, differences))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
