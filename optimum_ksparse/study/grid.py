"""The cells of a study: what the grid of a recipe comes to, with no cell twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import SETTINGS, SparsityConfig
from ..runtime import RuntimeConfig
from .recipe import CALIBRATION, DENSE, RUNTIME, Recipe

# Settings that change nothing in a cell that reads no calibration data.
_OF_DATA = (*CALIBRATION, "seed", "bos_in_statistics", "first_position_share", "calibration_dtype", "true_sequential")
# In an identity even where they are the defaults.
_ALWAYS = ("method", "pattern", "dataset", "num_samples", "seq_len", "seed")


@dataclass(frozen=True)
class Place:
    """Where a cell stands in the grid, by the names in the recipe. `calibration` and `seed` are None for a cell that
    reads no data."""

    method: str
    pattern: str
    calibration: str | None = None
    seed: int | None = None

    def __str__(self) -> str:
        seed = None if self.seed is None else f"seed {self.seed}"
        parts = (self.method, None if self.pattern == self.method else self.pattern, self.calibration, seed)
        return ", ".join(part for part in parts if part is not None)


@dataclass
class Cell:
    """A model to make and measure: its `identity` is what makes it what it is, as JSON holds it (files by SHA-256, no
    paths); several `places` where the grid asks for it more than once; `settings` are arguments of
    `SparsityConfig`, None for the dense model, and where a record was read."""

    identity: dict[str, Any]
    places: list[Place]
    settings: dict[str, Any] | None = None

    def __str__(self) -> str:
        return str(self.places[0])


def grid(recipe: Recipe) -> dict[str, Cell]:
    """The dense model, then all cells, each once, by the names of their folders. Raises what `SparsityConfig` does for
    the settings of a cell, and names the cell."""
    cells = {DENSE: Cell({}, [Place(DENSE, DENSE)])}
    varied = itertools.product(recipe.methods, recipe.patterns, recipe.calibration, recipe.seeds)
    for method, pattern, calibration, seed in varied:
        assert isinstance(method, dict)
        settings = {**recipe.settings, **method, **calibration, "pattern": pattern, "seed": seed}
        del settings["name"]
        place = Place(method["name"], pattern, calibration["name"], seed)
        try:
            identity = identity_of(split_settings(settings)[0])
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise type(error)(f"cell {place}: {error}") from error
        place = place if "dataset" in identity else Place(place.method, place.pattern)
        places = cells.setdefault(_id_of(identity), Cell(identity, [], settings)).places
        places += [place] if place not in places else []
    return cells


def _id_of(identity: Mapping[str, Any]) -> str:
    words = [str(identity["method"]), str(identity["pattern"]).replace(":", "of").replace("%", "pct")]
    words += [f"seed{identity['seed']}"] if "seed" in identity else []
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-")
    return f"{name}-{digest[:10]}"


def identity_of(config: SparsityConfig) -> dict[str, Any]:
    """The settings that decide the figures: as `config.to_dict()`, which describes files by their SHA-256, without
    those by which none changes but for rounding, those that are the defaults (so that a setting which a later version
    adds changes no cell of an earlier one) and, where no data are read, those of calibration."""
    settings, defaults = json.loads(json.dumps(config.to_dict())), SparsityConfig().to_dict()
    defaults |= {name: setting.default for name, setting in config.read_settings.items()}
    counted = {*SETTINGS, *config.method_settings} - {"batch_size", "storage", "method_settings"}
    # The batches are what reconstruction steps by, and what is held out.
    counted |= {"batch_size"} if config.reconstruct is not None else set()
    identity = {name: settings[name] for name in _ALWAYS}
    identity |= {
        name: settings[name] for name in sorted(counted & settings.keys()) if settings[name] != defaults.get(name)
    }
    return {name: value for name, value in identity.items() if config.needs_data or name not in _OF_DATA}


def split_settings(settings: Mapping[str, Any]) -> tuple[SparsityConfig, dict[str, Any]]:
    """What a cell prunes with, and what a recipe says of how its model runs: arguments of `RuntimeConfig`."""
    runtime = {name: value for name, value in settings.items() if name in RUNTIME}
    RuntimeConfig(**runtime)  # checks them
    return SparsityConfig.from_flat(**{k: v for k, v in settings.items() if k not in runtime}), runtime
