"""The model card: report and results → README.md. Formats numbers, never computes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData

from ..adapters import MergeReport
from ..config import describe_source
from ..evaluation import KOBEST_TASKS, TASK_TITLES, EvaluationResults, Measurement, result_rows, tuning_title
from ..kernels import GROUPS, STRIP_TOKENS, why_not_strips
from ..pattern import Pattern
from ..pruners import METHODS
from ..pruners.allocation import LEFT_DENSE
from ..report import SparsityReport
from ..version import __version__, install_command
from .existing import BEGIN, END, has_section, insert_section, is_unfilled_form, split_card
from .markdown import environment
from .metadata import merge_metadata

LANGUAGES = ("en", "ko")
# What `citations.md.jinja` has an entry for.
_CITED = {*METHODS, "swaps", "owl", "blocks", "kobest", "korquad"}


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
        storage: "packed", "dense". dtype: of the weights. file_bytes: of all their
            files.
        dense_revision: branch that holds the dense variant, or None.
        figures: file → whether it was drawn.
        adapter: None for a model of its own.
        auto_class: name of the class of transformers that loads it.
        merge: of the adapters that became part of the weights, where nothing has changed them since.
        tuning: how it was tuned: `title`, and settings by name.
        local_source: the folder that it was loaded from, which the card does not name.
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
    auto_class: str = "AutoModelForCausalLM"
    merge: MergeReport | None = None
    tuning: dict[str, Any] | None = None
    local_source: str | None = None


def render_card(subject: CardSubject, language: str = "en", existing: str | None = None) -> str:
    """The card as the text of README.md.

    Args:
        language: "en" or "ko".
        existing: the card that is there already. What a person wrote outside the marked section stays, and so do the
            metadata that this package does not set.
    """
    existing = (existing or "").removeprefix("\ufeff")
    line_break = "\r\n" if "\r\n" in existing else "\n"
    front, body = split_card(existing)
    _hide_path(front, subject.local_source)
    if is_unfilled_form(body):
        front.pop("base_model", None)
        body = ""
    template = environment().get_template(f"card_{language}.md.jinja")
    section = re.sub(r"\n{3,}", "\n\n", template.render(**_view(subject), begin=BEGIN, end=END).strip())
    metadata = merge_metadata(front, subject.metadata.to_dict(), again=has_section(body))
    block = yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    ours = [part.replace("\n", line_break) for part in (f"---\n{block}---\n\n", section, "\n")]
    return ours[0] + insert_section(body, ours[1], line_break) + ours[2]


def _hide_path(front: dict[str, Any], folder: str | None) -> None:
    """Takes out what PEFT writes where the base is a folder: its path, as base and in a tag."""
    base = front.get("base_model")
    if isinstance(base, str) and (base == folder or base != describe_source(base)):
        del front["base_model"]
    if folder is not None and isinstance(front.get("tags"), list):
        front["tags"] = [tag for tag in front["tags"] if not str(tag).endswith(f":{folder}")]


class _Dumper(yaml.SafeDumper):
    """Writes texts with line breaks and other signs that are not printed in quotes, so that they are read as they were
    (YAML folds some of them, as U+0085, otherwise)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def _view(subject: CardSubject) -> dict[str, Any]:
    """What the templates see."""
    results, report = subject.results, subject.report
    measured = (results.sparse or results.dense) if results is not None else []
    is_sparse = report is not None
    pattern = Pattern(str(report.config["pattern"])) if report is not None and is_sparse else None
    return {
        "card": subject,
        "report": report,
        "results": results,
        "rows": result_rows(results),
        "perplexities": [row for row in measured if row.name == "perplexity"],
        "tasks": [(TASK_TITLES[row.name], row) for row in measured if row.name in KOBEST_TASKS],
        "nsmc": [row for row in measured if row.name.startswith("nsmc_")],
        "korquad": [row for row in measured if row.name == "korquad"],
        "measured": measured,
        "both": results is not None and bool(results.dense),
        "holds": report is not None and not report.changes,
        "has_errors": report is not None and any(row.relative_output_error is not None for row in report.layers),
        "merge": None if subject.merge is None else subject.merge.totals(),
        "tuning": subject.tuning,
        "tunings": _tunings(measured),
        "tuning_title": tuning_title,
        "environments": _environments(results),
        "pattern": pattern,
        "pruned_to": _pruned_to(report),
        "zeros": _zeros(pattern),
        "pruner": None if report is None else report.pruner,
        "refine": [] if report is None else report.config.get("refine") or [],
        "reconstruction": None if report is None else report.reconstruction_losses,
        "holds_out": _holds_out(report),
        "left_dense": LEFT_DENSE,
        "install": install_command("finetune" if subject.adapter is not None else None),
        "methods": _methods(subject),
        "has_kernels": report is not None
        and is_sparse
        and all(name in GROUPS for name in report.patterns)
        and subject.dtype in ("bfloat16", "float16"),
        "strip_tokens": _strip_tokens(pattern),
        "version": __version__,
        "limited": any(row.protocol.get("limit") for row in measured),
    }


def _methods(subject: CardSubject) -> set[str]:
    """What there is to cite: methods that made the model, and data that it was measured on."""
    report, results = subject.report, subject.results
    names: set[Any] = set()
    if report is not None:
        names |= {report.pruner, *(report.config.get("refine") or ())}
        names |= {report.config.get("allocation"), "blocks" if report.reconstruction else None}
    for row in [*results.sparse, *results.dense] if results is not None else []:
        names.add("kobest" if row.name in KOBEST_TASKS else row.name)
    return names & _CITED


def _pruned_to(report: SparsityReport | None) -> str:
    """The patterns of the layers; of an unstructured one what was asked for, which is their mean."""
    if report is None:
        return ""
    asked = Pattern(str(report.config["pattern"]))
    return ", ".join(report.patterns) if asked.is_structured else str(asked)


def _zeros(pattern: Pattern | None) -> str:
    """The share of zeros that was asked for, without the size of blocks."""
    return "" if pattern is None else str(pattern).rpartition("/")[0] if pattern.block else str(pattern)


def _holds_out(report: SparsityReport | None) -> bool:
    """Whether reconstruction held calibration tokens out: it does from two samples on."""
    return report is not None and report.calibration.get("num_samples", 0) > 1


def _strip_tokens(pattern: Pattern | None) -> int | None:
    """Up to how many tokens a CPU computes without decompressing; None where it always decompresses."""
    runs = pattern is not None and why_not_strips(str(pattern), STRIP_TOKENS, torch.device("cpu")) is None
    return STRIP_TOKENS if runs else None


def _tunings(rows: list[Measurement]) -> list[tuple[str | None, dict[str, Any]]]:
    """Title and settings of each tuning after which something was measured."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row.tuning is not None and row.tuning not in found:
            found.append(row.tuning)
    return [(tuning_title(tuning), {k: v for k, v in tuning.items() if k != "task"}) for tuning in found]


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
