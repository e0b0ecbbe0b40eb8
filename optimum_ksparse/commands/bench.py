"""`optimum-cli ksparse bench`."""

from __future__ import annotations

from typing import Any

from .base import Command
from .parser import Parser


class BenchCommand(Command):
    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from ..benchmark import FLAGS

        parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse model")
        for name, arguments in FLAGS.items():
            more: dict[str, Any] = {"metavar": "N" if arguments.get("type") is int else "VALUE", **arguments}
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **more)

    def execute(self) -> None:
        from ..benchmark import run

        settings = self.settings()
        print(run(settings.pop("checkpoint", None), **settings))
        print(f"written to {settings.get('output', 'ksparse-bench')}")
