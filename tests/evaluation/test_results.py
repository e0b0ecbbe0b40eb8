"""`EvaluationResults`: saved whole, loaded as they were, and refused where an edit cannot be right."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse.evaluation import (
    KOBEST_TASKS,
    STUDY_TASKS,
    EvaluationResults,
    Measurement,
    evaluate_kobest,
    evaluate_perplexity,
    result_rows,
    results_table,
)
from optimum_ksparse.evaluation.results import RESULTS_NAME, SCHEMA_VERSION

from ..conftest import sample_texts

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
ENVIRONMENT = {"device": "cpu", "batch_size": 4, "versions": {"torch": "2.13.0"}}
MISSING = object()


def perplexity(value: float | None = 12.5, **protocol: Any) -> Measurement:
    windows = {"seq_len": 16, "stride": None, "max_tokens": None, "num_windows": 3, "num_tokens": 45, "num_bytes": 99}
    known = {"texts": {"texts": 2, "sha256": "ab"}, **windows, "prepend_bos": False, "dtype": "float32"}
    metrics = {"perplexity": value, "bits_per_byte": 1.25}
    return Measurement("perplexity", metrics, {**known, **protocol}, dict(ENVIRONMENT))


def kobest(task: str = "copa", f1: float = 0.5, **protocol: Any) -> Measurement:
    known = {
        "task": f"kobest_{task}",
        "task_version": 1.0,
        "num_fewshot": 0,
        "limit": None,
        "data": {"files_sha256": "cd"},
        "split": "test",
        "num_samples": 50,
        "items_sha256": "ef",
        "prepend_bos": False,
        "dtype": "float32",
    }
    metrics = {"acc": 0.5, "acc_stderr": 0.0625, "f1": f1, **({"acc_norm": 0.25} if task == "hellaswag" else {})}
    return Measurement(task, metrics, {**known, **protocol}, dict(ENVIRONMENT))


TUNING = {"task": "koalpaca", "method": "LORA", "r": 8, "steps": 300}


def film(number: int = 1, accuracy: float = 0.75, **protocol: Any) -> Measurement:
    """Of a task that is not in the table: a package adds it that is not imported here."""
    known = {"data": {"name": "team/films"}, "num_fewshot": 10, "seed": 1234, "dtype": "float32"}
    return Measurement(f"film_{number}", {"accuracy": accuracy}, {**known, **protocol}, dict(ENVIRONMENT))


def span(f1: float = 75.0, **protocol: Any) -> Measurement:
    return Measurement("span", {"f1": f1}, {"dtype": "float32", **protocol}, dict(ENVIRONMENT))


def make_results() -> EvaluationResults:
    return EvaluationResults(
        fingerprint="0123",
        sparse=[perplexity(), kobest("hellaswag"), film(), span(tuning=dict(TUNING))],
        dense=[perplexity(10.0), kobest("copa", num_fewshot=5, limit=50)],
        dense_model="폴리글롯",
        dense_revision="89ab",
    )


def reload(results: EvaluationResults, folder: Path) -> EvaluationResults:
    results.save(folder)
    return EvaluationResults.load(folder / RESULTS_NAME)


def edit(folder: Path, place: str, value: Any) -> Path:
    """Saved results with another value at `place`, such as "sparse[1].metrics.acc"."""
    path = folder / RESULTS_NAME
    data = asdict(make_results())
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", place)]
    inside = data
    for part in parents:
        inside = inside[part]
    if value is MISSING:
        del inside[last]
    else:
        inside[last] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def refused(path: Path, match: str) -> None:
    pattern = f"evaluation_results.json is not a results file of optimum-ksparse: .*{match}"
    with pytest.raises(ValueError, match=f"(?s){pattern}") as error:
        EvaluationResults.load(path)
    assert str(path.parent) not in str(error.value)


# What JSON types each field may have.
TYPES = {
    "schema_version": "int",
    "fingerprint": "str",
    "dense_model": "str null",
    "dense_revision": "str null",
    "sparse": "list",
    "dense": "list",
    "name": "str",
    "metrics": "object",
    "protocol": "object",
    "environment": "object",
    "perplexity": "int float null",
    "bits_per_byte": "int float",
    "acc": "int float",
    "acc_stderr": "int float null",
    "f1": "int float",
    "acc_norm": "int float",
    "texts": "object",
    "seq_len": "int",
    "stride": "int null",
    "max_tokens": "int null",
    "num_windows": "int",
    "num_tokens": "int",
    "num_bytes": "int",
    "prepend_bos": "bool",
    "dtype": "str",
    "task": "str",
    "task_version": "int float str",
    "num_fewshot": "int",
    "limit": "int null",
    "data": "object",
    "split": "str",
    "num_samples": "int",
    "items_sha256": "str",
    "tuning": "object null",
    "device": "str",
    "batch_size": "int",
    "versions": "object",
}
VALUES: dict[str, Any] = {"null": None, "bool": True, "int": 1, "float": 0.5, "str": "글", "list": [], "object": {}}
OPTIONAL = ("sparse", "dense", "dense_model", "dense_revision", "acc_norm", "tuning")


def places() -> Iterator[tuple[str, str]]:
    """Each field of the saved results that a schema describes, with its place."""
    for name, value in asdict(make_results()).items():
        yield name, name
        for number, row in enumerate(value[:2] if isinstance(value, list) else ()):
            for key, part in row.items():
                yield f"{name}[{number}].{key}", key
                yield from ((f"{name}[{number}].{key}.{inner}", inner) for inner in (part if key != "name" else ()))


PLACES = list(places())


def test_round_trip(tmp_path: Path) -> None:
    results = make_results()
    assert reload(results, tmp_path) == results
    text = (tmp_path / RESULTS_NAME).read_text(encoding="utf-8")
    assert "폴리글롯" in text
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION == 2
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_NAME]


shares = st.floats(0, 1)
# What is read holds no control characters.
texts = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=9)
counts = st.integers(1, 10**12)
json_values = st.none() | st.booleans() | st.integers() | texts
protocols = {"prepend_bos": st.booleans(), "dtype": st.sampled_from(["float32", "bfloat16"])}
environments = st.fixed_dictionaries(
    {"device": texts, "batch_size": counts, "versions": st.dictionaries(texts, texts, max_size=2)}
)
perplexities_drawn = st.builds(
    Measurement,
    name=st.just("perplexity"),
    metrics=st.fixed_dictionaries(
        {
            "perplexity": st.none() | st.floats(1, allow_infinity=False),
            "bits_per_byte": st.floats(0, allow_infinity=False),
        }
    ),
    protocol=st.fixed_dictionaries(
        {
            "texts": st.builds(dict, st.dictionaries(texts, json_values, max_size=3), sha256=texts),
            "seq_len": st.integers(2, 10**6),
            "stride": st.none() | counts,
            "max_tokens": st.none() | st.integers(2, 10**12),
            "num_windows": counts,
            "num_tokens": counts,
            "num_bytes": st.integers(0, 10**12),
            **protocols,
        }
    ),
    environment=environments,
)
kobest_drawn = st.builds(
    Measurement,
    name=st.sampled_from(KOBEST_TASKS),
    metrics=st.fixed_dictionaries(
        {"acc": shares, "acc_stderr": st.none() | shares, "f1": shares}, optional={"acc_norm": shares}
    ),
    protocol=st.fixed_dictionaries(
        {
            "task": texts,
            "task_version": st.integers() | st.floats(0, 10) | texts,
            "num_fewshot": st.integers(0, 100),
            "limit": st.none() | counts,
            "data": st.dictionaries(texts, json_values, max_size=3),
            "split": texts,
            "num_samples": counts,
            "items_sha256": texts,
            **protocols,
        }
    ),
    environment=environments,
)
rows_drawn = st.lists(perplexities_drawn | kobest_drawn, max_size=4)


@given(texts, rows_drawn, rows_drawn, st.none() | texts, st.none() | texts)
@settings(max_examples=25)
def test_any_results_are_loaded_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory,
    fingerprint: str,
    sparse: list[Measurement],
    dense: list[Measurement],
    dense_model: str | None,
    dense_revision: str | None,
) -> None:
    results = EvaluationResults(fingerprint, dense_model=dense_model, dense_revision=dense_revision)
    for part, rows in (("sparse", sparse), ("dense", dense)):
        for row in rows:
            results.add(part, row)
    assert reload(results, tmp_path_factory.mktemp("results")) == results


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b"null", b"{}", b'{"schema_version": 1}', b"\xff\xfe\x00", b"[" * 100_000):
        (tmp_path / RESULTS_NAME).write_bytes(content)
        refused(tmp_path / RESULTS_NAME, "")


def test_each_field_is_checked(tmp_path: Path) -> None:
    for place, name in PLACES:
        if name in OPTIONAL:
            EvaluationResults.load(edit(tmp_path, place, MISSING))
        else:
            refused(edit(tmp_path, place, MISSING), re.escape(place))
        for kind in sorted(VALUES.keys() - {*TYPES[name].split()})[:2]:
            refused(edit(tmp_path, place, VALUES[kind]), rf"{re.escape(place)} is .*, must be ")
        if "int" in TYPES[name] and name != "schema_version":
            for value in (math.nan, math.inf, 10**400):
                refused(edit(tmp_path, place, value), rf"{re.escape(place)} is {value!r}, must be ")


def test_texts_without_their_hash_and_rows_that_are_none_are_named(tmp_path: Path) -> None:
    for value in (MISSING, None, {}):
        refused(edit(tmp_path, "dense[0].protocol.texts.sha256", value), r"dense\[0\].protocol.texts.sha256")
    for value in (None, 5, "글", []):
        refused(edit(tmp_path, "sparse[1]", value), r"sparse\[1\] is .*, must be object")


OUT_OF_RANGE: list[tuple[str, float]] = [
    ("sparse[0].metrics.perplexity", 0.99),
    ("sparse[0].metrics.bits_per_byte", -0.1),
    *(
        (f"sparse[1].metrics.{name}", value)
        for name in ("acc", "acc_stderr", "f1", "acc_norm")
        for value in (-1, 1.01)
    ),
    ("dense[0].protocol.seq_len", 1),
    ("dense[0].protocol.stride", 0),
    ("dense[0].protocol.max_tokens", 1),
    ("dense[0].protocol.num_windows", 0),
    ("dense[0].protocol.num_tokens", -5),
    ("dense[0].protocol.num_bytes", -1),
    ("dense[1].protocol.num_fewshot", -1),
    ("dense[1].protocol.limit", 0),
    ("dense[1].protocol.num_samples", 0),
    ("dense[1].environment.batch_size", 0),
    ("sparse[2].protocol.num_fewshot", -1),
    ("schema_version", 0),
]


def test_number_out_of_range_is_named(tmp_path: Path) -> None:
    for place, value in OUT_OF_RANGE:
        refused(edit(tmp_path, place, value), re.escape(f"{place} is {value!r}, must be "))


def test_unknown_field_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    nearest = {
        "spars": "sparse",
        "sparse[0].metric": "metrics",
        "sparse[1].metrics.acc_nrm": "acc_norm",
        "dense[1].protocol.num_few_shot": "num_fewshot",
        "dense[0].environment.devise": "device",
    }
    for place, name in nearest.items():
        refused(edit(tmp_path, place, 0.5), f"did you mean '{name}'")
    for place in ("sparse[0].metrics.acc_norm", "dense[1].protocol.seq_len", "sparse[0].metrics.색"):
        refused(edit(tmp_path, place, 0.5), f"has no setting '{place.rpartition('.')[2]}'")


def test_rows_of_tasks_that_are_not_in_the_table_are_kept(tmp_path: Path) -> None:
    rows = [film(data={"name": "글", "more": [1]}, tuning=dict(TUNING)), span(None)]
    assert reload(EvaluationResults("", rows), tmp_path).sparse == rows
    for place, value in (
        ("metrics.accuracy", "글"),
        ("metrics.accuracy", math.nan),
        ("protocol.tuning", 5),
        ("protocol.data.name", 5),
        ("environment.batch_size", 0),
    ):
        refused(edit(tmp_path, f"sparse[2].{place}", value), re.escape(f"sparse[2].{place}"))


def test_a_file_of_the_first_schema_is_read_as_one_from_before_tuning(tmp_path: Path) -> None:
    results = make_results()
    results.sparse = results.sparse[:2]
    results.save(tmp_path)
    path = tmp_path / RESULTS_NAME
    old = {**json.loads(path.read_text(encoding="utf-8")), "schema_version": 1}
    path.write_text(json.dumps(old), encoding="utf-8")
    found = EvaluationResults.load(path)
    assert found == results and found.schema_version == SCHEMA_VERSION
    assert all(row.tuning is None for row in (*found.sparse, *found.dense))


def test_rows_before_and_after_tuning_are_apart() -> None:
    results = EvaluationResults("")
    rows = [film(), film(tuning=TUNING), span(tuning=TUNING), span()]
    for row in rows:
        results.add("sparse", row)
    assert results.sparse == rows
    results.add("sparse", later := film(accuracy=0.5, tuning={**TUNING, "steps": 9}))
    assert results.sparse == [rows[0], *rows[2:], later]
    results.add("dense", span(tuning=TUNING))
    results.add("dense", film(accuracy=1.0))
    dense_after, dense_before = results.dense
    assert results.pairs() == [(rows[0], dense_before), (rows[2], dense_after), (rows[3], None), (later, None)]
    assert results.comparable() == [(rows[0], dense_before), (rows[2], dense_after)]
    results.add("dense", film(tuning=TUNING))
    assert len(results.comparable()) == 2  # tuned by other settings
    assert later.differences(results.dense[-1]) == ["tuning"]


def test_rows_of_one_tuning_are_not_there_twice(tmp_path: Path) -> None:
    rows = [asdict(span()), asdict(span(tuning=TUNING)), asdict(span(tuning={"task": "x"}))]
    refused(edit(tmp_path, "sparse", rows), r"sparse\[2\] is a second measurement of span with 0 shots after tuning")


def test_the_mean_is_of_before_or_after_tuning() -> None:
    before = [kobest(task, f1=0.5) for task in STUDY_TASKS]
    after = [kobest(task, f1=0.75, tuning=TUNING) for task in STUDY_TASKS]
    results = EvaluationResults("", before + after)
    assert (results.mean_f1("sparse"), results.mean_f1("sparse", tuned=True)) == (0.5, 0.75)
    after[0].protocol["tuning"] = {"task": "korquad"}
    assert results.mean_f1("sparse", tuned=True) is None
    rows = [
        (row.tuning, row.sparse)
        for row in result_rows(EvaluationResults("", before + after[1:]))
        if row.name == "mean"
    ]
    assert rows == [(None, 0.5)]


def test_what_was_before_tuning_is_taken_over() -> None:
    base = EvaluationResults("b", [film(accuracy=0.5), perplexity(9.0)], [film(accuracy=0.6), span()], "team/dense")
    base.sparse.append(span(tuning=TUNING))  # of a tuning before this one
    tuned = EvaluationResults("t", [film(tuning=TUNING), perplexity(8.0)], [film(tuning=TUNING)], "tuned")
    tuned.take_before(base)
    assert tuned.sparse == [film(tuning=TUNING), perplexity(8.0), film(accuracy=0.5)]
    assert tuned.dense == [film(tuning=TUNING), *base.dense]
    assert (tuned.dense_model, tuned.fingerprint) == ("team/dense", "t")
    tuned.sparse[-1].protocol["dtype"] = "float16"
    assert base.sparse[0].protocol["dtype"] == "float32"
    other = EvaluationResults("t", [], [film(accuracy=0.9)], "another/dense")
    other.take_before(base)
    assert (other.dense, other.dense_model) == ([film(accuracy=0.9)], "another/dense")


def test_a_dense_model_tuned_alike_becomes_the_dense_column() -> None:
    column = EvaluationResults("d", [], [film(accuracy=0.9, tuning=TUNING)], "dense-tuned")
    results = EvaluationResults("t", [], [span(), span(tuning=TUNING)], "team/dense")
    results.take_baseline(column)
    after = [span(tuning=TUNING), film(accuracy=0.9, tuning=TUNING)]
    assert results.dense == [span(), *after]
    assert results.dense_model == "team/dense"
    results.take_baseline(EvaluationResults("d", [], [film()], "other/dense", "89ab"))
    assert results.dense == [*after, film()]
    results.take_baseline(EvaluationResults("d", [], [film(accuracy=0.7, tuning=TUNING)], "dense-tuned"))
    assert results.dense == [span(tuning=TUNING), film(), film(accuracy=0.7, tuning=TUNING)]
    assert (results.dense_model, results.dense_revision) == ("other/dense", "89ab")
    for wrong in (EvaluationResults("s", [film()], [film()]), EvaluationResults("e")):
        with pytest.raises(ValueError, match="must be of a dense model"):
            results.take_baseline(wrong)


def test_the_table_names_what_was_measured_after_tuning() -> None:
    tuning = {"task": "spans"}
    rows = [film(accuracy=0.5), kobest("wic", num_fewshot=2), span(tuning=tuning), perplexity(tuning={"task": "mine"})]
    printed = results_table(EvaluationResults("", rows, [span(f1=80.0, tuning=tuning)]))
    assert [re.split(" {2,}", line)[:2] for line in printed.splitlines()[1:]] == [
        ["perplexity, after mine tuning", "perplexity"],
        ["perplexity, after mine tuning", "bits_per_byte"],
        ["KoBEST WiC, 2-shot", "acc"],
        ["KoBEST WiC, 2-shot", "f1"],
        ["film_1, 10-shot", "accuracy"],
        ["span, after spans tuning", "f1"],
    ]
    assert re.search(r"span, after spans tuning +f1 +80.0000 +75.0000 +93.8%", printed)


def test_what_was_not_measured_has_no_row() -> None:
    assert result_rows(None) == [] and result_rows(EvaluationResults("")) == []
    assert [row.metric for row in result_rows(EvaluationResults("", [kobest("copa")]))] == ["acc", "f1"]


def test_second_measurement_of_one_name_and_shots_is_refused(tmp_path: Path) -> None:
    refused(edit(tmp_path, "sparse", [asdict(perplexity()), asdict(perplexity(10.0))]), r"sparse\[1\]")


def test_newer_schema_is_refused_before_its_fields(tmp_path: Path) -> None:
    make_results().save(tmp_path)
    path = tmp_path / RESULTS_NAME
    newer = {**json.loads(path.read_text(encoding="utf-8")), "schema_version": SCHEMA_VERSION + 1, "new": 1}
    path.write_text(json.dumps(newer), encoding="utf-8")
    refused(path, "schema_version=3 is newer than 2: upgrade")


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_half_written(before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if before:
        make_results().save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    foreign, unknown = replace(make_results(), fingerprint="4567"), replace(make_results(), fingerprint="4567")
    foreign.dense_model = os.fsdecode(b"model\xff")
    unknown.sparse[0].metrics["perplexity"] = {1, 2}  # JSON has no sets
    for results, error in ((foreign, UnicodeEncodeError), (unknown, TypeError)):
        with pytest.raises(error):
            results.save(tmp_path)
    monkeypatch.setattr("optimum_ksparse.checkpoint.staging.disk.os.fsync", Mock(side_effect=OSError))  # a full disk
    with pytest.raises(OSError):
        replace(make_results(), fingerprint="4567").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.processes
def test_processes_that_write_different_rows_lose_none(tmp_path: Path) -> None:
    children = []
    for name in range(2):
        children.append(os.fork())
        if not children[-1]:
            try:
                results = EvaluationResults("0123")
                for shots in range(6):
                    results.add("sparse", kobest(("copa", "boolq")[name], num_fewshot=shots))
                    results.save(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    keys = {row.key[:2] for row in EvaluationResults.load(tmp_path / RESULTS_NAME).sparse}
    assert keys == {(name, shots) for name in ("copa", "boolq") for shots in range(6)}
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_NAME]


def test_rows_of_other_weights_and_rows_that_were_taken_out_do_not_come_back(tmp_path: Path) -> None:
    EvaluationResults("4567", sparse=[kobest()]).save(tmp_path)
    results = EvaluationResults("0123", sparse=[perplexity()])
    results.save(tmp_path)
    assert EvaluationResults.load(tmp_path / RESULTS_NAME).sparse == [perplexity()]
    results.sparse[:] = [kobest()]
    results.save(tmp_path)
    assert EvaluationResults.load(tmp_path / RESULTS_NAME).sparse == [kobest()]


def test_infinite_perplexity_is_null(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    row = evaluate_perplexity(model, tokenizer, sample_texts("evaluation")[:1], seq_len=16)
    found = Measurement.from_row("perplexity", row)
    assert row["perplexity"] == math.inf
    assert found.metrics == {"perplexity": None, "bits_per_byte": row["bits_per_byte"]}
    assert reload(EvaluationResults("", [found]), tmp_path).sparse == [found]
    assert "Infinity" not in (tmp_path / RESULTS_NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["hellaswag"])
def test_row_of_evaluate_kobest_is_sorted_whole(
    task: str, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    texts = sample_texts("evaluation")
    fields = ["sentence"] if task == "sentineg" else ["context", "ending_1", "ending_2", "ending_3", "ending_4"]
    items = [{**{name: texts[j][i : i + 10] for j, name in enumerate(fields)}, "label": i % 2} for i in range(3)]
    (tmp_path / task).mkdir()
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (tmp_path / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    model = make_model(max_position_embeddings=512)
    row = evaluate_kobest(model, tokenizer, tasks=[task], num_fewshot=1, limit=2, data_dir=tmp_path)[task]
    found = Measurement.from_row(task, row)
    assert found.metrics.keys() == {"acc", "acc_stderr", "f1"} | ({"acc_norm"} if task == "hellaswag" else set())
    assert found.metrics | found.protocol | found.environment == row
    assert found.num_fewshot == 1
    assert reload(EvaluationResults("", [found]), tmp_path).sparse == [found]


@pytest.mark.parametrize(
    "change", [{"limit": 5}, {"dtype": "bfloat16", "num_fewshot": 2}, {"data": {"name": "x"}}, {}]
)
def test_differences_are_of_the_protocol(change: dict[str, Any]) -> None:
    ours, other = kobest(), kobest(f1=0.75, **change)
    other.environment["device"] = "NVIDIA H100"
    assert {*ours.differences(other)} == {*other.differences(ours)} == change.keys()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, True),
        ({"seq_len": 16, "stride": None, "dtype": "float32"}, True),
        ({"seq_len": 32}, False),
        ({"stride": 8}, False),
        ({"dtype": "bfloat16"}, False),
        ({"texts": {"texts": 2, "sha256": "ab"}}, True),
        ({"texts": {"texts": 2}}, True),
        ({"texts": {"texts": 2, "sha256": "cd"}}, False),
        ({"texts": {"name": "kowiki"}}, False),
        ({"limit": 5}, False),
    ],
)
def test_follows_a_request_that_asks_for_a_part(request_: dict[str, Any], expected: bool) -> None:
    assert perplexity().follows(request_) is expected


def test_each_measurement_is_paired_with_the_most_similar_of_its_name() -> None:
    results = EvaluationResults(
        "",
        sparse=[kobest("copa"), kobest("copa", num_fewshot=5), kobest("wic"), perplexity()],
        dense=[
            kobest("copa", num_fewshot=5),
            kobest("copa", num_fewshot=2, limit=50),
            kobest("boolq"),
            perplexity(10.0, seq_len=32),
        ],
    )
    (zero, five, wic, ours), (dense_five, dense_two, boolq, theirs) = results.sparse, results.dense
    paired = [(zero, dense_five), (five, dense_five), (wic, None), (ours, theirs)]
    assert results.pairs() == [*paired, (None, dense_two), (None, boolq)]
    assert zero.differences(dense_five) == ["num_fewshot"]
    dense_zero = kobest("copa", f1=0.25)
    results.add("dense", dense_zero)
    assert results.pairs()[:2] == [(zero, dense_zero), (five, dense_five)]


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "expected"),
    [
        ("f1", 0.25, 0.5, 0.5),
        ("f1", 0.5, 0.0, None),
        ("f1", 0.0, 0.5, 0.0),
        ("perplexity", 20.0, 10.0, 0.5),
        ("perplexity", None, 10.0, 0.0),  # null is an infinite perplexity
        ("perplexity", 10.0, None, None),
        ("acc_norm", 0.5, 0.5, None),
    ],
)
def test_recovered_is_the_share_of_the_dense_figure(
    metric: str, ours: float | None, theirs: float | None, expected: float | None
) -> None:
    make = perplexity if metric == "perplexity" else kobest
    sparse, dense = make(), make()
    if metric != "acc_norm":
        sparse.metrics[metric], dense.metrics[metric] = ours, theirs
    assert sparse.recovered(metric, dense) == expected


def test_comparable_are_the_pairs_of_one_protocol() -> None:
    results = make_results()
    assert results.comparable() == [(results.sparse[0], results.dense[0])]
    results.add("dense", kobest("hellaswag", limit=5))
    assert len(results.comparable()) == 1
    results.add("dense", kobest("hellaswag", f1=0.25))
    assert results.comparable()[1] == (results.sparse[1], results.dense[-1])


@pytest.mark.parametrize("part", ["sparse", "dense"])
def test_mean_f1_is_of_the_four_tasks_of_the_study(part: str) -> None:
    results = EvaluationResults("")
    for number, task in enumerate(STUDY_TASKS):
        assert results.mean_f1(part) is None
        results.add(part, kobest(task, f1=number / 4))
        results.add(part, kobest(task, f1=1.0, num_fewshot=5))
    results.add(part, kobest("wic", f1=0.9))
    results.add(part, perplexity())
    assert results.mean_f1(part) == 0.375
    assert results.mean_f1(part, 5) == 1.0
    assert results.mean_f1(part, 2) is None
    assert results.mean_f1("dense" if part == "sparse" else "sparse") is None


@pytest.mark.parametrize(
    "change", [{"limit": 5}, {"split": "validation"}, {"dtype": "float16"}, {"prepend_bos": True}]
)
def test_mean_f1_is_not_of_tasks_measured_in_several_ways(change: dict[str, Any]) -> None:
    results = EvaluationResults("", [kobest(task) for task in KOBEST_TASKS])
    assert results.mean_f1("sparse") == 0.5
    results.add("sparse", kobest("wic", **change))  # which is not in the mean
    assert results.mean_f1("sparse") == 0.5
    results.add("sparse", kobest("boolq", **change))
    assert results.mean_f1("sparse") is None


def test_add_takes_the_place_of_the_same_name_and_shots() -> None:
    results = EvaluationResults("")
    for row in (kobest(), kobest(num_fewshot=5), kobest("wic"), perplexity()):
        results.add("sparse", row)
    later = [kobest(f1=0.75, limit=5), perplexity(9.0, seq_len=32)]
    for row in later:
        results.add("sparse", row)
    assert len(results.sparse) == 4
    assert all(row in results.sparse for row in (*later, kobest(num_fewshot=5), kobest("wic")))
    assert not results.dense


def test_rows_after_tuning_are_taken_over_from_a_model_tuned_from_these_weights():
    row = span(tuning={"task": "korquad", "r": 8})
    tuned, results = EvaluationResults("a" * 64), EvaluationResults("a" * 64)
    tuned.add("sparse", row)
    results.take_tuned(tuned)
    assert results.sparse == [row] and results.sparse[0] is not row
    with pytest.raises(ValueError, match="other weights"):
        EvaluationResults("b" * 64).take_tuned(tuned)
    with pytest.raises(ValueError, match="nothing from after tuning"):
        results.take_tuned(EvaluationResults("a" * 64))
