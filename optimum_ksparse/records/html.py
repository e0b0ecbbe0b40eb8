"""Tables as HTML, which notebooks show: `_repr_html_` of reports, results and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

# Text and ground have the colours of the page, light or dark; a half transparent blue is seen on both.
_BAR = '<span style="display:inline-block;margin:0 {:.2f}em 0 .5em;{}"></span>'
_FILLED = "width:{:.2f}em;height:.7em;background:#4a90d9b0"
_LONGEST = 5  # em
_FIGURE = re.compile(r"[-\d.,]*%?|not \w+")


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
    # Notebooks put everything to the right, where figures belong alone.
    left = [not all(_FIGURE.fullmatch(row[column]) for row in body) for column in range(len(head))]
    styles = [' style="text-align:left"' if words else "" for words in left]
    titles = "".join(f"<th{style}>{escape(cell)}</th>" for style, cell in zip(styles, head, strict=True))
    lines = [f"<caption>{escape(title)}</caption>"] if title else []
    lines.append(f"<thead><tr>{titles}</tr></thead><tbody>")
    for number, row in enumerate(body):
        cells = [escape(cell) for cell in row]
        if number in marked:
            cells[0] = f"<strong>{cells[0]}</strong>"
        for column, values in (bars or {}).items():
            cells[column] += _bar(values[number], values)
        shown = "".join(f"<td{style}>{cell}</td>" for style, cell in zip(styles, cells, strict=True))
        lines.append(f"<tr>{shown}</tr>")
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return "<div><table>" + "\n".join(lines) + "</tbody></table>" + below + "</div>"


def _bar(value: float | None, values: Sequence[float | None]) -> str:
    longest = max((other for other in values if other is not None and math.isfinite(other)), default=0.0)
    if value is None or not math.isfinite(value) or not 0 < value <= longest:
        return _BAR.format(_LONGEST, "")
    length = _LONGEST * value / longest
    return _BAR.format(_LONGEST - length, _FILLED.format(length))  # figures stay below each other
