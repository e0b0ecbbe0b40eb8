"""`SparsityReport`: what pruning did, layer by layer; saved as `sparsity_report.json` beside the weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..checkpoint.staging import write_text
from ..config import SparsityConfig
from ..pruners.allocation import LEFT_DENSE
from ..records import REPORT_NAME, Amount, As, Count, Revision, Version, read_record, to_json
from .rows import (
    BaseArguments,
    BaseCard,
    BlockReport,
    Calibration,
    Change,
    LayerKind,
    LayerReport,
    Nothing,
)
from .text import in_html, in_words

SCHEMA_VERSION = 1


@dataclass
class SparsityReport:
    """What pruning did to a model.

    Attributes:
        config: the settings, as `SparsityConfig.to_dict()` without its layers.
        calibration: where the calibration tokens came from, their number and form; empty for a method without data.
        layers: one `LayerReport` for each sparse layer, in the order of the model.
        reconstruction: one `BlockReport` for each block that was reconstructed. The output errors of its layers are
            those before.
        skipped: linear maps left dense, each with the reason.
        base_model: what was pruned, as it was named (a local folder by its last part).
        base_revision: commit of the Hub's repository that `from_pretrained` loaded; None for a local folder.
        base_arguments: what else `from_pretrained` needed to find it: `gguf_file`, `subfolder`. Nothing else that
            changes what is loaded is taken from a file.
        base_card: what its card said then of license and language. A repository that only a file names is not asked.
        source_fingerprint: of the weight files that `prune_checkpoint` read.
        fingerprint: of the weights that the report was saved with (`checkpoint.fingerprint`); None where it was not
            computed, as in the checkpoints of a training run, or by an earlier version.
        changes: what was done to the weights after pruning. Where there are any, the output errors and the losses of
            reconstruction are those of weights that are gone.
        num_parameters: logical parameters of the whole model, zeros included.
        seconds: from the loaded to the pruned model. peak_memory_bytes: of the process (and of the GPU, where used).
        product_dtype: in which products of the calibration passes ran: float32 on a CPU that is slow in the model's
            dtype. None for a method without data, or by an earlier version.
        versions: of the libraries that did it.
    """

    config: dict[str, Any]
    calibration: Annotated[dict[str, Any], As(Calibration | Nothing)] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    reconstruction: list[BlockReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    base_revision: Revision | None = None
    base_arguments: Annotated[dict[str, str], As(BaseArguments)] = field(default_factory=dict)
    base_card: Annotated[dict[str, Any], As(BaseCard)] = field(default_factory=dict)
    source_fingerprint: str | None = None
    fingerprint: str | None = None
    changes: list[Change] = field(default_factory=list)
    num_parameters: Count = 0
    seconds: Amount = 0.0
    peak_memory_bytes: dict[str, Count] = field(default_factory=dict)
    product_dtype: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: Annotated[int, Version(SCHEMA_VERSION)] = SCHEMA_VERSION

    @property
    def method(self) -> str:
        """The method and what followed it, as a card or a table names them: such as "admm + block"."""
        steps = [self.pruner, *(self.config.get("refine") or ()), self.config.get("reconstruct")]
        return " + ".join(str(step) for step in steps if step)

    @property
    def pruner(self) -> str | None:
        """The method that chose the masks."""
        return self.config.get("method")

    @property
    def reconstruction_losses(self) -> tuple[float, float] | None:
        """Mean loss of the reconstructed blocks, before and after; None where there are none."""
        pairs = [(row.loss_before, row.loss_after) for row in self.reconstruction]
        losses = [(before, after) for before, after in pairs if before is not None and after is not None]
        if not losses:
            return None
        return sum(before for before, _ in losses) / len(losses), sum(after for _, after in losses) / len(losses)

    @property
    def num_weights(self) -> int:
        """Logical weights of the sparse layers, zeros included."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of the sparse layers' weights that is kept."""
        return sum(layer.num_values for layer in self.layers) / max(1, self.num_weights)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the sparse layers' weights, were they dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the sparse layers' values, masks and scales."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def packed_ratio(self) -> float:
        """Packed bytes as a share of the dense ones."""
        return self.packed_bytes / max(1, self.dense_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Packed bits for each weight of the sparse layers, zeros included."""
        return 8 * self.packed_bytes / max(1, self.num_weights)

    @property
    def patterns(self) -> list[str]:
        """The patterns of the layers, each once, in the order of the model; without layers the one asked for."""
        return list(dict.fromkeys(layer.pattern for layer in self.layers)) or [str(self.config.get("pattern"))]

    @property
    def num_left_dense(self) -> int:
        """How many layers the allocation left dense."""
        return sum(reason == LEFT_DENSE for reason in self.skipped.values())

    def kinds(self) -> list[LayerKind]:
        """The layers grouped by kind, in the order of the model."""
        kinds: dict[tuple[str, tuple[int, int], str], LayerKind] = {}
        for layer in self.layers:
            name = re.sub(r"\.\d+\.", ".*.", layer.name, count=1)
            structure = "" if "%" in layer.pattern else layer.pattern
            kinds.setdefault((name, layer.shape, structure), LayerKind(name, layer.shape, [])).layers.append(layer)
        return list(kinds.values())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `sparsity_report.json` into `directory`."""
        write_text(Path(directory) / REPORT_NAME, to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparsityReport:
        """Reads a report from its file. Raises ValueError, which names the field, where it is damaged or of a newer
        schema."""
        return read_record(cls, path, "is not a report of optimum-ksparse", earlier=_earlier)

    def check_record(self, where: str) -> None:
        """Raises ValueError where what was read from a file could not be printed, or contradicts itself."""
        try:
            settings = SparsityConfig.from_dict(self.config).to_dict()
        except ValueError as error:
            raise ValueError(f"config: {error}") from None
        if "pattern" not in self.config:
            raise ValueError("config.pattern is missing")
        self.config = {name: settings.get(name, value) for name, value in self.config.items()}

    def __str__(self) -> str:
        """A table with a row for each kind of layer (same path but for the block's number), and the totals."""
        return in_words(self)

    def _repr_html_(self) -> str:
        return in_html(self)


def _earlier(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what earlier versions wrote: dropped blocks, and which method was chosen of several."""
    record = {name: value for name, value in record.items() if name != "dropped"}
    choice, config = record.pop("choice", None), record.get("config")
    if isinstance(choice, dict) and isinstance(config, dict):
        record["config"] = {**config, **{key: choice[key] for key in ("method", "reconstruct") if key in choice}}
    return record
