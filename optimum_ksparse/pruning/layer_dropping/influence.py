"""How much each block of the dense model changes the hidden states: ShortGPT's Block Influence (Men et al. 2024,
arXiv 2403.03853, equation 1), 1 − cos(X_i, X_{i+1}) of a token's hidden states before and after a block, averaged over
tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from ...blocks import BlockReplay, DecoderBlocks, always_there
from ...report import DroppedBlocks
from ..distributed import Processes
from ..loop import each_block


@torch.no_grad()
def measure_drop(
    blocks: DecoderBlocks,
    number: int,
    replay: BlockReplay,
    *,
    resident: Callable[[int], AbstractContextManager[None]] = always_there,
    processes: Processes | None = None,
) -> DroppedBlocks:
    """Measures the dense model and chooses the `number` blocks of the lowest influence, the earlier one among equals;
    but the last block with attention stays. The model stays as it is.

    Args:
        blocks, resident, processes: as in `prune_blocks`.
        replay: the calibration activations at the first block; used up.

    Raises:
        ValueError: hidden states are NaN or Inf; names the block.
        ConnectionError: another process has stopped.
    """
    processes = Processes() if processes is None else processes
    if not replay.in_line:
        raise ValueError(
            f"drop_layers: blocks of {type(blocks.model).__name__} cannot be dropped: it does not run them one after "
            "another, each once; leave drop_layers out"
        )
    tokens = sum(processes.gather(replay.tokens.numel()))

    def step(index: int, block: nn.Module) -> list[float]:
        parts: list[tuple[float, int]] = []
        replay.advance(index, block, lambda before, after: parts.append(_change(before, after)))
        everyone = [part for others in processes.gather(parts) for part in others]
        # An exact sum, so that it does not matter which process had which batch.
        score = math.fsum(total for total, _ in everyone) / sum(count for _, count in everyone)
        if not math.isfinite(score):
            name = blocks.name_in_decoder(index)
            raise ValueError(f"{name}: its hidden states hold NaN or Inf; load the model in float32 or bfloat16")
        return [score]

    scores = each_block(
        "Measuring what blocks change", blocks, step, resident=resident, tokens=tokens, show=processes.is_main
    )
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    attention = [index for index in order if _has_attention(blocks.blocks[index])]
    # A hybrid cannot write text without attention: its cache counts the tokens there.
    dropped = [index for index in order if index not in attention[-1:]][:number]
    return DroppedBlocks(sorted(dropped), scores, blocks.model.num_parameters())


def _has_attention(block: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in block.modules())


def _change(before: torch.Tensor, after: torch.Tensor) -> tuple[float, int]:
    """Sum over tokens of 1 − cosine between hidden states [..., hidden], in float32, and the number of tokens."""
    similar = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return float((1 - similar).sum(dtype=torch.float64)), similar.numel()
