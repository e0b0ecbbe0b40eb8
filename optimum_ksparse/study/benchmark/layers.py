"""One product at a time: each kernel beside dense `F.linear`, in one run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ... import kernels
from ...runtime.tuning import MOST_MEMORY


def bench_layers(problem: kernels.Problem) -> list[dict[str, Any]]:
    """Rows for a product, one for each kernel that can compute it, each in its fastest configuration.

    | key | meaning |
    |---|---|
    | shape, tokens, dtype, pattern, dense_bytes | the product: W is [out, in] and takes so many bytes dense |
    | kernel, config | what computes it |
    | dense_us, sparse_us, speedup | median microseconds of `F.linear` with a dense weight, of the kernel; the ratio |
    | mode | "memory", or "speed" for a form of the weight that takes more than memory mode allows |
    | chosen | what the dispatch takes in memory mode, after `autotune_kernels` |
    | speed_us | what speed mode takes, which may keep a dense weight |

    All are timed on random weights. On a GPU that is under CUDA graphs, with copies enough that the cache holds none
    of them; on a CPU with one copy, so that small weights may stay in its cache, for the dense one too. Empty where
    not even the dense weight fits.
    """
    found = dict(kernels.measure(problem)) if kernels.has_kernels(problem) else _without_kernels(problem)
    dense = found.pop("dense", None)
    if dense is None:
        return []
    modes = {name: _mode(name, problem) for name in found}
    best = min((name for name in found if modes[name] == "memory"), key=lambda name: found[name][1], default=None)
    fastest = min(microseconds for _, microseconds in (dense, *found.values()))
    return [
        {
            "shape": [problem.out_features, problem.in_features],
            "tokens": problem.tokens,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "pattern": problem.pattern,
            "kernel": name,
            "config": candidate.config,
            "dense_us": round(dense[1], 3),
            "sparse_us": round(microseconds, 3),
            "speedup": round(dense[1] / microseconds, 4),
            "dense_bytes": problem.dense_bytes,
            "mode": modes[name],
            "chosen": name == best,
            "speed_us": round(fastest, 3),
        }
        for name, (candidate, microseconds) in found.items()
    ]


def _mode(kernel: str, problem: kernels.Problem) -> str:
    """The first mode in which a layer may compute in this way."""
    return "speed" if kernel == "library" and not _library_shares(replace(problem, tokens=1)) else "memory"


@functools.cache
def _library_shares(problem: kernels.Problem) -> bool:
    """Whether the library's form can stand for the packed values: memory mode keeps no other one (see `tuning`)."""
    (weight,) = kernels.sample_weights(problem, 1)
    form = kernels.library_form(weight.values, weight.bits, weight.in_features)
    small = form.nbytes + weight.bits.nbytes <= MOST_MEMORY * problem.dense_bytes
    return small and kernels.shared_values(form, weight.values) is not None


def _without_kernels(problem: kernels.Problem) -> dict[str, tuple[kernels.Candidate, float]]:
    """Where there are no kernels: decompressing in each pass, beside a dense weight."""
    weights = kernels.sample_weights(problem, kernels.rotations(problem.dense_bytes // 2, problem.device))
    generator = torch.Generator(problem.device).manual_seed(0)
    x = torch.randn(problem.tokens, problem.in_features, device=problem.device, generator=generator).to(problem.dtype)
    found = {}
    with torch.no_grad():
        for name in ("dense", "reference"):
            candidate = kernels.Candidate(name)
            own = [weight.with_form("dense") if name == "dense" else weight for weight in weights]
            found[name] = candidate, kernels.time_calls(list(_calls(candidate, x, own)), problem.device)
    return found


def _calls(candidate: kernels.Candidate, x: torch.Tensor, weights: list[kernels.PackedWeight]) -> Iterator[Any]:
    for weight in weights:
        yield lambda weight=weight: candidate.run(x, weight, None)
