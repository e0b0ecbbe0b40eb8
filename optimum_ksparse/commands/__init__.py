"""`optimum-cli ksparse …`: the functions of this package, one command each. Thin: words in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..version import __version__
from .base import Command
from .convert import ConvertCommand
from .eval import EvalCommand
from .info import InfoCommand
from .merge import MergeCommand
from .parser import Parser
from .prune import PruneCommand
from .publish import CardCommand, PushCommand
from .quantize import QuantizeCommand

PROGRAM = "optimum-cli ksparse"
# Name → what it does, and its class or its own commands.
Commands = Mapping[str, tuple[str, Any]]
COMMANDS: Commands = {
    "prune": ("Prune a model and save it.", PruneCommand),
    "quantize": ("Quantise the kept values of a sparse model.", QuantizeCommand),
    "convert": ("Change the storage format of a sparse model.", ConvertCommand),
    "eval": ("Measure perplexity and KoBEST.", EvalCommand),
    "card": ("Write the card of a model.", CardCommand),
    "push": ("Publish a model with its card on the Hub.", PushCommand),
    "merge": ("Merge an adapter; every zero stays zero.", MergeCommand),
    "info": ("Show what a sparse checkpoint holds.", InfoCommand),
}


def parse_words(words: Sequence[str] | None, prog: str = PROGRAM, commands: Commands = COMMANDS) -> Command:
    """The command that the words say, those of this process where they are None. What cannot be parsed, and
    `--help`, ends by SystemExit."""
    parser = Parser(
        prog,
        description="Prune language models to 2:4, 4:8, any n:m or unstructured sparsity.",
        epilog=f"{prog} COMMAND --help shows what a command takes, with an example.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    _add_commands(parser, commands)
    args = parser.parse_args(words)
    command: Command = args.command(args)
    return command


def _add_commands(parser: Parser, commands: Commands) -> None:
    below = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)
    for name, (text, command) in commands.items():
        added = below.add_parser(name, help=text, description=text)
        if isinstance(command, Mapping):
            _add_commands(added, command)
            continue
        command.add_arguments(added)
        hub = added.add_argument_group("the Hub")
        hub.add_argument("--token", help="to log in with (default: HF_TOKEN, or that of `hf auth login`)")
        hub.add_argument("--cache-dir", metavar="FOLDER", help="for what is downloaded (default: HF_HUB_CACHE)")
        added.set_defaults(command=partial(command, added))
