"""Dropping decoder blocks: which ones, and that what is left is an ordinary smaller model everywhere."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedModel

from optimum_ksparse import SparsityConfig, SparsityReport, drop_layers, sparsify
from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.pruning.layer_dropping import block_influence
from optimum_ksparse.pruning.smaller_model import smaller

from ..conftest import VOCABULARY, make_config, thinned
from .test_streaming import assert_same_tensors, tensors

torch.set_num_threads(1)

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "num_hidden_layers": 4}
# What each kind of decoder needs for four blocks; of a kind that is none of `ARCHITECTURES` the whole config.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gpt2": {},
    "opt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mpt": {},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_hidden_layers": 4},
    "Qwen2MoeConfig": {**_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    "Qwen3MoeConfig": {**_EXPERTS, "head_dim": 8, "mlp_only_layers": [3]},
}
_NAMES = {"gpt2": "n_layer", "mpt": "n_layers", "gpt_neo": "num_layers"}


def make(family: str, **more: Any) -> PreTrainedModel:
    """A random model of four blocks, whose weights are large enough that each matters."""
    torch.manual_seed(0)
    if family.endswith("Config"):
        config = getattr(transformers, family)(**{**_SMALL, **FAMILIES[family], **more})
    else:
        settings = {_NAMES.get(family, "num_hidden_layers"): 4, **FAMILIES[family], **more}
        config = make_config(family, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in find_blocks(model).blocks[1].parameters():
        parameter.data *= 3
    return model


def generated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Ten tokens with a key-value cache, beyond the sliding windows."""
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **how)


def plain_model(folder: Path) -> PreTrainedModel:
    """What transformers loads without this package's part of `from_pretrained`."""
    original = PreTrainedModel.from_pretrained.__func__.__wrapped__  # type: ignore[attr-defined]
    config = transformers.AutoConfig.from_pretrained(folder)
    return original(getattr(transformers, config.architectures[0]), folder).eval()


