"""`optimum-cli ksparse …`: the functions of this package, one command each. Thin: arguments in, text out."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .info import InfoCommand
from .prune import PruneCommand


class KSparseCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="ksparse", help="Prune language models to 2:4, 4:8, any n:m or unstructured sparsity.")
    SUBCOMMANDS = (
        CommandInfo(name="prune", help="Prune a model and save it.", subcommand_class=PruneCommand),
        CommandInfo(name="info", help="What a sparse checkpoint holds.", subcommand_class=InfoCommand),
    )


__all__ = ["KSparseCommand"]
