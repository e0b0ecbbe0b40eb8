"""What scripts share that measure a model by cells: its arguments, the texts, and results that a run goes on from."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import english

Row = dict[str, Any]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the model, the texts and the file of results; scripts add what they vary."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "validation"):
        parser.add_argument(name)
    parser.add_argument("results", type=Path)
    return parser


def texts_of(args: argparse.Namespace) -> tuple[str | list[str], str | list[str]]:
    """Calibration and validation: files of texts, or Python's own documentation where they are `english`."""
    calibration = english.CALIBRATION if args.calibration == "english" else args.calibration
    return calibration, english.VALIDATION if args.validation == "english" else args.validation


def fill(args: argparse.Namespace, cells: Iterable[Row], measure: Callable[[Row], Row]) -> list[Row]:
    """Rows of all cells of the model: those that the results (JSON lines) lack are measured, and added one by one."""
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows: list[Row] = [json.loads(line) for line in lines]
    for cell in ({"model": Path(args.model).name, **cell} for cell in cells):
        if not any(cell.items() <= row.items() for row in rows):
            rows.append({**cell, **measure(cell)})
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows
