"""How long calls take on a device, without what launching them costs, and random packed weights to call with."""

from __future__ import annotations

import functools
import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..packing import pack
from ..pattern import Pattern
from ..quantization import GROUP_SIZES, columns_of_group, groups_of_row, pack_integers
from .candidates import PackedWeight, Problem

_REPEATS = 11
# Seconds of a round on a processor, whose scheduler spoils shorter ones; and of all rounds of a slow call.
_ROUND, _ROUNDS = 0.01, 0.5
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SAMPLE_ROWS = 256  # that are drawn; others repeat them
_LARGE_CACHE = 64 << 20  # where a CPU does not tell the size of its caches


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = _REPEATS) -> float:
    """Microseconds of one call: the median over `repeats` rounds, which on a CPU are fewer where a call is slow.

    On a GPU a round is one CUDA graph of all calls, as it is in a decoder that runs under graphs; on a CPU some 10 ms
    of calls, each the next one in turn. Give calls that read different memory where one alone would stay in the cache.

    Raises:
        RuntimeError: a call fails, or cannot be captured.
    """
    return _time_graph(calls, device, repeats) if device.type == "cuda" else _time_wall(calls, repeats)


def rotations(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` it takes to be sure that a round finds none of them in the cache."""
    if device.type == "cuda":
        cache, most = torch.cuda.get_device_properties(device).L2_cache_size, 64  # that one graph holds
    else:
        cache, most = _last_level_cache(), 256
    return max(2, min(most, -(-2 * cache // max(1, nbytes)) + 1))


@functools.cache
def _last_level_cache() -> int:
    """Bytes of the largest cache of this machine's CPU."""
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in _CACHES.glob("index*/size")]
    return max((int(size[1]) << {"K": 10, "M": 20}[size[2]] for size in sizes if size), default=_LARGE_CACHE)


def _time_graph(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time.
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compiles kernels, makes the handles of libraries
                call()
            torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
            graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
        return statistics.median(times) * 1000 / len(calls)


def _time_wall(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    turns = itertools.cycle(calls)

    def round_of(times: int) -> float:
        started = time.perf_counter()
        for call in itertools.islice(turns, times):
            call()
        return (time.perf_counter() - started) / times

    seconds = round_of(1)
    if seconds < _ROUNDS:
        seconds = max(1e-9, round_of(1))
        times = max(1, int(_ROUND / seconds))
        repeats = max(3, min(repeats, int(_ROUNDS / (times * seconds))))
        seconds = statistics.median(round_of(times) for _ in range(repeats))
    return seconds * 1e6


def sample_weights(problem: Problem, copies: int) -> list[PackedWeight]:
    """Random weights of a problem's shape, pattern, dtype and type of values; `copies` that lie apart in memory."""
    rows, columns, pattern = problem.out_features, problem.in_features, Pattern(problem.pattern)
    repeats = 1 if rows % _SAMPLE_ROWS or _SAMPLE_ROWS % (pattern.tile or (1, 1))[0] else rows // _SAMPLE_ROWS
    generator = torch.Generator(problem.device).manual_seed(0)
    drawn = torch.randn(rows // repeats, columns, device=problem.device, generator=generator)
    values, bits = pack(drawn.to(problem.dtype), pattern.mask(drawn.abs()), pattern)
    values = values.repeat(repeats, 1) if values.dim() == 2 else values.repeat(repeats)
    first = PackedWeight(values, bits.repeat(repeats, 1), columns, problem.pattern)
    if problem.value_type is not None:
        size = columns_of_group(GROUP_SIZES[problem.value_type], columns)
        integers = (values * 3).round().clamp(-7, 7).to(torch.int8)
        scale = torch.ones(rows, groups_of_row(size, columns), dtype=problem.dtype, device=problem.device)
        values = pack_integers(integers, problem.value_type)
        first = first._replace(values=values, scale=scale, group_size=size)
    return [first, *(first._replace(values=first.values.clone(), bits=first.bits.clone()) for _ in range(copies - 1))]
