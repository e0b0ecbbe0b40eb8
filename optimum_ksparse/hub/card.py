"""The model card: report and results → README.md. Formats numbers, never computes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..evaluation import TASK_TITLES, EvaluationResults, result_rows
from ..pattern import Pattern
from ..report import SparsityReport
from .markdown import environment
from .metadata import merge_metadata

LANGUAGES = ("en", "ko")
BEGIN = "<!-- optimum-ksparse: begin. This section is written anew at each push; write outside of it. -->"
END = "<!-- optimum-ksparse: end -->"
_SECTION = re.compile(r"<!-- optimum-ksparse: begin\b.*?<!-- optimum-ksparse: end -->", re.DOTALL)
_MARKER = re.compile(r"<!-- optimum-ksparse: (begin\b[^\n]*?|end )-->")


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
        "tasks": [(TASK_TITLES[row.name], row) for row in sparse if row.name in TASK_TITLES],
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
