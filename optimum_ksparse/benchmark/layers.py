"""One product at a time: each kernel beside dense `F.linear`, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..nn import kernels

# Candidates that read packed weights, or share their values: those of memory mode.
_MEMORY = ("gemv", "dot", "decompress", "library", "reference")


def bench_layers(problem: kernels.Problem) -> list[dict[str, Any]]:
    """Rows for a product, one for each kernel that can compute it, each in its fastest configuration.

    | key | meaning |
    |---|---|
    | shape, tokens, dtype, pattern, dense_bytes | the product: W is [out, in] and takes so many bytes dense |
    | kernel, config | what computes it |
    | dense_us, sparse_us, speedup | median microseconds of `F.linear` with a dense weight, of the kernel; the ratio |
    | chosen | what the dispatch takes in memory mode |
    | speed_us | what speed mode takes, which may keep a dense weight |

    All are timed on random weights, with copies enough that the cache holds none of them, on a GPU under CUDA graphs:
    see `kernels.measure`. Empty where not even the dense weight fits.
    """
    found = dict(kernels.measure(problem)) if kernels.has_kernels(problem) else _without_kernels(problem)
    dense = found.pop("dense", None)
    rows = {name: row for name, row in found.items() if name in _MEMORY}
    if dense is None or not rows:
        return []
    best = min(rows, key=lambda name: rows[name][1])
    fastest = min(rows[best][1], dense[1])
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
            "chosen": name == best,
            "speed_us": round(fastest, 3),
        }
        for name, (candidate, microseconds) in rows.items()
    ]


def _without_kernels(problem: kernels.Problem) -> dict[str, tuple[kernels.Candidate, float]]:
    """Where there are no kernels: decompressing in each pass, beside a dense weight."""
    weights = kernels.sample_weights(problem, 1)
    x = torch.randn(problem.tokens, problem.in_features, device=problem.device, dtype=problem.dtype)
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
