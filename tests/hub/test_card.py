"""The card: what it says, that no value breaks out of it, and that what a person wrote into it stays."""

from __future__ import annotations

import re
import resource
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

from optimum_ksparse import SparsityConfig, sparsify, write_card
from optimum_ksparse.adapters import MergedLayer, MergeReport
from optimum_ksparse.checkpoint import fingerprint
from optimum_ksparse.config import is_repo_id
from optimum_ksparse.evaluation import KOBEST_TASKS, EvaluationResults, Measurement
from optimum_ksparse.hub import writing
from optimum_ksparse.hub.card import BEGIN, END, AdapterFacts, CardSubject, render_card
from optimum_ksparse.hub.figures import ERROR_FIGURE, RESULTS_FIGURE, draw_figures
from optimum_ksparse.hub.metadata import build_metadata, merge_metadata
from optimum_ksparse.pruners.allocation import LEFT_DENSE
from optimum_ksparse.report import BlockReport, Change, LayerReport, MethodChoice, SparsityReport, Trial
from optimum_ksparse.version import INSTALL_VARIABLE

from ..conftest import REPOSITORY, make_config
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
LANGUAGES = ("en", "ko")
# title of a section → that title in the Korean card
TITLES = {
    "Results": "결과",
    "Protocol": "평가 프로토콜",
    "What was pruned": "가지치기 내용",
    "Calibration": "보정 데이터",
    "How to load": "불러오기",
    "Where it is smaller, and where it is faster": "크기와 속도",
    "Limits": "한계",
    "Software": "소프트웨어",
    "Citations": "인용",
}
WORDS = {"not evaluated": "평가하지 않음", "not comparable": "비교 불가", "not measured": "측정하지 않음"}
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {"copa": 0.0707, "hellaswag": 0.0625, "boolq": 0.0583, "sentineg": 0.0512, "wic": 0.0711}


# --- What cards are made of ------------------------------------------------------------------------------------------


def perplexity(value: float | None = 12.5, bits: float = 1.25, **protocol: Any) -> Measurement:
    texts = {"name": "kowiki", "dataset": "wikimedia/wikipedia", "configuration": "20231101.ko", "slice": "first 256"}
    known = {
        "texts": {**texts, "sha256": "5ba1"},
        "seq_len": 2048,
        "stride": None,
        "max_tokens": None,
        "num_windows": 37,
        "num_tokens": 75739,
        "num_bytes": 312345,
        "prepend_bos": False,
        "dtype": "bfloat16",
    }
    environment = {"device": "NVIDIA H100", "batch_size": 4, "versions": {"torch": "2.13.0"}}
    metrics = {"perplexity": value, "bits_per_byte": bits}
    return Measurement("perplexity", metrics, {**known, **protocol}, environment)


def kobest(task: str = "copa", acc: float = 0.5, f1: float = 0.45, **protocol: Any) -> Measurement:
    known = {
        "task": f"kobest_{task}",
        "task_version": 1.0,
        "num_fewshot": 0,
        "limit": None,
        "data": {"name": "skt/kobest_v1"},
        "split": "test",
        "num_samples": 1000,
        "items_sha256": "ef01",
        "prepend_bos": True,
        "dtype": "bfloat16",
    }
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"}
    metrics = {"acc": acc, "acc_stderr": ERRORS[task], "f1": f1}
    return Measurement(task, metrics, {**known, **protocol}, {"device": "cpu", "batch_size": 8, "versions": versions})


TUNING = {"task": "koalpaca", "method": "LORA", "r": 8, "steps": 300}


def nsmc(number: int = 1, accuracy: float = 0.5, **protocol: Any) -> Measurement:
    known = {
        "data": {"name": "e9t/nsmc", "revision": "refs/convert/parquet"},
        "split": "test",
        "num_samples": 500,
        "num_fewshot": 10,
        "max_example_tokens": 25,
        "seed": 1234,
        "prompt": "Text: {s}\nFeeling:",
        "example_labels": [0, 1, 1],
        "items_sha256": "c0de",
        "greedy_note": None,
        "prepend_bos": True,
        "dtype": "bfloat16",
    }
    metrics = {"accuracy": accuracy, "accuracy_stderr": 0.0224, "macro_f1": 0.4, "greedy_accuracy": accuracy / 2}
    environment = {"device": "cpu", "batch_size": 8, "versions": {"torch": "2.13.0"}}
    return Measurement(f"nsmc_{number}", metrics, {**known, **protocol}, environment)


def korquad(f1: float = 60.0, **protocol: Any) -> Measurement:
    known = {
        "data": {"name": "squad_kor_v1", "sha256": "fade"},
        "split": "dev",
        "num_samples": 5774,
        "seq_len": 512,
        "max_question_tokens": 96,
        "stride": 128,
        "max_answer_tokens": 31,
        "num_best": 19,
        "prepend_bos": True,
        "dtype": "bfloat16",
    }
    environment = {"device": "cpu", "batch_size": 8, "versions": {"torch": "2.13.0"}}
    return Measurement("korquad", {"exact_match": f1 / 2, "f1": f1}, {**known, **protocol}, environment)


def make_tuned() -> EvaluationResults:
    """Everything before and after tuning, dense and sparse."""
    results, after = make_results(), make_results()
    for part, change in (("sparse", 1.0), ("dense", 1.25)):
        rows = getattr(results, part)
        for row in getattr(after, part):
            row.protocol["tuning"] = dict(TUNING)
        rows += [nsmc(n, 0.5 * change) for n in (1, 2)] + [korquad(60 * change)]
        rows += [*getattr(after, part), nsmc(1, 0.6 * change, tuning=TUNING), nsmc(2, 0.6, tuning=TUNING)]
        rows += [korquad(64 * change, tuning=TUNING)]
    return results


def make_results(**protocol: Any) -> EvaluationResults:
    """Perplexity and all tasks, dense and sparse; `protocol` is of the sparse tasks alone."""
    return EvaluationResults(
        "0123",
        sparse=[perplexity(), *(kobest(task, **protocol) for task in KOBEST_TASKS)],
        dense=[perplexity(10.0, 1.0), *(kobest(task, 0.625, 0.6) for task in KOBEST_TASKS)],
        dense_model="EleutherAI/polyglot-ko-1.3b",
        dense_revision=COMMIT,
    )


def make_report(method: str = "wanda", pattern: str = "2:4", **more: Any) -> SparsityReport:
    """Pruned so; `more` are settings where they have the names of some, otherwise of the calibration."""
    data = {"dataset": "kowiki", "form": "crops", "num_samples": 1024, "seq_len": 2048, "seed": 7}
    names = ("self_attn.q_proj", "mlp.up_proj")
    error = None if method == "magnitude" else 0.125
    names_of_settings = ("allocation", "target_density", "refine", "reconstruct", "batch_size")
    chosen = {name: more.pop(name) for name in names_of_settings if name in more}
    return SparsityReport(
        config={"method": method, "pattern": pattern, **chosen},
        calibration={}
        if method == "magnitude"
        else {**data, "begins_with_bos": True, "bos_in_statistics": False} | more,
        layers=[
            LayerReport(f"layers.{i}.{name}", (64, 32), pattern, 1024, 4096, 2304, error, 0.5)
            for i in range(3)
            for name in names
        ],
        skipped={"layers.0.mlp.down_proj": "in modules_to_not_convert"},
        base_model="EleutherAI/polyglot-ko-1.3b",
        base_revision=COMMIT,
        num_parameters=1_331_810_304,
        versions={"torch": "2.12.1", "transformers": "5.20.0"},
    )


def make_subject(report: Any = "default", results: Any = "default", **more: Any) -> CardSubject:
    """A packed model, pruned from one on the Hub, with report, results and figures."""
    report = make_report() if isinstance(report, str) else report
    results = make_results() if isinstance(results, str) else results
    base = more.get("base_model", "EleutherAI/polyglot-ko-1.3b")
    adapter, name = more.get("adapter"), more.pop("name", "polyglot-2of4")
    metadata = build_metadata(
        report,
        results,
        name=name,
        base_model=base,
        inherited=more.pop("inherited", {"license": "apache-2.0", "language": ["ko"]}),
        is_adapter=adapter is not None,
        tags=more.pop("tags", None),
    )
    known = {
        "storage": "packed",
        "dtype": "bfloat16",
        "file_bytes": 1_862_345_678,
        "repo_id": "user/polyglot-2of4",
        "base_model": base,
        "base_name": base,
        "base_revision": COMMIT if base else None,
        "figures": {ERROR_FIGURE: report is not None and adapter is None, RESULTS_FIGURE: results is not None},
    }
    return CardSubject(name=name, report=report, results=results, metadata=metadata, **{**known, **more})  # type: ignore[arg-type]


