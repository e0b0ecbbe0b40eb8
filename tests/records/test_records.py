"""Records: what a damaged or hostile file of a checkpoint can do."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.adapters.report import MergedLayer, MergeReport
from optimum_ksparse.api.inspection import inspect_checkpoint
from optimum_ksparse.evaluation import EvaluationResults, recorded_baseline, results_table
from optimum_ksparse.hub.card import render_card
from optimum_ksparse.hub.figures import draw_figures
from optimum_ksparse.hub.sources import choose_tokenizer
from optimum_ksparse.records import (
    REPORT_NAME,
    RESULTS_NAME,
    Share,
    Version,
    printable,
    read_record,
    recorded_repository,
    to_json,
)
from optimum_ksparse.records.files import read_json
from optimum_ksparse.report import BlockReport, Change, LayerReport

from ..hub.subjects import make_report, make_results, make_subject

# Of every type that JSON has, of no finite size, with what a terminal obeys, and paths.
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 0.5, 1e300, math.nan, "", "x\x1b[2J\x9b\u202e\ud800", "2:4"),
    *([], [1], ["x"], {}, {"x": 1}, {"name": []}, {"task": []}),
)


def full_report() -> SparsityReport:
    """A report in which every field holds something."""
    report = make_report("sparsegpt", refine=["swaps"], reconstruct="block", allocation="owl", target_density=0.6)
    report.layers[0].note, report.layers[0].sensitivity = "damping raised", 0.25
    report.reconstruction = [BlockReport(0, 0.5, 0.25, 1.0, "overfitted")]
    report.base_arguments = {"gguf_file": "model.gguf", "subfolder": "a/b"}
    report.changes = [Change("merged", "solve", "kowiki", 3, 0.5, ["LORA"])]
    report.source_fingerprint, report.peak_memory_bytes = "00", {"process": 10**9}
    return report


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a value of JSON; of equal items of a list the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else ())
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_value(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return changed


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in re.sub("[\N{WORD JOINER}\N{NO-BREAK SPACE}]", "", text))


def reads(kind: Any, path: Path, record: Any, place: tuple[Any, ...]) -> Any:
    """What a file with this record gives; None where it is refused by its name and the field's."""
    path.write_text(json.dumps(record), encoding="utf-8")
    try:
        return kind.load(path)
    except ValueError as error:
        fields = [str(key) for key in place if isinstance(key, str)]
        assert path.name in str(error) and any(name in str(error) for name in fields), (place, str(error))
        assert harmless(str(error))
        return None


@pytest.mark.slow
def test_a_report_with_any_field_changed_is_refused_by_name_or_printed_and_shown(tmp_path: Path) -> None:
    good, taken = asdict(full_report()), 0
    for place in places(good):
        for value in HOSTILE:
            report = reads(SparsityReport, tmp_path / REPORT_NAME, with_value(good, place, value), place)
            if report is not None:
                taken += 1
                assert harmless(str(report)), (place, value)
                if taken % 3 == 0:  # which takes ten times as long
                    assert harmless(render_card(make_subject(report), ("en", "ko")[taken % 2])), (place, value)
    assert taken > 20


NINES = [f"layers.{'9' * digits}.q" for digits in (5000, 400)]


@pytest.mark.parametrize(
    ("name", "error"),
    [("", 0), ("$x_{$", 1e300), (NINES[0], 5e-324), (NINES[1], 0), ("가\n나", 1e300), ("", 5e-324)],
)
def test_figures_of_anything_that_is_read(name: str, error: float, tmp_path: Path) -> None:
    report = make_report()
    report.layers[0].name, report.layers[0].relative_output_error = name, error
    report.save(tmp_path)
    assert any(draw_figures(tmp_path, SparsityReport.load(tmp_path / REPORT_NAME), None).values())


