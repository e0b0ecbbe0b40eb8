"""`optimum-cli ksparse bench`: what it measures, writes and draws; the README's table; the script for a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optimum_ksparse import SparsityConfig, kernels, sparsify
from optimum_ksparse.kernels import candidates, hardware
from optimum_ksparse.study.benchmark import (
    FIGURE_NAME,
    MODELS,
    RESULTS_NAME,
    BenchResults,
    bench_model,
    draw_speedup,
    layer_shapes,
    run,
)
from optimum_ksparse.study.benchmark import run as bench
from optimum_ksparse.study.benchmark.layers import _library_shares, bench_layers
from optimum_ksparse.study.benchmark.models import model_config

from ..conftest import REPOSITORY

KEYS = {"shape", "tokens", "dtype", "pattern", "kernel", "dense_us", "sparse_us", "speedup", "dense_bytes"}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"examples/benchmarks/{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(REPOSITORY / "examples/benchmarks"))  # its neighbours
    try:
        spec.loader.exec_module(script)
    finally:
        sys.path.pop(0)
    return script


def make_results(**hardware_facts):
    """Results as a GPU might give them: three kernels for each product."""
    rows = []
    for shape, pattern in itertools.product(([4096, 4096], [12288, 4096]), ("2:4", "4:8")):
        size = shape[0] * shape[1] * 2
        product = {"shape": shape, "pattern": pattern, "dtype": "bfloat16", "dense_bytes": size}
        for tokens, dense, sparse in ((1, 12.0, 8.0), (16, 14.0, 10.0), (128, 20.0, 21.0), (1024, 90.0, 95.0)):
            for kernel, us in (("gemv", sparse), ("dot", sparse + 1), ("decompress", sparse + 30)):
                times = {"dense_us": dense, "sparse_us": us, "speedup": dense / us, "packed_bytes": size * 9 // 16}
                times["rivals_us"] = {"bfloat16": dense}
                chosen = {"tokens": tokens, "kernel": kernel, "config": {}, "chosen": kernel == "gemv"}
                rows.append({**product, **times, **chosen})
    return BenchResults({"device": "Some GPU", **hardware_facts}, {"torch": "2.13.0"}, rows)


def test_shapes_of_models_by_name():
    assert {name: layer_shapes(model_config(name)) for name in MODELS} == {
        "polyglot-ko-5.8b": [(4096, 16384), (16384, 4096), (12288, 4096), (4096, 4096)],
        "polyglot-ko-12.8b": [(5120, 20480), (20480, 5120), (15360, 5120), (5120, 5120)],
        "llama-3-8b": [(4096, 14336), (14336, 4096), (4096, 4096), (1024, 4096)],
        "gemma-3-270m": [(640, 2048), (2048, 640), (640, 1024), (1024, 640), (256, 640)],
    }


@pytest.mark.slow
def test_a_run_on_shapes(tmp_path):
    run(shapes=["32x64"], tokens=[1, 3], dtype="float32", output=str(tmp_path), device="cpu")
    data = json.loads((tmp_path / RESULTS_NAME).read_text())
    assert set(data) == {"hardware", "versions", "rows", "models"}
    products = [(pattern, tokens) for pattern in ("2:4", "4:8", "50%") for tokens in (1, 3)]
    assert [(row["pattern"], row["tokens"]) for row in data["rows"] if row["chosen"]] == products
    assert {row["kernel"] for row in data["rows"]} <= {"native", "reference"}
    for row in data["rows"]:
        assert row.keys() >= KEYS
        assert row["shape"] == [32, 64] and row["dense_bytes"] == 32 * 64 * 4
        assert row["packed_bytes"] == 32 * 64 * (2 + 1 / 8)
        assert set(row["rivals_us"]) == {"float32", "bfloat16"} and row["dense_us"] == min(row["rivals_us"].values())
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"], rel=1e-2)
    assert data["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert (tmp_path / FIGURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert "32 x 64" in str(BenchResults.load(tmp_path / RESULTS_NAME))


@pytest.mark.slow
def test_values_are_an_axis(tmp_path):
    """Quantised ones beside those in the dtype, with the same dense rival, and the kernel that the dispatch takes."""
    how = {"shapes": ["64x128"], "tokens": [1, 3], "patterns": ["2:4"], "dtype": "float32", "device": "cpu"}
    rows = run(values=["int8", "int4"], output=str(tmp_path), **how).chosen()
    weights = 64 * 128
    scales = {None: 0, "int8": 64 * 4, "int4": 64 * 2 * 4}  # one a row; one for 64 columns of it
    widths = {None: 4, "int8": 1, "int4": 0.5}
    products = [(values, tokens) for values in widths for tokens in (1, 3)]
    assert [(row["values"], row["tokens"]) for row in rows] == products
    for row in rows:
        assert row["packed_bytes"] == weights / 2 * widths[row["values"]] + weights / 8 + scales[row["values"]]
        problem = kernels.Problem(64, 128, row["tokens"], "2:4", torch.float32, torch.device("cpu"), row["values"])
        (weight,) = kernels.sample_weights(problem, 1)
        assert row["kernel"] == kernels.choose(weight, row["tokens"]).kernel
        tensors = weight.values, weight.bits, *(() if weight.scale is None else (weight.scale,))
        assert sum(tensor.nbytes for tensor in tensors) == row["packed_bytes"]
    for tokens in (1, 3):
        assert len({row["dense_us"] for row in rows if row["tokens"] == tokens}) == 1
    lines = [line.split() for line in str(BenchResults.load(tmp_path / RESULTS_NAME)).splitlines()]
    named = [line[3:-5] for line in lines if line[:1] == ["64"]]
    assert named == [["2:4", *filter(None, [values]), "float32"] for values, _ in products]


@pytest.mark.parametrize("tokens", [1, 300])
def test_what_is_chosen_on_a_cpu_is_what_the_dispatch_takes(monkeypatch, tokens):
    """Whatever else is faster in a measurement."""
    monkeypatch.setattr(
        kernels.dispatch, "time_calls", lambda calls, device: 5.0 if hasattr(calls[0].func.__self__, "kernel") else 9.0
    )
    problem = kernels.Problem(64, 128, tokens, "2:4", torch.float32, torch.device("cpu"), "int8")
    (weight,) = kernels.sample_weights(problem, 1)
    (row,) = (row for row in bench_layers(problem) if row["chosen"])
    assert row["kernel"] == kernels.choose(weight, tokens).kernel


def test_every_kernel_has_a_row_and_the_dispatch_takes_the_chosen_one(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(hardware, "runs_kernels", lambda device: True)
    monkeypatch.setattr(hardware, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(candidates, "why_not_native", lambda: "this is a GPU")
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path))
    speeds = {"gemv": 7.0, "dot": 6.0, "decompress": 9.0, "dense": 8.0}
    monkeypatch.setattr(
        kernels.dispatch,
        "time_calls",
        lambda calls, device: speeds[getattr(calls[0].func.__self__, "kernel", "dense")],
    )
    kernels.forget()
    problem = kernels.Problem(32, 64, 4, "2:4", torch.bfloat16, torch.device("cpu"))
    rows = bench_layers(problem)
    assert {row["kernel"]: row["chosen"] for row in rows} == {"gemv": False, "dot": True, "decompress": False}
    assert {row["dense_us"] for row in rows} == {8.0}
    (weight,) = kernels.sample_weights(problem, 1)
    assert kernels.choose(weight, 4).kernel == "dot"
    kernels.forget()


@pytest.mark.parametrize("shares", [True, False])
def test_a_library_form_that_shares_no_values_has_no_row(monkeypatch, shares):
    problem = kernels.Problem(32, 64, 128, "2:4", torch.bfloat16, torch.device("cpu"))
    speeds = {"dot": 10.0, "library": 4.0, "dense": 8.0}
    found = {name: (kernels.Candidate(name), microseconds) for name, microseconds in speeds.items()}
    monkeypatch.setattr(kernels, "has_kernels", lambda problem: True)
    monkeypatch.setattr(kernels, "measure", lambda problem: found)
    monkeypatch.setattr(kernels, "library_form", lambda values, bits, in_features: values.flatten())
    monkeypatch.setattr(kernels, "shared_values", lambda form, values: values if shares else None)
    _library_shares.cache_clear()
    rows = {row["kernel"]: row for row in bench_layers(problem)}
    _library_shares.cache_clear()
    assert set(rows) == ({"dot", "library"} if shares else {"dot"})
    assert [name for name, row in rows.items() if row["chosen"]] == ["library" if shares else "dot"]


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_whole_model(make_model, kind, values):
    model = make_model("llama")
    if kind == "sparse":
        sparsify(model, SparsityConfig("magnitude", "4:8", values=values))
    row = bench_model(model, "tiny", values=None if kind == "sparse" else values, prompt_tokens=16, new_tokens=4)
    assert (row["pattern"], row["values"]) == ("4:8" if kind == "sparse" else "2:4", values)
    assert row["prompt_tokens"] == 16 and row["cuda_graphs"] is False
    for phase in ("prefill", "decode"):
        rates = [row[f"{one}_{phase}_tokens_per_s"] for one in ("dense", "sparse")]
        assert min(rates) > 0
        assert row[f"{phase}_speedup"] == pytest.approx(rates[1] / rates[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("values", [None, "int4"])
def test_a_checkpoint(make_model, tmp_path, values):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", values=values))
    model.save_pretrained(tmp_path / "sparse")
    results = run(str(tmp_path / "sparse"), tokens=[1], prompt_tokens=8, output=str(tmp_path / "out"), device="cpu")
    assert {tuple(row["shape"]) for row in results.rows} == {(32, 32), (16, 32), (64, 32), (32, 64)}
    assert {row["values"] for row in results.rows} == {values}
    assert [(row["model"], row["values"]) for row in results.models] == [("sparse", values)]
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is a dense checkpoint"):
        run(str(tmp_path / "dense"), output=str(tmp_path / "other"), device="cpu")


def test_what_was_measured_stays(tmp_path, monkeypatch):
    module = sys.modules[bench.__module__]
    original, calls = module.bench_layers, []

    def interrupted(problem):
        calls.append(problem)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(problem)

    monkeypatch.setattr(module, "bench_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(shapes=["32x64"], tokens=[1, 2], dtype="float32", output=str(tmp_path), device="cpu")
    assert {row["tokens"] for row in BenchResults.load(tmp_path / RESULTS_NAME).rows} == {1}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([RESULTS_NAME, FIGURE_NAME])
    calls[:] = calls[:1]  # interrupted in the first product: the earlier results stay
    with pytest.raises(KeyboardInterrupt):
        run(shapes=["32x64"], tokens=[1, 2], dtype="float32", output=str(tmp_path), device="cpu")
    assert {row["tokens"] for row in BenchResults.load(tmp_path / RESULTS_NAME).rows} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ["llama"]}, "'llama'"),
        ({"whole_models": ["gpt2"]}, "'gpt2'"),
        ({"shapes": ["32"]}, "'32' is not OUTxIN"),
        ({"shapes": ["32x63"]}, "63 input features"),
        ({"patterns": ["5:4"]}, "pattern='5:4'"),
        ({"tokens": [0]}, r"tokens\[0\] is 0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"values": ["int3"]}, "values='int3'"),
        ({"layers": 0}, "layers is 0"),
        ({"device": "cuda:x"}, "device='cuda:x'"),
        ({"device": "cuda:99"}, "torch sees no such CUDA GPU here"),
    ],
)
def test_bad_settings_are_errors_before_any_work(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(output=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", '{"rows": []}', '{"hardware": {}, "versions": {}, "rows": [1]}'])
def test_files_that_hold_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json holds no results of the benchmark"):
        BenchResults.load(tmp_path / "x.json")


def test_the_figure(tmp_path, monkeypatch):
    results = make_results()
    results.rows += [{**row, "values": "int8", "packed_bytes": row["dense_bytes"] // 3} for row in results.rows]
    results.rows[0] |= {"speedup": 7.0}
    panels = {}
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title, **how: panels.update({title: axes}))
    assert draw_speedup(results, tmp_path / "a.png")
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 7 for axes in panels.values())
    assert list(panels) == ["2:4 bfloat16", "2:4 int8 bfloat16", "4:8 bfloat16", "4:8 int8 bfloat16"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_speedup(BenchResults({"device": ""}, {}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_table_says_what_was_measured_and_what_was_not():
    speed_table = load_script("readme_tables").speed_table
    hopper = make_results(capability="9.0")
    hopper.rows += [{**row, "values": "int8", "speedup": 2 * row["speedup"]} for row in hopper.rows]
    model = {"model": "m", "pattern": "2:4", "dtype": "bfloat16", "prefill_speedup": 0.97, "decode_speedup": 1.5}
    hopper.models = [{**model, "cuda_graphs": True}]
    text = speed_table([hopper])
    assert "| Some GPU | 2:4, bfloat16 | 1 | 1.50 | gemv |" in text
    assert "| Some GPU | 4:8, bfloat16 | 1024 | 0.95 | gemv |" in text
    assert "| Some GPU | 4:8, int8 bfloat16 | 1024 | 1.89 | gemv |" in text
    assert "| Some GPU | m | 2:4, bfloat16 | 0.97 | 1.50 | yes |" in text
    assert "Ampere itself is compiled for and not measured" in text and "Not measured yet" not in text
    assert "Ampere" not in speed_table([make_results(capability="8.0")])
    assert "Ampere itself" in speed_table([make_results(capability="8.9")])  # Ada
    assert "Not measured yet on any NVIDIA GPU" in speed_table([make_results()])
    assert "측정하지 않았습니다" in speed_table([], "ko")


def test_pages_hold_the_tables_of_the_committed_files():
    script = load_script("readme_tables")
    for language, pages in script.PAGES.items():
        texts = [page.read_text(encoding="utf-8") for page in pages]
        for name in script.TABLES:
            assert any(f"<!-- {name} table -->\n" in text and f"<!-- /{name} table -->" in text for text in texts), (
                name
            )
        for text in texts:
            assert script.filled(text, language) == text, "run readme_tables.py"


@pytest.mark.processes
def test_a_step_that_hangs_keeps_what_it_wrote_and_does_not_lose_the_others(tmp_path, monkeypatch):
    hanging = "import os, signal, sys, time\n{}\ntry: os.mkdir(sys.argv[1]), time.sleep(3600)\nfinally: {}"
    stubborn = hanging.format("signal.signal(signal.SIGINT, signal.SIG_IGN)", "pass")
    polite = hanging.format("", "open(sys.argv[1] + '/a', 'w')")
    steps = {
        "stubborn": (1, [sys.executable, "-c", stubborn, "{own}"]),
        "polite": (1, [sys.executable, "-c", polite, "{own}"]),
        "after": (1, [sys.executable, "-c", "print('done')"]),
    }

    class Process(subprocess.Popen):
        """For a step that hangs the time is over as soon as it is at work, whatever the machine."""

        limits = 0

        def wait(self, timeout=None):
            name, self.limits = Path(self.args[-1]).name, self.limits + (timeout is not None)
            if timeout is None or name not in ("stubborn", "polite") or (name == "polite" and self.limits == 2):
                return super().wait()
            while not (tmp_path / name).is_dir():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    script = load_script("gpu_check")
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    assert script.main(tmp_path, 600, False, steps) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["ended"] for step in summary.values()] == ["out of time", "out of time", "0"]
    assert (tmp_path / "polite-a").is_file() and (tmp_path / "after.log").read_text() == "done\n"


def test_the_shares_of_time_of_the_script_stay_below_the_whole():
    script = load_script("gpu_check")
    for steps in (script.STEPS, script.QUICK):
        assert sum(share for share, _ in steps.values()) <= 1