def make_adapter(**more: Any) -> CardSubject:
    facts = AdapterFacts("LORA", {"r": 8, "lora_alpha": 16, "target_modules": "q_proj, v_proj"}, 123_456)
    return make_subject(
        **{"adapter": facts, "base_model": "user/polyglot-2of4", "repo_id": "user/polyglot-lora", **more}
    )


UNFAIR = {"limit": 50, "num_samples": 50}
SUBJECTS: dict[str, Callable[[], CardSubject]] = {
    "full": make_subject,
    "no report": lambda: make_subject(report=None),
    "no results": lambda: make_subject(results=None),
    "neither": lambda: make_subject(None, None, base_model=None, repo_id=None),
    "magnitude": lambda: make_subject(make_report("magnitude")),
    "unstructured": lambda: make_subject(make_report("sparsegpt", "50%")),
    "4:8": lambda: make_subject(make_report(pattern="4:8", begins_with_bos=False)),
    "file": lambda: make_subject(make_report(dataset={"file": "text.txt", "sha256": "00"})),
    "texts": lambda: make_subject(make_report(dataset={"texts": 2, "sha256": "00"})),
    "token ids": lambda: make_subject(make_report(dataset={"token_ids": [2, 8], "sha256": "00"})),
    "dataset": lambda: make_subject(make_report(dataset={"dataset": "Dataset", "rows": 2, "fingerprint": "00"})),
    "dense storage": lambda: make_subject(storage="dense"),
    "dense branch": lambda: make_subject(dense_revision="dense"),
    "on the dense branch": lambda: make_subject(storage="dense", dense_revision="dense"),
    "local base": lambda: make_subject(base_model=None, base_name="my base", repo_id=None),
    "limited": lambda: make_subject(results=make_results(**UNFAIR)),
    "sparse alone": lambda: make_subject(results=EvaluationResults("0", [perplexity(stride=512), kobest("wic")])),
    "perplexity alone": lambda: make_subject(results=EvaluationResults("0", [perplexity()], [perplexity(9.0)])),
    "local texts": lambda: make_subject(
        results=EvaluationResults("0", [perplexity(texts={"file": "a.txt", "sha256": "00"})])
    ),
    "shots": lambda: make_subject(
        results=EvaluationResults("0", [kobest(t, num_fewshot=n) for t in KOBEST_TASKS for n in (0, 5)])
    ),
    "tuned": lambda: make_subject(results=make_tuned()),
    "nsmc alone": lambda: make_subject(results=EvaluationResults("0", [nsmc(greedy_note="both begin alike")])),
    "adapter": make_adapter,
    "blocks of weights": lambda: make_subject(make_report("admm", "50%/32x32", refine=["exact", "swaps"])),
    "adapter without figures": lambda: make_adapter(report=None, results=None, base_model=None, base_name="folder"),
}


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def word(text: str, language: str) -> str:
    return text if language == "en" else WORDS[text]


def front(card: str) -> dict[str, Any]:
    match = REGEX_YAML_BLOCK.match(card)
    assert match is not None
    return yaml.safe_load(match[2])


def body(card: str) -> str:
    return REGEX_YAML_BLOCK.sub("", card, count=1)


def section(card: str, title: str, language: str) -> str:
    """The text under a heading, to the next one of any level."""
    found = re.search(
        rf"^#+ {re.escape(title if language == 'en' else TITLES[title])}$(.*?)(?=^#|\Z)", card, re.M | re.S
    )
    assert found is not None, title
    return found[1]


def tables(card: str) -> list[list[list[str]]]:
    """Tables of rows of cells, as plain text."""
    found: list[list[list[str]]] = []
    for token in MARKDOWN.parse(body(card)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif token.type == "inline" and found and token.level > 3:
            found[-1][-1][-1] = "".join(part.content for part in token.children or [])
    return found


def results_of(card: str) -> dict[tuple[str, str], list[str]]:
    """(task, metric) → dense, sparse, recovered."""
    return {(row[0], row[1].rstrip(" ↑↓")): row[2:] for row in tables(card)[0][1:]}


# --- Values that would break out -------------------------------------------------------------------------------------

# What the escaping may add, none of which is seen: zero width space, word joiner, directional isolates.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\u2066\u2067\u2068\u2069"))
HARMLESS = "harmless value"
RLO, LRI = "\u202e", "\u2066"
NASTY = [
    "# heading", "## ", "> quote", "- item", "+ item", "* item", "- [ ] task", "1. one", "12) twelve", "1.", "-",
    "--", "---", "***", "___", "===", "a\n===\nb", "a\n---\nb", "a\n---", "---\nlicense: mit\n---\n# other card",
    "--- #", "a\r\n---\r\nb", "...", "a: b", "key: [1, {b: c}]", "!!python/object/apply:os.system ['id']",
    "&anchor *alias", "%TAG ! x", "'quoted' \"double\"", "yes", "null", "~", "1e3", "0x10", "2024-01-01", "|",
    "||| a | b |", "a | b\n|---|---|\n| c | d |", "\\|", "\\", "a\\", "\\\\`", "`", "``` \ncode\n```", "```python",
    "~~~", "~~gone~~", "`a` ``b``", "    indented code", "\tindented code", "*a* **b** _c_ __d__",
    "snake_case_name and __init__", "<script>alert(1)</script>", "</td></tr></table>", "<td>", "<!-- comment", "-->",
    END, BEGIN, f"{END}\n\nfree text\n\n{BEGIN}", "<br>", "<https://evil.example>", "<a@b.example>",
    "<![CDATA[ x ]]>", "<?php ?>", "&lt;b&gt; &amp; &#42; &nbsp;", "[text](https://evil.example)",
    "[text][ref]\n\n[ref]: https://evil.example", "[ref]: https://evil.example",
    "![image](https://evil.example/x.png)", "![", "](x)", "[^1]", "[x](javascript:alert(1))",
    "https://evil.example/a?b=c&d=e_f_g", "www.evil.example", "someone@evil.example", "@user #1 :smile:",
    "$x^2$ $$y$$", "\\(x\\) \\[y\\]", "${{7*7}}", "{{ 7 * 7 }}", "{{ jinja }} {% raw %} {# comment #}",
    "{% endraw %}{% include 'base.md.jinja' %}", "word " * 400, "x" * 5000, "`" * 199 + "a", "\\" * 250, "العربية",
    "עברית (1) | a", f"a{RLO}b{LRI}c", "مرحبا" + RLO, "\0", "a\0b", "\x1b[31mred\x07\x7f\x85\x9f", "\ud800",
    "a\udfff\ud83db", "🙂 👩\u200d👧", "\x85", "a\x85b", "\ufeffbom", "\ufffe\uffff", "a\u2028b\u2029c\x0bd\x0ce",
    "\u200b", "한글 값", "\n\n\n", " ", "C:\\Users\\name", "../../etc/passwd", "=cmd|' /C calc'!A0",
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
        perplexity(texts=texts, dtype=value),
        kobest("copa", split=value, task_version=value, data={"name": value}, dtype=value),
        kobest("wic", limit=3, data={"files_sha256": value}),
    ]
    named = {"name": value, "dataset": value, "configuration": value, "slice": value, "sha256": value}
    sparse += [
        nsmc(split=value, data={"name": value}, items_sha256=value, dtype=value, prompt=value, greedy_note=value),
        korquad(split=value, data={"name": value, "sha256": value}, dtype=value, tuning={"task": value, value: value}),
    ]
    dense = [perplexity(9.0, texts=named), kobest("copa"), kobest("wic")]
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
    facts = AdapterFacts(value, {value: value, "r": value}, 12) if adapter else None
    more = {"base_model": None, "base_name": value, "tags": [value, "mine"], "dtype": value, "adapter": facts}
    more["inherited"] = {"license": value, "license_name": value, "license_link": value, "language": [value, "ko"]}
    return make_subject(report, results, name=value, **more)


def structure(card: str) -> tuple[list[Any], str]:
    """What Markdown makes of a card: everything that is not plain text, and the plain text."""
    parts: list[Any] = []
    text: list[str] = []
    for token in MARKDOWN.parse(body(card)):
        for part in token.children if token.type == "inline" else [token]:
            if part.type == "text" or part.type == "code_inline":  # both are text; a code span where it is harmless
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
    assert front(card) == subject.metadata.to_dict()
    assert render_card(subject, language, existing=card) == card


@pytest.mark.parametrize(("value", "language"), list(zip(NASTY, cycle(LANGUAGES))))
def test_a_nasty_value_is_plain_text(value: str, language: str) -> None:
    check_contained(value, language, False)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("adapter", [False, True])
@settings(max_examples=40)
@given(value=values)
def test_any_value_is_plain_text(value: str, language: str, adapter: bool) -> None:
    check_contained(value, language, adapter)


# As remark-gfm (and cmark-gfm for addresses) looks for them: in the text, after character references are read.
BARE_LINK = re.compile(r"(?i)https?://[-.\w]|(?<!\w)www\.[-.\w]|[-.\w+]+@[-\w]+\.[-\w]")


@pytest.mark.parametrize(
    "value",
    ["see https://evil.example/x", "HTTP://evil.example", "www.evil.example", "WWW.Evil.example", "a@b.example"],
)
def test_a_bare_address_does_not_become_a_link(value: str, language: str) -> None:
    for token in MARKDOWN.parse(body(render_card(filled(f"{value} ."), language))):
        text = "".join(part.content if part.type == "text" else " " for part in token.children or [])
        assert not BARE_LINK.search(text.translate({0x2060: " ", 0x200B: " "})), text


@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value)[:30])
def test_what_is_linked_as_a_repository_can_be_one(value: str) -> None:
    if is_repo_id(value):
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value, re.ASCII)
    assert not is_repo_id(f"user/{value}\n")


