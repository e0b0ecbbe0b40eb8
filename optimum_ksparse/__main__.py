"""All commands, of the library and of the study: `python -m optimum_ksparse …`, and `optimum-cli ksparse …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .commands import COMMANDS as COMMANDS_OF_THE_LIBRARY
from .commands import PROGRAM, Command, parse_words
from .study.commands import COMMANDS as COMMANDS_OF_THE_STUDY

COMMANDS = {**COMMANDS_OF_THE_LIBRARY, **COMMANDS_OF_THE_STUDY}


def parse(words: Sequence[str] | None = None, prog: str = PROGRAM) -> Command:
    """The command that the words say, those of this process where they are None."""
    return parse_words(words, prog, COMMANDS)


def main(words: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command that the words say. Returns its exit status; what cannot be parsed, and `--help`, ends by
    SystemExit."""
    return parse(words, prog).run()


if __name__ == "__main__":
    sys.exit(main(prog="python -m optimum_ksparse"))
