"""The operator of layers that read the same input and run as one product (`nn.group`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .candidates import PackedWeight
from .dispatch import choose_fused
from .operators import compute, run_candidate, tokens_of


@torch.library.custom_op("ksparse::fused_linear", mutates_args=())
def fused_linear(
    x: torch.Tensor,
    values: list[torch.Tensor],
    bits: list[torch.Tensor],
    biases: list[torch.Tensor],
    in_features: int,
    pattern: str,
    kernel_name: str = "auto",
) -> torch.Tensor:
    """The outputs of several layers of one input, side by side: [..., sum of out]. One product, where the weights lie
    below each other in one tensor and that gives the bits that each layer alone does. There are no gradients.

    It takes the layers' own tensors, and looks where they lie when it runs: a compiled graph that held the joined
    tensor would go on with it after one of the layers got another weight, and CUDA graphs would copy it each time.

    Args:
        values, bits, biases: of each layer; biases of all or none.
        x, in_features, pattern, kernel_name: as in `linear`.
    """
    weights = [PackedWeight(own, mask, in_features, pattern) for own, mask in zip(values, bits, strict=True)]
    below = [below_each_other(tensors) for tensors in (values, bits, biases) if tensors]
    if all(one is not None for one in below):
        whole = PackedWeight(below[0], below[1], in_features, pattern)  # type: ignore[arg-type]
        y = compute_fused(x, whole, below[2] if biases else None, kernel_name, [mask.shape[0] for mask in bits])
        if y is not None:
            return y
    own_biases: list[torch.Tensor] | list[None] = biases or [None] * len(weights)
    alone = [compute(x, weight, bias, kernel_name) for weight, bias in zip(weights, own_biases, strict=True)]
    return torch.cat(alone, -1)


@fused_linear.register_fake
def _(
    x: torch.Tensor,
    values: list[torch.Tensor],
    bits: list[torch.Tensor],
    biases: list[torch.Tensor],
    in_features: int,
    pattern: str,
    kernel_name: str = "auto",
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(mask.shape[0] for mask in bits))


def compute_fused(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, kernel: str, parts: Sequence[int]
) -> torch.Tensor | None:
    """`compute` with a weight whose rows are those of several layers, `parts` of each; None where each layer alone
    would sum in another order, and so round in another way."""
    tokens = tokens_of(x, weight)
    candidate = choose_fused(weight, parts, tokens.shape[0], kernel) if tokens.shape[0] else None
    if candidate is None:
        return None
    return run_candidate(candidate, tokens, weight, bias).view(*x.shape[:-1], weight.out_features)


def below_each_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The contiguous tensor of which `tensors` are consecutive rows; None where they are not."""
    first, rows = tensors[0], sum(tensor.shape[0] for tensor in tensors)
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not same or tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
