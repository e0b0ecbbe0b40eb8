"""Dropping whole experts: which ones, and that what is left is an ordinary smaller mixture of experts everywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig, drop_experts, drop_layers, sparsify
from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.pruning.expert_dropping import expert_saliency
from optimum_ksparse.pruning.smaller_experts import plan_removal

from ..conftest import VOCABULARY, make_config, thinned
from .test_layer_dropping import generated, plain_model
from .test_streaming import assert_same_tensors, tensors

torch.set_num_threads(1)

EXPERTS, SHARED = 8, "shared"
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
_SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_SIZES |= {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": 0}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_moe": {"head_dim": 8},
    "olmoe": {},
    "gpt_oss": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
    "deepseek_v2": {**_LATENT, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "granitemoe": {},
    "phimoe": {},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 16, "interleave_moe_layer_step": 1},
}


def make(family: str = "mixtral", **more: Any) -> PreTrainedModel:
    """A random model whose routers and biases are no zeros, and whose experts weigh differently."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **more}))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "norm" not in name:
            tensor.normal_(std=0.02 if "bias" in name else 0.3)
        if "down_proj" in name and tensor.dim() == 3:
            tensor.mul_(torch.linspace(0.2, 2, len(tensor)).view(-1, 1, 1))
    return model.eval()


class closed(TorchFunctionMode):  # noqa: N801 (used like a function)
    """Within it routers give no token to some experts."""

    def __init__(self, model: PreTrainedModel, dropped: dict[str, list[int]]) -> None:
        super().__init__()
        self.rows = {}
        for path, numbers in dropped.items():
            holder = model.get_submodule(path.rpartition(".")[0])
            for name, parameter in holder.named_parameters():
                if parameter.dim() == 2 and len(parameter) == EXPERTS and "experts" not in name:
                    self.rows[id(parameter)] = numbers
            for name, tensor in holder.state_dict().items():
                if "correction_bias" in name:
                    tensor[numbers] = -1e9

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.rows:
            result[..., self.rows[id(args[1])]] = -float("inf")
        return result


