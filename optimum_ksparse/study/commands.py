"""The commands of the study, beside those of the library: `optimum_ksparse.__main__` has both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from ..adapters import require_peft
from ..commands.base import DTYPES, LOADING_TEXTS, TRUST, Command, usage
from ..commands.errors import UsageError
from ..pruners.settings import switch
from . import RECIPE_KEYS, Recipe, list_cells, run_study, tabulate_study
from .benchmark import BenchSettings, run
from .benchmark.run import DTYPES as BENCH_DTYPES
from .finetuning import DistillSettings, FinetuningSettings, KoAlpacaSettings, KorQuADSettings
from .finetuning.settings import TUNING_METHODS
from .settings import help_texts


class BenchCommand(Command):
    WORDS = {"checkpoint": "folder or Hub id of a sparse model"}
    SWITCHES = TRUST
    FLAGS = {"what to measure": (help_texts(BenchSettings), BenchSettings)}
    EXAMPLE = "polyglot-ko-5.8b-2of4"
    CHOICES = {"dtype": BENCH_DTYPES}

    def execute(self) -> None:
        settings = self.settings()
        print(run(settings.pop("checkpoint", None), **settings))
        print(f"written to {settings.get('output', BenchSettings.output)}")


_RESUME = {"resume": switch("go on with an unfinished run, or start over", default=True)}
_LOADING_TEXTS = {name: LOADING_TEXTS[name] for name in ("tokenizer", "dtype", "revision")}


class KoAlpacaCommand(Command):
    SETTINGS: type[FinetuningSettings] = KoAlpacaSettings
    MODELS: ClassVar[tuple[str, ...]] = ("model", "tokenizer")
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "output")
    WORDS = {
        "model": "folder or Hub id of a sparse (or a dense) model",
        "output": "folder for the adapter or the model",
    }
    SWITCHES = {"overwrite": "replace a finished run in the output", **TRUST}
    FLAGS = {
        "training": (help_texts(SETTINGS), SETTINGS),
        "loading and saving": ({**_LOADING_TEXTS, **_RESUME},),
    }
    EXAMPLE = "polyglot-ko-5.8b-2of4 koalpaca-2of4"
    CHOICES = {"method": TUNING_METHODS, "dtype": DTYPES}

    def execute(self) -> None:
        given = self.settings()
        with usage():
            settings = self.SETTINGS(**{f.name: given.pop(f.name) for f in fields(self.SETTINGS) if f.name in given})
        require_peft()
        from .finetuning.run import finetune  # needs PEFT

        model, tokenizer, output = given.pop("model"), given.pop("tokenizer", None), given.pop("output")
        record = finetune(model, tokenizer, settings, output, **given)
        if results := record.get("results"):
            print(f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} of {results['num_samples']}")
        for row in record.get("history", ()):
            if "perplexity" in row:
                print(f"perplexity {row['perplexity']:.2f} after step {row['step']}")
        if os.environ.get("RANK", "0") == "0":
            print(f"saved in {output}")


class DistillCommand(KoAlpacaCommand):
    SETTINGS = DistillSettings
    MODELS = ("model", "tokenizer", "teacher")
    REQUIRED = ("model", "output", "teacher")
    FLAGS = {**KoAlpacaCommand.FLAGS, "training": (help_texts(SETTINGS), SETTINGS)}
    EXAMPLE = "gemma-3-270m-2of4 gemma-3-270m-2of4-distilled --teacher google/gemma-3-270m"


class KorQuADCommand(KoAlpacaCommand):
    SETTINGS = KorQuADSettings
    FLAGS = {**KoAlpacaCommand.FLAGS, "training": (help_texts(SETTINGS), SETTINGS)}
    EXAMPLE = "polyglot-ko-5.8b-2of4 korquad-2of4"


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


class StudyCommand(Command):
    MODELS = ("model",)
    KEYS = RECIPE_KEYS
    WORDS = {"recipe": "YAML file: model, output, methods, patterns, calibration, seeds, …"}
    SWITCHES = {
        "dry_run": "list the cells, and what is done",
        "tables_only": "write tables and figures of what is done; run nothing",
    }
    FLAGS = {"in place of what the recipe says": (_TEXTS,), "how to run": (_PROCESSES, Recipe)}
    EXAMPLE = "configs/study/gemma-3-270m.yaml --output study"

    def execute(self) -> None:
        settings = self.settings()
        dry_run, tables_only = (settings.pop(name, False) for name in self.SWITCHES)
        with usage():
            recipe = Recipe.from_dict(settings)
        if dry_run:
            cells = list_cells(recipe)
            for name, (cell, state) in cells.items():
                print(f"{state:7}  {cell}  [{name}]")
            print(f"{sum(state == 'done' for _, state in cells.values())} of {len(cells)} cells are done")
            return
        if not tables_only:
            super().check(settings)
        results = tabulate_study(recipe) if tables_only else run_study(recipe)
        done = f"{len(results.cells)} of {len(results.record.cells)} cells"
        print(f"written to {recipe.output}: tables.md, results.json and figures of {done}")
        if results.failed and not tables_only:
            names = "; ".join(f"{results.record.cells[cell]} (cells/{cell}/log.txt)" for cell in results.failed)
            raise ChildProcessError(f"{len(results.failed)} cells failed: {names}; the same command runs them again")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Not before it is known whether a model is needed."""
        if not self.args.recipe:
            raise UsageError(f"recipe is missing; see {self.parser.prog} --help")

    def merged(self, recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Flags for what stands deeper in the recipe."""
        sets = recipe.get("calibration") or [{}]
        if "dataset" in given and isinstance(sets, list) and all(isinstance(entry, dict) for entry in sets):
            if len({str(entry.get("dataset")) for entry in sets}) > 1:
                raise ValueError("dataset= has no meaning: the recipe compares calibration texts; name them there")
            recipe["calibration"] = [{**entry, "dataset": given["dataset"]} for entry in sets]
        given.pop("dataset", None)
        for name in {"texts", "data_dir"} & given.keys():
            if not isinstance(recipe.get("evaluation"), dict):
                raise ValueError(f"{name}= has no meaning: the recipe has no evaluation")
            recipe["evaluation"] = {**recipe["evaluation"], name: given.pop(name)}
        return super().merged(recipe, given)


_TASKS = {
    "distill": ("Train a sparse model to give a dense one's logits.", DistillCommand),
    "koalpaca": ("Train a model to follow Korean instructions (KoAlpaca).", KoAlpacaCommand),
    "korquad": ("Train a model to find answers in Korean texts (KorQuAD).", KorQuADCommand),
}
COMMANDS: dict[str, tuple[str, Any]] = {
    "finetune": ("Fine-tune a model, or distil a dense one into it.", _TASKS),
    "study": ("Compare methods, patterns and calibration texts.", StudyCommand),
    "bench": ("Measure the speed of sparse layers beside dense ones.", BenchCommand),
}
