"""`method="auto"`: every method tried on one block of the dense model, and the best of those that fit the time taken.

The block is the middle one, its inputs and targets the dense model's. Each method prunes it with the statistics of
seven eighths of the calibration samples; how well the block then does on the last eighth, which no method has seen,
decides (the loss is that of reconstruction). How long a method took there says how long the whole model would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .calibration import BlockReplay, DecoderBlocks, ExpertStack
from .checkpoint import aligned
from .config import SparsityConfig
from .distributed import Processes
from .nn import dense_weight
from .pattern import Pattern
from .pruning import Replaced, always_resident, prune_one_block
from .reconstruction import OutputLoss, held_out
from .report import MethodChoice, Trial
from .targets import Layer

# In the order in which they are tried, the cheap ones first: a method, and what follows.
CANDIDATES: tuple[tuple[str, str | None], ...] = (
    ("wanda", None),
    ("sparsegpt", None),
    ("admm", None),
    ("admm", "block"),
    ("alps", None),
    ("alps", "block"),
)


@torch.no_grad()
def choose_method(
    blocks: DecoderBlocks,
    targets: list[dict[str, Layer]],
    config: SparsityConfig,
    replay: BlockReplay,
    *,
    resident: Callable[[int], AbstractContextManager[None]] = always_resident,
    processes: Processes | None = None,
) -> MethodChoice:
    """Tries the methods and chooses one; the model is left as it was.

    Args:
        blocks, targets, config, resident, processes: as in `prune_blocks`; the targets stay as they are.
        replay: the calibration activations at the first block; used up.

    Raises:
        ValueError: no method fits `time_budget`; says the least that is possible.
        ConnectionError: another process has stopped.
    """
    started = time.perf_counter()
    processes = Processes() if processes is None else processes
    middle = len(blocks.blocks) // 2
    for index in range(middle):
        with resident(index):
            replay.advance(index, blocks.blocks[index])
    with resident(middle):
        share = _size(targets[middle]) / sum(map(_size, targets))
        trials = _try_all(blocks, middle, targets[middle], config, replay, processes, share, started)
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        least = min(trials, key=lambda trial: trial.seconds)
        raise ValueError(
            f"time_budget={config.time_budget} is too short for any method: the least that is possible is about "
            f"{least.seconds:.0f} seconds ({least.name}), the trial included"
        )
    best = min(fitting, key=lambda trial: trial.loss)
    return MethodChoice(best.method, best.reconstruct, middle, config.time_budget, trials)


def _try_all(
    blocks: DecoderBlocks,
    index: int,
    targets: dict[str, Layer],
    config: SparsityConfig,
    replay: BlockReplay,
    processes: Processes,
    share: float,
    started: float,
) -> list[Trial]:
    block, number = blocks.blocks[index], len(replay.hidden)
    judged = held_out(number)
    seen = [batch for batch in range(number) if batch not in judged] or judged
    parts = {name: replay.part(batches, name) for name, batches in {"seen": seen, "judged": judged}.items()}
    dense = {name: part.fork(f"{name}-dense") for name, part in parts.items()}
    for path in dense.values():
        path.advance(index, block)
    trials: list[Trial] = []
    for method, reconstruct in _candidates(config):
        # One that takes longer than another which does not fit already is not tried.
        if any(not trial.fits and trial.method in (method, "wanda") for trial in trials):
            continue
        own, replaced, began = config.as_chosen(method, reconstruct), Replaced(), time.perf_counter()
        try:
            targets_of_block = dense["seen"].hidden if reconstruct else None
            prune_one_block(blocks, index, targets, own, parts["seen"], targets_of_block, replaced, processes)
            took = time.perf_counter() - began
            loss = OutputLoss(index, block, parts["judged"], dense["judged"].hidden, processes)
            error = loss.mean(range(len(judged)))
        finally:
            replaced.restore(blocks.decoder)
        spent = time.perf_counter() - started
        # All of the samples instead of those seen; the slowest process counts.
        expected = max(processes.gather(took)) / share * number / len(seen) + max(processes.gather(spent))
        fits = config.time_budget is None or expected <= config.time_budget
        trials.append(Trial(method, reconstruct, error, round(expected, 2), fits))
    return trials


def _candidates(config: SparsityConfig) -> list[tuple[str, str | None]]:
    """Those that go with the other settings."""
    width = Pattern(config.pattern).width
    found = dict.fromkeys((method, config.reconstruct or reconstruct) for method, reconstruct in CANDIDATES)
    return [pair for pair in found if pair[0] != "sparsegpt" or config.block_size % width == 0]


def _size(layers: dict[str, Layer]) -> int:
    """Weights to prune in a block."""
    total = 0
    for layer in layers.values():
        with aligned(layer.owner if isinstance(layer, ExpertStack) else layer):
            weight = layer.weight if isinstance(layer, ExpertStack) else dense_weight(layer)
            total += weight.numel()
    return total