@pytest.mark.parametrize("family", thinned(FAMILIES, ["gemma3", "gpt2", "Qwen3MoeConfig"]))
def test_the_smaller_model_is_the_one_that_its_checkpoint_gives(
    family: str, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    model = make(family)
    reference = copy.deepcopy(model)
    dropped = drop_layers(model, 2, token_ids, batch_size=2)
    kept = [index for index in range(4) if index not in dropped]
    dense = find_blocks(reference).blocks
    for block, index in zip(find_blocks(model).blocks, kept, strict=True):
        assert_same_tensors(block.state_dict(), dense[index].state_dict())
    assert len(kept) == model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*spars*")) == []
    again = plain_model(tmp_path)
    with torch.no_grad():
        logits = model(token_ids).logits
        assert torch.equal(logits, again(token_ids).logits)
        if family in ("llama", "gemma3", "gpt2", "opt"):  # their blocks return hidden states alone
            for index in dropped:
                dense[index].forward = lambda hidden, *args, **kwargs: hidden
            torch.testing.assert_close(reference(token_ids, use_cache=False).logits, logits, rtol=0, atol=0)
    assert torch.equal(generated(model, token_ids[:2, :6]), generated(again, token_ids[:2, :6]))


@pytest.mark.parametrize("family", ["llama", "Qwen3MoeConfig"])
def test_influence_is_that_of_a_plain_forward_pass(family: str, token_ids: torch.Tensor) -> None:
    model = make(family)
    blocks, last = find_blocks(model), []
    hook = blocks.blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        hidden = model(token_ids, output_hidden_states=True, use_cache=False).hidden_states
        hook.remove()
        scores = block_influence(blocks, token_ids, 4)
    states = [*hidden[:-1], last[0][0] if isinstance(last[0], tuple) else last[0]]  # transformers' is behind the norm
    expected = [
        float((1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).mean())
        for before, after in itertools.pairwise(states)
    ]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert drop_layers(model, 2, token_ids) == sorted(sorted(range(4), key=expected.__getitem__)[:2])


def test_what_is_left_is_pruned_as_any_other_model(tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = make("gemma3")
    drop_layers(model, 2, token_ids)
    model.save_pretrained(tmp_path)
    config = SparsityConfig("wanda", "2:4", dataset=token_ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=config)
    report = sparsify(model, config)
    assert_same_tensors(model.state_dict(), again.state_dict())
    assert len(report.layers) == 14
    with pytest.raises(ValueError, match="sparse already"):
        drop_layers(model, 1, token_ids)


def test_a_hybrid_keeps_a_block_with_attention(token_ids: torch.Tensor) -> None:
    """Without one its cache does not know how many tokens it has seen."""
    kinds = ["conv", "full_attention", "conv", "conv"]
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**_SMALL, num_hidden_layers=4, layer_types=kinds, block_multiple_of=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in find_blocks(model).blocks[1].parameters():
        parameter.data *= 1e-3
    assert drop_layers(model, 3, token_ids) == [0, 2, 3]
    assert generated(model, token_ids[:1, :8]).shape == (1, 18)


@pytest.mark.parametrize(
    ("family", "number", "more", "reason"),
    [
        ("llama", 4, {}, "number=4"),
        ("llama", 0, {}, "number=0"),
        ("gpt2", 2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("Qwen3MoeConfig", 2, {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    ],
)
def test_what_cannot_be_dropped(
    family: str, number: int, more: dict[str, Any], reason: str, token_ids: torch.Tensor
) -> None:
    model = make(family, **more)
    with pytest.raises(ValueError, match=reason):
        drop_layers(model, number, token_ids)
    assert len(find_blocks(model).blocks) == model.config.num_hidden_layers == 4


def test_what_follows_the_place_of_a_block_is_found_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, token_ids: torch.Tensor
) -> None:
    model = make("llama")
    kind = type(find_blocks(model).blocks[0].self_attn)
    original = kind.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config, layer_idx)
        self.window = 8 if layer_idx % 2 else None

    monkeypatch.setattr(kind, "__init__", init)
    state = copy.deepcopy(model.state_dict())
    for parameter in find_blocks(model).blocks[0].parameters():
        parameter.data *= 1e-3
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"window of model\.layers\.0\.self_attn would change from 8 to None"):
        drop_layers(model, 1, token_ids)
    assert_same_tensors(model.state_dict(), state)


def test_the_config_says_of_each_block_what_it_said() -> None:
    config = make_config("llama", num_hidden_layers=4)
    config.eos_token_id = [1, 2, 3, 4]
    config.mlp_layer_types, config.mlp_only_layers = ["a", "b", "c", "d"], [0, 2, 3]
    config.first_k_dense_replace = 2
    assert smaller(config, [1, 3]) == {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["b", "d"],
        "mlp_only_layers": [1],
        "first_k_dense_replace": 1,
    }


def test_configs_with_infinite_numbers_are_read_as_they_are_saved(token_ids: torch.Tensor) -> None:
    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8}
    config = Mamba2Config(vocab_size=384, hidden_size=32, num_hidden_layers=3, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    drop_layers(model, 1, token_ids)
    assert model.config.num_hidden_layers == len(model.backbone.layers) == 2


def test_the_command(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("optimum.commands")
    from optimum_ksparse.commands import parse_words
    from optimum_ksparse.commands.errors import UsageError

    make("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("가나다 " * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = "--drop-layers 1 --dataset text.txt --num-samples 2 --seq-len 16"
    parse_words(f"prune dense smaller {flags} --pattern none".split()).execute()
    assert "num_hidden_layers" in (tmp_path / "smaller/config.json").read_text()
    assert plain_model(tmp_path / "smaller").config.num_hidden_layers == 3
    parse_words(f"prune dense both {flags} --method wanda".split()).execute()
    calibration = "--method wanda --dataset text.txt --num-samples 2 --seq-len 16"
    parse_words(f"prune smaller after {calibration}".split()).execute()
    assert_same_tensors(tensors(tmp_path / "both"), tensors(tmp_path / "after"))
    for words in ("--drop-layers 1 --stream", "--pattern none"):
        with pytest.raises(UsageError, match="drop"):
            parse_words(f"prune dense out {words}".split()).execute()


def test_checkpoints_of_earlier_versions_load(tmp_path: Path, token_ids: torch.Tensor) -> None:
    """Those that had dropped blocks say so in their settings and reports."""
    model = make("llama")
    model.config.ksparse = {"quant_method": "optimum-ksparse", "drop_layers": 2, "pattern": None}
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/sparsity_report.json").write_text("{}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "ksparse") and not sparse_modules(again)

    config = SparsityConfig("wanda", "2:4", dataset=token_ids)
    sparsify(again, config)
    again.save_pretrained(tmp_path / "sparse")
    for name, where in (("config.json", "quantization_config"), ("sparsity_report.json", "config")):
        record = json.loads((tmp_path / "sparse" / name).read_text())
        record[where]["drop_layers"] = 2
        if name != "config.json":
            record["dropped"] = {"blocks": [1], "scores": [0.5, 0.25, 1.0], "num_parameters": 100}
        (tmp_path / "sparse" / name).write_text(json.dumps(record))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert_same_tensors(loaded.state_dict(), again.state_dict())
    assert isinstance(loaded.sparsity_report, SparsityReport)
