"""`optimum-cli ksparse finetune korquad`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from .base import boolean
from .finetune_task import TaskCommand, load_with_tokenizer


class KorQuADCommand(TaskCommand):
    NAME = "korquad"
    FLAGS: ClassVar = {
        "train_file": {"help": "JSON in the form of SQuAD 1.1 (default: KorQuAD 1.0 on the Hub)"},
        "eval_file": {"help": "the same, to measure on (default: a fifth of the articles of --train-file)"},
        "seq_len": {"type": int, "help": "tokens of a window (default: 512)"},
        "max_question_tokens": {"type": int, "help": "of a question at most (default: 96)"},
        "stride": {"type": int, "help": "tokens from one window of a long paragraph to the next (default: 128)"},
        "prepend_bos": {"type": boolean, "help": "begin windows with the beginning token"},
        "head_only": {"type": boolean, "help": "train the span head without an adapter"},
        "max_eval_questions": {"type": int, "help": "measure on the first ones alone"},
        "eval_every": {"type": int, "help": "steps after which some questions are measured"},
    }

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        from ..finetuning.korquad import WindowSettings, finetune_korquad, korquad_data

        train, test = korquad_data(more.pop("train_file", None), more.pop("eval_file", None), settings.seed)
        if "max_examples" in more:
            more["max_train_questions"] = more.pop("max_examples")
        names = [field.name for field in fields(WindowSettings) if field.name in more]
        chosen = {name: more.pop(name) for name in names}
        loaded, tokenizer = load_with_tokenizer(model, loading)
        windows = WindowSettings.for_model(loaded, tokenizer, **chosen)
        record = finetune_korquad(loaded, tokenizer, train, settings, output, eval_data=test, windows=windows, **more)
        if results := record.get("results"):
            print(f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} of {results['num_samples']}")
