"""`optimum-cli ksparse finetune koalpaca`."""

from __future__ import annotations

from typing import Any

from ...commands.parser import Parser, add_settings
from .finetune_task import TaskCommand, load_with_tokenizer


class KoAlpacaCommand(TaskCommand):
    @classmethod
    def add_task(cls, parser: Parser) -> None:
        from ..finetuning.koalpaca import finetune_koalpaca

        text = "file of JSON lines with instruction and output, or a Hub id (default: KoAlpaca v1.1a)"
        add_settings(parser, finetune_koalpaca, {"data": text, "max_length": "tokens of an example"})

    def finetune(self, model: str, loading: dict[str, Any], output: str, settings: Any, more: dict[str, Any]) -> None:
        from ..finetuning import KOALPACA, finetune_koalpaca

        data = more.pop("data", KOALPACA)
        finetune_koalpaca(*load_with_tokenizer(model, loading), data, settings, output, **more)
