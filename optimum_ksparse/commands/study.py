"""`optimum-cli ksparse study`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Command, add_flags, dataset, read_recipe

if TYPE_CHECKING:
    from ..study import Recipe

# Keys of the recipe that differ from machine to machine: name → argparse arguments.
_FLAGS: dict[str, dict[str, Any]] = {
    "model": {"help": "folder or Hub id of the dense model"},
    "output": {"help": "folder for the study"},
    "dataset": {"type": dataset, "help": "calibration text, or a mix as for prune, where the recipe has one alone"},
    "texts": {"help": "to measure perplexity on"},
    "data_dir": {"help": "folder of <task>/<split>.jsonl of KoBEST"},
    "device_map": {"help": "as in from_pretrained: auto, cpu, cuda:0, …"},
    "processes": {"type": int, "help": "cells that run at once"},
}
_OF_EVALUATION = ("texts", "data_dir")


class StudyCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "recipe",
            nargs="?",
            help="YAML file: model, output, methods, patterns, calibration, seeds, …; with --tables-only and --output "
            "it may be left out: then the grid is the one of the study's last run",
        )
        parser.add_argument("--dry-run", dest="dry_run", action="store_true", help="list the cells, and what is done")
        parser.add_argument(
            "--tables-only",
            dest="tables_only",
            action="store_true",
            help="write tables and figures of what is done; run nothing",
        )
        add_flags(parser, _FLAGS)

    def execute(self) -> None:
        from ..study import Recipe, run_study

        if self.args.recipe is None:
            return self._tables(None)
        recipe = Recipe.from_dict(self._settings())
        if self.args.tables_only:
            return self._tables(recipe)
        if self.args.dry_run:
            return self._list(recipe)
        results = run_study(recipe)
        print(f"written to {recipe.output}: tables.md, tables.csv, results.json and figures")
        if results.failed:
            names = "; ".join(f"{results.title(cell)} (cells/{cell}/log.txt)" for cell in results.failed)
            raise ChildProcessError(f"{len(results.failed)} cells failed: {names}; the same command runs them again")
        return None

    def _tables(self, recipe: Recipe | None) -> None:
        from ..study import tabulate_study, write_study

        output = self.args.output if recipe is None else recipe.output
        if recipe is None and not (self.args.tables_only and output):
            raise ValueError("name a recipe; only --tables-only with --output FOLDER does without one")
        results = write_study(Path(output)) if recipe is None else tabulate_study(recipe)
        print(
            f"written to {output}: tables.md, tables.csv, results.json and figures of {len(results.cells)} of "
            f"{len(results.record.cells)} cells"
        )

    @staticmethod
    def _list(recipe: Recipe) -> None:
        from ..study import list_cells

        cells = list_cells(recipe)
        for cell, state in cells:
            print(f"{state:7}  {cell}  [{cell.id}]")
        done = sum(state == "done" for _, state in cells)
        print(f"{done} of {len(cells)} cells are done")

    def _settings(self) -> dict[str, Any]:
        """The recipe, overridden by the flags that were given."""
        from ..study import RECIPE_KEYS

        recipe = read_recipe(self.args.recipe, RECIPE_KEYS)
        given = {name: getattr(self.args, name) for name in _FLAGS if getattr(self.args, name) is not None}
        dataset = given.pop("dataset", None)
        if dataset is not None:
            recipe["calibration"] = _with_dataset(recipe.get("calibration") or [{}], dataset)
        for name in _OF_EVALUATION:
            if name in given:
                if not isinstance(recipe.get("evaluation"), dict):
                    raise ValueError(f"--{name.replace('_', '-')} has no meaning: the recipe has no evaluation")
                recipe["evaluation"] = {**recipe["evaluation"], name: given.pop(name)}
        return {**recipe, **given}


def _with_dataset(sets: Any, dataset: str) -> Any:
    """The calibration sets with this text in each."""
    if not isinstance(sets, list) or not all(isinstance(entry, dict) for entry in sets):
        return sets  # the recipe says what is wrong
    if len({str(entry.get("dataset")) for entry in sets}) > 1:
        raise ValueError("--dataset has no meaning: the recipe compares calibration texts; name them there")
    return [{**entry, "dataset": dataset} for entry in sets]
