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
from ..evaluation import task_of
from ..pruners import METHODS
from ..quantization import LIMITS
from ..records import recorded_repository
from ..report import BaseCard, SparsityReport
from .model_index import METRICS, index_entries
from .subject import CardSubject

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
    """License, language and pipeline tag by the card of what a model was loaded from; empty where it has no card, or
    that cannot be read."""
    folder, commit = model.name_or_path or "", facts_of(model).commit
    path, repository = Path(folder, "README.md"), recorded_repository(describe_model(model), commit)
    try:
        if not os.path.isdir(folder):
            if repository is None:
                return {}
            with reached_or_cached(repository, "model"):
                path = Path(hf_hub_download(repository, "README.md", revision=commit, token=token))
        metadata = metadata_load(path) or {}
    except Exception:  # no network, no card, no access, damaged YAML: then nothing is known
        return {}
    return {name: metadata[name] for name in BaseCard.__annotations__ if _is_inherited(name, metadata.get(name))}


def _is_inherited(name: str, value: Any) -> bool:
    if name == "language" and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def build_metadata(card: CardSubject) -> ModelCardData:
    """The metadata of a sparse model, or of an adapter on one."""
    report, inherited, is_adapter = card.report, card.inherited, card.adapter is not None
    calibration = {} if report is None else report.calibration
    language = inherited.get("language")
    datasets = [part.get("dataset") for part in calibration.get("parts") or [calibration]]  # alone or in a mix
    names = [name for name in datasets if isinstance(name, str) and name in HUB_DATASETS]
    if language is None and names and all(name in ("mc4-ko", "kowiki") for name in names):
        language = "ko"
    measured = card.results.sparse if card.results is not None else []
    hubs = [task_of(row.name).hub for row in measured]
    types = {kind for hub in hubs if hub is not None for kind, _ in hub.metrics.values()}
    eval_results = [result for row in measured for result in index_entries(row)] or None
    terms: dict[str, Any] = {name: inherited.get(name) for name in ("license", "license_name", "license_link")}
    return ModelCardData(
        language=language,
        **terms,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_PIPELINES.get(card.auto_class) or inherited.get("pipeline_tag"),
        base_model=card.base_model,
        base_model_relation=("adapter" if is_adapter else "quantized") if card.base_model else None,
        datasets=list(dict.fromkeys(HUB_DATASETS[name][0] for name in names)) or None,
        metrics=[metric for metric in METRICS if metric in types] or None,
        tags=list(dict.fromkeys((*_tags(report), *card.tags))),
        model_name=card.name if eval_results else None,  # of the model index
        eval_results=eval_results,
    )


def _tags(report: SparsityReport | None, settings: SparsityConfig | None = None) -> list[str]:
    """The tags of a sparse model: by its report, or by its settings where it has none."""
    how: list[str] = []
    if report is not None:
        how = [str(report.pruner), *map(_pattern_tag, report.patterns), report.config.get("values") or ""]
    elif settings is not None:
        how = [settings.method, _pattern_tag(str(settings.pattern)), settings.values or ""]
    return list(dict.fromkeys(filter(None, ("optimum-ksparse", _SPARSE, "pruned", *how))))


def tag_model(model: PreTrainedModel, report: SparsityReport | None, settings: SparsityConfig | None) -> None:
    """Gives a model its tags, which transformers, PEFT and TRL write into the cards that they make, in the place of
    those of an earlier pruning; without report and settings it has none of ours."""
    ours = _tags(report, settings) if report is not None or settings is not None else []
    tags = ours + [tag for tag in model.model_tags or [] if not _is_our_tag(tag) and tag not in ours]
    model.model_tags = tags or None


def _is_our_tag(tag: Any) -> bool:
    names = ("optimum-ksparse", "pruned", _SPARSE, *METHODS, *LIMITS)
    return tag in names or _PATTERN_TAG.fullmatch(str(tag)) is not None


# A person's entries of these lists stay: for each, whether an entry is one of ours.
_LISTS: dict[str, Callable[[Any], bool]] = {
    "metrics": lambda item: item in METRICS,
    "tags": _is_our_tag,
    "datasets": lambda item: item in [repository for repository, _ in HUB_DATASETS.values()],
}


def merge_metadata(existing: dict[str, Any], ours: dict[str, Any], *, again: bool = False) -> dict[str, Any]:
    """Our metadata in those of a card that exists: a person's keys stay, except those that state what the weights are
    and what was measured of them; lists are united. All is in the order of that card, so that writing it again changes
    nothing. Where the card is one of ours (`again`), what it says of other weights goes."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys((*existing, *ours)):
        theirs, value = existing.get(key), ours.get(key)
        if key in _LISTS:
            items = theirs if isinstance(theirs, list) else [theirs] if theirs else []
            kept = [item for item in items if item in (value or ()) or not (again and _LISTS[key](item))]
            united = kept + [item for item in value or () if item not in kept]
            if united or not again:
                merged[key] = theirs if united == items else united
        elif key in ours and (key in _OURS or not theirs):
            merged[key] = value
        elif not (again and key == "model-index"):
            merged[key] = theirs
    return merged


def _pattern_tag(pattern: str) -> str:
    structured = re.fullmatch(r"(\d+):(\d+)", pattern)
    if structured is not None:
        return f"{structured[1]}of{structured[2]}"
    return f"blocks-{pattern.rpartition('/')[2]}" if "x" in pattern else "unstructured"
