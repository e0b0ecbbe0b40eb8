"""`SparsityReport`: saved, loaded and printed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse import SparsityReport
from optimum_ksparse.records import REPORT_NAME
from optimum_ksparse.report import SCHEMA_VERSION, LayerReport


def make_layer(name="layers.0.q_proj", shape=(8, 16), num_values=64, error=0.25, note=""):
    return LayerReport(name, shape, "2:4", num_values, 256, 144, error, 0.5, note)


@pytest.fixture
def report():
    return SparsityReport(
        config={"method": "wanda", "pattern": "2:4", "dataset": {"texts": 2, "sha256": "00"}},
        calibration={
            "dataset": {"texts": 2, "sha256": "00"},
            "form": "crops",
            "num_samples": 2,
            "seq_len": 24,
            "seed": 0,
            "begins_with_bos": False,
            "bos_in_statistics": True,
        },
        layers=[
            make_layer("layers.0.q_proj", error=0.25),
            make_layer("layers.0.up_proj", (32, 16), 256, 0.125, "damping raised"),
            make_layer("layers.1.q_proj", error=0.75),
            make_layer("layers.1.up_proj", (32, 16), 256, None),
        ],
        skipped={"layers.0.down_proj": "15 input features, 한글"},
        base_model="polyglot",
        num_parameters=12345,
        seconds=1.5,
        peak_memory_bytes={"process": 10**9},
        versions={"torch": "2.11"},
    )


def test_totals(report):
    assert report.num_weights == 2 * 8 * 16 + 2 * 32 * 16
    assert report.density == 0.5
    assert report.dense_bytes == 4 * 256
    assert report.packed_bytes == 4 * 144
    assert report.layers[0].density == 0.5


def test_save_and_load(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / REPORT_NAME).read_text(encoding="utf-8")
    assert "한글" in text
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    loaded = SparsityReport.load(tmp_path / REPORT_NAME)
    assert loaded == report
    assert loaded.layers[0].shape == (8, 16)
    assert str(loaded) == str(report)


# What is read holds no control characters.
texts = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=9)
layers_drawn = st.builds(
    LayerReport,
    name=texts,
    shape=st.tuples(st.integers(10, 10**6), st.integers(10, 10**6)),
    pattern=st.sampled_from(["2:4", "50%"]),
    num_values=st.integers(0, 100),
    dense_bytes=st.integers(0, 10**12),
    packed_bytes=st.integers(0, 10**12),
    relative_output_error=st.none() | st.floats(0, 10),
    seconds=st.floats(0, 1e6),
    note=texts,
)


@given(st.lists(layers_drawn, max_size=4), st.dictionaries(texts, texts, max_size=3))
@settings(max_examples=50)
def test_any_report_is_loaded_as_it_was_saved_and_printed(tmp_path_factory, layers, skipped):
    folder = tmp_path_factory.mktemp("report")
    report = SparsityReport(config={"pattern": "2:4"}, layers=layers, skipped=skipped)
    report.save(folder)
    assert SparsityReport.load(folder / REPORT_NAME) == report
    assert f"{len(layers)} sparse layers" in str(report)


def test_table_has_a_row_for_each_kind_and_the_totals(report):
    header, q_proj, up_proj, totals, skipped, note = str(report).splitlines()
    assert header.split("  ")[0] == "layer"
    assert q_proj.split() == ["layers.*.q_proj", "2", "8", "x", "16", "2:4", "0.5000", "0.5000", "1.0"]
    assert up_proj.split() == ["layers.*.up_proj", "2", "32", "x", "16", "2:4", "0.5000", "0.1250", "1.0"]
    assert totals == (
        "4 sparse layers, density 0.5000; 1,280 of 12,345 parameters; packed 576 of 1,024 bytes (0.5625), "
        "3.60 bits a weight"
    )
    assert skipped == "left dense: layers.0.down_proj: 15 input features, 한글"
    assert note == "note: layers.0.up_proj: damping raised"


def test_layers_of_another_shape_or_pattern_have_their_own_row():
    layers = [make_layer("h.0.c_attn"), make_layer("h.1.c_attn", (4, 32)), make_layer("h.2.c_attn")]
    layers[2].pattern = "4:8"
    rows = str(SparsityReport(config={}, layers=layers)).splitlines()[1:-1]
    assert [row.split()[:2] for row in rows] == [["h.*.c_attn", "1"]] * 3


def test_a_report_without_figures_is_printed():
    assert "not measured" in str(SparsityReport(config={}, layers=[make_layer(error=None)]))
    assert "0 sparse layers, density 0.0000" in str(SparsityReport(config={}))


def change(report, tmp_path, **values):
    report.save(tmp_path)
    path = tmp_path / REPORT_NAME
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    return path


def test_a_damaged_file_is_refused(report, tmp_path):
    whole = change(report, tmp_path).read_bytes()
    damaged = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"schema_version": "1"}',
        b"\xff\xfe\x00",
        whole[:-40],
    ]
    for layers in (None, 5, [5], [{}], [{"shape": 5}], [{"name": "q", "shape": [1, 2]}]):
        damaged.append(change(report, tmp_path, layers=layers).read_bytes())
    for content in damaged:
        (tmp_path / REPORT_NAME).write_bytes(content)
        with pytest.raises(ValueError, match="sparsity_report.json is not a report") as error:
            SparsityReport.load(tmp_path / REPORT_NAME)
        assert str(tmp_path) not in str(error.value)


def test_a_newer_schema_is_refused(report, tmp_path):
    path = change(report, tmp_path, schema_version=SCHEMA_VERSION + 1, something_new=1)
    with pytest.raises(ValueError, match="schema_version"):
        SparsityReport.load(path)


def test_an_unknown_key_is_refused_and_the_nearest_named(report, tmp_path):
    with pytest.raises(ValueError, match="'layers'"):
        SparsityReport.load(change(report, tmp_path, layer=[]))
    report.save(tmp_path)
    layer = json.loads((tmp_path / REPORT_NAME).read_text(encoding="utf-8"))["layers"][0]
    with pytest.raises(ValueError, match="colour"):
        SparsityReport.load(change(report, tmp_path, layers=[{**layer, "colour": "red"}]))


def test_a_missing_file_is_named_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        SparsityReport.load(tmp_path / REPORT_NAME)
