"""What a setting of a method is: its values, and what the command line says of it.

A method annotates its keyword arguments with one, `damping: Annotated[float, DAMPING] = 0.1`, and from that come the
check of `SparsityConfig(method_settings=...)`, the flag, its help and the key of a recipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_type_hints

from ..checks import check_boolean, check_integer, check_number, check_share


@dataclass(frozen=True)
class Setting:
    """A setting that one method, or one step, alone reads.

    Attributes:
        kind: int, float or bool, as a flag reads it.
        check: takes name and value; gives the value back, or raises an error that says what is allowed.
        text: what it is.
        default: where it is not given.
    """

    kind: type
    check: Callable[[str, Any], Any]
    text: str
    default: Any = None


def whole(text: str, least: int = 1, default: int | None = None) -> Setting:
    """A whole number of at least `least`."""
    return Setting(int, partial(check_integer, least=least), text, default)


def number(text: str, most: float = 1, default: float | None = None) -> Setting:
    """A number from 0 to `most`."""
    return Setting(float, partial(check_number, least=0, most=most), text, default)


def share(text: str) -> Setting:
    """A number between 0 and 1, both excluded."""
    return Setting(float, check_share, text)


def switch(text: str, default: bool) -> Setting:
    """True or False."""
    return Setting(bool, check_boolean, text, default)


# Settings that several methods have.
DAMPING = number(
    "share of the mean diagonal that is added to the diagonal of the Gram matrix (default: the method's own)"
)
ITERATIONS = whole("iterations, at most (default: the method's own)")


def settings_of(function: Callable[..., Any]) -> dict[str, Setting]:
    """The annotated keyword arguments of a method, with their defaults."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: replace(hints[parameter.name].__metadata__[0], default=parameter.default)
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }
