"""One product at a time: each kernel beside dense `F.linear`, in one run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from ... import kernels
from ...runtime.tuning import MOST_MEMORY


def bench_layers(problem: kernels.Problem) -> list[dict[str, Any]]:
    """Rows for a product, one for each kernel that can compute it, each in its fastest configuration.

    | key | meaning |
    |---|---|
    | shape, tokens, dtype, pattern, dense_bytes | the product: W is [out, in] and takes so many bytes dense |
    | kernel, config | what computes it |
    | dense_us, sparse_us, speedup | median microseconds of `F.linear` with a dense weight, of the kernel; the ratio |
    | chosen | what the dispatch takes, after `autotune_kernels` |

    All are timed on random weights. On a GPU that is under CUDA graphs, with copies enough that the cache holds none
    of them; on a CPU with one copy, so that small weights may stay in its cache, for the dense one too. Empty where
    not even the dense weight fits.
    """
    measure = kernels.measure if kernels.has_kernels(problem) else kernels.time_kernels
    timed = dict(measure(problem))
    dense = timed.pop(kernels.DENSE, None)
    if dense is None:
        return []
    if "library" in timed and not _library_shares(replace(problem, tokens=1)):
        del timed["library"]  # no layer keeps it
    best = min(timed, key=lambda name: timed[name][1], default=None)
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
        }
        for name, (candidate, microseconds) in timed.items()
    ]


@functools.cache
def _library_shares(problem: kernels.Problem) -> bool:
    """Whether the library's form can stand for the packed values: no other one is kept (see `tuning`)."""
    (weight,) = kernels.sample_weights(problem, 1)
    form = kernels.library_form(weight.values, weight.bits, weight.in_features)
    small = form.nbytes + weight.bits.nbytes <= MOST_MEMORY * problem.dense_bytes
    return small and kernels.shared_values(form, weight.values) is not None
