"""`optimum-cli ksparse study`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from .base import Command, add_flags, dataset, read_recipe

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
        parser.add_argument("recipe", help="YAML file: model, output, methods, patterns, calibration, seeds, …")
        parser.add_argument("--dry-run", dest="dry_run", action="store_true", help="list the cells, and what is done")
        parser.add_argument(
            "--tables-only",
            dest="tables_only",
            action="store_true",
            help="write tables and figures of what is done; run nothing",
        )
        add_flags(parser, _FLAGS)

    def execute(self) -> None:
        settings = self._settings()
        if self.args.tables_only:
            return self._tables(settings)

        from ..study import Recipe, list_cells, run_study

        recipe = Recipe.from_dict(settings)
        if self.args.dry_run:
            cells = list_cells(recipe)
            for cell, state in cells:
                print(f"{state:7}  {cell}  [{cell.id}]")
            done = sum(state == "done" for _, state in cells)
            print(f"{done} of {len(cells)} cells are done")
            return None
        results = run_study(recipe)
        print(f"written to {recipe.output}: tables.md, tables.csv, results.json and figures")
        if results.failed:
            names = "; ".join(f"{results.title(cell)} (cells/{cell}/log.txt)" for cell in results.failed)
            raise ChildProcessError(f"{len(results.failed)} cells failed: {names}; the same command runs them again")
        return None

    def _tables(self, settings: dict[str, Any]) -> None:
        from ..study import load_study, write_figures, write_tables

        if not settings.get("output"):
            raise ValueError("output is missing: name it in the recipe, or with --output")
        from pathlib import Path

        results, output = load_study(settings["output"]), Path(settings["output"])
        write_tables(results, output)
        names = ["tables.md", "tables.csv", "results.json", *write_figures(results, output)]
        print(f"written to {output}: {', '.join(names)}")

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
