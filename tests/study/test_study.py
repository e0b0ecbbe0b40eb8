"""Studies: the grid, identities, what runs again and what does not, what cuts a study off, tables and figures.

Most cells run in this process, or are a script that makes figures up, which takes no time; one study has a real
process."""

from __future__ import annotations

import inspect
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
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparsityConfig, evaluate_perplexity
from optimum_ksparse.__main__ import main
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.evaluation import Measurement
from optimum_ksparse.study import (
    CellResult,
    Recipe,
    StudyResults,
    grid,
    load_study,
    markdown,
    processes,
    run_study,
    spread,
    tabulate_study,
    write_figures,
    write_tables,
)
from optimum_ksparse.study import cell as cell_module
from optimum_ksparse.study import run as run_module
from optimum_ksparse.study.grid import identity_of
from optimum_ksparse.study.record import Record

from ..conftest import REPOSITORY, held_by_another, make_config, sample_texts

torch.set_num_threads(1)

# A cell that makes its figure up. It fails where `fail` holds its id, and waits for ever where `wait` does.
FAKE_CELL = f"""
import json, os, signal, sys, threading, time
from pathlib import Path
{inspect.getsource(processes.end_with_parent)}
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
(folder / "pid").write_text(str(os.getpid()))
end_with_parent()
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
DATA = {"dataset": "text.txt", "num_samples": 4, "seq_len": 32}


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
    monkeypatch.setattr(processes, "CELL_COMMAND", command)
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.01)
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
    monkeypatch.setattr(run_module, "write_figures", lambda *_: None)
    return ran


def settings(**changes: Any) -> dict[str, Any]:
    standard = {
        "model": "dense",
        "output": "out",
        "methods": ["wanda", "magnitude"],
        "patterns": ["50%", "2:4"],
        "calibration": [DATA],
        "seeds": [0, 1],
        "evaluation": {"texts": "held.txt", "seq_len": 32, "max_tokens": 320, "tasks": "none"},
    }
    return {name: value for name, value in (standard | changes).items() if value is not None}


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict(settings(**changes))


# The recipe


REFUSED = [
    ({"metods": ["wanda"]}, "'methods'"),
    ({"settings": {"dampng": 0.1}}, "settings .*'damping'"),
    ({"settings": {"seed": 1}}, "settings .*'seed'"),
    ({"methods": [{"method": "wanda", "blok_size": 8}]}, r"methods\[0\] .*'block_size'"),
    ({"methods": [{"method": "wanda", "dataset": "c4"}]}, r"methods\[0\] .*'dataset'"),
    ({"calibration": [{"num_sample": 3}]}, r"calibration\[0\] .*'num_samples'"),
    ({"evaluation": {"text": "held.txt"}}, "evaluation .*'texts'"),
    ({"korquad": {"train_fil": "x"}}, "korquad .*'train_file'"),
    ({"nsmc": {"koalpaca": {"max_len": 3}}}, "nsmc.koalpaca .*'max_length'"),
    ({"published": {"perplexty": {}}}, "published .*'perplexity'"),
    ({"model": None}, "model is missing"),
    ({"methods": []}, "methods is empty"),
    ({"values": []}, "values is empty"),
    ({"values": ["int3"]}, "values='int3'"),
    ({"values": ["int8", "int8"]}, "values: 'int8' comes twice"),
    ({"values": [None, "int8"], "settings": {"values": "int4"}}, "leave values out"),
    ({"values": ["int8"], "methods": [{"method": "wanda", "values": None}]}, "leave values out of method wanda"),
    ({"methods": "wanda"}, "methods"),
    ({"methods": [{"name": "dense", "method": "wanda"}]}, "methods: 'dense'"),
    ({"methods": [{"name": "x"}]}, r"methods\[0\] has no method"),
    ({"methods": ["wanda", {"name": "wanda", "method": "sparsegpt"}]}, "methods: 'wanda' comes twice"),
    ({"patterns": ["50%", 0.5]}, "patterns: '50%' comes twice"),
    ({"patterns": yaml.safe_load("[2:4]")}, "write it in quotes"),
    ({"patterns": ["5:4"]}, "pattern='5:4'"),
    ({"seeds": ["0"]}, r"seeds\[0\]"),
    ({"processes": 0}, "processes"),
    ({"stream": "no"}, "stream"),
    ({"evaluation": None}, "nothing to measure"),
    ({"evaluation": {"texts": "nowhere.txt"}}, "nowhere.txt"),
    ({"korquad": {"r": 0}}, "korquad.r is 0"),
    ({"korquad": {"method": "masked"}}, "masked"),
    ({"korquad": {"seq_len": 8}}, "seq_len=8"),
    ({"korquad": {"max_examples": "many"}}, "korquad.max_examples"),
    ({"nsmc": {"koalpaca": {"max_length": 1}}}, "nsmc.koalpaca.max_length"),
    ({"nsmc": {"koalpaca": {"data": "nowhere.json"}}}, "nowhere.json"),
    ({"nsmc": {"limit": 3}}, "nsmc.koalpaca"),
    ({"dtype": "foo"}, "dtype='foo'"),
    ({"published": {"perplexity": {"2:4": "9"}}}, "published.perplexity.2:4"),
]


def test_what_a_recipe_cannot_hold_is_named(workplace):
    for changes, said in REFUSED:
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
            recipe(**changes)


def test_a_section_without_settings_is_not_taken_for_none(workplace):
    with pytest.raises(ValueError, match="korquad is empty"):
        Recipe.from_dict(settings() | {"korquad": None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": [{"method": "wand"}]}, "cell wand, 50%, text.txt 4 x 32, seed 0: method='wand'"),
        ({"methods": ["sparsegpt"], "patterns": ["3:7"]}, "cell sparsegpt, 3:7.*block_size"),
        ({"calibration": [{"dataset": "self"}], "stream": True}, "cell wanda, 50%, self .*stream"),
        ({"calibration": [{"dataset": "nowhere.txt"}]}, "cell wanda.*nowhere.txt"),
        ({"evaluation": {"texts": "empty.jsonl", "tasks": "none"}}, "empty.jsonl.*holds no text"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(workplace, changes, said):
    Path("empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run_study(recipe(**changes))
    assert not Path("out").exists()


def test_recipes_in_configs_and_docs_are_valid():
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "configs/study").glob("*.yaml"))]
    assert len(texts) == 5 and max(len(text.splitlines()) for text in texts) <= 20
    for name in ("docs/study.md", "docs/study.ko.md"):
        texts.append((REPOSITORY / name).read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    for text in texts:
        found = yaml.safe_load(text)
        parts = [len(found.get(part, [None])) for part in ("methods", "values", "patterns", "calibration", "seeds")]
        assert len(grid(Recipe.from_dict(found))) == 1 + math.prod(parts)


# The grid


def test_the_grid_has_no_cell_twice(workplace):
    twice = {"name": "again", "method": "wanda", "bos_in_statistics": True}
    cells = grid(recipe(methods=["wanda", twice, "magnitude"], seeds=[0, 1, 2]))
    assert [str(c) for c in cells.values()][-2:] == ["magnitude, 50%", "magnitude, 2:4"]
    assert len(cells) == 1 + 2 * 3 + 2
    wanda = next(cell for cell in cells.values() if cell.identity.get("method") == "wanda")
    assert [place.method for place in wanda.places] == ["wanda", "again"]
    assert cells["dense"].settings is None


def test_an_identity_is_of_what_makes_the_weights(workplace):
    def of(**changes):
        return identity_of(SparsityConfig.from_flat(**{"dataset": "text.txt", "method": "wanda", **changes}))

    same = of()
    os.makedirs("sub")
    shutil.copy("text.txt", "sub/text.txt")
    for harmless in ({"dataset": "sub/text.txt"}, {"batch_size": 4}, {"storage": "dense"}):
        assert of(**harmless) == same
    others = ({"seed": 1}, {"seq_len": 64}, {"num_samples": 2}, {"true_sequential": True}, {"prepend_bos": True})
    others += ({"modules_to_not_convert": ["q_proj"]}, {"pattern": "4:8"}, {"method": "sparsegpt"})
    assert all(of(**other) != same for other in others)
    by_batches = {"method": "admm", "reconstruct": "block"}
    assert of(batch_size=4, **by_batches) != of(**by_batches)
    Path("text.txt").write_text("another text", encoding="utf-8")
    assert of() != same
    assert str(workplace) not in json.dumps(same)


def test_calibration_sets_are_named_by_what_they_are(workplace):
    mixes = [{"self": 0.5, "text.txt": 0.5}, {"self": 0.25, "text.txt": 0.75}, "text.txt"]
    sets = [{**DATA, "dataset": data} for data in mixes]
    sets.append({**sets[-1], "prepend_bos": False})
    assert recipe(calibration=sets).grid["calibration"] == [
        "0.5 self + 0.5 text.txt 4 x 32",
        "0.25 self + 0.75 text.txt 4 x 32",
        "text.txt 4 x 32",
        "text.txt 4 x 32, prepend_bos=False",
    ]


def test_a_setting_makes_another_cell_where_the_method_reads_it_and_another_value_is_its_default(workplace):
    with pytest.raises(ValueError, match="cell damped.*damping"):
        grid(recipe(methods=[{"name": "damped", "method": "wanda", "damping": 0.1}]))
    same = [{"name": "same", "method": "sparsegpt", "damping": 0.01, "kernel": "reference"}]
    assert len(grid(recipe(methods=["sparsegpt", *same], seeds=[0]))) == 1 + 2
    with pytest.raises(ValueError, match="kernel"):
        grid(recipe(methods=[{"name": "wrong", "method": "wanda", "kernel": "any"}]))
    read = [{"name": "damped", "method": "sparsegpt", "damping": 0.1}]
    read.append({"name": "tuned", "method": "sparsegpt", "reconstruct": "block", "reconstruction_epochs": 7})
    assert len(grid(recipe(methods=["sparsegpt", *read], seeds=[0]))) == 1 + 3 * 2


def test_values_are_tried_with_each_method(workplace):
    chosen = recipe(methods=["wanda", "magnitude"], values=[None, "int8", "int4"], patterns=["2:4"], seeds=[0])
    names = ["wanda", "wanda int8", "wanda int4", "magnitude", "magnitude int8", "magnitude int4"]
    assert chosen.grid["methods"] == names
    cells = {str(cell).split(",")[0]: cell for cell in list(grid(chosen).values())[1:]}
    assert list(cells) == names
    assert [cells[name].identity.get("values") for name in names] == [None, "int8", "int4"] * 2
    assert cells["wanda"].identity == list(grid(recipe(patterns=["2:4"], seeds=[0])).values())[1].identity
    by_hand = [{"name": "wanda int8", "method": "wanda", "values": "int8"}]
    [_, same] = grid(recipe(methods=by_hand, patterns=["2:4"], seeds=[0])).values()
    assert same == cells["wanda int8"]


# Running


@pytest.mark.slow
def test_cells_with_quantised_values_are_measured_and_say_their_bits(in_process):
    """Of a float32 model: what has no integers is counted with 16 bits."""
    values = {"magnitude": None, "magnitude int8": "int8", "magnitude int4": "int4"}
    more = {"patterns": ["2:4"], "keep_checkpoints": True}
    results = run_study(recipe(methods=["magnitude"], values=list(values.values()), **more), str)
    rows = {(row.quantity, row.method): row.spread.mean for row in results.rows()}
    assert len({rows["perplexity", name] for name in ("dense", *values)}) == 4
    assert rows["bits_per_weight", "dense"] == 16
    for cell in list(results.cells.values())[1:]:
        tensors = load_file(f"out/cells/{cell.id}/checkpoint/model.safetensors")
        masks = {name: mask for name, mask in tensors.items() if name.endswith("weight_mask")}
        bits = weights = 0
        for name, mask in masks.items():
            bits += 8 * mask.nbytes
            weights += 8 * mask.numel()
            parts = [tensors.get(name.replace("_mask", end)) for end in ("", "_scale")]
            bits += sum(p.numel() * (16 if p.is_floating_point() else 8) for p in parts if p is not None)
        assert rows["bits_per_weight", results.record.cells[cell.id].places[0].method] == bits / weights
    assert "| magnitude | 16.00 | 9.00 |" in Path("out/tables.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_cells_hold_what_pruning_and_measuring_by_hand_give(in_process):
    results = run_study(recipe(patterns=["2:4"]), str)
    assert len(in_process) == len(set(in_process)) == 4
    tokenizer = AutoTokenizer.from_pretrained("dense")

    def by_hand(**pruning):
        config = {"sparsity_config": SparsityConfig.from_flat(**pruning)} if pruning else {}
        model = AutoModelForCausalLM.from_pretrained("dense", **config)
        return evaluate_perplexity(model, tokenizer, "held.txt", seq_len=32, max_tokens=320)["perplexity"]

    values = [by_hand(method="wanda", pattern="2:4", seed=seed, **DATA) for seed in (0, 1)]
    spreads = {row.method: row.spread for row in results.rows() if row.quantity == "perplexity"}
    wanda = spreads["wanda"]
    assert wanda.mean == pytest.approx(statistics.mean(values), rel=1e-5)
    assert wanda.deviation == pytest.approx(statistics.stdev(values), rel=1e-3)
    assert spreads["magnitude"].count == 1
    assert spreads["magnitude"].mean == pytest.approx(by_hand(method="magnitude", pattern="2:4"), rel=1e-5)
    assert spreads["dense"].mean == pytest.approx(by_hand(), rel=1e-5)

    cells = sorted(path.name for path in Path("out/cells").iterdir())
    assert cells == sorted(results.cells)
    for cell in cells:
        assert {path.name for path in Path("out/cells", cell).iterdir()} == {"result.json"}, "weights are deleted"
    first = next(result for result in load_study("out").cells.values() if result.identity.get("method") == "wanda")
    assert first.pruning["report"]["density"] == 0.5
    assert first.pruning["seconds"] > 0
    assert first.pruning["peak_memory_bytes"]["process"] > 10**8
    files = [path for path in Path("out").rglob("*") if path.suffix in (".md", ".json")]
    assert len(files) >= 7
    assert not any(str(Path.cwd()) in path.read_text("utf-8") for path in files), "no absolute paths"

    shutil.copytree("out/cells/dense", "streamed/cells/dense")
    streamed = run_study(recipe(methods=["wanda"], patterns=["2:4"], seeds=[0], output="streamed", stream=True), str)
    assert in_process[4:] == [first.id]
    assert streamed.cells[first.id].figures["perplexity"] == first.figures["perplexity"]


@pytest.mark.slow
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
    assert list(load_study("out").cells) == ["dense"], "the dense model stays measured"
    monkeypatch.setattr(cell_module, "evaluate_model", measure)
    pruned, load = [], cell_module.load_model

    def watched(source, **how):
        pruned.extend([source] if "sparsity_config" in how else [])
        return load(source, **how)

    monkeypatch.setattr(cell_module, "load_model", watched)
    assert len(run_study(chosen, str).cells) == 2
    assert not pruned, "it was pruned already"
    assert in_process == ["dense", in_process[1], in_process[1]]
    assert (Path("out/cells") / in_process[1] / "checkpoint/model.safetensors").is_file(), "kept"


@pytest.mark.slow
def test_what_no_cell_has_measured_yet_may_change(in_process, monkeypatch):
    pytest.importorskip("peft", reason="needs the extra finetune")
    chosen: dict[str, Any] = {"methods": ["magnitude"], "patterns": ["2:4"], "korquad": {"max_steps": 1}}

    def cut_off(run):
        (run.folder / "korquad/checkpoint-1").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("wrong only here")

    monkeypatch.setattr(cell_module._Run, "_korquad", cut_off)
    with pytest.raises(RuntimeError, match="wrong only here"):
        run_study(recipe(**chosen), str)
    corrected = chosen | {"korquad": {"max_steps": 2}}
    assert Path("out/cells/dense/korquad").is_dir()
    measured = Path("out/cells/dense/evaluation_results.json").read_bytes()

    def measure(run):
        assert not (run.folder / "korquad").exists(), "it would have gone on with other settings"
        assert run.job["korquad"] == {"max_steps": 2}
        if run.folder.name == "dense":
            assert (run.folder / "evaluation_results.json").read_bytes() == measured, "not measured again"
        return []

    monkeypatch.setattr(cell_module._Run, "_korquad", measure)
    assert len(run_study(recipe(**corrected), str).cells) == 2 and in_process.count("dense") == 2
    with pytest.raises(ValueError, match=r"korquad.max_steps: was 2, is 3"):
        run_study(recipe(**chosen | {"korquad": {"max_steps": 3}}))


def test_what_was_pruned_of_other_weights_goes(tmp_path):
    job = {"study": {"weights": "a"}, "settings": {"batch_size": 1}, "korquad": None, "nsmc": None, "processes": 1}
    for more, stays in (({"processes": 2}, True), ({"korquad": {}}, True), ({"study": {"weights": "b"}}, False)):
        cell_module.prepare_cell(tmp_path, job)
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        cell_module.prepare_cell(tmp_path, job | more)
        assert (tmp_path / "checkpoint").is_dir() == stays


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "begun", "before", "after"),
    [
        ("_prune", "checkpoint", {"settings": {"batch_size": 2}}, {"settings": {"batch_size": 1}}),
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
    for changes in (before, {**before, "processes": 2}, after):
        with pytest.raises(MemoryError):
            run_study(recipe(**chosen, **changes), str)
    assert found == [False, True, False], "what was begun with these very settings stays"


@pytest.mark.processes
def test_a_changed_recipe_runs_only_what_is_new(faked):
    said: list[str] = []
    run_study(recipe(methods=["wanda"]), said.append)
    assert said == []
    times = {path.parent.name: path.stat().st_mtime_ns for path in Path("out/cells").glob("*/result.json")}
    assert len(times) == 5
    run_study(recipe(methods=["wanda"], patterns=["4:8", "2:4"], seeds=[0, 2]), said.append)
    assert said == ["2 of 5 cells are done already"]
    now = {path.parent.name: path.stat().st_mtime_ns for path in Path("out/cells").glob("*/result.json")}
    assert len(now) == 8 and times.items() <= now.items(), "what was done is not touched"
    assert "50%" not in Path("out/tables.md").read_text(encoding="utf-8")
    # They come back, unharmed.
    assert len(run_study(recipe(methods=["wanda"]), said.append).cells) == 5
    assert said[-1] == "5 of 5 cells are done already"


@pytest.mark.processes
def test_another_model_or_protocol_is_refused_with_the_difference(faked):
    run_study(recipe(methods=["magnitude"]), str)
    before = json.loads(Path("out/study.json").read_bytes())
    with pytest.raises(ValueError, match=r"evaluation.seq_len: was 32, is 16"):
        run_study(recipe(evaluation={"texts": "held.txt", "seq_len": 16, "max_tokens": 320, "tasks": []}))
    with pytest.raises(ValueError, match=r"dtype: was 'auto', is 'float16'"):
        run_study(recipe(dtype="float16"))
    with pytest.raises(ValueError, match=r"done without korquad"):
        run_study(recipe(methods=["magnitude"], korquad={}))
    shutil.copytree("dense", "moved")
    state_dict = load_file("moved/model.safetensors")
    run_study(recipe(methods=["magnitude"], model="moved"), str)  # the same weights
    save_file({name: tensor + 1 for name, tensor in state_dict.items()}, "moved/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights: was '.*', is "):
        run_study(recipe(methods=["magnitude"], model="moved"))
    Path("held.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation.texts: was "):
        run_study(recipe(methods=["magnitude"]))
    assert before["job"]["weights"] == json.loads(Path("out/study.json").read_bytes())["job"]["weights"]


@pytest.mark.processes
def test_a_failed_cell_is_named_the_others_go_on_and_it_runs_again(faked, capsys):
    cells = grid(recipe())
    name, bad = next(
        item for item in cells.items() if str(item[1]).startswith("wanda, 2:4") and item[1].places[0].seed == 1
    )
    Path("fail").write_text(name)
    Path("recipe.yaml").write_text(yaml.safe_dump(settings()), encoding="utf-8")
    assert main(["study", "recipe.yaml"]) == 1
    printed = capsys.readouterr()
    assert f"failed: {bad} (status 3): ValueError: made to fail" in printed.out
    assert printed.err.strip().split("\n")[-1].startswith(f"error: 1 cells failed: {bad} (cells/{name}/log.txt)")
    results = load_study("out")
    assert len(results.cells) == len(cells) - 1
    assert results.failed[name]["log"] == ["ValueError: made to fail"]
    text = Path("out/tables.md").read_text(encoding="utf-8")
    assert f"Failed: {bad}." in text
    assert "10.00 (n = 1) |" in text, "one of two seeds"
    Path("fail").unlink()
    assert main(["study", "recipe.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"failed   {bad}  [{name}]" in printed and "6 of 7 cells are done" in printed
    assert main(["study", "recipe.yaml"]) == 0
    assert "runs again" in capsys.readouterr().out
    assert len(load_study("out").cells) == len(cells) and not load_study("out").failed


@pytest.mark.processes
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


@pytest.mark.processes
def test_two_studies_in_one_folder_are_refused(faked):
    chosen = recipe(methods=["magnitude"], patterns=["2:4"])
    Path("out").mkdir()
    with held_by_another("out/.lock"), pytest.raises(BlockingIOError, match="another study is at work in out"):
        run_study(chosen)
    assert not Path("out/study.json").exists()
    run_study(chosen, str)
    before = Path("out/tables.md").stat().st_mtime_ns
    with held_by_another("out/.lock"), pytest.raises(BlockingIOError, match="another study is at work in out"):
        tabulate_study(recipe())
    assert Path("out/tables.md").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("study.json", ("version",), 1, "version"),
        ("study.json", ("grid", "seeds"), ["x"], "grid.seeds"),
        ("study.json", ("cells", "dense", "places"), 3, "cells.dense.places"),
        ("result.json", ("measurements",), [{"name": "perplexity"}], "measurements"),
        ("result.json", ("pruning", "report", "density"), 2, "density"),
        ("result.json", ("seconds",), None, "seconds"),
    ],
)
@pytest.mark.processes
def test_a_damaged_file_is_named_with_its_field(faked, name, place, value, said):
    run_study(recipe(methods=["magnitude"], patterns=["2:4"]), str)
    path = next(path for path in sorted(Path("out").rglob(name)) if path.parent.name != "dense")
    content = inside = json.loads(path.read_text(encoding="utf-8"))
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*is damaged.*{said}"):
        load_study("out")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        load_study("dense")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def until(done) -> None:
    while not done():
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.processes
def test_a_killed_study_leaves_no_process_and_loses_no_finished_cell(faked, number):
    first, second = [name for name in grid(recipe()) if name != "dense"][:2]
    Path("wait").write_text(second)
    parent = multiprocessing.get_context("fork").Process(target=run_study, args=(recipe(), str))
    parent.start()
    pid = Path("out/cells") / second / "pid"
    until(lambda: pid.exists() and pid.read_text())
    child = int(pid.read_text())
    assert alive(child)
    assert parent.pid is not None
    os.kill(parent.pid, number)
    parent.join()
    until(lambda: not alive(child))
    assert parent.exitcode == {signal.SIGKILL: -9, signal.SIGINT: 1}[number]
    assert set(load_study("out").cells) == {"dense", first}
    assert not load_study("out").failed
    Path("wait").unlink()
    assert len(run_study(recipe(), str).cells) == 7


@pytest.mark.processes
def test_a_killed_cell_is_the_only_one_lost(faked):
    cells = grid(recipe())
    name = list(cells)[1]
    Path("wait").write_text(name)

    def kill() -> None:
        path = Path("out/cells") / name / "pid"
        until(lambda: path.exists() and path.read_text() != "")
        os.kill(int(path.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results = run_study(recipe(processes=2), str)
    killer.join()
    assert {cell: failure["status"] for cell, failure in results.failed.items()} == {name: -signal.SIGKILL}
    assert len(results.cells) == len(cells) - 1


def test_cells_that_run_at_once_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environments = [processes._environment(slot, 3) for slot in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["0", "1", "0"]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes._environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "7"
    assert processes._environment(1, 2)["OMP_NUM_THREADS"] == "3"
    assert processes._environment(0, 1)["CUDA_VISIBLE_DEVICES"] == "5,7"


@pytest.mark.processes
def test_a_real_process(workplace, monkeypatch):
    def run_cells(folders, processes, ended):
        cell_module.run_cell(folders[0])  # the dense model, in this process: a real one takes seconds to start
        ended(folders[0], 0)
        real(folders[1:], processes, ended)

    real = run_module.run_cells
    monkeypatch.setattr(run_module, "run_cells", run_cells)
    run_study(recipe(methods=["magnitude"], patterns=["2:4"]), str)
    dense, sparse = load_study("out").cells.values()
    assert dense.figures["perplexity"] != sparse.figures["perplexity"]
    assert dense.versions == sparse.versions
    log = Path("out/cells", sparse.id, "log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in log and "RuntimeWarning" not in log


@pytest.mark.processes
def test_tables_alone_have_the_grid_of_the_recipe_that_is_given(faked, capsys):
    wide = settings(methods=["magnitude", "wanda"], output="there")
    Path("wide.yaml").write_text(yaml.safe_dump(wide), encoding="utf-8")
    Path("narrow.yaml").write_text(yaml.safe_dump({**wide, "methods": ["magnitude"]}), encoding="utf-8")
    assert main(["study", "wide.yaml", "--tables-only"]) == 1
    assert "there holds no study" in capsys.readouterr().err
    assert main(["study", "narrow.yaml"]) == 0, capsys.readouterr().err
    assert main(["study", "wide.yaml", "--tables-only", "--model", "gone"]) == 0
    results = load_study("there")
    assert results.record.grid["methods"] == ["magnitude", "wanda"]
    assert (len(results.cells), len(results.record.cells)) == (3, 7)
    assert "3 of 7 cells" in capsys.readouterr().out
    assert "3 of 7 cells are done" in Path("there/tables.md").read_text(encoding="utf-8")


@pytest.mark.processes
def test_flags_take_the_place_of_what_differs_from_machine_to_machine(faked, capsys):
    found = settings(model="gone", evaluation={"texts": "gone.txt", "seq_len": 32, "tasks": []})
    found["calibration"] = [{"num_samples": 4, "seq_len": 32}]
    Path("recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    flags = ("--model", "dense", "--dataset", "text.txt", "--texts", "held.txt", "--output", "there")
    assert main(["study", "recipe.yaml", *flags]) == 0, capsys.readouterr().err
    assert load_study("there").record.grid["calibration"] == ["text.txt 4 x 32"]
    found["calibration"].append({"dataset": "c4"})
    Path("recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    assert main(["study", "recipe.yaml", *flags]) == 2
    assert "the recipe compares calibration texts" in capsys.readouterr().err


# Tasks that tune the model


@pytest.mark.slow
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
        assert {"korquad_exact_match", "korquad_f1", "nsmc_1_accuracy", "nsmc_2_accuracy"} <= result.figures.keys()
        assert all(row.tuning["task"] in ("korquad", "koalpaca") for row in result.measurements)
    text = Path("out/tables.md").read_text(encoding="utf-8")
    assert "## KorQuAD after LoRA" in text and "| prompt 2, after KoAlpaca tuning | magnitude |" in text
    assert "task: koalpaca" in text and "max_steps: 1" in text
    assert {path.name for path in Path("out/cells/dense").iterdir()} == {"result.json"}
    with pytest.raises(ValueError, match=r"korquad.max_steps: was 1, is 2"):
        run_study(recipe(**chosen | {"korquad": {**korquad, "max_steps": 2}}))


# Figures and tables


def made_up(methods: list[Any], calibration: list[dict[str, Any]], seeds: list[int], published: dict[str, Any]):
    """Results that nothing was measured for."""
    chosen = recipe(methods=methods, calibration=calibration, seeds=seeds, published=published)
    job = {"model": "m", "weights": "f" * 64, "dtype": "auto", "evaluation": {"texts": {"name": "kowiki"}}}
    record = Record(job, chosen.grid, chosen.published, grid(chosen))
    common = {"dtype": "float32", "prepend_bos": False}
    windows = {"seq_len": 32, "stride": None, "num_windows": 24, "num_tokens": 744}
    items = {"num_fewshot": 0, "limit": 25, "num_samples": 25, "split": "test", "data": {"name": "skt/kobest_v1"}}
    results = {}
    for name, cell in record.cells.items():
        seed = cell.places[0].seed or 0
        value = 20.0 if cell.settings is None else 30.0 + 2 * seed + cell.identity.get("num_samples", 0)
        protocol = {"texts": {"name": "kowiki", "sha256": "ab" * 32}, **windows, **common}
        rows = [Measurement("perplexity", {"perplexity": value, "bits_per_byte": 1.0}, protocol, {})]
        for number, task in enumerate(("copa", "hellaswag", "boolq", "sentineg", "wic")):
            rows.append(Measurement(task, {"acc": 0.5, "f1": (50 + number + seed) / 100}, {**items, **common}, {}))
        bits = 5.0 if "values" in cell.identity else 9.0
        report = {"density": 0.5, "mean_output_error": 0.2, "bits_per_weight": bits}
        pruning = {"seconds": 40.0 + value, "peak_memory_bytes": {"process": 2.5e9}, "report": report}
        hardware = {"device": "CPU" if seed < 2 else "GPU"}
        done = {"seconds": {}, "peak_memory_bytes": {}, "hardware": hardware, "versions": {"torch": "2"}}
        results[name] = CellResult(name, cell.identity, rows, pruning if cell.settings else None, **done)
    return StudyResults(record, results)


def test_mean_and_deviation():
    assert spread([1.0, math.inf]).text(2) == "∞"
    assert (spread([2.0, 4.0]).text(1), spread([2.0]).text(1)) == ("3.0 ± 1.4", "2.0")


def test_tables_say_what_was_found_and_how(workplace):
    published = {"perplexity": {"dense": 11.39, "2:4": 50.52}, "kobest_mean_f1": {"dense": 50.87}}
    results = made_up(["wanda", "magnitude"], [DATA], [0, 1, 2], {**published, "method": "wanda", "source": "a paper"})
    text = markdown(results)
    mean = "**mean** of COPA, HellaSwag, BoolQ, SentiNeg"  # WiC is not in it
    for said in (
        "## Perplexity on kowiki (lower is better)",
        "| method | dense | 50% | 2:4 |",
        "| wanda | 20.00 | 36.00 ± 2.00 | 36.00 ± 2.00 |",
        "| magnitude | 20.00 | 30.00 | 30.00 |",
        "| *published, wanda* | 11.39 |  | 50.52 |",
        "| COPA | wanda | 50.00 | 51.00 ± 1.00 | 51.00 ± 1.00 |",
        f"| {mean} | wanda | 51.50 | 52.50 ± 1.00 | 52.50 ± 1.00 |",
        f"| {mean} | *published, wanda* | 50.87 |  |  |",
        "| wanda | 16.00 | 9.00 ± 0.00 | 9.00 ± 0.00 |",
        "| seconds | wanda | 76.0 ± 2.0 | 76.0 ± 2.0 |",
        "| peak memory of the process in GB | magnitude | 2.50 | 2.50 |",
        "seeds 0, 1, 2 (n = 3)",
        "num_windows: 24",
        "    dataset:\n      file: text.txt\n",
        "hardware:\n- device: CPU\n- device: GPU\n",
    ):
        assert said in text, said
    assert "KorQuAD" not in text
    write_tables(results, workplace)
    written = json.loads(Path("results.json").read_text(encoding="utf-8"))
    rows = {(r["figure"], r["method"], r["pattern"]): r for r in written["rows"]}
    row = rows["perplexity", "wanda", "2:4"]
    assert (row["mean"], row["deviation"], row["seeds"], row["published"]) == (36, 2, 3, 50.52)
    assert rows["perplexity", "magnitude", "2:4"]["published"] is None, "another method's"
    assert rows["perplexity", "dense", "dense"]["published"] == 11.39
    assert len(written["cells"]) == 1 + 6 + 2 and len(written["rows"]) == len(rows)


def test_a_notebook_shows_the_tables(workplace):
    results = made_up([{"name": "<b>*w*</b>", "method": "wanda"}, "magnitude"], [DATA], [0, 1], {})
    text = results._repr_html_()
    assert text.count("<table>") == text.count("</table>") == markdown(results).count("\n## ") - 1
    for cell in ("&lt;b&gt;*w*&lt;/b&gt;", "35.00 ± 1.41", "mean of COPA, HellaSwag, BoolQ, SentiNeg"):
        assert f">{cell}</td>" in text
    assert "<b>" not in text and "seeds 0, 1 (n = 2)" in text


def test_a_row_for_each_calibration_set_where_there_are_several(workplace):
    sets = [{**DATA, "num_samples": n} for n in (2, 8)]
    text = markdown(made_up(["wanda", "magnitude"], sets, [0], {}))
    assert "| method | calibration | dense | 50% | 2:4 |" in text
    assert "| wanda | text.txt 2 x 32 | 20.00 | 32.00 | 32.00 |" in text
    assert "| magnitude | none | 20.00 | 30.00 | 30.00 |" in text
    assert "±" not in text


@pytest.mark.slow
def test_figures_are_drawn_where_there_is_something_to_draw(workplace):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    plain = made_up(["wanda", "magnitude"], [DATA], [0, 1], {})
    names = write_figures(plain, workplace)
    assert names == ["perplexity_by_pattern.png", "quality_by_time.png"], "calibration is not varied"
    Path("other.txt").write_text("another text\n\n" * 50, encoding="utf-8")
    sets = [DATA, {**DATA, "dataset": "other.txt", "num_samples": 8}]
    assert "quality_by_calibration.png" not in write_figures(made_up(["wanda"], sets, [0], {}), workplace)
    sets += [{**entry, "num_samples": 16} for entry in sets]
    several = made_up([{"name": "$x_1$ _한국어", "method": "sparsegpt"}], sets, [0], {})
    names = write_figures(several, workplace)
    assert names == ["perplexity_by_pattern.png", "quality_by_time.png", "quality_by_calibration.png"]
    assert all((workplace / name).read_bytes().startswith(b"\x89PNG") for name in names)
    quantised = made_up([{"name": "int8", "method": "wanda", "values": "int8"}, "wanda"], [DATA], [0, 1], {})
    assert write_figures(quantised, workplace)[-1] == "quality_by_bits.png"
    assert write_figures(StudyResults(plain.record, {}), workplace) == []
    assert not list(workplace.glob("*.png")), "old figures go"
