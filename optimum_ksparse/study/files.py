"""What lies where in the folder of a study.

| path | what |
|---|---|
| `study.json` | what was asked for (`Record`) |
| `tables.md`, `tables.csv`, `results.json`, `*.png` | what came of it |
| `cells/<id>/result.json` | a finished cell (`CellResult`) |
| `cells/<id>/failure.json`, `log.txt` | how one failed, and what it said |
| `cells/<id>/job.json`, `stages.json`, `checkpoint/`, … | what one that was cut off goes on from |
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_text
from ..records import RESULTS_NAME, read_record, to_json

CELLS = "cells"
JOB_NAME, STAGES_NAME = "job.json", "stages.json"
RESULT_NAME, FAILURE_NAME, LOG_NAME = "result.json", "failure.json", "log.txt"
KORQUAD, KOALPACA = "korquad", "koalpaca"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, to_json(value, indent=1))


def read_stages(cell: Path) -> dict[str, dict[str, Any]]:
    """The stages of a cell that are done, by name; of one that was cut off. Empty where there are none."""
    path = cell / STAGES_NAME
    return read_record(dict[str, dict[str, Any]], path, f"of cell {cell.name} is damaged") if path.is_file() else {}


def clean_cell(folder: Path, keep_checkpoints: bool) -> None:
    """Removes what a finished cell does not need any more; its job last, so that a later call can end what was cut
    off."""
    if not keep_checkpoints:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    for name in (FAILURE_NAME, STAGES_NAME, RESULTS_NAME, JOB_NAME):
        (folder / name).unlink(missing_ok=True)
