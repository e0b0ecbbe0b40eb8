"""`optimum-cli ksparse …`: the functions of this package, one command each. Thin: arguments in, text out."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .bench import BenchCommand
from .card import CardCommand
from .eval import EvalCommand
from .finetune import FinetuneCommand
from .info import InfoCommand
from .merge import MergeCommand
from .prune import PruneCommand
from .push import PushCommand
from .study import StudyCommand


class KSparseCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="ksparse", help="Prune language models to 2:4, 4:8, any n:m or unstructured sparsity.")
    SUBCOMMANDS = (
        CommandInfo(name="prune", help="Prune a model and save it.", subcommand_class=PruneCommand),
        CommandInfo(name="eval", help="Measure perplexity and KoBEST.", subcommand_class=EvalCommand),
        CommandInfo(name="finetune", help="Fine-tune on a task.", subcommand_class=FinetuneCommand),
        CommandInfo(name="card", help="Write the model card.", subcommand_class=CardCommand),
        CommandInfo(name="push", help="Publish on the Hub, with card.", subcommand_class=PushCommand),
        CommandInfo(name="bench", help="Measure speed beside dense.", subcommand_class=BenchCommand),
        CommandInfo(name="merge", help="Merge an adapter, keep the mask.", subcommand_class=MergeCommand),
        CommandInfo(name="study", help="Compare methods, patterns, data.", subcommand_class=StudyCommand),
        CommandInfo(name="info", help="What a sparse checkpoint holds.", subcommand_class=InfoCommand),
    )


__all__ = ["KSparseCommand"]
