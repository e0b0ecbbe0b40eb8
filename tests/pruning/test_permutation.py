"""`permute="free"`: channels are reordered before pruning, in memory and from disk to disk, and refused where nothing
is free."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.pruners.order import best_order
from optimum_ksparse.pruning import permutation

from .test_streaming import contents

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
SETTINGS = [
    {"method": "admm"},
    {"method": "wanda", "storage": "dense"},
    {"method": "sparsegpt", "true_sequential": True},
    {"method": "sparsegpt", "reconstruct": "block", "values": "int8"},
]


def kept(scores: torch.Tensor, order: torch.Tensor, n: int, m: int) -> float:
    return float(scores[:, order].unflatten(1, (-1, m)).topk(n).values.sum())


@pytest.mark.parametrize(("n", "m", "groups"), [(1, 2, 2), (2, 4, 2), (2, 4, 8), (4, 8, 3)])
def test_an_order_keeps_more(n: int, m: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = m * groups
    scores = torch.rand(40, columns, generator=generator) * torch.linspace(0.1, 2, columns)  # heavy ones side by side
    order = best_order(scores, n, m)
    assert torch.equal(order.sort().values, torch.arange(columns))
    assert kept(scores, order, n, m) > 1.02 * kept(scores, torch.arange(columns), n, m)


def test_the_order_of_two_groups_is_nearly_the_best_there_is() -> None:
    scores = torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) ** 3
    first = itertools.combinations(range(8), 4)
    orders = [torch.tensor([*some, *(c for c in range(8) if c not in some)]) for some in first]
    best, as_it_is = max(kept(scores, o, 2, 4) for o in orders), kept(scores, torch.arange(8), 2, 4)
    assert kept(scores, best_order(scores, 2, 4), 2, 4) - as_it_is > 0.5 * (best - as_it_is)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["method"])
def test_the_report_says_what_was_reordered(
    settings: dict[str, Any], make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model()
    report = sparsify(model, SparsityConfig(dataset=token_ids, batch_size=2, permute="free", **settings))
    assert report.config["permute"] == "free"
    reordered = {layer.name: layer.reordered_with for layer in report.layers if layer.reordered_with}
    assert reordered == {
        **{f"layers.{index}.self_attn.o_proj": ["self_attn.v_proj"] for index in range(2)},
        **{f"layers.{index}.mlp.down_proj": ["mlp.gate_proj", "mlp.up_proj"] for index in range(2)},
    }


def test_a_linear_map_may_give_more_than_its_product(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    """As the routers of Llama 4, which give their choice as well."""

    class Router(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return logits.sigmoid(), logits

    model = make_model()
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.router, inner = Router(32, 2), mlp.forward
        mlp.forward = lambda x, mlp=mlp, inner=inner: inner(x) * mlp.router(x)[0][..., :1]
    config = SparsityConfig(dataset=token_ids, permute="free", modules_to_not_convert=["router"])
    report = sparsify(model, config)
    assert any(layer.reordered_with for layer in report.layers)


def test_layers_lose_less(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    def error(permute: str | None) -> float:
        config = SparsityConfig("wanda", "2:4", dataset=token_ids, batch_size=2, permute=permute)
        rows = sparsify(make_model(), config).layers
        errors = [row.relative_output_error for row in rows if row.name.endswith("down_proj")]
        return sum(errors) / len(errors)

    assert error("free") < 0.97 * error(None)


def test_from_disk_to_disk_it_is_the_same(source: Path, config: Any, tmp_path: Path) -> None:
    settings = config("admm", permute="free")
    prune_checkpoint(source, tmp_path / "disk", settings)
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=settings)
    model.save_pretrained(tmp_path / "memory")
    disk, memory = contents(tmp_path / "disk"), AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert disk
    torch.testing.assert_close(dict(again.state_dict()), dict(memory.state_dict()), rtol=0, atol=0)


def test_an_error_gives_the_dense_weights_back(
    make_model: MakeModel, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = make_model(), itertools.count()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = permutation.Permutation.__call__

    def failing(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(permutation.Permutation, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, SparsityConfig(dataset=token_ids, permute="free"), restore_on_error=True)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings", [{"method": "magnitude"}, {"pattern": "50%"}, {"method": "existing"}, {"permute": "all"}]
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="permute"):
        SparsityConfig(**{"permute": "free", **settings})


def test_where_nothing_is_free_it_is_refused_before_any_work(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.LayerNorm(64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = SparsityConfig(dataset=token_ids, permute="free", modules_to_not_convert=["o_proj"])
    with pytest.raises(ValueError, match=r"permute='free'.*mlp\.down_proj"):
        sparsify(model, config)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
