"""Adds `optimum-cli ksparse`. There is no `__init__.py` here or above: `optimum` is a namespace shared with other
packages.

`optimum-cli` imports this file for each of its commands: it must do with the standard library, so that a torch or a
transformers that does not suit this package breaks no other command."""

import argparse
import sys
from importlib import import_module, metadata

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

_PACKAGE = "optimum-ksparse"
_NEEDED = ("torch", "transformers")


class KSparseCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="ksparse", help="Prune language models to 2:4, 4:8, any n:m or unstructured sparsity.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = ""  # everything after `ksparse` is for the parser of the package, `--help` too
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        try:
            commands = import_module("optimum_ksparse.__main__")
        except Exception as error:  # a library that does not suit, or a broken one, fails in any way
            sys.exit(
                f"error: optimum-ksparse cannot be loaded: {_versions()} ({type(error).__name__}: {_line(error)})"
            )
        if unsuitable := _versions(only_unsuitable=True):
            sys.exit(f"error: {unsuitable}")
        sys.exit(commands.main(self.args.arguments))


def _versions(only_unsuitable: bool = False) -> str:
    """What this package needs and what is here, in a sentence; with `only_unsuitable` empty where all suits."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    try:
        needed = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:  # it runs from a checkout
        needed = []
    wrong = []
    for requirement in map(Requirement, needed):
        if requirement.name not in _NEEDED or requirement.marker is not None:
            continue
        version = _version(requirement.name)
        # A build from source, such as 2.12.0a0+git, counts as the version that it leads to.
        suits = version is not None and requirement.specifier.contains(Version(version).base_version)
        if not (suits and only_unsuitable):
            here = f"{version} is here" if version else "it is not installed"
            wrong.append(f"{requirement.name}{requirement.specifier} is needed, {here}")
    return "; ".join(wrong)


def _version(name: str) -> str | None:
    """Version of the library that is imported, or would be; None where there is none."""
    version = getattr(sys.modules.get(name), "__version__", None)
    try:
        return str(version or metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else f"{line[:300]}…"


REGISTER_COMMANDS = [KSparseCommand]
