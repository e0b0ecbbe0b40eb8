"""Writing a model's card and figures into a folder; and the names that the Hub allows."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import read_headers
from ..checkpoint.model_class import class_for_model
from ..checkpoint.staging import write_text
from ..checks import check_one_of
from ..evaluation import EvaluationResults, settle_records, tuning_title
from ..records import is_repo_id
from ..records.kinds import check_revision
from .card import render_card
from .figures import draw_figures
from .metadata import card_of_source
from .subject import CardSubject, Subject

CARD_NAME = "README.md"
LANGUAGES = ("en", "ko")
_SHOWN_OF_TUNING = ("method", "teacher", "tokens", "steps", "num_epochs", "learning_rate", "temperature", "r")


@dataclass(frozen=True)
class CardOptions:
    """What the user says of a card: `repo_id` is where the model is (to be) published, `dense_revision` the branch of
    its dense variant, `token` asks for the base's card."""

    language: str = "en"
    repo_id: str | None = None
    dense_revision: str | None = None
    tags: list[str] = field(default_factory=list)
    token: bool | str | None = None

    def __post_init__(self) -> None:
        check_one_of("language", self.language, LANGUAGES)
        if self.repo_id is not None:
            check_repository(self.repo_id)
        if self.dense_revision is not None:
            check_revision(self.dense_revision, "dense_revision")


def read_card(path: Path) -> str:
    """A README.md with its own line ends. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the {path.name} that is there is not UTF-8: mend it first; {error}") from None


def write_card(model: Any, directory: str | os.PathLike[str], *, existing: str | None = None, **options: Any) -> Path:
    """Writes the card of a model that lies in `directory`, and its figures beside it. Returns the card's path.

    Args:
        existing: text of the card to go on from; None takes the one in `directory`.
        options: `language`, `repo_id`, `dense_revision`, `tags`, `token`: see `CardOptions`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the model's results are of other weights, or the metadata of the card that is there are damaged.
    """
    options["tags"] = list(options.get("tags") or [])
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"directory={os.fspath(directory)!r}: there is no such folder; save the model there first"
        )
    card, subject = CardOptions(**options), Subject.read(model)
    return write_card_of(subject, directory, subject.results(), card, existing=existing)


def write_trained_card(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    language: Any = None,
    repo_id: str | None = None,
) -> Path:
    """`write_card` for a model in training, whose weights are too many to read at each checkpoint: what the marks on
    it tell is taken (see `evaluation.ties`). `weights` is their folder, where they are not in `directory` yet."""
    subject = Subject.read(model)
    if not subject.is_adapter:
        settle_records(subject.plain)
    results = None if subject.is_adapter else subject.facts.results
    options = CardOptions(language if language in LANGUAGES else LANGUAGES[0], repo_id)
    return write_card_of(subject, directory, results, options, weights=weights)


def write_card_of(
    subject: Subject,
    directory: str | os.PathLike[str],
    results: EvaluationResults | None,
    options: CardOptions,
    *,
    weights: str | os.PathLike[str] | None = None,
    existing: str | None = None,
) -> Path:
    """`write_card` with results that are known to be of the model's weights, and a report that is settled: to find
    that out reads all of them."""
    directory = Path(directory)
    path = directory / CARD_NAME
    if existing is None:
        existing = read_card(path) if path.is_file() else ""
    plain, facts, report = subject.plain, subject.facts, subject.facts.report
    adapter = _adapter_facts(subject.model, directory) if subject.is_adapter else None
    inherited = report.base_card if report is not None and adapter is None else {}
    tuned = facts.tuning or {}
    shown = {name: tuned[name] for name in _SHOWN_OF_TUNING if tuned.get(name) is not None}
    if shown.get("method") == "full":
        shown.pop("r", None)  # of an adapter
    # An adapter may have been merged before the weights became others.
    is_merge_last = report is None or not report.changes or report.changes[-1].kind == "merged"
    card = CardSubject(
        name=(options.repo_id or directory.resolve().name).split("/")[-1],
        report=report,
        results=results,
        storage=subject.settings.storage,
        dtype=str(plain.dtype).removeprefix("torch."),
        file_bytes=sum(file.stat().st_size for file in Path(weights or directory).glob("*.safetensors")),
        repo_id=options.repo_id,
        **subject.base(),
        dense_revision=options.dense_revision,
        figures=draw_figures(directory, None if adapter is not None else report, results, options.language),
        adapter=adapter,
        auto_class=class_for_model(plain).__name__,
        merge=facts.merge if is_merge_last else None,
        tuning={"title": tuning_title(tuned), **shown} if tuned else None,
        local_source=None if facts.folder is None else plain.name_or_path,
        inherited=inherited or card_of_source(plain, options.token),
        tags=[*(plain.model_tags or []), *options.tags],
    )
    write_text(path, render_card(card, options.language, existing))
    return path


def _adapter_facts(model: Any, directory: Path) -> dict[str, Any]:
    name = getattr(model, "active_adapter", None)
    name = name() if callable(name) else name
    config = model.peft_config[name if isinstance(name, str) else next(iter(model.peft_config))].to_dict()
    shown = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    settings = {key: config[key] for key in shown if config.get(key)}
    settings = {k: ", ".join(sorted(v)) if isinstance(v, set | list | tuple) else v for k, v in settings.items()}
    files = [read_headers([path]) for path in directory.rglob("adapter_model*.safetensors")]
    count = sum(math.prod(header.shape) for file in files for header in file.values())
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    return {"kind": kind, "settings": settings, "num_parameters": count}


def check_repository(repo_id: Any) -> None:
    """Raises ValueError for a name that the Hub does not allow."""
    if not is_repo_id(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} cannot be a name on the Hub; use \"user/name\": letters, digits, '-', '_' and '.', "
            "neither of them twice in a row, nor '-' or '.' at an end, at most 96 in all"
        )


def check_target(
    repo_id: str, revision: str | None = None, dense_revision: str | None = None, create_pr: bool = False
) -> None:
    """Raises ValueError for names that the Hub does not allow, or that do not go together."""
    check_repository(repo_id)
    for argument, branch in (("revision", revision), ("dense_revision", dense_revision)):
        if branch is not None:
            check_revision(branch, argument)
    if dense_revision is not None and dense_revision == (revision or "main"):
        raise ValueError(f"dense_revision={dense_revision!r} is where the packed model goes; name another branch")
    if dense_revision is not None and create_pr:
        raise ValueError("dense_revision and create_pr do not go together: push the dense variant to its branch")
