"""`method="auto"`: every method tried on one block of the dense model, and the best of those that fit the time taken.

The block is the one in the middle that has layers to prune, its inputs and targets the dense model's. Each method
prunes it with the statistics of seven eighths of the calibration samples; how well the block then does on the last
eighth, which no method has seen, decides (the loss is that of reconstruction). How long a method took there says how
long the whole model would take.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from ..blocks import BlockReplay
from ..config import SparsityConfig
from ..pattern import Pattern
from ..report import MethodChoice, Trial
from .block import prune_one_block
from .job import Job, Replaced
from .loop import check_replay
from .loss import OutputLoss, held_out
from .targets import Layer, weight_of

# In the order in which they are tried, the cheap ones first: a method, and what follows.
CANDIDATES: tuple[tuple[str, str | None], ...] = (
    ("wanda", None),
    ("sparsegpt", None),
    ("admm", None),
    ("admm", "block"),
    ("alps", None),
    ("alps", "block"),
)
# At most about so many times as long as the method alone takes a block that is reconstructed as well.
_SLOWER = 10


@torch.no_grad()
def choose_method(job: Job, replay: BlockReplay) -> MethodChoice:
    """Tries the methods and chooses one; the model is left as it was.

    Args:
        job: its targets stay as they are.
        replay: the calibration activations at the first block; used up.

    Raises:
        ValueError: no method fits `time_budget`; says the least that is possible. Or there is a single batch of
            samples, so that none can be held out.
        ArithmeticError: no method could prune the block; says why.
        ConnectionError: another process has stopped.
    """
    began = time.perf_counter()
    blocks, config, processes = job.blocks, job.config, job.processes
    check_replay(job, replay)
    if min(processes.gather(len(set(replay.batches)))) < 2:
        raise ValueError(
            "method='auto' compares methods on calibration samples that none of them has seen, and there is a single "
            f"batch of them in a process (num_samples={config.num_samples}): use more, or name a method"
        )
    middle = len(blocks.blocks) // 2
    tried = min((i for i, layers in enumerate(job.targets) if layers), key=lambda index: abs(index - middle))
    for index in range(tried):
        with job.place.resident(index):
            replay.advance(index, blocks.blocks[index])
    with job.place.resident(tried):
        trials = _Trials(job, tried, replay, began)()
    budget = config.method_setting("time_budget")
    spent = processes.once(lambda: time.perf_counter() - began)
    for trial in trials:
        trial.seconds = round(trial.seconds + spent, 2)
        trial.fits = trial.loss is not None and (budget is None or trial.seconds <= budget)
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        raise ArithmeticError(f"no method could prune block {tried}: {'; '.join(trial.note for trial in trials)}")
    fitting = [trial for trial in done if trial.fits]
    least = min(done, key=lambda trial: trial.seconds)
    if not fitting and len(done) == 1:  # with more, a trial took longer than expected: what is fastest must do
        raise ValueError(
            f"time_budget={budget} is too short for any method: the least that is possible is about "
            f"{least.seconds:.0f} s ({least.name}), the trial included"
        )
    best = min(fitting, key=lambda trial: float(trial.loss or 0)) if fitting else least
    return MethodChoice(best.method, best.reconstruct, tried, budget, trials)


class _Trials:
    """Prunes a resident block by one method after another, puts it back each time, and tells what came of it.

    The seconds of a trial are those that the method would take for the whole model, without the trials: what pruning
    the block took, times the share of the weights in it and of the samples seen, and for each block the forward passes
    that bring the activations on. The first process decides, so that all do the same.
    """

    def __init__(self, job: Job, index: int, replay: BlockReplay, began: float) -> None:
        self.job, self.index, self.began = job, index, began
        self.config, self.processes, self.block = job.config, job.processes, job.blocks.blocks[index]
        number = len(replay.hidden)
        judged = held_out(replay.batches)
        seen = [batch for batch in range(number) if batch not in judged] or judged
        self.parts = {name: replay.part(batches, name) for name, batches in {"seen": seen, "judged": judged}.items()}
        self.dense = {name: part.fork(f"{name}-dense") for name, part in self.parts.items()}
        began = _now(replay.hidden.device)
        for path in self.dense.values():
            path.advance(index, self.block)
        self.one_pass = _now(replay.hidden.device) - began
        self.scale = number / len(seen) * sum(map(_size, job.targets)) / _size(job.targets[index])

    def __call__(self) -> list[Trial]:
        trials: list[Trial] = []
        for method, reconstruct in _candidates(self.config):
            if self.processes.once(lambda name=method, more=reconstruct: self._is_affordable(name, more, trials)):  # type: ignore[misc]
                trials.append(self._try(method, reconstruct))
        return trials

    def _is_affordable(self, method: str, reconstruct: str | None, trials: list[Trial]) -> bool:
        """Whether the budget allows to try a method, and then still to prune with the fastest of those before."""
        budget = self.config.method_setting("time_budget")
        costs = [trial.seconds for trial in trials if trial.loss is not None]
        if budget is None or not costs:
            return True
        before = [trial for trial in trials if trial.method == method]
        # The order of the candidates is that of their times.
        expected = (before[-1].seconds if before else max(costs)) / self.scale * (_SLOWER if reconstruct else 1)
        return time.perf_counter() - self.began + expected + min(costs) <= budget

    def _try(self, method: str, reconstruct: str | None) -> Trial:
        device = self.parts["seen"].hidden.device
        replaced, began = Replaced(), _now(device)
        job = replace(self.job, config=self.config.changed(method=method, reconstruct=reconstruct), replaced=replaced)
        loss, note = None, ""
        try:
            outputs = self.dense["seen"].hidden if reconstruct else None
            prune_one_block(job, self.index, self.parts["seen"], outputs)
            took = _now(device) - began
            judged, targets = self.parts["judged"], self.dense["judged"].hidden
            loss = OutputLoss(self.index, self.block, judged, targets, self.processes).mean(range(len(targets)))
            if not math.isfinite(loss):
                loss, note = None, "its outputs overflow"
        except (ArithmeticError, ValueError, torch.linalg.LinAlgError, torch.OutOfMemoryError, MemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) and self.processes.size > 1:
                raise  # the others do not know of it
            took, note = _now(device) - began, str(error) or type(error).__name__
        finally:
            replaced.restore(job.blocks.decoder)
        passes = (1 if reconstruct is None else 2) * len(job.blocks.blocks) * self.one_pass
        slowest = max(self.processes.gather(took * self.scale + passes))
        return Trial(method, reconstruct, loss, slowest, False, note)


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _candidates(config: SparsityConfig) -> list[tuple[str, str | None]]:
    """Those that go with the other settings."""
    candidates = dict.fromkeys((method, config.reconstruct or reconstruct) for method, reconstruct in CANDIDATES)
    fits = config.method_setting("block_size") % Pattern(config.pattern).width == 0
    return [(method, reconstruct) for method, reconstruct in candidates if method != "sparsegpt" or fits]


def _size(layers: dict[str, Layer]) -> int:
    """Weights to prune in a block."""
    return sum(weight_of(layer).numel() for layer in layers.values())
