"""`Recipe`: what a study is to try. Data and validation, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..checks import check_integer, check_keys, check_one_of
from ..config import RECORDED, SETTINGS
from ..dataset import is_mix
from ..evaluation import EvaluationProtocol
from ..pattern import Pattern
from .quantities import QUANTITIES
from .resuming import SECTIONS
from .tuning import KORQUAD_KEYS, NSMC_KEYS, check_korquad, check_nsmc

CALIBRATION = ("dataset", "num_samples", "seq_len", "prepend_bos", "tokenizer")
# Settings of SparsityConfig that stand at one place of a recipe each.
_METHOD = tuple(name for name in SETTINGS if name not in ("pattern", "seed", *RECORDED, *CALIBRATION))
_COMMON = tuple(name for name in _METHOD if name != "method")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SOURCES = ("source", "method")
DENSE = "dense"  # what tables call the dense model


@dataclass(frozen=True)
class Recipe:
    """A study: methods × patterns × calibration sets × seeds.

    Args:
        model: folder or Hub id of a dense model with safetensors. output: folder for all that comes of it.
        dtype, device_map, revision, trust_remote_code: of the dense model, as in `from_pretrained`.
        settings: of `SparsityConfig`, for every cell.
        methods: names of methods, or settings of `SparsityConfig` with a `name`.
        patterns: as in `SparsityConfig`; in YAML in quotes.
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

    Raises:
        TypeError, ValueError, FileNotFoundError: names the key, what was found and what is allowed.
    """

    model: str
    output: str
    methods: list[Any]
    patterns: list[Any]
    dtype: str = "auto"
    device_map: Any = None
    revision: str | None = None
    trust_remote_code: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluation: dict[str, Any] | None = None
    korquad: dict[str, Any] | None = None
    nsmc: dict[str, Any] | None = None
    stream: bool = False
    keep_checkpoints: bool = False
    processes: int = 1
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "output", "dtype"):
            _typed(name, getattr(self, name), str, "a text")
        check_one_of("dtype", self.dtype, _DTYPES)
        for name in ("stream", "keep_checkpoints", "trust_remote_code"):
            _typed(name, getattr(self, name), bool, "true or false")
        check_integer("processes", self.processes, 1)
        for name in ("methods", "patterns", "calibration", "seeds"):
            if not _typed(name, getattr(self, name), list, "a list"):
                raise ValueError(f"{name} is empty: there is nothing to try")
        check_keys(_typed("settings", self.settings, dict, "settings as key: value"), _COMMON, "settings")
        self._set("methods", _methods(self.methods))
        self._set("patterns", _unique("patterns", [pattern_label(pattern) for pattern in self.patterns]))
        self._set("calibration", _calibration(self.calibration))
        for i, seed in enumerate(self.seeds):
            check_integer(f"seeds[{i}]", seed, 0)
        _unique("seeds", self.seeds)
        self._set("published", _published(self.published))
        self._check_measuring()

    def _check_measuring(self) -> None:
        sections = {"evaluation": tuple(f.name for f in fields(EvaluationProtocol))}
        sections |= {"korquad": KORQUAD_KEYS, "nsmc": NSMC_KEYS}
        for name, allowed in sections.items():
            if (found := getattr(self, name)) is not None:
                check_keys(_typed(name, found, dict, "settings as key: value"), allowed, name)
        if self.evaluation is None and self.korquad is None and self.nsmc is None:
            raise ValueError("a study needs one of evaluation, korquad and nsmc: there is nothing to measure")
        _ = self.protocol
        if self.korquad is not None:
            check_korquad(self.korquad)
        if self.nsmc is not None:
            check_nsmc(self.nsmc)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that a YAML file holds. Raises ValueError for an unknown key, naming the nearest, and for a
        missing one."""
        check_keys(settings, RECIPE_KEYS, "the recipe")
        for name in ("model", "output", "methods", "patterns"):
            if settings.get(name) is None:
                raise ValueError(f"the recipe has no {name}")
        for name in SECTIONS:
            if name in settings and settings[name] is None:
                raise ValueError(f"{name} is empty: write {name}: {{}} for the defaults, or leave it out")
        return cls(**settings)

    @property
    def protocol(self) -> EvaluationProtocol | None:
        """What `evaluation` asks for."""
        return None if self.evaluation is None else EvaluationProtocol.from_settings(self.evaluation)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


