"""The tensors of a packed checkpoint, made dense for vLLM: without vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from optimum_ksparse.packing import pack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.quantization import pack_integers
from optimum_ksparse.serving.weights import dense_weights, recorded_name

IN_FEATURES = 24
LAYER = "model.layers.0.mlp.up_proj"


def packed_layer(pattern: str) -> tuple[dict[str, torch.Tensor], dict[str, dict], torch.Tensor]:
    """The tensors of a layer, what a config records of it, and its dense weight."""
    weight = torch.randn(16, IN_FEATURES, generator=torch.Generator().manual_seed(0))
    mask = Pattern(pattern).mask(weight.abs())
    values, bits = pack(weight, mask, Pattern(pattern))
    records = {"layers.0.mlp.up_proj": {"pattern": pattern, "num_values": values.numel()}}
    return {f"{LAYER}.weight": values, f"{LAYER}.weight_mask": bits}, records, weight * mask


def made_dense(tensors: dict[str, torch.Tensor], records: dict[str, dict], **options) -> dict[str, torch.Tensor]:
    return dict(dense_weights(tensors.items(), records, {name: {IN_FEATURES} for name in records}, **options))


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "1:2", "50%", "50%/4x8"])
def test_packed_weights_are_made_dense_whichever_tensor_comes_first(pattern):
    tensors, records, weight = packed_layer(pattern)
    norm = torch.randn(4)
    for items in (tensors, dict(reversed(tensors.items()))):
        dense = made_dense({"norm.weight": norm, **items, "head.weight": norm}, records)
        assert dense.keys() == {"norm.weight", f"{LAYER}.weight", "head.weight"}
        assert torch.equal(dense[f"{LAYER}.weight"], weight)
        assert dense["norm.weight"] is norm
    assert torch.equal(made_dense(tensors, records, transposed=True)[f"{LAYER}.weight"], weight.T)


def test_layers_of_another_tower_that_have_the_same_names_stay_as_they_are():
    tensors, records, weight = packed_layer("2:4")
    other = torch.randn(16, IN_FEATURES)
    dense = made_dense({"vision.layers.0.mlp.up_proj.weight": other, **tensors}, records)
    assert dense["vision.layers.0.mlp.up_proj.weight"] is other
    assert torch.equal(dense[f"{LAYER}.weight"], weight)


def test_layers_that_the_model_does_not_have_are_left_out():
    tensors, records, _ = packed_layer("2:4")
    assert dict(dense_weights(tensors.items(), records, {})) == {}


def test_names_are_found_below_any_prefix():
    layers = {"layers.0.q": 0, "layers.10.q": 0}
    assert recorded_name("language_model.model.layers.0.q", layers) == "layers.0.q"
    assert recorded_name("layers.10.q", layers) == "layers.10.q"
    assert recorded_name("mylayers.0.q", layers) is None


def damaged(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    values, bits = f"{LAYER}.weight", f"{LAYER}.weight_mask"
    if kind == "mask keeps too much":
        tensors[bits] = tensors[bits].clone()
        tensors[bits][3, 1] = 255
    elif kind == "groups are moved":
        tensors[bits] = torch.full_like(tensors[bits], 0b11110000)
    elif kind == "values are cut":
        tensors[values] = tensors[values][:-1]
    elif kind == "mask is cut":
        tensors[bits] = tensors[bits][:-1]
    elif kind == "mask is narrow":
        tensors[bits] = tensors[bits][:, :-1]
    elif kind == "no mask":
        del tensors[bits]
    elif kind == "no values":
        del tensors[values]


@pytest.mark.parametrize(
    "kind",
    [
        "mask keeps too much",
        "groups are moved",
        "values are cut",
        "mask is cut",
        "mask is narrow",
        "no mask",
        "no values",
    ],
)
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_what_does_not_fit_is_told_by_the_name_of_the_tensor(kind, pattern):
    if (kind, pattern) == ("groups are moved", "50%"):
        pytest.skip("any mask of that count is one")
    tensors, records, _ = packed_layer(pattern)
    damaged(kind, tensors)
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight"):
        made_dense(tensors, records)


def test_a_layer_that_is_recorded_and_not_there_is_told():
    tensors, records, _ = packed_layer("2:4")
    records["layers.1.mlp.up_proj"] = records["layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        made_dense(tensors, records)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "29%"])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_integers_and_the_scale_of_each_are_made_dense(values, pattern, group_size):
    width, quantisation = 72, {"values": values, "group_size": group_size}
    mask = Pattern(pattern).mask(torch.rand(5, width, generator=torch.Generator().manual_seed(1)))
    integers = torch.randint(1, 8, mask.shape, generator=torch.Generator().manual_seed(2)).to(torch.int8) * mask
    kept, bits = pack(integers, mask, Pattern(pattern))
    scale = torch.arange(1.0, 6 if group_size == -1 else 11).view(5, -1)
    tensors = {"weight": pack_integers(kept, values), "weight_mask": bits, "weight_scale": scale}
    tensors = {f"{LAYER}.{kind}": tensor for kind, tensor in tensors.items()}
    records = {"layers.0.mlp.up_proj": {"pattern": pattern, "num_values": int(mask.sum())}}
    sizes = {name: {width} for name in records}
    for transposed in (False, True):
        dense = dict(dense_weights(tensors.items(), records, sizes, transposed, quantisation))
        found, wide = dense.pop(f"{LAYER}.weight"), dense.pop(f"{LAYER}.weight_scale")
        assert not dense and torch.equal(found.T if transposed else found, integers)
        assert torch.equal(
            wide, scale.repeat_interleave(group_size, 1)[:, :width] if group_size > 0 else scale.expand(5, width)
        )
    other = torch.randn(5, width)
    towers = {"vision.layers.0.mlp.up_proj.weight": other, **tensors}
    assert (
        dict(dense_weights(towers.items(), records, sizes, False, quantisation))["vision.layers.0.mlp.up_proj.weight"]
        is other
    )
    for kind in ("weight", "weight_mask", "weight_scale"):
        rest = {key: tensor for key, tensor in tensors.items() if key != f"{LAYER}.{kind}"}
        with pytest.raises(ValueError, match=f"{LAYER}.{kind} is missing"):
            dict(dense_weights(rest.items(), records, sizes, False, quantisation))
    damaged = {**tensors, f"{LAYER}.weight_scale": -scale}
    with pytest.raises(ValueError, match=f"{LAYER}.weight_scale"):
        dict(dense_weights(damaged.items(), records, sizes, False, quantisation))


@pytest.mark.processes
def test_the_plugin_imports_nothing_before_vllm_calls_it():
    script = "import sys, optimum_ksparse.serving; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
