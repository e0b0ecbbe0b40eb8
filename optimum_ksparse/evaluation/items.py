"""Reading the items of a task from local files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.documents import json_lines

if TYPE_CHECKING:
    from .harness import HarnessTask


def files_digest(task: HarnessTask, data_dir: str | os.PathLike[str], num_fewshot: int) -> str:
    """SHA-256 of the files that are read, by split."""
    digest = hashlib.sha256()
    for split, path in _files(task, data_dir, num_fewshot).items():
        digest.update(f"{split}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_items(
    task: HarnessTask, data_dir: str | os.PathLike[str], num_fewshot: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Split → items of a task in `data_dir`, the fields of the task alone: the test split, or, where there is none,
    the validation split; the training split for few-shot examples. Raises FileNotFoundError where one is missing,
    ValueError, which names file, line and field, where a file has no items, or a line is none of the task."""
    items = {}
    for split, path in _files(task, data_dir, num_fewshot).items():
        name = f"{task.word}/{path.name}"
        items[split] = [_checked(task, item, where) for where, item in json_lines(path, name)]
        if not items[split]:
            raise ValueError(f"{name} has no items")
    # Without a test split the harness draws one more.
    most = len(items.get("train", ())) - ("test" not in items)
    if num_fewshot > max(most, 0):
        raise ValueError(f"num_fewshot={num_fewshot} is too large: {task.word}/train.jsonl has {most} at most")
    return items


def _files(task: HarnessTask, data_dir: str | os.PathLike[str], num_fewshot: int) -> dict[str, Path]:
    folder = Path(data_dir) / str(task.word)
    if not folder.is_dir():
        folder = Path(data_dir)  # the files of a single task may lie there themselves
    there = {split: folder / f"{split}.jsonl" for split in ("test", "validation", "train")}
    there = {split: path for split, path in there.items() if path.is_file()}
    measured = next((split for split in ("test", "validation") if split in there), None)
    if measured is None:
        raise FileNotFoundError(
            f"data_dir has no {task.word}/test.jsonl or {task.word}/validation.jsonl: it must hold a folder for each "
            "task"
        )
    if num_fewshot and "train" not in there:
        raise FileNotFoundError(f"num_fewshot={num_fewshot} needs {task.word}/train.jsonl in data_dir")
    return {split: there[split] for split in (measured, *(("train",) if num_fewshot else ()))}


def _checked(task: HarnessTask, item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {type(item).__name__}, not an object")
    for field in task.fields:
        if not isinstance(item.get(field), str):
            raise ValueError(f"{where}: the field {field!r} must be a text")
        allowed = task.allowed.get(field)
        if allowed and item[field].strip() not in allowed:
            raise ValueError(f"{where}: {field}={item[field]!r} must be {' or '.join(allowed)}")
    label = item.get("label")
    if type(label) is not int or label not in range(task.num_answers):
        raise ValueError(f"{where}: label={label!r} must be from 0 to {task.num_answers - 1}")
    return {key: item[key] for key in (*task.fields, "label")}
