"""Templates whose values cannot break out of the text: names and texts of users are escaped by default."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from importlib.resources import files
from typing import Any

import yaml

_LONGEST = 200
# What means something in GitHub's Markdown anywhere in a line, or only where a line or a cell begins; bare links.
_INLINE = re.compile(r"([\\`*_{}\[\]()#!|~$^])")
_LEADING = re.compile(r"^([-+=:]|\d+(?=[.)](?:\s|$)))")
_HARMLESS = re.compile(r"[\w.*:/+%-]{1,200}", re.ASCII)
# Readers make links of bare addresses, after references such as &#64; are read: a word joiner keeps them apart.
_LINK = re.compile(r"(:)(?=//)|((?i:www))(?=\.)|()(?=@)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}


class Markdown(str):
    """Text that is Markdown already."""


def escape(value: Any) -> Markdown:
    """Any value as one line of Markdown that reads as it was written: no markup, no HTML, no line breaks, no control
    characters; cut after 200 characters; right-to-left text is kept apart from what is around it."""
    if isinstance(value, Markdown):
        return value
    text = "".join(char if unicodedata.category(char)[0] != "C" or char in "\n\t" else "" for char in str(value))
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    isolate = any(unicodedata.bidirectional(char) in ("R", "AL") for char in text)
    text = _INLINE.sub(r"\\\1", "".join(_HTML.get(char, char) for char in text))
    text = _LEADING.sub(lambda match: match[1] + "&#8203;" if match[1].isdigit() else "\\" + match[1], text)
    text = _LINK.sub(lambda match: f"{match[0]}\N{WORD JOINER}", text)
    return Markdown(f"\N{FIRST STRONG ISOLATE}{text}\N{POP DIRECTIONAL ISOLATE}" if isolate else text)


def code(value: Any) -> Markdown:
    """A name as a code span where it is made of harmless signs alone, otherwise escaped."""
    text = str(value)
    return Markdown(f"`{text}`") if _HARMLESS.fullmatch(text) else escape(text)


def number(value: float | None, digits: int | None = None, missing: str = "") -> Markdown:
    """A count with commas, or a figure with that many digits after the point; `missing` for None."""
    if value is None:
        return Markdown(missing)
    if value == math.inf:
        return Markdown("∞")
    return Markdown(f"{value:,}" if digits is None else f"{value:,.{digits}f}")


@functools.cache
def environment() -> Any:
    """The Jinja environment of this package's templates."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("optimum_ksparse.hub"),
        finalize=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"code": code, "number": number, "markdown": Markdown}
    return made


@functools.cache
def phrases(language: str) -> Any:
    """`say(name, **values)` for templates: a phrase of the catalogue in a language, with the values of the template
    and these in it; the name itself where the catalogue has none, as for the metric of a task that others added."""
    import jinja2

    text = files(__package__).joinpath("templates/phrases.yaml").read_text(encoding="utf-8")
    catalogue = {name: environment().from_string(phrase[language]) for name, phrase in yaml.safe_load(text).items()}

    @jinja2.pass_context
    def say(context: Any, name: str, /, **values: Any) -> Markdown:
        phrase = catalogue.get(name)
        return escape(name) if phrase is None else Markdown(phrase.render({**context.get_all(), **values}))

    return say
