"""Adds `optimum-cli ksparse`. There is no `__init__.py` here or above: `optimum` is a namespace shared with other
packages."""

from optimum_ksparse.commands import KSparseCommand

REGISTER_COMMANDS = [KSparseCommand]
