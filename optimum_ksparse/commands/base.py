"""What the commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand


class Command(BaseOptimumCLICommand):
    """A command that ends with one line on standard error, and status 1, where the user can mend what went wrong.
    Heavy imports belong into `execute`: an import error at the top would break every `optimum-cli` command."""

    def execute(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            self.execute()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (OSError, ValueError, TypeError, ArithmeticError, ImportError, RecursionError) as error:
            from ..records import printable

            print("error:", printable(error), file=sys.stderr)
            sys.exit(1)


def read_recipe(path: str, allowed: list[str]) -> dict[str, Any]:
    """Settings of a YAML recipe. Raises ValueError for a file that is no mapping, or an unknown key, naming the
    nearest."""
    import yaml

    from ..checks import check_keys

    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold settings as `key: value`, found {type(recipe).__name__}")
    check_keys(recipe, allowed, path)
    return recipe


def add_flags(parser: argparse.ArgumentParser, *groups: dict[str, dict[str, Any]]) -> None:
    """Adds settings as flags: name → argparse arguments."""
    for group in groups:
        for name, arguments in group.items():
            parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, metavar="VALUE", **arguments)


def read_settings(args: argparse.Namespace, allowed: list[str]) -> dict[str, Any]:
    """Settings of the recipe of `--config`, overridden by the flags that were given."""
    recipe = read_recipe(args.config, allowed) if args.config else {}
    given = {name: getattr(args, name) for name in allowed}
    return {**recipe, **{name: value for name, value in given.items() if value is not None}}


def load_checkpoint(source: str, settings: Mapping[str, Any]) -> Any:
    """The model of a checkpoint, of an adapter with its base; in its own dtype unless `settings` say otherwise. What
    the folder's `finetuning.json` says becomes `model.tuning`.

    Raises:
        ValueError: the results in its folder are damaged, which `from_pretrained` merely warns of, or the tuning is.
    """
    from transformers import AutoModelForCausalLM

    from ..evaluation import EvaluationResults, read_tuning
    from ..report import RESULTS_NAME

    results = os.path.join(source, RESULTS_NAME)
    known = EvaluationResults.load(results) if os.path.isfile(results) else None
    tuning = read_tuning(source, settings.get("revision"))
    names = ("dtype", "device_map", "revision", "trust_remote_code")
    loading = {name: settings[name] for name in names if settings.get(name) is not None}
    model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": "auto", **loading})
    if known is not None:
        # An adapter's own, instead of its base's.
        model.evaluation_results = known  # type: ignore[assignment]
    if tuning is not None:
        model.tuning = tuning  # type: ignore[assignment]
    return model


def boolean(text: str) -> bool:
    """argparse type of a setting that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def dataset(text: str) -> str | dict[str, float]:
    """argparse type of calibration data: a name, a file, or a mix `NAME=WEIGHT,NAME=WEIGHT` of them."""
    parts = [re.fullmatch(r"(.+)=([0-9.]+(?:[eE][+-]?[0-9]+)?)", part.strip()) for part in text.split(",")]
    if not any(parts):
        return text
    mix: dict[str, float] = {}
    for written, part in zip(text.split(","), parts, strict=True):
        try:
            if part is None or part[1] in mix:
                raise ValueError
            mix[part[1]] = float(part[2])
        except ValueError:
            reason = "occurs twice" if part is not None and part[1] in mix else "is no NAME=WEIGHT"
            raise argparse.ArgumentTypeError(
                f"{written.strip()!r} {reason}; allowed: a name, a file, or a mix such as mc4-ko=0.5,self=0.5"
            ) from None
    return mix
