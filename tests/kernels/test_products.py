"""Products on a CPU that is slow in bfloat16 and float16: as torch's own, and none of them in these dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimum_ksparse.kernels import fast_products, mm, product_dtype, products
from optimum_ksparse.nn import SparseLinear
from optimum_ksparse.pattern import Pattern

from ..conftest import SlowProducts

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PANEL_BYTES", 1 << 10)


class Everything(nn.Module):
    """Each kind of product that models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.plain = nn.Linear(16, 40), nn.Linear(40, 24, bias=False)
        self.convolution = nn.Conv1d(24, 24, 3, groups=24, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(self.biased(x))
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        heads = x.unflatten(-1, (3, 8)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        scores = torch.baddbmm(heads[0, :, :1, :1], heads[0], heads[0].mT, beta=0.5)
        x = (scores @ heads).transpose(1, 2).flatten(2)
        x = torch.einsum("btc,dc->btd", x, self.plain.weight.T[:24, :24])
        offsets = torch.tensor([5, 9, x.shape[0] * x.shape[1]], dtype=torch.int32)
        return F.grouped_mm(x.flatten(0, 1), self.experts, offs=offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["no_grad", "inference", "gradients"])
def test_every_kind_of_product(
    dtype: torch.dtype, mode: str, narrow_panels: None, slow_products: SlowProducts
) -> None:
    torch.manual_seed(0)
    module = Everything()
    exact = module(x := torch.randn(2, 9, 16).to(dtype).float())
    exact.square().mean().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    module.to(dtype)
    around = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "gradients": torch.enable_grad}[mode]
    with fast_products(module), around():
        y = module(x.to(dtype))
        if mode == "gradients":
            y.float().square().mean().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.05)
    if mode == "gradients":
        for name, parameter in module.named_parameters():
            assert parameter.grad.dtype == dtype
            error = (parameter.grad.float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.05, name
    assert slow_products.seen == []


@pytest.mark.parametrize("pattern", ["2:4", "50%", "50%/32x32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_layers(pattern: str, dtype: torch.dtype, slow_products: SlowProducts) -> None:
    """Of themselves, in the passes of a user."""
    dense = nn.Linear(64, 96).to(dtype)
    layer = SparseLinear.from_dense(dense, Pattern(pattern).mask(dense.weight.abs()), Pattern(pattern))
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        wide = x.float() @ layer.to_dense_weight().float().T + layer.bias.float()
    torch.testing.assert_close(y.float(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert slow_products.seen == []


def test_the_check_above_can_fail(slow_products: SlowProducts) -> None:
    x = torch.randn(3, 4).bfloat16()
    x @ x.T
    assert slow_products.seen == ["aten::mm"]


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from([64, 1 << 20])
)
def test_a_product_in_panels_is_that_in_float32(
    rows: int, inner: int, columns: int, dtype: torch.dtype, panel_bytes: int
) -> None:
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T
    bias = torch.randn(columns).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_multiplies", lambda dtype: False)
        patch.setattr(products, "_PANEL_BYTES", panel_bytes)
        found, added = mm(a, b), products.linear(a, b.T, bias)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-2 if rows == 1 else 1e-5}
    torch.testing.assert_close(found.float(), a.float() @ b.float(), **tolerance)
    torch.testing.assert_close(added.float(), a.float() @ b.float() + bias.float(), **tolerance)


def test_where_nothing_is_slow_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4).bfloat16()
    monkeypatch.setattr(products, "_multiplies", lambda dtype: dtype == torch.bfloat16)
    assert product_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert product_dtype(torch.float16, CPU) == torch.float32
    assert product_dtype(torch.float16, torch.device("cuda")) == torch.float16
    with fast_products(module):
        assert torch._C._len_torch_dispatch_stack() == 0
    with fast_products(module, torch.float16), fast_products(module.half()):  # one for both
        assert torch._C._len_torch_dispatch_stack() == 1
    with fast_products(module.float()):
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("has_instructions", [True, False])
def test_the_cpu_is_asked(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_instructions, raising=False)
    for dtype, name in products._ONEDNN.items():
        supported = getattr(torch.ops.mkldnn, name, lambda: False)()
        fast = supported and (has_instructions or dtype != torch.bfloat16)
        assert products._multiplies.__wrapped__(dtype) == fast
    assert product_dtype(torch.float32, CPU) == torch.float32
