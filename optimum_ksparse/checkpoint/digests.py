"""The fingerprint that ties results to weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..nn import SparseExperts, SparseLinear
from .modules import aligned


def fingerprint(model: nn.Module, digests: Mapping[nn.Module, list[str]] | None = None) -> str:
    """SHA-256 over all tensors of a model, in its order.

    Storage (packed or dense), shards, devices and the names of tensors do not change it; another value or dtype of
    any weight does.

    Args:
        digests: `tensor_digests` of modules whose tensors are not in memory any more.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    hashed: list[str] = []
    for module in tqdm(list(model.modules()), desc="Fingerprint", unit="module", delay=2, leave=False):
        of_module = digests[module] if digests is not None and module in digests else tensor_digests(module)
        # A head that is tied to the embeddings is stored once, and may be one tensor or two when it is loaded.
        hashed += [digest for digest in of_module if module is not head or digest not in hashed]
    return hashlib.sha256("".join(hashed).encode()).hexdigest()


@torch.no_grad()
def tensor_digests(module: nn.Module) -> list[str]:
    """SHA-256 of each tensor of the module itself, without those of its submodules."""
    with aligned(module):
        return [_digest(tensor) for tensor in _tensors(module)]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and saved buffers of the module itself; packed weights written out as the dense module holds them."""
    if isinstance(module, SparseLinear):
        yield from module.to_dense().state_dict().values()
        return
    if isinstance(module, SparseExperts):
        yield module.to_dense()
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