@pytest.mark.slow
def test_results_with_any_field_changed_are_refused_by_name_or_shown(tmp_path: Path) -> None:
    results = make_results()
    del results.sparse[2:], results.dense[2:]
    good, taken = asdict(results), 0
    for place in places(good):
        for value in HOSTILE:
            results = reads(EvaluationResults, tmp_path / RESULTS_NAME, with_value(good, place, value), place)
            if results is not None:
                assert harmless(results_table(results)), (place, value)
                taken += 1
                if taken % 3 == 0:
                    assert harmless(render_card(make_subject(results=results))), (place, value)
    assert taken > 20


@pytest.mark.slow
def test_a_report_of_merging_with_any_field_changed(tmp_path: Path) -> None:
    layer = MergedLayer("layers.0.q", (8, 16), 64, "masked", 0.25, 1.0000001, 0.5)
    report = MergeReport("solve", [{"name": "default", "peft_type": "LORA", "r": 8}], {}, [layer], ["lm_head"])
    report.save(tmp_path)
    path = tmp_path / "merge_report.json"
    assert MergeReport.load(path) == report
    good = json.loads(path.read_text(encoding="utf-8"))
    for place in places(good):
        for value in HOSTILE:
            found = reads(MergeReport, path, with_value(good, place, value), place)
            if found is not None:
                assert harmless(str(found)), (place, value)
                assert harmless(render_card(make_subject(merge=found))), (place, value)


@dataclass
class Inner:
    share: Share
    pair: tuple[int, str] | None = None


@dataclass
class Outer:
    version: Annotated[int, Version(2)]
    inner: list[Inner]
    names: dict[str, int | list[str]] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"version": 2, "inner": [{"share": 1}, {"share": 2}]}, r"inner\[1\].share is 2, must be from 0.0 to 1.0"),
        ({"version": 2, "inner": [{"share": 1, "pair": [1, 2]}]}, r"inner\[0\].pair\[1\] is 2, must be str"),
        ({"version": 2, "inner": [{"share": 1, "pair": [1]}]}, r"inner\[0\].pair is \[1\], must be list of 2"),
        ({"version": 2, "inner": [], "names": {"a": [1]}}, r"names.a\[0\] is 1, must be str"),
        ({"version": 2, "inner": [{}]}, r"inner\[0\].share is missing"),
        ({"version": 2, "inner": [], "inne": 1}, "has no setting 'inne': did you mean 'inner'"),
        ({"version": 3, "inner": 5, "more": 1}, "version=3 is newer than 2: upgrade"),
        ({"version": 2, "inner": [{"share": math.nan}]}, r"inner\[0\].share is nan, must be finite"),
        ([], r"it is \[\], must be object"),
    ],
)
def test_the_field_is_named(record: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"^x.json is damaged: .*{message}"):
        read_record(Outer, tmp_path / "x.json", "is damaged")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000, "\udcff"])
def test_files_that_would_break_a_reader(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="x.json is damaged"):
        read_record(Outer, tmp_path / "x.json", "is damaged")


def test_a_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_ksparse.records.files._MOST_BYTES", 10)
    (tmp_path / "x.json").write_text("[" + " " * 20 + "]")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_record(Outer, tmp_path / "x.json", "is damaged")


def test_foreign_text_is_one_harmless_line() -> None:
    assert printable("a\x1b]0;title\x07\nb\u202e\x9b2J \ud800c\U000e0041") == "a]0;title b2J c"


