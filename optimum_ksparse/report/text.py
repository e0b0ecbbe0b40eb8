"""A report as text, for a terminal, and as HTML, for a notebook."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..records import aligned, as_html

if TYPE_CHECKING:
    from .report import SparsityReport


def in_words(report: SparsityReport) -> str:
    """A table with a row for each kind of layer (same path but for the block's number), and the totals."""
    return "\n".join([*aligned(_table(report)), *_lines(report)])


def in_html(report: SparsityReport) -> str:
    """The text of `in_words` as HTML, with a bar for each density and output error."""
    kinds = report.kinds()
    bars: dict[int, list[float | None]] = {
        4: [kind.density for kind in kinds],
        5: [kind.relative_output_error for kind in kinds],
    }
    title = f"{report.base_model or 'model'}, {report.method} {', '.join(report.patterns)}"
    return as_html(_table(report), title, _lines(report), bars)


def _table(report: SparsityReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layer", "count", "shape", "pattern", "density", "output error", "seconds")]
    for kind in report.kinds():
        seconds = sum(layer.seconds for layer in kind.layers)
        error = "not measured" if kind.relative_output_error is None else f"{kind.relative_output_error:.4f}"
        shape, density = f"{kind.shape[0]} x {kind.shape[1]}", f"{kind.density:.4f}"
        rows.append((kind.name, str(len(kind.layers)), shape, kind.pattern, density, error, f"{seconds:.1f}"))
    return rows


def _lines(report: SparsityReport) -> list[str]:
    """The totals, and what is to be known besides."""
    values = f"{report.config['values']} values, " if report.config.get("values") else ""
    lines = [
        f"{len(report.layers)} sparse layers, density {report.density:.4f}; {report.num_weights:,} of "
        f"{report.num_parameters:,} parameters; packed {report.packed_bytes:,} of {report.dense_bytes:,} bytes "
        f"({report.packed_ratio:.4f}), {values}{report.bits_per_weight:.2f} bits a weight"
    ]
    both = [(row.relative_output_error, row.nearest_output_error) for row in report.layers]
    errors = [(reached, nearest) for reached, nearest in both if reached is not None and nearest is not None]
    if errors:
        reached, nearest = (sum(error) / len(errors) for error in zip(*errors, strict=True))
        lines.append(f"mean output error of the layers {reached:.4f}, with values rounded to nearest {nearest:.4f}")
    if report.reconstruction_losses is not None:
        seconds = sum(row.seconds for row in report.reconstruction)
        before, after = report.reconstruction_losses
        lines.append(
            f"{len(report.reconstruction)} blocks reconstructed in {seconds:.1f} s: mean loss of their outputs "
            f"{before:.4f} -> {after:.4f}, on the held-out tokens that chose the epochs"
        )
    if reordered := [layer for layer in report.layers if layer.reordered_with]:
        lines.append(f"channels reordered: inputs of {len(reordered)} layers, and the outputs that feed them")
    if report.config.get("allocation") == "owl":
        if "%" in report.patterns[0]:
            densities = [layer.density for layer in report.layers]
            how = f": densities {min(densities):.4f} to {max(densities):.4f}, by the outliers of each block"
        else:
            counts = Counter(layer.pattern for layer in report.layers)
            patterns = ", ".join(f"{pattern} in {count}" for pattern, count in counts.items())
            target = f", target_density {report.config.get('target_density')}: {patterns} layers"
            how = f"{target}, dense in {report.num_left_dense}, which would lose most"
        lines.append(f"allocation owl{how}")
    lines += [f"left dense: {name}: {reason.removeprefix('left dense ')}" for name, reason in report.skipped.items()]
    lines += [f"note: {layer.name}: {layer.note}" for layer in report.layers if layer.note]
    lines += [f"note: block {row.block}: {row.note}" for row in report.reconstruction if row.note]
    lines += [f"after pruning: {change}" for change in report.changes]
    if report.changes:
        lines.append("output errors and losses are those before that")
    return lines