# --- Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_metadata_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    card = render_card(subject)
    assert front(card) == subject.metadata.to_dict()
    if name != "tuned":  # the client puts what is before tuning and after it under one task when it writes
        assert ModelCard(card).data.to_dict() == subject.metadata.to_dict()
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert metadata_load(tmp_path / "README.md") == subject.metadata.to_dict()


json_values = st.recursive(
    values | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(values, inner, max_size=3),
    max_leaves=3,
)


@settings(max_examples=60)
@given(texts=st.lists(values, min_size=5, max_size=5), person=st.dictionaries(values, json_values, max_size=3))
def test_any_metadata_come_back_as_they_were(texts: list[str], person: dict[str, Any]) -> None:
    name, tag, license_name, sha256, language = texts
    subject = make_subject(
        results=EvaluationResults("0", [perplexity(texts={"file": "a", "sha256": sha256}, dtype=tag)]),
        name=name,
        tags=[tag, tag],
        inherited={"license": license_name, "language": [language]},
    )
    ours = subject.metadata.to_dict()
    card = render_card(subject)
    assert front(card) == ours
    assert ModelCard(card).data.to_dict() == ours
    existing = f"---\n{yaml.safe_dump(person)}---\nMine.\n"
    merged = front(render_card(subject, existing=existing))
    assert merged == merge_metadata(person, ours)
    assert {key: merged[key] for key in person if key not in ours} == {
        k: v for k, v in person.items() if k not in ours
    }


def test_metadata_of_a_full_card() -> None:
    found = front(render_card(make_subject(tags=["mine", "sparse"])))
    model_index = found.pop("model-index")
    assert found == {
        "language": ["ko"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "EleutherAI/polyglot-ko-1.3b",
        "base_model_relation": "quantized",
        "datasets": ["wikimedia/wikipedia"],
        "metrics": ["perplexity", "accuracy", "f1"],
        "tags": ["optimum-ksparse", "sparse", "pruned", "wanda", "2of4", "mine"],
    }
    assert model_index[0]["name"] == "polyglot-2of4"


def test_the_model_index_equals_the_results() -> None:
    results = make_results()
    name, rows = model_index_to_eval_results(front(render_card(make_subject(results=results)))["model-index"])
    found = {(row.dataset_config, row.metric_type): row.metric_value for row in rows}
    expected: dict[tuple[str, str], float] = {("20231101.ko", "perplexity"): 12.5}
    for row in results.sparse[1:]:
        expected |= {(row.name, "accuracy"): row.metrics["acc"], (row.name, "f1"): row.metrics["f1"]}
    assert (name, found) == ("polyglot-2of4", expected)
    assert {row.dataset_type for row in rows} == {"wikimedia/wikipedia", "skt/kobest_v1"}
    assert {row.dataset_split for row in rows} == {None, "test"}
    assert all(row.metric_args["num_samples"] == 1000 for row in rows if row.metric_type != "perplexity")


def test_the_model_index_has_each_number_of_shots_and_its_limit() -> None:
    rows = [kobest("copa", 0.5), kobest("copa", 0.75, num_fewshot=5, limit=50)]
    _, found = model_index_to_eval_results(
        front(render_card(make_subject(results=EvaluationResults("0", rows))))["model-index"]
    )
    accuracies = [(row.metric_value, row.metric_args) for row in found if row.metric_type == "accuracy"]
    assert [value for value, _ in accuracies] == [0.5, 0.75]
    assert [(args["num_fewshot"], args.get("limit")) for _, args in accuracies] == [(0, None), (5, 50)]


def test_the_model_index_tells_before_tuning_from_after_it() -> None:
    found = front(render_card(make_subject(results=make_tuned())))
    assert found["metrics"] == ["perplexity", "accuracy", "f1", "exact_match"]
    entries = {
        (entry["dataset"]["type"], entry["task"].get("name")): {
            metric.get("name", metric["type"]): metric["value"] for metric in entry["metrics"]
        }
        for entry in found["model-index"][0]["results"]
    }
    asked, classed = "question answering, after KoAlpaca tuning", "text classification, after KoAlpaca tuning"
    assert entries["KorQuAD/squad_kor_v1", None] == {"exact_match": 30.0, "f1": 60.0}
    assert entries["KorQuAD/squad_kor_v1", asked] == {"exact_match": 32.0, "f1": 64.0}
    assert entries["e9t/nsmc", None] == {"accuracy, prompt 1": 0.5, "accuracy, prompt 2": 0.5}
    assert entries["e9t/nsmc", classed] == {"accuracy, prompt 1": 0.6, "accuracy, prompt 2": 0.6}


def test_a_perplexity_beyond_floats_is_not_in_the_model_index() -> None:
    assert "model-index" not in front(render_card(make_subject(results=EvaluationResults("0", [perplexity(None)]))))


def test_the_model_index_does_not_take_local_files_for_the_dataset_on_the_hub() -> None:
    results = EvaluationResults("0", [kobest(data={"files_sha256": "00ff"})])
    result = front(render_card(make_subject(results=results)))["model-index"][0]["results"][0]
    assert result["dataset"]["type"] != "skt/kobest_v1" or "00ff" in str(result)


@pytest.mark.parametrize(
    ("dataset", "repository", "language"),
    [
        ("kowiki", ["wikimedia/wikipedia"], "ko"),
        ("mc4-ko", ["allenai/c4"], "ko"),
        ("c4", ["allenai/c4"], None),
        ("self", None, None),
        ({"file": "a.txt", "sha256": "00"}, None, None),
        ({"texts": 2, "sha256": "00"}, None, None),
    ],
)
def test_metadata_of_calibration_data(dataset: Any, repository: Any, language: str | None) -> None:
    found = front(render_card(make_subject(make_report(dataset=dataset), inherited={})))
    assert (found.get("datasets"), found.get("language")) == (repository, language)
    assert "license" not in found


@pytest.mark.parametrize(
    ("method", "pattern", "tags"),
    [("sparsegpt", "4:8", ["sparsegpt", "4of8"]), ("magnitude", "62.5%", ["magnitude", "unstructured"])],
)
def test_tags_say_method_and_pattern(method: str, pattern: str, tags: list[str]) -> None:
    assert front(render_card(make_subject(make_report(method, pattern))))["tags"][3:] == tags


def test_metadata_of_an_adapter() -> None:
    found = front(render_card(make_adapter()))
    assert (found["library_name"], found["base_model"], found["base_model_relation"]) == (
        "peft",
        "user/polyglot-2of4",
        "adapter",
    )


# --- What the card says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_both_languages_have_the_same_structure(name: str) -> None:
    subject = SUBJECTS[name]()
    cards = {language: render_card(subject, language) for language in LANGUAGES}
    blocks = {
        language: [
            (token.type, token.tag, token.info, sorted(token.attrs.items()))
            for token in MARKDOWN.parse(body(card))
            if token.type != "inline"
        ]
        for language, card in cards.items()
    }
    assert blocks["en"] == blocks["ko"]
    shapes = {language: [[len(row) for row in table] for table in tables(card)] for language, card in cards.items()}
    assert shapes["en"] == shapes["ko"]
    links = {language: re.findall(r"\]\((.*?)\)|<(http.*?)>", card) for language, card in cards.items()}
    assert sorted(links["en"]) == sorted(links["ko"])
    assert all(len(set(row)) == 1 for row in shapes["en"])
    assert not re.search("[가-힣]", cards["en"])
    for card in cards.values():
        assert not re.search(r"\b(None|nan|Undefined)\b|\{\{|\{%", card)
        assert card == render_card(subject, "en" if card is cards["en"] else "ko", existing=card)


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_section_is_empty(name: str, language: str) -> None:
    card = render_card(SUBJECTS[name](), language)
    assert not re.findall(r"^#+ (.*)\n\s*(?=## |\Z)", card, re.M)


def test_unknown_figures_are_as_good_as_none() -> None:
    """`CardSubject.figures` has a default."""
    subject = make_subject()
    subject.figures = {}
    assert "![" not in render_card(subject)


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        ("wanda", ("each output row", "출력 행마다")),
        ("sparsegpt", ("each block of columns", "열 블록마다")),
        ("admm", ("each output row", "출력 행마다")),
        ("alps", ("whole layer", "층 전체")),
        ("magnitude", ("whole layer", "층 전체")),
    ],
)
def test_an_unstructured_pattern_names_its_scope(method: str, scope: tuple[str, str], language: str) -> None:
    expected = scope[LANGUAGES.index(language)]
    assert expected in section(
        render_card(make_subject(make_report(method, "50%")), language), "What was pruned", language
    )
    structured = render_card(make_subject(make_report(method, "4:8")), language)
    assert expected not in section(structured, "What was pruned", language)


