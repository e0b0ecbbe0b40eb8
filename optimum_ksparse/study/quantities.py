"""The figures of a study: which there are, how tables name them, and how they are taken from measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation import KOBEST_TASKS, TASK_TITLES, EvaluationResults, Measurement
from ..evaluation.kobest_data import STUDY_TASKS


@dataclass(frozen=True)
class Quantity:
    """A figure.

    Attributes:
        table: the key in `TABLES` of the one that it stands in; None: in the files alone.
        label: of its row, where a table has several.
        measurement, metric: where it is found. scale: what that is multiplied by.
        tuned: whether it was measured after tuning.
        digits: after the point.
    """

    table: str | None
    label: str
    measurement: str = ""
    metric: str = ""
    scale: float = 1.0
    tuned: bool = False
    digits: int = 2


TABLES = {
    "perplexity": "Perplexity on {text} (lower is better)",
    "kobest": "KoBEST, macro F1 in % (higher is better)",
    "korquad": "KorQuAD after LoRA, in % (higher is better)",
    "nsmc": "NSMC, accuracy in % (higher is better)",
    "cost": "What pruning took",
}
MEAN_F1 = "kobest_mean_f1"
QUANTITIES: dict[str, Quantity] = {
    "perplexity": Quantity("perplexity", "perplexity", "perplexity", "perplexity"),
    "bits_per_byte": Quantity(None, "bits per byte", "perplexity", "bits_per_byte", digits=4),
    **{f"kobest_{task}_f1": Quantity("kobest", TASK_TITLES[task], task, "f1", 100) for task in KOBEST_TASKS},
    MEAN_F1: Quantity("kobest", "**mean** of " + ", ".join(TASK_TITLES[task] for task in STUDY_TASKS)),
    "korquad_exact_match": Quantity("korquad", "exact match", "korquad", "exact_match", tuned=True),
    "korquad_f1": Quantity("korquad", "F1", "korquad", "f1", tuned=True),
}
for _prompt in (1, 2):
    _name = f"nsmc_{_prompt}"
    QUANTITIES[f"{_name}_accuracy"] = Quantity(
        "nsmc", f"prompt {_prompt}, after KoAlpaca tuning", _name, "accuracy", 100, tuned=True
    )
    QUANTITIES[f"{_name}_accuracy_untuned"] = Quantity(
        "nsmc", f"prompt {_prompt}, before tuning", _name, "accuracy", 100
    )
QUANTITIES |= {
    "pruning_seconds": Quantity("cost", "seconds", digits=1),
    "peak_memory_gb": Quantity("cost", "peak memory of the process in GB"),
    "peak_gpu_memory_gb": Quantity("cost", "peak memory of the GPU in GB"),
    "output_error": Quantity(None, "mean relative output error of the layers", digits=4),
    "density": Quantity(None, "density of the sparse layers", digits=4),
}


def figures_of(measurements: Iterable[Measurement], pruning: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of one model: those that were measured of it, and those of its pruning (as a cell's result holds
    it), by the keys of `QUANTITIES`."""
    rows = list(measurements)
    found = {}
    for key, quantity in QUANTITIES.items():
        for row in rows:
            if row.name == quantity.measurement and (row.tuning is not None) == quantity.tuned:
                value = row.value(quantity.metric)
                if value is not None:
                    found[key] = quantity.scale * value
    results = EvaluationResults("", sparse=[row for row in rows if row.tuning is None])
    shots = {row.num_fewshot for row in results.sparse if row.name in STUDY_TASKS}
    mean = results.mean_f1("sparse", shots.pop()) if len(shots) == 1 else None
    if mean is not None:
        found[MEAN_F1] = 100 * mean
    return found if pruning is None else found | _costs(pruning)


def _costs(pruning: Mapping[str, Any]) -> dict[str, float]:
    memory = pruning["peak_memory_bytes"]
    costs = {
        "pruning_seconds": pruning["seconds"],
        "peak_memory_gb": memory["process"] / 1e9 if "process" in memory else None,
        "peak_gpu_memory_gb": memory["gpu"] / 1e9 if "gpu" in memory else None,
        "output_error": pruning["report"]["mean_output_error"],
        "density": pruning["report"]["density"],
    }
    return {name: value for name, value in costs.items() if value is not None}
