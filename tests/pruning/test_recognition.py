"""Models that were pruned elsewhere: their patterns are recognised, and their files converted block by block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.checkpoint import fingerprint, sparse_layers
from optimum_ksparse.pruning.streaming import Workspace

from ..compressed_tensors import FORMATS, write, zero
from ..conftest import thinned
from .test_streaming import contents, fails

STORAGES = ["packed", "dense", "compressed-tensors"]


def load(folder: Path, **arguments: Any):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **arguments}).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def source(make_model, tokenizer, tmp_path):
    """Makes a source of three blocks, in several files, with a tokenizer."""

    def make(form: str = "sparse-24-bitmask", n: int | None = 2, m: int = 4, **settings: Any) -> Path:
        model = make_model("llama", torch.bfloat16, num_hidden_layers=3)
        zero(model, n, m)
        folder = write(model, tmp_path / f"source-{form}", form, files=4, **settings)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_source_is_converted_from_disk_to_disk(source, tmp_path, token_ids, form, storage):
    folder = source(form)
    report = prune_checkpoint(folder, tmp_path / "out", SparsityConfig("existing", storage=storage))
    assert (report.method, report.base_model, report.patterns) == ("existing", folder.name, ["2:4"])
    assert (report.config["pattern"], report.skipped, len(report.layers)) == ("2:4", {}, 21)
    expected, model = load(folder), load(tmp_path / "out")
    assert model.sparsity_report == report
    assert report.fingerprint == fingerprint(model) == fingerprint(expected)
    assert report.num_parameters == expected.sparsity_report.num_parameters
    assert model.config.quantization_config.storage == storage
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)
    if storage == "compressed-tensors" and form == "sparse-24-bitmask":
        stored, original = tensors(tmp_path / "out"), tensors(folder)
        assert stored.keys() == original.keys()
        assert all(torch.equal(stored[name], original[name]) for name in original)
    if storage == "dense":
        plain = tensors(tmp_path / "out")
        layers = sparse_layers(expected)
        assert all(torch.equal(plain[f"{name}.weight"], layer.to_dense_weight()) for name, layer in layers.items())


@pytest.mark.parametrize("form", FORMATS[1:])
def test_a_mask_of_any_kind_stays_as_it_is(source, tmp_path, form):
    folder = source(form, n=None)
    report = prune_checkpoint(folder, tmp_path / "out", SparsityConfig("existing", storage="compressed-tensors"))
    assert all("%" in pattern for pattern in report.patterns)
    if form == "sparse-bitmask":
        stored, original = tensors(tmp_path / "out"), tensors(folder)
        assert stored.keys() == original.keys()
        assert all(torch.equal(stored[name], original[name]) for name in original)


@pytest.mark.parametrize("form", ["sparse-bitmask", "dense"])
def test_groups_in_masks_of_any_kind_are_found(source, tmp_path, form):
    folder = source(form, 4, 8)
    assert prune_checkpoint(folder, tmp_path / "out", SparsityConfig("existing")).patterns == ["4:8"]
    for model in (load(folder), load(tmp_path / "out")):
        assert {str(layer.pattern) for layer in sparse_layers(model).values()} == {"4:8"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("after", thinned([0, 1, 2], [1]))
def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, form, after):
    folder, config = source(form), SparsityConfig("existing")
    prune_checkpoint(folder, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, after, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(folder, tmp_path / "out", config)
    prune_checkpoint(folder, tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert prune_checkpoint(folder, tmp_path / "out", config) == SparsityReport.load(
        tmp_path / "out" / "sparsity_report.json"
    )


def test_patterns_are_recognised_once_for_a_run(source, tmp_path, monkeypatch):
    from optimum_ksparse.pruning import recognition

    folder, config, seen = source("dense"), SparsityConfig("existing"), []
    original = recognition._pattern
    monkeypatch.setattr(recognition, "_pattern", lambda job, layer: seen.append(layer) or original(job, layer))
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(folder, tmp_path / "out", config)
    prune_checkpoint(folder, tmp_path / "out", config)
    assert len(seen) == 21


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_and_unfit_sources_are_refused_before_any_work(source, tmp_path, form):
    folder = source(form, sparsity={"format": "sparse-48-bitmask"})
    with pytest.raises(ValueError, match="allowed: sparse-24-bitmask, sparse-bitmask, dense"):
        prune_checkpoint(folder, tmp_path / "out", SparsityConfig("existing"))
    shutil.rmtree(folder)
    folder = source(form)
    with pytest.raises(ValueError, match="sparse already"):
        prune_checkpoint(folder, tmp_path / "out", SparsityConfig("magnitude"))
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=path.name):
        prune_checkpoint(folder, tmp_path / "out", SparsityConfig("existing"))
    assert not (tmp_path / "out").exists()


def test_each_layer_has_its_own_pattern_and_some_stay_dense(make_model, token_ids):
    dense = make_model("llama")
    first, second = (layer.mlp for layer in dense.model.layers)
    zero(first.gate_proj)
    zero(first.up_proj, 1, 4)
    zero(second.gate_proj, 4, 8)
    zero(second.up_proj, None, share=0.7)
    weights = {name: module.weight.clone() for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    report = sparsify(dense, SparsityConfig("existing"))
    patterns = {row.name: row.pattern for row in report.layers}
    share = patterns.pop("layers.1.mlp.up_proj")
    assert patterns == {
        "layers.0.mlp.gate_proj": "2:4",
        "layers.0.mlp.up_proj": "1:4",
        "layers.1.mlp.gate_proj": "4:8",
    }
    assert abs(float(share.rstrip("%")) - 70) < 1
    assert len(report.skipped) == 10 and all("not sparse" in reason for reason in report.skipped.values())
    assert all(torch.equal(layer.to_dense_weight(), weights[name]) for name, layer in sparse_layers(dense).items())


def test_stacked_experts_with_groups_are_found_and_others_stay_dense(token_ids):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=384)
    model = AutoModelForCausalLM.from_config(config).eval()
    stack, other = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    stack.gate_up_proj.data.view(-1, 4)[:, :2] = 0
    other.gate_up_proj.data[torch.rand(other.gate_up_proj.shape) < 0.5] = 0
    with torch.no_grad():
        before = model(token_ids).logits
        report = sparsify(model, SparsityConfig("existing"))
        assert torch.allclose(model(token_ids).logits, before, atol=1e-5)
    assert {row.name: row.pattern for row in report.layers} == {"layers.0.mlp.experts.gate_up_proj": "2:4"}
    assert "layers.1.mlp.experts.gate_up_proj" in report.skipped


def test_a_model_on_the_hub(source, tmp_path, hub):
    from huggingface_hub import HfApi

    HfApi().create_repo("somebody/sparse")
    commit = HfApi().upload_folder(repo_id="somebody/sparse", folder_path=source("sparse-bitmask")).oid
    report = prune_checkpoint("somebody/sparse", tmp_path / "out", SparsityConfig("existing"))
    assert (report.base_model, report.base_revision) == ("somebody/sparse", commit)
    model = load("somebody/sparse")
    assert (model.sparsity_report.base_model, model.sparsity_report.base_revision) == ("somebody/sparse", commit)
    assert fingerprint(model) == report.fingerprint