@pytest.mark.parametrize("text", ['{"a": 1, "b": {"c": 2, "c": 3}}', f'["{"x" * 2**18}"]', "[" * 10**5, '{"a": '])
def test_files_that_no_program_of_ours_wrote(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_what_is_not_json_becomes_null() -> None:
    assert to_json({"a": [math.nan, math.inf, 1.5]}, indent=None) == '{"a": [null, null, 1.5]}\n'
    row = LayerReport("q", (8, 16), "2:4", 64, 1, 1, math.nan, 0.5, "damping raised")
    assert row.relative_output_error is None and row.note.startswith("damping raised; the output error could not be")
    assert MergedLayer("q", (8, 16), 64, "masked", math.inf, math.nan, 0.5).note
    assert BlockReport(0, math.nan, 1.0, 0.5).loss_after is None


def test_outputs_that_overflow_leave_a_report_that_is_json(make_model: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e20
    model.model.layers[0].mlp.up_proj.weight.data *= 1e10
    report = sparsify(model, SparsityConfig("wanda", dataset=[[1, 2, 3, 4, 5, 6, 7, 8]] * 4))
    assert any(row.relative_output_error is None and "overflow" in row.note for row in report.layers)
    report.save(tmp_path)
    assert "NaN" not in (tmp_path / REPORT_NAME).read_text(encoding="utf-8")
    assert SparsityReport.load(tmp_path / REPORT_NAME) == report


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", dataset=None))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def edit_settings(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit(folder / "config.json", quantization_config={**config["quantization_config"], **values})


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: True} for name in ("trust_remote_code", "token", "weights_only", "force_download")),
        *({name: "/tmp"} for name in ("cache_dir", "custom_generate", "code_revision", "proxies")),
        *({"subfolder": path} for path in ("../x", "/etc", "a/../../x", "C:x", "a\\..\\b", "", "~/x", "a\0b/..", 5)),
        *({"gguf_file": path} for path in ("../x.gguf", "/x.gguf", ["x"])),
    ],
)
def test_a_report_says_nothing_else_of_how_to_load(arguments: dict[str, Any], saved: Path, caplog: Any) -> None:
    edit(saved / REPORT_NAME, base_model="saved", base_arguments=arguments)
    with pytest.raises(ValueError, match="base_arguments"):
        SparsityReport.load(saved / REPORT_NAME)


