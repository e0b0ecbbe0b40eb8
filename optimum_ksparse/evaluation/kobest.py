"""KoBEST (Kim et al. 2022, https://arxiv.org/abs/2204.04541) by the tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .harness import HarnessTask
from .tasks import HubEntry, add_task

KOBEST_DATASET = "skt/kobest_v1"
# Mean F1 is over the four tasks of the study that this project repeats; WiC stands beside it.
STUDY_TASKS = ("copa", "hellaswag", "boolq", "sentineg")
KOBEST_TASKS = (*STUDY_TASKS, "wic")
# Title, type on the Hub, and fields.
_ROWS = (
    ("COPA", "multiple-choice", ("premise", "question", "alternative_1", "alternative_2")),
    ("HellaSwag", "multiple-choice", ("context", "ending_1", "ending_2", "ending_3", "ending_4")),
    ("BoolQ", "text-classification", ("paragraph", "question")),
    ("SentiNeg", "text-classification", ("sentence",)),
    ("WiC", "text-classification", ("word", "context_1", "context_2")),
)

for _word, (_title, _type, _fields) in zip(KOBEST_TASKS, _ROWS, strict=True):
    add_task(
        HarnessTask(
            name=_word,
            word=_word,
            title=_title,
            suite="KoBEST",
            harness_name=f"kobest_{_word}",
            dataset=KOBEST_DATASET,
            fields=_fields,
            num_answers=4 if _word == "hellaswag" else 2,
            allowed={"question": ("원인", "결과")} if _word == "copa" else {},
            hub=HubEntry(
                task_type=_type,
                dataset=KOBEST_DATASET,
                dataset_name="KoBEST",
                dataset_config=_word,
                metrics={"acc": ("accuracy", None), "f1": ("f1", "macro F1")},
            ),
        )
    )


def mean_f1(results: Mapping[str, Any]) -> float | None:
    """Mean macro F1 over the study's four tasks; None where not all were measured."""
    if any(task not in results for task in STUDY_TASKS):
        return None
    return math.fsum(results[task]["f1"] for task in STUDY_TASKS) / len(STUDY_TASKS)