def test_blocks_of_weights_are_named(language: str) -> None:
    for method, scope in (("wanda", ("whole layer", "층 전체")), ("sparsegpt", ("block of columns", "열 블록마다"))):
        card = render_card(make_subject(make_report(method, "50%/32x16")), language)
        text = section(card, "What was pruned", language)
        assert scope[LANGUAGES.index(language)] in text and "32" in text and "16" in text
        assert front(card)["tags"][3:] == [method, "blocks-32x16"]


def test_a_korean_card_has_no_english_reason_for_layers_that_the_allocation_left_dense() -> None:
    report = make_report(allocation="owl", target_density=0.6)
    report.skipped["layers.1.mlp.down_proj"] = LEFT_DENSE
    assert "`layers.1.mlp.down_proj`: target\\_density에 따라 그대로 둠" in render_card(make_subject(report), "ko")


@pytest.mark.parametrize(
    ("dataset", "facts"),
    [
        ("kowiki", ["`kowiki`"]),
        ("self", ["`self`"]),
        ({"file": "my text.txt", "sha256": "5ba256"}, ["my text.txt", "5ba256"]),
        ({"texts": 9, "sha256": "5ba256"}, ["5ba256"]),
        ({"token_ids": [9, 8], "sha256": "5ba256"}, ["5ba256"]),
        ({"dataset": "Dataset", "rows": 9, "fingerprint": "f1"}, []),
    ],
)
def test_calibration(dataset: Any, facts: list[str], language: str) -> None:
    text = section(render_card(make_subject(make_report(dataset=dataset)), language), "Calibration", language)
    for fact in (*facts, "1,024", "2,048", "crops", "7"):
        assert fact in text, fact


def test_results_are_dense_sparse_and_recovered(language: str) -> None:
    card = render_card(make_subject(), language)
    rows = list(results_of(card).values())
    assert len(rows) == 2 + 2 * 5 + 1
    assert rows[:2] == [["10.00", "12.50", "80.0%"], ["1.0000", "1.2500", "80.0%"]]
    for i, task in enumerate(KOBEST_TASKS):
        accuracy, f1 = rows[2 + 2 * i : 4 + 2 * i]
        assert accuracy == [f"0.6250 ± {ERRORS[task]:.4f}", f"0.5000 ± {ERRORS[task]:.4f}", "80.0%"]
        assert f1 == ["0.6000", "0.4500", "75.0%"]
    assert rows[-1] == ["0.6000", "0.4500", "75.0%"]
    text = section(card, "Results", language)
    assert "EleutherAI/polyglot-ko-1.3b" in text and COMMIT in text and f"({RESULTS_FIGURE})" in text
    assert "(evaluation_results.json)" in card


def test_the_exact_protocol(language: str) -> None:
    results = make_results(num_fewshot=5, limit=77, num_samples=70, split="validation", task_version=2.5)
    card = render_card(make_subject(results=results), language)
    text = section(card, "Protocol", language)
    for fact in (
        "kowiki",
        "wikimedia/wikipedia",
        "20231101.ko",
        "first 256",
        "5ba1",
        "37",
        "2,048",
        "75,739",
        "312,345",
    ):
        assert fact in text, fact
    assert "lm-evaluation-harness 0.4.13" in text
    _, *rows = next(table for table in tables(card) if len(table[0]) == 9)
    assert [row[0] for row in rows] == ["COPA", "HellaSwag", "BoolQ", "SentiNeg", "WiC"]
    assert all(row[1:7] == ["2.5", "5", "70", "validation", "77", "skt/kobest_v1"] for row in rows)
    assert all(row[8] == "bfloat16" for row in rows)


PROTOCOLS: list[tuple[str, Any]] = [
    ("texts", {"file": "a.txt", "sha256": "00"}),
    ("seq_len", 1024),
    ("stride", 512),
    ("max_tokens", 75739),
    ("num_windows", 38),
    ("num_tokens", 75740),
    ("num_bytes", 1),
    ("prepend_bos", True),
    ("dtype", "float32"),
    ("task_version", 2.0),
    ("num_fewshot", 1),
    ("limit", 1000),
    ("data", {"files_sha256": "00"}),
    ("split", "validation"),
    ("num_samples", 999),
]


@pytest.mark.parametrize(("field", "value"), PROTOCOLS, ids=[field for field, _ in PROTOCOLS])
def test_the_protocol_shows_each_of_its_parts(field: str, value: Any, language: str) -> None:
    make: Callable[..., Measurement] = kobest if field in kobest().protocol and field != "prepend_bos" else perplexity
    cards = [
        section(render_card(make_subject(results=EvaluationResults("0", [row])), language), "Protocol", language)
        for row in (make(), make(**{field: value}))
    ]
    assert cards[0] != cards[1]


@pytest.mark.parametrize("make", [nsmc, korquad])
def test_the_protocol_shows_each_part_of_the_other_kinds(make: Callable[..., Measurement], language: str) -> None:
    text = section(render_card(make_subject(results=EvaluationResults("0", [make()])), language), "Protocol", language)
    for field, value in make().protocol.items():
        if value is None:
            continue
        other: Any = {str: "0therwise", int: 17, bool: False, list: [1], dict: {"name": "0therwise"}}[type(value)]
        row = make(**{field: other})
        card = render_card(make_subject(results=EvaluationResults("0", [row])), language)
        assert section(card, "Protocol", language) != text, field


def test_results_before_and_after_tuning(language: str) -> None:
    card = render_card(make_subject(results=make_tuned()), language)
    after = ("{}, after KoAlpaca tuning", "{}, KoAlpaca 튜닝 후")[LANGUAGES.index(language)]
    prompt = ("NSMC, prompt 1", "NSMC, 프롬프트 1")[LANGUAGES.index(language)]
    rows = tables(card)[0][1:]
    found = {row[0]: row[2:] for row in reversed(rows)}  # of each task the first metric
    assert found[prompt] == ["0.6250 ± 0.0224", "0.5000 ± 0.0224", "80.0%"]
    assert found[after.format(prompt)] == ["0.7500 ± 0.0224", "0.6000 ± 0.0224", "80.0%"]
    assert found["KorQuAD"] == ["37.50", "30.00", "80.0%"]
    assert found[after.format("KorQuAD")] == ["40.00", "32.00", "80.0%"]
    assert found[after.format("KoBEST COPA")][1:] == found["KoBEST COPA"][1:]
    assert len(rows) == 2 * 13 + 2 * 2 * 3
    text = section(card, "Protocol", language)
    for fact in ("`method` LORA", "`r` 8", "`steps` 300", "c0de", "fade", "1234", "5,774", "96", "512", "128"):
        assert fact in text, fact
    plain = render_card(make_subject(), language)
    assert "NSMC" not in plain and "KorQuAD" not in plain and "KoAlpaca" not in plain


def test_a_dense_model_tuned_otherwise_is_not_comparable(language: str) -> None:
    results = EvaluationResults("0", [korquad(tuning=TUNING)], [korquad(tuning={**TUNING, "steps": 9})])
    row = tables(render_card(make_subject(results=results), language))[0][-1]
    words = word("not comparable", language)
    assert f"({words}: tuning)" in row[2] and row[4] == words


def test_a_perplexity_beyond_floats_was_evaluated(language: str) -> None:
    results = EvaluationResults("0", [perplexity(None, 2000.0)], [perplexity(10.0, 1.0)])
    row = next(iter(results_of(render_card(make_subject(results=results), language)).values()))
    assert row[0] == "10.00"
    assert row[1] != word("not evaluated", language)
    assert row[2] != word("not evaluated", language)


def test_figures_by_other_protocols_are_not_comparable(language: str) -> None:
    results = make_results(**UNFAIR, num_fewshot=5)
    rows = list(results_of(render_card(make_subject(results=results), language)).values())
    words = word("not comparable", language)
    assert rows[0][2] == "80.0%"
    for dense, _, recovered in rows[2:12]:
        assert f"({words}: num_fewshot, limit, num_samples)" in dense
        assert recovered == words


