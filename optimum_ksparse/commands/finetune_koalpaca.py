"""`optimum-cli ksparse finetune koalpaca`."""

from __future__ import annotations

from typing import Any, ClassVar

from .finetune_task import TaskCommand, load_with_tokenizer


class KoAlpacaCommand(TaskCommand):
    NAME = "koalpaca"
    FLAGS: ClassVar = {
        "data": {"help": "file of JSON lines with instruction and output, or a Hub id (default: KoAlpaca v1.1a)"},
        "max_length": {"type": int, "help": "tokens of an example (default: 512)"},
    }

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        from ..finetuning import KOALPACA, finetune_koalpaca

        data = more.pop("data", KOALPACA)
        finetune_koalpaca(*load_with_tokenizer(model, loading), data, settings, output, **more)
