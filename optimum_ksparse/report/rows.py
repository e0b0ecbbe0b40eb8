"""What a report is made of: a row for each layer and each reconstructed block, and what was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..records import UNWRITTEN, Amount, Count, PatternText, Positive, RelativePath

OVERFLOWED = "the output error could not be computed: the outputs overflow float32"


def is_finite(value: float | None) -> bool:
    """Whether JSON can hold a figure."""
    return value is None or math.isfinite(value)


def with_note(note: str, more: str) -> str:
    """A note with one more."""
    return f"{note}; {more}" if note else more


class BaseArguments(TypedDict, total=False):
    """Arguments of `from_pretrained` that say which part of a repository was pruned."""

    gguf_file: RelativePath
    subfolder: RelativePath


BASE_ARGUMENTS = tuple(BaseArguments.__annotations__)


class BaseCard(TypedDict, total=False):
    """What the card of a pruned model takes over from the card of the dense one."""

    license: str
    license_name: str
    license_link: str
    language: str | list[str]
    pipeline_tag: str


class File(TypedDict):
    """A file of texts, as `describe_dataset` describes it."""

    file: str
    sha256: str


class MixPart(TypedDict):
    """A part of a mix of calibration data."""

    dataset: str | File
    num_samples: Count
    form: str
    begins_with_bos: bool


class Mixed(TypedDict, total=False):
    """What the description of a mix has besides."""

    parts: list[MixPart]


class Calibration(Mixed):
    """The description of `data.CalibrationTokens`."""

    dataset: str | dict[str, Any]
    form: str
    num_samples: Count
    seq_len: Count
    seed: Count
    begins_with_bos: bool
    bos_in_statistics: bool


class Nothing(TypedDict):
    """An object without fields."""


class KeptWeights:
    """What rows of layers have in common: `num_values` weights of `shape` [out, in] are kept."""

    shape: tuple[int, int]
    num_values: int

    def check_record(self, where: str) -> None:
        """Raises ValueError where more is kept than there is."""
        if self.num_values > self.shape[0] * self.shape[1]:
            raise ValueError(f"{where}.num_values is {self.num_values}, more than shape {list(self.shape)} has")

    @property
    def density(self) -> float:
        return self.num_values / (self.shape[0] * self.shape[1])


@dataclass
class LayerReport(KeptWeights):
    """One pruned layer. `shape` is [out, in]; `relative_output_error` is ‖X(Ŵ − W)ᵀ‖_F / ‖XWᵀ‖_F on a sample of the
    calibration tokens, None where the method read no data; `note` is what the method warned of; `sensitivity` is what
    `allocation="owl"` measured: the share of outliers in the layer's block, or, for `n:m`, its predicted squared
    relative output error under the pattern that was asked for. With quantised values `nearest_output_error` is what
    rounding to nearest would have given, both on all calibration tokens; None where a block was tuned in between, and
    the other error is that before it. With `permute`, `reordered_with` are the layers whose outputs have another order
    than in the dense model, and with them the inputs of this one."""

    name: str
    shape: tuple[Positive, Positive]
    pattern: PatternText
    num_values: Count
    dense_bytes: Count
    packed_bytes: Count
    relative_output_error: Amount | None
    seconds: Amount
    note: str = ""
    sensitivity: float | None = None
    nearest_output_error: Amount | None = field(default=None, metadata=UNWRITTEN)
    reordered_with: list[str] | None = field(default=None, metadata=UNWRITTEN)

    def __post_init__(self) -> None:
        if not is_finite(self.relative_output_error):
            self.relative_output_error, self.note = None, with_note(self.note, OVERFLOWED)
        if not is_finite(self.nearest_output_error):
            self.nearest_output_error = None


@dataclass
class BlockReport:
    """A reconstructed block: its number, and the loss on calibration tokens that were held out, when its layers had
    been pruned and when it had been tuned (1 is the energy of the outputs; None where it could not be computed).
    `loss_after` is the least over the epochs on the very tokens that chose the epoch: a little below that of other
    tokens; where values were quantised after that, with these. `note` says what went wrong."""

    block: Count
    loss_before: float | None
    loss_after: float | None
    seconds: Amount
    note: str = ""

    def __post_init__(self) -> None:
        if not (is_finite(self.loss_before) and is_finite(self.loss_after)):
            self.loss_before = self.loss_after = None
            self.note = with_note(self.note, OVERFLOWED)


@dataclass
class PrunedBlock:
    """What there is to report of a block: a row for each layer, and one of its reconstruction, where there was one."""

    layers: list[LayerReport]
    reconstruction: BlockReport | None = None


@dataclass
class LayerKind:
    """Layers of the same path but for the block's number, of the same shape, and of the same `n:m` or all
    unstructured; `name` has `*` for the number."""

    name: str
    shape: tuple[int, int]
    layers: list[LayerReport]

    @property
    def pattern(self) -> str:
        """Their pattern, or the densest and the sparsest of theirs."""
        least, most = (choose(self.layers, key=lambda layer: layer.density).pattern for choose in (max, min))
        return least if least == most else f"{least} … {most}"

    @property
    def density(self) -> float:
        return sum(layer.density for layer in self.layers) / len(self.layers)

    @property
    def relative_output_error(self) -> float | None:
        """Mean over the layers; None where none was measured."""
        errors = [layer.relative_output_error for layer in self.layers if layer.relative_output_error is not None]
        return sum(errors) / len(errors) if errors else None


@dataclass
class Change:
    """What was done to the weights after pruning, as far as it is known: "trained", "merged" (an adapter, of the kinds
    in `adapters`, became part of them), "quantised", or "unknown" (they are others than before, and nothing recorded
    why); by which class of trainer or method of merging, or to which type; on what, and how long."""

    kind: str
    by: str | None = None
    dataset: str | None = None
    steps: Count | None = None
    epochs: Amount | None = None
    adapters: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.kind == "quantised":
            return f"kept values quantised to {self.by}"
        if self.kind not in ("trained", "merged"):
            return "changed by something that left no record"
        what = f"an adapter merged in ({', '.join(self.adapters)})" if self.kind == "merged" else "trained"
        more = "" if self.by is None else f" with {self.by}"
        more += "" if self.dataset is None else f" on {self.dataset}"
        return what + more + ("" if self.steps is None else f", {self.steps:,} steps")
