"""All commands, of the library and of the study: `python -m optimum_ksparse …`, and `optimum-cli ksparse …`.

`python -m optimum_ksparse lm_eval …` runs the program of another package, and `python -m optimum_ksparse script.py …`
a script, in a process that has imported this package: for places where it cannot be there without an import.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from .commands import COMMANDS as COMMANDS_OF_THE_LIBRARY
from .commands import PROGRAM, Command, parse_words
from .study.commands import COMMANDS as COMMANDS_OF_THE_STUDY

COMMANDS = {**COMMANDS_OF_THE_LIBRARY, **COMMANDS_OF_THE_STUDY}


def parse(words: Sequence[str] | None = None, prog: str = PROGRAM) -> Command:
    """The command that the words say, those of this process where they are None."""
    return parse_words(words, prog, COMMANDS)


def program(word: str) -> Callable[[], Any] | None:
    """What runs a Python script, or a program that an installed package has; None for a word of neither."""
    if word.endswith(".py"):
        return functools.partial(_run_script, word)
    return next((entry.load() for entry in entry_points(group="console_scripts", name=word)), None)


def _run_script(path: str) -> None:
    if not sys.flags.safe_path:  # as Python does, that it finds what lies beside it
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    runpy.run_path(path, run_name="__main__")


def main(words: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command that the words say. Returns its exit status; what cannot be parsed, and `--help`, ends by
    SystemExit."""
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] not in COMMANDS and (run := program(words[0])) is not None:
        sys.argv = words
        return run() or 0
    return parse(words, prog).run()


if __name__ == "__main__":
    sys.exit(main(prog="python -m optimum_ksparse"))
