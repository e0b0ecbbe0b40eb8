"""`MergeReport`: what merging an adapter did, layer by layer; saved as `merge_report.json` beside the weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..checkpoint.staging import write_text
from ..records import MERGE_REPORT_NAME, UNWRITTEN, Amount, Count, Positive, Version, read_record, to_json
from ..report import Change
from ..report.rows import OVERFLOWED, KeptWeights, is_finite, with_note

SCHEMA_VERSION = 1
_WORST = 5


def _named(adapter: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(adapter.get("name"), str) or not isinstance(adapter.get("peft_type"), str):
        raise ValueError("must have texts under 'name' and 'peft_type'")
    return adapter


@dataclass
class MergedLayer(KeptWeights):
    """One sparse layer into which adapters were merged.

    Attributes:
        name: its path in the decoder. shape: [out, in].
        num_values: weights kept, before and after.
        how: "exact" (the adapter changes kept weights alone), "masked" (what lies outside the mask is thrown away), or
            "solved" (the kept weights make up for that).
        relative_output_error: ‖X'W'ᵀ − XWᵀ‖_F / ‖XWᵀ‖_F of the merged weight W' and of the weight W that the unmerged
            layer computes with, on a sample of the calibration tokens: X' as they reach the layer in the merged model,
            X in the unmerged one. None where no data were read, or none reached it.
        discarded: the share of the adapter's change ΔW that lies outside the mask M, ‖ΔW∘(1 − M)‖_F / ‖ΔW‖_F; None
            where it could not be computed, as `note` says.
        unrounded_output_error: of quantised values, the output error of the weight before they were rounded again.
        rounding: of quantised values, what rounding them changes, as a share of the adapter's change: ‖W' − W''‖_F /
            ‖ΔW‖_F with W'' the weight before. It may be above one, and is None where the adapter changes nothing.
    """

    name: str
    shape: tuple[Positive, Positive]
    num_values: Count
    how: str
    relative_output_error: Amount | None
    discarded: Amount | None
    seconds: Amount
    note: str = ""
    unrounded_output_error: Amount | None = field(default=None, metadata=UNWRITTEN)
    rounding: Amount | None = field(default=None, metadata=UNWRITTEN)

    def __post_init__(self) -> None:
        figures = (self.relative_output_error, self.discarded)
        if not all(map(is_finite, figures)):
            self.relative_output_error, self.discarded = (value if is_finite(value) else None for value in figures)
            self.note = with_note(self.note, OVERFLOWED)
        if not all(map(is_finite, (self.unrounded_output_error, self.rounding))):
            self.unrounded_output_error = self.rounding = None


@dataclass
class MergeReport:
    """What merging did to a model.

    Attributes:
        method: "masked" or "solve".
        adapters: of each merged adapter its name, kind, base model and main settings.
        calibration: where the tokens came from, as in `SparsityReport`; empty where none were read.
        layers: a row for each sparse layer, in the order of the model.
        dense_layers: paths in the model of layers that are not sparse, which were merged as PEFT does it.
        seconds: all in all. versions: of the libraries that did it.
    """

    method: str
    adapters: list[Annotated[dict[str, Any], _named]]
    calibration: dict[str, Any] = field(default_factory=dict)
    layers: list[MergedLayer] = field(default_factory=list)
    dense_layers: list[str] = field(default_factory=list)
    seconds: Amount = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: Annotated[int, Version(SCHEMA_VERSION)] = SCHEMA_VERSION

    def totals(self) -> dict[str, Any]:
        """Number of layers by `how`, density, mean and worst output error (None where none was measured), mean share
        of the change that was discarded, seconds."""
        errors = [row.relative_output_error for row in self.layers if row.relative_output_error is not None]
        size = sum(row.shape[0] * row.shape[1] for row in self.layers)
        return {
            "layers": {how: sum(row.how == how for row in self.layers) for how in ("exact", "masked", "solved")},
            "density": sum(row.num_values for row in self.layers) / max(1, size),
            "mean_output_error": sum(errors) / len(errors) if errors else None,
            "worst_output_error": max(errors, default=None),
            "mean_discarded": sum(row.discarded or 0.0 for row in self.layers) / max(1, len(self.layers)),
            "seconds": self.seconds,
        }

    def change(self) -> Change:
        """What a model's `SparsityReport` says of it."""
        return Change("merged", self.method, adapters=[str(entry.get("peft_type")) for entry in self.adapters])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `merge_report.json` into `directory`."""
        write_text(Path(directory) / MERGE_REPORT_NAME, to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MergeReport:
        """Reads a report from its file. Raises ValueError, which names the field, where it is damaged or of a newer
        schema."""
        return read_record(cls, path, "is not a report of merging")

    def __str__(self) -> str:
        """The layers with the largest errors, and the totals."""
        totals = self.totals()
        lines = [f"{'worst layers':<40}  {'how':<7}  {'density':>7}  {'output error':>12}  {'discarded':>9}"]
        for row in sorted(self.layers, key=lambda row: (-(row.relative_output_error or 0), -(row.discarded or 0)))[
            :_WORST
        ]:
            error = "not measured" if row.relative_output_error is None else f"{row.relative_output_error:.2e}"
            figures = f"{row.density:>7.4f}  {error:>12}  {row.discarded or 0.0:>9.4f}"
            lines.append(f"{row.name:<40}  {row.how:<7}  {figures}")
        counts = ", ".join(f"{count} {how}" for how, count in totals["layers"].items() if count)
        lines.append(f"{len(self.layers)} sparse layers ({counts}), density {totals['density']:.4f} as before")
        if totals["worst_output_error"] is not None:
            errors = (totals["mean_output_error"], totals["worst_output_error"])
            lines.append("output error: mean {:.2e}, worst {:.2e}".format(*errors))
        lines += self._of_rounding()
        if self.layers and totals["layers"]["exact"] == len(self.layers):
            but = "" if all(row.rounding is None for row in self.layers) else " but for rounding"
            lines.append(f"the adapter changes kept weights alone: merging is exact{but}, there is nothing to solve")
        if self.dense_layers:
            lines.append(f"merged as dense layers: {', '.join(self.dense_layers)}")
        lines += [f"note: {row.name}: {row.note}" for row in self.layers if row.note]
        names = ", ".join(f"{entry['name']} ({entry['peft_type']})" for entry in self.adapters)
        lines.append(f"merged {names} by method={self.method!r} in {self.seconds:.1f} s")
        return "\n".join(lines)

    def _of_rounding(self) -> list[str]:
        """What is to be said of layers with quantised values."""
        shares = [row.rounding for row in self.layers if row.rounding is not None]
        errors = [row.unrounded_output_error for row in self.layers if row.unrounded_output_error is not None]
        before = f"; output error before: mean {sum(errors) / len(errors):.2e}" if errors else ""
        mean = (
            f"rounding the values again changes {sum(shares) / len(shares):.2f} as much as the adapter"
            if shares
            else ""
        )
        return [mean + before] if mean else []
