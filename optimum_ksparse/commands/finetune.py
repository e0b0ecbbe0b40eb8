"""`optimum-cli ksparse finetune`: one subcommand for each task."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .finetune_koalpaca import KoAlpacaCommand
from .finetune_korquad import KorQuADCommand


class FinetuneCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="finetune", help="Fine-tune a sparse model on a task.")
    SUBCOMMANDS = (
        CommandInfo(name="koalpaca", help="Answer instructions in Korean.", subcommand_class=KoAlpacaCommand),
        CommandInfo(name="korquad", help="Find answers in Korean texts.", subcommand_class=KorQuADCommand),
    )
