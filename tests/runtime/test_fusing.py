"""Layers that read the same input run as one product, and nothing else changes: not a bit, not the checkpoint."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.blocks import find_blocks
from optimum_ksparse.kernels import Candidate, dispatch, hardware
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.runtime import RuntimeConfig, fuse_model
from optimum_ksparse.runtime.fusing import fuse_shared_inputs, unfuse

# Groups in a block: what keeps q, k, v (and gate, up) apart; the others have them in one layer already.
GROUPS = {"llama": 2, "gemma3": 2, "qwen3": 2, "mistral": 2, "opt": 1, "gpt_neo": 1}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU: kernels run in Triton's interpreter on the CPU, all products by `gemv` for up to 4 tokens."""
    pytest.importorskip("triton")
    monkeypatch.setattr(hardware, "runs_kernels", lambda device: True)
    monkeypatch.setattr(hardware, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(dispatch, "time_calls", lambda calls, device: 1.0 + (calls[0].func.__self__.kernel != "gemv"))
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "speeds"))
    monkeypatch.delenv("KSPARSE_KERNEL", raising=False)
    kernels.forget()
    yield
    kernels.forget()


class Block(nn.Module):
    """q, k and v of one input, o of another."""

    def __init__(self, dtype=torch.bfloat16, pattern="2:4", bias=True):
        super().__init__()
        torch.manual_seed(0)
        for name, rows in (("q", 6), ("k", 2), ("v", 4), ("o", 4)):
            linear = nn.Linear(16, rows, bias=bias).to(dtype)
            mask = Pattern(pattern).mask(linear.weight.abs())
            setattr(self, name, SparseLinear.from_dense(linear, mask, Pattern(pattern)))

    def forward(self, x, order="qkv"):
        parts = {name: getattr(self, name)(x) for name in order}
        return torch.cat([parts[name] for name in sorted(parts)] + [self.o(x + 1)], -1)


def make_block(**settings):
    block = Block(**settings).requires_grad_(False)
    x = torch.randn(1, 16, dtype=block.q.weight.dtype)
    return block, x, lambda: block(x)


@pytest.fixture
def count(monkeypatch):
    """Rows of the products that kernels compute."""
    rows = []

    def run(self, x, weight, bias, original=Candidate.run):
        rows.append(weight.out_features)
        return original(self, x, weight, bias)

    monkeypatch.setattr(Candidate, "run", run)
    return rows


@pytest.mark.parametrize("name", [*GROUPS, "gpt2"])
def test_models_give_the_same_bits(make_model, name, token_ids):
    model = make_model(name)
    sparsify(model, SparsityConfig("magnitude"))
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, written = model(token_ids).logits, model.generate(token_ids[:2], **arguments)
        groups = fuse_model(model)
        assert len(groups) == GROUPS.get(name, 0) * len(find_blocks(model).blocks)
        assert torch.equal(model(token_ids).logits, expected)
        assert torch.equal(model.generate(token_ids[:2], **arguments), written)


def test_what_is_fused(make_model):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude"))
    fuse_model(model)
    attention = model.model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert [member._group for member in members] == [(attention.q_proj._group[0], index) for index in range(3)]
    assert attention.q_proj._group[0].sizes == [32, 16, 16]
    assert attention.o_proj._group is None and model.model.layers[0].mlp.down_proj._group is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_the_checkpoint_does_not_change(make_model, tmp_path):
    make_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    for fuse in (False, True):
        how = {"sparsity_config": SparsityConfig("magnitude"), "runtime_config": RuntimeConfig(fuse=fuse)}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **how)
        model(torch.zeros(1, 1, dtype=torch.long))
        model.save_pretrained(tmp_path / str(fuse))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("True", "False")]
    assert files[0] == files[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "True", runtime_config=RuntimeConfig(fuse=True))
    assert again.model.layers[0].mlp.up_proj._group is not None


@pytest.mark.parametrize(("pattern", "bias"), [("2:4", True), ("4:8", False)])
def test_one_product_gives_the_bits_of_three(gpu, count, pattern, bias):
    block, x, run = make_block(pattern=pattern, bias=bias)
    with torch.no_grad():
        expected = block(x)
        assert fuse_shared_inputs(block, run) == [["q", "k", "v"]]
        count.clear()
        assert torch.equal(block(x), expected)
    assert count == [12, 4]


