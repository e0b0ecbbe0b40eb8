"""`SparseLinear`: it computes, trains, moves and is stored like the dense linear map that it stands for."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_ksparse import Pattern, SparseLinear, kernels
from optimum_ksparse.nn import dense_weight, densified, is_linear_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("2:4", "1:3", "50%", "29%")
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


class NamedLinear(nn.Linear):
    """A subclass of `nn.Linear`; at the top of the module, so that it can be pickled."""


def make_sparse(pattern="2:4", out_features=6, in_features=12, bias=True, dtype=torch.float32, kind=nn.Linear):
    torch.manual_seed(0)
    linear = Conv1D(out_features, in_features) if kind is Conv1D else kind(in_features, out_features, bias=bias)
    linear = linear.to(dtype)
    mask = Pattern(pattern).mask(dense_weight(linear).detach().abs())
    return SparseLinear.from_dense(linear, mask, Pattern(pattern)), linear, mask


def gradients(function, x, *parameters):
    """Output, and the gradients of a loss that weights the outputs differently."""
    inputs = [x.detach().clone().requires_grad_(), *parameters]
    y = function(*inputs)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    return y.detach(), torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("bias", "dtype"), [*zip((True, False, True), DTYPES, strict=True)])
def test_forward_and_gradients_equal_a_dense_linear(pattern, bias, dtype):
    sparse, _, mask = make_sparse(pattern, bias=bias, dtype=dtype)
    dense = [sparse.to_dense_weight().requires_grad_(), *([sparse.bias] if bias else [])]
    x = torch.randn(2, 5, 12, dtype=dtype)
    y, (grad_x, grad_values, *grad_bias) = gradients(lambda x, *_: sparse(x), x, *sparse.parameters())
    expected, (expected_x, expected_weight, *expected_bias) = gradients(F.linear, x, *dense)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    torch.testing.assert_close(grad_x, expected_x, **TOLERANCES[dtype])
    torch.testing.assert_close(grad_values, expected_weight[mask].view_as(grad_values), **TOLERANCES[dtype])
    torch.testing.assert_close(grad_bias, expected_bias, **TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(12,), (2, 1, 3, 2, 12), (2, 0, 12)])
def test_inputs_of_any_rank(shape):
    sparse, _, mask = make_sparse("50%")
    dense = [sparse.to_dense_weight().requires_grad_(), sparse.bias]
    x = torch.randn(shape)
    y, (grad_x, grad_values, *grad_bias) = gradients(lambda x, *_: sparse(x), x, *sparse.parameters())
    expected, (expected_x, expected_weight, *expected_bias) = gradients(F.linear, x, *dense)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad_x, expected_x)
    torch.testing.assert_close(grad_values, expected_weight[mask])
    torch.testing.assert_close(grad_bias, expected_bias)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_inputs_of_another_width_or_dtype_are_refused(pattern):
    sparse, _, _ = make_sparse(pattern)
    for x in (torch.randn(3, 11), torch.randn(3, 24), torch.randn(3, 12, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="this layer takes"):
            sparse(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_its_dtype_and_full_precision_gradients(dtype):
    sparse, _, _ = make_sparse()
    x = torch.randn(3, 12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
        expected = F.linear(x, sparse.to_dense_weight(), sparse.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().square().sum().backward()
    assert sparse.weight.grad.dtype == sparse.bias.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert sparse(x.float()).dtype == torch.float32


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    sparse, _, _ = make_sparse("50%")
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 12)
    y, grads = gradients(lambda x, *_: compiled(x), x, *sparse.parameters())
    expected, expected_grads = gradients(lambda x, *_: sparse(x), x, *sparse.parameters())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_gradient_checkpointing():
    sparse, _, _ = make_sparse()
    x = torch.randn(3, 12)
    recomputed = gradients(
        lambda x, *_: torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=False), x, *sparse.parameters()
    )
    expected = gradients(lambda x, *_: sparse(x), x, *sparse.parameters())
    torch.testing.assert_close(recomputed, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_input_is_kept_for_the_gradient_of_the_weight_only(frozen):
    sparse, _, _ = make_sparse()
    sparse.weight.requires_grad_(not frozen)
    x = torch.randn(3, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = sparse(x)
    assert any(tensor.shape == x.shape for tensor in saved) != frozen
    assert all(tensor.shape != (6, 12) for tensor in saved)
    y.sum().backward()
    assert (sparse.weight.grad is None) == frozen
    torch.testing.assert_close(x.grad, sparse.to_dense_weight().sum(0).expand(3, 12))


def test_no_gradients_without_grad_mode():
    sparse, _, _ = make_sparse()
    with torch.no_grad():
        assert not sparse(torch.randn(3, 12)).requires_grad
    with torch.inference_mode():
        assert sparse(torch.randn(3, 12)).is_inference()


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_zeros_stay_zero_under_adamw_with_weight_decay(pattern):
    sparse, _, mask = make_sparse(pattern)
    before = sparse.to_dense_weight()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.05, weight_decay=0.1)
    x, target = torch.randn(32, 12), torch.randn(32, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(sparse(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = sparse.to_dense_weight()
    assert losses[-1] < losses[0]
    assert bool((after[~mask] == 0).all())
    assert bool((after[mask] != before[mask]).all())
    sparse.check_mask("linear")


@pytest.mark.parametrize("pattern", ["2:4", "29%"])
@pytest.mark.parametrize(("kind", "dtype"), [*zip((nn.Linear, NamedLinear, Conv1D), DTYPES, strict=True)])
def test_dense_to_sparse_and_back(pattern, kind, dtype):
    sparse, linear, mask = make_sparse(pattern, dtype=dtype, kind=kind)
    dense = sparse.to_dense()
    assert type(dense) is kind
    assert torch.equal(dense_weight(dense), torch.where(mask, dense_weight(linear), 0))
    assert dense_weight(dense).dtype == dtype
    assert dense.weight.is_contiguous()
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in linear.named_parameters()]
    assert not any(parameter.is_meta for parameter in dense.parameters())
    x = torch.randn(3, 12, dtype=dtype)
    torch.testing.assert_close(dense(x), sparse(x), **TOLERANCES[dtype])


def test_from_dense_keeps_mode_and_what_is_frozen():
    linear = nn.Linear(12, 6).eval()
    linear.weight.requires_grad_(False)
    mask = Pattern("2:4").mask(linear.weight.abs())
    sparse = SparseLinear.from_dense(linear, mask, Pattern("2:4"))
    assert not sparse.training
    assert not sparse.weight.requires_grad
    assert sparse.bias.requires_grad
    assert not sparse.to_dense().training
    assert not sparse.to_dense().weight.requires_grad


def test_from_dense_without_a_pattern_takes_the_density_of_the_mask():
    mask = torch.zeros(6, 12, dtype=torch.bool)
    mask[0, :8] = True
    sparse = SparseLinear.from_dense(nn.Linear(12, 6), mask)
    assert sparse.pattern == Pattern("64/72")
    assert sparse.density == 8 / 72
    assert sparse.weight.shape == (8,)


def test_from_dense_refuses_a_sparse_module():
    sparse, _, mask = make_sparse()
    with pytest.raises(TypeError, match="must be a dense nn.Linear or Conv1D, found SparseLinear"):
        SparseLinear.from_dense(sparse, mask, Pattern("2:4"), sparse.to_dense_weight())


@pytest.mark.parametrize(
    ("mask", "pattern", "message"),
    [
        (torch.ones(6, 8), "2:4", "must have the same shape"),
        (torch.ones(6, 12), "2:4", "exactly 2 weights in every 4"),
        (torch.ones(6, 12), "2:5", "m=5"),
        (torch.ones(6, 12), None, "give the pattern"),
        (torch.zeros(6, 12), None, "give the pattern"),
    ],
)
def test_from_dense_refuses_a_mask_that_does_not_fit(mask, pattern, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_dense(nn.Linear(12, 6), mask, None if pattern is None else Pattern(pattern))
    with pytest.raises(ValueError, match="weight is"):
        SparseLinear.from_dense(nn.Linear(12, 6), torch.ones(6, 12), None, torch.ones(6, 8))


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 1), nn.Embedding(6, 12), nn.LayerNorm(12), None])
def test_from_dense_refuses_what_is_not_linear(module):
    assert not is_linear_map(module)
    with pytest.raises(TypeError, match=f"must be a dense nn.Linear or Conv1D, found {type(module).__name__}"):
        SparseLinear.from_dense(module, torch.ones(6, 12, dtype=torch.bool))


def test_an_unstructured_pattern_needs_the_number_of_values():
    with pytest.raises(ValueError, match="num_values must be given for pattern 50%, which does not fix it"):
        SparseLinear(12, 6, pattern=Pattern("50%"))
    assert SparseLinear(12, 6, pattern=Pattern("50%"), num_values=30).weight.shape == (30,)
    assert SparseLinear(12, 6, pattern=Pattern("1:4")).weight.shape == (6, 3)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.53125), (torch.bfloat16, 0.5625)])
def test_sizes(dtype, share):
    sparse, _, _ = make_sparse("2:4", out_features=6, in_features=16, dtype=dtype)
    assert sparse.density == 0.5
    assert sparse.dense_bytes == 6 * 16 * dtype.itemsize
    assert sparse.packed_bytes == share * sparse.dense_bytes
    assert repr(sparse) == "SparseLinear(in_features=16, out_features=6, bias=True, pattern=2:4, density=0.5000)"


@pytest.mark.parametrize("pattern", ["2:4", "29%"])
def test_copies_and_pickles_compute_the_same(pattern):
    sparse, _, _ = make_sparse(pattern, kind=NamedLinear)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    x = torch.randn(3, 12)
    for copied in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(x), sparse(x))
        assert copied.weight.data_ptr() != sparse.weight.data_ptr()
        assert copied.pattern == sparse.pattern
        assert type(copied.to_dense()) is NamedLinear


@pytest.mark.parametrize("pattern", ["2:4", "29%"])
@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_state_dict_round_trip(pattern, device, assign):
    sparse, _, _ = make_sparse(pattern)
    state = sparse.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.float32,
        "weight_mask": torch.uint8,
        "bias": torch.float32,
    }
    other = SparseLinear(12, 6, pattern=sparse.pattern, num_values=sparse.weight.numel(), device=device)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.to_dense_weight(), sparse.to_dense_weight())
    other.check_mask("linear")


def damaged(sparse, how):
    """The state dict with another mask: one weight more, one less, or a padding bit."""
    state = sparse.state_dict()
    mask = state["weight_mask"].clone()
    set_bits = [(int(mask[0, 0]) >> k) & 1 for k in range(8)]
    if how == "padding":
        mask[0, -1] |= 0b10000000
    else:
        mask[0, 0] ^= 1 << set_bits.index(int(how == "one less"))
    return {**state, "weight_mask": mask}


@pytest.mark.parametrize("pattern", ["2:4", "29%"])
@pytest.mark.parametrize("how", ["one more", "one less", "padding"])
def test_load_state_dict_refuses_a_damaged_mask(pattern, how):
    sparse, _, _ = make_sparse(pattern)
    parent = nn.Sequential(copy.deepcopy(sparse))
    state = {f"0.{name}": tensor for name, tensor in damaged(sparse, how).items()}
    message = "padding bits" if how == "padding" else r"keeps \d+ weights, but there are \d+ values"
    with pytest.raises(RuntimeError, match=f"0.weight_mask.*{message}"):
        parent.load_state_dict(state)


def test_load_state_dict_refuses_groups_of_another_count():
    sparse, _, _ = make_sparse("2:4")
    mask = torch.tensor([[True, True, True, False, True, False, False, False, True, True, False, False]] * 6)
    state = {**sparse.state_dict(), "weight_mask": SparseLinear.from_dense(nn.Linear(12, 6), mask).weight_mask}
    with pytest.raises(RuntimeError, match="weight_mask does not keep exactly 2"):
        sparse.load_state_dict(state)


def test_check_mask_names_the_module():
    sparse, _, _ = make_sparse()
    sparse.weight_mask[0, 0] = 255
    with pytest.raises(ValueError, match="layers.3.q_proj.weight_mask keeps"):
        sparse.check_mask("layers.3.q_proj")


def test_a_change_of_dtype_leaves_the_mask():
    sparse, _, mask = make_sparse()
    sparse.to(torch.bfloat16)
    assert sparse.weight.dtype == sparse.bias.dtype == torch.bfloat16
    assert sparse.weight_mask.dtype == torch.uint8
    assert torch.equal(sparse.to_dense_weight() != 0, mask)


def test_runs_on_the_meta_device():
    y = make_sparse()[0].to("meta")(torch.empty(2, 5, 12, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 5, 6)


def test_densified_modules_give_the_same_and_are_packed_again(monkeypatch):
    monkeypatch.setattr(kernels, "gains_natively", lambda *_: False)
    sparse, _, _ = make_sparse()
    parent = nn.Sequential(nn.Linear(12, 12), sparse)
    x = torch.randn(3, 12)
    expected = parent(x)
    with pytest.raises(KeyError), densified(parent), torch.no_grad():
        torch.testing.assert_close(parent(x), expected)
        assert sparse._dense_weight.shape == (6, 12)
        raise KeyError
    assert sparse._dense_weight is None
    assert "_dense_weight" not in sparse.state_dict()


def test_what_native_code_computes_in_less_time_stays_packed():
    sparse, _, _ = make_sparse("2:4")
    with densified(sparse):
        assert (sparse._dense_weight is None) == kernels.gains_natively(sparse.weight, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_operators_are_registered_correctly(pattern):
    sparse, _, _ = make_sparse(pattern)
    values, bits, bias = sparse.weight.detach(), sparse.weight_mask, sparse.bias.detach()
    torch.library.opcheck(kernels.decompress, (values, bits, 12))
    for x in (torch.randn(2, 3, 12), torch.randn(12, 5).T):
        leaves = [tensor.clone().requires_grad_() for tensor in (values, bias)]
        torch.library.opcheck(kernels.linear, (x.clone().requires_grad_(), leaves[0], bits, leaves[1], 12))
        torch.library.opcheck(kernels.linear, (x, values, bits, None, 12))


class _Quantized(torch.Tensor):
    """A tensor of another library, as torchao's `quantize_` puts it in the place of a weight."""


