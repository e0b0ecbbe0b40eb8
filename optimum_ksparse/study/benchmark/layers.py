"""One product at a time: each kernel beside dense `F.linear`, in one run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from ... import kernels
from ...runtime.tuning import MOST_MEMORY

_MOST_TOKENS = 16  # of a dense product in bfloat16 on a CPU that has no instructions for it


def bench_layers(problem: kernels.Problem) -> list[dict[str, Any]]:
    """Rows for a product, one for each kernel that can compute it, each in its fastest configuration.

    | key | meaning |
    |---|---|
    | shape, tokens, dtype, pattern | the product; W is [out, in] |
    | values | the type of quantised values, int8 or int4; None of those in the dtype |
    | dense_bytes, packed_bytes | of W |
    | kernel, config | what computes it |
    | rivals_us | median microseconds of `F.linear` with a dense weight, by dtype: the own; on a CPU float32 \
and bfloat16, the latter without instructions for it up to 16 tokens: more take up to 500 times as long; of one token \
the faster one of oneDNN, which torch takes, and torch's own product |
    | dense_us, sparse_us, speedup | the fastest rival, the kernel; the ratio |
    | chosen | what the dispatch takes, after `autotune_kernels` |

    All are timed on random weights, with copies enough that the cache holds none of them; on a GPU under CUDA graphs.
    Empty where not even the dense weight fits.
    """
    has_kernels = kernels.has_kernels(problem)
    timed = dict(kernels.measure(problem) if has_kernels else kernels.time_kernels(problem))
    dense = timed.pop(kernels.DENSE, None)
    rivals = _rivals(problem) if not has_kernels else {} if dense is None else {_name(problem.dtype): dense[1]}
    if not rivals:
        return []
    dense_us = min(rivals.values())
    if "library" in timed and not _library_shares(replace(problem, tokens=1)):
        del timed["library"]  # no layer keeps it
    best = min(timed, key=lambda name: timed[name][1], default=None)
    return [
        {
            "shape": [problem.out_features, problem.in_features],
            "tokens": problem.tokens,
            "dtype": _name(problem.dtype),
            "pattern": problem.pattern,
            "values": problem.value_type,
            "kernel": name,
            "config": candidate.config,
            "rivals_us": rivals,
            "dense_us": dense_us,
            "sparse_us": round(microseconds, 3),
            "speedup": round(dense_us / microseconds, 4),
            "dense_bytes": problem.dense_bytes,
            "packed_bytes": problem.packed_bytes,
            "chosen": name == best,
        }
        for name, (candidate, microseconds) in timed.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rivals(problem: kernels.Problem) -> dict[str, float]:
    """Microseconds of the dense product where there are no kernels, by dtype."""
    dtypes = [problem.dtype]
    if problem.device.type == "cpu":
        is_slow = kernels.product_dtype(torch.bfloat16, problem.device) != torch.bfloat16
        dtypes = [torch.float32] if is_slow and problem.tokens > _MOST_TOKENS else [torch.float32, torch.bfloat16]
    times = {_name(dtype): _time_dense(replace(problem, pattern="", dtype=dtype, value_type=None)) for dtype in dtypes}
    return {name: round(microseconds, 3) for name, microseconds in times.items() if microseconds is not None}


@functools.cache
def _time_dense(problem: kernels.Problem) -> float | None:
    times = [kernels.time_dense(problem)]
    if problem.device.type == "cpu" and problem.tokens == 1:
        with torch.backends.mkldnn.flags(enabled=False):
            times.append(kernels.time_dense(problem))
    return min((time for time in times if time is not None), default=None)


@functools.cache
def _library_shares(problem: kernels.Problem) -> bool:
    """Whether the library's form can stand for the packed values: no other one is kept (see `tuning`)."""
    (weight,) = kernels.sample_weights(problem, 1)
    form = kernels.library_form(weight.values, weight.bits, weight.in_features)
    small = form.nbytes + weight.bits.nbytes <= MOST_MEMORY * problem.dense_bytes
    return small and kernels.shared_values(form, weight.values) is not None
