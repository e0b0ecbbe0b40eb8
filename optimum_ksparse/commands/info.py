"""`optimum-cli ksparse info`."""

from __future__ import annotations

import json
from argparse import ArgumentParser

from .base import Command


class InfoCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="folder or Hub id of a sparse checkpoint")
        parser.add_argument("--revision", help="branch, tag or commit")
        parser.add_argument("--json", action="store_true", help="for machines")

    def execute(self) -> None:
        from ..inspection import inspect_checkpoint

        summary = inspect_checkpoint(self.args.checkpoint, revision=self.args.revision)
        print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) if self.args.json else summary)
