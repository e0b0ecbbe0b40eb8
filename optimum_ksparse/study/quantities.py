"""The study's tasks, which are in the library's table of evaluation tasks once this is imported; and its figures:
which there are, how tables name them, and how they are taken from measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import (
    KOBEST_TASKS,
    STUDY_TASKS,
    EvaluationResults,
    HarnessTask,
    HubEntry,
    Measurement,
    Task,
    add_task,
    task_of,
)
from ..evaluation.tasks import DATA, LENGTH, PER_CENT
from ..evaluation.tuning import TUNING_TITLES
from ..records import Positive
from .finetuning.korquad.data import KORQUAD_DATASET

TUNING_TITLES.update(distill="teacher logits", koalpaca="KoAlpaca", korquad="KorQuAD")
NSMC_DATASET = "e9t/nsmc"
NSMC_TASKS = ("nsmc_prompt1", "nsmc_prompt2")

for _number, _name in enumerate(NSMC_TASKS, start=1):
    add_task(
        HarnessTask(
            name=_name,
            title=f"{_number}",
            suite="NSMC",
            word="nsmc",
            harness_name=_name,
            folder=Path(__file__).parent / "nsmc",
            dataset=NSMC_DATASET,
            fields=("document",),
            num_answers=2,
            fixed_shots=10,
            usual_shots=10,
            softmax_dtype="float32",  # in bfloat16 both answers often come out equally likely
            shown=("acc", "f1", "exact_match"),
            hub=HubEntry(
                task_type="text-classification",
                dataset=NSMC_DATASET,
                dataset_name="NSMC",
                metrics={"acc": ("accuracy", f"accuracy, prompt {_number}")},
            ),
        )
    )

# It has no word: the code that fine-tunes on KorQuAD measures it.
add_task(
    Task(
        name="korquad",
        title="KorQuAD",
        metrics={"exact_match": PER_CENT, "f1": PER_CENT},
        protocol={
            "data": DATA,
            "split": str,
            "num_samples": Positive,
            "seq_len": LENGTH,
            "max_question_tokens": Positive,
            "stride": Positive,
            "max_answer_tokens": Positive,
            "num_best": Positive,
            "prepend_bos": bool,
            "dtype": str,
        },
        shown=("exact_match", "f1"),
        hub=HubEntry(
            task_type="question-answering",
            dataset=KORQUAD_DATASET,
            dataset_name="KorQuAD 1.0",
            metrics={"exact_match": ("exact_match", None), "f1": ("f1", None)},
            arguments=("seq_len", "stride", "num_samples"),
        ),
    )
)


@dataclass(frozen=True)
class Quantity:
    """A figure: the key in `TABLES` of the table that it stands in (None: in the files alone), the label of its row,
    where it is found and what that is multiplied by, whether it was measured after tuning, and its digits after the
    point."""

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
    "bits": "Bits for each weight of the pruned layers, masks and scales included, where floating point has 16",
    "cost": "What pruning took",
}
MEAN_F1 = "kobest_mean_f1"
BITS = "bits_per_weight"
_NSMC = {
    f"nsmc_{prompt}_accuracy{end}": Quantity("nsmc", f"prompt {prompt}, {when}", name, "acc", 100, not end)
    for prompt, name in enumerate(NSMC_TASKS, start=1)
    for end, when in (("", "after KoAlpaca tuning"), ("_untuned", "before tuning"))
}
QUANTITIES: dict[str, Quantity] = {
    "perplexity": Quantity("perplexity", "perplexity", "perplexity", "perplexity"),
    "bits_per_byte": Quantity(None, "bits per byte", "perplexity", "bits_per_byte", digits=4),
    **{f"kobest_{task}_f1": Quantity("kobest", task_of(task).title, task, "f1", 100) for task in KOBEST_TASKS},
    MEAN_F1: Quantity("kobest", "**mean** of " + ", ".join(task_of(task).title for task in STUDY_TASKS)),
    "korquad_exact_match": Quantity("korquad", "exact match", "korquad", "exact_match", tuned=True),
    "korquad_f1": Quantity("korquad", "F1", "korquad", "f1", tuned=True),
    **_NSMC,
    BITS: Quantity("bits", "bits a weight"),
    "pruning_seconds": Quantity("cost", "seconds", digits=1),
    "peak_memory_gb": Quantity("cost", "peak memory of the process in GB"),
    "peak_gpu_memory_gb": Quantity("cost", "peak memory of the GPU in GB"),
    "output_error": Quantity(None, "mean relative output error of the layers", digits=4),
    "density": Quantity(None, "density of the sparse layers", digits=4),
}


def figures_of(measurements: Iterable[Measurement], pruning: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of one model: those that were measured of it, and those of its pruning (as a cell's result holds
    it), by the keys of `QUANTITIES`."""
    rows = {(row.name, row.tuning is not None): row for row in measurements}
    figures: dict[str, float | None] = {}
    for key, quantity in QUANTITIES.items():
        if row := rows.get((quantity.measurement, quantity.tuned)):
            value = row.value(quantity.metric)
            figures[key] = None if value is None else quantity.scale * value
    untuned = [row for row in rows.values() if row.tuning is None]
    shots = {row.num_fewshot for row in untuned if row.name in STUDY_TASKS}
    mean = EvaluationResults("", sparse=untuned).mean_f1("sparse", shots.pop()) if len(shots) == 1 else None
    figures[MEAN_F1] = None if mean is None else 100 * mean
    figures[BITS] = 16.0 if pruning is None else pruning["report"].get(BITS)
    if pruning is not None:
        memory = {name: number / 1e9 for name, number in pruning["peak_memory_bytes"].items()}
        figures |= {"pruning_seconds": pruning["seconds"], "output_error": pruning["report"]["mean_output_error"]}
        figures |= {"peak_memory_gb": memory.get("process"), "peak_gpu_memory_gb": memory.get("gpu")}
        figures["density"] = pruning["report"]["density"]
    return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Spread:
    """`mean` and sample standard `deviation` (n − 1 in the denominator; None for one value, or where one is infinite)
    of `count` values."""

    mean: float
    deviation: float | None
    count: int

    def text(self, digits: int) -> str:
        """Mean and deviation as tables show them."""
        mean = f"{self.mean:,.{digits}f}" if math.isfinite(self.mean) else "∞"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:,.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of at least one value."""
    if not all(map(math.isfinite, values)):
        return Spread(math.inf, None, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))
