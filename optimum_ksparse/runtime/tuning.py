"""Measures the kernels for the layers of a model, and decides which layers keep a second form of their weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm.auto import tqdm

from .. import kernels
from ..nn.linear import SparseLinear

# "memory" lets a layer take so much of its dense bytes, its mask and the forms that share its values included.
MOST_MEMORY = 0.65
# A form must be so much faster than what the packed weight gives, at some number of tokens, to be worth keeping.
_MARGIN = 0.97


@dataclass
class LayerKernels:
    """Sparse layers of one shape, pattern and dtype on one device, and how they are computed.

    Attributes:
        shape: [out, in]. names: of the layers.
        kernels: tokens → the candidate that is taken. microseconds: tokens → what it takes.
        dense_microseconds: tokens → what `F.linear` takes with a dense weight.
        form: what the layers keep beside the packed weight: "library", "dense" or None. kept: how many of them do.
        extra_bytes: of these forms, over all layers.
    """

    shape: tuple[int, int]
    pattern: str
    dtype: str
    names: list[str]
    kernels: dict[int, str] = field(default_factory=dict)
    microseconds: dict[int, float] = field(default_factory=dict)
    dense_microseconds: dict[int, float] = field(default_factory=dict)
    form: str | None = None
    kept: int = 0
    extra_bytes: int = 0


@dataclass
class KernelReport:
    """What `autotune_kernels` found: `device` in a sentence, and a row for each kind of layer."""

    device: str
    optimize_for: str
    rows: list[LayerKernels] = field(default_factory=list)

    @property
    def extra_bytes(self) -> int:
        return sum(row.extra_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [self.device]
        for row in self.rows:
            kept = f"{row.kept} keep their {row.form} form ({row.extra_bytes:,} bytes)" if row.kept else "packed alone"
            lines.append(f"{row.shape[0]} x {row.shape[1]} {row.pattern} {row.dtype}: {len(row.names)} layers, {kept}")
            for tokens, name in row.kernels.items():
                ratio = row.dense_microseconds[tokens] / row.microseconds[tokens]
                lines.append(f"  {tokens:>5} tokens: {row.microseconds[tokens]:9.1f} us, {ratio:5.2f} x dense, {name}")
        if self.rows:
            lines.append(f"optimize_for={self.optimize_for!r}: {self.extra_bytes:,} bytes beside the packed weights")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Option:
    """A form that a layer may keep: what it saves (microseconds over all numbers of tokens) for how many bytes."""

    layer: str
    form: str
    saved: float
    nbytes: int


def autotune(
    layers: dict[str, SparseLinear],
    tokens: Sequence[int] = kernels.BUCKETS,
    *,
    optimize_for: str = "memory",
    max_extra_bytes: int | None = None,
) -> KernelReport:
    """Measures what has not been measured on this machine, then gives layers the forms that pay.

    "memory": torch's semi-structured tensor where it shares the values, so that a layer stays below 0.65 of its dense
    bytes. "speed": that, or a dense weight, layer by layer where it saves most, within `max_extra_bytes` in all; where
    there are no kernels, dense weights.

    Args:
        layers: by name.
        tokens: for which numbers of tokens, each a power of two up to 4096.
        optimize_for, max_extra_bytes: as in `RuntimeConfig`.
    """
    groups = _groups(layers)
    device = next((layer.weight.device for layer in layers.values()), torch.device("cpu"))
    patterns = {str(layer.pattern) for layer in layers.values()}
    report = KernelReport(kernels.describe_device(device, patterns), optimize_for)
    problems = {kind: _problems(layers[names[0]], tokens) for kind, names in groups.items()}
    fused = [replace(p, out_features=rows) for p, rows in _fused_rows(layers, groups, problems)]
    wanted = [*(p for row in problems.values() for p in row), *fused]
    missing = [problem for problem in dict.fromkeys(wanted) if "dense" not in kernels.measured(problem)]
    for problem in tqdm(missing, desc="Measuring kernels", unit="product", disable=not missing):
        kernels.measure(problem)
    for names in groups.values():
        for name in names:
            layers[name].drop_forms()
    options = [
        option
        for kind, names in groups.items()
        # A fused layer's values are rows of the group's: no other form can share them.
        for option in _options(
            layers[names[0]], [n for n in names if layers[n]._group is None], problems[kind], optimize_for
        )
    ]
    limit = max_extra_bytes if optimize_for == "speed" else None
    for option in _chosen(options, limit):
        _keep(layers[option.layer], option.form, optimize_for == "memory" or limit is not None)
    report.rows = [_row(layers, names, problems[kind]) for kind, names in groups.items()]
    return report


def _groups(layers: dict[str, SparseLinear]) -> dict[tuple[object, ...], list[str]]:
    """Names of the layers by what their speed depends on; without those that accelerate brings in for each pass."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, layer in layers.items():
        if not layer.weight.is_meta:
            problem = _problem(layer, 1)
            groups.setdefault((str(problem), problem.device), []).append(name)
    return groups


