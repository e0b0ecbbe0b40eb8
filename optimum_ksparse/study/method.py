"""How the figures of a study were measured, in sentences, without paths and names of machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..data.dataset import is_mix, mix_parts
from ..evaluation import KOBEST_TASKS, Measurement, task_of, tuning_title
from .grid import settings_in_words
from .results import StudyResults
from .tasks import NSMC_TASKS

_TITLES = {"perplexity": "Perplexity", "korquad": "KorQuAD", **dict.fromkeys(KOBEST_TASKS, "KoBEST")}


def how_it_was_measured(results: StudyResults) -> list[str]:
    """Lines of Markdown."""
    record, rows = results.record, [row for result in results.cells.values() for row in result.measurements]
    dtypes = " and ".join(dict.fromkeys(str(row.protocol["dtype"]) for row in rows if row.protocol.get("dtype")))
    model = f"{record.job['model']}, {dtypes or record.job['dtype']}, weight files {record.job['weights'][:12]}"
    data = {
        place.calibration: _data_in_words(cell.identity)
        for cell in record.cells.values()
        for place in cell.places
        if place.calibration is not None
    }
    methods = {name: settings_in_words(results.identity_of(name)) for name in record.grid["methods"]}
    lines = [
        f"Model: {model}",
        *(f"Calibration {name}: {words}" for name, words in data.items()),
        *(f"Method {name}: {words}" for name, words in methods.items() if words != name),
        *dict.fromkeys(f"{_TITLES.get(row.name, 'NSMC')}: {_way(row)}" for row in rows),
        "Seconds of pruning are from the loaded to the pruned model; peak memory is that of the process until then",
    ]
    for title, name in (("Hardware", "hardware"), ("Versions", "versions")):
        # With the number of cells where there are several: their seconds do not compare.
        counts = Counter(_in_words(getattr(result, name)) for result in results.cells.values())
        lines += [f"{title}{f' of {n} cells' if len(counts) > 1 else ''}: {text}" for text, n in counts.items()]
    return [f"- {line}." for line in lines]


def _data_in_words(identity: Mapping[str, Any]) -> str:
    more = [f"{name}={identity[name]}" for name in ("tokenizer", "prepend_bos") if identity.get(name) is not None]
    size = f"{identity['num_samples']} × {identity['seq_len']} tokens of {_source(identity['dataset'])}"
    return ", ".join([size, *more])


def _source(described: Any) -> str:
    """Data as `describe_dataset` has them."""
    if not isinstance(described, Mapping):
        return str(described)
    if is_mix(described):
        return "a mix of " + " and ".join(f"{weight:g} {_source(part)}" for part, weight in mix_parts(described))
    name = described.get("dataset") or described.get("name") or described.get("file")
    digest = described.get("sha256") or described.get("files_sha256")
    parts = [
        f"{name} {described.get('configuration') or ''}".strip() if name else None,
        described.get("slice"),
        f"SHA-256 {str(digest)[:12]}" if digest else None,
    ]
    return ", ".join(map(str, filter(None, parts))) or _in_words(described)


def _way(row: Measurement) -> str:
    """Data, number, form."""
    protocol = row.protocol
    source = _source(protocol.get("texts") or protocol.get("data") or {})
    if row.name == "perplexity":
        stride = "" if protocol["stride"] is None else f", stride {protocol['stride']}"
        size = f"{protocol['num_windows']} windows of {protocol['seq_len']} tokens{stride}"
        return f"{source}; {size}, {protocol['num_tokens']:,} tokens predicted"
    parts = [f"{task_of(row.name).title}, {source}" if row.name in KOBEST_TASKS else source]
    parts.append(f"{protocol['num_samples']:,} {'questions' if row.name == 'korquad' else 'items'}")
    if protocol.get("limit"):
        parts.append(f"limit {protocol['limit']}")
    if "num_fewshot" in protocol:
        parts.append(f"{protocol['num_fewshot']}-shot")
    if row.name in NSMC_TASKS:
        parts.append(f"prompt {task_of(row.name).title}")
    if (tuning := row.tuning) is not None:
        chosen = {name: tuning[name] for name in ("method", "r", "max_steps", "num_epochs") if tuning.get(name)}
        parts.append(f"after {tuning_title(tuning)} tuning ({_in_words(chosen)})")
    return "; ".join(parts)


def _in_words(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "device" else f"{key} {value}" for key, value in facts.items() if value)
