"""Which machines run the kernels, said in a sentence."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..version import library_versions
from .cpu import unit_name, why_not_native

_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 6)


def why_no_kernels(device: torch.device) -> str | None:
    """Why sparse layers on `device` have no kernels and decompress in each forward pass; None where they have."""
    if device.type != "cuda":
        return None if is_interpreted() else f"the kernels need an NVIDIA GPU, and the layer is on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is an AMD GPU"
    return _why_not(device.index if device.index is not None else torch.cuda.current_device())


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; of another device the least that there are kernels for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _LEAST_CAPABILITY


def runs_kernels(device: torch.device) -> bool:
    """Whether sparse layers on `device` choose among kernels. In the interpreter only what is forced runs there."""
    return device.type == "cuda" and why_no_kernels(device) is None


def describe_device(device: torch.device) -> str:
    """What sparse layers do on `device`, in a sentence."""
    if device.type == "cpu":
        reason = why_not_native()
        if reason is None:
            return f"packed layers of every pattern run on their packed weights, by native code for {unit_name()}"
    else:
        reason = why_no_kernels(device)
        if reason is None:
            major, minor = torch.cuda.get_device_capability(device)
            name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
            return f"2:4 and 4:8 layers in bfloat16 and float16 run on their packed weights ({name})"
    return (
        f"sparse layers compute the same here but not faster, because each forward pass decompresses them: {reason}; "
        "model.dequantize() makes them dense"
    )


def on_device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """A context in which kernels are launched where `tensor` is: Triton, unlike torch, takes the current device."""
    return torch.cuda.device(tensor.get_device())  # -1, which changes nothing, on the CPU


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, for tests (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@functools.cache
def _why_not(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        needed, present = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, capability))
        name = torch.cuda.get_device_name(index)
        return f"the kernels need compute capability {needed} (Ampere) or higher, {name} has {present}"
    version = library_versions("triton").get("triton")
    if version is None:
        return "the kernels need Triton, which is not installed: pip install triton"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < _LEAST_TRITON:
        return f"the kernels need Triton {'.'.join(map(str, _LEAST_TRITON))} or newer, found {version}"
    return None