@pytest.mark.parametrize("family", thinned(FAMILIES, ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"]))
def test_the_smaller_model_is_the_one_that_its_checkpoint_gives(
    family: str, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    model = make(family)
    reference = copy.deepcopy(model)
    dropped = drop_experts(model, 0.25, token_ids, batch_size=2)
    assert dropped and all(len(numbers) == 2 for numbers in dropped.values())
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*spars*")) == []
    again = plain_model(tmp_path)
    assert all(model.get_submodule(path).num_experts == 6 for path in dropped)
    with torch.no_grad():
        logits = model(token_ids).logits
        assert torch.equal(logits, again(token_ids).logits)
        assert not torch.allclose(logits, reference(token_ids).logits, atol=1e-3)
        with closed(reference, dropped):
            torch.testing.assert_close(reference(token_ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, token_ids[:2, :6]), generated(again, token_ids[:2, :6]))
    kept = {name for name, _ in reference.named_parameters()}
    assert kept == {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        assert SHARED not in name or torch.equal(tensor, reference.state_dict()[name])


def saliency(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return expert_saliency(find_blocks(model), plan_removal(find_blocks(model), 0.25).layers, ids, 2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_saliency_is_that_of_a_plain_forward_pass(family: str, token_ids: torch.Tensor) -> None:
    model = make(family)
    block = find_blocks(model).blocks[0]
    moe: Any = block.feed_forward if family == "llama4_text" else block.mlp
    inputs: list[torch.Tensor] = []
    hook = moe.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        model(token_ids)
        hook.remove()
        [x] = inputs
        expected = []
        router = moe.gate if family == "mixtral" else moe.router
        logits = F.linear(x, router.weight, getattr(router, "bias", None))
        best = logits.topk(model.config.num_experts_per_tok)
        gates = torch.sigmoid(best.values) if family == "llama4_text" else best.values.softmax(-1)
        for expert in range(EXPERTS):
            rows, places = torch.where(best.indices == expert)
            weight, up, down = (
                gates[rows, places, None],
                moe.experts.gate_up_proj[expert],
                moe.experts.down_proj[expert],
            )
            if family == "mixtral":
                gate, value = (x[rows] @ up.T).chunk(2, -1)
                added = weight * ((F.silu(gate) * value) @ down.T)
            elif family == "gpt_oss":
                bias, last = moe.experts.gate_up_proj_bias[expert], moe.experts.down_proj_bias[expert]
                added = weight * (moe.experts._apply_gate(x[rows] @ up + bias) @ down + last)
            else:
                gate, value = (weight * x[rows] @ up).chunk(2, -1)
                added = (F.silu(gate) * value) @ down
            expected.append(float(added.norm(dim=-1).double().mean()) if len(rows) else 0.0)
    assert saliency(model, token_ids)[0].tolist() == pytest.approx(expected, rel=1e-4)
    [first, *_] = drop_experts(model, 0.25, token_ids).values()
    assert first == sorted(sorted(range(EXPERTS), key=expected.__getitem__)[:2])


class ListedExperts(nn.Module):
    """Experts in a list, as models with code of their own have them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_local_experts, 2
        self.gate = nn.Linear(32, self.num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)) for _ in range(self.num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        weights, index = self.gate(rows).softmax(-1).topk(self.top_k)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine, places = torch.where(index == number)
            part = expert(rows[mine])
            part *= weights[mine, places, None]
            output.index_add_(0, mine, part)
        return output.view_as(x)


def make_listed(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "LlamaMLP", ListedExperts)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config("llama", num_local_experts=EXPERTS)).eval()


def test_experts_in_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = make_listed(monkeypatch)
    block = model.model.layers[0]
    inputs: list[torch.Tensor] = []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(token_ids)
        hook.remove()
        weights, index = block.mlp.gate(inputs[0]).softmax(-1).topk(2)
        expected = []
        for number, expert in enumerate(block.mlp.experts):
            rows, places = torch.where(index == number)
            expected.append(float((weights[rows, places, None] * expert(inputs[0][rows])).norm(dim=-1).mean()))
    assert saliency(model, token_ids)[0].tolist() == pytest.approx(expected, rel=1e-4)
    experts = list(block.mlp.experts)
    [first, *_] = drop_experts(model, 0.25, token_ids).values()
    assert first == sorted(sorted(range(EXPERTS), key=expected.__getitem__)[:2])
    kept = [index for index in range(EXPERTS) if index not in first]
    assert list(block.mlp.experts) == [experts[index] for index in kept]
    assert block.mlp.num_experts == block.mlp.gate.out_features == len(block.mlp.gate.weight) == 6
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain_model(tmp_path)(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_groups_of_experts_stay_equal(family: str, token_ids: torch.Tensor) -> None:
    dropped = drop_experts(make(family), 0.49, token_ids)  # 1.96 of each group's four
    assert [[number // 4 for number in numbers] for numbers in dropped.values()] == [[0, 1]]


def test_what_is_left_is_pruned_as_any_other_model(tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = make("mixtral")
    drop_layers(model, 1, token_ids)
    drop_experts(model, 0.25, token_ids)
    model.save_pretrained(tmp_path)
    config = SparsityConfig("wanda", "2:4", dataset=token_ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=config)
    sparsify(model, config)
    assert_same_tensors(model.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="sparse already"):
        drop_experts(model, 0.25, token_ids)


@pytest.mark.parametrize(
    ("family", "share", "more", "reason"),
    [
        ("mixtral", 0, {}, "share=0 is out of range"),
        ("mixtral", 1.0, {}, "share=1.0 is out of range"),
        ("mixtral", 0.1, {}, "is none; the least is 1/8 = 0.125"),
        ("mixtral", 0.8, {}, "leaves 2 of 8 experts, but the router gives each token to 3.*largest share is 0.625"),
        ("deepseek_v3", 0.2, {}, "in 2 groups, which must stay equal is none; the least is 2/8"),
        ("deepseek_v3", 0.75, {}, "in 2 groups, .*gives each token to 3 and needs 6"),
        ("jetmoe", 0.25, {"kv_channels": 8}, "JetMoeParallelExperts, of which it is not known what each adds"),
        ("llama", 0.25, {}, "no routed experts"),
    ],
)
def test_what_cannot_be_dropped(
    family: str, share: float, more: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = 3 if "3" in reason else 2
    settings = {**_SIZES, **FAMILIES.get(family, {}), "num_experts_per_tok": picked, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("optimum_ksparse.pruning.smaller_model.calibration_tokens", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=reason):
        drop_experts(model, share, "no-such-data")
    assert_same_tensors(model.state_dict(), state)


def test_tables_of_expert_numbers_are_refused(token_ids: torch.Tensor) -> None:
    model = make()
    holder: Any = model.model.layers[0].mlp
    kind = type(holder)

    class Hashed(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.zeros(4, dtype=torch.long))

    import transformers.models.mixtral.modeling_mixtral as modeling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, kind.__name__, Hashed)
        model = make()
        with pytest.raises(ValueError, match=r"mlp\.table holds whole numbers"):
            drop_experts(model, 0.25, token_ids)


def test_the_command(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.commands")
    from optimum_ksparse.commands import parse_words
    from optimum_ksparse.commands.errors import UsageError

    make().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("가나다 " * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    calibration = "--dataset text.txt --num-samples 2 --seq-len 16"
    flags = f"--drop-experts 0.25 --drop-layers 1 {calibration}"
    parse_words(f"prune dense smaller {flags} --pattern none".split()).execute()
    config = plain_model(tmp_path / "smaller").config
    assert (config.num_local_experts, config.num_hidden_layers) == (6, 1)
    parse_words(f"prune dense both {flags} --method wanda".split()).execute()
    parse_words(f"prune smaller after --method wanda {calibration}".split()).execute()
    assert_same_tensors(tensors(tmp_path / "both"), tensors(tmp_path / "after"))
    for words in ("--drop-experts 0.25 --stream", "--drop-experts 2", "--drop-experts 0"):
        with pytest.raises(UsageError, match="drop.experts"):
            parse_words(f"prune dense out {words}".split()).execute()
