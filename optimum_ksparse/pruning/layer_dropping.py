"""Dropping whole decoder blocks: those that change the hidden states least, by ShortGPT's Block Influence (Men et al.
2024, arXiv 2403.03853, equation 1), the mean over tokens of 1 − cos(X_i, X_{i+1}) of the states before and after
block i. What is left is an ordinary smaller model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import DecoderBlocks, find_blocks
from ..blocks.calls import split_call
from ..blocks.probe import hidden_of
from ..blocks.running import replaced_forward, run_decoder
from ..checkpoint import sparse_modules
from ..checks import check_integer
from .smaller_model import measured, plan_removal, refusal, remove_blocks

logger = logging.get_logger(__name__)


@torch.no_grad()
def drop_layers(
    model: PreTrainedModel,
    number: int,
    dataset: Any = "mc4-ko",
    tokenizer: Any = None,
    batch_size: int = 1,
    **calibration: Any,
) -> list[int]:
    """Takes the decoder blocks that change the hidden states least out of a dense model, in place; the last block with
    attention stays. Save the model, or prune it, as any other.

    Args:
        model: a decoder-only model whose blocks run one after another.
        number: blocks to drop.
        dataset, tokenizer, batch_size: as in `SparsityConfig`.
        calibration: `num_samples`, `seq_len`, `seed`, `prepend_bos`, as there.

    Returns:
        The numbers that the dropped blocks had, in order.

    Raises:
        TypeError, ValueError: blocks of the model cannot be dropped, or the data do not fit it; nothing is changed.
    """
    if sparse_modules(model):
        raise ValueError("the model is sparse already: drop blocks first, then prune what is left")
    blocks = find_blocks(model)
    total = len(blocks.blocks)
    if not 1 <= check_integer("number", number, 1) < total:
        raise ValueError(f"number={number} does not fit {type(model).__name__}, which has {total} decoder blocks")
    plan_removal(blocks, list(range(total - number)))
    check_integer("batch_size", batch_size, 1)
    scores = measured(model, dataset, tokenizer, calibration, lambda ids: block_influence(blocks, ids, batch_size))
    order = sorted(range(total), key=lambda index: (scores[index], index))
    # A hybrid cannot write text without attention: its cache counts the tokens there.
    has_attention = [any("Attention" in type(m).__name__ for m in block.modules()) for block in blocks.blocks]
    attention = [index for index in order if has_attention[index]]
    dropped = sorted([index for index in order if index not in attention[-1:]][:number])
    remove_blocks(blocks, dropped)
    words = ", ".join(f"{index} ({score:.4f})" for index, score in enumerate(scores))
    logger.warning(f"Dropped decoder blocks {', '.join(map(str, dropped))}; each block changes (1 - cosine): {words}.")
    return dropped


def block_influence(blocks: DecoderBlocks, ids: torch.Tensor, batch_size: int) -> list[float]:
    """Mean of 1 − cosine between the inputs and the outputs of each block, over all tokens of `ids` [samples, tokens].

    Raises:
        ValueError: hidden states are NaN or Inf, or the blocks do not run one after another, each once.
    """
    totals = [0.0] * len(blocks.blocks)
    calls: list[int] = []

    def watched(index: int) -> Callable[..., Any]:
        original = blocks.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_call(args, kwargs)[0].clone()  # a block may write into its input
            output = original(*args, **kwargs)
            calls.append(index)
            after = hidden_of(output).to(before.device)
            totals[index] += float((1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum())
            return output

        return forward

    with replaced_forward(blocks.blocks, watched):
        for batch in ids.split(batch_size):
            calls.clear()
            run_decoder(blocks.decoder, batch)
            if calls != list(range(len(totals))):
                raise refusal(blocks, "it does not run them one after another, each once")
    scores = torch.tensor(totals, dtype=torch.float64) / ids.numel()
    if not bool(scores.isfinite().all()):
        raise ValueError("hidden states hold NaN or Inf; load the model in float32 or bfloat16")
    return scores.tolist()
