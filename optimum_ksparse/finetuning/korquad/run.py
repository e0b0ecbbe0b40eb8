"""Fine-tuning on KorQuAD 1.0, from a model and data to a folder and its figures."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...config import check_integer, describe_source
from ..settings import FinetuningSettings, adapter_config, linear_targets, trainable
from ..training import finish, train
from .data import KorQuADData
from .features import Window, WindowSettings, collate, make_windows
from .model import SpanModel, prepare_tokens
from .prediction import evaluate_korquad
from .saving import save_korquad_model


def finetune_korquad(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    data: KorQuADData,
    settings: FinetuningSettings,
    output: str | os.PathLike[str],
    *,
    eval_data: KorQuADData | None = None,
    windows: WindowSettings | None = None,
    head_only: bool = False,
    resume: bool = True,
    max_train_questions: int | None = None,
    max_eval_questions: int | None = None,
    eval_every: int | None = None,
    eval_every_questions: int = 200,
    eval_batch_size: int = 8,
) -> dict[str, Any]:
    """Trains an adapter and a span head on KorQuAD 1.0, saves them, and measures them.

    `output` then holds the adapter (or, with `method="full"`, the weights), `korquad_head.safetensors`, the tokenizer,
    and `finetuning.json` with settings, losses and the F1 on the way; `load_korquad_model` reads it. A run that was
    cut off goes on from its last checkpoint when it is called again.

    Args:
        model: a causal LM, dense or sparse, its folder, or its name on the Hub; it is changed in place.
        tokenizer: the model's, a fast one. `<|SEP|>` and `<|EOS|>` are added to it where it lacks them, and the
            embeddings are resized.
        data: to train on: all windows of its questions, those without the answer towards their end token.
        settings: of the training.
        output: a folder.
        eval_data: to measure on at the end, and on the way; None does not.
        windows: how the data become windows; None takes the defaults for the model.
        head_only: train head and new embeddings alone: what the backbone knows without an adapter.
        resume: False throws away an earlier run's checkpoints.
        max_train_questions, max_eval_questions: from the first on; None takes all.
        eval_every: steps after which the first `eval_every_questions` of `eval_data` are measured; None does not.
        eval_batch_size: windows in one forward pass where there are no gradients.

    Returns:
        `record`, what `finetuning.json` holds, and `results`, as of `evaluate_korquad`, None without `eval_data`.

    Raises:
        TypeError, ValueError: the model, the tokenizer, the data or an argument do not fit.
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
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    span_model = make_span_model(model, tokenizer, settings, head_only=head_only)
    windows = windows or WindowSettings.for_model(model, tokenizer)
    examples = [
        window
        for window in make_windows(data.questions[:max_train_questions], tokenizer, windows)
        if window.start is not None
    ]
    if not examples:
        raise ValueError("data: no question has an answer that is in its paragraph, there is nothing to train on")
    job = {
        "task": "korquad",
        "base": describe_source(model.name_or_path),
        "data": {**data.description, "split": data.split, "questions": len(data.questions[:max_train_questions])},
        "num_windows": len(examples),
        "windows": asdict(windows),
        "head_only": head_only,
        "num_trained": trainable(span_model),
    }
    how: dict[str, Any] = {"windows": windows, "batch_size": eval_batch_size, "bf16": settings.bf16}
    callbacks = []
    if eval_every is not None and eval_data is not None:
        callbacks.append(_Measure(span_model, tokenizer, eval_data, eval_every, eval_every_questions, how))
    log = train(
        span_model,
        examples,
        lambda batch: collate(batch, tokenizer.pad_token_id or 0),
        settings,
        output,
        job=job,
        resume=resume,
        callbacks=callbacks,
        lengths=list(map(len, examples)),
    )
    save_korquad_model(span_model, tokenizer, output)
    results = None
    if eval_data is not None:
        results = evaluate_korquad(span_model, tokenizer, eval_data, max_questions=max_eval_questions, **how)
    history = [row for row in log if "exact_match" in row]
    record = finish(output, settings, log, {**job, "history": history, "results": results})
    return {"record": record, "results": results}


def make_span_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: FinetuningSettings, *, head_only: bool = False
) -> SpanModel:
    """The model with a new head, new embeddings for the tokens that the tokenizer lacked, and an adapter as `settings`
    say, ready to train; model and tokenizer are changed in place. The same seed gives the same one."""
    new_tokens = prepare_tokens(model, tokenizer)
    torch.manual_seed(settings.seed)
    backbone: Any = model
    if head_only:
        model.requires_grad_(False)
    elif settings.method != "full":
        model.requires_grad_(False)
        config = adapter_config(settings, linear_targets(model))
        from peft import get_peft_model

        backbone = get_peft_model(model, config)
    else:
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight.requires_grad_(False)  # it does not run
    return SpanModel(backbone, new_tokens)


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


__all__ = ["Window", "finetune_korquad", "make_span_model"]
