"""`DenseLinear`: what stays dense in a sparse model is computed natively for a few tokens, and is else what it was."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, kernels, sparsify
from optimum_ksparse.nn import compute_by_torch, compute_natively
from optimum_ksparse.nn import dense as dense_module
from optimum_ksparse.nn.dense import DenseLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
native = pytest.mark.skipif(
    not kernels.most_dense_tokens(torch.float32),
    reason="dense products run natively on x86 with AVX2, with a compiler",
)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_module, "_LEAST_WEIGHTS", 1)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each product that runs natively."""
    calls: list[int] = []
    linear = kernels.NativeWeight.linear

    def counted(self, x, bias):
        calls.append(x.shape[:-1].numel())
        return linear(self, x, bias)

    monkeypatch.setattr(kernels.NativeWeight, "linear", counted)
    return calls


def make(in_features=70, out_features=9, bias=True, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(in_features, out_features, bias=bias).to(dtype))
    compute_natively(layer)
    return layer[0]


@native
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 40)),
    batch=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_products_equal_those_in_float64(shape, batch, dtype, bias, strided):
    layer = make(*shape, bias=bias, dtype=dtype)
    x = torch.randn(*batch, 2 * shape[0] if strided else shape[0]).to(dtype)[..., :: 2 if strided else 1]
    with torch.no_grad():
        y = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert y.shape == exact.shape and y.dtype is dtype
    scale = F.linear(x.double().abs(), layer.weight.double().abs()).max().item() if exact.numel() else 1.0
    torch.testing.assert_close(y.double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * (scale + 1))


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_run_natively_and_others_as_ever(dtype, called):
    layer, most = make(dtype=dtype), kernels.most_dense_tokens(dtype)
    with torch.no_grad():
        for tokens in (1, most, most + 1):
            layer(torch.randn(tokens, 70, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.randn(1, 70, dtype=dtype))
    layer(torch.randn(1, 70, dtype=dtype)).sum().backward()
    assert called == [1, most]
    assert layer.weight.grad is not None


@native
def test_what_is_written_into_the_weight_or_put_in_its_place_is_computed(called):
    layer, x = make(), torch.randn(1, 70)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.weight = nn.Parameter(torch.randn(9, 70))
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.load_state_dict({"weight": torch.randn(9, 70), "bias": torch.randn(9)}, assign=True)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.weight.data = torch.randn(70, 9).T  # not contiguous
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert len(called) == 4
        layer.double()
        torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer.weight, layer.bias))
        with pytest.raises(RuntimeError, match=r"dtype|shape|mat1"):
            layer(x)
        with pytest.raises(RuntimeError, match=r"shape|mat1"):
            layer(torch.randn(1, 69, dtype=torch.float64))


class Wrapped(torch.Tensor):
    """A tensor whose numbers may be anywhere, as those of other libraries."""


@native
def test_weights_of_other_dtypes_and_kinds_are_left_to_torch(called):
    x = torch.randn(1, 70)
    layer = make().double()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer.weight, layer.bias))
        layer = make()
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
        assert layer(x).shape == (1, 9)
    assert not called


@native
def test_copies_pickles_threads_and_graphs_compute_the_same():
    layer, x = make(), torch.randn(2, 70)
    with torch.no_grad():
        y = layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False))
        for other in others:
            torch.testing.assert_close(other(x), y, rtol=0, atol=0)
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
        torch.testing.assert_close(torch.func.vmap(layer)(x), y)
        torch.testing.assert_close(layer.to("meta")(x.to("meta")).shape, y.shape)
    found: list[torch.Tensor] = []
    layer = make()

    def run() -> None:
        with torch.no_grad():
            found.extend(layer(x) for _ in range(200))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800 and all(torch.equal(one, found[0]) for one in found)


class Own(nn.Linear):
    """Somebody's own linear map."""


def test_only_plain_linear_maps_become_one_and_go_back():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    root = nn.ModuleList([nn.Linear(4, 4), Own(4, 4), nn.Conv1d(4, 4, 1), normed])
    kinds = [type(module) for module in root]
    compute_natively(root)
    assert [type(module) for module in root] == [DenseLinear, *kinds[1:]]
    with torch.no_grad():
        root[0](torch.randn(1, 4))
    compute_by_torch(root)
    assert [type(module) for module in root] == kinds and "_native" not in vars(root[0])


@native
@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_the_head_of_a_sparse_model_is_one_after_pruning_and_loading(storage, make_model, tokenizer, tmp_path, called):
    model = make_model()
    sparsify(model, SparsityConfig("magnitude", "2:4", storage=storage), tokenizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    for one in (model, loaded):
        assert type(one.lm_head) is DenseLinear
        del called[:]
        with torch.no_grad():
            logits = one(ids).logits
        assert called
        one.dequantize()
        assert type(one.lm_head) is nn.Linear
        with torch.no_grad():
            torch.testing.assert_close(one(ids).logits, logits, rtol=1e-4, atol=1e-5)
