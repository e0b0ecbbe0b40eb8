"""The parser of all commands: no abbreviations, the nearest name for an unknown one, settings as flags."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..checks import nearest
from ..pruners import Setting
from ..records.sources import redact


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names (an abbreviation of one is another's, in time), with `_` for `-` too, before,
    between and after what has no name. What is wrong with the words ends with status 2 and one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter  # an example stays one line, to be copied
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "formatter_class": raw})
        self._intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:
            return super().parse_known_args(args, namespace)
        words = [self._spelled(word) for word in (sys.argv[1:] if args is None else args)]
        if self._subparsers is not None:
            return super().parse_known_args(words, namespace)
        self._intermixed = True
        try:
            parsed, unknown = self.parse_known_intermixed_args(words, namespace)
        finally:
            self._intermixed = False
        if unknown:
            self._refuse(unknown)
        return parsed, unknown

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        return hyphened + equals + value if name.startswith("--") and hyphened in self._option_string_actions else word

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Values are not shown: one may be a secret whose option was misspelt."""
        option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if option is None:
            self.error(f"one word too many: {redact(unknown[0])!r}")
        self.error(f"there is no {redact(option)}{_hint(option, self._option_string_actions)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            hint = _hint(str(value), allowed)
            raise argparse.ArgumentError(action, f"{value!r} is not known{hint}; allowed: {', '.join(allowed)}")

    def error(self, message: str) -> NoReturn:
        message = redact(" ".join(message.removeprefix("argument ").split()))
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _hint(name: str, allowed: Iterable[str]) -> str:
    near = nearest(name, allowed)
    return f" (did you mean {near}?)" if near else ""


def add_flags(
    parser: argparse._ActionsContainer,
    texts: Mapping[str, str | Setting],
    source: Callable[..., Any] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Adds settings as flags: by name what each is, for the help, or a `Setting`, which says its type and default too.
    `source` is the function, or the class, whose arguments say types and defaults; None: they are texts. `choices`
    has the values of those that have a few."""
    for name, text in texts.items():
        if isinstance(text, Setting):
            kind, is_list, default, text = boolean if text.kind is bool else text.kind, False, text.default, text.text
        else:
            kind, is_list, default = _argument(source, name)
        allowed = (choices or {}).get(name)
        if default is not None and "(default" not in text:
            shown = str(default).lower() if isinstance(default, bool) else default
            text = f"{text} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else shown})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=kind,
            nargs="+" if is_list else None,
            choices=allowed,
            metavar=None if allowed else _METAVARS.get(kind, "VALUE"),
            help=text.replace("%", "%%"),
        )


def add_switches(parser: argparse.ArgumentParser, texts: Mapping[str, str]) -> None:
    """Adds flags that have no value."""
    for name, text in texts.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, action="store_const", const=True, help=text.replace("%", "%%")
        )


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


_METAVARS: dict[Any, str] = {int: "N", float: "NUMBER", boolean: "true|false"}


def _argument(source: Any, name: str) -> tuple[Any, bool, Any]:
    """argparse type of a setting, whether it takes several values, and its default."""
    if name == "dataset":
        return dataset, False, None
    if source is None:
        return str, False, None
    hint, default = _arguments(source)[name]
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if str in parts:
        return str, any(get_origin(part) is list for part in parts), default
    lists = [part for part in parts if get_origin(part) in (list, Sequence)]
    kinds = {*parts, *(inner for part in lists for inner in get_args(part))}
    kind = next((read for kind, read in ((bool, boolean), (int, int), (float, float)) if kind in kinds), str)
    return kind, bool(lists), default


@functools.cache
def _arguments(source: Any) -> dict[str, tuple[Any, Any]]:
    """Name → annotation and default of the arguments of a function or a class."""
    called: Any = getattr(source, "__init__") if isinstance(source, type) else source  # noqa: B009 (for mypy)
    hints, parameters = get_type_hints(called), inspect.signature(called).parameters
    return {name: (hints.get(name), parameter.default) for name, parameter in parameters.items()}
