"""Processes that prune one model together, over torch.distributed: `torchrun` or `accelerate launch` starts them.

Each runs its share of the calibration samples through the blocks; what they measured is added up, the layers of a
block are shared out, and each receives what the others pruned. All end with the same bytes; with another number of
processes sums are rounded otherwise.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..pruners.statistics import ColumnNorms

T = TypeVar("T")

# A process may prune its share of a large layer for longer than the half hour that others wait by default.
_TIMEOUT = datetime.timedelta(hours=6)
_GROUPS = itertools.count()


class Processes:
    """The processes of a group, seen from one of them.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def share(self, number: int) -> slice:
        """This process's part of `number` things, in order and as even as can be."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def owners(self, costs: list[float]) -> list[int]:
        """Shares work out: for each item the rank that does it. The dearest goes first, to the one with the least."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[item] = loads.index(min(loads))
            loads[owners[item]] += costs[item]
        return owners

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks. They are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _named_errors():
            dist.all_gather_object(values, value)
        return values

    def once(self, work: Callable[[], T], rank: int = 0) -> T:
        """Does the work in one process and gives its result, or its error, to all."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.rank == rank:
            try:
                answer[0] = work()
            except Exception as error:
                answer[1] = error
        with _named_errors():
            dist.broadcast_object_list(answer, src=rank)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def each(self, work: Callable[[], T]) -> T:
        """Does the work in every process; an error in one of them is raised in all."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        for failure in self.gather(error):
            if failure is not None:
                raise failure
        return result  # type: ignore[return-value]

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises ValueError in all processes where one of them was started with other settings; names them."""
        everyone = self.gather(settings)
        for rank, others in enumerate(everyone):
            for name, value in everyone[0].items():
                if others.get(name) != value:
                    raise ValueError(
                        f"the processes were started with different settings: {name} is {value!r} in rank 0 and "
                        f"{others.get(name)!r} in rank {rank}; start all of them with the same command"
                    )

    def broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        """Fills `tensor` with that of the process `rank`."""
        if self.size > 1:
            with _named_errors():
                dist.broadcast(tensor.view(torch.uint8), src=rank)  # no backend knows all dtypes

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Puts the mean over all processes into each tensor, which all have in the same shapes and order."""
        if self.size > 1:
            with _named_errors():
                for tensor in tensors:
                    dist.all_reduce(tensor)
                    tensor.div_(self.size)

    def add_up(self, statistics: dict[str, ColumnNorms], make: Callable[[str], ColumnNorms]) -> dict[str, ColumnNorms]:
        """Statistics over the samples of all processes.

        Args:
            statistics: this process's by layer, changed in place; layers fed by the same tensor share one object.
            make: empty statistics for a layer that no sample of this process reached.
        """
        if self.size == 1:
            return statistics
        everyone = self.gather({name: id(one) for name, one in statistics.items()})
        total: dict[str, ColumnNorms] = {}
        leaders: dict[tuple[int, int], str] = {}
        for rank, named in enumerate(everyone):
            for name, shared in named.items():
                if name in total:
                    continue
                leader = leaders.setdefault((rank, shared), name)
                if leader == name:
                    mine = statistics.get(name)
                    # One that is counted already under another rank's name for it is not counted twice.
                    part = make(name) if mine is None or any(mine is other for other in total.values()) else mine
                    self._add_up(part)
                    total[name] = part
                total[name] = total[leader]
        return total

    def _add_up(self, part: ColumnNorms) -> None:
        tokens = self.gather(part.num_tokens)
        part.averages.mul_(tokens[self.rank] / sum(tokens))
        with _named_errors():
            dist.all_reduce(part.averages)
        part.take(sum(tokens), torch.cat(self.gather(part.sample.cpu())).to(part.averages.device))


def current() -> Processes:
    """The processes of the group that has been initialised; this one alone where none has."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes that `torchrun` or `accelerate launch` started, and leaves them again; those of a group that
    is initialised already stay in it."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not launched or not dist.is_available() or dist.is_initialized():
        yield current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = _meeting_point()
    # Under a name of its own each time: what an earlier group wrote would mislead this one.
    store = dist.PrefixStore(f"optimum-ksparse/{next(_GROUPS)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield current()
    finally:
        # After an error too: the others, which wait for this process, then learn that it is gone.
        dist.destroy_process_group()


@functools.cache
def _meeting_point() -> tuple[dist.Store, int, int]:
    """The store over which the processes find each other, this one's rank, and their number."""
    meeting: tuple[dist.Store, int, int] = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    return meeting


# What the backends and the store say where a process has died, left, or does not answer.
_LOST = re.compile(r"peer|connect|socket|recv|broken pipe|timed? ?out|time ?limit|store|nccl", re.IGNORECASE)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise ConnectionError(
            f"another process that prunes with this one has stopped; its own message says why ({error})"
        ) from error
