"""`optimum-cli ksparse finetune korquad`."""

from __future__ import annotations

from typing import Any

from ...commands.parser import Parser, add_settings
from .finetune_task import TaskCommand, load_with_tokenizer

_DATA_TEXTS = {
    "train_file": "JSON in the form of SQuAD 1.1 (default: KorQuAD 1.0 on the Hub)",
    "eval_file": "the same, to measure on (default: a fifth of the articles of --train-file)",
}
_WINDOW_TEXTS = {
    "seq_len": "tokens of a window",
    "max_question_tokens": "of a question at most",
    "stride": "tokens from one window of a long paragraph to the next",
    "prepend_bos": "begin windows with the beginning token (default: where the tokenizer does)",
}
_RUN_TEXTS = {
    "head_only": "train the span head without an adapter",
    "max_eval_questions": "measure on the first ones alone (default: on all)",
    "eval_every": "steps after which some questions are measured (default: none are)",
}


class KorQuADCommand(TaskCommand):
    @classmethod
    def add_task(cls, parser: Parser) -> None:
        from ..finetuning.korquad import WindowSettings, finetune_korquad, korquad_data

        add_settings(parser, korquad_data, _DATA_TEXTS)
        add_settings(parser, WindowSettings, _WINDOW_TEXTS)
        add_settings(parser, finetune_korquad, _RUN_TEXTS)

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        from ..finetuning.korquad import WindowSettings, finetune_korquad, korquad_data

        train, test = korquad_data(more.pop("train_file", None), more.pop("eval_file", None), settings.seed)
        if "max_examples" in more:
            more["max_train_questions"] = more.pop("max_examples")
        chosen = {name: more.pop(name) for name in _WINDOW_TEXTS if name in more}
        loaded, tokenizer = load_with_tokenizer(model, loading)
        windows = WindowSettings.for_model(loaded, tokenizer, **chosen)
        record = finetune_korquad(loaded, tokenizer, train, settings, output, eval_data=test, windows=windows, **more)
        if results := record.get("results"):
            print(f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} of {results['num_samples']}")
