"""The fingerprint that ties results to weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..checkpoint import aligned
from ..nn import SparseLinear


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over all tensors of a model.

    Storage (packed or dense), shards, devices and the names of tensors do not change it; another value or dtype of
    any weight does.
    """
    modules = list(model.modules())
    digests: set[str] = set()  # tied weights count once
    for module in tqdm(modules, desc="Fingerprint", unit="module", delay=2, leave=False):
        with aligned(module):
            digests.update(_digest(tensor) for tensor in _tensors(module))
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and saved buffers of the module itself; a packed weight written out."""
    if isinstance(module, SparseLinear):
        yield module.to_dense_weight()
        if module.bias is not None:
            yield module.bias
        return
    yield from module.parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield buffer


def _digest(tensor: torch.Tensor) -> str:
    # Adding 0 makes −0 into +0: a dense checkpoint does not tell a kept −0 from a pruned weight.
    values = (tensor.detach() + 0).cpu().contiguous()
    hashed = hashlib.sha256(f"{values.dtype} {list(values.shape)}:".encode())
    hashed.update(values.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
