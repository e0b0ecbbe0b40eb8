"""Running statistics of a layer's inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ksparse.pruners.statistics import SAMPLE_ROWS, ColumnNorms, GramMatrix
from optimum_ksparse.pruning import relative_output_error

KINDS = (ColumnNorms, GramMatrix)
quick = settings(max_examples=15)


def inputs(rows, columns=12, seed=0):
    """Inputs whose features have different scales and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixing * torch.logspace(-2, 2, columns)


def collected(kind, *updates, **settings):
    statistics = kind(updates[0].shape[-1], **settings)
    for update in updates:
        statistics.update(update)
    return statistics


def moments(statistics):
    return statistics.gram if isinstance(statistics, GramMatrix) else statistics.squared_norms


def assert_close_to_scale(found, expected, tolerance=1e-5):
    """Entry [i, j] is compared on the scale of features i and j: correlations cancel, so small entries are noisy."""
    scale = expected.diagonal().sqrt() if expected.dim() == 2 else None
    scale = expected if scale is None else scale.outer(scale)
    assert float(((found - expected) / scale).abs().max()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=6), st.integers(0, 100))
@quick
def test_any_split_gives_the_same(kind, rows, cuts, seed):
    x = inputs(rows, seed=seed)
    whole = collected(kind, x)
    split = collected(kind, *x.tensor_split(sorted(cuts)))
    assert split.num_tokens == whole.num_tokens == rows
    assert_close_to_scale(moments(split), moments(whole))
    assert torch.equal(split.sample, whole.sample)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 12), (4, 6, 12), (2, 2, 6, 12), (24, 1, 12)])
def test_leading_dimensions_do_not_matter(kind, shape):
    x = inputs(24)
    assert_close_to_scale(moments(collected(kind, x.view(shape))), moments(collected(kind, x)))
    assert torch.equal(collected(kind, x.view(shape)).sample, x)


def test_a_single_vector_is_one_token():
    statistics = collected(ColumnNorms, torch.tensor([1.0, 2.0, 3.0]))
    assert statistics.num_tokens == 1
    assert statistics.squared_norms.tolist() == pytest.approx([1, 4, 9])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_samples_give_bit_for_bit_the_same(kind):
    x = inputs(48).view(6, 8, 12)
    one_by_one, batched = collected(kind, *x), collected(kind, x[:4], x[4:])
    assert torch.equal(moments(one_by_one), moments(batched))
    assert torch.equal(one_by_one.sample, batched.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_match_float64(dtype):
    x = inputs(500).div(100).to(dtype)
    gram = x.double().T @ x.double() / 500
    norms, matrix = (collected(kind, *x.split(77)) for kind in KINDS)
    assert norms.squared_norms.dtype == matrix.gram.dtype == torch.float32
    assert_close_to_scale(matrix.gram, gram)
    assert_close_to_scale(norms.squared_norms, gram.diagonal())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [12, 640])
def test_moments_on_a_gpu_are_as_exact_for_16_bit_inputs(dtype, columns):
    x = torch.randn(1024, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = collected(GramMatrix, *x.cuda().split(300), device="cuda")
    assert_close_to_scale(statistics.gram.cpu(), x.double().T @ x.double() / 1024)
    large = torch.full((3, 8), 60000.0, dtype=dtype, device="cuda")
    assert bool(collected(GramMatrix, large, device="cuda").gram.isfinite().all())


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5))
@quick
def test_gram_diagonal_is_the_squared_norms(sizes):
    statistics = collected(GramMatrix, *(inputs(size, seed=size) for size in sizes))
    assert torch.equal(statistics.gram.diagonal(), statistics.squared_norms)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_update_changes_nothing(kind):
    x = inputs(20)
    with_empty = collected(kind, x[:0], x[:7], x[:0].view(0, 3, 12), x[:0].view(2, 0, 12), x[7:])
    without = collected(kind, x[:7], x[7:])
    assert with_empty.num_tokens == 20
    assert torch.equal(moments(with_empty), moments(without))
    assert torch.equal(with_empty.sample, without.sample)
    assert bool((moments(collected(kind, x[:0])) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=5).filter(any))
@quick
def test_merged_statistics_are_those_of_all_rows(kind, sizes):
    x = inputs(sum(sizes))
    merged = kind.merged([collected(kind, part) for part in x.split(sizes)])
    assert merged.num_tokens == len(x)
    assert_close_to_scale(moments(merged), moments(collected(kind, x)))
    if kind is GramMatrix:
        assert torch.equal(merged.squared_norms, merged.gram.diagonal())
    sample = merged.sample
    assert 0 < len(sample) <= SAMPLE_ROWS
    assert all(any(torch.equal(row, other) for other in x) for row in sample[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_changed_and_not_kept_alive(kind):
    x = inputs(8)
    before = x.clone()
    statistics = collected(kind, x)
    x.add_(1)
    assert torch.equal(statistics.sample, before)


def test_float16_squares_do_not_overflow():
    x = torch.full((3, 2), 60000.0, dtype=torch.float16)
    for kind in KINDS:
        assert collected(kind, x).squared_norms.tolist() == pytest.approx([float(x[0, 0]) ** 2] * 2)


@given(st.integers(1, 3000), st.lists(st.integers(0, 3000), max_size=8))
@quick
def test_sample_is_spread_evenly_over_all_updates(rows, cuts):
    x = torch.arange(rows, dtype=torch.float32).unsqueeze(1)
    statistics = collected(ColumnNorms, *x.tensor_split(sorted(cuts)), expected_tokens=rows)
    stride = -(-rows // SAMPLE_ROWS)
    sample = statistics.sample.flatten()
    assert len(sample) <= SAMPLE_ROWS
    assert sample.tolist() == list(range(stride // 2, rows, stride))


@pytest.mark.parametrize("expected", [None, 10, 600])
def test_sample_has_at_most_512_rows_where_more_come_than_expected(expected):
    x = torch.arange(4000.0).unsqueeze(1)
    sample = collected(ColumnNorms, *x.split(100), expected_tokens=expected).sample
    assert len(sample) == SAMPLE_ROWS
    assert bool((sample.diff(dim=0) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_keeps_the_dtype(dtype):
    assert collected(ColumnNorms, inputs(4).to(dtype)).sample.dtype == dtype


def test_an_unsampled_layer_has_no_output_error():
    norms = ColumnNorms(16, expected_tokens=262_144)
    norms.update(torch.randn(20, 16))
    assert norms.sample.shape == (0, 16)
    assert relative_output_error(norms.sample, torch.randn(4, 16), torch.zeros(4, 16)) is None
    assert ColumnNorms(16).sample.shape == (0, 16)
