"""What a study that is called again goes on from, and what it has to begin anew."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..records import RESULTS_NAME, read_record
from .files import CELLS, JOB_NAME, KOALPACA, KORQUAD, RESULT_NAME, read_stages

# Section of a recipe → the stage of a cell that measures it.
SECTIONS = {"evaluation": "measuring", "korquad": "korquad", "nsmc": "nsmc"}
# Stage → what of the job what it goes on from must agree with, and where that lies. What was measured tells by itself.
_BEGUN: dict[str, tuple[tuple[str, ...], str]] = {
    "pruning": (("settings", "stream"), "checkpoint"),
    "measuring": ((), RESULTS_NAME),
    "korquad": (("model", "folder", "korquad"), KORQUAD),
    "nsmc": (("model", "folder", "nsmc"), KOALPACA),
}


def measured_sections(output: Path) -> set[str]:
    """Sections of the recipe of which any cell in the folder of a study has figures; a finished cell is measured
    wholly."""
    cells = list((output / CELLS).glob("*"))
    if any((cell / RESULT_NAME).is_file() for cell in cells):
        return set(SECTIONS)
    done = {stage for cell in cells for stage in read_stages(cell)}
    return {section for section, stage in SECTIONS.items() if stage in done}


def forget_sections(output: Path, sections: Collection[str]) -> None:
    """Removes what all cells would go on from in the stages that measure some sections."""
    for cell in (output / CELLS).glob("*") if sections else ():
        for section in sections:
            _remove(cell / _BEGUN[SECTIONS[section]][1])


def forget_other_job(cell: Path, job: Mapping[str, Any]) -> None:
    """Removes what an unfinished cell would go on from in stages that were begun with other settings: settings that
    move a figure by rounding only make no other cell, but what was begun would be refused."""
    if not (cell / JOB_NAME).is_file():
        return
    earlier, done = read_record(dict[str, Any], cell / JOB_NAME, "is damaged"), read_stages(cell)
    for stage, (keys, name) in _BEGUN.items():
        if stage not in done and any(earlier.get(key) != job[key] for key in keys):
            _remove(cell / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
