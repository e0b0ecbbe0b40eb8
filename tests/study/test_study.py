"""Studies: the grid, identities, what runs again and what does not, what cuts a study off, tables and figures.

Most cells run in this process, or are a script that makes figures up, which takes no time; one study has real
processes."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparsityConfig, evaluate_perplexity
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.study import (
    CellResult,
    Recipe,
    StudyResults,
    grid,
    load_study,
    markdown,
    run_study,
    spread,
    tabulate_study,
    write_figures,
    write_study,
    write_tables,
)
from optimum_ksparse.study import cell as cell_module
from optimum_ksparse.study import processes as processes_module
from optimum_ksparse.study import run as run_module
from optimum_ksparse.study.drawing import draw_points
from optimum_ksparse.study.files import read_stages
from optimum_ksparse.study.grid import identity_of
from optimum_ksparse.study.record import Record

from ..conftest import REPOSITORY, held_by_another, make_config, sample_texts
from ..records.test_records import places, with_value

torch.set_num_threads(1)

LIFELINE = REPOSITORY / "optimum_ksparse/study/lifeline.py"
# A cell that makes its figure up. It fails where `fail` holds its id, and waits for ever where `wait` does.
FAKE_CELL = f"""
import json, os, runpy, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
(folder / "pid").write_text(str(os.getpid()))
runpy.run_path({str(LIFELINE)!r})["end_with_parent"]()
if Path("fail").exists() and job["id"] in Path("fail").read_text():
    print("  0%|    | 0/2 [00:00<?, ?it/s]\\rValueError: made to fail")
    sys.exit(3)
if Path("wait").exists() and job["id"] in Path("wait").read_text():
    time.sleep(600)
protocol = {{"stride": None, "max_tokens": None, "texts": {{"file": "held.txt", "sha256": "ab"}}, "dtype": "float32"}}
protocol |= {{"seq_len": 32, "num_windows": 1, "num_tokens": 31, "num_bytes": 9, "prepend_bos": False}}
figures = {{"perplexity": 10.0 + (job["settings"] or {{}}).get("seed", 0), "bits_per_byte": 1.0}}
row = {{"name": "perplexity", "metrics": figures}}
row |= {{"protocol": protocol, "environment": {{"device": "cpu", "batch_size": 1, "versions": {{}}}}}}
report = {{"density": 0.5, "mean_output_error": None}}
pruning = {{"seconds": 2.0, "peak_memory_bytes": {{"process": 10**9}}, "calibration": {{}}, "report": report}}
result = {{"id": job["id"], "identity": job["identity"], "measurements": [row], "seconds": {{}}}}
result |= dict(pruning=pruning if job["settings"] else None, peak_memory_bytes={{}}, hardware={{}}, versions={{}})
(folder / "result.new").write_text(json.dumps(result))
os.replace(folder / "result.new", folder / "result.json")
(folder / "job.json").unlink()
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama"))
    with torch.no_grad():  # far from uniform, so that pruning it makes a difference
        for parameter in model.parameters():
            parameter *= 8
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")
    (folder / "held.txt").write_text("\n\n".join(sample_texts("evaluation")), encoding="utf-8")
    (folder / "fake_cell.py").write_text(FAKE_CELL, encoding="utf-8")
    return folder


@pytest.fixture
def workplace(model_folder, tmp_path, monkeypatch) -> Path:
    """The working directory: a dense model and texts."""
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def faked(workplace, monkeypatch) -> Path:
    """The same, and cells are made up; no figures are drawn."""
    command = [sys.executable, "-S", "-E", str(workplace / "fake_cell.py")]
    monkeypatch.setattr(processes_module, "CELL_COMMAND", command)
    monkeypatch.setattr(run_module, "write_figures", lambda *_: None)
    return workplace


@pytest.fixture
def in_process(workplace, monkeypatch) -> list[str]:
    """Cells run here; the ids of those that did."""
    ran: list[str] = []

    def run_cells(folders, processes, ended):
        for folder in folders:
            ran.append(folder.name)
            cell_module.run_cell(folder)
            ended(folder, 0)

    monkeypatch.setattr(run_module, "run_cells", run_cells)
    return ran


