"""Patterns of whole blocks of weights: their masks, every method, storage, and products from their packed values."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, prune_checkpoint, prune_weight, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.kernels import PackedWeight, apply
from optimum_ksparse.nn import SparseExperts
from optimum_ksparse.packing import check_bits, pack, pack_mask, unpack
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruners import METHODS
from optimum_ksparse.pruners.scaled import to_rank
from optimum_ksparse.study.recipe import pattern_label

CHOOSING = [name for name, method in METHODS.items() if method.recognise is None]  # which zeros to make
quick = settings(max_examples=60)


@st.composite
def cases(draw):
    """A pattern, and scores of few different values that its blocks fill."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    share = draw(st.sampled_from(("50%", "29%", "1/3", "0.9")))
    shape = rows * draw(st.integers(1, 4)), columns * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return Pattern(f"{share}/{rows}x{columns}"), torch.randint(0, 4, shape, generator=generator).float()


def blocks_of(matrix, block):
    """The blocks one by one, in the order of their places."""
    rows, columns = block
    places = itertools.product(range(0, matrix.shape[0], rows), range(0, matrix.shape[1], columns))
    return [matrix[i : i + rows, j : j + columns] for i, j in places]


@given(cases())
@quick
def test_the_blocks_with_the_lowest_sums_go(case):
    pattern, scores = case
    mask = pattern.mask(scores)
    sums = [float(block.sum()) for block in blocks_of(scores, pattern.tile)]
    order = sorted(range(len(sums)), key=sums.__getitem__)
    pruned = set(order[: pattern.num_zeros(len(sums))])
    for place, block in enumerate(blocks_of(mask, pattern.tile)):
        assert bool((block == (place not in pruned)).all())
    assert torch.equal(pattern.mask(torch.stack([scores, scores.flip(0)]))[0], mask)
    assert torch.equal(pattern.mask_of_layer(scores), mask)


@given(cases())
@quick
def test_packed_blocks_come_back(case):
    pattern, weight = case
    mask = pattern.mask(weight)
    values, bits = pack(weight, mask, pattern)
    assert torch.equal(unpack(values, bits, weight.shape[1]), weight * mask)
    check_bits(bits, pattern, weight.shape[1], int(mask.sum()), "weight_mask")
    pattern.verify(weight * mask)
    x = torch.randn(3, weight.shape[1])
    y = apply(x, PackedWeight(values, bits, weight.shape[1], str(pattern)), None)
    torch.testing.assert_close(y, x @ (weight * mask).T)


def test_what_is_read_is_whole_blocks():
    pattern, mask = Pattern("50%/2x4"), torch.zeros(4, 8, dtype=torch.bool)
    mask[:2], mask[0, 0], mask[2, 0] = True, False, True
    with pytest.raises(ValueError, match="mask keeps tiles of pattern 50%/2x4 in part"):
        pack(torch.ones(4, 8), mask, pattern)
    with pytest.raises(ValueError, match="layer.weight_mask keeps tiles of pattern 50%/2x4 in part"):
        check_bits(pack_mask(mask), pattern, 8, 16, "layer.weight_mask")
    with pytest.raises(ValueError, match="w has 3 tiles that are not zero, pattern 50%/2x4 allows 2"):
        pattern.verify(mask.float(), "w")


def test_parsing():
    pattern = Pattern("62.5%/16x32")
    assert (pattern.tile, pattern.sparsity, pattern.width, str(pattern)) == (
        (16, 32),
        Fraction(5, 8),
        32,
        "62.5%/16x32",
    )
    assert not pattern.is_semi_structured
    assert Pattern("1/2/4x4") == Pattern("0.5/4x4") == Pattern("50%/4x4") != Pattern("50%")
    assert str(pattern.with_sparsity(Fraction(1, 3))) == "33.3333%/16x32"
    assert pattern_label("0.5/4x4") == "50%/4x4"
    assert (Pattern("2:4").width, Pattern("50%").width) == (4, 1)
    for text in ("50%/0x4", "50%/4", "2:4/4x4", "50%/4x", "/4x4", "100%/4x4", "50%/-1x4"):
        with pytest.raises(ValueError, match=r"allowed: .*\"50%/32x32\""):
            Pattern(text)
    message = (
        r"q_proj is 6 x 9, which the tiles of pattern 50%/2x4 do not fill \(2 must divide the outputs, 4 the inputs"
    )
    with pytest.raises(ValueError, match=message):
        Pattern("50%/2x4").check_shape(6, 9, "q_proj")


