"""Dropping whole experts: those that add least to the output of their layer, by REAP's saliency (Lasby et al. 2025,
arXiv 2510.13999, equation 9), the mean of g_j(x)·‖f_j(x)‖ over the tokens x that the router gives to expert j, where
g_j is its weight and f_j its output. What is left is an ordinary smaller mixture of experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import DecoderBlocks, eager_experts, find_blocks
from ..blocks.experts import BATCHED
from ..blocks.running import replaced_forward, run_decoder
from ..checkpoint import sparse_modules
from ..checks import check_integer, check_share
from .smaller_experts import MoELayer, Removal, plan_removal, refusal, remove_experts
from .smaller_model import measured

logger = logging.get_logger(__name__)


@torch.no_grad()
def drop_experts(
    model: PreTrainedModel,
    share: float,
    dataset: Any = "mc4-ko",
    tokenizer: Any = None,
    batch_size: int = 1,
    **calibration: Any,
) -> dict[str, list[int]]:
    """Takes the experts that add least to the output of their layer out of a dense mixture of experts, in place.
    Shared experts stay. Save the model, or prune it, as any other.

    Args:
        model: a decoder-only model with routed experts.
        share: of the experts of each layer to drop, such as 0.25; rounded down to whole experts, and where the router
            divides them into groups to as many from each group.
        dataset, tokenizer, batch_size: as in `SparsityConfig`.
        calibration: `num_samples`, `seq_len`, `seed`, `prepend_bos`, as there.

    Returns:
        For each layer, by the path of its experts in the model, the numbers that the dropped ones had, in order.

    Raises:
        TypeError, ValueError: experts of the model cannot be dropped, too few would stay for the router, or the data
            do not fit it; nothing is changed.
    """
    if sparse_modules(model):
        raise ValueError("the model is sparse already: drop experts first, then prune what is left")
    check_share("share", share)
    check_integer("batch_size", batch_size, 1)
    blocks = find_blocks(model)
    removal = plan_removal(blocks, share)
    for layer in removal.layers:
        _reader(model, layer)
    scores = measured(
        model,
        dataset,
        tokenizer,
        calibration,
        lambda ids: expert_saliency(blocks, removal.layers, ids, batch_size).tolist(),
    )
    kept = {layer.path: _best(own, removal) for layer, own in zip(removal.layers, scores, strict=True)}
    dropped = {layer.path: sorted({*range(layer.number)} - {*kept[layer.path]}) for layer in removal.layers}
    remove_experts(model, removal, kept)
    gone = sum(own[index] for own, indices in zip(scores, dropped.values(), strict=True) for index in indices)
    number = removal.layers[0].number
    logger.warning(
        f"Dropped {number - removal.kept} of {number} experts in each of {len(removal.layers)} layers, with "
        f"{100 * gone / max(sum(map(sum, scores)), 1e-30):.1f} % of their saliency."
    )
    return dropped


def _best(scores: list[float], removal: Removal) -> list[int]:
    """Numbers of the experts to keep, as many of each group, in order."""
    size = len(scores) // removal.groups
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    each = removal.kept // removal.groups
    return sorted(index for group in groups for index in sorted(group, key=lambda i: (-scores[i], i))[:each])


def expert_saliency(blocks: DecoderBlocks, layers: list[MoELayer], ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Mean norm of what each expert adds to a token that is routed to it, over `ids` [samples, tokens]; 0 for one that
    no token reached. float64 [layers, experts].

    Raises:
        ValueError: a norm is NaN or Inf, or no token reached a layer; names it.
    """
    model = blocks.model
    totals = torch.zeros(2, len(layers), layers[0].number, dtype=torch.float64)

    def adder(number: int) -> Callable[[int, torch.Tensor], None]:
        def add(expert: int, parts: torch.Tensor) -> None:
            totals[0, number, expert] += float(parts.float().norm(dim=-1).double().sum())
            totals[1, number, expert] += len(parts)

        return add

    with ExitStack() as stack:
        stack.enter_context(eager_experts(model))
        for number, layer in enumerate(layers):
            stack.enter_context(_reader(model, layer)(model, layer, adder(number)))
        for batch in ids.split(batch_size):
            run_decoder(blocks.decoder, batch)
    for layer, (own, tokens) in zip(layers, totals.unbind(1), strict=True):
        if not bool(own.isfinite().all()):
            raise ValueError(f"{layer.path}: outputs hold NaN or Inf; load the model in float32 or bfloat16")
        if not bool(tokens.any()):
            raise ValueError(f"{layer.path}: no calibration token reached it, so that none of its experts is better")
    return totals[0] / totals[1].clamp(min=1)


