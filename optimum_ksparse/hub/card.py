"""The model card: report and results → README.md. Formats numbers, never computes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..evaluation import KOBEST_TASKS, EvaluationResults, Measurement
from ..pattern import Pattern
from ..report import SparsityReport
from .markdown import environment
from .metadata import merge_metadata

LANGUAGES = ("en", "ko")
BEGIN = "<!-- optimum-ksparse: begin. This section is written anew at each push; write outside of it. -->"
END = "<!-- optimum-ksparse: end -->"
_SECTION = re.compile(r"<!-- optimum-ksparse: begin\b.*?<!-- optimum-ksparse: end -->", re.DOTALL)
_MARKER = re.compile(r"<!-- optimum-ksparse: (begin\b[^\n]*?|end )-->")

_TASK_TITLES = {"boolq": "BoolQ", "copa": "COPA", "hellaswag": "HellaSwag", "sentineg": "SentiNeg", "wic": "WiC"}
_CHANCE = {"boolq": 50, "copa": 50, "hellaswag": 25, "sentineg": 50, "wic": 50}


@dataclass
class AdapterFacts:
    """What a card says of an adapter: its kind (`"LORA"`), its settings by name, its trained parameters."""

    kind: str
    settings: dict[str, Any]
    num_parameters: int


@dataclass
class CardSubject:
    """What a card is about.

    Attributes:
        name: title; `repo_id`: where it is published, None while it is not.
        base_model: Hub id of what was pruned, or of an adapter's sparse base; None for a local folder, whose name is
            then `base_name`. base_revision: its commit.
        storage: "packed" or "dense". dtype: of the weights. file_bytes: of all weight files.
        dense_revision: branch that holds the dense variant, or None.
        figures: file → whether it was drawn.
        adapter: None for a model of its own.
    """

    name: str
    report: SparsityReport | None
    results: EvaluationResults | None
    metadata: ModelCardData
    storage: str
    dtype: str
    file_bytes: int
    repo_id: str | None = None
    base_model: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    dense_revision: str | None = None
    figures: dict[str, bool] = field(default_factory=dict)
    adapter: AdapterFacts | None = None
    is_causal: bool = True


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


def render_card(subject: CardSubject, language: str = "en", existing: str | None = None) -> str:
    """The card as the text of README.md.

    Args:
        language: "en" or "ko".
        existing: the card that is there already. What a person wrote outside the marked section stays, and so do the
            metadata that this package does not set.
    """
    front, body = _split(existing or "")
    template = environment().get_template(f"card_{language}.md.jinja")
    section = template.render(**_view(subject), begin=BEGIN, end=END).strip()
    metadata = merge_metadata(front, subject.metadata.to_dict())
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{block}---\n\n{_insert(body, section)}\n"


def result_rows(results: EvaluationResults | None) -> list[ResultRow]:
    """Perplexity, then the tasks of KoBEST in their order; what was not measured has no figures."""
    rows: list[ResultRow] = []
    pairs = results.pairs() if results is not None else []
    for name in ("perplexity", *KOBEST_TASKS):
        metrics = ("perplexity", "bits_per_byte") if name == "perplexity" else ("acc", "f1")
        measured = [pair for pair in pairs if pair[0].name == name]
        for metric in metrics:
            rows += [_result_row(name, metric, *pair) for pair in measured] or [_result_row(name, metric, None, None)]
    for shots in sorted({ours.num_fewshot for ours, _ in pairs if ours.name in KOBEST_TASKS}) or [0]:
        sparse = results.mean_f1("sparse", shots) if results is not None else None
        dense = results.mean_f1("dense", shots) if results is not None else None
        fair = not any(row.differences for row in rows if row.num_fewshot == shots and row.metric == "f1")
        recovered = sparse / dense if sparse is not None and dense and fair else None
        rows.append(ResultRow("mean", "f1", shots, dense if fair else None, sparse, recovered, (None, None), []))
    return rows


def _result_row(name: str, metric: str, ours: Measurement | None, other: Measurement | None) -> ResultRow:
    if ours is None:
        return ResultRow(_TASK_TITLES.get(name, name), metric, 0, None, None, None, (None, None), [])
    differences = [] if other is None else ours.differences(other)
    errors = [row.metrics.get("acc_stderr") if row is not None and metric == "acc" else None for row in (other, ours)]
    return ResultRow(
        task=_TASK_TITLES.get(name, name),
        metric=metric,
        num_fewshot=ours.num_fewshot,
        dense=other.metrics.get(metric) if other is not None else None,
        sparse=ours.metrics.get(metric),
        recovered=ours.recovered(metric, other) if other is not None and not differences else None,
        stderr=(errors[0], errors[1]),
        differences=differences,
    )


def _view(subject: CardSubject) -> dict[str, Any]:
    """What the templates see."""
    results, report = subject.results, subject.report
    sparse = results.sparse if results is not None else []
    pattern = Pattern(str(report.config["pattern"])) if report is not None else None
    return {
        "card": subject,
        "report": report,
        "results": results,
        "rows": result_rows(results),
        "perplexities": [row for row in sparse if row.name == "perplexity"],
        "tasks": [(_TASK_TITLES[row.name], _CHANCE[row.name], row) for row in sparse if row.name in _TASK_TITLES],
        "environments": _environments(results),
        "pattern": pattern,
        "limited": any(row.protocol.get("limit") for row in sparse),
        "packed_ratio": report.packed_bytes / report.dense_bytes
        if report is not None and report.dense_bytes
        else None,
    }


def _environments(results: EvaluationResults | None) -> list[tuple[str, dict[str, str]]]:
    """Every device and set of versions that something was measured with; sets that agree are one."""
    found: list[tuple[str, dict[str, str]]] = []
    for row in [*results.sparse, *results.dense] if results is not None else []:
        device, versions = row.environment["device"], row.environment["versions"]
        for other, known in found:
            if other == device and all(known.get(name, value) == value for name, value in versions.items()):
                known.update(versions)
                break
        else:
            found.append((device, dict(versions)))
    return found


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card. Raises ValueError where its metadata are damaged, which would be lost."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, text.strip()
    try:
        front = yaml.safe_load(match.group(2)) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"the metadata of the README.md that is there are not YAML: mend them first; {error}"
        ) from None
    if not isinstance(front, dict):
        raise ValueError("the metadata of the README.md that is there are no `key: value` pairs: mend them first")
    return front, text[match.end() :].strip()


def _insert(body: str, section: str) -> str:
    """Puts the section in the place of the marked one, or after what a person wrote."""
    if _is_boilerplate(body):
        body = ""
    if len(_SECTION.findall(body)) == 1:
        return _SECTION.sub(lambda match: section, body)
    # No section, or one that was edited so that its bounds are not clear: nothing that a person wrote may go.
    body = _MARKER.sub("", body).strip()
    return f"{body}\n\n{section}" if body else section


def _is_boilerplate(body: str) -> bool:
    """The unfilled form that transformers and PEFT write beside a checkpoint."""
    return "# Model Card for" in body and body.count("[More Information Needed]") > 20
