"""What a person wrote into a card stays, and metadata say what holds of the weights that are there now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.hub import create_and_tag_model_card

from optimum_ksparse.evaluation import EvaluationResults
from optimum_ksparse.hub.card import BEGIN, END, render_card
from optimum_ksparse.hub.metadata import build_metadata, merge_metadata

from ..loopback_hub import LoopbackHub
from .subjects import (
    SECTION,
    SUBJECTS,
    body,
    front,
    kobest,
    make_adapter,
    make_report,
    make_results,
    make_subject,
    perplexity,
)
from .test_card import values

# --- Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_metadata_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    card, expected = render_card(subject), build_metadata(subject).to_dict()
    assert front(card) == expected
    if name != "changed":  # the client puts what is before tuning and after it under one task when it writes
        assert ModelCard(card).data.to_dict() == expected
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert metadata_load(tmp_path / "README.md") == expected


json_values = st.recursive(
    values | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(values, inner, max_size=3),
    max_leaves=3,
)


@settings(max_examples=12)
@given(texts=st.lists(values, min_size=4, max_size=4), person=st.dictionaries(values, json_values, max_size=3))
def test_any_metadata_come_back_as_they_were(texts: list[str], person: dict[str, Any]) -> None:
    name, tag, license_name, language = texts
    inherited = {"license": license_name, "language": [language]}
    subject = make_subject(results=None, name=name, tags=[tag, tag], inherited=inherited)
    ours = build_metadata(subject).to_dict()
    assert front(render_card(subject)) == ours
    merged = front(render_card(subject, existing=f"---\n{yaml.safe_dump(person)}---\nMine.\n"))
    assert merged == merge_metadata(person, ours)
    assert all(merged[key] == value for key, value in person.items() if key not in ours)


def test_metadata_of_a_full_card() -> None:
    metadata = front(render_card(make_subject(tags=["mine", "sparse"])))
    name, rows = model_index_to_eval_results(metadata.pop("model-index"))
    assert metadata == {
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
    indexed = {(row.dataset_config, row.metric_type): row.metric_value for row in rows}
    expected: dict[tuple[str, str], float | None] = {("20231101.ko", "perplexity"): 12.5}
    for row in make_results().sparse[1:]:
        expected |= {(row.name, "accuracy"): row.metrics["acc"], (row.name, "f1"): row.metrics["f1"]}
    assert (name, indexed) == ("polyglot-2of4", expected)
    adapter = front(render_card(make_adapter()))
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")


def test_the_model_index_tells_apart_what_was_measured_otherwise() -> None:
    rows = [kobest("copa", 0.5), kobest("copa", 0.75, num_fewshot=5, limit=50)]
    rows += [kobest("boolq", data={"files_sha256": "00ff"}), kobest("boolq", 0.6, tuning={"task": "koalpaca"})]
    index = front(render_card(make_subject(results=EvaluationResults("0", [perplexity(None), *rows]))))["model-index"]
    _, entries = model_index_to_eval_results(index)
    accuracies = [row for row in entries if row.metric_type == "accuracy"]
    assert [row.metric_value for row in accuracies] == [0.5, 0.75, 0.5, 0.6]
    assert [row.metric_args["num_fewshot"] for row in accuracies] == [0, 5, 0, 0]
    assert "00ff" in str(accuracies[2]) and "KoAlpaca" in str(accuracies[3].task_name)
    assert not any(row.metric_type == "perplexity" for row in entries)  # a perplexity beyond floats


@pytest.mark.parametrize(
    ("dataset", "repository", "language"),
    [("mc4-ko", ["allenai/c4"], "ko"), ("c4", ["allenai/c4"], None), ({"file": "a", "sha256": "0"}, None, None)],
)
def test_metadata_of_calibration_data(dataset: Any, repository: Any, language: str | None) -> None:
    metadata = front(render_card(make_subject(make_report(dataset=dataset), inherited={})))
    assert (metadata.get("datasets"), metadata.get("language")) == (repository, language)
    assert "license" not in metadata


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
base_model: someone/else
base_model_relation: merge
library_name: other
pipeline_tag: text2text-generation
model-index: [{name: stale, results: []}]
---
"""


def test_metadata_of_a_person_stay_and_facts_are_replaced() -> None:
    metadata = front(render_card(make_subject(), existing=PERSON_METADATA))
    theirs = yaml.safe_load(PERSON_METADATA.strip("-\n"))
    for key in ("license", "language", "my_key", "pipeline_tag"):
        assert metadata[key] == theirs[key]
    assert metadata["tags"] == ["mine", "sparse", "optimum-ksparse", "pruned", "wanda", "2of4"]
    assert metadata["metrics"] == ["wer", "perplexity", "accuracy", "f1"]
    assert metadata["datasets"] == ["wikimedia/wikipedia"]
    assert metadata["base_model"] == "EleutherAI/polyglot-ko-1.3b"
    assert (metadata["base_model_relation"], metadata["library_name"]) == ("quantized", "transformers")
    assert metadata["model-index"][0]["name"] == "polyglot-2of4"
    unknown = front(render_card(make_subject(base_model=None, base_name="folder"), existing=PERSON_METADATA))
    assert (unknown["base_model"], unknown["base_model_relation"]) == ("someone/else", "merge")
    for key in ("tags", "datasets", "metrics", "license", "language"):
        assert front(render_card(make_subject(), existing=f"---\n{key}:\n---\nMine.\n"))[key]


