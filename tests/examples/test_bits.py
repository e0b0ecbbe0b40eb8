"""The benchmark of quality against bits a weight: what counts as bits, and the table of a study and dense rivals."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..conftest import REPOSITORY, make_config


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples/benchmarks")
    import bits
    import bits_table

    return bits, bits_table


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
    def row(figure, method, pattern, mean):
        return {"figure": figure, "method": method, "pattern": pattern, "mean": mean, "deviation": None, "seeds": 1}

    rows = [row("perplexity", "dense", "dense", 10), row("perplexity", "admm", "2:4", 20)]
    rows += [row("perplexity", "admm + block int8", "50%", 15), row("bits_per_weight", "admm", "2:4", 9)]
    rows += [row("bits_per_weight", "admm + block int8", "50%", 5.03)]
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model/results.json").write_text(json.dumps({"rows": rows}))
    dense = [{"library": "torchao", "bits": 4, "perplexity": 12, "bits_per_weight": 4.125}]
    (tmp_path / "a-model/dense.json").write_text(json.dumps(dense))
    monkeypatch.setattr(scripts[1], "FOLDER", tmp_path)
    assert scripts[1].bits_table().splitlines()[2:] == [
        "| dense | 16.00 | 10.00 |",
        "| 2:4, 16 bit | 9.00 | 20.00 |",
        "| 50 %, blocks, int8 | 5.03 | 15.00 |",
        "| dense, rounded, int4 | 4.12 | 12.00 |",
    ]
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    scripts[1].draw(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
