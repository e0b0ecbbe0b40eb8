"""Running calibration tokens through one decoder block at a time.

What the model passes to each block besides the hidden states (masks, position embeddings, sliding windows, ALiBi) is
recorded as the model itself computes it, for each block and batch, while the blocks are replaced by stand-ins that
hand the hidden states on. It is then replayed as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..pruners.statistics import ColumnNorms
from .activations import Activations
from .calls import Call, Pool, split_call
from .find import DecoderBlocks
from .probe import hidden_of, probe
from .running import device_of, products, replaced_forward, run_decoder
from .watch import Layer, Watch


def _always_there(index: int) -> AbstractContextManager[None]:
    """The blocks of a model that is in memory are."""
    return nullcontext()


class BlockReplay:
    """The calibration activations on their way through the blocks.

    Args:
        decoder_blocks: the model's blocks.
        tokens: [num_samples, seq_len] int64.
        batch_size: samples in one call of a block.
        first_weight: how many positions the first one of a sample counts as in the statistics; 0 leaves it out.
        resident: within `resident(index)` the weights of a block are there; needed only where they are not always.
        hidden: where the activations go; None keeps them in memory.
        dtype: of the matrix products in the blocks, by autocast; None: that of the weights.

    Attributes:
        hidden: input of the current block for each batch, [batch, seq_len, hidden], or for each call with a batch.
        batches: the number of the batch that each of these is of.
        in_line: whether the model runs its blocks one after another, each once at most. Where it does not, the inputs
            of a block are those of all its calls, and come from a run of the whole model as it then is.
        has_states: whether blocks share more than hidden states, so that none can be run without those before it.
    """

    def __init__(
        self,
        decoder_blocks: DecoderBlocks,
        tokens: torch.Tensor,
        batch_size: int,
        first_weight: float = 1,
        resident: Callable[[int], AbstractContextManager[None]] = _always_there,
        hidden: Activations | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tokens, self.batch_size, self.first_weight = tokens, batch_size, first_weight
        self._decoder_blocks, self._resident, self.dtype = decoder_blocks, resident, dtype
        self.hidden = Activations(-(-len(tokens) // batch_size)) if hidden is None else hidden
        # calls[block][batch]
        self._calls: list[list[Call]] = [[] for _ in decoder_blocks.blocks]
        probed = probe(decoder_blocks, tokens[:1], resident, dtype)
        self._times, self.in_line, self._reruns = probed.times, probed.in_line, not probed.in_line
        self.batches = list(range(self.hidden.num_batches))
        self._empty = self.hidden
        self._outputs: dict[int, Sequence[torch.Tensor]] = {}  # of the current block, where they are there already
        if probed.in_line:
            self._capture(probed.rests)
        else:
            self.enter(0)
        self.has_states = not probed.in_line or any(call.has_state() for calls in self._calls for call in calls)

    def _capture(self, rests: list[tuple[Any, ...] | None]) -> None:
        """Records the arguments of every block for every batch, and the first block's hidden states."""
        pool = Pool()
        last: list[torch.Tensor] = []  # the hidden states of a batch, once its first block has been called

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split_call(args, kwargs)
                if not last:
                    self.hidden.append(hidden)
                elif hidden is not last[0] and not torch.equal(hidden, last[0]):
                    raise ValueError(
                        f"{type(self._decoder_blocks.decoder).__name__} changes the hidden states before block "
                        f"{self._decoder_blocks.name_in_decoder(index)} for some samples and not for others, so its "
                        "blocks cannot be calibrated one at a time"
                    )
                last[:] = [hidden]
                self._calls[index].append(call.pooled(pool))
                rest = rests[index]
                return hidden if rest is None else (hidden, *rest)

            return forward

        with replaced_forward(self._decoder_blocks.blocks, stand_in):
            for batch in self.tokens.split(self.batch_size):
                last.clear()
                run_decoder(self._decoder_blocks.decoder, batch)

    def enter(self, index: int, there: int | None = None) -> None:
        """Where the blocks are not `in_line`: runs the whole model as it is now, and takes what block `index` is
        called with, each time. The block `there` is in memory already.

        Raises:
            ValueError: the block is handed keys and values, or other states, that calls write into.
        """
        blocks, pool = self._decoder_blocks.blocks, Pool()
        hidden_states = self._empty.sibling("calls", self._times[index] * self._empty.num_batches)
        calls: list[Call] = []
        batches: list[int] = []

        def watched(number: int) -> Callable[..., Any]:
            block, original = blocks[number], blocks[number].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                if number == index:
                    hidden, call = split_call(args, kwargs)
                    if call.has_state():
                        name = self._decoder_blocks.name_in_decoder(index)
                        raise ValueError(f"{name} shares states with other calls: its blocks cannot be calibrated")
                    hidden_states.append(hidden.clone())  # a block may write into its input
                    calls.append(call.pooled(pool))
                here = _always_there if number == there else self._resident
                with here(number), products(block, device_of(block), self.dtype):
                    return original(*args, **kwargs)

            return forward

        with replaced_forward(blocks, watched):
            for batch, tokens in enumerate(self.tokens.split(self.batch_size)):
                run_decoder(self._decoder_blocks.decoder, tokens)
                batches += [batch] * (len(calls) - len(batches))
        self._calls = [calls if number == index else [] for number in range(len(blocks))]
        self.hidden, self.batches = hidden_states, batches

    def times(self, index: int) -> int:
        """How often the model calls block `index` with a batch."""
        return self._times[index]

    def outputs(self, index: int, block: nn.Module) -> Iterator[torch.Tensor]:
        """Runs every batch through `block`, the one at `index`, and yields its hidden states."""
        return (self.output(index, block, batch) for batch in range(len(self._calls[index])))

    def output(self, index: int, block: nn.Module, batch: int, *, in_dtype: bool = True) -> torch.Tensor:
        """Runs one batch through `block`, the one at `index`: its hidden states [batch, seq_len, hidden]. Products are
        in `dtype`; without `in_dtype` in what the caller has set."""
        hidden = self.hidden[batch]
        with products(block, hidden.device, self.dtype if in_dtype else None):
            output: torch.Tensor = hidden_of(self._calls[index][batch].run(block, hidden))
        return output

    @property
    def num_rows(self) -> int:
        """Rows that all calls of the current block bring: as many as there are tokens, for each call with them."""
        return self.tokens.numel() * len(self.batches) // len(set(self.batches))

    def tell_outputs(self, index: int, outputs: Sequence[torch.Tensor]) -> None:
        """Says what the block at `index` gives for each batch, so that `advance` need not run it."""
        self._outputs[index] = outputs

    def advance(self, index: int, block: nn.Module) -> None:
        """Makes the outputs of the block at `index`, which is resident, the inputs of the next one. Its arguments are
        dropped."""
        if self._reruns:
            if index + 1 < len(self._calls):
                self.enter(index + 1, index)
        else:
            told = self._outputs.pop(index, ())
            passed_by = not self._calls[index]  # by text
            self.hidden.replace(self.hidden if passed_by else told or self.outputs(index, block))
        self._calls[index] = []

    def take(self, other: BlockReplay) -> None:
        """Goes on where another one is, a fork of this one that is used up by it."""
        self.hidden.replace(other.hidden)
        self._calls = other._calls

    def part(self, batches: Sequence[int], name: str) -> BlockReplay:
        """Another one at the same place, of some of the batches; where they are in files, under that name. Where the
        blocks are not `in_line` it ends with the outputs of this block."""
        other = copy.copy(self)
        other._reruns, other.batches = False, [self.batches[batch] for batch in batches]
        other.hidden = self.hidden.sibling(name, len(batches))
        for batch in batches:
            other.hidden.append(self.hidden[batch])
        other._outputs = {}
        copies: list[dict[int, Any]] = [{} for _ in batches]
        other._calls = [
            [calls[batch].with_own_states(states) for batch, states in zip(batches, copies, strict=True)]
            if calls
            else []
            for calls in self._calls
        ]
        tokens = dict(zip(dict.fromkeys(self.batches), self.tokens.split(self.batch_size), strict=True))
        other.tokens = torch.cat([tokens[batch] for batch in dict.fromkeys(other.batches)])
        return other

    def fork(self, name: str = "fork") -> BlockReplay:
        """Another one at the same place, whose activations go their own way from here on; where they are in files,
        under that name."""
        return self.part(range(len(self.hidden)), name)

    def inputs(
        self, index: int, block: nn.Module, layers: Mapping[str, Layer], leaders: dict[str, str]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Runs one batch after another through the block and yields the inputs of `layers`: those rows that count, by
        the name of the first layer that the tensor feeds. `leaders` is filled: layer name → that name. Between two
        batches the block may be changed."""
        watch = self._watch(index, block, layers, leaders)
        for batch in range(len(self.hidden)):
            inputs: dict[str, torch.Tensor] = {}
            watch.run(batch, inputs.__setitem__)
            yield inputs

    def input_groups(self, index: int, block: nn.Module, layers: Mapping[str, Layer]) -> list[list[str]]:
        """Names of `layers` that one batch calls, layers fed by the same tensor together, in the order of the
        calls."""
        watch = self._watch(index, block, layers, {})
        watch.run(0, lambda name, x: None)
        groups: dict[str, list[str]] = {}
        for name, leader in watch.leaders.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def collect(
        self, index: int, block: nn.Module, layers: Mapping[str, Layer], make: Callable[[Layer], ColumnNorms]
    ) -> dict[str, ColumnNorms]:
        """Runs every batch through the block and collects statistics of the inputs of `layers` by name; `make` gives
        empty ones. Layers fed by the same tensor share one object. A layer that no token reached is missing."""
        watch = self._watch(index, block, layers, {})
        statistics: dict[str, ColumnNorms] = {}

        def update(name: str, x: torch.Tensor) -> None:
            if name not in statistics:
                statistics[name] = make(layers[name])
            statistics[name].update(x)

        for batch in range(len(self.hidden)):
            watch.run(batch, update)
        return {name: statistics[leader] for name, leader in watch.leaders.items() if leader in statistics}

    def _watch(self, index: int, block: nn.Module, layers: Mapping[str, Layer], leaders: dict[str, str]) -> Watch:
        def run(batch: int) -> None:
            with products(block, self.hidden.device, self.dtype):
                self._calls[index][batch].run(block, self.hidden[batch])

        return Watch(block, layers, run, self.counted, leaders)

    def counted(self, batch: int, x: torch.Tensor) -> torch.Tensor:
        """The rows of a layer's input in a batch that count in the statistics, the first of each sample times
        √first_weight. Some models flatten samples and positions; tokens routed to experts have lost their positions,
        and count once each."""
        shape = self.hidden[batch].shape[-3:-1]
        if self.first_weight == 1 or len(shape) != 2 or x.numel() != shape.numel() * x.shape[-1]:
            return x
        x = x.reshape(*shape, x.shape[-1])
        if not self.first_weight:
            return x[:, 1:]
        return torch.cat([x[:, :1] * self.first_weight**0.5, x[:, 1:]], dim=1)
