"""`Recipe`: what a study is to try. Data and validation, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from ..checks import check_keys, check_one_of
from ..config import FLAT_SETTINGS
from ..data.dataset import is_mix
from ..evaluation import EvaluationProtocol
from ..pattern import Pattern
from ..quantization import LIMITS
from ..records import Count, Positive, build
from ..runtime import RuntimeConfig
from .finetuning import KoAlpacaSettings, KorQuADSettings, study_settings
from .finetuning.instructions import instruction_rows, is_file
from .finetuning.korquad.data import korquad_data
from .quantities import QUANTITIES

CALIBRATION = ("dataset", "num_samples", "seq_len", "prepend_bos", "tokenizer")
DENSE = "dense"  # what tables call the dense model
# Sections of a recipe, each of which measures something, and their settings.
SECTIONS = {
    "evaluation": tuple(f.name for f in fields(EvaluationProtocol)),
    "korquad": tuple(f.name for f in fields(KorQuADSettings)),
    "nsmc": ("koalpaca", "data_dir", "limit", "batch_size", "prepend_bos"),
}
# Settings of SparsityConfig that stand at one place of a recipe each.
RUNTIME = tuple(f.name for f in fields(RuntimeConfig))
_METHOD = (*(name for name in FLAT_SETTINGS if name not in ("pattern", "seed", *CALIBRATION)), *RUNTIME)
_COMMON = tuple(name for name in _METHOD if name != "method")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SOURCES = ("source", "method")

Settings = dict[str, Any]


@dataclass
class Recipe:
    """A study: methods × values × patterns × calibration sets × seeds. Made by `from_dict`, which checks it.

    Args:
        model: folder or Hub id of a dense model with safetensors. output: folder for all that comes of it.
        methods: names of methods, or settings of `SparsityConfig` with a `name`.
        patterns: as in `SparsityConfig`; in YAML in quotes.
        dtype, device_map, revision, trust_remote_code: of the dense model, as in `from_pretrained`.
        settings: of `SparsityConfig`, for every cell.
        values: how kept values are stored, as in `SparsityConfig`: with `[null, int8]` a method `admm` is there as
            `admm` and as `admm int8`.
        calibration: each a `dataset`, `num_samples`, `seq_len`, `prepend_bos`, `tokenizer`, and perhaps a `name`.
        seeds: of the calibration samples.
        evaluation: settings of `EvaluationProtocol`; None measures neither perplexity nor KoBEST.
        korquad: settings of `finetune korquad`, for LoRA on every model and exact match and F1 after it.
        nsmc: `koalpaca`, settings of `finetune koalpaca`, with which every model is tuned before NSMC is measured, and
            `data_dir`, `limit`, `batch_size`, `prepend_bos` of that.
        stream: prune from disk to disk, with `prune_checkpoint`.
        keep_checkpoints: keep pruned weights and adapters, instead of deleting them when the cell is measured.
        processes: cells that run at once.
        published: figure (such as `perplexity`, `kobest_mean_f1`, in the units of the tables) → "dense" or pattern →
            value, to stand beside ours; and `source` and `method`, which say whose they are.
    """

    model: str
    output: str
    methods: list[str | Settings]
    patterns: list[Any]
    dtype: str = "auto"
    device_map: Any = None
    revision: str | None = None
    trust_remote_code: bool = False
    settings: Settings = field(default_factory=dict)
    values: list[str | None] = field(default_factory=lambda: [None])
    calibration: list[Settings] = field(default_factory=lambda: [{}])
    seeds: list[Count] = field(default_factory=lambda: [0])
    evaluation: Settings | None = None
    korquad: Settings | None = None
    nsmc: Settings | None = None
    stream: bool = False
    keep_checkpoints: bool = False
    processes: Positive = 1
    published: Settings = field(default_factory=dict)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that a YAML file holds. Raises TypeError, ValueError or FileNotFoundError, which name the key,
        what was found and what is allowed; of an unknown key the nearest."""
        check_keys(settings, RECIPE_KEYS, "the recipe")
        for name in SECTIONS:
            if name in settings and settings[name] is None:
                raise ValueError(f"{name} is empty: write {name}: {{}} for the defaults, or leave it out")
        recipe: Recipe = build(cls, dict(settings))
        return recipe

    def check_record(self, where: str) -> None:
        """Completes names, and checks what types do not say."""
        check_one_of("dtype", self.dtype, _DTYPES)
        check_keys(self.settings, _COMMON, "settings")
        methods = [_method(f"methods[{i}]", entry) for i, entry in enumerate(self.methods)]
        self.methods = [with_values for entry in methods for with_values in self._with_values(entry)]
        self.patterns = [pattern_label(pattern) for pattern in self.patterns]
        self.calibration = [_calibration(f"calibration[{i}]", entry) for i, entry in enumerate(self.calibration)]
        for part, names in {"values": self.values, **self.grid}.items():
            if not names:
                raise ValueError(f"{part} is empty: there is nothing to try")
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise ValueError(f"{part}: {twice[0]!r} comes twice; to differ, each needs a name of its own")
        if DENSE in self.grid["methods"]:
            raise ValueError(f"methods: {DENSE!r} is what tables call the dense model, name it anew")
        self.published = _published(self.published)
        self._check_sections()

    def _with_values(self, method: Settings) -> list[Settings]:
        """A method with each type of values, which is part of its name."""
        for values in filter(None, self.values):
            check_one_of("values", values, tuple(LIMITS))
        if self.values == [None]:
            return [method]
        if "values" in {**self.settings, **method}:
            where = f"method {method['name']} and settings"
            raise ValueError(f"values={self.values} are tried: leave values out of {where}")
        return [
            {**method, "name": f"{method['name']} {values}", "values": values} if values else method
            for values in self.values
        ]

    def _check_sections(self) -> None:
        for name, allowed in SECTIONS.items():
            check_keys(getattr(self, name) or {}, allowed, name)
        if all(getattr(self, name) is None for name in SECTIONS):
            raise ValueError(f"a study needs one of {', '.join(SECTIONS)}: there is nothing to measure")
        _ = self.protocol
        if self.korquad is not None:
            korquad = study_settings(KorQuADSettings, self.korquad, "korquad")
            _ = None if korquad.train_file is None else korquad_data(korquad)
        if self.nsmc is not None:
            koalpaca = study_settings(KoAlpacaSettings, self.nsmc.get("koalpaca"), "nsmc.koalpaca")
            _ = instruction_rows(koalpaca.data, 1) if is_file(koalpaca.data) else None
            nsmc_protocol(self.nsmc)

    @property
    def grid(self) -> dict[str, list[Any]]:
        """What is varied, by name."""
        methods, calibration = ([entry["name"] for entry in part] for part in (self.methods, self.calibration))  # type: ignore[index]
        return {"methods": methods, "patterns": self.patterns, "calibration": calibration, "seeds": self.seeds}

    @property
    def protocol(self) -> EvaluationProtocol | None:
        """What `evaluation` asks for."""
        return None if self.evaluation is None else EvaluationProtocol.from_settings(self.evaluation)


