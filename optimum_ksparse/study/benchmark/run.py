"""The whole benchmark."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoint import sparse_modules
from ...checkpoint.model_class import load_model
from ...checkpoint.staging import check_output
from ...checks import check_one_of
from ...kernels import GROUPS, Problem
from ...pattern import Pattern
from ...quantization import LIMITS
from ...records import Positive
from ..settings import check_types, setting
from .layers import bench_layers
from .models import MODELS, bench_model, layer_shapes, model_config, parse_shape, random_model
from .results import FIGURE_NAME, RESULTS_NAME, BenchResults, draw_speedup

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class BenchSettings:
    """What to measure. Raises TypeError or ValueError, which names the setting, for what cannot be."""

    models: list[str] | None = setting(None, f"shapes of models by name: {', '.join(MODELS)} (default: all)")
    shapes: list[str] = setting((), "further shapes as OUTxIN, such as 4096x11008 (default: none)")
    tokens: list[Positive] = setting((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096), "in a product")
    patterns: list[str] | None = setting(
        None, "2:4, 4:8 or any other (default: both, on a CPU 0.5 too; a checkpoint's own)"
    )
    values: list[str] = setting((), "quantised ones to measure too: int8, int4 (default: none; a checkpoint's own)")
    dtype: str | None = setting(None, "of weights (default: bfloat16; a checkpoint's own)")
    whole_models: list[str] = setting((), "models by name to run whole, with random weights (default: none)")
    layers: Positive | None = setting(None, "blocks of a whole model (default: as many as it has)")
    prompt_tokens: Positive = setting(1024, "of the prefill of a whole model")
    device: str | None = setting(None, "where it runs (default: cuda where there is one, otherwise cpu)")
    revision: str | None = setting(None, "branch, tag or commit of the checkpoint (default: main)")
    trust_remote_code: bool = False
    output: str = setting("ksparse-bench", "folder for results.json and speedup.png")

    def __post_init__(self) -> None:
        check_types(self)
        for name in (*(self.models or ()), *self.whole_models):
            model_config(name)
        for shape in self.shapes:
            misfits = [Pattern(pattern).misfit(*parse_shape(shape)) for pattern in self.patterns or GROUPS]
            if all(misfits):
                raise ValueError(f"shapes: {shape!r} {misfits[0]}")
        for pattern in self.patterns or ():
            Pattern(pattern)
        for values in self.values:
            check_one_of("values", values, tuple(LIMITS))
        if self.dtype is not None:
            check_one_of("dtype", self.dtype, DTYPES)
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind, _, index = self.device.partition(":")
        if kind not in ("cuda", "cpu") or not (index or "0").isdigit():
            raise ValueError(f"device={self.device!r} is not known; allowed: cpu, cuda, cuda:0 and so on")
        if kind == "cuda" and int(index or "0") >= torch.cuda.device_count():
            raise ValueError(f"device={self.device!r}: torch sees no such CUDA GPU here")


def run(checkpoint: str | None = None, **settings: Any) -> BenchResults:
    """Measures layers, then whole models, and writes results and figure into the output folder as it goes: what was
    measured before Ctrl-C stays. `checkpoint` is the folder or Hub id of a sparse model: its layers, and the model
    itself beside its dense twin; the settings are those of `BenchSettings`."""
    chosen = BenchSettings(**settings)
    output = Path(chosen.output)
    check_output(output, reads=(checkpoint,), ours=(RESULTS_NAME, FIGURE_NAME), overwrite=None)
    output.mkdir(parents=True, exist_ok=True)
    results = BenchResults.here(torch.device(chosen.device or "cpu"))
    model = None if checkpoint is None else _load(checkpoint, chosen)
    try:
        for problem in tqdm(_problems(chosen, model), desc="Measuring layers", unit="product"):
            results.rows += bench_layers(problem)
            results.save(output)
        for row in _whole_models(chosen, model, checkpoint):
            results.models.append(row)
            results.save(output)
    finally:
        draw_speedup(results, output / FIGURE_NAME)
    return results


def _load(checkpoint: str, settings: BenchSettings) -> Any:
    how = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code or None}
    model = load_model(checkpoint, dtype=settings.dtype, **how).to(settings.device)
    if not sparse_modules(model):
        raise ValueError(f"{checkpoint} is a dense checkpoint: prune it, or name shapes with --models")
    return model


def _problems(settings: BenchSettings, model: Any) -> list[Problem]:
    """Products to measure: of a checkpoint, of models and shapes by name; where none is named, of all models. None
    where whole models alone are asked for."""
    patterns: Sequence[str] = settings.patterns or (*GROUPS, *(["50%"] if settings.device == "cpu" else []))
    values: Sequence[str | None] = (None, *settings.values)
    dtype = getattr(torch, settings.dtype or "bfloat16")
    shapes = [parse_shape(shape) for shape in settings.shapes]
    names: Sequence[str] = settings.models or ()
    if model is not None:
        modules = sparse_modules(model).values()
        shapes += [(module.out_features, module.in_features) for module in modules]
        patterns = list(dict.fromkeys(str(module.pattern) for module in modules))
        values = list(dict.fromkeys(module.values for module in modules))
        dtype = model.dtype
    elif settings.models is None and not shapes and not settings.whole_models:
        names = MODELS
    shapes += [shape for name in names for shape in layer_shapes(model_config(name))]
    device = torch.empty(0, device=settings.device).device  # with its number, as tensors name it
    products = itertools.product(dict.fromkeys(shapes), patterns, values, settings.tokens)
    return [
        Problem(shape[0], shape[1], tokens, pattern, dtype, device, value_type)
        for shape, pattern, value_type, tokens in products
        if not Pattern(pattern).misfit(*shape)
    ]


def _whole_models(settings: BenchSettings, model: Any, checkpoint: str | None) -> Iterator[dict[str, Any]]:
    """A row for each."""
    how: dict[str, Any] = {"prompt_tokens": settings.prompt_tokens}
    if model is not None:
        yield bench_model(model, os.path.basename(os.path.normpath(str(checkpoint))), **how)
    dtype = getattr(torch, settings.dtype or "bfloat16")
    variants = itertools.product(settings.whole_models, settings.patterns or ("2:4",), (None, *settings.values))
    for name, pattern, values in variants:
        config, label = model_config(name), name
        if settings.layers is not None:
            config.num_hidden_layers, label = settings.layers, f"{name} ({settings.layers} blocks)"
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: settings.layers]
        made = random_model(config, dtype, torch.device(settings.device or "cpu"))
        yield bench_model(made, label, pattern, values=values, **how)
