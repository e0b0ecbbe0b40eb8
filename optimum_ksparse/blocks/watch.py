"""Looking at the inputs of layers while batches run through their block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from .experts import ExpertMatrix, observed_matrices

Layer = nn.Module | ExpertMatrix


class _StopForward(Exception):  # noqa: N818 (not an error)
    """Raised by a hook that has seen what it needed."""


class Watch:
    """Looks at the inputs of `layers` of a block while batches run through it.

    Args:
        run: runs a batch through the block.
        counted: the rows of an input that count, of the batch of that number.
        leaders: is filled: layer name → the name under which its inputs are counted, that of the first layer which the
            tensor feeds.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, Layer],
        run: Callable[[int], None],
        counted: Callable[[int, torch.Tensor], torch.Tensor],
        leaders: dict[str, str],
    ) -> None:
        self._run, self._counted, self.leaders = run, counted, leaders
        self._matrices = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertMatrix)}
        self._modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
        # Accelerate puts weights away after a forward pass, which must then not be cut short.
        self._may_stop = not any(parameter.is_meta for parameter in block.parameters())
        self._expected = 0  # calls of all layers in a batch, where it may end with the last of them

    def run(self, batch: int, update: Callable[[str, torch.Tensor], None]) -> None:
        """Runs a batch, and calls `update(leader, x)` once for each tensor that feeds layers."""
        leaders = self.leaders
        calls: Counter[str] = Counter()
        seen: dict[Any, str] = {}
        alive: list[torch.Tensor] = []  # no address is used twice while its tensor lives

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0]
                if not x.numel():  # an expert that is called without tokens
                    return
                calls[name] += 1
                key = identity(x)
                if key not in seen:
                    seen[key] = leaders.get(name, name)
                    alive.append(x)
                    update(seen[key], x if name in self._matrices else self._counted(batch, x))
                leaders.setdefault(name, seen[key])
                if calls.total() == self._expected:
                    raise _StopForward

            return hook

        observed = observed_matrices(self._matrices, record) if self._matrices else nullcontext()
        with _hooks(self._modules, record), observed, suppress(_StopForward):
            self._run(batch)
        # Routed experts are called for some batches and not for others: then nothing can be cut short.
        number = len(self._matrices) + len(self._modules)
        self._expected = calls.total() if self._may_stop and len(leaders) == number == len(calls) else 0


def identity(x: torch.Tensor) -> tuple[Any, ...]:
    """What tells an input of a layer from all others that are alive."""
    return x.data_ptr(), x.shape, x.stride(), x._version


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(make(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
