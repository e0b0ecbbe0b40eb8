"""`optimum-cli ksparse …`, and `python -m optimum_ksparse …`: the functions of this package, one command each. Thin:
words in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .base import Command
from .bench import BenchCommand
from .card import CardCommand
from .eval import EvalCommand
from .finetune_koalpaca import KoAlpacaCommand
from .finetune_korquad import KorQuADCommand
from .info import InfoCommand
from .merge import MergeCommand
from .parser import Parser
from .prune import PruneCommand
from .push import PushCommand
from .study import StudyCommand

# Name → what it does, and its class or its own commands.
COMMANDS: dict[str, tuple[str, Any]] = {
    "prune": ("Prune a model and save it.", PruneCommand),
    "eval": ("Measure perplexity and KoBEST.", EvalCommand),
    "finetune": (
        "Fine-tune on a task.",
        {
            "koalpaca": ("Answer instructions in Korean.", KoAlpacaCommand),
            "korquad": ("Find answers in Korean texts.", KorQuADCommand),
        },
    ),
    "card": ("Write the model card.", CardCommand),
    "push": ("Publish on the Hub, with card.", PushCommand),
    "bench": ("Measure speed beside dense.", BenchCommand),
    "merge": ("Merge an adapter, keep the mask.", MergeCommand),
    "study": ("Compare methods, patterns, data.", StudyCommand),
    "info": ("What a sparse checkpoint holds.", InfoCommand),
}


def main(words: Sequence[str] | None = None, prog: str = "optimum-cli ksparse") -> int:
    """Runs the command that the words say, those of this process where they are None. Returns its exit status; what
    cannot be parsed, and `--help`, ends by SystemExit."""
    return parse_words(words, prog).run()


def parse_words(words: Sequence[str] | None = None, prog: str = "optimum-cli ksparse") -> Command:
    """The command that the words say."""
    parser = Parser(prog, description="Prune language models to 2:4, 4:8, any n:m or unstructured sparsity.")
    _add_commands(parser, COMMANDS)
    args = parser.parse_args(words)
    command: Command = args.command(args)
    return command


def _add_commands(parser: Parser, commands: Mapping[str, tuple[str, Any]]) -> None:
    below = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)
    for name, (text, command) in commands.items():
        own = below.add_parser(name, help=text, description=text)
        if isinstance(command, Mapping):
            _add_commands(own, command)
            continue
        own.fill = command.add_arguments
        own.add_argument("--token", help="of the Hub (default: HF_TOKEN, or that of `hf auth login`)")
        own.add_argument(
            "--cache-dir", metavar="FOLDER", help="for what is downloaded from the Hub (default: HF_HUB_CACHE)"
        )
        own.set_defaults(command=partial(command, own))


__all__ = ["COMMANDS", "main", "parse_words"]
