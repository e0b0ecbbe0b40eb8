"""Measures the kernels for the layers of a model, and decides which layers keep a second form of their weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.distributed.utils import is_dtensor

from .. import kernels
from ..checkpoint import sparse_layers
from ..nn import SparseLinear

# A layer may take so much of its dense bytes, its mask and the form that shares its values included.
MOST_MEMORY = 0.65
# The form must be so much faster than what the packed weight gives, at some number of tokens, to be worth keeping.
_MARGIN = 0.97


@dataclass
class LayerKernels:
    """Sparse layers of one shape, pattern and dtype on one device, and how they are computed.

    Attributes:
        shape: [out, in]. names: of the layers.
        kernels: tokens → the candidate that is taken. microseconds: tokens → what it takes.
        dense_microseconds: tokens → what `F.linear` takes with a dense weight.
        kept: how many of the layers keep torch's semi-structured form. extra_bytes: of these forms.
    """

    shape: tuple[int, int]
    pattern: str
    dtype: str
    names: list[str]
    kernels: dict[int, str] = field(default_factory=dict)
    microseconds: dict[int, float] = field(default_factory=dict)
    dense_microseconds: dict[int, float] = field(default_factory=dict)
    kept: int = 0
    extra_bytes: int = 0


@dataclass
class KernelReport:
    """What `autotune_kernels` found: `device` in a sentence, and a row for each kind of layer."""

    device: str
    rows: list[LayerKernels] = field(default_factory=list)

    @property
    def extra_bytes(self) -> int:
        return sum(row.extra_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [self.device]
        for row in self.rows:
            kept = f"{row.kept} keep their library form ({row.extra_bytes:,} bytes)" if row.kept else "packed alone"
            lines.append(f"{row.shape[0]} x {row.shape[1]} {row.pattern} {row.dtype}: {len(row.names)} layers, {kept}")
            for tokens, name in row.kernels.items():
                ratio = row.dense_microseconds[tokens] / row.microseconds[tokens]
                lines.append(f"  {tokens:>5} tokens: {row.microseconds[tokens]:9.1f} us, {ratio:5.2f} x dense, {name}")
        return "\n".join(lines)


def autotune_kernels(model: PreTrainedModel, tokens: Sequence[int] = kernels.BUCKETS) -> KernelReport:
    """Measures the kernels for each shape of sparse layer of `model`, where it stands now, and gives layers torch's
    semi-structured form where that pays and shares the values: they take at most 0.65 of their dense bytes. What is
    measured is kept on disk, so that this takes seconds the next time. Without it a rule of thumb chooses the kernels,
    and layers stay packed alone.

    After `model.to("cuda")` call it. The report is `model.kernel_report` too.

    Args:
        tokens: for which numbers of tokens in a forward pass; each stands for those down to the half of it.

    Raises:
        ValueError: the model has no sparse layers, or `tokens` are others than those that are measured.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layers; prune it, or load a sparse checkpoint")
    if not tokens or not set(tokens) <= set(kernels.BUCKETS):
        raise ValueError(f"tokens={list(tokens)!r} must be some of {', '.join(map(str, kernels.BUCKETS))}")
    report = autotune(layers, tuple(tokens))
    model.kernel_report = report  # type: ignore[assignment]
    return report


def autotune(layers: dict[str, SparseLinear], tokens: Sequence[int] = kernels.BUCKETS) -> KernelReport:
    """Measures what has not been measured on this machine, then gives layers torch's semi-structured form where it
    pays and shares the values, so that a layer stays below 0.65 of its dense bytes.

    Args:
        layers: by name.
        tokens: for which numbers of tokens, each a power of two up to 4096.
    """
    groups = _groups(layers)
    device = next((layer.weight.device for layer in layers.values()), torch.device("cpu"))
    report = KernelReport(kernels.describe_device(device))
    problems = [_problems(group[0][1], tokens) for group in groups]
    every = dict.fromkeys(problem for row in problems for problem in row)
    missing = [problem for problem in every if kernels.DENSE not in kernels.measured(problem)]
    for problem in tqdm(missing, desc="Measuring kernels", unit="product", disable=not missing):
        kernels.measure(problem)
    for group, row in zip(groups, problems, strict=True):
        pays = any(map(_library_pays, row))
        for _, layer in group:
            layer.drop_library_form()
            if pays and not is_dtensor(layer.weight):
                _keep_library(layer)
        report.rows.append(_row(group, row))
    return report


def _groups(layers: dict[str, SparseLinear]) -> list[list[tuple[str, SparseLinear]]]:
    """The layers by what their speed depends on; without those that accelerate brings in for each pass."""
    groups: dict[kernels.Problem, list[tuple[str, SparseLinear]]] = {}
    for name, layer in layers.items():
        if not layer.weight.is_meta:
            groups.setdefault(layer.packed().problem(1), []).append((name, layer))
    return list(groups.values())


def _problems(layer: SparseLinear, tokens: Sequence[int]) -> list[kernels.Problem]:
    """What to measure; nothing where there is no choice of kernels."""
    problems = map(layer.packed().problem, tokens)
    return [problem for problem in problems if kernels.has_kernels(problem)]


def _library_pays(problem: kernels.Problem) -> bool:
    times = {name: microseconds for name, (_, microseconds) in kernels.measured(problem).items()}
    packed = [microseconds for name, microseconds in times.items() if name not in (kernels.DENSE, "library")]
    return "library" in times and bool(packed) and times["library"] < _MARGIN * min(packed)


def _keep_library(layer: SparseLinear) -> None:
    """Keeps the form of the library where that has the same values."""
    values, bits, in_features = layer.packed()[:3]
    form = kernels.library_form(values, bits, in_features)
    shared = kernels.shared_values(form, values)
    if shared is not None and form.nbytes + bits.nbytes <= MOST_MEMORY * layer.dense_bytes:
        layer.keep_library_form(form, shared)


def _row(group: list[tuple[str, SparseLinear]], problems: list[kernels.Problem]) -> LayerKernels:
    keeping = [layer for _, layer in group if layer.extra_bytes]
    weight = (keeping[0] if keeping else group[0][1]).packed()
    shape, dtype = (weight.out_features, weight.in_features), str(weight.values.dtype).removeprefix("torch.")
    row = LayerKernels(shape, weight.pattern, dtype, [name for name, _ in group])
    row.kept, row.extra_bytes = len(keeping), sum(layer.extra_bytes for layer in keeping)
    for problem in problems:
        candidate = kernels.choose(weight, problem.tokens)
        times = {name: microseconds for name, (_, microseconds) in kernels.measured(problem).items()}
        row.kernels[problem.tokens] = str(candidate)
        row.microseconds[problem.tokens] = times.get(candidate.kernel, float("nan"))
        row.dense_microseconds[problem.tokens] = times.get(kernels.DENSE, float("nan"))
    return row
