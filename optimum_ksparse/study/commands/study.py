"""`optimum-cli ksparse study`."""

from __future__ import annotations

from typing import Any

from ...commands.base import LOADING_TEXTS, Command, usage
from ...commands.recipes import read_recipe
from .. import RECIPE_KEYS, Recipe, list_cells, run_study, tabulate_study

# Keys of the recipe that differ from machine to machine.
_TEXTS = {
    "model": "folder or Hub id of the dense model",
    "output": "folder for the study",
    "texts": "to measure perplexity on",
    "data_dir": "folder of <task>/<split>.jsonl of KoBEST",
    "dataset": "calibration text, or a mix as for prune, where the recipe has one alone",
    **{name: LOADING_TEXTS[name] for name in ("device_map", "revision")},
}
_PROCESSES = {"processes": "cells that run at once"}
_OF_EVALUATION = ("texts", "data_dir")


class StudyCommand(Command):
    MODELS = ("model",)
    WORDS = {"recipe": "YAML file: model, output, methods, patterns, calibration, seeds, …"}
    SWITCHES = {
        "dry_run": "list the cells, and what is done",
        "tables_only": "write tables and figures of what is done; run nothing",
    }
    FLAGS = ((_TEXTS,), (_PROCESSES, Recipe))

    def execute(self) -> None:
        with usage():
            if self.args.recipe is None:
                raise ValueError(f"recipe is missing; see {self.parser.prog} --help")
            settings = self._settings()
            recipe = Recipe.from_dict(settings)
        if self.args.dry_run:
            cells = list_cells(recipe)
            for name, (cell, state) in cells.items():
                print(f"{state:7}  {cell}  [{name}]")
            print(f"{sum(state == 'done' for _, state in cells.values())} of {len(cells)} cells are done")
            return
        if self.args.tables_only:  # which needs no model
            results = tabulate_study(recipe)
        else:
            self.check(settings)
            results = run_study(recipe)
        done = f"{len(results.cells)} of {len(results.record.cells)} cells"
        print(f"written to {recipe.output}: tables.md, results.json and figures of {done}")
        if results.failed and not self.args.tables_only:
            names = "; ".join(f"{results.record.cells[cell]} (cells/{cell}/log.txt)" for cell in results.failed)
            raise ChildProcessError(f"{len(results.failed)} cells failed: {names}; the same command runs them again")

    def _settings(self) -> dict[str, Any]:
        """The recipe, overridden by the flags that were given."""
        recipe = read_recipe(self.args.recipe, RECIPE_KEYS)
        given = self.given([*_TEXTS, *_PROCESSES])
        dataset = given.pop("dataset", None)
        if dataset is not None:
            recipe["calibration"] = _with_dataset(recipe.get("calibration") or [{}], dataset)
        for name in _OF_EVALUATION:
            if name in given:
                if not isinstance(recipe.get("evaluation"), dict):
                    raise ValueError(f"{name}= has no meaning: the recipe has no evaluation")
                recipe["evaluation"] = {**recipe["evaluation"], name: given.pop(name)}
        return {**recipe, **given}


def _with_dataset(sets: Any, dataset: str) -> Any:
    """The calibration sets with this text in each."""
    if not isinstance(sets, list) or not all(isinstance(entry, dict) for entry in sets):
        return sets  # the recipe says what is wrong
    if len({str(entry.get("dataset")) for entry in sets}) > 1:
        raise ValueError("dataset= has no meaning: the recipe compares calibration texts; name them there")
    return [{**entry, "dataset": dataset} for entry in sets]