RECIPE_KEYS = [f.name for f in fields(Recipe)]


def pattern_label(pattern: Any) -> str:
    """A pattern as tables call it, the same for equal ones: `"2:4"`, `"50%"` also for 0.5. Raises TypeError or
    ValueError where it is no pattern."""
    if type(pattern) is int:
        raise ValueError(f"patterns: {pattern} is no pattern; YAML reads 2:4 as a number, write it in quotes: '2:4'")
    parsed = Pattern(pattern)
    blocks = f"/{parsed.block[0]}x{parsed.block[1]}" if parsed.block else ""
    percent = f"{float(100 * parsed.sparsity):.10g}%{blocks}"
    return percent if Pattern(percent) == parsed else str(parsed)


def _methods(found: Sequence[Any]) -> list[dict[str, Any]]:
    methods = []
    for i, entry in enumerate(found):
        where = f"methods[{i}]"
        settings = {"method": entry} if isinstance(entry, str) else _typed(where, entry, dict, "a name or settings")
        check_keys(settings, ["name", *_METHOD], where)
        if not isinstance(settings.get("method"), str):
            raise ValueError(f"{where} has no method: it must name one, such as method: wanda")
        methods.append({**settings, "name": str(settings.get("name", settings["method"]))})
    names = [method["name"] for method in methods]
    if DENSE in _unique("names of methods", names):
        raise ValueError(f"methods[{names.index(DENSE)}]: {DENSE!r} is what tables call the dense model, name it anew")
    return methods


def _calibration(found: Sequence[Any]) -> list[dict[str, Any]]:
    sets = []
    for i, entry in enumerate(found):
        where = f"calibration[{i}]"
        check_keys(_typed(where, entry, dict, "settings as key: value"), ["name", *CALIBRATION], where)
        sets.append({**entry, "name": str(entry.get("name", _name_of(entry)))})
    _unique("names of calibration sets", [entry["name"] for entry in sets])
    return sets


def _name_of(calibration: Mapping[str, Any]) -> str:
    """What tables call calibration data that have no name: without the folder of a file."""
    dataset = calibration.get("dataset", "mc4-ko")
    parts = [f"{weight:g} {_last_part(name)}" for name, weight in dataset.items()] if is_mix(dataset) else []
    size = f"{calibration.get('num_samples', 128)} x {calibration.get('seq_len', 2048)}"
    bos = f", prepend_bos={calibration['prepend_bos']}" if calibration.get("prepend_bos") is not None else ""
    return f"{' + '.join(parts) or _last_part(dataset)} {size}{bos}"


def _last_part(source: Any) -> str:
    return str(source).replace("\\", "/").rsplit("/", 1)[-1]


def _published(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(f"published must be figures as key: value, found {found!r}")
    check_keys(found, [*_SOURCES, *QUANTITIES], "published")
    published: dict[str, Any] = {name: str(found[name]) for name in _SOURCES if name in found}
    for name, values in found.items():
        if name in _SOURCES:
            continue
        labels = {"dense" if key == "dense" else pattern_label(key): value for key, value in _pairs(name, values)}
        for label, value in labels.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"published.{name}.{label} must be a number, found {value!r}")
        published[name] = labels
    return published


def _pairs(name: str, values: Any) -> list[tuple[Any, Any]]:
    return list(_typed(f"published.{name}", values, dict, "values as pattern: value").items())


def _typed(name: str, value: Any, kind: type, words: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, found {value!r}")
    return value


def _unique(name: str, values: list[Any]) -> list[Any]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{name}: {twice!r} comes twice; where two are to differ, give each a name of its own")
    return values
