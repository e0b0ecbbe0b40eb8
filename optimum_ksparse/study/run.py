"""Running a study: what is done already stays, what is new runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tqdm.auto import tqdm

from ..adapters import require_peft
from ..checkpoint.staging import check_output, claimed, write_text
from ..data.dataset import holds
from ..data.texts import evaluation_texts
from ..evaluation.harness import import_lm_eval
from ..records import to_json
from .cell import JOB_NAME, TOLD, clean_cell, prepare_cell
from .figures import write_figures
from .grid import Cell, grid
from .processes import LOG_NAME, last_lines, run_cells
from .recipe import Recipe
from .record import RECORD_NAME, Record, make_record
from .results import CELLS, FAILURE_NAME, RESULT_NAME, StudyResults, load_study, read_cells
from .tables import write_tables

Say = Callable[[str], None]


def run_study(recipe: Recipe, say: Say = print) -> StudyResults:
    """Prunes and measures every cell that is not done yet, each in a process of its own, and writes tables, figures
    and results into `recipe.output`. A study that was cut off, or whose recipe has changed, goes on when it is called
    again; a cell that fails is recorded, and the others go on. `say` is told what is done already, and which cells
    fail.

    Raises, before any work, TypeError, ValueError or FileNotFoundError where the recipe asks for what cannot be, or
    `output` holds a study of another model or one that was measured in another way; BlockingIOError where another
    study is at work there; ImportError where something that measures is not installed."""
    cells, output = _checked(recipe), Path(recipe.output)
    record = make_record(recipe, cells)
    with _locked(output):
        earlier = Record.load(output)
        if earlier is not None and any((output / CELLS).glob(f"*/{RESULT_NAME}")):
            record.check(earlier)
        record.save(output)
        results = read_cells(record, output)
        if earlier is not None:
            say(f"{len(results.cells)} of {len(cells)} cells are done already")
        if results.failed:
            say(f"failed before, and runs again: {'; '.join(results.titles(results.failed))}")
        try:
            _run(recipe, cells, results, say)
        finally:
            results = _write(output)
    return results


def tabulate_study(recipe: Recipe) -> StudyResults:
    """Writes tables, figures and results of the cells of a recipe that are done in its `output`, and runs nothing. The
    study's record has the grid of this recipe then. The model is not looked for; files of calibration texts are.
    Raises as `run_study`, and FileNotFoundError where `output` holds no study."""
    output = Path(recipe.output)
    record = Record(load_study(output).record.job, recipe.grid, recipe.published, grid(recipe))
    with _locked(output):
        record.save(output)
        return _write(output)


def list_cells(recipe: Recipe) -> dict[str, tuple[Cell, str]]:
    """The cells by id, each with "done", "failed", "begun" or "to do", by what lies in the output."""
    folder = Path(recipe.output) / CELLS
    states = {RESULT_NAME: "done", FAILURE_NAME: "failed", LOG_NAME: "begun"}
    return {
        name: (cell, next((word for file, word in states.items() if (folder / name / file).is_file()), "to do"))
        for name, cell in grid(recipe).items()
    }


def _write(output: Path) -> StudyResults:
    results = load_study(output)
    write_tables(results, output)
    write_figures(results, output)
    return results


def _locked(output: Path) -> AbstractContextManager[None]:
    busy = f"another study is at work in {output}, and writes its tables as it goes; wait for it, or stop it"
    return claimed(output, ".lock", busy)


def _checked(recipe: Recipe) -> dict[str, Cell]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study starts its own processes: run it without torchrun, and set processes in the recipe")
    if recipe.nsmc is not None or (recipe.protocol is not None and recipe.protocol.tasks):
        import_lm_eval()
    tunings = (recipe.korquad, None if recipe.nsmc is None else recipe.nsmc["koalpaca"])
    if any(tuning is not None and tuning.get("method") != "full" for tuning in tunings):
        require_peft()
    texts = None if recipe.protocol is None else recipe.protocol.texts
    if texts is not None and texts != "kowiki" and not evaluation_texts(texts)[0]:
        raise ValueError(f"evaluation: texts={texts!r} holds no text")
    check_output(recipe.output, reads=(recipe.model,), ours=(RECORD_NAME, CELLS), overwrite=None)
    cells = grid(recipe)
    for cell in cells.values() if recipe.stream else ():
        if "dataset" in cell.identity and holds((cell.settings or {}).get("dataset"), "self"):
            raise ValueError(f'cell {cell}: with stream: true no model is there to write the text of dataset "self"')
    return cells


def _run(recipe: Recipe, cells: dict[str, Cell], results: StudyResults, say: Say) -> None:
    output = Path(recipe.output)
    for done in results.cells:
        if (output / CELLS / done / JOB_NAME).is_file():  # cut off after its end
            clean_cell(output / CELLS / done, recipe.keep_checkpoints)
    folders = {output / CELLS / name: cell for name, cell in cells.items() if name not in results.cells}
    for folder, cell in folders.items():
        told = {name: getattr(recipe, name) for name in TOLD}
        cell_job = {"id": folder.name, "identity": cell.identity, "settings": cell.settings}
        prepare_cell(folder, {**told, **cell_job, "study": results.record.job})
    bar = tqdm(total=len(cells), initial=len(cells) - len(folders), desc="Cells", unit="cell")

    def ended(folder: Path, status: int) -> None:
        if status == 0 and (folder / RESULT_NAME).is_file():
            (folder / FAILURE_NAME).unlink(missing_ok=True)
        else:
            log = last_lines(folder / LOG_NAME)
            write_text(folder / FAILURE_NAME, to_json({"id": folder.name, "status": status, "log": log}))
            with bar.external_write_mode():
                say(f"failed: {folders[folder]} (status {status}): {(log or ['no output'])[-1]}")
        bar.set_postfix_str(str(folders[folder]), refresh=False)
        bar.update()
        write_tables(read_cells(results.record, output), output)

    with bar:
        run_cells(list(folders), recipe.processes, ended)
