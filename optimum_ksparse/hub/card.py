"""The model card: report and results → README.md. Formats numbers, never computes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from ..evaluation import KOBEST_TASKS, SPEED, TASKS, Measurement, ResultRow, result_rows, task_of, tuning_title
from ..kernels import GROUPS
from ..pattern import Pattern
from ..pruners import METHODS
from ..pruners.allocation import LEFT_DENSE
from ..pruners.existing import NOT_SPARSE
from ..records import describe_source
from ..report import SparsityReport
from ..version import __version__, install_command
from .existing import BEGIN, END, has_section, insert_section, is_unfilled_form, split_card
from .markdown import environment, phrases
from .metadata import build_metadata, merge_metadata
from .subject import CardSubject

# Name and metric of rows.
_DECISIVE = (("perplexity", "perplexity"), ("mean", "f1"), (SPEED.name, *SPEED.shown))


def render_card(subject: CardSubject, language: str = "en", existing: str | None = None) -> str:
    """The card in a language as the text of README.md. Of the card that is there already what a person wrote outside
    the marked section stays, and so do the metadata that this package does not set."""
    existing = (existing or "").removeprefix("\ufeff")
    line_break = "\r\n" if "\r\n" in existing else "\n"
    front, body = split_card(existing)
    # PEFT writes the path of a base that is a folder, as base and in a tag.
    folder, base = subject.local_source, front.get("base_model")
    if isinstance(base, str) and (base == folder or base != describe_source(base)):
        del front["base_model"]
    if folder is not None and isinstance(front.get("tags"), list):
        front["tags"] = [tag for tag in front["tags"] if not str(tag).endswith(f":{folder}")]
    if is_unfilled_form(body):
        front.pop("base_model", None)
        body = ""
    template = environment().get_template("card.md.jinja")
    view = {**_view(subject), "begin": BEGIN, "end": END, "say": phrases(language)}
    section = re.sub(r"\n{3,}", "\n\n", template.render(**view).strip())
    metadata = merge_metadata(front, build_metadata(subject).to_dict(), again=has_section(body))
    block = yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    ours = [part.replace("\n", line_break) for part in (f"---\n{block}---\n\n", section, "\n")]
    return ours[0] + insert_section(body, ours[1], line_break) + ours[2]


class _Dumper(yaml.SafeDumper):
    """Writes texts with line breaks and other signs that are not printed in quotes, so that they are read as they were
    (YAML folds some of them, as U+0085, otherwise)."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _view(subject: CardSubject) -> dict[str, Any]:
    """What the templates see."""
    results, report = subject.results, subject.report
    everything = [*results.sparse, *results.dense] if results is not None else []
    measured = (results.sparse or results.dense) if results is not None else []
    view = {
        "card": subject,
        "report": None,
        "pattern": None,
        "results": results,
        "decisive": _decisive(subject, measured),
        "sizes": None if subject.adapter is not None or not subject.file_bytes else _megabytes(subject),
        "bits": None,
        "rows": result_rows(results),
        "measured": measured,
        "perplexities": [row for row in measured if row.name == "perplexity"],
        "tasks": [(task_of(row.name).title, row) for row in measured if row.name in KOBEST_TASKS],
        "others": [
            (task_of(row.name).full_title, row, [(k, v) for k, v in _flat(row.protocol) if not k.startswith("tuning")])
            for row in measured
            if row.name not in ("perplexity", SPEED.name, *KOBEST_TASKS)
        ],
        "speeds": [row for row in measured if row.name == SPEED.name],
        # Of a file only these may choose a phrase of the catalogue.
        "metrics": {name + end for task in TASKS.values() for name in task.metrics for end in ("", ", %")},
        "both": results is not None and bool(results.dense),
        "limited": any(row.protocol.get("limit") for row in measured),
        "merge": None if subject.merge is None else subject.merge.totals(),
        "tuning": subject.tuning,
        "tunings": _tunings(measured),
        "tuning_title": tuning_title,
        "environments": _environments(everything),
        "install": install_command("finetune" if subject.adapter is not None else None),
        "citations": _citations(report, everything),
        "has_kernels": False,
        "quantised": None,
        "version": __version__,
    }
    if report is None:
        return view
    is_packed = subject.storage == "packed" and subject.adapter is None
    return view | _view_of_report(report, subject.dtype, is_packed)