def test_the_mean_of_figures_by_other_protocols_is_not_comparable(language: str) -> None:
    row = list(results_of(render_card(make_subject(results=make_results(**UNFAIR)), language)).values())[-1]
    assert row[1] == "0.4500"
    assert word("not evaluated", language) not in (row[0], row[2])
    assert word("not comparable", language) in row[2]


def test_each_number_of_shots_has_its_rows(language: str) -> None:
    results = EvaluationResults(
        "0",
        [kobest(t, f1=0.3 + n / 100, num_fewshot=n) for t in KOBEST_TASKS for n in (0, 5)],
        [kobest(t, f1=0.6, num_fewshot=n) for t in KOBEST_TASKS for n in (0, 5)],
    )
    rows = results_of(render_card(make_subject(results=results), language))
    found = {title: row for (title, metric), row in rows.items() if "F1" in metric and "COPA" in title}
    assert {title.endswith("5-shot"): row for title, row in found.items() if title.startswith("KoBEST COPA")} == {
        False: ["0.6000", "0.3000", "50.0%"],
        True: ["0.6000", "0.3500", "58.3%"],
    }
    assert sum(title.startswith("KoBEST ") and "(COPA" in title for title in found) == 2


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "neither"])
def test_code_in_a_card_is_python(name: str, language: str) -> None:
    text = render_card(SUBJECTS[name](), language)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")


def test_where_it_is_faster_and_where_not(language: str) -> None:
    title = "Where it is smaller, and where it is faster"
    cards = {
        p: section(render_card(make_subject(make_report(pattern=p)), language), title, language)
        for p in ("2:4", "4:8", "50%")
    }
    for text in cards.values():
        assert "1,862,345,678" in text and "bfloat16" in text and "0.5625" in text
    for pattern, text in cards.items():
        has_kernels = pattern != "50%"
        assert ("Ampere" in text and "1.78" in text) == has_kernels
        assert (("not faster", "빨라지지 않습니다")[LANGUAGES.index(language)] in text) != has_kernels
        assert (("No speed was measured", "측정하지 않았습니다")[LANGUAGES.index(language)] in text) == has_kernels


@pytest.mark.parametrize(("pattern", "has_strips"), [("50%/32x16", True), ("50%/16x32", False)])
def test_high_blocks_are_computed_from_packed_weights_on_a_cpu(pattern: str, has_strips: bool, language: str) -> None:
    title = "Where it is smaller, and where it is faster"
    text = section(render_card(make_subject(make_report(pattern=pattern)), language), title, language)
    assert (("On a CPU up to 16 tokens", "CPU에서는 16토큰까지")[LANGUAGES.index(language)] in text) == has_strips
    assert (("on every device", "모든 장치에서")[LANGUAGES.index(language)] in text) != has_strips
    assert "2:4" in text


def test_every_environment_is_told() -> None:
    rows = [perplexity(), kobest("copa"), kobest("wic")]
    rows[2].environment = {"device": "cpu", "batch_size": 1, "versions": {"torch": "2.14.0", "lm-eval": "0.4.13"}}
    text = section(render_card(make_subject(results=EvaluationResults("0", rows)), "en"), "Software", "en")
    assert text.count("Measured on") == 3
    assert "2.13.0" in text and "2.14.0" in text


def bibtex(card: str) -> dict[str, dict[str, str]]:
    """key → field → value, read strictly: every value in braces that are no escapes."""
    code = re.search(r"```bibtex\n(.*?)```", card, re.DOTALL)
    assert code is not None
    entries: dict[str, dict[str, str]] = {}
    for key, fields in re.findall(r"@misc\{(\w+),\n(.*?)\n\}", code[1], re.DOTALL):
        lines = [re.fullmatch(r"  (\w+) *= \{([^{}\\]*)\},?", line) for line in fields.split("\n")]
        assert all(lines), fields
        entries[key] = {line[1]: line[2] for line in lines if line}
    assert len(entries) == code[1].count("@misc")
    return entries


def make_changed() -> CardSubject:
    """Of a model that was trained and merged after pruning, by every step that a card tells of."""
    report = make_report("auto", refine=["swaps", "exact"], allocation="owl", target_density=0.6)
    report.choice = MethodChoice("admm", "block", 1, 60.0, [Trial("admm", "block", 0.2, 30.0, True)] * 3)
    report.reconstruction = [BlockReport(0, 0.5, 0.25, 1.0)]
    trained = Change("trained", "SFTTrainer", "beomi/KoAlpaca-v1.1a", 300, 1.5)
    report.changes = [Change("unknown"), trained, Change("merged", "solve", adapters=["LORA"], steps=20)]
    layer = MergedLayer("layers.0.mlp.up_proj", (64, 32), 1024, "solved", 0.25, 0.5, 1.0)
    merge = MergeReport("solve", [{"name": "default", "peft_type": "LORA"}], layers=[layer])
    return make_subject(report, None, merge=merge, tuning={"title": "KoAlpaca", "steps": 300})


