"""What a card that is there already holds of a person's, and where our section goes in it."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

BEGIN = "<!-- optimum-ksparse: begin. This section is written anew at each push; write outside of it. -->"
END = "<!-- optimum-ksparse: end -->"
_SECTION = re.compile(
    r"<!-- optimum-ksparse: begin\b(?:(?!<!-- optimum-ksparse: begin\b).)*?<!-- optimum-ksparse: end -->", re.DOTALL
)
_MARKER = re.compile(r"<!-- optimum-ksparse: (begin\b[^\n]*?|end )-->")
# What transformers and PEFT write into the form of huggingface_hub.
_GENERATED = re.compile(
    r"This is the model card of a 🤗 transformers model .*|### Framework versions|- PEFT \S+|# Model Card for .*"
)
_PEFT_SETTINGS = re.compile(
    r"^## Training procedure\n+The following `bitsandbytes` quantization config was used during training:\n(- .*\n?)*",
    re.M,
)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card. Raises ValueError where its metadata are damaged, which would be lost."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, text.strip("\r\n")
    what = "the metadata of the README.md that is there are no YAML of `key: value`: mend them first"
    try:
        front = yaml.safe_load(match.group(2)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{what}; {error}") from None
    if not isinstance(front, dict):
        raise ValueError(what)
    return front, text[match.end() :].strip("\r\n")


def insert_section(body: str, section: str, line_break: str) -> str:
    """Puts the section in the place of the marked one, or after what a person wrote. Where there is no section, or
    more than one, nothing but stray markers goes."""
    parts = _SECTION.split(body)
    if len(parts) == 2:
        return section.join(_MARKER.sub("", part) for part in parts).strip("\r\n")
    body = _MARKER.sub("", body).strip("\r\n")
    return f"{body}{line_break}{line_break}{section}" if body.strip() else section


def has_section(body: str) -> bool:
    """Whether the card is one of ours."""
    return _SECTION.search(body) is not None


def is_unfilled_form(body: str) -> bool:
    """The form that transformers and PEFT write beside a checkpoint, as long as nobody has filled it in."""
    if body.count("[More Information Needed]") <= 20:
        return False
    form = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = [line.strip() for line in _PEFT_SETTINGS.sub("", body).splitlines()]
    return all(line in form or _GENERATED.fullmatch(line) for line in lines)
