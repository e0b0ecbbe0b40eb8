"""Values of JSON as dataclasses and other kinds, by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..checks import check_keys
from .kinds import As, Between, Version

_LONGEST = 500
# Control characters, lone surrogates, and what changes the direction of text or hides it.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\U000e0000-\U000e007f]"
)
_NAMES = {str: "str", bool: "bool", int: "int", float: "int or float", types.NoneType: "null"}
_TYPES: dict[Any, Any] = {float: (int, float), list: (list, tuple), tuple: (list, tuple)}  # what stands for a kind


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
        built = kind(**build_fields(*_fields_of(kind), value, where))
        if hasattr(built, "check_record"):
            built.check_record(where)
        return built
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
    if kind is str:
        return re.sub(r"[\n\t]+", " ", clean(value))  # the text of a field is one line
    return _number(kind, value, where)


def build_fields(required: Mapping[str, Any], optional: Mapping[str, Any], value: Any, where: str) -> dict[str, Any]:
    """The fields of an object by their kinds, as `build`; those that are missing stay missing."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, must be object")
    kinds, prefix = {**required, **optional}, f"{where}." if where else ""
    for name, kind in required.items():
        if version := _version(kind):
            version.check(name, build(Annotated[int, Between(version.oldest)], value.get(name), prefix + name))
    check_keys(value, list(kinds), where or "it")
    for name, kind in required.items():
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing, must be {_name(kind)}")
    return {name: build(kinds[name], value[name], prefix + name) for name in kinds if name in value}


def clean(text: str) -> str:
    """Without what a terminal would obey; line breaks and tabs stay."""
    return _CONTROL.sub("", text)


def _annotated(kind: Any, value: Any, where: str) -> Any:
    inner, *checks = get_args(kind)
    built = build(inner, value, where)
    for check in checks:
        if isinstance(check, As):
            names = {**_fields_of(check.kind)[0], **_fields_of(check.kind)[1]} if check.is_open else built
            fields = build(check.kind, {name: built[name] for name in names if name in built}, where)
            built = {**built, **fields} if check.is_open else fields
        elif not isinstance(check, Version):
            try:
                built = check(built)
            except ValueError as error:
                raise ValueError(f"{where or 'it'} is {_shown(built)}, {error}") from None
    return built


@functools.cache
def _fields_of(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name → annotation of the fields of a dataclass or a TypedDict that a file must have, and of those it may."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        must = kind.__required_keys__
    else:
        without = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        must = without | {name for name, hint in hints.items() if _version(hint)}
    required = {name: hint for name, hint in hints.items() if name in must}
    return required, {name: hint for name, hint in hints.items() if name not in must}


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


def _members(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union, or the one kind, without limits."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    is_union = get_origin(kind) in (Union, types.UnionType)
    return tuple(member for inner in get_args(kind) for member in _members(inner)) if is_union else (kind,)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has the type of JSON that a kind needs."""
    for member in _members(kind):
        holder = get_origin(member) or member
        types_of_json = _TYPES.get(holder, holder if holder in _NAMES else dict)
        is_number = member in (int, float)
        if member is Any or (isinstance(value, types_of_json) and not (is_number and isinstance(value, bool))):
            return True
    return False


def _name(kind: Any) -> str:
    """What messages call a kind."""
    holders = [get_origin(member) or member for member in _members(kind)]
    return " or ".join(_NAMES.get(holder) or ("list" if holder in _TYPES else "object") for holder in holders)


def _version(kind: Any) -> Version | None:
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Version)), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
