"""`optimum-cli ksparse info`."""

from __future__ import annotations

import json

from ..api.inspection import inspect_checkpoint
from .base import LOADING_TEXTS, TRUST, Command


class InfoCommand(Command):
    REQUIRED = ("checkpoint",)
    WORDS = {"checkpoint": "folder or Hub id of a sparse checkpoint"}
    SWITCHES = {"json": "print it as JSON, for machines", **TRUST}
    FLAGS = {"loading": ({"revision": LOADING_TEXTS["revision"]},)}
    EXAMPLE = "polyglot-ko-5.8b-2of4"

    def execute(self) -> None:
        settings = self.settings()
        as_json = settings.pop("json", False)
        summary = inspect_checkpoint(settings.pop("checkpoint"), **settings)
        print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) if as_json else summary)
