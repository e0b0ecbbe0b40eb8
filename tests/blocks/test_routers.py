"""Routers and other gates over experts stay dense, unless they are asked for; found in the model, not by one name."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import Pattern, SparsityConfig, SparsityReport, sparsify
from optimum_ksparse.blocks import find_routers

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Linear maps that route, by the ends of their names.
FAMILIES = {
    "JetMoeConfig": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
        ("router.layer",),
    ),
    "Qwen2MoeConfig": (
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts_per_tok": 2,
        },
        ("shared_expert_gate",),
    ),
}


def make(kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_SIZES, **FAMILIES[kind][0]})).eval()


def pruned(model: PreTrainedModel, **settings: Any) -> SparsityReport:
    return sparsify(model, SparsityConfig("magnitude", dataset=None, skip_unsupported=True, **settings))


@pytest.mark.parametrize("kind", FAMILIES)
def test_routers_stay_dense(kind: str) -> None:
    ends = FAMILIES[kind][1]
    report = pruned(make(kind))
    linear = [name for name, m in make(kind).get_decoder().named_modules() if isinstance(m, nn.Linear)]
    routers = [name for name in linear if name.endswith(ends)]
    assert routers
    assert {name for name, reason in report.skipped.items() if "routes" in reason} == set(routers)
    asked = pruned(make(kind), prune_routers=True)
    assert not any("routes" in reason for reason in asked.skipped.values())


class Moe(nn.Module):
    """As code that comes with a model may have it: nothing is called a router."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(8)])
        self.gate = nn.Linear(32, 8)
        self.deep = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
        self.switch = nn.Linear(32, 1)
        self.shared = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))  # as narrow as there are experts
        self.narrower = nn.Linear(32, 16)


def test_what_lies_beside_experts() -> None:
    block = nn.Module()
    block.add_module("attention", nn.Linear(32, 8))
    block.add_module("mlp", Moe())
    text = SimpleNamespace(hidden_size=32, to_dict=lambda: {"num_experts": 8})
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
    assert find_routers(model, block) == {"mlp.gate", "mlp.deep.0", "mlp.deep.1", "mlp.switch"}


def test_warnings_of_others_reach_the_user_and_are_no_notes(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    original, said = Pattern.mask, []

    def loud(self: Pattern, scores: torch.Tensor) -> torch.Tensor:
        if not said:
            said.append(1)
            warnings.warn("another library is out of date", FutureWarning, stacklevel=2)
        return original(self, scores)

    monkeypatch.setattr(Pattern, "mask", loud)
    with pytest.warns(FutureWarning, match="out of date"):
        report = sparsify(make_model(), SparsityConfig("magnitude", dataset=None))
    assert said
    assert not any(row.note for row in report.layers)
