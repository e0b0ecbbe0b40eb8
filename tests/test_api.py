"""Every public name and signature stands in `api.txt`, so that a change of one is a decision: after it,
`python -m tests.test_api` writes the file anew."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import optimum_ksparse

SIGNATURES = Path(__file__).parent / "api.txt"


def signatures() -> str:
    """A line for each public function, class, method and property."""
    lines = []
    for name in sorted(optimum_ksparse.__all__):
        value = getattr(optimum_ksparse, name)
        if inspect.isclass(value):
            lines.append(f"{name}{_signature(value)}")
            lines += [f"{name}.{member}{text}" for member, text in sorted(_members(value))]
        elif callable(value):
            lines.append(f"{name}{_signature(value)}")
        else:
            lines.append(name)
    return "\n".join(lines) + "\n"


def _members(kind: type) -> list[tuple[str, str]]:
    """Public methods, properties and fields that a class of this package adds to what it inherits from others."""
    members = {}
    for base in reversed([base for base in kind.__mro__ if base.__module__.startswith("optimum_ksparse")]):
        for name, value in vars(base).items():
            if name.startswith("_"):
                continue
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value):
                members[name] = _signature(value)
            elif isinstance(value, property):
                members[name] = ""
    return list(members.items())


def _signature(value: object) -> str:
    # A torch or transformers of another version may print types, and inherited arguments, in another way.
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_public_names_and_signatures_are_those_that_were_decided():
    pytest.importorskip("peft", reason="merge_adapter needs the extra finetune")
    assert signatures() == SIGNATURES.read_text(encoding="utf-8")


if __name__ == "__main__":
    SIGNATURES.write_text(signatures(), encoding="utf-8")
