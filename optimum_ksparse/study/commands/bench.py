"""`optimum-cli ksparse bench`."""

from __future__ import annotations

from ...commands.base import TRUST, Command
from ..benchmark import BenchSettings, run
from ..benchmark.run import DTYPES
from ..settings import help_texts


class BenchCommand(Command):
    WORDS = {"checkpoint": "folder or Hub id of a sparse model"}
    SWITCHES = TRUST
    FLAGS = ((help_texts(BenchSettings), BenchSettings),)
    CHOICES = {"dtype": DTYPES}

    def execute(self) -> None:
        settings = self.settings()
        print(run(settings.pop("checkpoint", None), **settings))
        print(f"written to {settings.get('output', BenchSettings.output)}")