def settings(**changes: Any) -> dict[str, Any]:
    found = {
        "model": "dense",
        "output": "out",
        "methods": ["wanda", "magnitude"],
        "patterns": ["50%", "2:4"],
        "calibration": [{"dataset": "text.txt", "num_samples": 4, "seq_len": 32}],
        "seeds": [0, 1],
        "evaluation": {"texts": "held.txt", "seq_len": 32, "max_tokens": 320, "tasks": "none"},
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict(settings(**changes))


def command(*arguments: str) -> int:
    """Exit status of the command, in this process."""
    return parse_words(["study", *arguments]).run()


# The recipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metods": ["wanda"]}, "the recipe has no setting 'metods': did you mean 'methods'"),
        ({"settings": {"dampng": 0.1}}, "settings has no setting 'dampng': did you mean 'damping'"),
        ({"settings": {"seed": 1}}, "settings has no setting 'seed'"),
        (
            {"methods": [{"method": "wanda", "blok_size": 8}]},
            r"methods\[0\] has no setting 'blok_size': .*'block_size'",
        ),
        ({"methods": [{"method": "wanda", "dataset": "c4"}]}, r"methods\[0\] has no setting 'dataset'"),
        ({"calibration": [{"num_sample": 3}]}, r"calibration\[0\] has no setting 'num_sample': .*'num_samples'"),
        ({"evaluation": {"text": "held.txt"}}, "evaluation has no setting 'text': did you mean 'texts'"),
        ({"korquad": {"train_fil": "x"}}, "korquad has no setting 'train_fil': did you mean 'train_file'"),
        ({"nsmc": {"koalpac": {}}}, "nsmc has no setting 'koalpac': did you mean 'koalpaca'"),
        ({"nsmc": {"koalpaca": {"max_len": 3}}}, "nsmc.koalpaca has no setting 'max_len': did you mean 'max_length'"),
        ({"published": {"perplexty": {}}}, "published has no setting 'perplexty': did you mean 'perplexity'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(workplace, changes, said):
    with pytest.raises(ValueError, match=said):
        recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "the recipe has no model"),
        ({"methods": []}, "methods is empty"),
        ({"methods": "wanda"}, "methods must be a list"),
        (
            {"methods": [{"name": "dense", "method": "wanda"}]},
            r"methods\[0\]: 'dense' is what tables call",
        ),
        ({"methods": [{"name": "x"}]}, r"methods\[0\] has no method"),
        ({"methods": ["wanda", {"name": "wanda", "method": "sparsegpt"}]}, "names of methods: 'wanda' comes twice"),
        ({"patterns": ["50%", 0.5]}, "patterns: '50%' comes twice"),
        ({"patterns": yaml.safe_load("[2:4]")}, "write it in quotes"),
        ({"patterns": ["5:4"]}, "pattern='5:4' is not a pattern"),
        ({"seeds": [0, 0]}, "seeds: 0 comes twice"),
        ({"seeds": ["0"]}, r"seeds\[0\] must be an integer"),
        ({"processes": 0}, "processes=0 is too small"),
        ({"stream": "no"}, "stream must be true or false"),
        ({"evaluation": None}, "needs one of evaluation, korquad and nsmc"),
        ({"evaluation": {"texts": "nowhere.txt"}}, "there is no such file"),
        ({"korquad": {"train_file": "nowhere.json"}}, "there is no such file"),
        ({"korquad": {"r": 0}}, "r=0 is too small"),
        ({"korquad": {"method": "masked"}}, "a study tunes the dense model alike"),
        ({"nsmc": {"koalpaca": {"method": "masked"}}}, "a study tunes the dense model alike"),
        ({"korquad": {"seq_len": "abc"}}, "seq_len must be an integer"),
        ({"korquad": {"seq_len": 8}}, "seq_len=8 has no room for a question"),
        ({"korquad": {"max_examples": "many"}}, "korquad.max_examples must be an integer"),
        ({"korquad": {"head_only": "yes"}}, "korquad.head_only must be True or False"),
        ({"nsmc": {"koalpaca": {"max_length": 1}}}, "nsmc.koalpaca.max_length=1 is too small"),
        ({"nsmc": {"koalpaca": {"max_examples": -3}}}, "nsmc.koalpaca.max_examples=-3 is too small"),
        ({"nsmc": {"koalpaca": {"data": "nowhere.json"}}}, "nowhere.json"),
        ({"dtype": "foo"}, "dtype='foo' is not known"),
        ({"nsmc": {"limit": 3}}, "nsmc.koalpaca must be settings"),
        ({"published": {"perplexity": {"2:4": "9"}}}, "published.perplexity.2:4 must be a number"),
    ],
)
def test_bad_values_are_named(workplace, changes, said):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
        recipe(**changes)


@pytest.mark.parametrize("section", ["evaluation", "korquad", "nsmc"])
def test_a_section_without_settings_is_not_taken_for_none(workplace, section):
    with pytest.raises(ValueError, match=f"{section} is empty: write {section}: {{}} for the defaults"):
        Recipe.from_dict(settings() | yaml.safe_load(f"{section}:"))