RECIPE_KEYS = [f.name for f in fields(Recipe)]


def nsmc_protocol(settings: Mapping[str, Any]) -> EvaluationProtocol:
    """What `nsmc` asks to be measured after tuning."""
    chosen = {name: value for name, value in settings.items() if name != "koalpaca"}
    return EvaluationProtocol(texts=None, tasks=("nsmc",), **chosen)


def pattern_label(pattern: Any) -> str:
    """A pattern as tables call it, the same for equal ones: `"2:4"`, `"50%"` also for 0.5. Raises TypeError or
    ValueError where it is no pattern."""
    if type(pattern) is int:
        raise ValueError(f"patterns: {pattern} is no pattern; YAML reads 2:4 as a number, write it in quotes: '2:4'")
    parsed = Pattern(pattern)
    tile = f"/{parsed.tile[0]}x{parsed.tile[1]}" if parsed.tile else ""
    percent = f"{float(100 * parsed.sparsity):.10g}%{tile}"
    return percent if Pattern(percent) == parsed else str(parsed)


def _method(where: str, entry: str | Settings) -> Settings:
    settings = {"method": entry} if isinstance(entry, str) else entry
    check_keys(settings, ["name", *_METHOD], where)
    if not isinstance(settings.get("method"), str):
        raise ValueError(f"{where} has no method: it must name one, such as method: wanda")
    return {**settings, "name": str(settings.get("name", settings["method"]))}


def _calibration(where: str, entry: Settings) -> Settings:
    """Checks a calibration set, and gives it a name for tables, by data (a file without its folder) and size."""
    check_keys(entry, ["name", *CALIBRATION], where)
    dataset = entry.get("dataset", "mc4-ko")
    parts = [f"{weight:g} {PurePath(name).name}" for name, weight in dataset.items()] if is_mix(dataset) else []
    size = f"{entry.get('num_samples', 128)} x {entry.get('seq_len', 2048)}"
    bos = f", prepend_bos={entry['prepend_bos']}" if entry.get("prepend_bos") is not None else ""
    name = f"{' + '.join(parts) or PurePath(str(dataset)).name} {size}{bos}"
    return {**entry, "name": str(entry.get("name", name))}


def _published(published: Settings) -> Settings:
    check_keys(published, [*_SOURCES, *QUANTITIES], "published")
    labelled: Settings = {name: str(published[name]) for name in _SOURCES if name in published}
    for name in published.keys() - _SOURCES:
        values = build(dict[str, float], published[name], f"published.{name}")
        labelled[name] = {DENSE if key == DENSE else pattern_label(key): value for key, value in values.items()}
    return labelled