GOLDEN = {
    "changed": make_changed,
    "adapter": lambda: make_adapter(results=EvaluationResults("0", [perplexity()])),
    "dense": lambda: make_subject(
        make_report("magnitude", "50%/32x16"), None, storage="dense", dense_revision="zeros"
    ),
    "image": lambda: make_subject(auto_class="AutoModelForImageTextToText", dense_revision="zeros"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_whole_card(name: str, language: str) -> None:
    """Cards to be read: to write them anew delete the file."""
    path = REPOSITORY / f"tests/hub/cards/{name}.{language}.md"
    found = body(render_card(GOLDEN[name](), language))
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def test_a_changed_model_shows_nothing_that_was_measured_before(tmp_path: Path, language: str) -> None:
    subject = make_changed()
    card = render_card(subject, language)
    assert "0.1250" not in card and "0.2500" in card  # the errors of pruning, and those of merging
    assert ERROR_FIGURE not in draw_figures(tmp_path, subject.report, None) or not (tmp_path / ERROR_FIGURE).exists()


CITED: list[tuple[Callable[[], CardSubject], set[str]]] = [
    (make_changed, {"2401.02938", "2512.10922", "2310.05175", "2102.05426"}),
    (lambda: make_subject(make_report("sparsegpt"), None), {"2301.00774"}),
    (lambda: make_subject(make_report("alps"), EvaluationResults("0", [korquad()])), {"2406.07831", "1909.07005"}),
    (lambda: make_subject(make_report("magnitude")), {"1506.02626", "2204.04541"}),
]


@pytest.mark.parametrize(("make", "eprints"), CITED)
def test_what_was_used_is_cited(make: Callable[[], CardSubject], eprints: set[str], language: str) -> None:
    found = bibtex(render_card(make(), language))
    assert {entry["eprint"] for entry in found.values() if "eprint" in entry} == eprints
    assert found["base_model"]["title"] == "EleutherAI/polyglot-ko-1.3b" and COMMIT in found["base_model"]["note"]


def test_nothing_to_cite(language: str) -> None:
    assert "bibtex" not in render_card(make_subject(None, None, base_model=None), language)


def test_what_was_not_measured_has_no_row(language: str) -> None:
    row = nsmc(greedy_note="both answers begin with the same token")
    row.metrics["greedy_accuracy"] = None
    card = render_card(make_subject(results=EvaluationResults("0", [kobest("copa"), row])), language)
    assert [len(line) for line in tables(card)[0]] == [3] * 4  # the heading, accuracy and F1, and accuracy
    results = EvaluationResults("0", [perplexity(), kobest("copa")], [perplexity(10.0), kobest("boolq")], "base")
    rows = list(results_of(render_card(make_subject(results=results), language)).values())
    missing = word("not evaluated", language)
    assert rows[0] == ["10.00", "12.50", "80.0%"] and len(rows) == 6
    assert rows[2][0] == rows[2][2] == missing and rows[4][1:] == [missing] * 2
    assert "optimum-cli ksparse eval" in section(
        render_card(make_subject(results=None), language), "Results", language
    )


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("git+https://example.org/x/y.git@v1", '"optimum-ksparse @ git+https://example.org/x/y.git@v1"'),
        ("optimum-ksparse", "optimum-ksparse"),
        (None, None),
    ],
)
def test_a_card_names_no_package_that_anybody_may_register(
    source: str | None, command: str | None, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(INSTALL_VARIABLE, raising=False)
    if source is not None:
        monkeypatch.setenv(INSTALL_VARIABLE, source)
    for subject in (make_subject(), make_adapter()):
        text = section(render_card(subject, language), "How to load", language)
        found = re.findall(r"^pip install (.*)$", text, re.M)
        if command is None:
            assert not found and "`pip install ." in text.replace('".[finetune]"', ".")
        elif subject.adapter is None:
            assert found == [command]
        else:
            assert "optimum-ksparse[finetune]" in found[0]
    monkeypatch.setenv(INSTALL_VARIABLE, 'x"; rm -rf ~; "')
    with pytest.raises(ValueError, match=INSTALL_VARIABLE):
        render_card(make_subject(), language)


# --- What a person wrote ---------------------------------------------------------------------------------------------

OLD = f"{BEGIN}\n# old\n\nOld text.\n\n{END}"
PERSONS = [
    "Mine.",
    "# My title\n\nText with *markup*, `code`, | tables | and {{ jinja }} {% raw %}.",
    "Two spaces end this line  \nand the next one does not\n\n\n\n\tA tab.",
    "<details>\n<summary>more</summary>\n\n---\n\n</details>",
    "한글 글 🙂 עברית \\1 \\g<0>",
    "```\n---\nlicense: mit\n---\n```",
    "    indented code\n\nand text",
    "# Model Card for something that a person wrote\n\n[More Information Needed]",
]


@pytest.mark.parametrize("text", PERSONS, ids=range(len(PERSONS)))
@pytest.mark.parametrize("form", ["{0}\n", "{0}\n\n{1}\n", "{1}\n\n{0}\n", "{0}\n\n{1}\n{0}\n", "{0}{1}{0}", ""])
@pytest.mark.parametrize("metadata", ["", "---\nlicense: mit\n---\n\n"])
def test_text_around_the_section_stays(text: str, form: str, metadata: str) -> None:
    existing = metadata + form.format(text, OLD)
    subject = make_subject(None, None)
    card = render_card(subject, existing=existing)
    assert len(SECTION.findall(card)) == card.count(BEGIN) == card.count(END) == 1
    assert "Old text." not in card
    if OLD in existing:
        assert [part.strip("\n") for part in SECTION.split(body(card))] == [
            part.strip("\n") for part in form.format(text, "\0").split("\0")
        ]
    else:
        assert SECTION.split(body(card))[0].strip("\n") == form.format(text, "").strip("\n")
    assert render_card(subject, existing=card) == card
    again = render_card(subject, "ko", existing=card)
    assert SECTION.split(body(again)) == SECTION.split(body(card))


DAMAGED = {
    "begin without end": f"A person\n\n{BEGIN}\n# old\n\nB person",
    "end without begin": f"A person\n\n# old\n\n{END}\n\nB person",
    "two sections": f"A person\n\n{OLD}\n\nB person\n\n{OLD}\n\nC person",
    "end before begin": f"A person\n\n{END}\n\nB person\n\n{BEGIN}\n\nC person",
    "end, then a section": f"A person\n\n{END}\n\nB person\n\n{OLD}\n\nC person",
    "begin, then a section": f"A person\n\n{BEGIN}\n\nB person\n\n{OLD}\n\nC person",
    "section, then begin": f"A person\n\n{OLD}\n\nB person\n\n{BEGIN}\n\nC person",
    "section, then end": f"A person\n\n{OLD}\n\nB person\n\n{END}\n\nC person",
    "begin twice": f"A person\n\n{BEGIN}\n{BEGIN}\n\nB person",
    "other words": "A person\n\n<!-- optimum-ksparse: begin. -->\n# old\n\nB person",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_markers_lose_no_text(name: str) -> None:
    subject = make_subject()
    card = render_card(subject, existing=DAMAGED[name])
    letters = re.findall(r"^([ABC]) person$", card, re.M)
    assert letters == re.findall(r"^([ABC]) person$", DAMAGED[name], re.M)
    assert len(SECTION.findall(card)) == card.count(f"{BEGIN}\n# polyglot-2of4") == 1
    assert render_card(subject, existing=card) == card


@settings(max_examples=60)
@given(
    parts=st.lists(st.sampled_from([BEGIN, END, OLD, "A person", "B person", "C person", "---", " text "]), max_size=8)
)
def test_any_existing_card_keeps_what_is_outside_of_sections(parts: list[str]) -> None:
    subject = make_subject(None, None)
    existing = "\n\n".join(["start", *parts])
    card = render_card(subject, existing=existing)
    assert len(SECTION.findall(card)) == 1
    assert render_card(subject, existing=card) == card
    outside = re.sub(
        rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", "", existing, flags=re.DOTALL
    )
    kept = re.findall(r"^[ABC] person$", outside, re.M)
    found = re.findall(r"^[ABC] person$", card, re.M)
    assert all(found.count(line) >= kept.count(line) for line in kept)


PERSON_METADATA = """\
---
license: cc-by-4.0
language:
- en
- ko
my_key: {a: [1, 2.5, true, null], b: 2024-01-02}
tags: [mine, sparse]
metrics: wer
datasets: []
thumbnail: 'https://example.org/a.png'
base_model: someone/else
base_model_relation: merge
library_name: other
pipeline_tag: text2text-generation
model-index: [{name: stale, results: []}]
---
"""


def test_metadata_of_a_person_stay_and_facts_are_replaced() -> None:
    found = front(render_card(make_subject(), existing=PERSON_METADATA))
    theirs = yaml.safe_load(PERSON_METADATA.strip("-\n"))
    for key in ("license", "language", "my_key", "thumbnail", "pipeline_tag"):
        assert found[key] == theirs[key]
    assert found["tags"] == ["mine", "sparse", "optimum-ksparse", "pruned", "wanda", "2of4"]
    assert found["metrics"] == ["wer", "perplexity", "accuracy", "f1"]
    assert found["datasets"] == ["wikimedia/wikipedia"]
    assert found["base_model"] == "EleutherAI/polyglot-ko-1.3b"
    assert (found["base_model_relation"], found["library_name"]) == ("quantized", "transformers")
    assert found["model-index"][0]["name"] == "polyglot-2of4"


def test_a_person_names_the_base_where_ours_is_unknown() -> None:
    found = front(render_card(make_subject(base_model=None, base_name="folder"), existing=PERSON_METADATA))
    assert (found["base_model"], found["base_model_relation"]) == ("someone/else", "merge")


@pytest.mark.parametrize("key", ["tags", "datasets", "metrics", "license", "language", "pipeline_tag"])
def test_an_empty_key_of_a_form_is_filled_in(key: str) -> None:
    assert front(render_card(make_subject(), existing=f"---\n{key}:\n---\nMine.\n"))[key]


def test_a_model_index_of_figures_that_are_gone_goes() -> None:
    """Pruned anew and not measured yet: the earlier push's figures are of other weights."""
    earlier = render_card(make_subject())
    assert "model-index" not in front(render_card(make_subject(results=None), existing=earlier))


def test_metrics_of_a_person_stay_when_ours_go() -> None:
    earlier = render_card(make_subject()).replace("\nmetrics:\n", "\nmetrics:\n- wer\n", 1)
    assert front(render_card(make_subject(), existing=earlier))["metrics"] == ["wer", "perplexity", "accuracy", "f1"]
    assert front(render_card(make_subject(results=None), existing=earlier))["metrics"] == ["wer"]


def test_tags_of_an_earlier_push_go() -> None:
    """Pruned anew by another method to another pattern."""
    tags = front(render_card(make_subject(make_report("sparsegpt", "50%")), existing=render_card(make_subject())))[
        "tags"
    ]
    assert {"sparsegpt", "unstructured"} <= set(tags)
    assert not {"wanda", "2of4"} & set(tags)


@pytest.mark.parametrize(
    "text", ["license: [", "a: b: c", "- a\n- b", "text", "!!python/name:os.system x", "\tx: 1", "? [a]\n: &b *c"]
)
def test_damaged_metadata_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="metadata of the README.md that is there"):
        render_card(make_subject(), existing=f"---\n{text}\n---\nMine.\n")


@pytest.mark.parametrize("tail", ["Mine.\nMore.", f"Mine.\nMore.\n\n{OLD}\n\nMine.\nMore.\n"])
def test_line_ends_of_a_person_stay(tail: str) -> None:
    existing = f"---\nlicense: mit\nown: 1\n---\n{tail}".replace("\n", "\r\n")
    subject = make_subject()
    card = render_card(subject, existing=existing)
    assert (front(card)["license"], front(card)["own"]) == ("mit", 1)
    assert card.count("Mine.\r\nMore.") == tail.count("Mine.") and "Old text." not in card
    assert len(SECTION.findall(card)) == 1
    assert render_card(subject, existing=card) == card


def test_a_byte_order_mark_does_not_hide_the_metadata() -> None:
    card = render_card(make_subject(), existing="\ufeff---\nlicense: mit\nown: 1\n---\nMine.\n")
    found = front(card.removeprefix("\ufeff"))
    assert (found["license"], found["own"]) == ("mit", 1)
    assert card.count("license: mit") == 1 and "Mine." in card


@pytest.fixture
def form(hub: LoopbackHub) -> str:
    """What transformers' own `push_to_hub` writes."""
    hub.add_repo("user/name", {"config.json": b"{}"})
    return str(create_and_tag_model_card("user/name", tags=["x"]))


def test_the_unfilled_form_is_replaced(form: str) -> None:
    for existing in (form, form.replace("Model ID", "user/name"), str(ModelCard.from_template(ModelCardData()))):
        card = render_card(make_subject(), existing=existing)
        assert "More Information Needed" not in card and "# Model Card for" not in card
    assert "x" in front(render_card(make_subject(), existing=form))["tags"]


@pytest.mark.parametrize("sparse", [False, True])
def test_the_unfilled_form_of_peft_is_replaced(make_model: MakeModel, tmp_path: Path, sparse: bool) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama", num_hidden_layers=1)
    if sparse:
        sparsify(model, SparsityConfig("magnitude"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    existing = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Model Card for" in existing and "- PEFT" in existing
    card = render_card(make_adapter(), existing=existing)
    assert "More Information Needed" not in card and "# Model Card for" not in card and "- PEFT" not in card


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("- **Developed by:** [More Information Needed]", "- **Developed by:** A person"),
        ("## Uses", "## Uses\n\nA person wrote this."),
        ("# Model Card for Model ID", "A person wrote this.\n\n# Model Card for Model ID"),
    ],
)
def test_a_form_that_a_person_began_to_fill_in_stays(form: str, old: str, new: str) -> None:
    assert old in form
    assert "A person" in render_card(make_subject(), existing=form.replace(old, new))


# --- Figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def draw(folder: Path, report: SparsityReport | None, results: EvaluationResults | None) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    drawn = draw_figures(folder, report, results)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {name for name, there in drawn.items() if there}
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in files.values())
    return files


