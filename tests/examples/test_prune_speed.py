"""The scripts that measure pruning beside llm-compressor and its growth: without llm-compressor, on tiny models."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimum_ksparse import SparsityConfig, kernels, sparsify

from ..conftest import CONTEXT, REPOSITORY, VOCABULARY


@pytest.fixture
def script(monkeypatch):
    """Imports one of the scripts, which import each other."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples/benchmarks"))
    return importlib.import_module


def make_results(runs):
    return {
        "hardware": {"device": "AMD EPYC", "threads": 2},
        "versions": {"optimum-ksparse": {"torch": "2.13.0"}, "llm-compressor": {"torch": "2.12.0"}},
        "setting": {"model": "tiny", "dtype": "float32", "samples": 4, "seq_len": 32, "batch_size": 2},
        "dense": {"perplexity": 20.0},
        "runs": runs,
    }


@pytest.mark.processes
def test_our_side_end_to_end(script, make_model, tokenizer, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out/results.json"
    make_model("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    given = {"model": model, "cache": tmp_path / "cache", "output": output, "methods": "sparsegpt", "repeats": 2}
    given |= {"samples": 3, "seq-len": CONTEXT, "windows": 2, "threads": 1, "tools": "optimum-ksparse"}
    speed = script("prune_speed")
    speed.main(speed.arguments([part for name, value in given.items() for part in (f"--{name}", str(value))]))
    results = json.loads(output.read_text(encoding="utf-8"))
    first, second = results["runs"]
    assert first["layers"] == 14 and first["density"] == 0.5 and first["perplexity"] > 1
    assert "perplexity" not in second
    assert 0 < second["prune_seconds"] < second["total_seconds"] and second["peak_bytes"] > 100 * 2**20
    assert results["setting"]["samples"] == 3 and results["dense"]["num_tokens"] == 2 * (CONTEXT - 1)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert not list((tmp_path / "cache").iterdir()), "what the runs wrote is gone"


def test_saved_tokens_are_taken_as_they_are(script, tmp_path, token_ids):
    from safetensors.torch import save_file

    torch.save(token_ids, tmp_path / "ids.pt")
    save_file({"calibration": token_ids}, tmp_path / "ids.safetensors")
    for name in ("ids.pt", "ids.safetensors"):
        assert torch.equal(script("prune_speed_worker").read_tokens(str(tmp_path / name)), token_ids)


@pytest.mark.processes
def test_a_failing_run_shows_its_log(script, tmp_path):
    run = {"threads": 1, "model": "no-such-folder", "tokens": str(tmp_path / "none.pt"), "method": "wanda"}
    with pytest.raises(RuntimeError, match=r"optimum-ksparse failed with status 1:(.|\n)*none\.pt"):
        speed = script("prune_speed")
        speed.run_once("optimum-ksparse", speed.sys.executable, run, tmp_path)


def test_a_layer_that_breaks_the_pattern_is_named(script, make_model):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    model.dequantize()
    assert script("prune_speed").check(model, "2:4") == {"layers": 14, "density": 0.5}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :4] = 1
    with pytest.raises(ValueError, match="mlp.up_proj"):
        script("prune_speed").check(model, "2:4")


def test_table_of_medians(script):
    row = {"method": "wanda", "pattern": "2:4", "tool": "llm-compressor"}
    runs = []
    for theirs, ours in ((40, 10), (90, 20), (60, 60)):
        theirs = row | {"prune_seconds": theirs, "total_seconds": theirs + 1, "peak_bytes": 3e9}
        ours = row | {"prune_seconds": ours, "total_seconds": ours + 1, "peak_bytes": 2e9, "tool": "optimum-ksparse"}
        runs += [ours | {"perplexity": 42.0}, theirs]
    text = script("prune_speed").table(make_results(runs))
    assert "| optimum-ksparse | wanda | 2:4 | 20.0 | 21.0 | 2.00 | 42.00 | 3.00 |" in text
    assert "| llm-compressor | wanda | 2:4 | 60.0 | 61.0 | 3.00 | – | 1.00 |" in text
    assert "AMD EPYC, 2 threads. tiny in float32" in text and "Medians of 3 runs" in text


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
def test_fit_of_exact_power_laws(script, power):
    sizes = (256, 512, 1024, 1280)
    assert math.isclose(script("prune_scaling").fit_exponent(sizes, [7e-5 * n**power for n in sizes]), power)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_counted_operations(script, method, make_model, monkeypatch):
    # torch does not see the products of native code.
    monkeypatch.setattr(kernels, "gains_natively", lambda *_: False)
    width, depth, samples, seq_len = 64, 3, 16, 32
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    model = make_model("gpt_neox", **sizes)
    ids = torch.randint(VOCABULARY, (samples, seq_len), generator=torch.Generator().manual_seed(0))

    def addmm(_, a, b, **settings):
        return 2 * a[0] * a[1] * b[1]

    # torch counts products, but not those that add in place, such as Gram matrices.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        sparsify(model, SparsityConfig(method, "2:4", dataset=ids))
    counted = script("prune_scaling").operations(method, width, depth, samples, seq_len)
    # Factors it does not count; sweeps are small here.
    products = sum(counted.get(part, 0) for part in ("forward", "errors", "gram"))
    assert math.isclose(counter.get_total_flops(), products, rel_tol=0.05)


@pytest.mark.processes
def test_scaling(script):
    scaling = script("prune_scaling")
    axes = {"width": (64, 128), "depth": (1, 2), "samples": (2, 4)}
    found = scaling.scaling(1, axes, {"width": 64, "depth": 1, "samples": 2})
    assert len(found["cells"]) == 12 and len(found["exponents"]) == 6
    text = scaling.scaling_tables(found)
    assert "Extrapolated on paper, not measured" in text
    assert all(f"| {model} | {method} |" in text for model in scaling.LARGE for method in scaling.METHODS)
    json.dumps(found)


def test_large_models_take_longer_on_paper(script):
    scaling = script("prune_scaling")
    small, large = (scaling.operations("sparsegpt", **sizes) for sizes in scaling.LARGE.values())
    assert all(large[part] > small[part] for part in small)
    assert scaling.on_paper(small)["bus"] == 0 < scaling.on_paper(large)["bus"], "175B do not fit one card"