def _decisive(subject: CardSubject, measured: list[Measurement]) -> list[tuple[ResultRow, dict[str, Any]]]:
    """What a reader decides by, of all that was measured of the model as it is now, each row with its protocol."""
    tuned = subject.tuning is not None
    protocols = {row.key[:2]: row.protocol for row in measured if row.key[2] == tuned}
    rows = [row for row in result_rows(subject.results) if (row.tuning is not None) == tuned]
    first = [row for row in rows if (row.name, row.metric) in _DECISIVE and row.sparse is not None]
    return [(row, protocols["copa" if row.name == "mean" else row.name, row.num_fewshot]) for row in first]


def _megabytes(subject: CardSubject) -> tuple[float | None, float]:
    """Megabytes of all parameters, were they dense in the dtype of the sparse layers, and of the weight files."""
    report = subject.report
    dense = None if report is None or not report.layers else report.num_parameters * _dense_bits(report) / 8e6
    return dense, subject.file_bytes / 1e6


def _dense_bits(report: SparsityReport) -> float:
    return 8 * report.dense_bytes / max(1, report.num_weights)


def _view_of_report(report: SparsityReport, dtype: str, is_packed: bool) -> dict[str, Any]:
    pattern, pruner = Pattern(str(report.config["pattern"])), report.pruner
    scope = METHODS[pruner].scope if pruner in METHODS else ""
    measured = any(row.relative_output_error is not None for row in report.layers)
    return {
        "report": report,
        "pattern": pattern,
        # Of an unstructured pattern what was asked for, which is the mean of the layers'.
        "pruned_to": ", ".join(report.patterns) if pattern.is_semi_structured else str(pattern),
        "zeros": str(pattern).rpartition("/")[0] if pattern.tile else str(pattern),
        "scope_name": "whole layer" if pattern.tile and scope == "output row" else scope,
        "refine": report.config.get("refine") or [],
        "reconstruction": report.reconstruction_losses,
        "holds": not report.changes,
        "holds_out": report.calibration.get("num_samples", 0) > 1,  # reconstruction does from two samples on
        "shows_errors": measured and not report.changes,
        "left_dense": LEFT_DENSE,
        "not_sparse": NOT_SPARSE,
        "found": pruner in METHODS and METHODS[pruner].recognise is not None,  # it was pruned elsewhere
        "quantised": report.config.get("values"),
        "bits": (_dense_bits(report), report.bits_per_weight) if report.layers and is_packed else None,
        "has_kernels": all(name in GROUPS for name in report.patterns) and dtype in ("bfloat16", "float16"),
    }


def _citations(report: SparsityReport | None, rows: list[Measurement]) -> list[str]:
    """BibTeX entries of what made the model, and of the data that it was measured on."""
    text = files(__package__).joinpath("templates/citations.bib").read_text(encoding="utf-8")
    others = re.findall(r"^% (\w+)\n(@.*?^\})$", text, re.M | re.S)
    names: set[Any] = {word for row in rows for word in (row.name, task_of(row.name).suite.lower())}
    method = ""
    if report is not None:
        method = METHODS[report.pruner].citation if report.pruner in METHODS else ""
        names |= {*(report.config.get("refine") or ()), report.config.get("allocation")}
        names |= {"blocks"} if report.reconstruction else set()
    return [*filter(None, [method]), *(entry for name, entry in others if name in names)]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in an object of JSON, each with its name, such as `data.sha256`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(inner, name)
    else:
        yield name, value


def _tunings(rows: list[Measurement]) -> list[tuple[str | None, dict[str, Any]]]:
    """Title and settings of each tuning after which something was measured."""
    tunings = [row.tuning for row in rows if row.tuning is not None]
    distinct = [tuning for i, tuning in enumerate(tunings) if tuning not in tunings[:i]]
    return [(tuning_title(tuning), {k: v for k, v in tuning.items() if k != "task"}) for tuning in distinct]


def _environments(rows: list[Measurement]) -> list[tuple[str, dict[str, str]]]:
    """Every device and set of versions that something was measured with; sets that agree are one."""
    environments: list[tuple[str, dict[str, str]]] = []
    for row in rows:
        device, versions = row.environment["device"], row.environment["versions"]
        for other, seen in environments:
            if other == device and all(seen.get(name, value) == value for name, value in versions.items()):
                seen.update(versions)
                break
        else:
            environments.append((device, dict(versions)))
    return environments
