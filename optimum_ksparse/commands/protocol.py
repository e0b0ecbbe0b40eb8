"""What `eval` and `push` share: how to measure, as flags and in recipes."""

from __future__ import annotations

from typing import Any

from .base import boolean

# Settings of EvaluationProtocol: name → argparse arguments. Defaults are EvaluationProtocol's own.
PROTOCOL_FLAGS: dict[str, dict[str, Any]] = {
    "texts": {"help": "for perplexity: kowiki (default), a .txt or .jsonl file, or none"},
    "seq_len": {"type": int, "help": "window positions (default: the model's context, at most 2048)"},
    "stride": {"type": int, "help": "tokens from one window to the next (default: windows do not overlap)"},
    "max_tokens": {"type": int, "help": "window positions to use at most"},
    "tasks": {"nargs": "+", "help": "of KoBEST: copa, hellaswag, boolq, sentineg, wic (default: all); nsmc; or none"},
    "num_fewshot": {"type": int, "help": "solved examples before each item of KoBEST (default: 0)"},
    "limit": {"type": int, "help": "items of each task, for trying out (default: all)"},
    "data_dir": {"help": "folder of <task>/<split>.jsonl, instead of the Hub"},
    "prepend_bos": {"type": boolean, "help": "begin windows and items with the beginning token"},
    "batch_size": {"type": int, "help": "windows or items in one forward pass"},
}
LOADING_FLAGS: dict[str, dict[str, Any]] = {
    "dtype": {"help": "float32, bfloat16, float16, or auto (default: the checkpoint's)"},
    "device_map": {"help": "as in from_pretrained: auto, cpu, cuda:0, …"},
    "tokenizer": {"help": "name or folder, where it is not beside the model"},
}


def protocol_of(settings: dict[str, Any]) -> Any:
    """The `EvaluationProtocol` of a recipe and flags; their settings are taken out of `settings`."""
    from ..evaluation import EvaluationProtocol

    return EvaluationProtocol.from_settings({name: settings.pop(name) for name in PROTOCOL_FLAGS if name in settings})