def _problems(layer: SparseLinear, tokens: Sequence[int]) -> list[kernels.Problem]:
    """What to measure; nothing where there is no choice of kernels."""
    problems = [_problem(layer, number) for number in tokens]
    return [problem for problem in problems if kernels.has_kernels(problem)]


def _fused_rows(
    layers: dict[str, SparseLinear],
    groups: dict[tuple[object, ...], list[str]],
    problems: dict[tuple[object, ...], list[kernels.Problem]],
) -> list[tuple[kernels.Problem, int]]:
    """For each kind of layer that runs together with others: its problems, and the rows of the whole product."""
    found: dict[tuple[kernels.Problem, int], None] = {}
    for shape, names in groups.items():
        for name in names:
            group = layers[name]._group
            if group is not None:
                found.update({(problem, sum(group[0].sizes)): None for problem in problems[shape]})
    return list(found)


def _problem(layer: SparseLinear, tokens: int) -> kernels.Problem:
    weight = layer.weight
    pattern = str(layer.pattern)
    return kernels.Problem(layer.out_features, layer.in_features, tokens, pattern, weight.dtype, weight.device)


def _options(
    layer: SparseLinear, names: list[str], problems: list[kernels.Problem], optimize_for: str
) -> list[_Option]:
    """What each layer of a kind may keep, where that pays."""
    options = []
    if not problems:  # without kernels a dense weight is always faster than decompressing in each pass
        speed = optimize_for == "speed"
        return [_Option(name, "dense", layer.dense_bytes, layer.dense_bytes) for name in names if speed]
    forms = ("library",) if optimize_for == "memory" else kernels.KEPT_FORMS
    for form in forms:
        saved, pays = 0.0, False
        for problem in problems:
            rows = kernels.measured(problem)
            packed = min((us for name, (_, us) in rows.items() if name not in kernels.KEPT_FORMS), default=0.0)
            if form in rows and rows[form][1] < packed:
                saved += packed - rows[form][1]
                pays = pays or rows[form][1] < _MARGIN * packed
        if pays:
            # The library's form shares the values where it can: then it costs no more than its metadata.
            nbytes = layer.dense_bytes if form == "dense" else layer.packed_bytes - layer.weight.nbytes
            options += [_Option(name, form, saved, nbytes) for name in names]
    return options


def _chosen(options: list[_Option], limit: int | None) -> list[_Option]:
    """At most one option a layer. First those that save most for a byte; then, where bytes are left, a layer's better
    one in the place of the one that it has."""
    chosen: dict[str, _Option] = {}
    left = float("inf") if limit is None else limit
    for option in sorted(options, key=lambda option: option.saved / max(1, option.nbytes), reverse=True):
        if option.layer not in chosen and option.nbytes <= left:
            chosen[option.layer] = option
            left -= option.nbytes
    for option in sorted(options, key=lambda option: option.saved, reverse=True):
        present = chosen.get(option.layer)
        if present is not None and option.saved > present.saved and option.nbytes - present.nbytes <= left:
            chosen[option.layer] = option
            left -= option.nbytes - present.nbytes
    return list(chosen.values())


def _keep(layer: SparseLinear, form: str, must_share: bool) -> None:
    """Makes a form and keeps it; not the library's where it `must_share` the values and has other ones."""
    values, bits = layer.weight.detach(), layer.weight_mask
    if form == "dense":
        layer.keep_form("dense", layer.to_dense_weight())
        return
    library = kernels.library_form(values, bits, layer.in_features)
    shared = kernels.shared_values(library, values)
    fits = shared is not None and library.nbytes + bits.nbytes <= MOST_MEMORY * layer.dense_bytes
    if fits or not must_share:
        layer.keep_form("library", library, shared)


def _row(layers: dict[str, SparseLinear], names: list[str], problems: list[kernels.Problem]) -> LayerKernels:
    keeping = [name for name in names if layers[name].extra_bytes]
    layer = layers[(keeping or names)[0]]
    row = LayerKernels((layer.out_features, layer.in_features), str(layer.pattern), str(layer.weight.dtype)[6:], names)
    row.kept, row.extra_bytes = len(keeping), sum(layers[name].extra_bytes for name in keeping)
    row.form = next((form for form in kernels.KEPT_FORMS if getattr(layer, f"_{form}_form") is not None), None)
    weight = layer.packed()
    for problem in problems:
        candidate = kernels.choose(weight, problem.tokens)
        rows = kernels.measured(problem)
        row.kernels[problem.tokens] = str(candidate)
        row.microseconds[problem.tokens] = rows.get(candidate.kernel, (None, float("nan")))[1]
        row.dense_microseconds[problem.tokens] = rows.get("dense", (None, float("nan")))[1]
    return row
