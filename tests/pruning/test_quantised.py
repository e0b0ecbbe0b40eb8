"""Models whose kept values are quantised: pruned, saved, loaded and streamed as others are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.checkpoint import fingerprint, sparse_modules
from optimum_ksparse.config import METHOD_SETTINGS
from optimum_ksparse.pruners.statistics import GramMatrix
from optimum_ksparse.pruning.streaming import Workspace
from optimum_ksparse.quantization import LIMITS
from optimum_ksparse.records import to_json

from ..compressed_tensors import FORMATS, write, zero
from ..nn.test_experts import COMMON, IDS
from .test_streaming import assert_same_tensors, contents, fails, tensors

EVERY = pytest.mark.parametrize("values", sorted(LIMITS))
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(make_pruned: Any, tmp_path: Path) -> Any:
    """A model with quantised values, and the folder that it was saved into."""

    def make(values: str = "int8", pattern: str = "2:4", dtype: Any = torch.bfloat16, **settings: Any) -> Any:
        model = make_pruned("llama", pattern, dtype, values=values, **settings)
        model.save_pretrained(tmp_path / "saved")
        return model, tmp_path / "saved"

    return make


def assert_same_model(found: Any, expected: Any) -> None:
    assert_same_tensors(found.state_dict(), expected.state_dict())
    assert fingerprint(found) == fingerprint(expected)
    for module, other in zip(sparse_modules(found).values(), sparse_modules(expected).values(), strict=True):
        assert (module.values, module.group_size) == (other.values, other.group_size)


@EVERY
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_what_is_saved_is_loaded(saved, values, pattern):
    model, folder = saved(values, pattern, group_size=64)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(loaded, model)
    assert str(loaded.sparsity_report) == str(model.sparsity_report)
    assert values in str(loaded.sparsity_report)
    stored, report = load_file(folder / "model.safetensors"), loaded.sparsity_report
    layers = [name.removesuffix(".weight_mask") for name in stored if name.endswith(".weight_mask")]
    kinds = ("weight", "weight_mask", "weight_scale")
    assert report.packed_bytes == sum(stored[f"{layer}.{kind}"].nbytes for layer in layers for kind in kinds)
    assert report.bits_per_weight == 8 * report.packed_bytes / report.num_weights


@EVERY
def test_another_dtype_is_that_of_the_products(saved, values):
    model, folder = saved(values)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for module, other in zip(sparse_modules(loaded).values(), sparse_modules(model).values(), strict=True):
        assert module.dtype is torch.float32 and torch.equal(module.weight, other.weight)
        torch.testing.assert_close(module.to_dense_weight(), other.to_dense_weight().float(), rtol=1e-2, atol=0)


@EVERY
def test_dense_storage_holds_integers_times_scales(saved, values, tmp_path):
    model, _ = saved(values, storage="dense")
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert torch.equal(stored[f"{NAME}.weight"], dict(model.named_modules())[NAME].to_dense_weight())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.config.quantization_config.values is None and loaded.sparsity_report.config.get("values") is None
    assert loaded.sparsity_report.bits_per_weight == 9


def test_experts(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MixtralConfig(**COMMON)).save_pretrained(tmp_path / "dense")
    config = SparsityConfig("wanda", "2:4", dataset=IDS, values="int4")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=config)
    pruned.save_pretrained(tmp_path / "memory")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "memory"), pruned)
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", config)
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))


@EVERY
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_from_disk_to_disk_it_is_the_same(values, storage, tmp_path, source, config):
    asked = config("wanda", values=values, storage=storage, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=asked)
    model.save_pretrained(tmp_path / "memory")
    report = prune_checkpoint(source, tmp_path / "disk", asked)
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert (tmp_path / "disk/config.json").read_bytes() == (tmp_path / "memory/config.json").read_bytes()
    expected = SparsityReport.load(tmp_path / "memory/sparsity_report.json")
    assert report.fingerprint == expected.fingerprint and report.packed_bytes == expected.packed_bytes
    for row, other in zip(report.layers, expected.layers, strict=True):
        assert row.relative_output_error == other.relative_output_error


def test_blocks_tuned_from_disk_to_disk_are_the_same(tmp_path, source, config):
    asked = config("sparsegpt", values="int4", reconstruct="block", reconstruction_epochs=1)
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=asked)
    model.save_pretrained(tmp_path / "memory")
    prune_checkpoint(source, tmp_path / "disk", asked)
    assert_same_tensors(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))


def test_a_run_that_was_cut_off_goes_on(tmp_path, source, config, monkeypatch, always_snapshot):
    asked = config("sparsegpt", values="int8")
    prune_checkpoint(source, tmp_path / "whole", asked)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "disk", asked)
    with pytest.raises(ValueError, match="values"):
        prune_checkpoint(source, tmp_path / "disk", config("sparsegpt"))
    prune_checkpoint(source, tmp_path / "disk", asked)
    assert contents(tmp_path / "disk") == contents(tmp_path / "whole")


def test_the_error_counts_the_rounding(tmp_path, source, config):
    errors = {}
    for values in (None, "int8", "int4"):
        model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=config("admm", values=values))
        rows = model.sparsity_report.layers
        errors[values] = [row.relative_output_error for row in rows]
        if values is not None:
            assert all(row.relative_output_error <= row.nearest_output_error for row in rows)
            assert values in str(model.sparsity_report) and "nearest" in str(model.sparsity_report)
    assert all(a <= 1.01 * b for a, b in zip(errors["int8"], errors["int4"], strict=True))
    assert errors["int8"] != errors[None] and sum(errors["int4"]) > sum(errors[None])
    model.sparsity_report.save(tmp_path)
    assert SparsityReport.load(tmp_path / "sparsity_report.json").layers == rows


def test_a_report_without_quantised_values_is_one_that_earlier_versions_read(source, config):
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=config("wanda"))
    assert "nearest_output_error" not in to_json(model.sparsity_report)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_rounding_reads_what_the_method_reads(source, config, method):
    """Of a method with data Gram matrices; magnitude stays without."""
    asked = config(method, values="int4")
    assert asked.statistics is (None if method == "magnitude" else GramMatrix)
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=asked)
    measured = [row.nearest_output_error is not None for row in model.sparsity_report.layers]
    assert all(measured) if method != "magnitude" else not any(measured)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("weight_scale", lambda t: t.fill_(float("nan"))),
        ("weight_scale", lambda t: t.fill_(float("inf"))),
        ("weight_scale", lambda t: t.fill_(3e38)),
        ("weight_scale", lambda t: t.fill_(-1.0)),
        ("weight_scale", lambda t: t.repeat(1, 2)),
        ("weight_scale", lambda t: t.to(torch.int8)),
        ("weight_scale", lambda t: None),
        ("weight", lambda t: t.fill_(-128)),
        ("weight", lambda t: t.float()),
        ("weight", lambda t: t.view(torch.uint8)),
        ("weight", lambda t: t[:, :-1].contiguous()),
        ("weight_mask", lambda t: t.fill_(255)),
    ],
)
def test_files_that_cannot_be_right_are_refused(saved, name, spoil):
    _, folder = saved()
    stored = load_file(folder / "model.safetensors")
    changed = spoil(stored.pop(f"{NAME}.{name}"))
    if changed is not None:
        stored[f"{NAME}.{name}"] = changed
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{NAME}.{name}".removeprefix("model.")):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("name", "value"), [("values", None), ("values", "int4"), ("group_size", 32), ("values", 8)])
def test_a_config_that_cannot_be_right_is_refused(saved, name, value):
    _, folder = saved()
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"][name] = value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="values|group_size|weight"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("group_size", [2**63, 2**64, 2**70])
def test_a_group_larger_than_a_row_is_the_row(saved, group_size):
    _, folder = saved()
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["group_size"] = group_size
    (folder / "config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS[:1]).logits, model(IDS[:1]).logits)
    loaded(IDS[:1], labels=IDS[:1]).loss.backward()


def test_scales_without_room_in_the_dtype_are_refused(saved):
    _, folder = saved()
    stored = load_file(folder / "model.safetensors")
    stored[f"{NAME}.weight_scale"].fill_(1000.0)  # 127 times that is no float16
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale.*bfloat16"):
        AutoModelForCausalLM.from_pretrained(folder, dtype="float16")


@EVERY
@pytest.mark.parametrize("scale", [1e-9, 3e-7, 1e4])
def test_scales_that_a_cast_changes_are_told_of(saved, values, scale, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("optimum_ksparse.quantization.logger.warning", told.append)
    model, folder = saved(values, dtype=torch.float32)
    layer = model.get_submodule(NAME)
    layer.weight_scale[:] = 0.01
    layer.weight_scale[3] = scale
    model.save_pretrained(folder)
    copy.deepcopy(model).bfloat16().float()
    assert not told
    model.half()
    (text,) = told
    assert "SparseLinear(in_features=32" in text and f"1 of 64 scales of its {values} values" in text
    assert f"{scale:.3g}" in text and "dequantize_values()" in text
    if scale < 1:  # the others are refused
        AutoModelForCausalLM.from_pretrained(folder, dtype="float16")
        assert len(told) == 2 and told[1].startswith(f"{NAME}: 1 of 64 scales")


@EVERY
def test_a_model_in_float64_is_saved_and_loaded(saved, values, tmp_path):
    model, _ = saved(values)
    model.double().save_pretrained(tmp_path / "double")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "double", dtype="auto")
    assert loaded.dtype is torch.float64
    assert_same_model(loaded, model)


def test_an_earlier_version_refuses_and_says_what_to_do(saved, monkeypatch):
    _, folder = saved()
    recorded = json.loads((folder / "config.json").read_text())["quantization_config"]
    earlier = [name for name in SparsityConfig().to_dict() if name in recorded]
    assert recorded.keys() - {*earlier, "names", "layers"} == {"values", "group_size", "format_version"}
    recorded["format_version"] += 1
    with pytest.raises(ValueError, match="upgrade"):
        SparsityConfig.from_dict(recorded)
    monkeypatch.setattr("optimum_ksparse.config.FLAT_SETTINGS", [*earlier, *METHOD_SETTINGS])
    monkeypatch.setattr("optimum_ksparse.config.RECORDED", ("layers", "names"))
    with pytest.raises(ValueError, match="upgrade"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_cannot_be_scaled_well(make_model):
    """Rows and groups of zeros, and one huge value in a group, are exact, or as near as integers are."""
    model = make_model("llama", torch.float16, intermediate_size=128)
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[0], weight[1, :64], weight[2, 5], weight[3, 70] = 0, 0, 65504.0, 1e-7
    sparsify(model, SparsityConfig("magnitude", "2:4", values="int8", group_size=64))
    dense = model.model.layers[0].mlp.down_proj.to_dense_weight()
    assert dense.isfinite().all() and not dense[0].any() and not dense[1, :64].any()
    assert dense[2, 5] > 65000 and dense[1, 64:].any()


@EVERY
def test_dequantized_values_are_the_same_weights_and_train(saved, values, tmp_path):
    model, folder = saved(values)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="dequantize_values"):
        Trainer(loaded, TrainingArguments(str(tmp_path / "run"), report_to=[]))
    assert loaded.dequantize_values() is loaded
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.sparsity_report.bits_per_weight == 9 and "values" not in loaded.sparsity_report.config
    loaded(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert all(module.weight.grad is not None for module in sparse_modules(loaded).values())
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), loaded)
    assert SparsityReport.load(tmp_path / "again/sparsity_report.json").fingerprint == fingerprint(model)


def test_a_dense_model_has_no_values_to_dequantize(make_model):
    with pytest.raises(ValueError, match="sparse"):
        make_model("llama").dequantize_values()


@EVERY
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_offloaded_weights_compute_and_are_checked(values, kind, tmp_path, make_model):
    torch.manual_seed(0)
    model = make_model("llama") if kind == "llama" else AutoModelForCausalLM.from_config(MixtralConfig(**COMMON))
    sparsify(model, SparsityConfig("magnitude", "2:4", values=values))
    model.save_pretrained(tmp_path / "saved")
    places = {f"model.layers.{index}": "disk" for index in range(2)}
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    offloading = {"device_map": places, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **offloading)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS[:1]).logits, model(IDS[:1]).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "saved"))
    if values == "int8":
        stored = load_file(tmp_path / "saved/model.safetensors")
        name = next(name for name in stored if stored[name].dtype is torch.int8)
        stored[name].fill_(-128)
        save_file(stored, tmp_path / "saved/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name.removeprefix("model.")):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **offloading)


# ---- models that are sparse already


def quantising(values: str = "int8", **settings: Any) -> SparsityConfig:
    return SparsityConfig("existing", values=values, group_size=64, **settings)


def dense_weights(folder: Path) -> dict[str, torch.Tensor]:
    modules = sparse_modules(AutoModelForCausalLM.from_pretrained(folder))
    assert all(module.values == "int8" for module in modules.values())
    return {name: module.to_dense_weight() for name, module in modules.items()}


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_a_sparse_model_of_ours_gets_quantised_values_and_keeps_its_records(
    storage, pattern, tmp_path, source, config
):
    prune_checkpoint(source, tmp_path / "sparse", config("wanda", pattern, storage=storage))
    report = prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    before = model.sparsity_report
    in_memory = sparsify(model, quantising())
    model.save_pretrained(tmp_path / "memory")
    found, expected = dense_weights(tmp_path / "disk"), dense_weights(tmp_path / "memory")
    assert_same_tensors(found, expected)
    for made in (report, in_memory, AutoModelForCausalLM.from_pretrained(tmp_path / "disk").sparsity_report):
        assert (made.config["method"], made.config["pattern"], made.config["values"]) == ("wanda", pattern, "int8")
        assert made.config["storage"] == "packed" and made.calibration == before.calibration
        assert str(made.changes[-1]) == "kept values quantised to int8" and made.base_model == before.base_model
        assert made.fingerprint in (fingerprint(model), None) and made.packed_ratio < 0.2
        assert [row.relative_output_error for row in made.layers] == [
            row.relative_output_error for row in before.layers
        ]
    assert report.fingerprint == fingerprint(model)
    again = prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising())
    assert again == report
    with pytest.raises(FileExistsError):
        prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising("int4"))


def test_sparse_models_of_others(tmp_path, make_model):
    for form in (*FORMATS, "plain"):
        model = make_model("llama", torch.bfloat16)
        zero(model)
        if form == "plain":
            model.save_pretrained(tmp_path / form)
        else:
            write(model, tmp_path / form, form)
        report = prune_checkpoint(tmp_path / form, tmp_path / f"{form}-int8", quantising())
        assert report.config["method"] == "existing" and not report.changes
        found = dense_weights(tmp_path / f"{form}-int8")
        for name, weight in found.items():
            expected = dict(model.named_modules())[name].weight
            assert torch.equal(weight != 0, (expected != 0) & (weight != 0))
            torch.testing.assert_close(weight, expected, rtol=0, atol=float(expected.abs().max()) / 127)


def test_packed_experts_get_quantised_values(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**COMMON))
    sparsify(model, SparsityConfig("magnitude", "50%"))
    model.save_pretrained(tmp_path / "sparse")
    prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising())
    found = dense_weights(tmp_path / "disk")
    assert found.keys() == sparse_modules(model).keys()
    for name, module in sparse_modules(model).items():
        expected = module.to_dense_weight()
        torch.testing.assert_close(found[name], expected, rtol=0, atol=float(expected.abs().max()) / 127)


def test_a_cut_off_run_over_a_sparse_model_goes_on(tmp_path, monkeypatch, always_snapshot):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**COMMON))
    sparsify(model, SparsityConfig("magnitude", "50%"))
    model.save_pretrained(tmp_path / "sparse")
    prune_checkpoint(tmp_path / "sparse", tmp_path / "whole", quantising())
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising())
    prune_checkpoint(tmp_path / "sparse", tmp_path / "disk", quantising())
    assert contents(tmp_path / "disk") == contents(tmp_path / "whole")


def test_what_cannot_be_quantised_is_refused(saved, tmp_path, make_model, make_pruned):
    _, folder = saved()
    with pytest.raises(ValueError, match="int8 already"):
        prune_checkpoint(folder, tmp_path / "out", quantising("int4"))
    with pytest.raises(ValueError, match="int8 already"):
        sparsify(AutoModelForCausalLM.from_pretrained(folder), quantising("int4"))
    with pytest.raises(ValueError, match="existing"):
        sparsify(make_pruned(), SparsityConfig("magnitude", values="int8"))
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="sparse.*prune it"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", quantising())
