"""SparseGPT's sweep over a block, in torch and as a kernel (in Triton's interpreter, or on a GPU where there is one),
against a slow loop over single weights in float64."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

from optimum_ksparse import Pattern
from optimum_ksparse.kernels.hardware import runs_kernels
from optimum_ksparse.pruners import sweep as plain

from ..conftest import thinned

GPU = runs_kernels(torch.device("cuda")) if torch.cuda.is_available() else False
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
FORMS = [pytest.param("torch"), pytest.param("kernel", marks=[needs_triton, *([pytest.mark.gpu] if GPU else [])])]
PATTERNS = ["2:4", "3:5", "2:8", "50%"]


def run(form, block, factor, pattern, mask):
    """The block, the mask and the errors after a sweep of copies, on the CPU."""
    device = torch.device("cuda" if form == "kernel" and GPU else "cpu")
    block, mask = block.clone().to(device), mask.clone().to(device)
    factor = factor.to(device) if device.type == "cuda" else factor
    if form == "kernel":
        from optimum_ksparse.pruners import sweep_kernel

        errors = sweep_kernel.sweep(block, factor, pattern, mask)
    else:
        errors = plain.sweep(block, factor, pattern, mask)
    return block.cpu(), mask.cpu(), errors.cpu()


def slow_sweep(block, factor, pattern, mask):
    """The same in float64, weight by weight."""
    block, factor, mask = block.double(), factor.double(), mask.clone()
    errors = torch.zeros_like(block)
    for row in range(block.shape[1]):
        for j in range(len(block)):
            if pattern.m is not None and j % pattern.m == 0:
                scores = [(abs(float(block[k, row])), k) for k in range(j, j + pattern.m)]
                for place, (_, k) in enumerate(sorted(scores)):
                    mask[k, row] = place >= pattern.m - pattern.n
            errors[j, row] = 0 if mask[j, row] else block[j, row]
            block[j + 1 :, row] -= factor[j, j + 1 :] * errors[j, row]
    return block, mask, errors


def make_block(columns, out, seed=0):
    """A block, a factor in the corner of a larger matrix, and a mask that keeps a half."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(columns, out, generator=generator)
    factor = torch.randn(columns + 3, columns + 5, generator=generator).mul_(0.2).triu_(1)
    return block, factor[:columns, :columns], torch.rand(columns, out, generator=generator) < 0.5


def assert_same(found, expected):
    (block, mask, errors), (slow_block, slow_mask, slow_errors) = found, expected
    assert torch.equal(mask, slow_mask)
    assert bool((errors[mask] == 0).all())
    scale = slow_block.abs().max()
    assert float((errors - slow_errors).abs().max() / scale) < 1e-6
    assert float(((block - slow_block) * mask).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", thinned(PATTERNS, ["3:5"]))
def test_sweep_equals_the_slow_one(form, pattern):
    pattern = Pattern(pattern)
    block, factor, mask = make_block(5 * (pattern.m or 7), 33)
    assert_same(run(form, block, factor, pattern, mask), slow_sweep(block, factor, pattern, mask))


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 128), ("50%", 128), ("20:40", 120), ("8:16", 48)])
def test_sweep_of_a_whole_block_in_torch(pattern, columns):
    block, factor, mask = make_block(columns, 9)
    factor, pattern = factor * 0.2, Pattern(pattern)
    assert_same(run("torch", block, factor, pattern, mask), slow_sweep(block, factor, pattern, mask))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["2:4", "3:5"])
def test_the_earlier_of_equal_scores_is_pruned(form, pattern):
    """Small whole numbers of both signs, and a factor that keeps them whole: nothing is rounded, most scores tie."""
    pattern = Pattern(pattern)
    block, factor, mask = make_block(2 * pattern.m, 35)
    block, factor = block.round(), (factor * 4).round().clamp(-1, 1) * (torch.rand(factor.shape) < 0.1)
    found, expected = run(form, block, factor, pattern, mask), slow_sweep(block, factor, pattern, mask)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2].float())


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_depend_on_each_other(form):
    block, factor, mask = make_block(16, 70)
    whole = run(form, block, factor, Pattern("2:4"), mask)
    part = run(form, block[:, 33:50].contiguous(), factor, Pattern("2:4"), mask[:, 33:50].contiguous())
    for a, b in zip(whole, part, strict=True):
        assert torch.allclose(a[:, 33:50].float(), b.float(), rtol=1e-5, atol=1e-6)


def test_two_prunings_at_once_leave_torch_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cpu = torch.device("cpu")
        inside, left = threading.Event(), threading.Event()

        def first():
            with plain.one_thread(cpu):
                inside.set()
                left.wait()

        def second():
            with plain.one_thread(cpu):
                left.set()
                one.join()

        one, two = threading.Thread(target=first), threading.Thread(target=second)
        one.start()
        inside.wait()
        two.start()
        two.join()
        assert torch.get_num_threads() == 2
        seen = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2], "and so has a thread that begins after them"
    finally:
        torch.set_num_threads(before)
