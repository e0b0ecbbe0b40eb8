"""The study's tasks, which are in the library's table of evaluation tasks once this is imported."""

from __future__ import annotations

from pathlib import Path

from ..evaluation import HarnessTask, HubEntry, Task, add_task
from ..evaluation.tasks import DATA, LENGTH, PER_CENT
from ..evaluation.tuning import TUNING_TITLES
from ..records import Positive

TUNING_TITLES.update(koalpaca="KoAlpaca", korquad="KorQuAD")
KORQUAD_DATASET = "KorQuAD/squad_kor_v1"
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
