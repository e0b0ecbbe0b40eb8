"""Which tuning a measured model went through: what the fine-tuning code wrote beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from ..checkpoint import facts_of
from ..data import find_file
from ..records import TUNING_NAME, As, read_record

# What tables call the task of a tuning, where its name does not do; what fine-tunes adds to it.
TUNING_TITLES: dict[str, str] = {}
# Of what `finetuning.json` holds: the tuned model, in which a sparse model and a dense one tuned in the same way
# differ; what changes a run by rounding only; and what came of it.
_NOT_SETTINGS = (
    *("base", "base_fingerprint", "num_trained"),
    *("num_processes", "micro_batch_size", "gradient_checkpointing", "save_steps"),
    *("loss", "history", "results", "eval_data", "max_eval_questions", "eval_every"),
)


class _Task(TypedDict):
    task: str


def read_tuning(
    source: str | os.PathLike[str], revision: str | None = None, token: bool | str | None = None
) -> dict[str, Any] | None:
    """What `finetuning.json` in a folder, or on the Hub, says, for `model.ksparse.tuning`; None where there is none.
    Raises ValueError where it is no JSON object, or names no `task`."""
    path = find_file(source, TUNING_NAME, quiet=True, revision=revision, token=token)
    if path is None:
        return None
    return read_record(Annotated[dict[str, Any], As(_Task, is_open=True)], path, "is not a record of a tuning")


def tuning_of(model: Any) -> dict[str, Any] | None:
    """The tuning as a protocol holds it: on what and how, without the model and the outcome."""
    record = facts_of(model).tuning
    return None if record is None else tuning_settings(record)


def tuning_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol holds of the content of a `finetuning.json`, as `tuning_of`."""
    # As JSON reads it back, so that a saved row and a new one are compared alike.
    return dict(json.loads(json.dumps({key: value for key, value in record.items() if key not in _NOT_SETTINGS})))


def tuning_title(tuning: Mapping[str, Any] | None) -> str | None:
    """What tables call a tuning: its task; None for no tuning."""
    if tuning is None:
        return None
    task = str(tuning.get("task"))
    return TUNING_TITLES.get(task, task)
