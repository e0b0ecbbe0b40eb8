"""The pruning methods: against the published code's results, a slow reference, and what they promise."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from optimum_ksparse import Pattern, prune_weight
from optimum_ksparse.pruners import METHODS, sparsegpt
from optimum_ksparse.pruners.statistics import ColumnNorms, GramMatrix

CHOOSING = [name for name, method in METHODS.items() if method.recognise is None]  # which zeros to make
ORACLES = ("layer_48x128", "layer_64x384", "layer_96x256")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 128


@pytest.fixture(params=ORACLES)
def oracle(request, shared):
    """Weight, inputs and results of the published code."""
    return load_file(shared / f"oracles/{request.param}.safetensors")


@pytest.fixture
def layer():
    """Weight [24, 32] and correlated inputs [4, 50, 32] of different scales."""
    return make_layer(24, 32)


def make_layer(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4, 50, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=generator), x


def collect(kind, x):
    statistics = kind(x.shape[-1])
    statistics.update(x)
    return statistics


def relative_error(found, expected):
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def output_error(x, pruned, weight):
    return relative_error(x.flatten(0, -2) @ pruned.T, x.flatten(0, -2) @ weight.T)


class OneMoreInEachBlock(Pattern):
    """Zeros as the published SparseGPT counts them: its `scores <= threshold` takes the threshold too, which is one
    weight more in each block."""

    rows: int

    def num_zeros(self, count):
        return super().num_zeros(count) + count // (self.rows * BLOCK)


@pytest.mark.parametrize(("pattern", "name"), [("50%", "wanda_50"), ("2:4", "wanda_2of4"), ("4:8", "wanda_4of8")])
def test_wanda_equals_the_published_code(oracle, pattern, name):
    pruned, mask = prune_weight(oracle["weight"], oracle["inputs"], method="wanda", pattern=pattern)
    assert torch.equal(pruned, oracle[name])
    assert torch.equal(mask, oracle[name] != 0)


@pytest.mark.parametrize(("pattern", "name"), [("2:4", "sparsegpt_2of4"), ("4:8", "sparsegpt_4of8")])
def test_sparsegpt_groups_equal_the_published_code(oracle, pattern, name):
    pruned, mask = prune_weight(oracle["weight"], oracle["inputs"], method="sparsegpt", pattern=pattern)
    assert torch.equal(mask, oracle[name] != 0)
    assert relative_error(pruned, oracle[name]) < 1e-4


def test_sparsegpt_keeps_the_one_weight_of_the_first_block_that_the_published_code_prunes_beyond_half(oracle):
    _, mask = prune_weight(oracle["weight"], oracle["inputs"], method="sparsegpt", pattern="50%")
    published = oracle["sparsegpt_50"] != 0
    assert int((mask & ~published)[:, :BLOCK].sum()) == 1
    assert int((~mask & published)[:, :BLOCK].sum()) == 0


def test_sparsegpt_with_one_zero_more_in_each_block_equals_the_published_code(oracle):
    pattern = OneMoreInEachBlock("50%")
    pattern.rows = len(oracle["weight"])
    statistics = collect(GramMatrix, oracle["inputs"])
    pruned, mask = METHODS["sparsegpt"].prune(oracle["weight"], statistics, pattern)
    assert torch.equal(mask, oracle["sparsegpt_50"] != 0)
    assert relative_error(pruned, oracle["sparsegpt_50"]) < 1e-4


def slow_sparsegpt(weight, x, pattern, block_size, damping=0.01):
    """Optimal brain surgeon in float64, column by column: after each column its row and column are eliminated from
    the inverse Hessian, which leaves the inverse for the columns still to come."""
    weight, x = weight.double().clone(), x.flatten(0, -2).double()
    rows, columns = weight.shape
    hessian = x.T @ x / len(x)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(columns))
    inverses = []
    for j in range(columns):
        inverses.append(inverse[j].clone())
        inverse = inverse - inverse[:, j].outer(inverse[j]) / inverse[j, j]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    width = pattern.m or block_size
    for j in range(columns):
        if j % width == 0:
            chosen = range(j, min(j + width, columns))
            scores = torch.stack([weight[:, k] ** 2 / inverses[k][k] for k in chosen], dim=1)
            if pattern.m is None:
                order = scores.flatten().argsort(stable=True)
                mask[:, chosen] = (order.argsort() >= pattern.num_zeros(scores.numel())).view_as(scores)
            else:
                order = scores.argsort(dim=1, stable=True)
                mask[:, chosen] = order.argsort(dim=1) >= pattern.m - pattern.n
        error = weight[:, j] * ~mask[:, j] / inverses[j][j]
        weight[:, j:] -= error.outer(inverses[j][j:])
    return weight * mask, mask


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "50%", "75%"])
def test_sparsegpt_equals_brain_surgeon_by_elimination(pattern):
    weight, x = make_layer(6, 24, seed=1)
    for block_size in (8, 16, 64):
        pruned, mask = prune_weight(weight, x, method="sparsegpt", pattern=pattern, block_size=block_size)
        expected, expected_mask = slow_sparsegpt(weight, x, Pattern(pattern), block_size)
        assert torch.equal(mask, expected_mask)
        assert relative_error(pruned.double(), expected) < 1e-5


@pytest.mark.parametrize("method", CHOOSING)
def test_every_method_has_what_help_and_cards_say_of_it_and_its_density_is_exact(method):
    assert METHODS[method].summary and METHODS[method].citation.startswith("@misc{")
    weight, x = make_layer(7, 120)
    block_size = {"block_size": 40} if method == "sparsegpt" else {}
    for pattern in map(Pattern, ("2:4", "3:4", "4:8", "20:40", "50%", "29%", "1/3")):
        pruned, mask = prune_weight(weight, x, method=method, pattern=pattern, **block_size)
        assert mask.dtype == torch.bool
        assert bool((pruned[~mask] == 0).all())
        pattern.verify(pruned)
        if pattern.is_semi_structured:
            assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())
        elif METHODS[method].scope == "output row":
            assert bool(((~mask).sum(1) == pattern.num_zeros(120)).all())
        else:
            assert int((~mask).sum()) == int(7 * 120 * pattern.sparsity)


@pytest.mark.parametrize("rows", [1, 5])
def test_sparsegpt_is_exact_over_blocks_that_do_not_divide(rows):
    weight, x = make_layer(rows, 30)
    _, mask = prune_weight(weight, x, method="sparsegpt", pattern="29%", block_size=7)
    assert int((~mask).sum()) == int(0.29 * rows * 30)


@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_weight_is_not_changed_and_its_layout_does_not_matter(layer, method, pattern, dtype):
    weight, x = layer[0].to(dtype), layer[1]
    strided = weight.T.contiguous().T
    pruned, mask = prune_weight(strided, x, method=method, pattern=pattern)
    assert torch.equal(strided, weight)
    assert pruned.dtype == dtype
    assert pruned.untyped_storage().data_ptr() != strided.untyped_storage().data_ptr()
    expected, expected_mask = prune_weight(weight, x, method=method, pattern=pattern)
    assert torch.equal(pruned, expected)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_kept_weights_stay_bit_for_bit(layer, method):
    weight, x = layer
    pruned, mask = prune_weight(weight, x, method=method, pattern="2:4")
    assert torch.equal(pruned, torch.where(mask, weight, 0))


@pytest.mark.parametrize("method", CHOOSING)
def test_inputs_may_be_16_bit_and_require_gradients(layer, method):
    weight, x = (tensor.clone().requires_grad_() for tensor in layer)
    for dtype in DTYPES:
        pruned, mask = prune_weight(weight, x.to(dtype), method=method, pattern="2:4")
        expected, expected_mask = prune_weight(
            weight.detach(), x.detach().to(dtype).float(), method=method, pattern="2:4"
        )
        assert torch.equal(mask, expected_mask)
        assert torch.equal(pruned, expected)
        assert not pruned.requires_grad


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_sparsegpt_zeroes_dead_inputs_and_ignores_them_otherwise(layer, pattern):
    weight, x = layer
    dead = [1, 2, 31]
    x[..., dead] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned, _ = prune_weight(weight, x, method="sparsegpt", pattern=pattern)
    assert bool((pruned[:, dead] == 0).all())
    assert bool(pruned.isfinite().all())
    other = weight.clone()
    other[:, dead] *= 100
    assert torch.equal(prune_weight(other, x, method="sparsegpt", pattern=pattern)[0], pruned)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_sparsegpt_does_not_depend_on_the_scale_of_the_inputs(layer, scale):
    weight, x = layer
    x[..., :3] = 0
    pruned, mask = prune_weight(weight, x * scale, method="sparsegpt", pattern="50%")
    expected, expected_mask = prune_weight(weight, x, method="sparsegpt", pattern="50%")
    assert torch.equal(mask, expected_mask)
    assert relative_error(pruned, expected) < 1e-4


@pytest.mark.parametrize("columns", [1, 96, 600])
def test_the_factor_is_cholesky_of_the_inverse(columns):
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(0))
    (factor, scale), damping = sparsegpt._factorise(x.T @ x / len(x), 0.01)
    gram = x.double().T @ x.double() / len(x)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    found = (factor.double() + torch.eye(columns)) * scale.double().T
    assert damping == 0.01
    assert factor.dtype == scale.dtype == torch.float32
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("pattern", ["2:4", "20:40", "50%"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sparsegpt_refuses_weights_that_are_not_finite(pattern, value):
    weight, x = make_layer(8, 80)
    weight[3, 70] = value
    with pytest.raises(ValueError, match="NaN"):
        METHODS["sparsegpt"].prune(weight, collect(GramMatrix, x), Pattern(pattern), block_size=80)


def test_wanda_prunes_dead_inputs_first(layer):
    weight, x = layer
    x[..., ::2] = 0
    _, mask = prune_weight(weight, x, method="wanda", pattern="2:4")
    assert bool(mask[:, 1::2].all())


@pytest.mark.parametrize("method", CHOOSING)
def test_all_inputs_dead(layer, method):
    weight, x = layer
    pruned, mask = prune_weight(weight, torch.zeros_like(x), method=method, pattern="2:4")
    assert int(mask.sum()) == mask.numel() // 2
    assert bool(pruned.isfinite().all())


def test_duplicated_inputs_work_with_damping(layer):
    weight, x = layer
    x[..., 1::2] = x[..., ::2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned, mask = prune_weight(weight, x, method="sparsegpt", pattern="50%")
    assert bool(pruned.isfinite().all())
    assert output_error(x, pruned, weight) < output_error(x, weight * mask, weight)


def test_fewer_tokens_than_inputs_work_with_damping():
    weight, x = make_layer(8, 64)
    pruned, _ = prune_weight(weight, x[0, :5], method="sparsegpt", pattern="2:4")
    assert bool(pruned.isfinite().all())


def test_a_raised_damping_warns(layer):
    weight, x = layer
    x[..., 1::2] = x[..., ::2]
    with pytest.warns(UserWarning, match="singular Gram matrix: damping raised from 0 to 0.01"):
        raised, _ = prune_weight(weight, x, method="sparsegpt", pattern="2:4", damping=0.0)
    expected, _ = prune_weight(weight, x, method="sparsegpt", pattern="2:4", damping=0.01)
    assert torch.equal(raised, expected)


def test_a_gram_matrix_that_stays_singular_raises(layer):
    weight, x = layer
    statistics = collect(GramMatrix, x)
    statistics.gram[0, 1] = statistics.gram[1, 0] = 1e6
    with pytest.raises(ArithmeticError, match=r"Gram matrix \[32, 32\] stays singular with a damping of 1: use more"):
        METHODS["sparsegpt"].prune(weight, statistics, Pattern("2:4"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_whose_squares_overflow_are_refused(layer, method):
    weight, x = layer
    with pytest.raises((ValueError, ArithmeticError), match=r"overflow|Inf"):
        prune_weight(weight, x * 1e25, method=method, pattern="2:4")


def test_more_damping_updates_less(layer):
    weight, x = layer
    changes = []
    for damping in (0.001, 0.1, 1.0):
        pruned, mask = prune_weight(weight, x, method="sparsegpt", pattern="50%", damping=damping)
        changes.append(float(torch.linalg.norm(pruned - weight * mask)))
    assert changes == sorted(changes, reverse=True)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "75%"])
def test_output_error_falls_from_magnitude_to_alps(pattern):
    weight, x = make_layer(48, 64)
    methods = ("alps", "admm", "sparsegpt", "wanda", "magnitude")
    errors = [output_error(x, prune_weight(weight, x, method=name, pattern=pattern)[0], weight) for name in methods]
    assert errors == sorted(errors)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_layers_that_share_statistics_are_pruned_as_with_their_own(layer, method, pattern):
    first, x = layer
    prune, kind = METHODS[method].prune, METHODS[method].statistics
    shared = collect(kind, x)
    for weight in (first, first.flip(0) ** 3, first):
        found, found_mask = prune(weight, shared, Pattern(pattern))
        expected, expected_mask = prune(weight, collect(kind, x), Pattern(pattern))
        assert torch.equal(found, expected)
        assert torch.equal(found_mask, expected_mask)


def test_shared_statistics_follow_new_inputs_and_another_damping(layer):
    weight, x = layer
    prune = METHODS["sparsegpt"].prune
    shared = collect(GramMatrix, x[:2])
    prune(weight, shared, Pattern("2:4"))
    shared.update(x[2:])
    for damping in (0.01, 0.5):
        found, _ = prune(weight, shared, Pattern("2:4"), damping=damping)
        expected, _ = prune(weight, collect(GramMatrix, x), Pattern("2:4"), damping=damping)
        assert relative_error(found, expected) < 1e-5


def test_wanda_reads_the_diagonal_of_a_gram_matrix_too(layer):
    weight, x = layer
    _, mask = METHODS["wanda"].prune(weight, collect(GramMatrix, x), Pattern("2:4"))
    _, expected = METHODS["wanda"].prune(weight, collect(ColumnNorms, x), Pattern("2:4"))
    assert torch.equal(mask, expected)


def test_magnitude_ranks_over_the_whole_layer():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0]])
    pruned, mask = prune_weight(weight, None, method="magnitude", pattern="50%")
    assert mask.tolist() == [[False] * 4, [True] * 4]
    assert torch.equal(pruned, weight * mask)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_in_samples_or_as_one_matrix(layer, method):
    weight, x = layer
    pruned, mask = prune_weight(weight, x, method=method, pattern="2:4")
    flat, flat_mask = prune_weight(weight, x.flatten(0, 1), method=method, pattern="2:4")
    assert torch.equal(mask, flat_mask)
    assert relative_error(flat, pruned) < 1e-5


@pytest.mark.parametrize("block_size", [3, 96])
def test_prune_weight_checks_the_block_size_it_was_given(block_size):
    weight, x = make_layer(4, 96)
    _, mask = prune_weight(weight, x, method="sparsegpt", pattern="1:3", block_size=block_size)
    assert int(mask.sum()) == 4 * 32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "wandb"}, ValueError, "method='wandb'.*magnitude, wanda, sparsegpt"),
        ({"method": None}, TypeError, "method"),
        ({"pattern": "4:2"}, ValueError, "pattern='4:2'"),
        ({"dampng": 0.1}, ValueError, "'dampng': did you mean 'damping'"),
        ({"method": "wanda", "damping": 0.1}, ValueError, "damping=0.1 is read with method='sparsegpt'"),
        ({"block_size": 6}, ValueError, "block_size=6 is not a multiple of m=4"),
        ({"block_size": -4}, ValueError, "block_size=-4"),
        ({"damping": float("nan")}, ValueError, "damping=nan"),
        ({"damping": "1"}, TypeError, "damping"),
        ({"weight": torch.ones(24, 30)}, ValueError, "30 input features, which m=4"),
        ({"weight": torch.ones(24, 2, 16)}, ValueError, r"weight must be floating point \[out, in\]"),
        ({"weight": torch.ones(24, 32, dtype=torch.int8)}, ValueError, "weight must be floating point"),
        ({"weight": torch.full((24, 32), torch.inf)}, ValueError, "weight holds NaN or Inf"),
        ({"inputs": None}, ValueError, r"inputs must be \[tokens, 32\] or \[samples, tokens, 32\], found None"),
        ({"inputs": torch.ones(9, 31)}, ValueError, r"inputs.*found \[9, 31\]"),
        ({"inputs": torch.ones(0, 32)}, ValueError, r"inputs.*found \[0, 32\]"),
        ({"inputs": torch.full((9, 32), torch.nan)}, ValueError, "inputs hold NaN or Inf"),
    ],
)
def test_prune_weight_refuses(layer, change, error, message):
    arguments = {"weight": layer[0], "inputs": layer[1], "method": "sparsegpt", "pattern": "2:4", **change}
    with pytest.raises(error, match=message):
        prune_weight(**arguments)
