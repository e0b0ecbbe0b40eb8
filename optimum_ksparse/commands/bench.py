"""`optimum-cli ksparse bench`."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import Command


class BenchCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from ..benchmark import FLAGS

        parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse model")
        for name, arguments in FLAGS.items():
            parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, metavar="VALUE", **arguments)

    def execute(self) -> None:
        from ..benchmark import FLAGS, run

        settings = {name: getattr(self.args, name) for name in FLAGS}
        print(run(self.args.checkpoint, **settings))
        print(f"written to {settings['output'] or 'ksparse-bench'}")
