"""Sparse checkpoints of compressed-tensors: loaded, refused where they are damaged, and written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import CompressedTensorsConfig

from optimum_ksparse import Pattern, SparsityConfig
from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.packing import pack, pack_mask

from ..compressed_tensors import FORMATS, write, zero

LAYER = "model.layers.1.mlp.up_proj"


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **arguments}).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    equal = (torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    return one.keys() == other.keys() and all(equal)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: layer.to_dense_weight() for name, layer in sparse_layers(model).items()}


@pytest.fixture
def made(make_model, tmp_path):
    """Makes a checkpoint: `made("sparse-bitmask", "gpt_neox", n=None)` gives the dense model and the folder."""

    def make(form: str, name: str = "llama", n: int | None = 2, m: int = 4, dtype: Any = torch.bfloat16, **settings):
        shapes = settings.pop("shapes", {})
        model = make_model(name, dtype, **shapes)
        zero(model, n, m)
        return model, write(model, tmp_path / f"source-{form}", form, **settings)

    return make


# --- The oracles: written by compressed-tensors 0.14.0 itself
@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask", "dense-with-zeros"])
def test_what_compressed_tensors_wrote_gives_its_logits(shared, form, tmp_path):
    folder = shared / "oracles/compressed_tensors" / form
    model, expected, stored = load(folder), load_file(folder / "expected.safetensors"), tensors(folder)
    found = logits(model, expected["input_ids"])
    assert float((found - expected["logits"]).abs().max()) <= 2**-7 * float(expected["logits"].abs().max())
    layers = sparse_layers(model)
    assert len(layers) == 14
    assert model.sparsity_report.base_model == form
    for name, layer in layers.items():
        weight = layer.to_dense_weight()
        mask = Pattern("2:4").mask(weight.abs()) if form != "sparse-bitmask" else weight != 0
        values, bits = pack(weight, mask, layer.pattern)
        assert torch.equal(layer.weight, values) and torch.equal(layer.weight_mask, bits)
        if form == "dense-with-zeros":
            assert torch.equal(weight, stored[f"{name}.weight"])
        else:
            assert torch.equal(values, stored[f"{name}.compressed"]) and torch.equal(bits, stored[f"{name}.bitmask"])
    model.config.quantization_config.storage = "compressed-tensors"
    model.save_pretrained(tmp_path)
    assert form == "dense-with-zeros" or same(tensors(tmp_path), stored)


# --- Loading
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "qwen3", "opt"])
@pytest.mark.parametrize("files", [1, 3])
def test_a_sparse_model_loads_and_is_saved_as_one_of_ours(made, token_ids, tmp_path, form, name, files):
    dense, folder = made(form, name, files=files)
    model = load(folder)
    weights = dict(dense.named_modules())
    assert sparse_layers(model).keys() == {
        name for name, module in weights.items() if isinstance(module, nn.Linear) and "layers." in name
    }
    assert all(torch.equal(weight, weights[name].weight) for name, weight in dense_state(model).items())
    assert {str(layer.pattern) for layer in sparse_layers(model).values()} == {"2:4"}
    assert torch.allclose(logits(model, token_ids), logits(dense, token_ids), atol=2e-2)
    report = model.sparsity_report
    assert (report.method, report.base_model, report.patterns) == ("existing", folder.name, ["2:4"])
    assert not report.calibration and report.num_parameters == dense.num_parameters()
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.sparsity_report.base_model == folder.name
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["method"], settings["pattern"]) == (
        "optimum-ksparse",
        "existing",
        "2:4",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_mask_and_a_width_that_fills_no_byte(made, token_ids, dtype):
    shapes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "num_key_value_heads": 1}
    dense, folder = made("sparse-bitmask", n=None, dtype=dtype, shapes={**shapes, "head_dim": 18})
    model = load(folder)
    layer = sparse_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.in_features == 50 and not layer.pattern.is_semi_structured
    assert torch.equal(layer.to_dense_weight(), dense.model.layers[0].mlp.down_proj.weight)
    assert torch.allclose(logits(model, token_ids), logits(dense, token_ids), atol=1e-3)


def test_the_dtype_that_is_asked_for(made):
    dense, folder = made("sparse-24-bitmask")
    layer = sparse_layers(load(folder, dtype=torch.float32))[LAYER]
    assert layer.weight.dtype == torch.float32 and layer.weight_mask.dtype == torch.uint8
    assert torch.equal(layer.to_dense_weight(), dense.model.layers[1].mlp.up_proj.weight.float())


def test_kept_zeros_stay_kept(made):
    _, folder = made("sparse-24-bitmask")
    stored = tensors(folder)
    stored[f"{LAYER}.compressed"][3] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    layer = sparse_layers(load(folder))[LAYER]
    assert torch.equal(layer.weight_mask, stored[f"{LAYER}.bitmask"])
    assert torch.equal(layer.weight, stored[f"{LAYER}.compressed"])


def test_the_decoder_alone_loads(made, token_ids):
    dense, folder = made("sparse-24-bitmask")
    model = AutoModel.from_pretrained(folder, dtype="auto")
    assert len(sparse_layers(model)) == 14
    with torch.no_grad():
        states = [one(token_ids).last_hidden_state for one in (model, dense.model)]
    assert torch.allclose(*states, atol=2e-2)


@pytest.mark.parametrize("form", FORMATS)
def test_settings_that_agree_are_taken_and_others_are_refused(made, token_ids, form):
    _, folder = made(form)
    model = load(folder, sparsity_config=SparsityConfig("existing", storage="dense"))
    assert len(sparse_layers(model)) == 14 and model.config.quantization_config.storage == "dense"
    with pytest.raises(ValueError, match="sparse already.*wanda"):
        load(folder, sparsity_config=SparsityConfig("wanda", dataset=token_ids))


def test_dense_weights_without_zeros_load_as_what_they_are(make_model, tmp_path, token_ids, caplog):
    dense = make_model("llama")
    model = load(write(dense, tmp_path / "source", "dense"))
    assert not sparse_layers(model) and not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model, token_ids), logits(dense, token_ids))


def test_layers_without_zeros_stay_dense(make_model, tmp_path):
    dense = make_model("llama")
    zero(dense, skip="down_proj")
    model = load(write(dense, tmp_path / "source", "dense"))
    kinds = {name.rpartition(".")[2] for name in sparse_layers(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert all("down_proj" in name and "not sparse" in why for name, why in model.sparsity_report.skipped.items())
    assert len(model.sparsity_report.skipped) == 2


def test_a_model_that_is_not_sparse_at_all_cannot_be_taken_for_one(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is sparse"):
        load(tmp_path, sparsity_config=SparsityConfig("existing"))
    with pytest.raises(ValueError, match="pattern='2:4'"):
        load(tmp_path, sparsity_config=SparsityConfig("existing", "2:4"))


# --- Others' configs
def test_ordinary_models_of_compressed_tensors_are_left_to_it(monkeypatch):
    seen = []
    monkeypatch.setattr(
        CompressedTensorsConfig, "from_dict", classmethod(lambda cls, config, **kwargs: seen.append(config))
    )
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    for sparsity in ({}, None, {"format": "dense"}):
        config = {"quant_method": "compressed-tensors", "config_groups": groups, "format": "float-quantized"}
        AutoQuantizationConfig.from_dict({**config, "sparsity_config": sparsity})
        assert seen.pop()["sparsity_config"] == sparsity
    AutoQuantizationConfig.from_dict({"quant_method": "compressed-tensors"})
    assert len(seen) == 1


@pytest.mark.parametrize("settings", [
    {"config_groups": {"group_0": {"targets": ["Linear"]}}, "format": "float-quantized"},
    {"config_groups": {"group_0": {"targets": ["Linear"]}}, "format": "marlin-24", "sparsity_config": None},
])  # fmt: skip
def test_quantised_sparse_models_are_refused_by_name(made, settings):
    _, folder = made("sparse-24-bitmask", **settings)
    for arguments in ({}, {"sparsity_config": SparsityConfig("existing")}):
        with pytest.raises(ValueError, match=rf"quantised as well as sparse.*{settings['format']}.*16 bit"):
            load(folder, **arguments)


def test_an_unknown_format_is_refused_with_those_that_are_known(made):
    _, folder = made("sparse-24-bitmask", sparsity={"format": "sparse-48-bitmask"})
    with pytest.raises(ValueError, match="'sparse-48-bitmask'.*sparse-24-bitmask, sparse-bitmask, dense"):
        load(folder)


@pytest.mark.parametrize("target", ["model.layers.7.mlp.up_proj", "Conv2d", 3])
@pytest.mark.parametrize("form", FORMATS)
def test_a_config_that_names_absent_layers_is_refused(made, form, target):
    _, folder = made(form, sparsity={"targets": ["Linear", target]})
    with pytest.raises(ValueError, match=rf"targets.*{target}"):
        load(folder)


# --- Damage
def put(name: str, change):
    def alter(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{LAYER}.{name}"] = change(stored[f"{LAYER}.{name}"])

    return alter


def flipped(bits: torch.Tensor) -> torch.Tensor:
    bits[2, 1] ^= 4
    return bits


def swapped(bits: torch.Tensor) -> torch.Tensor:
    """As many bits as before, in another group."""
    bits[0, 0], bits[1, 0] = 0b00110111, 0b00110001
    return bits


def added(number: int, index: int = 5):
    def change(offsets: torch.Tensor) -> torch.Tensor:
        offsets[index] += number
        return offsets

    return change


DAMAGE = {
    "a bit": ("bitmask", put("bitmask", flipped)),
    "rows of bits": ("bitmask", put("bitmask", lambda bits: bits[:-1].contiguous())),
    "the dtype of bits": ("bitmask", put("bitmask", lambda bits: bits.to(torch.int32))),
    "values": ("(compressed|bitmask)", put("compressed", lambda values: values[:-1].contiguous())),
    "more values": ("(compressed|bitmask)", put("compressed", lambda v: torch.cat([v, v]))),
    "the dtype of values": ("compressed", put("compressed", lambda values: values.to(torch.int8))),
    "the shape": ("shape", put("shape", lambda shape: shape.flip(0))),
    "a huge shape": ("shape", put("shape", lambda shape: shape * 2**40)),
    "a negative shape": ("shape", put("shape", lambda shape: -shape)),
    "a third size": ("shape", put("shape", lambda shape: torch.cat([shape, shape[:1]]))),
    "no bits": ("", lambda stored: stored.pop(f"{LAYER}.bitmask")),
    "no values": ("compressed", lambda stored: stored.pop(f"{LAYER}.compressed")),
    "no shape": ("shape", lambda stored: stored.pop(f"{LAYER}.shape")),
    "a dense weight too": ("weight", lambda stored: stored.update({f"{LAYER}.weight": torch.zeros(64, 32)})),
    "an absent layer": ("up_proj_2.bitmask", lambda stored: stored.update(
        {f"{LAYER}_2.{end}": stored[f"{LAYER}.{end}"].clone() for end in ("bitmask", "compressed", "shape")})),
    "a head": ("lm_head.bitmask", lambda stored: stored.update(
        {f"lm_head.{end}": stored[f"{LAYER}.{end}"].clone() for end in ("bitmask", "compressed", "shape")})),
    "a norm": ("norm.bitmask", lambda stored: stored.update({"model.norm.bitmask": torch.zeros(1, 4).byte()})),
}  # fmt: skip
OF_ONE = {
    "groups": ("sparse-24-bitmask", "bitmask", put("bitmask", swapped)),
    "offsets": ("sparse-bitmask", "row_offsets", put("row_offsets", added(1))),
    "offsets that fall": ("sparse-bitmask", "row_offsets", put("row_offsets", added(-100))),
    "offsets far away": ("sparse-bitmask", "row_offsets", put("row_offsets", added(2**60))),
    "the first offset": ("sparse-bitmask", "row_offsets", put("row_offsets", added(1, 0))),
    "fewer offsets": ("sparse-bitmask", "row_offsets", put("row_offsets", lambda offsets: offsets[1:].clone())),
    "the dtype of offsets": ("sparse-bitmask", "row_offsets", put("row_offsets", lambda offsets: offsets.float())),
    "no offsets": ("sparse-bitmask", "row_offsets", lambda stored: stored.pop(f"{LAYER}.row_offsets")),
}
CASES = [(form, *case) for form in FORMATS[:2] for case in DAMAGE.values()] + list(OF_ONE.values())
NAMES = [f"{form[7:9]} {name}" for form in FORMATS[:2] for name in DAMAGE] + list(OF_ONE)


@pytest.mark.parametrize(("form", "tensor", "damage"), CASES, ids=NAMES)
def test_damage_is_named_before_anything_is_used(made, form, tensor, damage):
    _, folder = made(form)
    stored = tensors(folder)
    damage(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"\.?{tensor or LAYER}"):
        load(folder)


def test_padding_bits_are_named(made):
    shapes = {"hidden_size": 36, "head_dim": 18, "num_attention_heads": 2, "num_key_value_heads": 1}
    _, folder = made("sparse-bitmask", n=None, shapes=shapes)
    stored = tensors(folder)
    stored[f"{LAYER}.bitmask"][0, -1] |= 128
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}.bitmask: padding"):
        load(folder)


def test_values_that_are_no_numbers_are_named(made):
    _, folder = made("sparse-bitmask")
    stored = tensors(folder)
    stored[f"{LAYER}.compressed"][7] = torch.nan
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}.weight.*NaN"):
        load(folder)


# --- Writing
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "50%", "50%/8x8"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_model_of_ours_is_written_for_compressed_tensors_and_is_still_ours(
    make_pruned, token_ids, tmp_path, pattern, name
):
    model = make_pruned(name, pattern, torch.bfloat16, storage="compressed-tensors")
    model.save_pretrained(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored, two_of_four = tensors(tmp_path / "out"), pattern == "2:4"
    sparsity = settings["sparsity_config"]
    assert (settings["quant_method"], settings["config_groups"]) == ("compressed-tensors", {})
    assert sparsity["format"] == ("sparse-24-bitmask" if two_of_four else "sparse-bitmask")
    assert sparsity["sparsity_structure"] == ("2:4" if two_of_four else "unstructured")
    assert sparsity["targets"] == ["Linear"] and sparsity["ignore"] == ["lm_head"]
    for path, layer in sparse_layers(model).items():
        assert torch.equal(stored[f"{path}.compressed"].flatten(), layer.weight.flatten())
        assert torch.equal(stored[f"{path}.bitmask"], layer.weight_mask)
        assert stored[f"{path}.shape"].flatten().tolist() == [layer.out_features, layer.in_features]
        assert (f"{path}.row_offsets" in stored) != two_of_four
    again = load(tmp_path / "out")
    assert same(dense_state(again), dense_state(model))
    assert torch.allclose(logits(again, token_ids), logits(model, token_ids), atol=1e-2)
    config = again.config.quantization_config
    assert (config.method, config.pattern, config.storage) == ("magnitude", pattern, "compressed-tensors")
    assert again.sparsity_report.layers == model.sparsity_report.layers
    if "%" not in pattern:
        assert {str(layer.pattern) for layer in sparse_layers(again).values()} == {pattern}
    again.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), stored)


def test_several_patterns_have_one_format_and_dense_layers_are_ignored(make_model, tmp_path):
    dense = make_model("llama")
    zero(dense, skip="down_proj")
    zero(dense.model.layers[0].mlp, None, skip="up_proj")
    model = load(write(dense, tmp_path / "source", "dense"))
    model.config.quantization_config.storage = "compressed-tensors"
    model.save_pretrained(tmp_path / "out")
    sparsity = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == "sparse-bitmask"
    assert sparsity["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    again = load(tmp_path / "out")
    assert dense_state(again).keys() == dense_state(model).keys()
    assert same(dense_state(again), dense_state(model))
    assert torch.equal(pack_mask(dense.model.layers[0].mlp.down_proj.weight != 0),
                       sparse_layers(again)["model.layers.0.mlp.down_proj"].weight_mask)  # fmt: skip


# In an environment of its own: compressed-tensors==0.14.0 needs transformers<5.
READ = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from compressed_tensors.compressors import ModelCompressor

folder = sys.argv[1]
expected = load_file(f"{folder}/expected.weights")
compressor = ModelCompressor.from_pretrained(folder)
read = [dict(compressor.sparsity_compressor.decompress(folder))]
if compressor.sparsity_config.format == "sparse-24-bitmask":  # the other one its way through transformers cannot load
    read.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict())
for name, tensor in expected.items():
    assert all(torch.equal(tensors[name], tensor) for tensors in read), name
"""


@pytest.mark.skipif(
    "COMPRESSED_TENSORS_PYTHON" not in os.environ,
    reason="COMPRESSED_TENSORS_PYTHON names no interpreter that has compressed-tensors 0.14 and transformers 4",
)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize("left_dense", [[], ["down_proj"]])
def test_compressed_tensors_itself_reads_what_is_written(make_pruned, tmp_path, pattern, left_dense):
    settings = {"modules_to_not_convert": left_dense or None, "storage": "compressed-tensors"}
    model = make_pruned("llama", pattern, torch.bfloat16, **settings)
    model.save_pretrained(tmp_path)
    weights = {f"{name}.weight": layer.to_dense_weight() for name, layer in sparse_layers(model).items()}
    save_file(weights, tmp_path / "expected.weights")
    command = [os.environ["COMPRESSED_TENSORS_PYTHON"], "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_compressed_tensors_cannot_read_is_refused_before_it_is_pruned(make_model, token_ids):
    from optimum_ksparse import sparsify

    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn is Conv1D.*dense"):
        sparsify(model, SparsityConfig("magnitude", storage="compressed-tensors"))
    assert not sparse_layers(model)
