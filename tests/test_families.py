"""What only some families of models do: share keys and values, read a weight without calling its module, call experts
without tokens, keep hidden states of four dimensions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, JambaConfig, LlamaConfig, MambaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from optimum_ksparse import SparsityConfig, prune_checkpoint, prune_weight, sparsify
from optimum_ksparse.blocks import BlockReplay, find_blocks
from optimum_ksparse.pruners.statistics import ColumnNorms
from optimum_ksparse.pruning import loop
from optimum_ksparse.pruning.streaming import Workspace

from .conftest import thinned

torch.set_num_threads(1)

IDS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "hidden_size_per_layer_input": 8}


def build(kind: str, **settings: Any) -> PreTrainedModel:
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SIZES, **settings})).eval()


@pytest.fixture
def gemma4() -> PreTrainedModel:
    """The third and fourth block read the keys and values of the first and second."""
    kinds = ["sliding_attention", "full_attention"]
    shared = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "global_head_dim": 8}
    return build("Gemma4TextConfig", num_hidden_layers=4, layer_types=2 * kinds, **GEMMA, **shared)


@pytest.mark.slow
def test_the_dense_outputs_of_shared_keys_and_values_are_the_models_own(gemma4, monkeypatch):
    expected: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: expected.append(out))
        for block in find_blocks(gemma4).blocks
    ]
    with torch.no_grad():
        gemma4(IDS[:2], use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    original = loop._dense_path

    def watched(*arguments: Any) -> BlockReplay | None:
        path = original(*arguments)
        assert path is not None
        found.append(path.hidden[0].clone())
        return path

    monkeypatch.setattr(loop, "_dense_path", watched)
    sparsify(
        gemma4,
        SparsityConfig(
            "wanda",
            "1:4",
            dataset=IDS,
            batch_size=2,
            reconstruct="block",
            method_settings={"reconstruction_epochs": 1},
        ),
    )
    assert len(found) == 4
    for target, own in zip(found, expected, strict=True):
        torch.testing.assert_close(target, own)


@pytest.mark.slow
@pytest.mark.parametrize("activations", thinned(["dense", "pruned", "mixed"], ["mixed"]))
def test_shared_keys_and_values_with_reconstruction(gemma4, activations):
    settings = {"reconstruct": "block", "reconstruction_epochs": 1, "activations": activations}
    report = sparsify(gemma4, SparsityConfig.from_flat("wanda", "2:4", dataset=IDS, batch_size=2, **settings))
    assert all(row.loss_after <= row.loss_before < 10 for row in report.reconstruction)


@pytest.mark.slow
def test_a_run_over_shared_keys_and_values_goes_on(gemma4, tmp_path: Path, monkeypatch):
    gemma4.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("wanda", "2:4", dataset=IDS, batch_size=2)
    prune_checkpoint(tmp_path / "dense", tmp_path / "whole", config)
    original = Workspace.add_block

    def stop(workspace: Workspace, index: int, *arguments: Any) -> None:
        if index == 3:
            raise KeyboardInterrupt
        original(workspace, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "dense", tmp_path / "cut", config, activation_memory=0)
    prune_checkpoint(tmp_path / "dense", tmp_path / "cut", config, activation_memory=0)
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8}
JAMBA = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA |= {"num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}


@pytest.mark.parametrize("method", thinned(["wanda", "magnitude"], ["wanda"]))
@pytest.mark.parametrize("config", [MambaConfig(**MAMBA), JambaConfig(**JAMBA)], ids=["mamba", "jamba"])
def test_a_weight_that_is_read_and_not_called_stays_dense(config, method, tmp_path: Path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model.save_pretrained(tmp_path / "dense")
    settings = {"method": method, "pattern": "2:4", "dataset": IDS, "batch_size": 2}
    report = sparsify(model, SparsityConfig.from_flat(**settings))
    assert {name.rpartition(".")[2] for name in report.skipped} >= {"dt_proj"}
    assert {row.name.rpartition(".")[2] for row in report.layers} >= {"in_proj"}
    assert bool(model(IDS[:2]).logits.isfinite().all())
    streamed = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", SparsityConfig.from_flat(**settings))
    assert streamed.skipped == report.skipped


class _Experts(nn.Module):
    """Every expert is called, those that nothing is routed to with no tokens."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(3)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        chosen, out = (rows[:, 0] > 0).long(), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            out.index_add_(0, mine, expert(rows[mine]))
        return out.view_as(hidden)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_an_expert_that_is_called_without_tokens_was_not_reached(method):
    config = LlamaConfig(**SIZES, num_hidden_layers=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.mlp = _Experts(config)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.2.gate_proj: no calibration token reached it"):
        sparsify(model, SparsityConfig(method, "2:4", dataset=IDS, batch_size=2))
    sparsify(model, SparsityConfig(method, "2:4", dataset=IDS, batch_size=2, modules_to_not_convert=[".*experts.2"]))
    assert int(model.model.layers[0].mlp.experts[1].up_proj.to_dense_weight().count_nonzero()) == 64 * 32 // 2


def test_the_beginning_token_is_left_out_of_hidden_states_of_four_dimensions():
    settings = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 8}
    settings |= {"altup_num_inputs": 2, "vocab_size_per_layer_input": 64, "activation_sparsity_pattern": [0.0, 0.0]}
    blocks = find_blocks(build("Gemma3nTextConfig", num_hidden_layers=2, **GEMMA, **settings))
    with torch.no_grad():
        replay = BlockReplay(blocks, IDS, 2, first_weight=0)
        layers = {"q": blocks.blocks[0].self_attn.q_proj}
        found = replay.collect(0, blocks.blocks[0], layers, lambda layer: ColumnNorms(32))
    assert replay.hidden[0].dim() == 4 and found["q"].num_tokens == IDS.numel() - len(IDS)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
def test_updated_weights_that_float16_cannot_hold_are_an_error(method):
    torch.manual_seed(0)
    inputs, weight = 0.1 * torch.randn(512, 64), torch.randn(8, 64)
    inputs[:, 0], inputs[:, 1] = 0.5 * torch.randn(512), 10 * torch.randn(512)
    inputs[:, 3] = 0.1 * inputs[:, 1] + 0.01 * torch.randn(512)
    weight[:, 0], weight[:, 1], weight[:, 3] = 60000, 3000, 50000
    with pytest.raises(ValueError, match="too large for torch.float16: load the model in bfloat16 or float32"):
        prune_weight(weight.half(), inputs, method=method, pattern="2:4")


def test_calibration_in_float16_that_overflows_is_named(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    ids = IDS.clamp(max=60)
    with pytest.raises(ValueError, match="with calibration_dtype='float16': take 'bfloat16'"):
        sparsify(model, SparsityConfig("wanda", "2:4", dataset=ids, calibration_dtype="float16"))
