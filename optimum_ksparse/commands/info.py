"""`optimum-cli ksparse info`."""

from __future__ import annotations

import json

from .base import LOADING_TEXTS, TRUST, Command
from .parser import Parser, add_switches


class InfoCommand(Command):
    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        parser.add_argument("checkpoint", help="folder or Hub id of a sparse checkpoint")
        parser.add_argument("--revision", metavar="REVISION", help=LOADING_TEXTS["revision"])
        add_switches(parser, {"json": "for machines", **TRUST})

    def execute(self) -> None:
        from ..api.inspection import inspect_checkpoint

        settings = self.settings()
        as_json = settings.pop("json", False)
        summary = inspect_checkpoint(settings.pop("checkpoint"), **settings)
        print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) if as_json else summary)