def test_the_same_data_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (draw(tmp_path / name, make_report(), make_results()) for name in ("first", "second"))
    assert set(first) == {ERROR_FIGURE, RESULTS_FIGURE}
    assert first == second
    assert "matplotlib.pyplot" not in sys.modules
    assert all(b"Software" not in content and b"tIME" not in content for content in first.values())


@pytest.mark.parametrize(
    ("report", "results", "expected"),
    [
        (None, None, set()),
        (make_report("magnitude"), EvaluationResults("0", [perplexity()]), set()),
        (make_report(), None, {ERROR_FIGURE}),
        (None, make_results(**UNFAIR), {RESULTS_FIGURE}),
        (None, EvaluationResults("0", [kobest()], [kobest(split="validation")]), set()),
        (None, EvaluationResults("0", [kobest()], [kobest()]), {RESULTS_FIGURE}),
        (None, EvaluationResults("0", [kobest(num_fewshot=5)], [kobest(num_fewshot=5)]), {RESULTS_FIGURE}),
    ],
)
def test_only_what_there_are_data_for_is_drawn(
    tmp_path: Path, report: SparsityReport | None, results: EvaluationResults | None, expected: set[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert set(draw(tmp_path, report, results)) == expected


@pytest.mark.parametrize(
    "name",
    ["a$b", "$x^2$", "$\\frac$", "\\$", "_hidden", "___", "", "$$", "a\\b_c", "층.투영", "x" * 300, "a\nb", "\0"],
    ids=lambda name: ascii(name)[:20],
)
def test_layer_names_that_matplotlib_would_read_otherwise(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    report = make_report()
    for layer in report.layers:
        layer.name = layer.name.replace("q_proj", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signs that the font does not have
        assert set(draw(tmp_path, report, None)) == {ERROR_FIGURE}


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    pytest.importorskip("matplotlib")
    found: list[Any] = []
    monkeypatch.setattr("optimum_ksparse.hub.figures._save", lambda figure, path: found.append(figure))
    yield found


def test_the_figure_shows_the_results(tmp_path: Path, drawn_figures: list[Any]) -> None:
    draw_figures(tmp_path, None, make_results())
    axes = drawn_figures[0].axes
    assert [[bar.get_height() for bar in axis.patches] for axis in axes] == [[10.0, 12.5], [0.6] * 5 + [0.45] * 5]
    assert [tick.get_text() for tick in axes[1].get_xticklabels()] == list(KOBEST_TASKS)


def test_the_figure_shows_every_kind_before_and_after_tuning(tmp_path: Path, drawn_figures: list[Any]) -> None:
    draw_figures(tmp_path, None, make_tuned())
    axes = drawn_figures[0].axes
    assert [[tick.get_text() for tick in axis.get_xticklabels()] for axis in axes] == [
        ["perplexity", "perplexity\ntuned"],
        [*KOBEST_TASKS, *(f"{task}\ntuned" for task in KOBEST_TASKS)],
        ["nsmc_1", "nsmc_2", "nsmc_1\ntuned", "nsmc_2\ntuned"],
        ["korquad", "korquad\ntuned"],
    ]
    assert [bar.get_height() for bar in axes[3].patches] == [75.0, 80.0, 60.0, 64.0]


def test_a_perplexity_beyond_floats_is_not_drawn_as_none(tmp_path: Path, drawn_figures: list[Any]) -> None:
    draw_figures(tmp_path, None, EvaluationResults("0", [perplexity(None)], [perplexity(10.0)]))
    texts = [text.get_text() for figure in drawn_figures for axis in figure.axes for text in axis.texts]
    assert "0.00" not in texts


def test_a_legend_names_every_kind_of_layer(tmp_path: Path, drawn_figures: list[Any]) -> None:
    report = make_report()
    for layer in report.layers:
        layer.name = layer.name.replace("q_proj", "_q$proj")
    draw_figures(tmp_path, report, None)
    labels = [text.get_text() for legend in drawn_figures[0].legends for text in legend.get_texts()]
    assert labels == ["self_attn._q\\$proj", "mlp.up_proj"]


def test_without_matplotlib_there_are_no_figures(
    tmp_path: Path, no_matplotlib: None, caplog: pytest.LogCaptureFixture, language: str
) -> None:
    from optimum_ksparse.hub.figures import logger

    logger.warning_once.cache_clear()
    for _ in range(2):
        drawn = draw_figures(tmp_path, make_report(), make_results())
    assert drawn == {ERROR_FIGURE: False, RESULTS_FIGURE: False}
    assert not list(tmp_path.iterdir())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "matplotlib>=" in caplog.text
    assert "![" not in render_card(make_subject(figures=drawn), language)


@pytest.mark.parametrize(("language", "name"), [("en", "README.md"), ("ko", "README_ko.md")])
def test_the_cards_of_the_repository_are_what_the_templates_make(language: str, name: str) -> None:
    folder = REPOSITORY / "hub_cards/gemma-3-270m-2of4"
    report = SparsityReport.load(folder / "sparsity_report.json")
    results = EvaluationResults.load(folder / "evaluation_results.json")
    before = (folder / name).read_text(encoding="utf-8")
    file_bytes = re.search(r"([\d,]{9,})(?= bytes \(bfloat16| ?바이트입니다\(bfloat16)", before)
    assert file_bytes is not None
    subject = CardSubject(
        name=folder.name,
        report=report,
        results=results,
        metadata=build_metadata(report, results, name=folder.name, base_model=None, inherited={}),
        storage="packed",
        dtype="bfloat16",
        file_bytes=int(file_bytes[1].replace(",", "")),
        base_name=report.base_model,
        figures={ERROR_FIGURE: True, RESULTS_FIGURE: True},
    )
    assert render_card(subject, language) == before


# --- Written into a folder -------------------------------------------------------------------------------------------


def sparse_model(make_model: MakeModel, folder: Path, storage: str = "packed") -> PreTrainedModel:
    """A tiny sparse model, saved in `folder`."""
    model = make_model("llama", num_hidden_layers=1)
    sparsify(model, SparsityConfig("magnitude", "2:4", storage=storage))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path, no_matplotlib: None) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path / "a name"
    return sparse_model(make_model, folder), folder


def test_write_card(make_model: MakeModel, tmp_path: Path, language: str) -> None:
    pytest.importorskip("matplotlib")
    model = sparse_model(make_model, tmp_path / "out")
    model.ksparse.results = make_results()
    model.ksparse.results.fingerprint = fingerprint(model)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    path = write_card(model, tmp_path / "out", language=language, repo_id="user/name", tags=["mine"])
    card = path.read_text(encoding="utf-8")
    assert path == tmp_path / "out" / "README.md"
    assert {file.name for file in path.parent.iterdir()} == before | {"README.md", RESULTS_FIGURE}
    assert "# name\n" in card and 'from_pretrained("user/name")' in card
    assert str(tmp_path) not in card
    assert f"{(tmp_path / 'out/model.safetensors').stat().st_size:,}" in card
    assert front(card)["model-index"][0]["name"] == "name" and "mine" in front(card)["tags"]
    write_card(model, tmp_path / "out", language=language, repo_id="user/name", tags=["mine"])
    assert path.read_text(encoding="utf-8") == card


def test_the_name_is_the_folders(saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    monkeypatch.chdir(folder)
    assert "\n# a name\n" in write_card(model, ".").read_text(encoding="utf-8")


def test_dense_storage_is_loaded_without_the_plugin(
    make_model: MakeModel, tmp_path: Path, no_matplotlib: None
) -> None:
    card = write_card(sparse_model(make_model, tmp_path, "dense"), tmp_path).read_text(encoding="utf-8")
    assert "plain transformers" in section(card, "How to load", "en")


def test_a_model_without_a_head_is_not_loaded_with_one(tmp_path: Path, no_matplotlib: None, language: str) -> None:
    """A head that is not in the checkpoint would be a random one."""
    model = AutoModel.from_config(make_config("llama", num_hidden_layers=1))
    sparsify(model, SparsityConfig("magnitude"))
    model.save_pretrained(tmp_path)
    card = write_card(model, tmp_path, language=language).read_text(encoding="utf-8")
    assert "AutoModelForCausalLM" not in section(card, "How to load", language)
    assert "pipeline_tag" not in front(card)


def test_write_card_twice_leaves_one_section_and_a_persons_text(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    (folder / "README.md").write_bytes("---\nlicense: mit\n---\nMine, 한글.\n".encode())
    first = write_card(model, folder).read_bytes()
    assert write_card(model, folder).read_bytes() == first
    assert "Mine, 한글.\n\n<!--".encode() in first and b"license: mit" in first
    again = write_card(model, folder, existing="---\nlicense: cc0-1.0\n---\nOther.\n").read_text(encoding="utf-8")
    assert "Other." in again and "Mine" not in again and front(again)["license"] == "cc0-1.0"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_bytes_of_a_person_stay(saved: tuple[PreTrainedModel, Path], end: bytes, mark: bytes) -> None:
    model, folder = saved
    lines = [b"---", b"license: mit", b"---", b"", b"One  ", b"\ttwo", b"", b"three", b""]
    (folder / "README.md").write_bytes(mark + end.join(lines))
    card = write_card(model, folder).read_bytes()
    assert end.join(lines[4:8]) in card
    assert card.count(b"license: mit") == 1
    assert metadata_load(folder / "README.md")["license"] == "mit"
    assert write_card(model, folder).read_bytes() == card


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\nMine.\n", b"---\n- a\n---\nMine.\n", b"\xff\xfe not UTF-8"])
def test_a_damaged_card_stays_as_it_was(saved: tuple[PreTrainedModel, Path], text: bytes) -> None:
    model, folder = saved
    (folder / "README.md").write_bytes(text)
    before = contents(folder)
    with pytest.raises(ValueError):
        write_card(model, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failed_rendering_leaves_the_old_card(
    saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*args: Any) -> str:
        raise error

    model, folder = saved
    (folder / "README.md").write_text("Mine.\n")
    before = contents(folder)
    monkeypatch.setattr(writing, "render_card", fail)
    with pytest.raises(error):
        write_card(model, folder)
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_card_and_no_other_file(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    (folder / "README.md").write_text("Mine.\n")
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_card(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before


def test_a_card_that_cannot_be_replaced_leaves_no_other_file(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    (folder / "README.md").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(OSError, match="README.md"):
        write_card(model, folder)
    assert sorted(folder.iterdir()) == before


def test_results_of_other_weights_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    model.ksparse.results = make_results()
    before = contents(folder)
    with pytest.raises(ValueError, match="measured on other weights"):
        write_card(model, folder)
    assert contents(folder) == before


def test_a_dense_model_and_an_unknown_language_are_refused(
    saved: tuple[PreTrainedModel, Path], make_model: MakeModel
) -> None:
    with pytest.raises(TypeError, match="no sparse model"):
        write_card(make_model("llama"), saved[1])
    with pytest.raises(ValueError, match="language='fr' is not known; allowed: en, ko"):
        write_card(saved[0], saved[1], language="fr")
    assert not (saved[1] / "README.md").exists()


@pytest.mark.parametrize(
    "name",
    ['user/na"me', "user/name\n```\n# Heading", 'x")\nimport os  # ', "user/`name`", f"user/{END}", "한글/이름"],
)
def test_a_name_that_cannot_be_a_repository_is_refused(saved: tuple[PreTrainedModel, Path], name: str) -> None:
    model, folder = saved
    for arguments in ({"repo_id": name}, {"repo_id": "user/name", "dense_revision": name}):
        with pytest.raises(ValueError, match="repo_id|dense_revision"):
            write_card(model, folder, **arguments)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("name", ["# x", "---", "`a`", "<b>", "a\nb", "{{ 7 }}", "\udcff"], ids=ascii)
def test_a_folder_with_a_nasty_name(saved: tuple[PreTrainedModel, Path], name: str) -> None:
    model, folder = saved
    folder = folder.rename(folder.parent / name)
    card = write_card(model, folder).read_text(encoding="utf-8")
    headings = [token for token in MARKDOWN.parse(body(card)) if token.type == "heading_open"]
    assert [token.tag for token in headings].count("h1") == 1
    assert len(SECTION.findall(card)) == 1


# --- The base's own card ---------------------------------------------------------------------------------------------

BASE_CARD = (
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: [ko]\ntags: [theirs]\n---\n# Base\n"
)


def prune_from(source: Any, out: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=SparsityConfig("magnitude"))
    model.save_pretrained(out)
    return model


@pytest.fixture
def base(make_model: MakeModel, tmp_path: Path, no_matplotlib: None) -> Path:
    make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "my base")
    return tmp_path / "my base"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE_CARD, {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["ko"]}),
        ("---\nlicense: mit\npipeline_tag: text-generation\n---\n", {"license": "mit"}),
        ("---\nlanguage: en\n---\n", {"language": "en"}),
        ("---\nlicense: [a, b]\nlanguage: {a: b}\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("No metadata.", {}),
        (None, {}),
    ],
)
def test_a_local_base(base: Path, tmp_path: Path, text: str | None, expected: dict[str, Any], language: str) -> None:
    if text is not None:
        (base / "README.md").write_text(text, encoding="utf-8")
    card = write_card(prune_from(base, tmp_path / "out"), tmp_path / "out", language=language).read_text(
        encoding="utf-8"
    )
    found = front(card)
    keys = ("license", "license_name", "license_link", "language", "base_model", "base_model_relation")
    assert {key: found[key] for key in keys if key in found} == expected
    assert "my base" in card and ("local folder", "로컬 폴더")[LANGUAGES.index(language)] in card
    assert str(tmp_path) not in card and "theirs" not in found["tags"]


@pytest.mark.parametrize("text", [BASE_CARD, None])
def test_a_base_on_the_hub(base: Path, tmp_path: Path, hub: LoopbackHub, text: str | None) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.add_repo("user/base_1", {**files, **({"README.md": text.encode()} if text else {})})
    commit = hub.commits("user/base_1")[-1].id
    card = write_card(prune_from("user/base_1", tmp_path / "out"), tmp_path / "out").read_text(encoding="utf-8")
    found = front(card)
    assert (found["base_model"], found["base_model_relation"]) == ("user/base_1", "quantized")
    assert (found.get("license"), found.get("language")) == (("other", ["ko"]) if text else (None, None))
    assert "https://huggingface.co/user/base_1)" in card and commit in card
    assert bibtex(card)["base_model"]["url"] == "https://huggingface.co/user/base_1"


def test_a_base_whose_commit_is_unknown_is_not_called_a_local_folder(
    make_model: MakeModel, tmp_path: Path, no_matplotlib: None
) -> None:
    """Loaded before this package was imported."""
    model = make_model("llama", num_hidden_layers=1)
    model.name_or_path = model.config._name_or_path = "user/base"
    sparsify(model, SparsityConfig("magnitude"))
    model.save_pretrained(tmp_path)
    card = write_card(model, tmp_path).read_text(encoding="utf-8")
    assert "user/base" in card and "not on the Hub" not in card


def test_an_adapter_on_a_sparse_model(base: Path, tmp_path: Path, hub: LoopbackHub, language: str) -> None:
    peft = pytest.importorskip("peft")
    prune_from(base, tmp_path / "sparse")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sparse").iterdir()}
    hub.add_repo("user/sparse", {**files, "README.md": BASE_CARD.encode()})
    model = AutoModelForCausalLM.from_pretrained("user/sparse")
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    card = write_card(model, tmp_path / "adapter", language=language).read_text(encoding="utf-8")
    found = front(card)
    assert (found["base_model"], found["base_model_relation"]) == ("user/sparse", "adapter")
    assert (found["library_name"], found["license"]) == ("peft", "other")
    assert "More Information Needed" not in card and str(tmp_path) not in card
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,}" in card and "q\\_proj, v\\_proj" in card
    assert not (tmp_path / "adapter" / ERROR_FIGURE).exists()
