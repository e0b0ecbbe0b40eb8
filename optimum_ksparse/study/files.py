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

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..report import RESULTS_NAME
from ..staging import write_text

CELLS = "cells"
JOB_NAME, STAGES_NAME = "job.json", "stages.json"
RESULT_NAME, FAILURE_NAME, LOG_NAME = "result.json", "failure.json", "log.txt"
KORQUAD, KOALPACA = "korquad", "koalpaca"
# Section of a recipe → the stage of a cell that measures it, and what that stage goes on from.
MEASURING = {"evaluation": ("measuring", RESULTS_NAME), "korquad": ("korquad", KORQUAD), "nsmc": ("nsmc", KOALPACA)}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_stages(cell: Path) -> dict[str, dict[str, Any]]:
    """The stages of a cell that are done, by name; of one that was cut off. Empty where there are none."""
    path = cell / STAGES_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measured_sections(output: Path) -> set[str]:
    """Sections of the recipe of which any cell in the folder of a study has figures; a finished cell is measured
    wholly."""
    cells = list((output / CELLS).glob("*"))
    if any((cell / RESULT_NAME).is_file() for cell in cells):
        return set(MEASURING)
    done = {stage for cell in cells for stage in read_stages(cell)}
    return {section for section, (stage, _) in MEASURING.items() if stage in done}


def begin_sections_anew(output: Path, sections: Iterable[str]) -> None:
    """Removes what cells would go on from in the stages that measure some sections."""
    for section in sections:
        for path in (output / CELLS).glob(f"*/{MEASURING[section][1]}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def clean_cell(folder: Path, keep_checkpoints: bool) -> None:
    """Removes what a finished cell does not need any more; its job last, so that a later call can end what was cut
    off."""
    if not keep_checkpoints:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    for name in (FAILURE_NAME, STAGES_NAME, RESULTS_NAME, JOB_NAME):
        (folder / name).unlink(missing_ok=True)
