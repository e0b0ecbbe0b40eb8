"""The whole benchmark, and its flags."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checkpoint import sparse_modules
from ...checkpoint.model_class import class_for_source
from ...checkpoint.staging import check_output
from ...kernels import GROUPS, Problem
from .figure import FIGURE_NAME, draw_speedup
from .layers import bench_layers
from .models import bench_model, random_model
from .results import RESULTS_NAME, BenchResults
from .shapes import MODELS, layer_shapes, model_config, parse_shape

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
DTYPES = ("bfloat16", "float16", "float32")

FLAGS: dict[str, dict[str, Any]] = {
    "models": {"nargs": "+", "help": f"shapes of models by name: {', '.join(MODELS)} (default: all)"},
    "shapes": {"nargs": "+", "help": "further shapes as OUTxIN, such as 4096x11008"},
    "tokens": {"nargs": "+", "type": int, "help": f"in a product (default: {' '.join(map(str, TOKENS))})"},
    "patterns": {"nargs": "+", "help": "2:4 and 4:8 (default: both; a checkpoint's own)"},
    "dtype": {"choices": DTYPES, "help": "of weights (default: bfloat16; a checkpoint's own)"},
    "whole_models": {"nargs": "+", "help": "models by name to run whole, with random weights"},
    "layers": {"type": int, "help": "blocks of a whole model (default: as many as it has)"},
    "prompt_tokens": {"type": int, "help": "of the prefill of a whole model (default: 1024)"},
    "optimize_for": {"choices": ("memory", "speed"), "help": "of a whole model (default: memory)"},
    "device": {"help": "cuda where there is one, otherwise cpu"},
    "revision": {"help": "branch, tag or commit of the checkpoint (default: main)"},
    "output": {"help": "folder for results.json and speedup.png (default: ksparse-bench)"},
}


def run(checkpoint: str | None = None, **settings: Any) -> BenchResults:
    """Measures layers, then whole models, and writes results and figure into the output folder as it goes: what was
    measured before Ctrl-C stays.

    Args:
        checkpoint: folder or Hub id of a sparse model: its layers, and the model itself beside its dense twin.
        settings: by the names of `FLAGS`.

    Raises:
        ValueError, TypeError: a setting cannot be, before anything is measured.
    """
    chosen = {name: value for name, value in settings.items() if value is not None}
    _check(chosen)
    device = torch.device(chosen.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = Path(chosen.get("output", "ksparse-bench"))
    check_output(output, reads=(checkpoint,), ours=(RESULTS_NAME, FIGURE_NAME), overwrite=None)
    output.mkdir(parents=True, exist_ok=True)
    results = BenchResults.here(device)
    model: Any = None
    if checkpoint is not None:
        where = {name: chosen[name] for name in ("revision", "trust_remote_code") if name in chosen}
        loader = class_for_source(checkpoint, **where)
        model = loader.from_pretrained(checkpoint, dtype=chosen.get("dtype", "auto"), **where)
        model.to(device)
        if not sparse_modules(model):
            raise ValueError(f"{checkpoint} is a dense checkpoint: prune it, or name shapes with --models")
    try:
        for problem in tqdm(_problems(chosen, device, model), desc="Measuring layers", unit="product"):
            results.rows += bench_layers(problem)
            results.save(output)
        _whole_models(results, chosen, device, output, model, checkpoint)
    finally:
        if results.rows or results.models:  # otherwise those of an earlier run stay
            results.save(output)
        draw_speedup(results, output / FIGURE_NAME)
    return results


def _check(settings: Mapping[str, Any]) -> None:
    for name in (*settings.get("models", ()), *settings.get("whole_models", ())):
        model_config(name)
    for shape in settings.get("shapes", ()):
        parse_shape(shape)
    for pattern in settings.get("patterns", ()):
        if pattern not in GROUPS:
            raise ValueError(f"patterns: {pattern!r} has no kernels; allowed: {', '.join(GROUPS)}")
    for number in settings.get("tokens", ()):
        if number < 1:
            raise ValueError(f"tokens: {number} is too small, it must be at least 1")
    if settings.get("dtype", "bfloat16") not in DTYPES:
        raise ValueError(f"dtype={settings['dtype']!r} is not known; allowed: {', '.join(DTYPES)}")
    if settings.get("optimize_for", "memory") not in ("memory", "speed"):
        raise ValueError(f"optimize_for={settings['optimize_for']!r} is not known; allowed: memory, speed")
    if settings.get("layers", 1) < 1 or settings.get("prompt_tokens", 1) < 1:
        raise ValueError("layers and prompt_tokens must be at least 1")
    kind, _, number = str(settings.get("device", "cpu")).partition(":")
    if kind not in ("cuda", "cpu") or not (number or "0").isdigit():
        raise ValueError(f"device={settings['device']!r} is not known; allowed: cpu, cuda, cuda:0 and so on")
    if kind == "cuda" and int(number or "0") >= torch.cuda.device_count():
        raise ValueError(f"device={settings['device']!r}: torch sees no such CUDA GPU here")


def _problems(settings: Mapping[str, Any], device: torch.device, model: Any) -> list[Problem]:
    """Products to measure: of a checkpoint, of models and shapes by name; where none is named, of all models. None
    where whole models alone are asked for."""
    patterns: Sequence[str] = settings.get("patterns", tuple(GROUPS))
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    names = settings.get("models")
    shapes = [parse_shape(shape) for shape in settings.get("shapes", ())]
    if model is not None:
        modules = sparse_modules(model).values()
        shapes += dict.fromkeys((module.out_features, module.in_features) for module in modules)
        patterns = [str(p) for p in dict.fromkeys(str(m.pattern) for m in modules) if str(p) in GROUPS]
        dtype = model.dtype
    elif names is None and not shapes and "whole_models" not in settings:
        names = list(MODELS)
    for name in names or ():
        shapes += layer_shapes(model_config(name))
    products = itertools.product(dict.fromkeys(shapes), patterns, settings.get("tokens", TOKENS))
    device = torch.empty(0, device=device).device  # with its number, as tensors name it
    problems = [Problem(out, in_, tokens, p, dtype, device) for (out, in_), p, tokens in products]
    return [problem for problem in problems if problem.in_features % GROUPS[problem.pattern] == 0]


def _whole_models(
    results: BenchResults,
    settings: Mapping[str, Any],
    device: torch.device,
    output: Path,
    model: Any,
    checkpoint: str | None,
) -> None:
    how = {name: settings[name] for name in ("prompt_tokens", "optimize_for") if name in settings}
    if model is not None:
        results.models.append(bench_model(model, os.path.basename(os.path.normpath(str(checkpoint))), **how))
    for name in settings.get("whole_models", ()):
        config = model_config(name)
        if "layers" in settings:
            config.num_hidden_layers = settings["layers"]
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: settings["layers"]]
        dtype = getattr(torch, settings.get("dtype", "bfloat16"))
        for pattern in settings.get("patterns", ("2:4",)):
            label = name if "layers" not in settings else f"{name} ({settings['layers']} blocks)"
            results.models.append(bench_model(random_model(config, dtype, device), label, pattern, **how))
            results.save(output)
