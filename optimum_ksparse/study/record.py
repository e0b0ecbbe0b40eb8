"""`study.json`: what a study asked for, so that a later call goes on with it and anybody can read its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..checkpoint import find_weight_files
from ..checkpoint.staging import write_text
from ..data.dataset import describe_dataset
from ..data.texts import describe_texts
from ..evaluation import EvaluationProtocol, HarnessTask
from ..records import As, RelativePath, Version, describe_source, differences, read_record, to_json
from .finetuning import FinetuningSettings, KoAlpacaSettings, KorQuADSettings
from .grid import Cell
from .recipe import SECTIONS, Recipe, nsmc_protocol

RECORD_NAME = "study.json"
_VERSION = 2
# Of a tuning or a measurement: they move a figure by rounding only.
_ROUNDING = ("batch_size", "micro_batch_size", "gradient_checkpointing", "save_steps")


class _Grid(TypedDict):
    methods: list[str]
    patterns: list[str]
    calibration: list[str]
    seeds: list[int]


@dataclass
class Record:
    """What a study asked for: in `job` the model, its weights and how it is measured, which all cells share, and which
    cannot change; the grid of the recipe by name; published figures; and cells by id, without their settings, which
    may hold paths."""

    job: dict[str, Any]
    grid: Annotated[dict[str, list[Any]], As(_Grid)]
    published: dict[str, Any]
    cells: dict[RelativePath, Cell]
    version: Annotated[int, Version(_VERSION, _VERSION)] = _VERSION

    def save(self, folder: Path) -> None:
        content = asdict(self)
        for cell in content["cells"].values():
            del cell["settings"]
        write_text(folder / RECORD_NAME, to_json(content, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record in a folder; None without one. Raises ValueError for a damaged one, or another version."""
        try:
            return read_record(cls, folder / RECORD_NAME, "is damaged", "; name another output")
        except FileNotFoundError:
            return None

    def check(self, earlier: Record) -> None:
        """Raises ValueError, naming the differences, where an earlier study, of which cells are done, measured another
        model or in another way."""
        ours, theirs = self.job, dict(earlier.job)
        more = [name for name in SECTIONS if (ours[name] is None) != (theirs.get(name) is None)]
        if more:
            raise ValueError(
                f"cells of this study are done {'with' if ours[more[0]] is None else 'without'} {' and '.join(more)}"
                ", and their weights are gone: leave the recipe as it was, or name another output"
            )
        if ours["weights"] == theirs.get("weights"):  # the same model in another folder
            theirs["model"] = ours["model"]
        if changes := differences(theirs, ours):
            raise ValueError(
                f"the output holds a study of another model, or one that was measured in another way "
                f"({'; '.join(changes)}): its figures cannot stand in one table with new ones; name another output"
            )


def make_record(recipe: Recipe, cells: dict[str, Cell]) -> Record:
    """The record of a recipe. Finds the model's weight files, which are downloaded where they are on the Hub; raises
    OSError or ValueError where there are none, or they are not safetensors."""
    hub = {} if recipe.revision is None else {"revision": recipe.revision}
    nsmc = None
    if recipe.nsmc is not None:
        nsmc = {name: value for name, value in recipe.nsmc.items() if name not in (*_ROUNDING, "data_dir")}
        nsmc["data"] = _describe(nsmc_protocol(recipe.nsmc))["data"]
        nsmc["koalpaca"] = _described(nsmc["koalpaca"], KoAlpacaSettings)
    job = {
        "model": describe_source(recipe.model),
        "weights": find_weight_files(recipe.model, **hub).sha256(),
        "dtype": recipe.dtype,
        "evaluation": None if recipe.protocol is None else _describe(recipe.protocol),
        "korquad": None if recipe.korquad is None else _described(recipe.korquad, KorQuADSettings),
        "nsmc": nsmc,
    }
    return Record(json.loads(json.dumps(job)), recipe.grid, recipe.published, cells)


def _describe(protocol: EvaluationProtocol) -> dict[str, Any]:
    """What of a protocol must be equal for two figures to be comparable, files by their SHA-256."""
    data = {task.name: task.describe_data(protocol) for task in protocol.chosen if isinstance(task, HarnessTask)}
    names = ("seq_len", "stride", "max_tokens", "num_fewshot", "limit", "prepend_bos")
    texts = None if protocol.texts is None else describe_texts(protocol.texts)
    settings = {name: getattr(protocol, name) for name in names}
    return {"texts": texts, "tasks": list(protocol.tasks), "data": data, **settings}


def _described(settings: Mapping[str, Any], kind: type[FinetuningSettings]) -> dict[str, Any]:
    """Settings of a tuning, defaults included, without paths: files by their SHA-256."""
    everything = asdict(kind(**settings))
    described = {name: value for name, value in everything.items() if name not in _ROUNDING or name == "batch_size"}
    for name in ("train_file", "eval_file", "data"):
        if isinstance(described.get(name), str) and Path(described[name]).is_file():
            described[name] = describe_dataset(Path(described[name]))
    return described