def test_what_an_earlier_push_said_of_other_weights_goes() -> None:
    earlier = render_card(make_subject()).replace("\nmetrics:\n", "\nmetrics:\n- wer\n", 1)
    again = front(render_card(make_subject(make_report("sparsegpt", "50%"), None), existing=earlier))
    assert "model-index" not in again and again["metrics"] == ["wer"]
    assert again["tags"] == ["optimum-ksparse", "sparse", "pruned", "sparsegpt", "unstructured"]


# --- Text ------------------------------------------------------------------------------------------------------------

OLD = f"{BEGIN}\n# old\n\nOld text.\n\n{END}"
PERSONS = [
    "# My title\n\nText with *markup*, `code`, | tables | and {{ jinja }} {% raw %}.",
    "Two spaces end this line  \nand the next one does not\n\n\n\n\tA tab.\n\n<details>\n\n---\n\n</details>",
    "한글 글 🙂 עברית \\1 \\g<0>",
    "```\n---\nlicense: mit\n---\n```\n\n    indented code\n\nand text",
    "# Model Card for something that a person wrote\n\n[More Information Needed]",
]


@pytest.mark.parametrize("text", PERSONS, ids=range(len(PERSONS)))
@pytest.mark.parametrize("metadata", ["", "---\nlicense: mit\n---\n\n"])
def test_text_around_the_section_stays(text: str, metadata: str) -> None:
    subject = make_subject(None, None)
    for form in ("{0}\n", "{0}\n\n{1}\n", "{1}\n\n{0}\n", "{0}\n\n{1}\n{0}\n", "{0}{1}{0}"):
        existing = metadata + form.format(text, OLD)
        card = render_card(subject, existing=existing)
        assert len(SECTION.findall(card)) == card.count(BEGIN) == card.count(END) == 1
        assert "Old text." not in card
        parts = form.format(text, "\0").split("\0") if OLD in existing else [form.format(text, ""), ""]
        assert [part.strip("\n") for part in SECTION.split(body(card))] == [part.strip("\n") for part in parts]
        assert render_card(subject, existing=card) == card
        assert SECTION.split(body(render_card(subject, "ko", existing=card))) == SECTION.split(body(card))


@settings(max_examples=20)
@given(
    parts=st.lists(st.sampled_from([BEGIN, END, OLD, "A person", "B person", "C person", "---", " text "]), max_size=8)
)
def test_any_existing_card_keeps_what_is_outside_of_sections(parts: list[str]) -> None:
    subject = make_subject(None, None)
    existing = "\n\n".join(["start", *parts])
    card = render_card(subject, existing=existing)
    assert len(SECTION.findall(card)) == 1
    assert render_card(subject, existing=card) == card
    section = rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}"
    kept = re.findall(r"^[ABC] person$", re.sub(section, "", existing, flags=re.DOTALL), re.M)
    there = re.findall(r"^[ABC] person$", card, re.M)
    assert all(there.count(line) >= kept.count(line) for line in kept)


@pytest.mark.parametrize(
    "existing",
    [
        f"A person\n\n{BEGIN}\n# old\n\nB person",
        f"A person\n\n{OLD}\n\nB person\n\n{OLD}\n\nC person",
        f"A person\n\n{END}\n\nB person\n\n{BEGIN}\n\nC person",
        f"A person\n\n{BEGIN}\n\nB person\n\n{OLD}\n\nC person",
        "A person\n\n<!-- optimum-ksparse: begin. -->\n# old\n\nB person",
    ],
    ids=["begin without end", "two sections", "end before begin", "begin, then a section", "other words"],
)
def test_damaged_markers_lose_no_text(existing: str) -> None:
    card = render_card(make_subject(), existing=existing)
    person = re.compile(r"^([ABC]) person$", re.M)
    assert person.findall(card) == person.findall(existing)
    assert len(SECTION.findall(card)) == card.count(f"{BEGIN}\n# polyglot-2of4") == 1
    assert render_card(make_subject(), existing=card) == card


@pytest.mark.parametrize("text", ["license: [", "- a\n- b", "text", "!!python/name:os.system x", "\tx: 1"])
def test_damaged_metadata_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"README\.md"):
        render_card(make_subject(), existing=f"---\n{text}\n---\nMine.\n")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_of_a_person_stay(end: str, mark: str) -> None:
    existing = mark + f"---\nlicense: mit\nown: 1\n---\nMine.\nMore.\n\n{OLD}\n\nMine.\nMore.\n".replace("\n", end)
    card = render_card(make_subject(), existing=existing)
    assert (front(card)["license"], front(card)["own"]) == ("mit", 1)
    assert card.count(f"Mine.{end}More.") == 2 and "Old text." not in card
    assert render_card(make_subject(), existing=card) == card


@pytest.fixture
def form(hub: LoopbackHub) -> str:
    """What transformers' own `push_to_hub` writes."""
    hub.add_repo("user/name", {"config.json": b"{}"})
    return str(create_and_tag_model_card("user/name", tags=["x"]))


def test_the_unfilled_form_is_replaced_and_one_that_a_person_began_stays(form: str) -> None:
    for existing in (form, form.replace("Model ID", "user/name"), str(ModelCard.from_template(ModelCardData()))):
        card = render_card(make_subject(), existing=existing)
        assert "More Information Needed" not in card and "# Model Card for" not in card
    assert "x" in front(render_card(make_subject(), existing=form))["tags"]
    for old, new in (
        ("- **Developed by:** [More Information Needed]", "- **Developed by:** A person"),
        ("# Model Card for Model ID", "A person wrote this.\n\n# Model Card for Model ID"),
    ):
        assert old in form and "A person" in render_card(make_subject(), existing=form.replace(old, new))