def test_a_product_that_would_round_in_another_way_is_not_taken(gpu, count, monkeypatch):
    block, x, run = make_block()
    with torch.no_grad():
        expected = block(x)
        fuse_shared_inputs(block, run)
        choose = dispatch.choose

        def another(weight, tokens, kernel="auto"):
            whole = weight.out_features == 12
            return Candidate("gemv", {"warps": 1, "rows": 2}) if whole else choose(weight, tokens, kernel)

        monkeypatch.setattr(dispatch, "choose", another)
        dispatch._fused.clear()
        count.clear()
        assert torch.equal(block(x), expected)
    assert count == [6, 2, 4, 4]


def test_values_are_stored_once(gpu):
    block, _, run = make_block()
    names = set(block.state_dict())
    fuse_shared_inputs(block, run)
    storages = {getattr(block, name).weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(storages) == 1
    assert block.q.weight.untyped_storage().nbytes() == sum(getattr(block, name).weight.nbytes for name in "qkv")
    assert set(block.state_dict()) == names
    unfuse(block)
    assert len({getattr(block, name).weight.untyped_storage().data_ptr() for name in "qkv"}) == 3
    assert all(getattr(block, name)._group is None for name in "qkv")


def expected_output(block, x):
    """By dense weights, layer by layer."""
    parts = [F.linear(x, m.to_dense_weight(), m.bias) for m in (block.k, block.q, block.v)]
    return torch.cat([*parts, F.linear(x + 1, block.o.to_dense_weight(), block.o.bias)], -1)


CHANGES = {
    "dtype": lambda block: block.to(torch.float16),
    "device": lambda block: block.to("cpu"),
    "load": lambda block: block.load_state_dict({k: v.clone() * 1 for k, v in block.state_dict().items()}),
    "assign": lambda block: block.load_state_dict({k: v.clone() for k, v in block.state_dict().items()}, assign=True),
    "edit": lambda block: block.k.weight.mul_(2),
    "bias": lambda block: block.v.bias.add_(1),
    "replace": lambda block: setattr(block.v, "weight", nn.Parameter(block.v.weight * 3)),
    "data": lambda block: setattr(block.q.weight, "data", block.q.weight.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_member_are_seen(gpu, change):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        CHANGES[change](block)
        x = x.to(block.q.weight.dtype)
        torch.testing.assert_close(block(x), expected_output(block, x), rtol=0.02, atol=0.02)
        storages = {getattr(block, name).weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(storages) == 1  # joined again


def test_training_then_running(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    block.requires_grad_()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    before = block.q.to_dense_weight()
    for _ in range(3):
        optimizer.zero_grad()
        block.kernel = "reference"
        block(x).float().square().sum().backward()
        optimizer.step()
    assert not torch.equal(block.q.to_dense_weight(), before)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected_output(block, x), rtol=0.02, atol=0.02)


def test_copies_stand_alone(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    twin = copy.deepcopy(block)
    assert twin.q._group is None
    with torch.no_grad():
        block.q.weight.zero_()
        assert twin.q.weight.any()
        torch.testing.assert_close(twin(x), expected_output(twin, x), rtol=0.02, atol=0.02)


def test_members_called_in_another_way(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        expected = block(x)
        for order in ("kvq", "vqk"):
            assert torch.equal(block(x, order), expected)
        other = torch.randn_like(x)
        assert torch.equal(block.k(x), expected[..., :2])  # alone
        torch.testing.assert_close(
            block.v(other), F.linear(other, block.v.to_dense_weight(), block.v.bias), rtol=0.02, atol=0.02
        )
        assert torch.equal(block.k(x), block.k(x))
        assert torch.equal(block(x), expected)
        with pytest.raises(RuntimeError, match="this layer takes"):
            block.q(x[:, :8])
        assert torch.equal(block(x), expected)


def test_nothing_is_kept_alive(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        y = x.clone()
        block(y)
    kept = weakref.ref(y)
    del y
    gc.collect()
    assert kept() is None


def test_fusing_is_left_out_where_it_changes_something(gpu):
    class InPlace(Block):
        def forward(self, x, order="qkv"):
            y = x.clone()
            first = self.q(y)
            y.add_(1)  # k sees the same tensor with other values
            return torch.cat([first, self.k(y), self.v(y)], -1)

    block = InPlace().requires_grad_(False)
    x = torch.randn(1, 16, dtype=torch.bfloat16)
    expected = block(x)
    assert fuse_shared_inputs(block, lambda: block(x)) == [["k", "v"]]
    with torch.no_grad():
        assert torch.equal(block(x), expected)


def test_under_autocast_and_with_gradients_members_run_alone(gpu, count):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    count.clear()
    block(x.clone().requires_grad_())
    assert sorted(count) == [2, 4, 4, 6]
    count.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    assert sorted(count) == [2, 4, 4, 6]


def test_a_fused_model_compiles_as_one_graph(make_model, token_ids):
    torch._dynamo.reset()
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude"))
    fuse_model(model)
    with torch.no_grad():
        expected = model(token_ids).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(token_ids).logits
    torch.testing.assert_close(found, expected)
    assert not model.model.layers[0].self_attn.q_proj._group[0]._left


def test_layers_of_different_kernels_run_alone(gpu, count):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    block.k.kernel = "reference"
    count.clear()
    with torch.no_grad():
        block(x)
    assert sorted(count) == [2, 4, 4, 6]


def test_an_edit_of_a_bias_that_autograd_does_not_see(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        before = block(x)
        block.v.bias.data.add_(1)
        assert not torch.equal(block(x), before)
        torch.testing.assert_close(block(x), expected_output(block, x), rtol=0.02, atol=0.02)


def test_layers_called_with_other_tensors_compute_once(gpu, count):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    count.clear()
    with torch.no_grad():
        block.q(x), block.k(x.clone()), block.v(x.clone())
    assert count == [12, 2, 4]


def test_an_input_that_changes_between_two_layers(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        block.q(x)
        found = block.k(x.add_(1))
        assert torch.equal(found, block.k(x.clone()))


def test_an_exception_between_two_layers_leaves_nothing(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    y = x.clone()
    with torch.no_grad():
        block.q(y)
    assert block.q._group[0]._left is not None
    del y
    assert block.q._group[0]._left is None


def test_a_model_that_inference_mode_joined_can_be_trained(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    block.to(torch.float16)
    with torch.inference_mode():
        block(x.half())
    assert block.q._group[0]._joined is not None
    assert not block.q.weight.is_inference() and not block.q.weight_mask.is_inference()
    block.requires_grad_()
    block(x.half()).sum().backward()


def test_threads_do_not_take_each_others_outputs(gpu):
    block, _, run = make_block()
    fuse_shared_inputs(block, run)
    group, _ = block.q._group
    one, other = torch.randn(2, 1, 16).bfloat16()
    with torch.no_grad():
        expected = block.k(one)
        block.q(one)
        first = group._left
        block.q(other)  # another thread, between the look at the input and the output
        assert group._left is not first and first[2].keys() == {1, 2}
        assert torch.equal(block.k(one), expected)


def test_dissolving_one_layer_dissolves_its_group(gpu, count):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    unfuse(block.k)
    count.clear()
    with torch.no_grad():
        block(x)
    assert sorted(count) == [2, 4, 4, 6]


def test_a_deleted_model_goes_at_once(gpu):
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    with torch.no_grad():
        block(x)
    kept = weakref.ref(block.q.weight)
    del run
    gc.collect()
    gc.disable()
    try:
        del block
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["data", "replace", "bias"])
def test_a_compiled_graph_sees_changes(gpu, count, change):
    torch._dynamo.reset()
    block, x, run = make_block()
    fuse_shared_inputs(block, run)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        count.clear()
        compiled(x)
        assert count == [12, 4]
        CHANGES[change](block)
        x = x.to(block.q.weight.dtype)
        torch.testing.assert_close(compiled(x), expected_output(block, x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_offloaded_layers_stay_apart(make_model, token_ids, tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude"))
    with torch.no_grad():
        expected = model(token_ids).logits
        if how == "disk":
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert fuse_model(model) == []
        assert torch.equal(model(token_ids).logits, expected)


def test_inputs_by_keyword_and_outputs_in_containers(gpu):
    block, x, _ = make_block()

    def run():
        return {"nan": torch.tensor(float("nan")), "all": [getattr(block, name)(x=x) for name in "qkv"]}

    assert fuse_shared_inputs(block, run) == [["q", "k", "v"]]


@pytest.mark.parametrize("kernel", ["decompress", "gemv"])
def test_models_with_a_forced_kernel(make_model, count, monkeypatch, kernel):
    pytest.importorskip("triton")
    model = make_model("llama", torch.bfloat16, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    sparsify(model, SparsityConfig("magnitude"))
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        fuse_model(model)
        monkeypatch.setenv("KSPARSE_KERNEL", kernel)
        kernels.forget()
        count.clear()
        found = model(ids).logits
        assert len(count) == (4 if kernel == "gemv" else 7)
        unfuse(model)
        assert torch.equal(model(ids).logits, found)
    kernels.forget()
