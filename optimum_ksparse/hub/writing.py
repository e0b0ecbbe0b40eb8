"""Writing a model's card and figures into a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters import MergeReport
from ..checkpoint import describe_model, facts_of, made_with
from ..checkpoint.model_class import class_for_model
from ..checkpoint.staging import write_text
from ..evaluation import EvaluationResults, settle_records, tuning_title
from ..records import is_repo_id, names_repository
from ..report import SparsityReport
from .card import LANGUAGES, AdapterFacts, CardSubject, render_card
from .figures import draw_figures
from .metadata import build_metadata, card_of_source
from .models import current_results, is_adapter, sparse_part

CARD_NAME = "README.md"
_BRANCH_PART = re.compile(r"\w[\w.-]*", re.ASCII)


def read_card(path: Path) -> str:
    """A README.md with its own line ends.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the {path.name} that is there is not UTF-8: mend it first; {error}") from None


def check_repository(repo_id: Any) -> None:
    """Raises ValueError for a name that the Hub does not allow."""
    if not is_repo_id(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} cannot be a name on the Hub; use \"user/name\": letters, digits, '-', '_' and '.', "
            "neither of them twice in a row, nor '-' or '.' at an end, at most 96 in all"
        )


def check_branch(argument: str, name: str | None) -> None:
    """Raises ValueError for what cannot be a branch, or could not stand in a card as it is."""
    if name is None:
        return
    parts = name.split("/")
    if not all(_BRANCH_PART.fullmatch(part) and not part.endswith((".", ".lock")) for part in parts) or ".." in name:
        raise ValueError(f"{argument}={name!r} cannot be a branch: letters, digits, '.', '_', '-' and '/' may be")


def check_language(language: str) -> None:
    """Raises ValueError for a language that cards are not written in."""
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r} is not known; allowed: {', '.join(LANGUAGES)}")


def write_card(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    language: str = "en",
    repo_id: str | None = None,
    dense_revision: str | None = None,
    tags: list[str] | None = None,
    existing: str | None = None,
    token: bool | str | None = None,
) -> Path:
    """Writes the card of a model that lies in `directory`, and its figures beside it. Returns the card's path.

    Args:
        repo_id: where the model is (to be) published; None while it is not.
        existing: text of the card to go on from; None takes the one in `directory`.

    Raises:
        ValueError: the model's results are of other weights, or the metadata of the card that is there are damaged.
    """
    return write_card_of(
        model,
        directory,
        current_results(model),
        language=language,
        repo_id=repo_id,
        dense_revision=dense_revision,
        tags=tags,
        existing=existing,
        token=token,
    )


def write_trained_card(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    language: Any = None,
    repo_id: str | None = None,
) -> Path:
    """`write_card` for a model in training, whose weights are too many to read at each checkpoint: what the marks on
    it tell is taken (see `evaluation.ties`).

    Args:
        weights: folder of the weight files, where they are not in `directory` yet.
    """
    plain = sparse_part(model)
    if not is_adapter(model):
        settle_records(plain)
    results = None if is_adapter(model) else facts_of(plain).results
    language = language if language in LANGUAGES else LANGUAGES[0]
    return write_card_of(model, directory, results, weights=weights, language=language, repo_id=repo_id)


def write_card_of(
    model: Any,
    directory: str | os.PathLike[str],
    results: EvaluationResults | None,
    *,
    weights: str | os.PathLike[str] | None = None,
    language: str = "en",
    repo_id: str | None = None,
    dense_revision: str | None = None,
    tags: list[str] | None = None,
    existing: str | None = None,
    token: bool | str | None = None,
) -> Path:
    """`write_card` with results that are known to be of the model's weights, and a report that is settled: to find
    that out reads all of them."""
    check_language(language)
    if repo_id is not None:
        check_repository(repo_id)
    check_branch("dense_revision", dense_revision)
    directory = Path(directory)
    plain = sparse_part(model)
    facts = facts_of(plain)
    report = facts.report
    base_model, base_name, base_revision = _base(model, plain, report)
    path = directory / CARD_NAME
    if existing is None:
        existing = read_card(path) if path.is_file() else ""
    name = (repo_id or directory.resolve().name).split("/")[-1]
    adapter = _adapter_facts(model, directory)
    auto_class = class_for_model(plain).__name__
    subject = CardSubject(
        name=name,
        report=report,
        results=results,
        metadata=build_metadata(
            report,
            results,
            name=name,
            base_model=base_model,
            inherited=(report.base_card if report and adapter is None else {}) or card_of_source(plain, token),
            is_adapter=adapter is not None,
            auto_class=auto_class,
            tags=[*(plain.model_tags or []), *(tags or [])],
        ),
        storage=_storage(plain),
        dtype=str(plain.dtype).removeprefix("torch."),
        file_bytes=sum(file.stat().st_size for file in Path(weights or directory).glob("*.safetensors")),
        repo_id=repo_id,
        base_model=base_model,
        base_name=base_name,
        base_revision=base_revision,
        dense_revision=dense_revision,
        figures=draw_figures(directory, None if adapter is not None else report, results, language),
        adapter=adapter,
        auto_class=auto_class,
        merge=_merge(plain, report),
        tuning=_tuning(plain),
        local_source=None if facts.folder is None else plain.name_or_path,
    )
    write_text(path, render_card(subject, language, existing))
    return path


def _merge(model: PreTrainedModel, report: SparsityReport | None) -> MergeReport | None:
    """The report of the merging that the weights are from; None where something has changed them since."""
    merge: MergeReport | None = facts_of(model).merge
    last = report.changes[-1].kind if report is not None and report.changes else "merged"
    return merge if last == "merged" else None


def _tuning(model: PreTrainedModel) -> dict[str, Any] | None:
    """What `finetuning.json` says of how the weights, or the adapter, were tuned."""
    tuning = facts_of(model).tuning
    if tuning is None:
        return None
    shown = ("method", "steps", "num_epochs", "learning_rate", "r")
    return {"title": tuning_title(tuning), **{name: tuning[name] for name in shown if tuning.get(name) is not None}}


def _storage(model: PreTrainedModel) -> str:
    settings = made_with(model)
    return "packed" if settings is None else settings.storage


def _base(
    model: Any, plain: PreTrainedModel, report: SparsityReport | None
) -> tuple[str | None, str | None, str | None]:
    """Hub id (None for a local folder), name, and commit of what the model, or the adapter, was made from."""
    if is_adapter(model):
        name, revision = describe_model(plain), facts_of(plain).commit
    else:
        name, revision = (report.base_model, report.base_revision) if report is not None else (None, None)
    on_hub = names_repository(name, revision)
    return name if on_hub else None, name, revision if on_hub else None


def _adapter_facts(model: Any, directory: Path) -> AdapterFacts | None:
    if not is_adapter(model):
        return None
    from safetensors import safe_open

    name = getattr(model, "active_adapter", None)
    name = name() if callable(name) else name
    config = model.peft_config[name if isinstance(name, str) else next(iter(model.peft_config))].to_dict()
    shown = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    settings = {key: config[key] for key in shown if config.get(key)}
    for key, value in settings.items():
        if isinstance(value, set | list | tuple):
            settings[key] = ", ".join(sorted(value))
    count = 0
    for path in directory.rglob("adapter_model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return AdapterFacts(str(getattr(config["peft_type"], "value", config["peft_type"])), settings, count)
