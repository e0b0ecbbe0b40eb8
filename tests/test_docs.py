"""The documentation as it is in the repository: what links to what, and how long the READMEs may be. `make docs` says
what MkDocs finds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimum_ksparse import EvaluationProtocol, RuntimeConfig
from optimum_ksparse.__main__ import COMMANDS
from optimum_ksparse.commands.parser import Parser
from optimum_ksparse.config import METHOD_SETTINGS, SETTINGS
from optimum_ksparse.study import RECIPE_KEYS

from .conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [REPOSITORY / "README.md", REPOSITORY / "README_ko.md"]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of headings, as MkDocs makes them, those given by name, and of the API's objects."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"^::: (\S+)$", text, re.M))
    for heading in re.findall(r"^#+ (.*)$", _CODE.sub(lambda code: code[0].strip("`"), text), re.M):
        named = re.search(r"\{ #([\w-]+) \}", heading)
        plain = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
        found.add(named[1] if named else re.sub(r"[-\s]+", "-", plain))
    return found


def translated(page: Path, target: Path) -> Path:
    """Where a link of a page leads: in Korean pages to the Korean one, where there is one."""
    korean = target.with_suffix(".ko.md")
    return korean if page.name.endswith(".ko.md") and korean.exists() else target


@pytest.mark.parametrize("page", [*READMES, *PAGES], ids=lambda page: page.name)
def test_every_internal_link_resolves(page: Path) -> None:
    for link in _LINK.findall(_CODE.sub("`", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = translated(page, (page.parent / path).resolve()) if path else page
        assert target.exists(), link
        assert REPOSITORY in target.parents, link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
def test_a_readme_is_short_and_begins_with_its_two_commands(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert len(text.encode()) <= 8192
    first = re.search(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    assert first and [line.split()[:2] for line in first[1].splitlines()] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("page", [*READMES, *PAGES], ids=lambda page: page.name)
def test_a_page_has_headings_in_order_and_figures_of_its_own_with_words_for_them(page: Path) -> None:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for words, path in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text):
        assert words.strip() and not re.match(r"[a-z]+:|//", path), path


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    named = re.findall(r"[\w-]+\.md", str(settings["nav"]))
    english = {page.name for page in PAGES if not page.name.endswith(".ko.md")}
    assert set(named) == english and len(named) == len(english)
    assert {page.name.replace(".ko.md", ".md") for page in PAGES} == english


def flags(commands: Mapping[str, Any]) -> Iterator[str]:
    for _, command in commands.values():
        if isinstance(command, Mapping):
            yield from flags(command)
            continue
        parser = Parser()
        command.add_arguments(parser)
        yield from (action.option_strings[-1] for action in parser._actions if action.option_strings)


@pytest.mark.parametrize("end", [".md", ".ko.md"])
def test_every_setting_flag_and_environment_variable_is_in_code_on_a_page(end: str) -> None:
    pages = [page for page in PAGES if page.name.endswith(".ko.md") == (end == ".ko.md")]
    code = " ".join(word for page in pages for word in _CODE.findall(page.read_text(encoding="utf-8")))
    sources = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob("optimum_ksparse*/**/*.py")]
    names = {
        *(re.findall(r'"((?:OPTIMUM_)?KSPARSE_[A-Z]+(?:_[A-Z]+)*)"', "".join(sources))),
        *(name.removeprefix("--") for name in flags(COMMANDS)),
        *(name for names in (SETTINGS, METHOD_SETTINGS, RECIPE_KEYS) for name in names),
        *(field.name for settings in (EvaluationProtocol, RuntimeConfig) for field in fields(settings)),
    }
    said = {word.replace("_", "-") for word in re.findall(r"\w+(?:-\w+)*", code)}
    assert sorted(name for name in names if name.replace("_", "-") not in said) == []
