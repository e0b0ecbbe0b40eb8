"""`SparsityReport`: what pruning did, layer by layer; saved as `sparsity_report.json` beside the weights."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .allocation import LEFT_DENSE
from .config import check_keys

REPORT_NAME = "sparsity_report.json"
RESULTS_NAME = "evaluation_results.json"  # what was measured; see `evaluation.EvaluationResults`
TUNING_NAME = "finetuning.json"  # how a model was fine-tuned; beside the adapter or the weights
MERGE_REPORT_NAME = "merge_report.json"  # what merging an adapter did; see `finetuning.report.MergeReport`
SCHEMA_VERSION = 1


@dataclass
class LayerReport:
    """One pruned layer. `shape` is [out, in]; `relative_output_error` is ‖X(Ŵ − W)ᵀ‖_F / ‖XWᵀ‖_F on a sample of the
    calibration tokens, None where the method read no data; `note` is what the method warned of; `sensitivity` is what
    `allocation="owl"` measured: the share of outliers in the layer's block, or, for `n:m`, its predicted squared
    relative output error under the pattern that was asked for."""

    name: str
    shape: tuple[int, int]
    pattern: str
    num_values: int
    dense_bytes: int
    packed_bytes: int
    relative_output_error: float | None
    seconds: float
    note: str = ""
    sensitivity: float | None = None

    @property
    def density(self) -> float:
        return self.num_values / (self.shape[0] * self.shape[1])


@dataclass
class BlockReport:
    """A reconstructed block: its number, and the loss on calibration tokens that were held out, when its layers had
    been pruned and when it had been tuned (1 is the energy of the outputs); `note` says what went wrong."""

    block: int
    loss_before: float
    loss_after: float
    seconds: float
    note: str = ""


@dataclass
class Trial:
    """What `method="auto"` found of one method: the loss of a pruned block on calibration tokens that it had not seen
    (1 is the energy of the outputs; None where the method failed, and `note` says how), and about how many seconds the
    whole model would take, the trials included."""

    method: str
    reconstruct: str | None
    loss: float | None
    seconds: float
    fits: bool
    note: str = ""

    @property
    def name(self) -> str:
        return self.method if self.reconstruct is None else f"{self.method} + {self.reconstruct}"


@dataclass
class MethodChoice:
    """What `method="auto"` has chosen.

    Attributes:
        method, reconstruct: the settings taken.
        block: the number of the block on which they were tried.
        time_budget: seconds allowed; None for any.
        trials: all that was tried.
    """

    method: str
    reconstruct: str | None
    block: int
    time_budget: float | None
    trials: list[Trial]

    def __post_init__(self) -> None:
        self.trials = [Trial(**trial) if isinstance(trial, dict) else trial for trial in self.trials]

    def __str__(self) -> str:
        def words(trial: Trial) -> str:
            if trial.loss is None:
                return f"{trial.name} failed ({trial.note})"
            return f"{trial.name} {trial.loss:.4f} ({trial.seconds:.0f} s{'' if trial.fits else ', too long'})"

        name = self.method if self.reconstruct is None else f"{self.method} + {self.reconstruct}"
        allowed = "any time" if self.time_budget is None else f"{self.time_budget:g} s"
        if any(trial.fits for trial in self.trials):
            why = f"the least loss on unseen tokens in block {self.block} within {allowed}"
        else:
            why = f"the fastest, because the trials on block {self.block} left too little of {allowed} for any"
        return f"chosen by auto: {name}, {why}: {', '.join(words(trial) for trial in self.trials)}"


@dataclass
class DroppedBlocks:
    """The decoder blocks that were dropped because they change the hidden states least.

    Attributes:
        blocks: their numbers in the dense model, in order.
        scores: of all blocks of the dense model: 1 − cosine of a token's hidden states before and after the block, the
            mean over the calibration tokens (ShortGPT's Block Influence).
        num_parameters: of the dense model.
    """

    blocks: list[int]
    scores: list[float]
    num_parameters: int

    def __str__(self) -> str:
        dropped = ", ".join(f"{block} ({self.scores[block]:.4f})" for block in self.blocks)
        kept = [score for block, score in enumerate(self.scores) if block not in self.blocks]
        return (
            f"dropped {len(self.blocks)} of {len(self.scores)} decoder blocks, those that change the hidden states "
            f"least (1 - cosine): {dropped}; the others {min(kept):.4f} to {max(kept):.4f}"
        )


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
class SparsityReport:
    """What pruning did to a model.

    Attributes:
        config: the settings, as `SparsityConfig.to_dict()` without its layers.
        calibration: where the calibration tokens came from, their number and form; empty for a method without data.
        layers: one `LayerReport` for each sparse layer, in the order of the model.
        reconstruction: one `BlockReport` for each block that was reconstructed. The output errors of its layers are
            those before.
        choice: what `method="auto"` chose, and why.
        dropped: the decoder blocks that were dropped first; the numbers in names of layers are those without them.
        skipped: linear maps left dense, each with the reason.
        base_model: what was pruned, as it was named (a local folder by its last part).
        base_revision: commit of the Hub's repository that `from_pretrained` loaded; None for a local folder.
        base_arguments: what else `from_pretrained` needed to find it: `gguf_file`, `subfolder`.
        source_fingerprint: of the weight files that `prune_checkpoint` read.
        num_parameters: logical parameters of the whole model, zeros included, without those of dropped blocks.
        seconds: from the loaded to the pruned model. peak_memory_bytes: of the process (and of the GPU, where used).
        versions: of the libraries that did it.
    """

    config: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    reconstruction: list[BlockReport] = field(default_factory=list)
    choice: MethodChoice | None = None
    dropped: DroppedBlocks | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    base_arguments: dict[str, str] = field(default_factory=dict)
    source_fingerprint: str | None = None
    num_parameters: int = 0
    seconds: float = 0.0
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def method(self) -> str:
        """The method and what followed it, as a card or a table names them: such as "admm + block"; where nothing was
        pruned, what else was done."""
        if self.is_dense:
            return "dropped blocks"
        reconstruct = self.config.get("reconstruct") if self.choice is None else self.choice.reconstruct
        steps = [self.pruner, *(self.config.get("refine") or ()), reconstruct]
        return " + ".join(str(step) for step in steps if step)

    @property
    def pruner(self) -> str | None:
        """The method that chose the masks; what `method="auto"` has chosen."""
        return self.config.get("method") if self.choice is None else self.choice.method

    @property
    def reconstruction_losses(self) -> tuple[float, float] | None:
        """Mean loss of the reconstructed blocks, before and after; None where there are none."""
        rows = self.reconstruction
        if not rows:
            return None
        return sum(row.loss_before for row in rows) / len(rows), sum(row.loss_after for row in rows) / len(rows)

    @property
    def is_dense(self) -> bool:
        """Whether nothing was pruned besides dropping blocks."""
        return "pattern" in self.config and self.config["pattern"] is None

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense model, dropped blocks included."""
        return self.num_parameters if self.dropped is None else self.dropped.num_parameters

    @property
    def num_weights(self) -> int:
        """Logical weights of the sparse layers, zeros included."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of the sparse layers' weights that is kept; 1 where there are none."""
        return 1.0 if self.is_dense else sum(layer.num_values for layer in self.layers) / max(1, self.num_weights)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the sparse layers' weights, were they dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the sparse layers' values and masks."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def packed_ratio(self) -> float:
        """Packed bytes as a share of the dense ones; 1 where nothing is packed."""
        return 1.0 if self.is_dense else self.packed_bytes / max(1, self.dense_bytes)

    @property
    def patterns(self) -> list[str]:
        """The patterns of the layers, each once, in the order of the model; without layers the one asked for. None
        where nothing was pruned."""
        if self.is_dense:
            return []
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
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (Path(directory) / REPORT_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparsityReport:
        """Reads a report from its file. Raises ValueError where it is damaged or of a newer schema."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema_version"] > SCHEMA_VERSION:
                raise ValueError(f"schema_version {data['schema_version']} is newer than {SCHEMA_VERSION}: upgrade")
            check_keys(data, [f.name for f in fields(cls)], "the report")
            data["layers"] = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in data["layers"]]
            data["reconstruction"] = [BlockReport(**row) for row in data.get("reconstruction", ())]
            if data.get("choice") is not None:
                data["choice"] = MethodChoice(**data["choice"])
            if data.get("dropped") is not None:
                data["dropped"] = DroppedBlocks(**data["dropped"])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.path.basename(path)} is not a report of optimum-ksparse: {error}") from error

    def _allocated(self) -> str:
        """How patterns were allocated, in a line."""
        if "%" in self.patterns[0]:
            densities = [layer.density for layer in self.layers]
            least, most = min(densities), max(densities)
            return f"allocation owl: densities {least:.4f} to {most:.4f}, by the outliers of each block"
        found = Counter(layer.pattern for layer in self.layers)
        return (
            f"allocation owl, target_density {self.config.get('target_density')}: "
            f"{', '.join(f'{pattern} in {count}' for pattern, count in found.items())} layers, dense in "
            f"{self.num_left_dense}, which would lose most"
        )

    def __str__(self) -> str:
        """A table with a row for each kind of layer (same path but for the block's number), and the totals."""
        lines = [] if self.dropped is None else [str(self.dropped)]
        if self.dropped is not None:
            lines.append(f"{self.dense_parameters:,} parameters before, {self.num_parameters:,} without these blocks")
        return "\n".join(lines if self.is_dense else [*self._table(), *lines])

    def _table(self) -> list[str]:
        rows = [("layer", "count", "shape", "pattern", "density", "output error", "seconds")]
        for kind in self.kinds():
            seconds = sum(layer.seconds for layer in kind.layers)
            error = "not measured" if kind.relative_output_error is None else f"{kind.relative_output_error:.4f}"
            shape, density = f"{kind.shape[0]} x {kind.shape[1]}", f"{kind.density:.4f}"
            rows.append((kind.name, str(len(kind.layers)), shape, kind.pattern, density, error, f"{seconds:.1f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{len(self.layers)} sparse layers, density {self.density:.4f}; {self.num_weights:,} of "
            f"{self.num_parameters:,} parameters; packed {self.packed_bytes:,} of {self.dense_bytes:,} bytes "
            f"({self.packed_ratio:.4f})"
        )
        if self.choice is not None:
            lines.append(str(self.choice))
        if self.reconstruction_losses is not None:
            seconds = sum(row.seconds for row in self.reconstruction)
            before, after = self.reconstruction_losses
            lines.append(
                f"{len(self.reconstruction)} blocks reconstructed in {seconds:.1f} s: mean loss of their outputs "
                f"{before:.4f} -> {after:.4f}"
            )
        if self.config.get("allocation") == "owl":
            lines.append(self._allocated())
        lines += [f"left dense: {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.layers if layer.note]
        lines += [f"note: block {row.block}: {row.note}" for row in self.reconstruction if row.note]
        return lines
