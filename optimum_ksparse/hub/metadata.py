"""The card's metadata: what the Hub reads from the YAML block at the top of README.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel

from ..checkpoint import describe_model, facts_of
from ..config import SparsityConfig
from ..data import reached_or_cached
from ..data.documents import HUB_DATASETS
from ..evaluation import EvaluationResults
from ..pruners import METHODS
from ..records import recorded_repository
from ..report import BaseCard, SparsityReport
from .model_index import METRICS, index_entries, metric_types

# A person's entries are kept where these lists are written anew; for the other keys of `_OURS` ours replace them.
_UNITED = ("tags", "datasets", "metrics")
_PATTERN_TAG = re.compile(r"\d+of\d+|blocks-\d+x\d+|unstructured")
_SPARSE = "sparse"
# Tasks of the Hub by the class that does them.
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
_OURS = ("base_model", "base_model_relation", "library_name", "model-index")


def card_of_source(model: PreTrainedModel, token: bool | str | None = None) -> dict[str, Any]:
    """Of the card of what a model was loaded from; empty where it has none or cannot be read."""
    folder, commit = model.name_or_path or "", facts_of(model).commit
    path, repository = Path(folder, "README.md"), recorded_repository(describe_model(model), commit)
    try:
        if not os.path.isdir(folder):
            if repository is None:
                return {}
            with reached_or_cached(repository, "model"):
                path = Path(hf_hub_download(repository, "README.md", revision=commit, token=token))
        found = metadata_load(path) or {}
    except Exception:  # no network, no card, no access, damaged YAML: then nothing is known
        return {}
    return {name: found[name] for name in BaseCard.__annotations__ if _is_inherited(name, found.get(name))}


def _is_inherited(name: str, value: Any) -> bool:
    if name == "language" and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def build_metadata(
    report: SparsityReport | None,
    results: EvaluationResults | None,
    *,
    name: str,
    base_model: str | None,
    inherited: dict[str, Any],
    is_adapter: bool = False,
    auto_class: str = "AutoModelForCausalLM",
    tags: list[str] | None = None,
) -> ModelCardData:
    """The metadata of a sparse model, or of an adapter on one.

    Args:
        name: of the model, for the model index.
        base_model: Hub id of the dense base, or of an adapter's sparse base; None for a local folder.
        inherited: of the base model's card: license, language, pipeline tag.
        auto_class: name of the class that loads the model.
        tags: further tags.
    """
    language = inherited.get("language")
    names = [] if report is None else _hub_datasets(report.calibration)
    found_tags = sparse_tags(report)
    if language is None and names and all(name in ("mc4-ko", "kowiki") for name in names):
        language = "ko"
    measured = results.sparse if results is not None else []
    found_metrics = {metric for row in measured for metric in metric_types(row)}
    metrics = [metric for metric in METRICS if metric in found_metrics]
    eval_results = [result for row in measured for result in index_entries(row)] or None
    return ModelCardData(
        language=language,
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_PIPELINES.get(auto_class) or inherited.get("pipeline_tag"),
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "quantized") if base_model else None,
        datasets=list(dict.fromkeys(HUB_DATASETS[name][0] for name in names)) or None,
        metrics=metrics or None,
        tags=found_tags + [tag for tag in tags or [] if tag not in found_tags],
        model_name=name if eval_results else None,  # of the model index
        eval_results=eval_results,
    )


def sparse_tags(report: SparsityReport | None, settings: SparsityConfig | None = None) -> list[str]:
    """The tags of a sparse model: by its report, or by its settings where it has none."""
    tags = ["optimum-ksparse", _SPARSE, "pruned"]
    if report is None and settings is None:
        return tags
    pruner = report.pruner if report is not None else settings.method  # type: ignore[union-attr]
    patterns = report.patterns if report is not None else [str(settings.pattern)]  # type: ignore[union-attr]
    return [*tags, str(pruner), *dict.fromkeys(_pattern_tag(pattern) for pattern in patterns)]


def tag_model(model: PreTrainedModel, report: SparsityReport | None, settings: SparsityConfig | None) -> None:
    """Gives a model its tags, which transformers, PEFT and TRL write into the cards that they make, in the place of
    those of an earlier pruning; without report and settings it has none of ours."""
    ours = sparse_tags(report, settings) if report is not None or settings is not None else []
    tags = ours + [tag for tag in model.model_tags or [] if not _is_our_tag(tag) and tag not in ours]
    model.model_tags = tags or None


def _is_our_tag(tag: Any) -> bool:
    names = ("optimum-ksparse", "pruned", _SPARSE, *METHODS)
    return tag in names or _PATTERN_TAG.fullmatch(str(tag)) is not None


def _hub_datasets(calibration: dict[str, Any]) -> list[str]:
    """Names of the calibration data that are on the Hub, alone or in a mix."""
    found = [part.get("dataset") for part in calibration.get("parts") or [calibration]]
    return [name for name in found if isinstance(name, str) and name in HUB_DATASETS]


def merge_metadata(existing: dict[str, Any], ours: dict[str, Any], *, again: bool = False) -> dict[str, Any]:
    """Our metadata in those of a card that exists: a person's keys stay, except those that state what the weights are
    and what was measured of them; lists are united.

    Args:
        again: the card is one of ours, so that what it says of other weights goes.
    """
    merged = _without_ours(existing) if again else dict(existing)
    for key, value in ours.items():
        theirs = merged.get(key)
        if key in _UNITED and theirs:
            theirs = theirs if isinstance(theirs, list) else [theirs]
            merged[key] = _in_order(existing[key], [*theirs, *(item for item in value if item not in theirs)])
        elif key in _OURS or not theirs:
            merged[key] = _in_order(existing.get(key), value) if key in _UNITED else value
    # In the order of the card that is there, so that writing it again changes nothing.
    return {key: merged[key] for key in (*existing, *merged) if key in merged}


def _in_order(existing: Any, items: list[Any]) -> list[Any]:
    """The items, those that are there already first and in their order."""
    before = existing if isinstance(existing, list) else []
    return [item for item in before if item in items] + [item for item in items if item not in before]


def _without_ours(metadata: dict[str, Any]) -> dict[str, Any]:
    """Without the figures of an earlier push, and without its names of method, pattern and calibration data."""
    kept = {key: value for key, value in metadata.items() if key != "model-index"}
    gone: dict[str, Callable[[Any], bool]] = {
        "metrics": lambda item: item in METRICS,
        "tags": _is_our_tag,
        "datasets": lambda item: item in {repository for repository, _ in HUB_DATASETS.values()},
    }
    for key, ours in gone.items():
        if isinstance(kept.get(key), list):
            kept[key] = [item for item in kept[key] if not ours(item)]
            if not kept[key]:
                del kept[key]
    return kept


def _pattern_tag(pattern: str) -> str:
    structured = re.fullmatch(r"(\d+):(\d+)", pattern)
    if structured is not None:
        return f"{structured[1]}of{structured[2]}"
    return f"blocks-{pattern.rpartition('/')[2]}" if "x" in pattern else "unstructured"
