"""What only a GPU can show: kernels at their real sizes, graphs, compilation, memory, training, and the measured
choice.

`pytest -m gpu`; without a GPU every test here is skipped.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_ksparse import SparseLinear, SparsityConfig, kernels, sparsify
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.runtime import autotune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (640, 2048), (2048, 640), (1000, 896), (77, 5632)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "speeds"))
    kernels.forget()
    yield
    kernels.forget()


@pytest.fixture
def poisoned():
    """New memory holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_layer(out_features, in_features, pattern="2:4", dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias, device="cuda", dtype=dtype)
    mask = Pattern(pattern).mask(torch.rand(out_features, in_features, device="cuda"))
    return SparseLinear.from_dense(linear, mask, Pattern(pattern)).requires_grad_(False)


def relative_error(found, expected):
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


def exact(layer, x):
    return F.linear(x.double(), layer.to_dense_weight().double(), layer.bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_is_right(shape, pattern, dtype, poisoned):
    layer = make_layer(*shape, pattern, dtype)
    weight = layer.packed()
    for tokens in (1, 2, 3, 4, 9, 16, 33, 64, 100, 257):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        expected = exact(layer, x)
        problem = weight.problem(tokens)
        for name in ("gemv", "dot", "decompress"):
            if kernels.KERNELS[name].why_not(problem) is not None:
                continue
            for config in kernels.KERNELS[name].configs(problem):
                candidate = kernels.Candidate(name, config)
                try:
                    y = candidate.run(x, weight, layer.bias)
                except Exception as error:
                    assert "OutOfResources" in type(error).__name__, candidate  # a GPU with little shared memory
                    continue
                assert y.isfinite().all(), candidate
                assert relative_error(y, expected) < TOLERANCE[dtype], (str(candidate), tokens)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("in_features", [8, 24, 40, 1000, 4104])
def test_rows_that_are_no_multiple_of_16(pattern, in_features):
    layer = make_layer(33, in_features, pattern)
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        assert relative_error(layer(x), exact(layer, x)) < 1e-2


def test_inputs_that_lie_badly():
    layer = make_layer(256, 512)
    storage = torch.randn(10 * 512 + 1, device="cuda", dtype=torch.bfloat16)
    for x in (storage[1:].view(10, 512), torch.randn(512, 10, device="cuda", dtype=torch.bfloat16).T):
        assert relative_error(layer(x), exact(layer, x)) < 1e-2
    assert layer(storage[:0].view(0, 512)).shape == (0, 256)
    assert layer(storage[: 4 * 512].view(2, 1, 2, 512)).shape == (2, 1, 2, 256)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients(pattern, dtype):
    layer = make_layer(384, 640, pattern, dtype).requires_grad_()
    x = torch.randn(48, 640, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(48, 384, device="cuda", dtype=dtype)
    layer(x).backward(grad)
    dense = layer.to_dense_weight().double()
    assert relative_error(x.grad, grad.double() @ dense) < TOLERANCE[dtype]
    full = grad.double().T @ x.detach().double()
    mask = kernels.decompress(torch.ones_like(layer.weight), layer.weight_mask, 640, pattern) != 0
    assert relative_error(layer.weight.grad.flatten(), full[mask]) < TOLERANCE[dtype]


def test_training_keeps_zeros():
    layer = make_layer(256, 512).requires_grad_()
    mask = layer.to_dense_weight() != 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    x, target = (torch.randn(64, n, device="cuda", dtype=torch.bfloat16) for n in (512, 256))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not layer.to_dense_weight()[~mask].any()
    assert optimizer.state[layer.weight]["exp_avg"].shape == (256, 256)


def test_backward_under_a_cuda_graph():
    """Neither decompressing nor gathering may wait for the GPU."""
    layer = make_layer(256, 512).requires_grad_()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step = torch.cuda.make_graphed_callables(layer, (x,))
    step(x).sum().backward()
    found, layer.weight.grad = layer.weight.grad.clone(), None
    other = make_layer(256, 512).requires_grad_()
    other(x).sum().backward()
    torch.testing.assert_close(found, other.weight.grad)


def test_what_is_measured_is_kept(tmp_path):
    layer = make_layer(4096, 4096)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    problem = layer.packed().problem(1)
    layer(x)
    assert not kernels.measured(problem)
    autotune({"layer": layer}, (1,))
    rows = kernels.measured(problem)
    assert {"gemv", "dot", "decompress", "dense"} <= set(rows)
    (file,) = (tmp_path / "speeds").glob("*.json")
    assert str(problem) in json.loads(file.read_text())["timings"]
    kernels.forget()
    assert set(kernels.measured(problem)) == set(rows)


def test_a_graph_gives_what_eager_gives():
    layer = make_layer(1024, 2048)
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.fill_(float("nan"))
        graph.replay()
    assert torch.equal(y, expected)


def test_tuned_layers_stay_small():
    layer = make_layer(8192, 4096)
    autotune({"layer": layer}, (1, 128, 1024))
    assert layer.packed_bytes + layer.extra_bytes <= 0.65 * layer.dense_bytes
    torch.cuda.synchronize()
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(layer(x), exact(layer, x)) < 1e-2


def test_the_library_form_shares_the_values_and_follows_training():
    layer = make_layer(512, 1024)
    if kernels.KERNELS["library"].why_not(layer.packed().problem(64)) is not None:
        pytest.skip("torch's semi-structured tensors are not there")
    form = kernels.library_form(layer.weight.detach(), layer.weight_mask, 1024)
    shared = kernels.shared_values(form, layer.weight.detach())
    if shared is None:
        pytest.skip("this version of the library orders values in another way")
    layer.keep_library_form(form, shared)
    assert layer.extra_bytes == form.nbytes - layer.weight.nbytes
    layer.kernel = "library"
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(layer(x), exact(layer, x)) < 1e-2
        layer.weight.data.mul_(2)
        assert relative_error(layer(x), exact(layer, x)) < 1e-2
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.cpu()
    assert layer.extra_bytes == 0
    assert all(torch.equal(tensor.cpu(), layer.state_dict()[name]) for name, tensor in state.items())


@pytest.fixture
def model(make_model, token_ids):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256}
    model = make_model("llama", dtype=torch.bfloat16, **sizes)
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    return model.cuda()


def test_a_whole_model_generates_what_its_dense_twin_does(model, token_ids):
    dense = copy.deepcopy(model)
    dense.dequantize()
    ids = token_ids.cuda()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **arguments).shape == (6, 32)


def test_generate_with_a_static_cache_under_graphs(model, token_ids):
    ids = token_ids[:1].cuda()
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.autotune_kernels((1, 32))
    eager = model.generate(ids, **arguments)
    graphs = model.generate(ids, cache_implementation="static", **arguments)
    assert (eager == graphs).float().mean() > 0.9  # rounding may turn a token of a random model


def test_a_block_compiles_without_graph_breaks(model, token_ids):
    torch._dynamo.reset()
    ids = token_ids.cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            found = compiled(ids, use_cache=False).logits.clone()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
