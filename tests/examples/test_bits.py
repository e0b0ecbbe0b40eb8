"""The benchmark of quality against bits a weight: what counts as bits, and sparse models beside dense rivals."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..conftest import REPOSITORY, make_config


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples/benchmarks")
    import bits
    import bits_sparse
    import bits_table

    return bits, bits_table, bits_sparse


def test_bits_are_those_of_integers_scales_and_zero_points_of_the_pruned_linear_maps(scripts):
    config = make_config("llama", hidden_size=192, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    linears = scripts[0].linear_maps(model)
    assert len(linears) == 7 and "lm_head" not in linears
    [wide] = [name for name in linears if name.endswith("down_proj")]
    sizes = {name: layer.weight.numel() for name, layer in linears.items()}
    groups = sizes[wide] / 128 + sum(size for name, size in sizes.items() if name != wide) / 64
    assert scripts[0].bits_a_weight(linears, 4) == pytest.approx(4 + (16 + 4) * groups / sum(sizes.values()))


def test_a_weight_that_is_not_quantised_is_found(scripts):
    layer = torch.nn.Linear(64, 2)
    with pytest.raises(ArithmeticError, match="up_proj holds 64 values"):
        scripts[0].check_levels({"up_proj": layer}, 4)
    layer.weight.data = (8 * layer.weight).round()
    scripts[0].check_levels({"up_proj": layer}, 5)


def test_torchao_quantises_in_place(scripts):
    pytest.importorskip("torchao")
    model = torch.nn.Sequential(torch.nn.Linear(192, 8))
    before, linears = model[0].weight.detach().clone(), {"0": model[0]}
    scripts[0].by_torchao(model, linears, 4, torch.ones(1, 1), None)
    scripts[0].check_levels(linears, 4)
    assert 0 < (model[0].weight - before).norm() < 0.1 * before.norm()


def test_the_table_has_a_row_for_each_way_to_store_weights(scripts, tmp_path, monkeypatch):
    def row(pattern, values, bits, perplexity):
        return {"pattern": pattern, "values": values, "bits_per_weight": bits, "perplexity": perplexity}

    rows = [row("dense", None, 16, 10), row("2:4", None, 9, 20)]
    rows += [row("50%", "int8", 5.03, perplexity) for perplexity in (14, 16)]  # of two seeds
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model/sparse.json").write_text(json.dumps(rows))
    dense = [{"library": "torchao", "bits": 4, "perplexity": 12, "bits_per_weight": 4.125}]
    (tmp_path / "a-model/dense.json").write_text(json.dumps(dense))
    monkeypatch.setattr(scripts[1], "FOLDER", tmp_path)
    assert scripts[1].bits_table().splitlines()[2:] == [
        "| dense | 16.00 | 10.00 |",
        "| 2:4, 16 bit | 9.00 | 20.00 |",
        "| 50 %, int8 | 5.03 | 15.00 ± 1.41 |",
        "| dense, rounded, int4 | 4.12 | 12.00 |",
    ]
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    scripts[1].draw(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_floats_and_integers_are_of_one_pruning(scripts, make_model, tokenizer, tmp_path, monkeypatch):
    make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name, value in (("SAMPLES", 2), ("LENGTH", 16), ("WINDOWS", 2)):
        monkeypatch.setattr(scripts[2], name, value)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"문장 {number} 입니다 그리고 또 있습니다" for number in range(40)), encoding="utf-8")
    args = SimpleNamespace(model=tmp_path, calibration=str(text), validation=str(text))
    floats, *integers = scripts[2].measured(args, "50%", 0)
    assert [row["values"] for row in (floats, *integers)] == [None, "int8", "int4"]
    assert floats["bits_per_weight"] == pytest.approx(9, abs=0.1)
    assert 9 > integers[0]["bits_per_weight"] > integers[1]["bits_per_weight"] > 3
    assert abs(integers[0]["perplexity"] / floats["perplexity"] - 1) < 0.05
    [blocks] = scripts[2].with_blocks(args, "50%", 0, "int4")
    assert blocks["bits_per_weight"] == pytest.approx(integers[1]["bits_per_weight"])
    assert blocks["perplexity"] != integers[1]["perplexity"] > 1
