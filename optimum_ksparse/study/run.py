"""Running a study: what is done already stays, what is new runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..adapters import require_peft
from ..checkpoint.staging import check_output, claimed
from ..data.texts import evaluation_texts
from ..evaluation.kobest import import_lm_eval
from .files import CELLS, FAILURE_NAME, JOB_NAME, LOG_NAME, RESULT_NAME, clean_cell, write_json
from .grid import Cell, grid
from .output import write_figures, write_tables
from .processes import last_lines, run_cells
from .recipe import Recipe
from .record import RECORD_NAME, Record, make_record
from .results import StudyResults, load_study, read_cells
from .resuming import forget_other_job, forget_sections, measured_sections

_LOCK_NAME = ".lock"

Say = Callable[[str], None]


def run_study(recipe: Recipe, say: Say = print) -> StudyResults:
    """Prunes and measures every cell that is not done yet, each in a process of its own, and writes tables, figures
    and results into `recipe.output`. A study that was cut off, or whose recipe has changed, goes on when it is called
    again; a cell that fails is recorded, and the others go on.

    Args:
        say: is told what is done already, what is new, and which cells fail.

    Raises:
        TypeError, ValueError, FileNotFoundError: the recipe asks for what cannot be, or `output` holds a study of
            another model or one that was measured in another way; before any work.
        BlockingIOError: another study is at work in `output`.
        ImportError: something that measures is not installed.
    """
    cells, output = _checked(recipe), Path(recipe.output)
    record = make_record(recipe, cells)
    with _locked(output):
        earlier = Record.load(output)
        if earlier is not None:
            changed = record.check(earlier, measured_sections(output))
            forget_sections(output, changed)
            for section in changed:
                say(f"{section} is not what it was in the recipe: it takes effect, no cell had come to its end")
        record.save(output)
        results = read_cells(record, output)
        _say_what_is_new(results, earlier, say)
        try:
            _run(recipe, cells, results, say)
        finally:
            results = _write(output)
    return results


def tabulate_study(recipe: Recipe) -> StudyResults:
    """Writes tables, figures and results of the cells of a recipe that are done in its `output`, and runs nothing.
    The study's record has the grid of this recipe then. The model is not looked for; files of calibration texts are.

    Raises:
        FileNotFoundError: `output` holds no study.
        BlockingIOError: another study is at work there; it writes them itself.
    """
    output = Path(recipe.output)
    record = load_study(output).record.with_grid(recipe, grid(recipe))
    with _locked(output):
        record.save(output)
        return _write(output)


def write_study(output: Path) -> StudyResults:
    """The same with the grid of the last run, as the study's record has it."""
    load_study(output)  # raises where there is none, before a lock is left there
    with _locked(output):
        return _write(output)


def _write(output: Path) -> StudyResults:
    results = load_study(output)
    write_tables(results, output)
    write_figures(results, output)
    return results


def list_cells(recipe: Recipe) -> list[tuple[Cell, str]]:
    """The cells, each with "done", "failed", "begun" or "to do", by what lies in the output. Nothing is written, and
    nothing is read of the model."""
    folder = Path(recipe.output) / CELLS
    states = {RESULT_NAME: "done", FAILURE_NAME: "failed", LOG_NAME: "begun"}
    found = []
    for cell in grid(recipe):
        state = next((word for name, word in states.items() if (folder / cell.id / name).is_file()), "to do")
        found.append((cell, state))
    return found


def _checked(recipe: Recipe) -> list[Cell]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study starts its own processes: run it without torchrun, and set processes in the recipe")
    _check_installed(recipe)
    texts = None if recipe.protocol is None else recipe.protocol.texts
    if texts is not None and texts != "kowiki" and not evaluation_texts(texts)[0]:
        raise ValueError(f"evaluation: texts={texts!r} holds no text")
    check_output(recipe.output, reads=(recipe.model,), ours=(RECORD_NAME, CELLS), overwrite=None)
    cells = grid(recipe)
    for cell in cells if recipe.stream else ():
        dataset = (cell.settings or {}).get("dataset") if "dataset" in cell.identity else None
        if dataset == "self" or (isinstance(dataset, Mapping) and "self" in dataset):
            raise ValueError(
                f'cell {cell}: with stream: true no model is in memory to write the text of dataset "self"'
            )
    return cells


