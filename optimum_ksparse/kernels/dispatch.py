"""Which kernel computes a product: by the speeds that `measure` found on this kind of GPU for its shape, number of
tokens and dtype, now or in an earlier process; where there are none, by a rule of thumb. No forward pass measures."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers.utils import logging

from ..checks import check_one_of
from .cache import Timings, read_timings, write_timings
from .candidates import KERNELS, Candidate, Config, PackedWeight, Problem, has_kernels
from .library import library_form
from .timing import rotations, sample_weights, time_calls

logger = logging.get_logger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KERNEL_VARIABLE = "KSPARSE_KERNEL"
DENSE = "dense"  # what is measured beside the kernels: `F.linear` with a dense weight
# A configuration that is not the first must be so much faster: noise must not choose.
_MARGIN = 0.98

_lock = threading.RLock()  # of the two
_timings: dict[str, Timings] = {}  # by GPU, then by problem
_choices: dict[tuple[object, ...], Candidate] = {}


def bucket(tokens: int) -> int:
    """The number of tokens that stands for `tokens`: the next power of two, up to 4096."""
    return min(1 << max(0, tokens - 1).bit_length(), BUCKETS[-1])


def choose(weight: PackedWeight, tokens: int, kernel: str = "auto") -> Candidate:
    """The candidate for a product with `tokens` tokens: of `kernel`, of the one that the environment variable
    `KSPARSE_KERNEL` names, or the fastest one.

    Raises:
        ValueError: the forced kernel is unknown or cannot take the product; says why.
    """
    kernel = os.environ.get(KERNEL_VARIABLE) or kernel
    if kernel != "auto":
        return _forced(check_one_of("kernel", kernel, ("auto", *KERNELS)), weight, weight.problem(tokens))
    values, bits, in_features, pattern = weight[:4]
    # Of tuples, and looked up without the lock: every forward pass of every layer comes here.
    shape = bits.shape[0], in_features, bucket(tokens)
    key = *shape, pattern, weight.dtype, values.device, weight.value_type, weight.has_library
    candidate = _choices.get(key)
    if candidate is None:
        with _lock:
            candidate = _choices[key] = _fastest(Problem(*key[:7]), weight.has_library)
    return candidate


def prepare(weight: PackedWeight) -> None:
    """Makes what the kernels of a weight keep in memory, where the weight now is: later might be while a CUDA graph is
    captured, in memory that goes with it."""
    if weight.pattern == "4:8" and has_kernels(weight.problem(1)) and torch._C._len_torch_dispatch_stack() == 0:
        from .triton.permute import selector_table

        selector_table(weight.values.device)


def rule_of_thumb(problem: Problem) -> Candidate:
    """What to take where nothing was measured."""
    order = ("gemv",) if problem.tokens <= 2 else ("dot",) if problem.tokens <= 64 else ()
    names = (*order, "decompress", "reference")  # the last one takes anything
    name = next(name for name in names if KERNELS[name].why_not(problem) is None)
    return Candidate(name, KERNELS[name].configs(problem)[0])


def measured(problem: Problem) -> dict[str, tuple[Candidate, float]]:
    """What is known of a problem: for each kernel, and `DENSE`, its fastest candidate and the microseconds that it
    takes."""
    with _lock:
        rows = _known(problem.device).get(str(problem), {})
    return {
        name: (Candidate(name, row["config"]), float(row["us"]))
        for name, row in rows.items()
        if name in (DENSE, *KERNELS) and row["config"] in _configs(name, problem)
    }


def measure(problem: Problem) -> dict[str, tuple[Candidate, float]]:
    """`time_kernels`, and `time_dense` as `DENSE`, remembered in memory and on disk."""
    results, dense = time_kernels(problem), time_dense(problem)
    if dense is not None:
        results[DENSE] = Candidate(DENSE), dense
    rows = {name: {"config": c.config, "us": round(us, 3)} for name, (c, us) in results.items()}
    with _lock:
        _known(problem.device)[str(problem)] = rows
        _choices.clear()
    if rows:
        write_timings(problem.device, {str(problem): rows})
    else:
        logger.warning(f"No kernel could be measured for {problem}, for want of memory most likely.")
    return results


def time_kernels(problem: Problem) -> dict[str, tuple[Candidate, float]]:
    """Times the candidates for a problem on random weights, with copies of the weight that the cache cannot hold; on a
    GPU under CUDA graphs. The fastest candidate of each kernel, and its microseconds; those that fail (too little
    memory) are left out."""
    results: dict[str, tuple[Candidate, float]] = {}
    with _plain(problem.device):
        for candidate, microseconds in _time_candidates(problem):
            best = results.get(candidate.kernel)
            if best is None or microseconds < _MARGIN * best[1]:
                results[candidate.kernel] = candidate, microseconds
    return results


def time_dense(problem: Problem) -> float | None:
    """Microseconds of `F.linear` with a dense weight of a problem's shape and dtype, timed as in `time_kernels`; None
    where it does not fit into memory."""
    with _plain(problem.device):
        try:
            x = _sample_input(problem)
            drawn = torch.empty(problem.out_features, problem.in_features, dtype=problem.dtype, device=x.device)
            drawn.copy_(x[:1])  # what the values are does not matter
            weights = [drawn.clone() for _ in range(rotations(problem.dense_bytes, x.device))]
            return time_calls([functools.partial(F.linear, x, weight, None) for weight in weights], x.device)
        except Exception as error:
            logger.debug(f"The dense product was left out for {problem}: {error}")
            return None


def forget() -> None:
    """Forgets what this process knows of speeds; what is on disk stays."""
    with _lock:
        _timings.clear()
        _choices.clear()


def _known(device: torch.device) -> Timings:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name not in _timings:
        _timings[name] = read_timings(device)
    return _timings[name]


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Without autograd and autocast, whatever the caller is in."""
    with torch.no_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _configs(name: str, problem: Problem) -> list[Config]:
    return [{}] if name == DENSE else KERNELS[name].configs(problem)


