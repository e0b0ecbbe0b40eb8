"""Tables as HTML, which notebooks show: `_repr_html_` of reports, results and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Text and ground have the colours of the page, light or dark; a half transparent blue is seen on both.
_BAR = '<span style="display:inline-block;height:.7em;margin-left:.5em;width:{:.2f}em;background:#4a90d9b0"></span>'
_LONGEST = 5  # em


def as_html(
    rows: Sequence[Sequence[str]],
    title: str = "",
    notes: Sequence[str] = (),
    bars: Mapping[int, Sequence[float | None]] | None = None,
    marked: Sequence[int] = (),
) -> str:
    """A table. All that it shows is text; nothing in it is markup.

    Args:
        rows: the cells, those of the head first.
        title: stands above.
        notes: stand below, one a line.
        bars: column → a number for each row but the head, shown as a bar behind the cell. The longest of a column has
            the same length everywhere; None, Inf and NaN have no bar.
        marked: rows, counted from 0 behind the head, whose first cell is shown as important.
    """
    head, *body = rows
    lines = [f"<caption>{escape(title)}</caption>"] if title else []
    lines.append("<thead><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for number, row in enumerate(body):
        cells = [escape(cell) for cell in row]
        if number in marked:
            cells[0] = f"<strong>{cells[0]}</strong>"
        for column, values in (bars or {}).items():
            cells[column] += _bar(values[number], values)
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return "<div><table>" + "\n".join(lines) + "</tbody></table>" + below + "</div>"


def _bar(value: float | None, values: Sequence[float | None]) -> str:
    longest = max((other for other in values if other is not None and math.isfinite(other)), default=0.0)
    if value is None or not math.isfinite(value) or not 0 < value <= longest:
        return ""
    return _BAR.format(_LONGEST * value / longest)