@pytest.mark.parametrize("method", CHOOSING)
def test_every_method_keeps_whole_blocks(method):
    torch.manual_seed(0)
    weight, x = torch.randn(12, 24), torch.randn(2, 40, 24) @ torch.randn(24, 24)
    pattern = Pattern("50%/4x3")
    more = {"block_size": 12} if method == "sparsegpt" else {}
    pruned, mask = prune_weight(weight, x, method=method, pattern=pattern, **more)
    kept = [bool(block.any()) for block in blocks_of(mask, pattern.tile)]
    assert all(bool(block.all()) == k for block, k in zip(blocks_of(mask, pattern.tile), kept, strict=True))
    assert sum(kept) == 12 and bool((pruned[~mask] == 0).all())
    if method == "sparsegpt":
        assert int(mask[:, :12].sum()) == int(mask[:, 12:].sum()) == 72  # ranked over each block_size columns
    if method == "wanda":
        norms = x.flatten(0, 1).square().sum(0).sqrt()
        sums = [float(block.sum()) for block in blocks_of(weight.abs() * norms, pattern.tile)]
        assert kept == [total >= sorted(sums)[12] for total in sums]
    _, refined = prune_weight(weight, x, method=method, pattern=pattern, refine="exact", **more)
    assert torch.equal(refined, mask)


def test_the_nearest_weight_of_the_pattern_is_found():
    """ADMM and ALPS project on the pattern: what is cut off has the least sum of squares that there is."""
    torch.manual_seed(0)
    weight, pattern = torch.randn(4, 6), Pattern("50%/2x2")
    sums = [float(block.square().sum()) for block in blocks_of(weight, pattern.tile)]
    least = min(sum(cut) for cut in itertools.combinations(sums, 3))
    mask = pattern.mask(to_rank(weight, pattern))
    assert float(weight[~mask].square().sum()) == pytest.approx(least)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "sparsegpt", "pattern": "50%/4x24"}, "block_size=128"),
        ({"pattern": "50%/4x4", "refine": "swaps"}, "refine='swaps'"),
    ],
)
def test_settings_that_blocks_cannot_have(config, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig.from_flat(**config)


def test_a_layer_that_blocks_do_not_fill(make_model, token_ids):
    model = make_model()
    with pytest.raises(ValueError, match=r"layers\.0\..* cannot be pruned: it is .*tiles of pattern 50%/7x7"):
        sparsify(model, SparsityConfig("magnitude", "50%/7x7"))
    report = sparsify(model, SparsityConfig("magnitude", "62.5%/64x16", skip_unsupported=True))
    assert {tuple(row.shape) for row in report.layers} == {(64, 32)}  # gate and up alone have 64 outputs
    assert all(row.density == 0.5 for row in report.layers)  # one of two blocks: the count is rounded down
    assert "is 32 x 32" in report.skipped["layers.0.self_attn.q_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "alps"])
def test_every_method_from_memory_and_disk_to_a_dense_model(make_model, token_ids, tmp_path, method):
    config = {"method": method, "pattern": "50%/4x4", "dataset": token_ids, "batch_size": 2}
    model = make_model()
    model.save_pretrained(tmp_path / "dense")
    sparsify(model, SparsityConfig.from_flat(**config))
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", SparsityConfig.from_flat(**config))
    for folder in ("memory", "disk"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        layers = sparse_modules(again)
        assert len(layers) == 14
        for layer in layers.values():
            assert 2 * layer.weight.numel() == layer.in_features * layer.out_features
            layer.pattern.verify(layer.to_dense_weight())
        torch.testing.assert_close(again(token_ids).logits, expected)
        torch.testing.assert_close(again.dequantize()(token_ids).logits, expected)


def test_each_matrix_of_a_stack_has_its_own_blocks():
    weight, pattern = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0)), Pattern("50%/4x3")
    weight[0] *= 100  # over all matrices at once it would keep every block
    mask = pattern.mask(weight.abs())
    stack = SparseExperts.from_dense(torch.nn.Parameter(weight), mask, pattern)
    assert stack.weight.shape == (3, 48)
    assert torch.equal(stack.to_dense_weight(), weight * mask)
    for matrix, kept in zip(weight, mask, strict=True):
        assert torch.equal(pattern.mask(matrix.abs()), kept)


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_model_of_blocks_saves_and_loads(make_model, token_ids, tmp_path, storage):
    model = make_model()
    report = sparsify(model, SparsityConfig(pattern="50%/16x8", dataset=token_ids, storage=storage))
    assert report.density == 0.5 and report.patterns == ["50%/16x8"]
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(str(module.pattern) == "50%/16x8" for module in sparse_modules(again).values())
    torch.testing.assert_close(again(token_ids).logits, expected)
    torch.testing.assert_close(again.dequantize()(token_ids).logits, expected)


def test_owl_and_blocks(make_model, token_ids):
    model = make_model()
    report = sparsify(model, SparsityConfig("wanda", "50%/4x4", dataset=token_ids, allocation="owl"))
    assert all(row.pattern.endswith("%/4x4") for row in report.layers)
    assert abs(report.density - 0.5) < 0.01