def _fastest(problem: Problem, has_library: bool) -> Candidate:
    if not has_kernels(problem):
        return Candidate("reference" if _is_last_resort(problem) else "native")
    unusable = (DENSE,) if has_library else (DENSE, "library")
    rows = [row for name, row in measured(problem).items() if name not in unusable]
    return min(rows, key=lambda row: row[1])[0] if rows else rule_of_thumb(problem)


def _forced(kernel: str, weight: PackedWeight, problem: Problem) -> Candidate:
    reason = KERNELS[kernel].why_not(problem)
    if reason is None and kernel == "library" and not weight.has_library:
        reason = "the layer does not keep the library's form; model.autotune_kernels() keeps it where it pays"
    if reason is not None:
        raise ValueError(f"kernel={kernel!r} cannot compute {problem}: {reason}")
    if problem.device.type == "cuda":
        rounded = weight.problem(bucket(problem.tokens))
        fastest = measured(rounded).get(kernel) if KERNELS[kernel].why_not(rounded) is None else None
        if fastest is not None:
            return fastest[0]
    return Candidate(kernel, KERNELS[kernel].configs(problem)[0])


def _time_candidates(problem: Problem) -> Iterator[tuple[Candidate, float]]:
    device = problem.device
    try:
        x, weights = _sample_input(problem), sample_weights(problem, rotations(problem.packed_bytes, device))
    except torch.OutOfMemoryError:
        return
    for name, kernel in KERNELS.items():
        if kernel.why_not(problem) is not None or not _may_be_fastest(name, problem):
            continue
        try:
            forms = [_library(weight) for weight in weights] if name == "library" else weights
            for config in kernel.configs(problem):
                candidate = Candidate(name, config)
                try:
                    yield candidate, time_calls([_call(candidate, x, weight) for weight in forms], device)
                except Exception as error:  # Triton raises many kinds, as for too large a tile
                    logger.debug(f"{candidate} was left out for {problem}: {error}")
        except RuntimeError as error:
            logger.debug(f"{name} was left out for {problem}: {error}")


def _sample_input(problem: Problem) -> torch.Tensor:
    # A generator of its own: what a model samples must not depend on what was measured.
    generator = torch.Generator(problem.device).manual_seed(0)
    x = torch.randn(problem.tokens, problem.in_features, device=problem.device, generator=generator)
    return x.to(problem.dtype)


def _is_last_resort(problem: Problem) -> bool:
    """Whether nothing but `reference` takes a problem by itself."""
    return not has_kernels(problem) and KERNELS["native"].why_not(problem) is not None


def _may_be_fastest(name: str, problem: Problem) -> bool:
    """`reference` decompresses in plain PyTorch; on a GPU nothing else does of quantised values with many tokens."""
    is_only = problem.value_type is not None and has_kernels(problem)
    return name != "reference" or is_only or _is_last_resort(problem)


def _call(candidate: Candidate, x: torch.Tensor, weight: PackedWeight) -> Callable[[], torch.Tensor]:
    """What a layer calls: one that runs natively keeps its weight as native code takes it."""
    if candidate.kernel == "native":
        return functools.partial(weight.native().linear, x, None)
    return functools.partial(candidate.run, x, weight, None)


def _library(weight: PackedWeight) -> PackedWeight:
    return weight._replace(library=library_form(weight.values, weight.bits, weight.in_features))
