"""The tasks that tune a model before they measure it: KorQuAD with LoRA, and NSMC after KoAlpaca."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint import facts_of
from ..evaluation import EvaluationProtocol, EvaluationResults, Measurement, evaluate_model, read_tuning
from ..records import RESULTS_NAME
from .finetuning import KoAlpacaSettings, KorQuADSettings, study_settings
from .finetuning.instructions import instruction_rows, is_file
from .finetuning.korquad.data import korquad_data

KORQUAD_KEYS = tuple(f.name for f in fields(KorQuADSettings))
_MEASURING = ("data_dir", "limit", "batch_size", "prepend_bos")
NSMC_KEYS = ("koalpaca", *_MEASURING)

# Gives the model to tune, and its tokenizer.
Load = Callable[[], tuple[Any, Any]]


def check_korquad(settings: Mapping[str, Any]) -> None:
    """Raises what tuning with these settings would raise before it begins."""
    checked = study_settings(KorQuADSettings, settings, "korquad")
    if checked.train_file is not None:
        korquad_data(checked)


def check_nsmc(settings: Mapping[str, Any]) -> None:
    """Raises what tuning and measuring with these settings would raise before it begins."""
    koalpaca = settings.get("koalpaca")
    if not isinstance(koalpaca, Mapping):
        raise TypeError(
            f"nsmc.koalpaca must be settings of the tuning as key: value ({{}} for none), found {koalpaca!r}"
        )
    checked = study_settings(KoAlpacaSettings, koalpaca, "nsmc.koalpaca")
    if is_file(checked.data):
        instruction_rows(checked.data, 1)
    nsmc_protocol(settings)


def nsmc_protocol(settings: Mapping[str, Any]) -> EvaluationProtocol:
    """What is measured after tuning on KoAlpaca."""
    chosen = {name: settings[name] for name in _MEASURING if name in settings}
    return EvaluationProtocol(texts=None, tasks=("nsmc",), **chosen)


def run_korquad(load: Load, settings: Mapping[str, Any], folder: Path) -> list[Measurement]:
    """Trains an adapter and a span head in `folder`, and gives the measurement."""
    from .finetuning.run import finetune

    finetune(*load(), KorQuADSettings(**settings), folder)
    return _rows(EvaluationResults.load(folder / RESULTS_NAME), "korquad")


def run_nsmc(
    load: Load, load_tuned: Callable[[Path], tuple[Any, Any]], settings: Mapping[str, Any], folder: Path
) -> list[Measurement]:
    """Tunes a model on KoAlpaca in `folder`, measures NSMC, and gives the measurements. `load_tuned` loads what was
    saved in a folder."""
    from .finetuning.run import finetune

    finetune(*load(), KoAlpacaSettings(**settings["koalpaca"]), folder)
    model, tokenizer = load_tuned(folder)
    facts_of(model).tuning = read_tuning(folder)
    if (folder / RESULTS_NAME).is_file():
        facts_of(model).results = EvaluationResults.load(folder / RESULTS_NAME)
    keep: Callable[[EvaluationResults], None] = lambda results: results.save(folder)  # noqa: E731
    return _rows(evaluate_model(model, tokenizer, nsmc_protocol(settings), on_measured=keep), "nsmc_")


def _rows(results: EvaluationResults, name: str) -> list[Measurement]:
    rows = [*results.sparse, *results.dense]
    return [row for row in rows if row.name.startswith(name) and row.tuning is not None]
