"""`optimum-cli ksparse bench`."""

from __future__ import annotations

from typing import Any

from ...commands.base import TRUST, Command
from ...commands.parser import Parser, add_switches


class BenchCommand(Command):
    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        from ..benchmark import FLAGS

        parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse model")
        for name, arguments in FLAGS.items():
            metavar = None if "choices" in arguments else "N" if arguments.get("type") is int else "VALUE"
            more: dict[str, Any] = {"metavar": metavar, **arguments}
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **more)
        add_switches(parser, TRUST)

    def execute(self) -> None:
        from ..benchmark import run

        settings = self.settings()
        print(run(settings.pop("checkpoint", None), **settings))
        print(f"written to {settings.get('output', 'ksparse-bench')}")