def test_code_of_a_checkpoint_does_not_run(saved: Path, tmp_path: Path) -> None:
    """A report that trusts the code beside it, and a tokenizer that needs it."""
    edit(saved / REPORT_NAME, base_model="saved", base_arguments={"trust_remote_code": True})
    edit(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tok"]}, tokenizer_class="Tok")
    ran = tmp_path / "ran"
    (saved / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Tok\n", encoding="utf-8"
    )
    model = AutoModelForCausalLM.from_pretrained(saved)
    try:
        choose_tokenizer(model, None)
    except ValueError:
        pass
    assert not ran.exists()


@pytest.mark.parametrize("form", ["absolute", "relative", "like a repository"])
def test_the_base_that_a_report_names_is_never_a_folder_here(
    form: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = {"absolute": str(tmp_path / "org/base"), "relative": "../" + tmp_path.name, "like a repository": "org/base"}
    edit(saved / REPORT_NAME, base_model=name[form], base_revision="main")
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.sparsity_report.base_model == name[form]
    with pytest.raises(ValueError, match="baseline="):
        recorded_baseline(model)
    assert recorded_repository(name[form], "main") is None


def test_a_base_on_the_hub_is_named_before_it_is_loaded(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(saved / REPORT_NAME, base_model="org/base", base_revision="0" * 40)
    model = AutoModelForCausalLM.from_pretrained(saved)
    with caplog.at_level(logging.WARNING):
        assert recorded_baseline(model).source == "org/base"
    assert "org/base at commit 000" in caplog.text


@pytest.mark.parametrize("where", ["tokenizer", "base_model"])
def test_a_tokenizer_that_files_name_is_not_looked_for(where: str, saved: Path, monkeypatch: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    if where == "tokenizer":
        edit_settings(saved, tokenizer="org/tokenizer")
    else:
        edit(saved / REPORT_NAME, base_model="org/tokenizer", base_revision="main")
    asked: list[str] = []
    monkeypatch.setattr("optimum_ksparse.hub.sources.read_tokenizer", lambda name, **_: asked.append(name) or fail())
    with pytest.raises(ValueError, match=r"no tokenizer was found.*the checkpoint names 'org/tokenizer'\)$"):
        choose_tokenizer(AutoModelForCausalLM.from_pretrained(saved), None)
    assert asked == [str(saved)]


def fail() -> None:
    raise OSError("none")


@pytest.mark.parametrize("form", ["path", "mix", "recorded mix", "hidden mix"])
def test_the_calibration_file_that_a_config_names_is_not_opened(form: str, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("비밀")
    for name in ("private.txt", "nothing.txt"):
        path = str(tmp_path / name)
        inside = {"recorded mix": path, "hidden mix": {path: 0.5, "sha256": 0.5}}
        record = {"mix": [{"dataset": inside.get(form), "weight": 1.0}]}
        edit_settings(saved, method="wanda", dataset={"path": path, "mix": {path: 1.0}}.get(form, record))
        with pytest.raises(ValueError, match=r"dataset.*(is not opened|no part of a mix)"):
            AutoModelForCausalLM.from_pretrained(saved)
    assert (
        SparsityConfig(pattern="2:4", dataset=tmp_path / "private.txt").to_dict()["dataset"]["file"] == "private.txt"
    )


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["x"], "layers is .*must be object"),
        ({"layers.0.mlp.up_proj": "2:4"}, "up_proj is '2:4', must be object"),
        ({"layers.0.mlp.up_proj": {"pattern": 7.5, "num_values": 1}}, "up_proj.pattern is 7.5, must be str"),
        ({"layers.0.mlp.up_proj": {"pattern": "2:4", "num_values": -1}}, "num_values is -1, must be at least 0"),
        ({"layers.0.mlp.up_proj": {"pattern": "2:4", "num_values": 1, "x": 1}}, "has no setting 'x'"),
    ],
)
def test_recorded_layers_of_another_type_are_named(storage: str, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityConfig.from_dict({**SparsityConfig("magnitude", "2:4", storage=storage).to_dict(), "layers": layers})


@pytest.mark.parametrize("key", ["quantization_config", "ksparse"])
def test_settings_of_a_config_that_are_no_object_or_nested(key: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    for value in (["x"], 5, nested(100)):
        (saved / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=key):
            inspect_checkpoint(saved)
        with pytest.raises(ValueError, match=key):
            prune_checkpoint(saved, saved.parent / "out", SparsityConfig("magnitude", "2:4"))


def test_a_summary_of_settings_that_cannot_be(saved: Path) -> None:
    for values in ({"layers": ["x"]}, {"layers": {"a": {}}}, {"pattern": []}, {"modules_to_not_convert": nested(100)}):
        edit_settings(saved, **values)
        with pytest.raises(ValueError, match="layers|pattern|nested"):
            inspect_checkpoint(saved)


def test_a_folder_without_a_model_has_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        inspect_checkpoint(tmp_path)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": [value]}
    return value


@pytest.mark.parametrize("value", [*HOSTILE, nested(100)], ids=lambda value: repr(value)[:20])
def test_any_recorded_setting_is_taken_or_named(value: Any) -> None:
    good = SparsityConfig("sparsegpt").to_dict()
    for name in good:
        try:
            config = SparsityConfig.from_dict({**good, name: value})
        except ValueError as error:
            assert name in str(error) or "nested" in str(error), (name, str(error))
            assert harmless(str(error))
        else:
            assert harmless(str(config.to_dict()))


def test_what_info_prints_of_a_checkpoint_is_harmless(saved: Path) -> None:
    edit_settings(saved, modules_to_not_convert=["x\x1b[2J"])
    report = json.loads((saved / REPORT_NAME).read_text(encoding="utf-8"))
    report["layers"][0]["name"] = report["layers"][0]["note"] = "x\x1b]0;title\x07\nleft dense: everything"
    edit(saved / REPORT_NAME, **report)
    text = str(inspect_checkpoint(saved))
    assert harmless(text) and "\nleft dense" not in text


def test_a_damaged_report_is_a_warning_at_loading(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(saved / REPORT_NAME, config=[])
    with caplog.at_level(logging.WARNING):
        assert getattr(AutoModelForCausalLM.from_pretrained(saved), "sparsity_report", None) is None
    assert f"{REPORT_NAME} is not a report of optimum-ksparse: config is [], must be object" in caplog.text
    with pytest.raises(ValueError, match="config is"):
        inspect_checkpoint(saved)
