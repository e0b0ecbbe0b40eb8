"""Memory of this process and of its GPU."""

from __future__ import annotations

import ctypes
import sys

import torch


def memory_in_use() -> tuple[int, int]:
    """Bytes in use now, and at most so far: of the GPU where this process uses one, otherwise of the process."""
    peak = peak_memory()
    if "gpu" in peak:
        return torch.cuda.memory_allocated(), peak["gpu"]
    return process_status().get("VmRSS", 0), peak.get("process", 0)


def process_status() -> dict[str, int]:
    """Memory figures of this process in bytes, as Linux names them; empty elsewhere. (`ru_maxrss` is no substitute for
    VmHWM: it is inherited over exec.)"""
    try:
        with open("/proc/self/status") as status:
            lines = [line.split() for line in status if line.startswith("Vm")]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process where the system tells, and of its GPU where one was used."""
    status = process_status()
    peak = {"process": status["VmHWM"]} if "VmHWM" in status else {}
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def trim_heap() -> None:
    """Gives freed memory back to the system. glibc keeps what lies between pieces in use, more with each layer."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
