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


def _add(word: str, title: str, fields: tuple[str, ...], num_answers: int = 2, **more: Any) -> None:
    chooses = word in ("copa", "hellaswag")
    hub = HubEntry(
        task_type="multiple-choice" if chooses else "text-classification",
        dataset=KOBEST_DATASET,
        dataset_name="KoBEST",
        dataset_config=word,
        metrics={"acc": ("accuracy", None), "f1": ("f1", "macro F1")},
        arguments=("num_fewshot", "limit", "num_samples"),
    )
    add_task(
        HarnessTask(
            name=word,
            word=word,
            title=title,
            suite="KoBEST",
            harness_name=f"kobest_{word}",
            dataset=KOBEST_DATASET,
            fields=fields,
            num_answers=num_answers,
            hub=hub,
            **more,
        )
    )


_add(
    "copa",
    "COPA",
    ("premise", "question", "alternative_1", "alternative_2"),
    allowed={"question": ("원인", "결과")},
)
_add("hellaswag", "HellaSwag", ("context", "ending_1", "ending_2", "ending_3", "ending_4"), 4)
_add("boolq", "BoolQ", ("paragraph", "question"))
_add("sentineg", "SentiNeg", ("sentence",))
_add("wic", "WiC", ("word", "context_1", "context_2"))


def mean_f1(results: Mapping[str, Any]) -> float | None:
    """Mean macro F1 over the study's four tasks; None where not all were measured."""
    if any(task not in results for task in STUDY_TASKS):
        return None
    return math.fsum(results[task]["f1"] for task in STUDY_TASKS) / len(STUDY_TASKS)
