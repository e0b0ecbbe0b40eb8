"""Recipes: settings in YAML, with the plain values of YAML 1.2.

YAML 1.1, which PyYAML reads, takes `2:4` for 124, `on` for true, `1e-4` for text and `010` for 8.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..checks import check_keys

_TAG = "tag:yaml.org,2002:"
# The core schema: https://yaml.org/spec/1.2.2/#1032-tag-resolution
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                place = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", place)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: Any) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)

    def construct_number(self, node: Any) -> float:
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)


def read_recipe(path: str, allowed: list[str]) -> dict[str, Any]:
    """Settings of a YAML recipe. Raises OSError where the file cannot be read, ValueError where it is no mapping, has
    a key twice, or one that is not allowed: names the nearest."""
    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.load(file, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold settings as `key: value`, found {type(recipe).__name__}")
    if "token" in recipe:
        raise ValueError(f"{path} holds a token: recipes are kept and shared; pass --token, or set HF_TOKEN")
    check_keys(recipe, allowed, path)
    return recipe