def _reader(model: PreTrainedModel, layer: MoELayer) -> Callable[..., Any]:
    """What observes the experts of a layer. Raises ValueError for those of a kind of which it is not known what each
    adds."""
    experts: Any = model.get_submodule(layer.path)
    if isinstance(experts, nn.ModuleList):
        return _listed
    parameters = len(inspect.signature(type(experts).forward).parameters) - 1
    # By the marks of transformers, whose implementations of experts all take these arguments.
    if parameters == 3 and (hasattr(experts, "is_transposed") or type(experts).__name__ == "Step3p7Experts"):
        return _routed
    if type(experts).__name__ in BATCHED:
        return _all_at_once
    raise refusal(model, f"{layer.path} is a {type(experts).__name__}, of which it is not known what each adds")


def _routed(model: PreTrainedModel, layer: MoELayer, add: Callable[[int, torch.Tensor], None]) -> Any:
    """Experts in one module, called with hidden states [tokens, hidden], numbers of experts [tokens, k], and their
    weights [tokens, k]."""
    experts = model.get_submodule(layer.path)
    original = experts.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, index, weights = inspect.signature(original).bind(*args, **kwargs).args
        if index.shape != weights.shape:
            raise refusal(model, f"{layer.path} takes weights {list(weights.shape)} for experts {list(index.shape)}")
        output = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            rows, places = torch.where(index == expert)
            parts = original(hidden[rows], index[rows, places, None], weights[rows, places, None])
            add(expert, parts)
            output.index_add_(0, rows, parts.to(output.dtype))
        return output

    return replaced_forward([experts], lambda _: forward)


def _all_at_once(model: PreTrainedModel, layer: MoELayer, add: Callable[[int, torch.Tensor], None]) -> Any:
    """Experts of Llama 4: each is given all tokens, [experts · tokens, hidden], times its weight, which is 0 for the
    tokens of others."""
    experts = model.get_submodule(layer.path)
    original = experts.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = original(hidden)
        rows, parts = (x.view(layer.number, -1, x.shape[-1]) for x in (hidden, output))
        for expert in range(layer.number):
            add(expert, parts[expert][rows[expert].any(-1)])
        return output

    return replaced_forward([experts], lambda _: forward)


def _listed(model: PreTrainedModel, layer: MoELayer, add: Callable[[int, torch.Tensor], None]) -> Any:
    """Experts in a list. Their weight is applied outside of them: it is the derivative of the holder's output with
    respect to theirs."""
    holder: Any = model.get_submodule(layer.holder)
    listed: Any = model.get_submodule(layer.path)
    experts, original = list(listed), holder.forward
    called: list[tuple[int, torch.Tensor]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.clear()
        with torch.enable_grad():
            output = original(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            leaves = [leaf for _, leaf in called]
            slopes = torch.autograd.grad(hidden.sum(), leaves) if leaves else ()
        for (expert, leaf), slope in zip(called, slopes, strict=True):
            parts = (leaf.detach() * slope).flatten(0, -2)
            add(expert, parts[slope.flatten(0, -2).any(-1)])
        called.clear()
        return output

    def watched(index: int) -> Callable[..., Any]:
        inner = experts[index].forward

        def expert_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                leaf: torch.Tensor = inner(*args, **kwargs).detach()
            if leaf.numel():  # an expert may be called without tokens
                called.append((index, leaf.requires_grad_()))
            return leaf.clone()  # a leaf cannot be multiplied in place

        return expert_forward

    stack = ExitStack()
    stack.enter_context(replaced_forward(experts, watched))
    stack.enter_context(replaced_forward([holder], lambda _: forward))
    return stack