def test_texts_that_perplexity_cannot_take_are_found_before_any_work(workplace):
    Path("empty.jsonl").write_text("", encoding="utf-8")
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "ab"}]}), encoding="utf-8")
    for name, said in (("empty.jsonl", "holds no text"), ("chat.jsonl", "row 1 is a conversation")):
        with pytest.raises(ValueError, match=said):
            run_study(recipe(evaluation={"texts": name, "tasks": "none"}))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": [{"method": "wand"}]}, "cell wand, 50%, text.txt 4 x 32, seed 0: method='wand' is not known"),
        ({"methods": ["sparsegpt"], "patterns": ["3:7"]}, "cell sparsegpt, 3:7.*block_size=128 is not a multiple"),
        (
            {"calibration": [{"dataset": "self"}], "stream": True},
            "cell wanda, 50%, self 128 x 2048, seed 0: with stream",
        ),
        ({"calibration": [{"dataset": "nowhere.txt"}]}, "cell wanda.*nowhere.txt.*there is no such file"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_cell_before_any_work(workplace, changes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run_study(recipe(**changes))
    assert not Path("out").exists()


def test_recipes_in_configs_are_short_and_valid():
    paths = sorted((REPOSITORY / "configs/study").glob("*.yaml"))
    assert len(paths) == 4
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 20, path.name
        found = yaml.safe_load(text)
        cells = grid(Recipe.from_dict(found))
        assert len(cells) == 1 + len(found["methods"]) * len(found["patterns"]) * len(found["seeds"])


# The grid


@pytest.mark.parametrize("name", ["README.md", "README_ko.md"])
def test_the_recipe_in_the_readme_is_valid(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    found = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert len(grid(Recipe.from_dict(found))) == 1 + 3 * 3 * 2 * 3


def test_the_grid_has_no_cell_twice(workplace):
    twice = {"name": "again", "method": "wanda", "bos_in_statistics": True}
    cells = grid(recipe(methods=["wanda", twice, "magnitude"], seeds=[0, 1, 2]))
    assert [str(cell) for cell in cells if cell.identity.get("method") == "magnitude"] == [
        "magnitude, 50%",
        "magnitude, 2:4",
    ]
    assert len(cells) == 1 + 2 * 3 + 2
    assert len({cell.id for cell in cells}) == len(cells)
    wanda = next(cell for cell in cells if cell.identity.get("method") == "wanda")
    assert [place.method for place in wanda.places] == ["wanda", "again"]
    assert cells[0].id == "dense" and cells[0].settings is None


def test_an_identity_is_of_what_makes_the_weights(workplace):
    def of(**changes):
        return identity_of(SparsityConfig(**{"dataset": "text.txt", "method": "wanda", **changes}))

    same = of()
    shutil.copy("text.txt", "sub_text.txt")
    os.makedirs("sub")
    shutil.move("sub_text.txt", "sub/text.txt")
    assert of(dataset="sub/text.txt") == same
    for harmless in ({"batch_size": 4}, {"storage": "dense"}, {"densify": "lazy"}):
        assert of(**harmless) == same
    others = ({"seed": 1}, {"seq_len": 64}, {"num_samples": 2}, {"true_sequential": True}, {"prepend_bos": True})
    others += ({"modules_to_not_convert": ["q_proj"]}, {"pattern": "4:8"}, {"method": "sparsegpt"})
    found = [json.dumps(of(**other), sort_keys=True) for other in others]
    assert len({*found, json.dumps(same, sort_keys=True)}) == len(others) + 1
    Path("text.txt").write_text("another text", encoding="utf-8")
    assert of() != same
    assert str(workplace) not in json.dumps(same)


def test_batches_count_where_they_decide_the_weights(workplace):
    def of(**changes):
        return identity_of(SparsityConfig(**{"dataset": "text.txt", **changes}))

    assert of(method="admm", batch_size=4) == of(method="admm")
    for chosen in ({"reconstruct": "block"}, {"method": "auto"}):
        assert of(batch_size=4, **chosen) != of(**chosen)


def test_calibration_sets_are_named_by_what_they_are(workplace):
    mixes = [{"self": 0.5, "text.txt": 0.5}, {"self": 0.25, "text.txt": 0.75}, "text.txt"]
    sets = [{"dataset": data, "num_samples": 4, "seq_len": 32} for data in mixes]
    sets.append({**sets[-1], "prepend_bos": False})
    names = [entry["name"] for entry in recipe(calibration=sets).calibration]
    assert names == [
        "0.5 self + 0.5 text.txt 4 x 32",
        "0.25 self + 0.75 text.txt 4 x 32",
        "text.txt 4 x 32",
        "text.txt 4 x 32, prepend_bos=False",
    ]
    with pytest.raises(ValueError, match="comes twice; where two are to differ, give each a name of its own"):
        recipe(calibration=[sets[0], sets[0]])


def test_a_setting_that_the_method_does_not_read_makes_no_other_cell(workplace):
    more = [{"name": "damped", "method": "wanda", "damping": 0.1}, {"name": "tuned", "method": "wanda"}]
    more[1] |= {"iterations": 9, "reconstruction_epochs": 7}
    assert len(grid(recipe(methods=["wanda", *more], seeds=[0]))) == 1 + 2
    read = [{"name": "damped", "method": "sparsegpt", "damping": 0.1}]
    read.append({"name": "tuned", "method": "sparsegpt", "reconstruct": "block", "reconstruction_epochs": 7})
    assert len(grid(recipe(methods=["sparsegpt", *read], seeds=[0]))) == 1 + 3 * 2


# Running


def test_cells_hold_what_pruning_and_measuring_by_hand_give(in_process):
    results = run_study(recipe(patterns=["2:4"]), str)
    assert len(in_process) == len(set(in_process)) == 4
    tokenizer = AutoTokenizer.from_pretrained("dense")

    def by_hand(**pruning):
        config = {"sparsity_config": SparsityConfig(**pruning)} if pruning else {}
        model = AutoModelForCausalLM.from_pretrained("dense", **config)
        return evaluate_perplexity(model, tokenizer, "held.txt", seq_len=32, max_tokens=320)["perplexity"]

    data = {"dataset": "text.txt", "num_samples": 4, "seq_len": 32}
    values = [by_hand(method="wanda", pattern="2:4", seed=seed, **data) for seed in (0, 1)]
    rows = {row.method: row for row in results.rows() if row.quantity == "perplexity"}
    found = rows["wanda"].spread
    assert found.mean == pytest.approx(statistics.mean(values), rel=1e-5)
    assert found.deviation == pytest.approx(statistics.stdev(values), rel=1e-3)
    assert found.deviation > 0
    assert rows["magnitude"].spread.count == rows["magnitude"].expected == 1
    assert rows["magnitude"].spread.mean == pytest.approx(by_hand(method="magnitude", pattern="2:4"), rel=1e-5)
    assert rows["dense"].spread.mean == pytest.approx(by_hand(), rel=1e-5)

    lines = Path("out/tables.md").read_text("utf-8").split("\n")
    wanda_row = next(line for line in lines if line.startswith("| wanda | "))
    assert wanda_row.endswith(f" {found.mean:,.2f} ± {found.deviation:,.2f} |")
    cells = sorted(path.name for path in Path("out/cells").iterdir())
    assert cells == sorted(results.cells)
    for cell in cells:
        assert {path.name for path in Path("out/cells", cell).iterdir()} == {"result.json"}, "weights are deleted"
    again = load_study("out")
    assert (again.record, again.cells) == (results.record, results.cells)
    wanda = next(result for result in again.cells.values() if result.identity.get("method") == "wanda")
    assert wanda.pruning["report"]["density"] == 0.5
    assert wanda.pruning["seconds"] > 0
    assert wanda.pruning["peak_memory_bytes"]["process"] > 10**8
    files = [path for path in Path("out").rglob("*") if path.suffix in (".md", ".csv", ".json")]
    assert len(files) >= 8
    assert not any(str(Path.cwd()) in path.read_text("utf-8") for path in files), "no absolute paths"

    shutil.copytree("out/cells/dense", "streamed/cells/dense")
    streamed = run_study(recipe(methods=["wanda"], patterns=["2:4"], seeds=[0], output="streamed", stream=True), str)
    assert in_process[4:] == [wanda.id]
    assert streamed.cells[wanda.id].figures()["perplexity"] == wanda.figures()["perplexity"]


def test_a_cell_that_was_cut_off_goes_on_from_its_last_stage(in_process, monkeypatch):
    chosen = recipe(methods=["wanda"], patterns=["2:4"], seeds=[0], keep_checkpoints=True)
    measure = cell_module.evaluate_model

    def cut_off(model, *arguments, **more):
        if sparse_modules(model):
            raise KeyboardInterrupt
        return measure(model, *arguments, **more)

    monkeypatch.setattr(cell_module, "evaluate_model", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_study(chosen, str)
    assert len(load_study("out").cells) == 1, "the dense model stays measured"
    assert load_study("out").unfinished == in_process[1:]
    monkeypatch.setattr(cell_module, "evaluate_model", measure)
    pruned = []
    monkeypatch.setattr(cell_module._Run, "_prune", lambda run: pruned.append(run))
    assert len(run_study(chosen, str).cells) == 2
    assert not pruned, "it was pruned already"
    assert in_process == ["dense", in_process[1], in_process[1]]
    assert (Path("out/cells") / in_process[1] / "checkpoint/model.safetensors").is_file(), "kept"


def test_what_no_cell_has_measured_yet_may_change(in_process, monkeypatch):
    pytest.importorskip("peft", reason="needs the extra finetune")
    chosen: dict[str, Any] = {"methods": ["magnitude"], "patterns": ["2:4"], "korquad": {"max_steps": 1}}

    def cut_off(load, settings, folder):
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("wrong only here")

    monkeypatch.setattr(cell_module, "run_korquad", cut_off)
    with pytest.raises(RuntimeError, match="wrong only here"):
        run_study(recipe(**chosen), str)
    assert read_stages(Path("out/cells/dense")).keys() == {"measuring"}
    corrected = chosen | {"korquad": {"max_steps": 2}}
    with pytest.raises(ValueError, match=r"evaluation.seq_len: was 32, is 16") as refused:
        run_study(recipe(**corrected, evaluation={"texts": "held.txt", "seq_len": 16, "tasks": "none"}))
    assert "korquad" not in str(refused.value)
    assert Path("out/cells/dense/korquad").is_dir(), "what was refused has changed nothing"

    def measure(load, settings, folder):
        assert not folder.exists(), "it would have gone on with other settings"
        assert settings == {"max_steps": 2}
        return []

    monkeypatch.setattr(cell_module, "run_korquad", measure)
    said: list[str] = []
    results = run_study(recipe(**corrected), said.append)
    assert said[0].startswith("korquad is not what it was in the recipe")
    assert len(results.cells) == 2 and in_process.count("dense") == 2
    with pytest.raises(ValueError, match=r"korquad.max_steps: was 2, is 3"):
        run_study(recipe(**chosen | {"korquad": {"max_steps": 3}}))


@pytest.mark.parametrize(
    ("stage", "begun", "before", "after"),
    [
        ("_prune", "checkpoint", {"settings": {"batch_size": 2}}, {"settings": {"batch_size": 1}}),
        ("_korquad", "korquad", {"korquad": {"micro_batch_size": 4}}, {"korquad": {"micro_batch_size": 1}}),
        ("_nsmc", "koalpaca", {"nsmc": {"koalpaca": {}}}, {"nsmc": {"koalpaca": {"save_steps": 9}}}),
    ],
)
def test_settings_that_only_round_differently_take_effect_where_a_cell_failed(
    in_process, monkeypatch, stage, begun, before, after
):
    """Out of memory, then a smaller batch: the cell is the same, but what it had begun would refuse the settings."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    chosen: dict[str, Any] = {"methods": ["wanda"], "patterns": ["2:4"], "seeds": [0], "stream": True}
    found = []

    def begin(run):
        found.append((run.folder / begun).is_dir())
        (run.folder / begun).mkdir(exist_ok=True)
        raise MemoryError

    monkeypatch.setattr(cell_module._Run, stage, begin)
    for changes in (before, before, after):
        with pytest.raises(MemoryError):
            run_study(recipe(**chosen, **changes), str)
    assert found == [False, True, False], "what was begun with these very settings stays"


def test_a_changed_recipe_runs_only_what_is_new(faked):
    said: list[str] = []
    run_study(recipe(methods=["wanda"]), said.append)
    assert said == []
    times = {path.parent.name: path.stat().st_mtime_ns for path in Path("out/cells").glob("*/result.json")}
    assert len(times) == 5
    results = run_study(recipe(methods=["wanda"], patterns=["4:8", "2:4"], seeds=[0, 2]), said.append)
    assert said[0] == "2 of 5 cells are done already"
    assert said[1].startswith("new in the recipe: wanda, 4:8") and said[1].count("wanda") == 3
    assert said[2].startswith("no longer in the recipe: wanda, 50%, text.txt 4 x 32, seed 0; ")
    assert said[3].startswith("kept in cells/, but not in the tables: ")
    now = {path.parent.name: path.stat().st_mtime_ns for path in Path("out/cells").glob("*/result.json")}
    assert len(now) == 8 and times.items() <= now.items(), "what was done is not touched"
    assert len(results.left_out) == 3
    text = Path("out/tables.md").read_text(encoding="utf-8")
    assert "50%" not in text.split("Not in the recipe")[0]
    assert all(name in text for name in results.left_out)
    # They come back, unharmed.
    assert len(run_study(recipe(methods=["wanda"]), said.append).cells) == 5
    assert "5 of 5 cells are done already" in said


def test_another_model_or_protocol_is_refused_with_the_difference(faked):
    run_study(recipe(methods=["magnitude"]), str)
    before = Path("out/study.json").read_bytes()
    changed = {"texts": "held.txt", "seq_len": 16, "max_tokens": 320, "tasks": []}
    with pytest.raises(ValueError, match=r"evaluation.seq_len: was 32, is 16"):
        run_study(recipe(evaluation=changed))
    with pytest.raises(ValueError, match=r"dtype: was 'auto', is 'float16'"):
        run_study(recipe(dtype="float16"))
    with pytest.raises(ValueError, match=r"done without korquad, and their weights are gone"):
        run_study(recipe(methods=["magnitude"], korquad={}))
    shutil.copytree("dense", "moved")
    state = load_file("moved/model.safetensors")
    run_study(recipe(methods=["magnitude"], model="moved"), str)  # the same weights
    save_file({name: tensor + 1 for name, tensor in state.items()}, "moved/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: was '.*', is 'moved'|weights: was '.*', is "):
        run_study(recipe(methods=["magnitude"], model="moved"))
    Path("held.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation.texts: was "):
        run_study(recipe(methods=["magnitude"]))
    assert json.loads(before)["job"]["weights"] == json.loads(Path("out/study.json").read_bytes())["job"]["weights"]


def test_a_failed_cell_is_named_the_others_go_on_and_it_runs_again(faked, capsys):
    cells = grid(recipe())
    bad = next(cell for cell in cells if str(cell).startswith("wanda, 2:4") and cell.places[0].seed == 1)
    Path("fail").write_text(bad.id)
    Path("recipe.yaml").write_text(yaml.safe_dump(settings()), encoding="utf-8")
    assert command("recipe.yaml") == 1
    printed = capsys.readouterr()
    assert f"failed: {bad} (status 3): ValueError: made to fail" in printed.out
    assert printed.err.strip().split("\n")[-1].startswith(f"error: 1 cells failed: {bad} (cells/{bad.id}/log.txt)")
    results = load_study("out")
    assert len(results.cells) == len(cells) - 1
    assert results.failed[bad.id]["log"] == ["ValueError: made to fail"]
    text = Path("out/tables.md").read_text(encoding="utf-8")
    assert f"Failed: {bad}." in text
    assert "10.00 (n = 1) |" in text, "one of two seeds"
    Path("fail").unlink()
    assert command("recipe.yaml", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"failed   {bad}  [{bad.id}]" in printed and "6 of 7 cells are done" in printed
    assert command("recipe.yaml") == 0
    assert "runs again" in capsys.readouterr().out
    assert len(load_study("out").cells) == len(cells) and not load_study("out").failed


def test_a_study_over_something_else_is_refused(faked):
    before = sorted(path.name for path in Path("dense").iterdir())
    with pytest.raises(ValueError, match="is the source 'dense'"):
        run_study(recipe(output="dense"))
    Path("other").mkdir()
    Path("other/results.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        run_study(recipe(output="other"))
    assert sorted(path.name for path in Path("dense").iterdir()) == before
    assert [path.name for path in Path("other").iterdir()] == ["results.json"]


def test_two_studies_in_one_folder_are_refused(faked):
    Path("out").mkdir()
    with held_by_another("out/.lock"), pytest.raises(BlockingIOError, match="another study is at work in out"):
        run_study(recipe())
    assert not Path("out/study.json").exists()
    run_study(recipe(methods=["magnitude"], patterns=["2:4"]), str)
    before = Path("out/tables.md").stat().st_mtime_ns
    for write in (lambda: tabulate_study(recipe()), lambda: write_study(Path("out"))):
        with held_by_another("out/.lock"), pytest.raises(BlockingIOError, match="writes its tables as it goes"):
            write()
    assert Path("out/tables.md").stat().st_mtime_ns == before


def test_a_damaged_result_is_named(faked):
    run_study(recipe(methods=["magnitude"], patterns=["2:4"]), str)
    Path("out/cells/dense/result.json").write_text('{"id": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match="result.json of cell dense is damaged.*delete it"):
        load_study("out")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        load_study("dense")


@pytest.mark.parametrize("name", ["study.json", "result.json"])
def test_a_study_with_any_field_of_its_files_changed_is_refused_by_name_or_tabulated(faked, name):
    published = {"method": "wanda", "source": "a paper", "perplexity": {"2:4": 9.0}}
    run_study(recipe(methods=["wanda"], patterns=["2:4"], seeds=[0], published=published), str)
    path = next(path for path in sorted(Path("out").rglob(name)) if path.parent.name != "dense")
    good = json.loads(path.read_text(encoding="utf-8"))
    for place in places(good):
        for value in (None, "x", [], {"held.txt": 1.0}):
            path.write_text(json.dumps(with_value(good, place, value)), encoding="utf-8")
            try:
                results = load_study("out")
            except ValueError as error:
                fields = [key for key in place if isinstance(key, str)]
                assert path.name in str(error) and any(name in str(error) for name in fields), (place, str(error))
            else:
                assert markdown(results)


def test_a_method_without_a_cell_has_no_settings(workplace):
    results = made_up(["magnitude"], [{"num_samples": 4, "seq_len": 32}], [0], {})
    results.record.grid["methods"].append("wanda")
    assert "wanda" not in markdown(results)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def until(done) -> None:
    while not done():
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_study_leaves_no_process_and_loses_no_finished_cell(faked, number):
    first, second = [cell for cell in grid(recipe()) if cell.settings][:2]
    Path("wait").write_text(second.id)
    parent = multiprocessing.get_context("fork").Process(target=run_study, args=(recipe(), str))
    parent.start()
    folder = Path("out/cells")
    until(lambda: (folder / second.id / "pid").exists() and (folder / second.id / "pid").read_text())
    child = int((folder / second.id / "pid").read_text())
    assert alive(child)
    assert parent.pid is not None
    os.kill(parent.pid, number)
    parent.join()
    until(lambda: not alive(child))
    assert parent.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, signal.SIGINT: 1}[number]
    assert set(load_study("out").cells) == {"dense", first.id}
    assert not load_study("out").failed
    Path("wait").unlink()
    assert len(run_study(recipe(), str).cells) == 7


def test_a_killed_cell_is_the_only_one_lost(faked):
    cells = grid(recipe())
    Path("wait").write_text(cells[1].id)

    def kill() -> None:
        path = Path("out/cells") / cells[1].id / "pid"
        until(lambda: path.exists() and path.read_text() != "")
        os.kill(int(path.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results = run_study(recipe(processes=2), str)
    killer.join()
    assert list(results.failed) == [cells[1].id]
    assert results.failed[cells[1].id]["status"] == -signal.SIGKILL
    assert len(results.cells) == len(cells) - 1


def test_cells_that_run_at_once_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [processes_module._environment(slot, 3) for slot in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["0", "1", "0"]
    assert {env["OMP_NUM_THREADS"] for env in found} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes_module._environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "7"
    assert processes_module._environment(1, 2)["OMP_NUM_THREADS"] == "3"
    alone = processes_module._environment(0, 1)
    assert alone["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert alone["PYTHONPATH"].split(os.pathsep)[: len(sys.path)] == [path or os.getcwd() for path in sys.path]


def test_a_real_process(workplace, capsys, monkeypatch):
    def run_cells(folders, processes, ended):
        cell_module.run_cell(folders[0])  # the dense model, in this process: a real one takes seconds to start
        ended(folders[0], 0)
        real(folders[1:], processes, ended)

    real = run_module.run_cells
    monkeypatch.setattr(run_module, "run_cells", run_cells)
    found = settings(methods=["magnitude"], patterns=["2:4"], output="there")
    Path("recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    assert command("recipe.yaml", "--dry-run") == 0
    assert not Path("there").exists()
    printed = capsys.readouterr().out
    assert "to do    magnitude, 2:4  [magnitude-2of4-" in printed
    assert "0 of 2 cells are done" in printed
    assert command("recipe.yaml") == 0, capsys.readouterr().err
    dense, sparse = load_study("there").cells.values()
    assert dense.figures()["perplexity"] != sparse.figures()["perplexity"]
    assert dense.versions == sparse.versions
    log = Path("there/cells", sparse.id, "log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log and "RuntimeWarning" not in log
    text = Path("there/tables.md").read_bytes()
    Path("there/tables.md").unlink()
    assert command("recipe.yaml", "--tables-only", "--model", "gone") == 0
    assert Path("there/tables.md").read_bytes() == text


def test_tables_alone_have_the_grid_of_the_recipe_that_is_given(faked, capsys):
    wide = settings(methods=["magnitude", "wanda"], output="there")
    Path("wide.yaml").write_text(yaml.safe_dump(wide), encoding="utf-8")
    Path("narrow.yaml").write_text(yaml.safe_dump({**wide, "methods": ["magnitude"]}), encoding="utf-8")
    assert command("wide.yaml", "--tables-only") == 1
    assert "there holds no study" in capsys.readouterr().err
    assert command("narrow.yaml") == 0, capsys.readouterr().err
    done = len(load_study("there").cells)
    assert command("wide.yaml", "--tables-only") == 0
    results = load_study("there")
    assert results.record.grid["methods"] == ["magnitude", "wanda"]
    assert len(results.cells) == done < len(results.record.cells)
    assert f"{done} of {len(results.record.cells)} cells" in capsys.readouterr().out
    text = Path("there/tables.md").read_text(encoding="utf-8")
    assert f"{done} of {len(results.record.cells)} cells are done" in text
    Path("there/tables.md").unlink()
    assert command("--tables-only", "--output", "there") == 0
    assert Path("there/tables.md").read_text(encoding="utf-8") == text
    for flags in ((), ("--tables-only",), ("--output", "there")):
        assert command(*flags) == 2
        assert "name a recipe" in capsys.readouterr().err


def test_flags_take_the_place_of_what_differs_from_machine_to_machine(faked, capsys):
    found = settings(model="gone", evaluation={"texts": "gone.txt", "seq_len": 32, "tasks": []})
    found["calibration"] = [{"num_samples": 4, "seq_len": 32}]
    Path("recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    flags = ("--model", "dense", "--dataset", "text.txt", "--texts", "held.txt", "--output", "there")
    assert command("recipe.yaml", *flags) == 0, capsys.readouterr().err
    assert any("text.txt 4 x 32" in str(cell) for cell in grid(recipe()))
    assert load_study("there").record.grid["calibration"] == ["text.txt 4 x 32"]
    found["calibration"].append({"dataset": "c4"})
    Path("recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    assert command("recipe.yaml", *flags) == 2
    assert "the recipe compares calibration texts" in capsys.readouterr().err


# Tasks that tune the model


def test_korquad_and_nsmc_are_measured_after_tuning(in_process, shared):
    pytest.importorskip("peft", reason="needs the extra finetune")
    model = AutoModelForCausalLM.from_config(make_config("llama", max_position_embeddings=1024))
    model.save_pretrained("dense")
    paragraphs = [
        {
            "context": f"ab {i} cd",
            "qas": [{"id": str(i), "question": "ab", "answers": [{"text": str(i), "answer_start": 3}]}],
        }
        for i in range(4)
    ]
    articles = [{"title": str(i), "paragraphs": [paragraph]} for i, paragraph in enumerate(paragraphs)]
    Path("korquad.json").write_text(json.dumps({"version": "1", "data": articles}), encoding="utf-8")
    pairs = [json.dumps({"instruction": f"ab {i}", "output": f"cd {i}"}) for i in range(4)]
    Path("pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    Path("nsmc").mkdir()
    for split, first in (("train", 0), ("test", 40)):
        lines = [
            json.dumps({"id": str(i), "document": "가나 " * (i % 3 + 1), "label": i % 2})
            for i in range(first, first + 24)
        ]
        Path(f"nsmc/{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    training = {"r": 2, "max_steps": 1, "batch_size": 2, "micro_batch_size": 2, "warmup_steps": 0}
    korquad = {"train_file": "korquad.json", "seq_len": 48, "max_question_tokens": 12, "stride": 16, **training}
    nsmc = {"koalpaca": {"data": "pairs.jsonl", "max_length": 32, **training}, "data_dir": "nsmc", "limit": 2}
    chosen = {"methods": ["magnitude"], "patterns": ["2:4"], "korquad": korquad, "nsmc": nsmc, "evaluation": None}
    results = run_study(recipe(**chosen), str)
    assert len(results.cells) == 2
    for result in results.cells.values():
        assert {"korquad_exact_match", "korquad_f1", "nsmc_1_accuracy", "nsmc_2_accuracy"} <= result.figures().keys()
        assert all(row["protocol"]["tuning"]["task"] in ("korquad", "koalpaca") for row in result.measurements)
    text = Path("out/tables.md").read_text(encoding="utf-8")
    assert "## KorQuAD after LoRA" in text and "| prompt 2, after KoAlpaca tuning | magnitude |" in text
    assert "after KoAlpaca tuning (method lora, r 2, max_steps 1" in text
    assert {path.name for path in Path("out/cells/dense").iterdir()} == {"result.json"}
    with pytest.raises(ValueError, match=r"korquad.max_steps: was 1, is 2"):
        run_study(recipe(**chosen | {"korquad": {**korquad, "max_steps": 2}}))


# Figures and tables


def made_up(
    methods: list[Any],
    calibration: list[dict[str, Any]],
    seeds: list[int],
    published: dict[str, Any],
    tasks: bool = True,
) -> StudyResults:
    """Results that nothing was measured for."""
    chosen = recipe(methods=methods, calibration=calibration, seeds=seeds, published=published)
    cells, results = grid(chosen), {}
    names = {"methods": [m["name"] for m in chosen.methods], "patterns": chosen.patterns, "seeds": seeds}
    names["calibration"] = [entry["name"] for entry in chosen.calibration]
    job = {"model": "m", "weights": "f" * 64, "dtype": "auto", "evaluation": {"texts": {"name": "kowiki"}}}
    places = {c.id: {"identity": c.identity, "places": [asdict(place) for place in c.places]} for c in cells}
    common = {"dtype": "float32", "prepend_bos": False}
    for cell in cells:
        place = cell.places[0]
        value = 20.0 if cell.settings is None else 30.0 + 2 * (place.seed or 0) + cell.identity.get("num_samples", 0)
        windows = {"seq_len": 32, "stride": None, "num_windows": 24, "num_tokens": 744}
        protocol = {"texts": {"name": "kowiki", "sha256": "ab" * 32}, **windows, **common}
        rows = [("perplexity", {"perplexity": value, "bits_per_byte": 1.0}, protocol)]
        for number, task in enumerate(("copa", "hellaswag", "boolq", "sentineg", "wic") if tasks else ()):
            data = {
                "num_fewshot": 0,
                "limit": 25,
                "num_samples": 25,
                "split": "test",
                "data": {"name": "skt/kobest_v1"},
            }
            rows.append((task, {"acc": 0.5, "f1": (50 + number + (place.seed or 0)) / 100}, {**data, **common}))
        measured = [{"name": n, "metrics": m, "protocol": p, "environment": {}} for n, m, p in rows]
        report = {"density": 0.5, "mean_output_error": 0.2}
        pruning = {
            "seconds": 40.0 + value,
            "peak_memory_bytes": {"process": 2.5e9},
            "report": report,
            "calibration": {},
        }
        done = {"seconds": {}, "peak_memory_bytes": {}, "hardware": {"device": "CPU"}, "versions": {"torch": "2"}}
        results[cell.id] = CellResult(cell.id, cell.identity, measured, pruning if cell.settings else None, **done)
    return StudyResults(Record(job, names, chosen.published, places), results)


DATA = {"dataset": "text.txt", "num_samples": 4, "seq_len": 32}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_mean_and_deviation(values):
    found = spread(values)
    assert found.count == len(values)
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    if len(values) == 1:
        assert found.deviation is None and "±" not in found.text(2)
    else:
        assert found.deviation == pytest.approx(statistics.stdev(values), abs=1e-6)
        assert found.text(2).endswith(f"± {statistics.stdev(values):,.2f}")


def test_an_infinite_figure_has_no_deviation():
    assert spread([1.0, math.inf]).text(2) == "∞"
    assert (spread([2.0, 4.0]).text(1), spread([2.0]).text(1)) == ("3.0 ± 1.4", "2.0")


def test_tables_say_what_was_found_and_how(workplace):
    published = {"perplexity": {"dense": 11.39, "2:4": 50.52}, "kobest_mean_f1": {"dense": 50.87}}
    results = made_up(["wanda", "magnitude"], [DATA], [0, 1, 2], {**published, "method": "wanda", "source": "a paper"})
    text = markdown(results)
    assert "## Perplexity on kowiki (lower is better)" in text
    assert "| method | dense | 50% | 2:4 |" in text
    assert "| wanda | 20.00 | 36.00 ± 2.00 | 36.00 ± 2.00 |" in text
    assert "| magnitude | 20.00 | 30.00 | 30.00 |" in text
    assert "| *published, wanda* | 11.39 |  | 50.52 |" in text
    assert "| COPA | wanda | 50.00 | 51.00 ± 1.00 | 51.00 ± 1.00 |" in text
    mean = "**mean** of COPA, HellaSwag, BoolQ, SentiNeg"  # WiC is not in it
    assert f"| {mean} | wanda | 51.50 | 52.50 ± 1.00 | 52.50 ± 1.00 |" in text
    assert f"| {mean} | *published, wanda* | 50.87 |  |  |" in text
    assert "| seconds | wanda | 76.0 ± 2.0 | 76.0 ± 2.0 |" in text
    assert "| peak memory of the process in GB | magnitude | 2.50 | 2.50 |" in text
    assert "seeds 0, 1, 2 (n = 3)" in text and "KorQuAD" not in text
    for said in (
        "24 windows of 32 tokens, 744 tokens predicted",
        "4 × 32 tokens of text.txt, SHA-256",
        "Hardware: CPU",
    ):
        assert said in text
    write_tables(results, workplace)
    with open("tables.csv", encoding="utf-8") as file:
        rows = {(r["figure"], r["method"], r["pattern"]): r for r in csv.DictReader(file)}
    row = rows["perplexity", "wanda", "2:4"]
    assert (row["mean"], row["deviation"], row["seeds"], row["published"]) == ("36", "2", "3", "50.52")
    assert rows["perplexity", "magnitude", "2:4"]["published"] == "", "another method's"
    assert rows["perplexity", "dense", "dense"]["published"] == "11.39"
    found = json.loads(Path("results.json").read_text(encoding="utf-8"))
    assert len(found["cells"]) == 1 + 6 + 2 and len(found["rows"]) == len(rows)


def test_a_row_for_each_calibration_set_where_there_are_several(workplace):
    sets = [{**DATA, "num_samples": n} for n in (2, 8)]
    text = markdown(made_up(["wanda", "magnitude"], sets, [0], {}))
    assert "| method | calibration | dense | 50% | 2:4 |" in text
    assert "| wanda | text.txt 2 x 32 | 20.00 | 32.00 | 32.00 |" in text
    assert "| wanda | text.txt 8 x 32 | 20.00 | 38.00 | 38.00 |" in text
    assert "| magnitude | none | 20.00 | 30.00 | 30.00 |" in text
    assert "±" not in text


def test_two_texts_of_one_name_are_not_one_line(workplace):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    sets = []
    for number, size in ((1, 2), (2, 8)):
        folder = workplace / f"corpus{number}"
        folder.mkdir()
        (folder / "train.txt").write_text(f"corpus {number}\n\n" * 50, encoding="utf-8")
        sets.append(
            {"name": f"set {number}", "dataset": f"corpus{number}/train.txt", "num_samples": size, "seq_len": 32}
        )
    assert "quality_by_calibration.png" not in write_figures(made_up(["wanda"], sets, [0], {}), workplace)
    both = [*sets, {**sets[0], "name": "set 3", "num_samples": 16}, {**sets[1], "name": "set 4", "num_samples": 16}]
    assert "quality_by_calibration.png" in write_figures(made_up(["wanda"], both, [0], {}), workplace)


def test_one_run_has_no_error_bar_and_says_so(workplace):
    results = made_up(["wanda"], [DATA], [0, 1], {})
    one = next(cell for cell in results.cells if cell.startswith("wanda-2of4-seed1"))
    del results.cells[one]
    rows = [row for row in results.rows() if row.quantity == "perplexity" and row.method == "wanda"]
    axes = Mock()
    draw_points(axes, [0.0, 1.0], rows, "red", "o", "wanda")
    places, means, deviations = axes.errorbar.call_args.args
    assert places == [0.0] and len(means) == len(deviations) == 1, "50% has two seeds, 2:4 one"
    assert axes.plot.call_args.kwargs["label"] == "wanda (n = 1 to 2)"


def test_what_is_found_anew_for_each_cell_is_told(workplace):
    methods = [{"name": "best", "method": "auto"}, "wanda"]
    results = made_up(methods, [DATA], [0, 1, 2], {})
    for cell, result in results.cells.items():
        place = results.record.places(cell)[0]
        if place.method == "best":
            result.pruning["report"]["choice"] = "admm" if place.seed == 1 else "admm + block"
        result.hardware["device"] = "CPU" if place.seed == 2 else "GPU"
    text = markdown(results)
    assert "- best, text.txt 4 x 32, 2:4 took: admm + block (seed 0, 2); admm (seed 1)." in text
    assert "- Hardware of 4 cells: CPU." in text and "- Hardware of 9 cells: GPU." in text


def test_figures_are_drawn_where_there_is_something_to_draw(workplace):
    image = pytest.importorskip("matplotlib.image", reason="needs the extra plot")
    published = {"perplexity": {"2:4": 50.52}, "method": "wanda"}
    plain = made_up(["wanda", "magnitude"], [DATA], [0, 1], published)
    names = write_figures(plain, workplace)
    assert names == ["perplexity_by_pattern.png", "quality_by_time.png"], "calibration is not varied"
    sets = [{**DATA, "num_samples": n} for n in (2, 8)]
    several = made_up(["wanda", {"name": "$x_1$ _한국어", "method": "sparsegpt"}], sets, [0], {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that no font has
        names = write_figures(several, workplace)
    assert names == ["perplexity_by_pattern.png", "quality_by_time.png", "quality_by_calibration.png"]
    for name in names:
        pixels = image.imread(workplace / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        colours = {tuple((255 * pixel).round().astype(int)) for pixel in pixels[::3, ::3].reshape(-1, 3)}
        assert (0, 114, 178) in colours, "the first colour of the palette"
    assert write_figures(StudyResults(plain.record, {}), workplace) == []
    assert not list(workplace.glob("*.png")), "old figures go"
