"""Fine-tuning on KorQuAD 1.0, from a model and data to a folder and its figures."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import CONFIG_NAME

from ....adapters.prepare import prepare_for_training
from ....checkpoint import describe_model, facts_of, fingerprint, sparse_modules
from ....checkpoint.model_class import class_for_source
from ....checkpoint.staging import write_text
from ....checks import check_integer
from ....data import read_tokenizer
from ....evaluation import EvaluationResults, Measurement, tuning_settings
from ....records import TUNING_NAME, to_json
from ..runs import add_adapter, claims_output, is_main
from ..settings import FinetuningSettings
from ..training import finish, finished, train
from .data import KorQuADData
from .features import WindowSettings, collate, make_windows
from .model import SpanModel, prepare_tokens
from .prediction import evaluate_korquad
from .saving import load_korquad_model, save_korquad_model


@claims_output
def finetune_korquad(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    data: KorQuADData,
    settings: FinetuningSettings,
    output: str | os.PathLike[str],
    *,
    eval_data: KorQuADData | None = None,
    windows: WindowSettings | None = None,
    head_only: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    max_train_questions: int | None = None,
    max_eval_questions: int | None = None,
    eval_every: int | None = None,
    eval_every_questions: int = 200,
    eval_batch_size: int = 8,
) -> dict[str, Any]:
    """Trains an adapter and a span head on KorQuAD 1.0, saves them, and measures them.

    `output` then holds the adapter (or, with `method="full"`, the weights), `korquad_head.safetensors`, the tokenizer,
    and `finetuning.json` with settings, losses and the F1 on the way; `load_korquad_model` reads it. The figures are
    also in `evaluation_results.json`, as rows after tuning of the model that was tuned
    (`EvaluationResults.take_tuned`, `optimum-cli ksparse eval MODEL --tuned-results OUTPUT`). A run that was cut off
    goes on from its last checkpoint when it is called again.

    Args:
        model: a causal LM, dense or sparse, its folder, or its name on the Hub; it is changed in place.
        tokenizer: the model's, a fast one; None reads the one beside it. `<|SEP|>` and `<|EOS|>` are added to it where
            it lacks them, and the embeddings are resized.
        data: to train on: all windows of its questions, those without the answer towards their end token.
        settings: of the training.
        output: a folder.
        eval_data: to measure on at the end, and on the way; None does not.
        windows: how the data become windows; None takes the defaults for the model.
        head_only: train head and the embeddings of the two tokens alone: what the backbone knows without an adapter.
        resume: go on with an unfinished run in `output`; False starts over.
        overwrite: replace a finished run in `output`. Without it, the record of one of the same job is returned.
        max_train_questions, max_eval_questions: from the first on; None takes all.
        eval_every: steps after which the first `eval_every_questions` of `eval_data` are measured; None does not.
        eval_batch_size: windows in one forward pass where there are no gradients.

    Returns:
        What `finetuning.json` holds: `loss` of each step, `history` (the figures on the way), `results` (as of
        `evaluate_korquad`; None without `eval_data`), and what the run was. Empty in all processes but the first.

    Raises:
        TypeError, ValueError: the model, the tokenizer, the data or an argument do not fit, or `output` holds another
            model or another run.
        FileExistsError, NotADirectoryError, BlockingIOError: `output` holds something else, is a file, or is in use.
        ImportError: PEFT is not installed.
    """
    limits = {
        "max_train_questions": max_train_questions,
        "max_eval_questions": max_eval_questions,
        "eval_every": eval_every,
        "eval_every_questions": eval_every_questions,
    }
    for name, value in limits.items():
        if value is not None:
            check_integer(name, value, 1)
    if eval_every is not None and eval_data is None:
        raise ValueError(f"eval_every={eval_every} needs eval_data")
    if not isinstance(model, PreTrainedModel):
        loaded: PreTrainedModel = class_for_source(model).from_pretrained(os.fspath(model), dtype="auto")
        model = loaded
    tokenizer = tokenizer or read_tokenizer(str(model.name_or_path))
    windows = windows or WindowSettings.for_model(model, tokenizer)
    outcome, part = _outcome_of(model)  # of the weights before anything is added to them
    prepare_tokens(model, tokenizer)
    questions = data.questions[:max_train_questions]
    examples = [w for w in make_windows(questions, tokenizer, windows) if w.start is not None]
    if not examples:
        raise ValueError("data: no question has an answer that is in its paragraph, there is nothing to train on")
    job = {
        "task": "korquad",
        "base": str(model.name_or_path),
        "base_fingerprint": outcome.fingerprint,
        "data": {**data.description, "split": data.split, "questions": len(questions)},
        "left_out": len(questions) - len({window.question for window in examples}),
        "num_windows": len(examples),
        "windows": asdict(windows),
        "head_only": head_only,
    }
    how: dict[str, Any] = {"windows": windows, "batch_size": eval_batch_size, "bf16": settings.bf16}
    if (record := finished(output, settings, job, overwrite=overwrite)) is not None:
        if eval_data is not None and not _is_measured(record, eval_data, max_eval_questions):
            _measure_again(record, model, output, eval_data, max_questions=max_eval_questions, **how)
        _save_results(outcome, part, record, output)
        return record
    span_model = make_span_model(model, tokenizer, settings, head_only=head_only)
    callbacks = []
    if eval_every is not None and eval_data is not None:
        callbacks.append(_Measure(span_model, tokenizer, eval_data, eval_every, eval_every_questions, how))
    pad, lengths = tokenizer.pad_token_id or 0, list(map(len, examples))
    run: dict[str, Any] = {"job": job, "resume": resume, "callbacks": callbacks, "lengths": lengths}
    log = train(span_model, examples, lambda batch: collate(batch, pad), settings, output, **run)
    if not is_main():
        return {}
    save_korquad_model(span_model, tokenizer, output)
    results: dict[str, Any] | None = None
    if eval_data is not None:
        results = evaluate_korquad(span_model, tokenizer, eval_data, max_questions=max_eval_questions, **how)
    history = [row for row in log if "exact_match" in row]
    trained = sum(parameter.numel() for parameter in span_model.trained_parameters().values())
    outcomes = {"num_trained": trained, "history": history, "results": results}
    record = finish(output, settings, log, {**job, **outcomes})
    _save_results(outcome, part, record, output)
    return record


def _outcome_of(model: PreTrainedModel) -> tuple[EvaluationResults, str]:
    """Results of a model, still empty, and in which of their columns it belongs."""
    outcome = EvaluationResults(fingerprint(model))
    if sparse_modules(model):
        return outcome, "sparse"
    outcome.dense_model, outcome.dense_revision = describe_model(model), facts_of(model).commit
    return outcome, "dense"


def _is_measured(record: dict[str, Any], data: KorQuADData, max_questions: int | None) -> bool:
    """Whether the results of a finished run are those of `data`."""
    found, count = record.get("results") or {}, len(data.questions[:max_questions])
    wanted = {"data": data.description, "split": data.split, "num_samples": count}
    return all(found.get(name) == value for name, value in wanted.items())


def _measure_again(
    record: dict[str, Any], model: PreTrainedModel, output: str | os.PathLike[str], data: KorQuADData, **how: Any
) -> None:
    """Measures what a finished run saved on other data than it was measured on, into its record."""
    base = None if (Path(output) / CONFIG_NAME).is_file() else model
    span_model, tokenizer = load_korquad_model(output, base)
    record["results"] = evaluate_korquad(span_model, tokenizer, data, **how)
    write_text(Path(output) / TUNING_NAME, to_json(record))


def _save_results(
    outcome: EvaluationResults, part: str, record: dict[str, Any], output: str | os.PathLike[str]
) -> None:
    if record.get("results") is not None:
        row = Measurement.from_row("korquad", {**record["results"], "tuning": tuning_settings(record)})
        outcome.add(part, row)
        outcome.save(output)


def make_span_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: FinetuningSettings,
    *,
    head_only: bool = False,
) -> SpanModel:
    """The model with a new head, embeddings of `<|SEP|>` and `<|EOS|>` that train, and an adapter as `settings`
    say, ready to train; model and tokenizer are changed in place. The same seed gives the same one."""
    marker_tokens = prepare_tokens(model, tokenizer)
    if head_only:
        prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
        return SpanModel(model, marker_tokens).train()
    backbone = add_adapter(model, settings)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.weight.requires_grad_(False)  # it does not run
    return SpanModel(backbone, marker_tokens).train()


class _Measure(TrainerCallback):
    """Measures some of the data every so many steps, into the log of the run, which its checkpoints hold."""

    def __init__(
        self,
        model: SpanModel,
        tokenizer: PreTrainedTokenizerBase,
        data: KorQuADData,
        every: int,
        count: int,
        how: dict[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.every, self.count, self.how = every, count, how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            row = evaluate_korquad(self.model, self.tokenizer, self.data, max_questions=self.count, **self.how)
            figures = {name: round(row[name], 4) for name in ("exact_match", "f1")}
            state.log_history.append({"step": state.global_step, **figures, "num_samples": row["num_samples"]})
