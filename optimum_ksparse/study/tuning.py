"""The tasks that tune a model before they measure it: KorQuAD with LoRA, and NSMC after KoAlpaca."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..checkpoint import facts_of
from ..checks import check_boolean, check_integer, check_keys
from ..evaluation import EvaluationProtocol, EvaluationResults, evaluate_model, read_tuning
from ..records import RESULTS_NAME
from .finetuning import KOALPACA, FinetuningSettings
from .finetuning.instructions import instruction_rows, is_file

_TRAINING = tuple(f.name for f in fields(FinetuningSettings))
_WINDOWS = ("seq_len", "max_question_tokens", "stride", "prepend_bos")
_KORQUAD = ("train_file", "eval_file", "max_examples", "max_eval_questions", "head_only")
KORQUAD_KEYS = (*_TRAINING, *_WINDOWS, *_KORQUAD)
KOALPACA_KEYS = (*_TRAINING, "data", "max_length", "max_examples")
_MEASURING = ("data_dir", "limit", "batch_size", "prepend_bos")
NSMC_KEYS = ("koalpaca", *_MEASURING)

# Gives the model to tune, and its tokenizer.
Load = Callable[[], tuple[Any, Any]]


def check_korquad(settings: Mapping[str, Any]) -> None:
    """Raises what tuning with these settings would raise before it begins."""
    from .finetuning.korquad import WindowSettings, korquad_data

    training_of(settings)
    WindowSettings(**{name: settings[name] for name in _WINDOWS if name in settings})
    for name in ("max_examples", "max_eval_questions"):
        if settings.get(name) is not None:
            check_integer(f"korquad.{name}", settings[name], 1)
    check_boolean("korquad.head_only", settings.get("head_only", False))
    if settings.get("train_file") is not None or settings.get("eval_file") is not None:
        korquad_data(settings.get("train_file"), settings.get("eval_file"))


def check_nsmc(settings: Mapping[str, Any]) -> None:
    """Raises what tuning and measuring with these settings would raise before it begins."""
    koalpaca = settings.get("koalpaca")
    if not isinstance(koalpaca, Mapping):
        raise TypeError(
            f"nsmc.koalpaca must be settings of the tuning as key: value ({{}} for none), found {koalpaca!r}"
        )
    check_keys(koalpaca, KOALPACA_KEYS, "nsmc.koalpaca")
    training_of(koalpaca)
    if "max_length" in koalpaca:
        check_integer("nsmc.koalpaca.max_length", koalpaca["max_length"], 2)
    if koalpaca.get("max_examples") is not None:
        check_integer("nsmc.koalpaca.max_examples", koalpaca["max_examples"], 1)
    if "data" in koalpaca and is_file(koalpaca["data"]):
        instruction_rows(koalpaca["data"], KOALPACA, 1)
    _nsmc_protocol(settings)


def training_of(settings: Mapping[str, Any]) -> FinetuningSettings:
    """How to train, of the settings of a task. Raises ValueError for what the dense model cannot do, which is tuned
    alike."""
    training = FinetuningSettings(**{name: settings[name] for name in _TRAINING if name in settings})
    if training.method == "masked":
        raise ValueError(
            "method='masked' needs sparse layers, and a study tunes the dense model alike: take another, such as "
            "'lora'"
        )
    return training


def _nsmc_protocol(settings: Mapping[str, Any]) -> EvaluationProtocol:
    chosen = {name: settings[name] for name in _MEASURING if name in settings}
    return EvaluationProtocol(texts=None, tasks=("nsmc",), **chosen)


def run_korquad(load: Load, settings: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Trains an adapter and a span head in `folder`, and gives the measurement as JSON holds it."""
    from .finetuning.korquad import WindowSettings, finetune_korquad, korquad_data

    training = training_of(settings)
    train, test = korquad_data(settings.get("train_file"), settings.get("eval_file"), training.seed)
    model, tokenizer = load()
    chosen = {name: settings[name] for name in _WINDOWS if name in settings}
    windows = WindowSettings.for_model(model, tokenizer, **chosen)
    limits = {"max_train_questions": "max_examples", "max_eval_questions": "max_eval_questions"}
    more = {name: settings[key] for name, key in limits.items() if key in settings}
    head_only = settings.get("head_only", False)
    finetune_korquad(
        model, tokenizer, train, training, folder, eval_data=test, windows=windows, head_only=head_only, **more
    )
    return _rows(EvaluationResults.load(folder / RESULTS_NAME), "korquad")


def run_nsmc(
    load: Load, load_tuned: Callable[[Path], tuple[Any, Any]], settings: Mapping[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """Tunes a model on KoAlpaca in `folder`, measures NSMC, and gives the measurements as JSON holds them.
    `load_tuned` loads what was saved in a folder."""
    from .finetuning import finetune_koalpaca

    koalpaca = settings["koalpaca"]
    more = {name: koalpaca[name] for name in ("max_length", "max_examples") if name in koalpaca}
    finetune_koalpaca(*load(), koalpaca.get("data", KOALPACA), training_of(koalpaca), folder, **more)
    model, tokenizer = load_tuned(folder)
    facts_of(model).tuning = read_tuning(folder)
    if (folder / RESULTS_NAME).is_file():
        facts_of(model).results = EvaluationResults.load(folder / RESULTS_NAME)
    keep: Callable[[EvaluationResults], None] = lambda found: found.save(folder)  # noqa: E731
    return _rows(evaluate_model(model, tokenizer, _nsmc_protocol(settings), on_measured=keep), "nsmc_")


def _rows(results: EvaluationResults, name: str) -> list[dict[str, Any]]:
    rows = [*results.sparse, *results.dense]
    return [asdict(row) for row in rows if row.name.startswith(name) and row.tuning is not None]
