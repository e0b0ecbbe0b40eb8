"""The card: four whole ones to be read, and that no value breaks out of it."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.evaluation import EvaluationResults
from optimum_ksparse.hub import LANGUAGES
from optimum_ksparse.hub import card as card_module
from optimum_ksparse.hub.card import BEGIN, END, render_card
from optimum_ksparse.hub.figures import ERROR_FIGURE, RESULTS_FIGURE
from optimum_ksparse.hub.metadata import build_metadata
from optimum_ksparse.hub.subject import CardSubject
from optimum_ksparse.pruners import METHODS
from optimum_ksparse.pruners.allocation import LEFT_DENSE
from optimum_ksparse.pruners.existing import NOT_SPARSE
from optimum_ksparse.records import is_repo_id
from optimum_ksparse.report import LayerReport, SparsityReport
from optimum_ksparse.version import INSTALL_VARIABLE

from ..conftest import REPOSITORY, thinned
from .subjects import (
    MARKDOWN,
    SUBJECTS,
    body,
    decoding,
    front,
    kobest,
    make_adapter,
    make_report,
    make_results,
    make_subject,
    perplexity,
    tables,
)


@pytest.mark.parametrize(
    ("name", "language"), [("packed", "en"), ("packed", "ko"), ("dense", "en"), ("changed", "ko"), ("adapter", "en")]
)
def test_the_whole_card(name: str, language: str) -> None:
    """Cards to be read: to write them anew delete the file."""
    path = Path(__file__).parent / f"cards/{name}.{language}.md"
    text = body(render_card(SUBJECTS[name](), language))
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("language", "name"), [("en", "README.md"), ("ko", "README_ko.md")])
@pytest.mark.parametrize("folder", sorted((REPOSITORY / "hub_cards").glob("*/")), ids=lambda folder: folder.name)
def test_the_cards_of_the_repository_are_what_the_template_makes(folder: Path, language: str, name: str) -> None:
    report = SparsityReport.load(folder / "sparsity_report.json")
    results = EvaluationResults.load(folder / "evaluation_results.json")
    before = (folder / name).read_text(encoding="utf-8")
    (sizes,) = [row for row in tables(before)[0] if "MB" in row[0]]
    subject = CardSubject(
        name=folder.name,
        report=report,
        results=results,
        storage="packed",
        dtype="bfloat16",
        file_bytes=int(sizes[-1].replace(",", "")) * 10**6,
        base_name=report.base_model,
        figures={figure: (folder / figure).exists() for figure in (ERROR_FIGURE, RESULTS_FIGURE)},
    )
    assert render_card(subject, language) == before


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_card_begins_with_what_a_reader_decides_by(language: str) -> None:
    """Before the first heading: quality, bytes and speed beside the dense model, and the line that loads it."""
    report = make_report()
    report.config |= {"values": "int8", "group_size": -1}
    for layer in report.layers:
        layer.packed_bytes = layer.dense_bytes * 5 // 16
    subject = make_subject(report, make_results(speed=True))
    before = body(render_card(subject, language)).split("\n## ")[0]
    (table,) = tables(before)
    assert [row[1:] for row in table[1:]] == [
        ["10.00", "12.50"],
        ["0.6000", "0.4500"],
        ["2,664", "1,862"],  # 1,331,810,304 parameters of 2 bytes
        ["16.00", "5.00"],
        ["20.0", "25.0"],
    ]
    assert all(word in table[-1][0] for word in ("Some CPU", "2", "bfloat16"))
    assert '`AutoModelForCausalLM.from_pretrained("user/polyglot-2of4")`' in before
    assert "int8" in before.splitlines()[4]


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_was_not_measured_is_not_in_the_first_table(language: str) -> None:
    def titles(**more: Any) -> list[list[str]]:
        before = body(render_card(make_subject(**more), language)).split("\n## ")[0]
        return [row for table in tables(before) for row in table[1:]]

    assert [row[1:] for row in titles(results=None)] == [["2,664", "1,862"], ["16.00", "9.00"]]
    assert [row[1:] for row in titles(report=None, results=None)] == [["1,862"]]
    assert titles(report=None, results=None, file_bytes=0) == []
    assert [row[1:] for row in titles(report=None, results=None, file_bytes=123_456)] == [["0.12"]]
    # Stored dense, nothing is packed; a column of the dense model alone is nothing to decide by.
    assert len(titles(storage="dense", results=EvaluationResults("0", [], [perplexity()]))) == 1
    # Another machine for the dense model.
    results = make_results(speed=True)
    results.dense[-1].protocol["threads"] = 8
    assert titles(results=results)[-1][1:] == ["–", "25.0"]


def test_the_first_table_is_of_the_model_as_it_is_now() -> None:
    results = make_results(tuned=True)
    untuned, tuned = (
        tables(render_card(make_subject(results=results, tuning=tuning)))[0][1:]
        for tuning in (None, {"title": "KoAlpaca"})
    )
    assert [row[1:] for row in untuned[:2]] == [["10.00", "12.50"], ["0.6000", "0.4500"]]
    assert tuned[0][1:] == ["9.00", "11.00"] and "KoAlpaca" in tuned[0][0]
    assert "KoBEST" not in tuned[1][0]  # one of its tasks was measured after tuning, of which there is no mean


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("threads", [2, None])
def test_a_card_says_how_speed_was_measured_and_where_it_was_not(language: str, threads: int | None) -> None:
    results = make_results(speed=True)
    for row in (results.sparse[-1], results.dense[-1]):
        row.protocol |= {"threads": threads, "cuda_graph": threads is None}
    card = render_card(make_subject(results=results), language)
    how = next(line for line in card.splitlines() if line.startswith(("- Decoding", "- 디코딩")))
    assert all(word in how for word in ("256", "32", "Some CPU", "bfloat16"))
    assert ("CUDA" in how) == (threads is None)
    assert ("ksparse bench" in card) == (threads is not None)  # a GPU was not tried


def _outline(card: str) -> list[Any]:
    """Everything in a card but its words: what Markdown makes of it, the shapes of tables, links and numbers."""
    blocks = [(token.type, token.tag, token.info) for token in MARKDOWN.parse(body(card)) if token.type != "inline"]
    shapes = [[len(row) for row in table] for table in tables(card)]
    links = sorted(re.findall(r"\]\((?!#)(.*?)\)", card))
    numbers = sorted(re.findall(r"\d[\d,.]*\d{2,}", body(card)))
    return [blocks, shapes, links, numbers]


@pytest.mark.parametrize("name", SUBJECTS)
def test_both_languages_say_the_same(name: str) -> None:
    subject = SUBJECTS[name]()
    english, korean = (render_card(subject, language) for language in LANGUAGES)
    assert _outline(english) == _outline(korean)
    assert not re.search("[가-힣]", english.replace("대한민국", ""))
    for card, language in ((english, "en"), (korean, "ko")):
        assert not re.search(r"\b(None|nan|Undefined)\b|\{\{|\{%", card)
        assert not re.findall(r"^#+ (.*)\n\s*(?=## |\Z)", card, re.M)  # a section without text
        assert card == render_card(subject, language, existing=card)
        for code in re.findall(r"```python\n(.*?)```", card, re.S):
            compile(code, "card", "exec")


def test_the_catalogue_is_complete() -> None:
    folder = Path(card_module.__file__).parent / "templates"
    catalogue = yaml.safe_load((folder / "phrases.yaml").read_text(encoding="utf-8"))
    assert all(set(phrase) == set(LANGUAGES) for phrase in catalogue.values())
    templates = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jinja"))
    said = set(re.findall(r'say\("([^"]+)"[,)]', templates))
    assert said <= set(catalogue)
    assert {f"scope: {method.scope}" for method in METHODS.values()} <= set(catalogue)


def test_every_method_is_cited_with_what_followed_it() -> None:
    for name, method in ((name, method) for name, method in METHODS.items() if method.recognise is None):
        assert method.citation.startswith("@misc{")
        assert method.citation in render_card(make_subject(make_report(name, refine=["swaps"])))
    card = render_card(make_subject(make_report(refine=["swaps"]), EvaluationResults("0", [kobest()])))
    assert re.findall(r"eprint = \{(.*?)\}", card) == ["2306.11695", "2512.10922", "2204.04541"]
    assert "bibtex" not in render_card(make_subject(None, None, base_model=None))


def test_figures_by_other_protocols_are_not_comparable() -> None:
    card = render_card(make_subject(results=make_results(limit=50, num_samples=50)))
    first, rows = tables(card)[0], tables(card)[1][1:]
    assert first[1][1:] == ["10.00", "12.50"] and first[2][1:] == ["–", "0.4500"]
    assert rows[0][2:] == ["10.00", "12.50", "80.0%"]
    assert all(row[4] == "not comparable" and "not comparable: " in row[2] for row in rows[2:])
    card = render_card(make_subject(results=EvaluationResults("0", [perplexity(None)], [perplexity(10.0)])))
    assert "∞" in tables(card)[0][1] and "∞" in tables(card)[1][1]


def test_a_korean_card_has_no_english_reason_for_layers_left_dense() -> None:
    report = make_report(allocation="owl", target_density=0.5)
    report.skipped = {"layers.0.mlp.down_proj": LEFT_DENSE}
    assert LEFT_DENSE not in render_card(make_subject(report), "ko")
    assert shown(LEFT_DENSE).replace("_", "\\_") in render_card(make_subject(report), "en")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pattern", ["2:4", "50%/32x16", "50%/16x32"])
def test_where_it_is_faster_and_where_not(pattern: str, dtype: str) -> None:
    card = render_card(make_subject(make_report(pattern=pattern), dtype=dtype))
    assert ("NVIDIA GPUs from Ampere on" in card) == (pattern == "2:4" and dtype == "bfloat16")
    assert "On CPUs" in card


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("values", "limit"), [(None, "1.78"), ("int8", "3.20"), ("int4", "5.12")])
def test_what_runs_where_of_quantised_values(language: str, values: str | None, limit: str) -> None:
    """GPUs run them packed, and are bound by the bytes that they have; many tokens at a time are decompressed."""
    report = make_report()
    if values is not None:
        report.config |= {"values": values, "group_size": 128}
        for layer in report.layers:
            layer.packed_bytes = round(layer.dense_bytes / float(limit))
    card = render_card(make_subject(report), language)
    speed = next(line for line in card.splitlines() if "Ampere" in line)
    assert limit in speed and ("autotune_kernels()" in speed) == (values is not None)
    size = {"en": "- Size", "ko": "- 크기"}[language]
    packed, dense = (
        next(line for line in text.splitlines() if line.startswith(size))
        for text in (card, render_card(make_subject(report, storage="dense"), language))
    )
    assert "bfloat16" in packed and (values is None or values in packed)
    assert "bfloat16" in dense and f"{values}" not in dense
    assert "Ampere" not in render_card(make_subject(report, dtype="float32"), language)


@pytest.mark.parametrize("source", ["git+https://example.org/x/y.git@v1", None])
def test_a_card_names_no_package_that_anybody_may_register(
    source: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(INSTALL_VARIABLE, raising=False)
    if source is not None:
        monkeypatch.setenv(INSTALL_VARIABLE, source)
    for subject, extra in ((make_subject(), ""), (make_adapter(), "[finetune]")):
        commands = re.findall(r"^pip install (.*)$", render_card(subject), re.M)
        assert commands == ([] if source is None else [f'"optimum-ksparse{extra} @ {source}"'])
    monkeypatch.setenv(INSTALL_VARIABLE, 'x"; rm -rf ~; "')
    with pytest.raises(ValueError, match=INSTALL_VARIABLE):
        render_card(make_subject())


# --- Values that would break out -------------------------------------------------------------------------------------

# What the escaping may add, none of which is seen: zero width space, word joiner, directional isolates.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\u2066\u2067\u2068\u2069"))
HARMLESS = "harmless value"
RLO, LRI = "\u202e", "\u2066"
NASTY = [
    "# heading", "> quote", "- [ ] task", "1. one", "---", "***", "a\n===\nb", "a\n---\nb",
    "---\nlicense: mit\n---\n# other card", "a\r\n---\r\nb", "key: [1, {b: c}]",
    "!!python/object/apply:os.system ['id']",
    "&anchor *alias", "'quoted' \"double\"", "null", "1e3", "2024-01-01", "a | b\n|---|---|\n| c | d |", "\\|", "a\\",
    "\\\\`", "``` \ncode\n```", "~~gone~~", "`a` ``b``", "    indented code", "*a* **b** _c_ __d__",
    "<script>alert(1)</script>", "</td></tr></table>", "<!-- comment", "-->", f"{END}\n\nfree text\n\n{BEGIN}",
    "<https://evil.example>", "&lt;b&gt; &amp; &#42; &nbsp;", "[text][ref]\n\n[ref]: https://evil.example",
    "![image](https://evil.example/x.png)", "](x)", "[^1]", "[x](javascript:alert(1))", "www.evil.example",
    "https://evil.example/a?b=c&d=e_f_g", "someone@evil.example", "@user #1 :smile:", "$x^2$ $$y$$", "{{ 7 * 7 }}",
    "{{ jinja }} {% raw %} {# comment #}", "{% endraw %}{% include 'loading.md.jinja' %}", "word " * 400,
    "`" * 199 + "a",
    "עברית (1) | a", f"a{RLO}b{LRI}c", "a\0b", "\x1b[31mred\x07\x7f\x85\x9f", "a\udfff\ud83db", "🙂 👩\u200d👧",
    "a\x85b", "\ufeffbom", "a\u2028b\u2029c\x0bd\x0ce", "\u200b", "\n\n\n", "C:\\Users\\name", "=cmd|' /C calc'!A0",
]  # fmt: skip
PIECES = [
    *"#>-+*_=~`|\\[]()!<>&\"'{}%$^@:;.,/ \t\n\r\0", "1.", "2)", "---", "```", "~~~", "    ", "<b>", "-->", "<!--",
    "](x)", "![", "https://a.b", "www.", "&lt;", "&#35;", "{{", "{%", "a", "b c", "한", "א", RLO, "\ud800", "\u2028",
    "|---|", "\n---\n", "\n\n", END, BEGIN,
]  # fmt: skip
values = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
values = values.filter(lambda value: value and not re.search(r"\.\d+\.", value))  # a block's number is shown as *


def shown(value: str) -> str:
    """What a reader sees of a value: one line without control characters, cut after 200 characters."""
    text = "".join(char for char in value if char in "\n\t" or unicodedata.category(char)[0] != "C")
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"


def filled(value: str, adapter: bool = False) -> CardSubject:
    """A card with the value in every place that a user, a file or a machine fills."""
    texts = {"file": value, "sha256": value}
    sparse = [
        perplexity(texts=texts, dtype=value, tuning={"task": value, value: value}),
        kobest("copa", split=value, task_version=value, data={"name": value}, dtype=value),
        kobest("wic", limit=3, data={"files_sha256": value}),
    ]
    named = {"name": value, "dataset": value, "configuration": value, "slice": value, "sha256": value}
    sparse.append(decoding(2.0, machine=value, dtype=value))
    dense = [perplexity(9.0, texts=named), kobest("copa"), kobest("wic"), decoding(1.0)]
    for row in chain(sparse, dense):
        row.environment = {"device": value, "batch_size": 1, "versions": {value: value, "lm-eval": value}}
    report = SparsityReport(
        config={"method": "wanda", "pattern": "50%"},
        calibration={**make_report().calibration, "dataset": texts, "form": value, "seed": value},
        layers=[LayerReport(value, (8, 16), value, 64, 256, 144, 0.25, 0.5, note=value)],
        skipped={value: value},
        versions={value: value, "torch": value},
    )
    results = EvaluationResults(value, sparse, dense, value, value)
    facts = {"kind": value, "settings": {value: value, "r": value}, "num_parameters": 12} if adapter else None
    more = {"base_model": None, "base_name": value, "tags": [value, "mine"], "dtype": value, "adapter": facts}
    more["inherited"] = {"license": value, "license_name": value, "license_link": value, "language": [value, "ko"]}
    more["tuning"] = {"title": value, value: value}
    return make_subject(report, results, name=value, **more)


def structure(card: str) -> tuple[list[Any], str]:
    """What Markdown makes of a card: everything that is not plain text, and the plain text."""
    parts: list[Any] = []
    text: list[str] = []
    for token in MARKDOWN.parse(body(card)):
        for part in (token.children or []) if token.type == "inline" else [token]:
            if part.type in ("text", "code_inline"):  # both are text; a code span where it is harmless
                text.append(part.content)
            else:
                parts.append((part.type, part.tag, part.info, sorted(part.attrs.items())))
                text.append(part.content if part.type in ("fence", "html_block", "html_inline", "code_block") else "")
        text.append("\n")
    return parts, " ".join("".join(text).translate(INVISIBLE).split())


@cache
def harmless(language: str, adapter: bool) -> tuple[list[Any], str]:
    return structure(render_card(filled(HARMLESS, adapter), language))


def check_contained(value: str, language: str, adapter: bool) -> None:
    subject = filled(value, adapter)
    card = render_card(subject, language)
    card.encode("utf-8")
    parts, text = structure(card)
    expected_parts, expected_text = harmless(language, adapter)
    assert parts == expected_parts
    assert text == " ".join(expected_text.replace(HARMLESS, shown(value)).split())
    assert body(card).count(BEGIN) == body(card).count(END) == 1
    assert front(card) == build_metadata(subject).to_dict()
    assert render_card(subject, language, existing=card) == card


@pytest.mark.slow
@pytest.mark.parametrize("part", thinned(range(2), [0]))
def test_nasty_values_are_plain_text(part: int) -> None:
    for number, value in enumerate(NASTY[part::2]):
        check_contained(value, LANGUAGES[number % 2], number % 4 > 1)


@settings(max_examples=6)
@given(value=values, language=st.sampled_from(LANGUAGES), adapter=st.booleans())
def test_any_value_is_plain_text(value: str, language: str, adapter: bool) -> None:
    check_contained(value, language, adapter)


# As remark-gfm (and cmark-gfm for addresses) looks for them: in the text, after character references are read.
BARE_LINK = re.compile(r"(?i)https?://[-.\w]|(?<!\w)www\.[-.\w]|[-.\w+]+@[-\w]+\.[-\w]")


def test_a_bare_address_does_not_become_a_link() -> None:
    value = "see https://evil.example/x HTTP://evil.example WWW.Evil.example a@b.org ."
    for token in MARKDOWN.parse(body(render_card(filled(value)))):
        text = "".join(part.content if part.type == "text" else " " for part in token.children or [])
        assert not BARE_LINK.search(text.translate({0x2060: " ", 0x200B: " "})), text


def test_what_is_linked_as_a_repository_can_be_one() -> None:
    for value in NASTY:
        assert not is_repo_id(value) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value, re.ASCII)
        assert not is_repo_id(f"user/{value}\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_card_of_a_model_that_was_pruned_elsewhere_says_so(language: str) -> None:
    report = make_report("existing")
    report.skipped, report.calibration = {"layers.0.mlp.down_proj": NOT_SPARSE}, {}
    card = " ".join(render_card(make_subject(report, None), language).split())
    english = [
        "It was not pruned here, and no weight was changed",
        "Converted with",
        "was not pruned here.",
        NOT_SPARSE,
    ]
    korean = [
        "여기서 가지치기하거나 가중치를 바꾸지 않았습니다",
        "변환:",
        "여기서 가지치기한 모델이 아니므로",
        "8분의 1보다",
    ]
    assert all(text in card for text in (korean if language == "ko" else english))
    assert "2:4" in card and "pruned to" not in card
    assert "0.14" in render_card(make_subject(report, None, storage="compressed-tensors"), language)
