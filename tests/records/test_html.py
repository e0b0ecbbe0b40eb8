"""Tables as HTML: whole documents of a parser, nothing of what they show is markup, and no colour is one theme's."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_ksparse import EvaluationResults, SparsityConfig
from optimum_ksparse.evaluation import Measurement
from optimum_ksparse.records import as_html
from optimum_ksparse.report import LayerReport, SparsityReport

ATTACK = '<script>alert("한")</script>&amp;<b>'


class Page(HTMLParser):
    """The tags of a page, which are all closed, its texts, and the widths of its bars."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.widths: list[float] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        self.widths += map(float, re.findall(r"width:([\d.]+)em", dict(attrs).get("style") or ""))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), TEXT, TEXT)
def test_what_is_shown_is_text(rows, title, note):
    page = Page(as_html([("head", "of"), *rows], title, [note]))
    plain = Page(as_html([("a", "b"), *[("c", "d")] * len(rows)], "e", ["f"]))
    assert page.tags == plain.tags
    shown = "".join(page.texts)
    assert all(part in shown for part in (*itertools.chain(*rows), title, note))


def test_bars_are_as_long_as_their_share_of_the_longest():
    page = Page(as_html([("layer", "error"), ("a", "1"), ("b", "4"), ("c", "none")], bars={1: [1.0, 4.0, None]}))
    assert len(page.widths) == 2
    assert page.widths[1] == 4 * page.widths[0] > 0
    assert not Page(as_html([("error",), ("0",)], bars={0: [0.0]})).widths


def test_figures_stay_below_each_other_whatever_their_bars():
    text = as_html([("error",), ("1",), ("4",), ("none",)], bars={0: [1.0, 4.0, None]})
    spans = re.findall(r'<span style="([^"]*)"', text)
    assert (
        len(spans) == 3
        and len({sum(map(float, re.findall(r"([\d.]+)em", s.replace("height:.7em", "")))) for s in spans}) == 1
    )


def test_words_are_on_the_left_and_figures_on_the_right():
    page = as_html([("layer", "count", "error"), ("a", "1,000", "12.5%"), ("b", "2", "not measured")])
    assert re.findall(r"<t[hd]( style=\"text-align:left\")?>", page) == [' style="text-align:left"', "", ""] * 3

    assert not Page(as_html([("error",), ("inf",)], bars={0: [float("inf")]})).widths


def report() -> SparsityReport:
    layers = [
        LayerReport(f"layers.{i}.q_proj", (8, 16), "2:4", 64, 256, 144, error, 0.5, ATTACK)
        for i, error in ((0, 0.25), (1, None))
    ]
    layers.append(LayerReport("layers.0.up_proj", (32, 16), "2:4", 256, 256, 144, 0.125, 0.5))
    return SparsityReport(
        {"method": "wanda", "pattern": "2:4"}, layers=layers, skipped={ATTACK: ATTACK}, num_parameters=999
    )


def results() -> EvaluationResults:
    def film(accuracy: float) -> Measurement:
        return Measurement(ATTACK, {"accuracy": accuracy}, {"data": {"name": ATTACK}, "num_fewshot": 0}, {})

    return EvaluationResults("ab", [film(0.6)], [film(0.75)], dense_model=ATTACK)


def config() -> SparsityConfig:
    return SparsityConfig("wanda", "4:8", dataset="self", tokenizer=ATTACK)


@pytest.mark.parametrize("make", [report, results, config])
def test_nothing_of_a_record_becomes_markup_and_colours_fit_light_and_dark(make):
    text = make()._repr_html_()
    page = Page(text)
    assert {"script", "b"}.isdisjoint(page.tags) and "table" in page.tags
    assert ATTACK in "".join(page.texts)
    # A colour of its own for text or ground would be unreadable in the other theme: bars alone have one.
    assert not re.search(r"[;\"'](background-)?color:", text) and text.count("background:") == len(page.widths)


def test_a_report_has_a_row_for_each_kind_of_layer_with_bars_of_density_and_error():
    page = Page(report()._repr_html_())
    assert page.tags.count("tr") == 1 + 2
    assert len(page.widths) == 4
    shown = "".join(page.texts)
    for line in str(report()).splitlines()[3:]:
        assert line in shown


def test_results_show_dense_sparse_and_what_is_recovered():
    page = Page(results()._repr_html_())
    assert {"0.7500", "0.6000", "80.0%"} <= set(page.texts)
    assert len(page.widths) == 1
    assert "table" in EvaluationResults("ab")._repr_html_()


def test_a_config_shows_what_is_read_and_marks_what_was_passed():
    page = Page(config()._repr_html_())
    texts = page.texts
    assert texts[texts.index("pattern") + 1] == "4:8"
    assert {"method", "dataset", "num_samples"} <= set(texts) and "quant_method" not in texts
    assert "calibration_dtype" not in texts and "calibration_dtype" in texts[-1]  # is not set
    checksum = SparsityConfig(dataset=["가"]).to_dict()["dataset"]["sha256"]
    shown = SparsityConfig(dataset=["가"])._repr_html_()
    assert checksum not in shown and f"sha256 {checksum[:8]}…" in shown
    assert page.tags.count("strong") == len(config().given)