def _check_installed(recipe: Recipe) -> None:
    if recipe.protocol is not None and recipe.protocol.kobest_tasks:
        import_lm_eval()
    tunings = (recipe.korquad, None if recipe.nsmc is None else recipe.nsmc["koalpaca"])
    if any(tuning is not None and tuning.get("method") != "full" for tuning in tunings):
        require_peft()


def _locked(output: Path) -> AbstractContextManager[None]:
    busy = f"another study is at work in {output}, and writes its tables as it goes; wait for it, or stop it"
    return claimed(output, _LOCK_NAME, busy)


def _say_what_is_new(results: StudyResults, earlier: Record | None, say: Say) -> None:
    record = results.record
    if earlier is not None:
        say(f"{len(results.cells)} of {len(record.cells)} cells are done already")
        new = [cell for cell in record.cells if cell not in earlier.cells and cell not in results.cells]
        if new:
            say("new in the recipe: " + "; ".join(results.title(cell) for cell in new))
        gone = [cell for cell in earlier.cells if cell not in record.cells]
        if gone:
            names = "; ".join(str(earlier.places(cell)[0]) for cell in gone)
            say(f"no longer in the recipe: {names}")
    if results.left_out:
        say(f"kept in {CELLS}/, but not in the tables: {', '.join(results.left_out)}")
    if results.failed:
        names = "; ".join(results.title(cell) for cell in results.failed)
        say(f"failed before, and runs again: {names}")


def _run(recipe: Recipe, cells: list[Cell], results: StudyResults, say: Say) -> None:
    output = Path(recipe.output)
    for done in results.cells:
        if (output / CELLS / done / JOB_NAME).is_file():  # cut off after its end
            clean_cell(output / CELLS / done, recipe.keep_checkpoints)
    waiting = [cell for cell in cells if cell.id not in results.cells]
    folders = {output / CELLS / cell.id: cell for cell in waiting}
    for folder, cell in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        job = _job(recipe, cell, folder)
        forget_other_job(folder, job)
        write_json(folder / JOB_NAME, job)
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="Cells", unit="cell")

    def ended(folder: Path, status: int) -> None:
        cell = folders[folder]
        if status == 0 and (folder / RESULT_NAME).is_file():
            (folder / FAILURE_NAME).unlink(missing_ok=True)
        else:
            log = last_lines(folder / LOG_NAME)
            write_json(folder / FAILURE_NAME, {"id": cell.id, "status": status, "log": log})
            with bar.external_write_mode():
                say(f"failed: {cell} (status {status}): {(log or ['no output'])[-1]}")
        bar.set_postfix_str(str(cell), refresh=False)
        bar.update()
        write_tables(read_cells(results.record, output), output)

    with bar:
        run_cells(list(folders), recipe.processes, ended)


def _job(recipe: Recipe, cell: Cell, folder: Path) -> dict[str, Any]:
    """All that the process of a cell is told. Its paths are this machine's; it goes with the end of the cell."""
    names = ("dtype", "device_map", "revision", "trust_remote_code")
    job = {
        "id": cell.id,
        "folder": str(folder),
        "identity": cell.identity,
        "settings": cell.settings,
        "model": recipe.model,
        "loading": {name: getattr(recipe, name) for name in names},
        "measuring": recipe.evaluation,
        "korquad": recipe.korquad,
        "nsmc": recipe.nsmc,
        "stream": recipe.stream,
        "keep_checkpoints": recipe.keep_checkpoints,
        "processes": recipe.processes,
    }
    try:
        return dict(json.loads(json.dumps(job)))
    except TypeError as error:
        raise TypeError(f"the recipe holds a value that is neither text, number nor list: {error}") from None
