"""Values of JSON as dataclasses and other kinds, by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..checks import check_keys
from .kinds import As, Between, Present, Version

_LONGEST = 500
# Control characters, lone surrogates, and what changes the direction of text or hides it.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\U000e0000-\U000e007f]"
)
_NAMES = {str: "str", bool: "bool", int: "int", float: "int or float", types.NoneType: "null"}


def build(kind: Any, value: Any, where: str = "") -> Any:
    """A value of JSON as `kind`: a dataclass, a TypedDict, a list, tuple or dict of others, a union, `Any`, or a plain
    type, with limits where it is `Annotated`. A dataclass may have a method `check_record(where)`, which is called at
    the end and raises ValueError where fields do not go together.

    Raises:
        ValueError: names the field by its place below `where`, what was found and what is allowed.
    """
    if get_origin(kind) is Annotated:
        return _annotated(kind, value, where)
    if not _fits(kind, value):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, must be {_name(kind)}")
    arguments = get_args(kind)
    holder = get_origin(kind) or kind
    if holder in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _object(kind, value, where)
    if holder is dict:
        return _mapping(arguments, value, where)
    if holder is list:
        return [build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if holder is tuple:
        if len(value) != len(arguments):
            raise ValueError(f"{where or 'it'} is {_shown(value)}, must be list of {len(arguments)}")
        return tuple(build(arguments[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is Any:
        return _any(value, where)
    return _line(value) if kind is str else _number(kind, value, where)


def build_fields(required: Mapping[str, Any], optional: Mapping[str, Any], value: Any, where: str) -> dict[str, Any]:
    """The fields of an object by their kinds, as `build`; those that are missing stay missing."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, must be object")
    kinds, prefix = {**required, **optional}, f"{where}." if where else ""
    for name, kind in required.items():
        for mark in _marks(kind, Version):
            mark.check(name, build(Annotated[int, Between(mark.oldest)], value.get(name), prefix + name))
    check_keys(value, list(kinds), where or "it")
    for name, kind in required.items():
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing, must be {_name(kind)}")
    return {name: build(kinds[name], value[name], prefix + name) for name in kinds if name in value}


def clean(text: str) -> str:
    """Without what a terminal would obey; line breaks and tabs stay."""
    return _CONTROL.sub("", text)


def _annotated(kind: Any, value: Any, where: str) -> Any:
    inner, *more = get_args(kind)
    found = build(inner, value, where)
    for check in more:
        if isinstance(check, As):
            known = _fields_of(check.kind)[2] if check.is_open else found
            part = build(check.kind, {name: found[name] for name in known if name in found}, where)
            found = {**found, **part} if check.is_open else part
        elif not isinstance(check, Present):
            found = _checked(check, found, where)
    return found


def _object(kind: Any, value: Any, where: str) -> Any:
    required, optional, _ = _fields_of(kind)
    found = kind(**build_fields(required, optional, value, where))
    if hasattr(found, "check_record"):
        found.check_record(where)
    return found


@functools.cache
def _fields_of(kind: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Name → annotation of the fields of a dataclass or a TypedDict that a file must have, that it may, and of all."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        must = kind.__required_keys__
    else:
        without = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        must = {*without, *(name for name, hint in hints.items() if _marks(hint, Present))}
    required = {name: hint for name, hint in hints.items() if name in must}
    return required, {name: hint for name, hint in hints.items() if name not in must}, hints


def _mapping(kinds: tuple[Any, ...], value: dict[Any, Any], where: str) -> dict[str, Any]:
    prefix = f"{where}." if where else ""
    names = {key: build(kinds[0], key, f"a key of {where or 'it'}") for key in value}
    return {names[key]: build(kinds[1], item, prefix + names[key]) for key, item in value.items()}


def _any(value: Any, where: str) -> Any:
    """A value of JSON with nothing said of it."""
    if isinstance(value, dict):
        return _mapping((str, Any), value, where)
    if isinstance(value, list | tuple):
        return [_any(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, int | float):
        return _number(Any, value, where)
    raise ValueError(f"{where or 'it'} is {type(value).__name__}, which JSON cannot hold")


def _number(kind: Any, value: Any, where: str) -> Any:
    """A number, True, False or None."""
    if value is None or isinstance(value, bool):
        return value
    # Integers may be larger than any float, and sums of counts have to be smaller.
    if not abs(value) <= (2**63 if kind is int else sys.float_info.max):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, must be finite, a count of at most 64 bits")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first kind of a union that takes the value; what is wrong with it by the first of its type, where none."""
    errors = []
    for kind in kinds:
        if _fits(kind, value):
            try:
                return build(kind, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has the type of JSON that a kind needs."""
    holder = get_origin(kind) or kind
    if holder is Annotated:
        return _fits(get_args(kind)[0], value)
    if holder in (Union, types.UnionType):
        return any(_fits(inner, value) for inner in get_args(kind))
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if holder in (list, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, kind if kind in _NAMES else dict)


def _name(kind: Any) -> str:
    """What messages call a kind."""
    holder = get_origin(kind) or kind
    if holder is Annotated:
        return _name(get_args(kind)[0])
    if holder in (Union, types.UnionType):
        return " or ".join(map(_name, get_args(kind)))
    return _NAMES.get(kind) or ("list" if holder in (list, tuple) else "object")


def _marks(kind: Any, mark: type) -> list[Any]:
    return [more for more in get_args(kind)[1:] if isinstance(more, mark)] if get_origin(kind) is Annotated else []


def _checked(check: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{where or 'it'} is {_shown(value)}, {error}") from None


def _line(text: str) -> str:
    """The text of a field is one line."""
    return re.sub(r"[\n\t]+", " ", clean(text))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
