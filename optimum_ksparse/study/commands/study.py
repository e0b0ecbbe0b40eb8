"""`optimum-cli ksparse study`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...commands.base import LOADING_TEXTS, Command, add_loading, usage
from ...commands.parser import Parser, add_switches, dataset
from ...commands.recipes import read_recipe

if TYPE_CHECKING:
    from .. import Recipe

# Keys of the recipe that differ from machine to machine.
_TEXTS = {
    "model": "folder or Hub id of the dense model",
    "output": "folder for the study",
    "texts": "to measure perplexity on",
    "data_dir": "folder of <task>/<split>.jsonl of KoBEST",
    **{name: LOADING_TEXTS[name] for name in ("device_map", "revision")},
}
_KEYS = (*_TEXTS, "dataset", "processes")
_OF_EVALUATION = ("texts", "data_dir")


class StudyCommand(Command):
    MODELS = ("model",)

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        parser.add_argument("recipe", help="YAML file: model, output, methods, patterns, calibration, seeds, …")
        add_switches(
            parser,
            {
                "dry_run": "list the cells, and what is done",
                "tables_only": "write tables and figures of what is done; run nothing",
            },
        )
        add_loading(parser, _TEXTS)
        text = "calibration text, or a mix as for prune, where the recipe has one alone"
        parser.add_argument("--dataset", type=dataset, metavar="VALUE", help=text)
        parser.add_argument("--processes", type=int, metavar="N", help="cells that run at once")

    def execute(self) -> None:
        from .. import Recipe, run_study, tabulate_study

        with usage():
            settings = self._settings()
            recipe = Recipe.from_dict(settings)
        if self.args.dry_run:
            return self._list(recipe)
        if self.args.tables_only:  # which needs no model
            results = tabulate_study(recipe)
        else:
            self.check(settings)
            results = run_study(recipe)
        done = f"{len(results.cells)} of {len(results.record.cells)} cells"
        print(f"written to {recipe.output}: tables.md, tables.csv, results.json and figures of {done}")
        if results.failed and not self.args.tables_only:
            names = "; ".join(f"{results.record.cells[cell]} (cells/{cell}/log.txt)" for cell in results.failed)
            raise ChildProcessError(f"{len(results.failed)} cells failed: {names}; the same command runs them again")
        return None

    @staticmethod
    def _list(recipe: Recipe) -> None:
        from .. import list_cells

        cells = list_cells(recipe)
        for name, (cell, state) in cells.items():
            print(f"{state:7}  {cell}  [{name}]")
        print(f"{sum(state == 'done' for _, state in cells.values())} of {len(cells)} cells are done")

    def _settings(self) -> dict[str, Any]:
        """The recipe, overridden by the flags that were given."""
        from .. import RECIPE_KEYS

        recipe = read_recipe(self.args.recipe, RECIPE_KEYS)
        given = self.given(_KEYS)
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