@pytest.mark.parametrize(
    "change", ["l1_unstructured", "ln_structured", "identity", "custom_from_mask", "quantize", "take"]
)
def test_what_other_libraries_cannot_do_to_a_packed_weight_says_what_to_do(change):
    from torch.nn.utils import prune

    layer = SparseLinear.from_dense(nn.Linear(16, 8), Pattern("2:4").mask(torch.randn(8, 16)))
    settings = {"l1_unstructured": {"amount": 0.5}, "ln_structured": {"amount": 0.5, "n": 2, "dim": 0}}
    settings["custom_from_mask"] = {"mask": torch.ones_like(layer.weight)}
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 16)
    expected = layer(x)
    with pytest.raises(TypeError, match=r"keeps its weight packed.*model\.dequantize\(\) first"):
        if change == "quantize":
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Quantized), requires_grad=False)
        elif change == "take":  # as quanto does once it has its own module of it
            layer.weight = None
        else:
            getattr(prune, change)(layer, "weight", **settings.get(change, {}))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_function_transforms_give_what_a_dense_linear_gives(pattern, grad):
    sparse, _, mask = make_sparse(pattern)
    dense, x = sparse.to_dense(), torch.randn(3, 2, 12)

    def loss(layer, parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def directional(layer):
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, x.cos()))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    def results(layer):
        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        gradients = torch.func.grad(lambda parameters: loss(layer, parameters))(parameters)
        gradient = gradients["weight"] if layer is sparse else gradients["weight"][mask].view_as(sparse.weight)
        transforms = (
            torch.vmap(layer)(x),
            torch.func.jvp(layer, (x,), (x.cos(),))[1],
            torch.func.jacrev(layer)(x[0, 0]),
        )
        return [*transforms, gradients["bias"], gradient, directional(layer)]

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(results(sparse), results(dense), rtol=1e-5, atol=1e-5)
