"""What `eval` and `push` share: how to measure, as flags and in recipes."""

from __future__ import annotations

from typing import Any

from ..evaluation import EvaluationProtocol
from .base import usage

# Settings of EvaluationProtocol, whose defaults and types they have.
_TEXTS = {
    "texts": "for perplexity: kowiki (Korean Wikipedia), a .txt or .jsonl file, or none (default: kowiki)",
    "seq_len": "window positions (default: the model's context, at most 2048)",
    "stride": "tokens from one window to the next (default: windows do not overlap)",
    "max_tokens": "window positions to use at most (default: all)",
    "tasks": "copa, hellaswag, boolq, sentineg, wic (default: these five, of KoBEST); nsmc; or none",
    "num_fewshot": "solved examples before each item of KoBEST",
    "limit": "items of each task, for trying out (default: all)",
    "data_dir": "folder of <task>/<split>.jsonl (default: the Hub)",
    "prepend_bos": "begin windows and items with the beginning token (default: where the tokenizer does)",
    "batch_size": "windows or items in one forward pass",
}
PROTOCOL = (_TEXTS, EvaluationProtocol)


def protocol_of(settings: dict[str, Any]) -> EvaluationProtocol:
    """The protocol of a recipe and flags; its settings are taken out of `settings`."""
    with usage():
        return EvaluationProtocol.from_settings({name: settings.pop(name) for name in _TEXTS if name in settings})
