"""Weights that a model's own code reads, on whatever path, stay dense; what merely asks for a dtype does not count."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BambaConfig, FalconH1Config, LlamaConfig, Mamba2Config, Zamba2Config

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.blocks.reading import _reads_of

_COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0}
_DECODER = {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS = [
    Mamba2Config(
        **_COMMON, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8, expand=2
    ),
    BambaConfig(**_DECODER, **_MAMBA, num_key_value_heads=2, attn_layer_indices=[1]),
    FalconH1Config(**_DECODER, **{**_MAMBA, "mamba_d_ssm": 64}, num_key_value_heads=2),
    Zamba2Config(
        **{**_DECODER, "num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        num_mem_blocks=1,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_the_fused_path_in_training_reads_stays_dense(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    report = sparsify(model, SparsityConfig("magnitude", dataset=None, skip_unsupported=True))
    read = [name for name in report.skipped if name.endswith(("mamba.out_proj", "mixer.out_proj"))]
    assert read
    assert not any(row.name in read for row in report.layers)
    assert any(row.name.endswith("in_proj") for row in report.layers)


class Asks(nn.Module):
    """Everything here is harmless."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up.weight is not None and isinstance(self.up.weight, nn.Parameter):
            x = x.to(self.up.weight.dtype).to(self.up.weight.device)
        weight = self.up.weight
        return self.up(x)[..., : weight.shape[0]]


class Reads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.plain.weight.t() + self._other(x, self.handed)

    def _other(self, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        layer = self.aliased
        taken = getattr(self.got, "weight")  # noqa: B009
        return x @ module.weight + x @ layer.weight + x @ taken + sum(x @ each.weight for each in self.listed)


class Inherits(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._other(x, self.mine)


class Sliced(nn.Module):
    """As Bloom's: one of the ways is that of a setting."""

    def __init__(self, slices: int) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x @ self.trained.weight
        if self.slices > 1:
            return x @ self.down.weight[: self.slices]
        return self.down(x)


def test_uses_of_a_weight() -> None:
    assert not _reads_of(Asks())
    assert _reads_of(Reads()) == {"plain", "handed", "aliased", "got", "listed"}
    assert _reads_of(Inherits()) >= {"mine", "aliased", "got", "listed"}


def test_a_way_that_settings_rule_out_does_not_count() -> None:
    assert _reads_of(Sliced(1)) == {"trained"}
    assert _reads_of(Sliced(2).eval()) == {"trained", "down"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "falcon", "gpt2", "rwkv"])
def test_usual_families_lose_nothing(name: str, make_model: Any) -> None:
    assert not sparsify(make_model(name), SparsityConfig("magnitude", dataset=None)).skipped


def test_a_class_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda kind: (calls.append(kind), original(kind))[1])
    sizes = {**_DECODER, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12}
    sparsify(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), SparsityConfig("magnitude", dataset=None))
    assert len(calls) == len(set(calls))
