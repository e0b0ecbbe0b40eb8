"""What a model passes to its blocks beside the hidden states, for each block and batch; equal tensors once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache


@dataclass
class Call:
    """Arguments of one call of a block beside the hidden states, which are the first one, or the one of
    `hidden_name`."""

    args: list[Any]
    kwargs: dict[str, Any]
    hidden_name: str | None

    def run(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        """What the block returns. It is given copies of the tensors and caches, so that what it writes into them does
        not reach its next run, nor other calls that share them."""
        args = [_copied(value) for value in self.args]
        kwargs = {name: _copied(value) for name, value in self.kwargs.items()}
        if self.hidden_name is None:
            return block(hidden.clone(), *args, **kwargs)
        return block(*args, **{self.hidden_name: hidden.clone()}, **kwargs)

    def pooled(self, pool: Pool) -> Call:
        """The same call with tensors of the pool in the place of equal ones."""
        return Call(pool.share(self.args), pool.share(self.kwargs), self.hidden_name)

    def has_state(self) -> bool:
        """Whether this call, which no block has had yet, holds what blocks write into and later ones read from: keys
        and values that they share. `Pool` gives each call a dict of its own that was filled before."""
        mappings = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, MutableMapping)]
        return any(type(value) is not dict or not value for value in mappings)

    def with_own_states(self, copies: dict[int, Any]) -> Call:
        """The same call with copies of its states. `copies` has the copy of each by the id of the original: calls that
        share a state share its copy."""

        def copied(value: Any) -> Any:
            return copies.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping) else value

        kwargs = {name: copied(value) for name, value in self.kwargs.items()}
        return Call([copied(value) for value in self.args], kwargs, self.hidden_name)


@dataclass
class Pool:
    """Keeps one copy of equal tensors: most blocks and batches get the same mask and the same position embeddings."""

    tensors: dict[Any, list[torch.Tensor]] = field(default_factory=dict)
    limit: int = 4

    def share(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            alike = self.tensors.setdefault((value.shape, value.dtype, value.device), [])
            for tensor in alike:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            if len(alike) < self.limit:
                alike.append(value)
            return value
        if type(value) in (list, tuple):
            return type(value)(self.share(item) for item in value)
        if isinstance(value, Cache):
            return copy.deepcopy(value)
        if type(value) is dict and value:  # an empty one is there to be filled by the blocks
            return {key: self.share(item) for key, item in value.items()}
        return value


def _copied(value: Any) -> Any:
    """A copy of tensors and caches. Dicts stay: blocks write into some of them what later ones read."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value) if isinstance(value, Cache) else value


def split_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, Call]:
    """The hidden states that a block is called with, and everything else."""
    values, named = list(args), dict(kwargs)
    name = None if values else _hidden_name(named)
    hidden = values.pop(0) if name is None else named.pop(name)
    return hidden, Call(values, named, name)


def _hidden_name(kwargs: dict[str, Any]) -> str:
    """The keyword of the hidden states [batch, seq_len, hidden]: the one of that name, or the first that looks like
    them."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3:
            return name
    raise TypeError(f"a block is called without hidden states, with {', '.join(kwargs) or 'nothing'}")
