"""How the figures of a study were measured, in sentences, without paths and names of machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..dataset import is_mix, mix_parts
from ..evaluation import KOBEST_TASKS, TASK_TITLES, tuning_title
from .grid import settings_in_words
from .results import StudyResults


def how_it_was_measured(results: StudyResults) -> list[str]:
    """Lines of Markdown."""
    rows = [row for result in results.cells.values() for row in result.measurements]
    lines = [_model(results), *_calibration(results), *_methods(results), *_taken(results)]
    lines += _measurement("Perplexity", [row for row in rows if row["name"] == "perplexity"])
    lines += _measurement("KoBEST", [row for row in rows if row["name"] in KOBEST_TASKS])
    lines += _measurement("KorQuAD", [row for row in rows if row["name"] == "korquad"])
    lines += _measurement("NSMC", [row for row in rows if row["name"].startswith("nsmc")])
    lines += [
        "- Seconds of pruning are from the loaded to the pruned model; peak memory is that of the process until then."
    ]
    return [*lines, *_machines(results)]


def _model(results: StudyResults) -> str:
    job = results.record.job
    dtypes = _distinct(row["protocol"].get("dtype") for r in results.cells.values() for row in r.measurements)
    return f"- Model: {job['model']}, {' and '.join(dtypes) or job['dtype']}, weight files {job['weights'][:12]}."


def _calibration(results: StudyResults) -> list[str]:
    names: dict[str, Mapping[str, Any]] = {}
    for cell, content in results.record.cells.items():
        for place in results.record.places(cell):
            if place.calibration is not None:
                names.setdefault(place.calibration, content["identity"])
    return [f"- Calibration {name}: {_data_in_words(identity)}." for name, identity in names.items()]


def _data_in_words(identity: Mapping[str, Any]) -> str:
    return (
        f"{identity['num_samples']} × {identity['seq_len']} tokens of {_source(identity['dataset'])}"
        + (f", tokenizer {identity['tokenizer']}" if identity.get("tokenizer") else "")
        + (f", prepend_bos={identity['prepend_bos']}" if "prepend_bos" in identity else "")
    )


def _source(described: Any) -> str:
    """Data as `describe_dataset` has them."""
    if not isinstance(described, Mapping):
        return str(described)
    if is_mix(described):
        return "a mix of " + " and ".join(f"{weight:g} {_source(part)}" for part, weight in mix_parts(described))
    name = described.get("dataset") or described.get("name") or described.get("file")
    if described.get("configuration"):
        name = f"{name} {described['configuration']}"
    digest = described.get("sha256") or described.get("files_sha256")
    where = [str(name)] if name else []
    where += [str(described["slice"])] if described.get("slice") else []
    where += [f"SHA-256 {str(digest)[:12]}"] if digest else []
    return ", ".join(where) or ", ".join(f"{key}: {value}" for key, value in described.items())


def _methods(results: StudyResults) -> list[str]:
    names = {name: settings_in_words(results.identity_of(name)) for name in results.record.grid["methods"]}
    return [f"- Method {name}: {words}." for name, words in names.items() if words != name]


def _taken(results: StudyResults) -> list[str]:
    """What `method="auto"` chose, anew for each cell, and which blocks studies of earlier versions dropped."""
    titles = {"choice": "took", "dropped_blocks": "dropped blocks"}
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell, result in results.cells.items():
        report = (result.pruning or {}).get("report", {})
        for place in results.record.places(cell):
            for name in titles.keys() & report.keys():
                key = (f"{place.method}, {place.calibration}, {place.pattern}", name)
                value = report[name] if isinstance(report[name], str) else ", ".join(map(str, report[name]))
                found.setdefault(key, {}).setdefault(value, []).append(str(place.seed))
    lines = []
    for (where, name), values in found.items():
        words = [f"{value} (seed {', '.join(seeds)})" for value, seeds in values.items()]
        lines.append(f"- {where} {titles[name]}: {'; '.join(words)}.")
    return lines


def _measurement(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """One line for each way in which something was measured: data, number, form."""
    ways = _distinct(_way(row) for row in rows)
    return [f"- {title}: {way}." for way in ways]


def _way(row: Mapping[str, Any]) -> str:
    protocol = row["protocol"]
    source = _source(protocol.get("texts") or protocol.get("data") or {})
    if row["name"] == "perplexity":
        stride = "" if protocol["stride"] is None else f", stride {protocol['stride']}"
        size = f"{protocol['num_windows']} windows of {protocol['seq_len']} tokens{stride}"
        return f"{source}; {size}, {protocol['num_tokens']:,} tokens predicted"
    parts = [f"{TASK_TITLES[row['name']]}, {source}" if row["name"] in KOBEST_TASKS else source]
    parts.append(f"{protocol['num_samples']:,} {'questions' if row['name'] == 'korquad' else 'items'}")
    if protocol.get("limit"):
        parts.append(f"limit {protocol['limit']}")
    if "num_fewshot" in protocol:
        parts.append(f"{protocol['num_fewshot']}-shot")
    if "prompt" in protocol:
        parts.append(f"prompt {row['name'][-1]}")
    tuning = protocol.get("tuning")
    if tuning is not None:
        chosen = {name: tuning[name] for name in ("method", "r", "max_steps", "num_epochs") if tuning.get(name)}
        words = ", ".join(f"{name} {value}" for name, value in chosen.items())
        parts.append(f"after {tuning_title(tuning)} tuning ({words})")
    return "; ".join(parts)


def _machines(results: StudyResults) -> list[str]:
    """Where there are several, with the number of cells that each has: their seconds do not compare."""
    lines = []
    for title, name in (("Hardware", "hardware"), ("Versions", "versions")):
        counts = Counter(_in_words(getattr(result, name)) for result in results.cells.values())
        for text, count in counts.items():
            lines.append(f"- {title}{f' of {count} cells' if len(counts) > 1 else ''}: {text}.")
    return lines


def _in_words(found: Mapping[str, Any]) -> str:
    return ", ".join(str(v) if k == "device" else f"{k} {v}" for k, v in found.items() if v is not None)


def _distinct(texts: Iterable[Any]) -> list[str]:
    return [str(text) for text in dict.fromkeys(texts) if text]
