"""`study.json`: what a study asked for, so that a later call goes on with it and anybody can read its figures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from ..checkpoint import find_weight_files
from ..config import describe_dataset, describe_source
from ..data.texts import describe_texts
from ..dataset import recorded_dataset
from ..evaluation import EvaluationProtocol
from ..evaluation.kobest_data import describe_data
from ..evaluation.nsmc import NUM_FEWSHOT
from ..evaluation.nsmc_data import describe_nsmc
from ..pruning.streaming import Journal
from ..records import As, Positive, RelativePath, Version, read_record
from .files import write_json
from .grid import Cell, Place
from .recipe import Recipe
from .resuming import SECTIONS
from .tuning import training_of

RECORD_NAME = "study.json"
_VERSION = 1
# Of a tuning or a measurement: they move a figure by rounding only.
_ROUNDING = ("batch_size", "micro_batch_size", "gradient_checkpointing", "save_steps")


class _Evaluation(TypedDict, total=False):
    texts: dict[str, Any] | None


class _Job(TypedDict):
    model: str
    weights: str
    dtype: str | None
    evaluation: Annotated[dict[str, Any], As(_Evaluation, is_open=True)] | None
    korquad: dict[str, Any] | None
    nsmc: dict[str, Any] | None


class _Grid(TypedDict):
    methods: list[str]
    patterns: list[str]
    calibration: list[str]
    seeds: list[int]


class _Place(TypedDict):
    method: str
    pattern: str
    calibration: str | None
    seed: int | None


class _Data(TypedDict, total=False):
    dataset: Annotated[Any, recorded_dataset]
    num_samples: Positive
    seq_len: Positive


class _Cell(TypedDict):
    identity: Annotated[dict[str, Any], As(_Data, is_open=True)]
    places: list[_Place]


@dataclass
class Record:
    """What a study asked for.

    Attributes:
        job: the model, its weights, and how it is measured: what all cells share, and what cannot change.
        grid: `methods`, `patterns`, `calibration` and `seeds` of the recipe, by name.
        published: figures to stand beside ours.
        cells: id → `identity` and `places`.
    """

    job: Annotated[dict[str, Any], As(_Job)]
    grid: Annotated[dict[str, list[Any]], As(_Grid)]
    published: Annotated[dict[str, Any], As(dict[str, str | dict[str, float]])]
    cells: dict[RelativePath, Annotated[dict[str, Any], As(_Cell)]]
    version: Annotated[int, Version(_VERSION, _VERSION)] = _VERSION

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_NAME, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """None where there is none. Raises ValueError where it is damaged or of another version."""
        try:
            return read_record(cls, folder / RECORD_NAME, "is damaged", "; name another output")
        except FileNotFoundError:
            return None

    def check_record(self, where: str) -> None:
        """Raises ValueError where what was read from a file has a cell without a place, or without the data that its
        places name, or figures published of nothing."""
        for name, cell in self.cells.items():
            if not cell["places"]:
                raise ValueError(f"cells.{name}.places is empty")
            calibrated = any(place["calibration"] is not None for place in cell["places"])
            for setting in get_type_hints(_Data) if calibrated else ():
                if setting not in cell["identity"]:
                    raise ValueError(f"cells.{name}.identity.{setting} is missing")
        for name, value in self.published.items():
            kind = "str" if name in ("method", "source") else "figures by pattern"
            if isinstance(value, str) != (kind == "str"):
                raise ValueError(f"published.{name} is {value!r}, must be {kind}")

    def check(self, earlier: Record, measured: Collection[str]) -> list[str]:
        """Raises ValueError, naming the differences, where an earlier study measured another model or in another way.

        Args:
            measured: sections of the recipe of which the earlier study has figures. The others may differ.

        Returns:
            The sections that differ.
        """
        ours, theirs = dict(self.job), dict(earlier.job)
        changed = [name for name in SECTIONS if name not in measured and ours[name] != theirs[name]]
        theirs |= {name: ours[name] for name in changed}
        more = [name for name in SECTIONS if (ours[name] is None) != (theirs[name] is None)]
        if more:
            raise ValueError(
                f"cells of this study are done {'without' if theirs[more[0]] is None else 'with'} {' and '.join(more)}"
                ", and their weights are gone: leave the recipe as it was, or name another output"
            )
        if ours["weights"] == theirs["weights"]:  # the same model in another folder
            theirs["model"] = ours["model"]
        differences = Journal(theirs).differences(ours)
        if differences:
            raise ValueError(
                f"the output holds a study of another model, or one that was measured in another way "
                f"({'; '.join(differences)}): its figures cannot stand in one table with new ones; name another output"
            )
        return changed

    def places(self, cell: str) -> list[Place]:
        """Where a cell stands in the grid."""
        return [Place(**place) for place in self.cells[cell]["places"]]

    def with_grid(self, recipe: Recipe, cells: list[Cell]) -> Record:
        """The same model, measured in the same way, with the grid of a recipe."""
        parts = {
            "methods": [method["name"] for method in recipe.methods],
            "patterns": recipe.patterns,
            "calibration": [calibration["name"] for calibration in recipe.calibration],
            "seeds": recipe.seeds,
        }
        found = {
            cell.id: {"identity": cell.identity, "places": [asdict(place) for place in cell.places]} for cell in cells
        }
        return replace(self, grid=parts, published=recipe.published, cells=found)


def make_record(recipe: Recipe, cells: list[Cell]) -> Record:
    """The record of a recipe. Finds the model's weight files, which are downloaded where they are on the Hub.

    Raises:
        OSError, ValueError: there are none, or they are not safetensors.
    """
    hub = {} if recipe.revision is None else {"revision": recipe.revision}
    job = {
        "model": describe_source(recipe.model),
        "weights": find_weight_files(recipe.model, **hub).fingerprint(),
        "dtype": recipe.dtype,
        "evaluation": None if recipe.protocol is None else describe_protocol(recipe.protocol),
        "korquad": None if recipe.korquad is None else _described(recipe.korquad),
        "nsmc": None if recipe.nsmc is None else _described_nsmc(recipe.nsmc),
    }
    return Record(json.loads(json.dumps(job)), {}, {}, {}).with_grid(recipe, cells)


def describe_protocol(protocol: EvaluationProtocol) -> dict[str, Any]:
    """What of a protocol must be equal for two figures to be comparable, files by their SHA-256."""
    data: dict[str, Any] = {
        task: describe_data(task, protocol.data_dir, protocol.num_fewshot) for task in protocol.kobest_tasks
    }
    if "nsmc" in protocol.tasks:
        data["nsmc"] = describe_nsmc(protocol.data_dir, NUM_FEWSHOT)
    names = ("seq_len", "stride", "max_tokens", "num_fewshot", "limit", "prepend_bos")
    texts = None if protocol.texts is None else describe_texts(protocol.texts)
    settings = {name: getattr(protocol, name) for name in names}
    return {"texts": texts, "tasks": list(protocol.tasks), "data": data, **settings}


def _described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a tuning, defaults included, without paths: files by their SHA-256."""
    everything = {**settings, **training_of(settings).to_dict()}
    found = {name: value for name, value in everything.items() if name not in _ROUNDING or name == "batch_size"}
    for name in ("train_file", "eval_file", "data"):
        if isinstance(found.get(name), str) and Path(found[name]).is_file():
            found[name] = describe_dataset(Path(found[name]))
    return found


def _described_nsmc(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in settings.items() if name not in (*_ROUNDING, "data_dir", "koalpaca")}
    data = describe_nsmc(settings.get("data_dir"), NUM_FEWSHOT)
    return {**found, "data": data, "koalpaca": _described(settings["koalpaca"])}
