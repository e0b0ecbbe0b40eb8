"""The tasks' data: which tasks KoBEST has, and reading them and NSMC from local files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Mean F1 is over the four tasks of the study that this project repeats; WiC stands beside it.
STUDY_TASKS = ("copa", "hellaswag", "boolq", "sentineg")
KOBEST_TASKS = (*STUDY_TASKS, "wic")
KOBEST_DATASET = "skt/kobest_v1"

# task → its text fields and its number of answers
FIELDS: dict[str, tuple[tuple[str, ...], int]] = {
    "boolq": (("paragraph", "question"), 2),
    "copa": (("premise", "question", "alternative_1", "alternative_2"), 2),
    "hellaswag": (("context", "ending_1", "ending_2", "ending_3", "ending_4"), 4),
    "sentineg": (("sentence",), 2),
    "wic": (("word", "context_1", "context_2"), 2),
    "nsmc": (("document",), 2),
}


def describe_data(task: str, data_dir: str | os.PathLike[str] | None, num_fewshot: int = 0) -> dict[str, str]:
    """Which data a task is measured on: the name on the Hub, or the SHA-256 of the local files that are read."""
    if data_dir is None:
        return {"name": KOBEST_DATASET}
    hashed = hashlib.sha256()
    for split, path in _files(task, data_dir, num_fewshot).items():
        hashed.update(f"{split}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return {"files_sha256": hashed.hexdigest()}


def read_items(task: str, data_dir: str | os.PathLike[str], num_fewshot: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Split → items of a task in `data_dir`, the fields of the task alone: the test split, or, where there is none,
    the validation split; the training split for few-shot examples.

    Raises:
        FileNotFoundError: there is neither a test nor a validation file, or no training file for few-shot examples.
        ValueError: a file has no items, or a line is not an item of the task; names file, line and field.
    """
    items = {split: _read_file(task, path) for split, path in _files(task, data_dir, num_fewshot).items()}
    # Without a test split the harness draws one more.
    most = len(items.get("train", ())) - ("test" not in items)
    if num_fewshot > max(most, 0):
        raise ValueError(f"num_fewshot={num_fewshot} is too large: {task}/train.jsonl has items for {most} at most")
    return items


def _files(task: str, data_dir: str | os.PathLike[str], num_fewshot: int) -> dict[str, Path]:
    folder = Path(data_dir) / task
    if task not in KOBEST_TASKS and not folder.is_dir():
        folder = Path(data_dir)  # the files of a data set that is one task may lie there themselves
    there = {split: folder / f"{split}.jsonl" for split in ("test", "validation", "train")}
    there = {split: path for split, path in there.items() if path.is_file()}
    measured = next((split for split in ("test", "validation") if split in there), None)
    if measured is None:
        raise FileNotFoundError(
            f"data_dir has no {task}/test.jsonl or {task}/validation.jsonl: it must hold a folder for each task"
        )
    if num_fewshot and "train" not in there:
        raise FileNotFoundError(f"num_fewshot={num_fewshot} needs {task}/train.jsonl in data_dir")
    return {split: there[split] for split in (measured, *(("train",) if num_fewshot else ()))}


def _read_file(task: str, path: Path) -> list[dict[str, Any]]:
    where = f"{task}/{path.name}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}; convert it first") from None
    items = [_read_item(task, line, f"{where}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ValueError(f"{where} has no items")
    return items


def _read_item(task: str, line: str, where: str) -> dict[str, Any]:
    fields, num_answers = FIELDS[task]
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {type(item).__name__}, not an object")
    for field in fields:
        if not isinstance(item.get(field), str):
            raise ValueError(f"{where}: the field {field!r} must be a text")
    label = item.get("label")
    if type(label) is not int or label not in range(num_answers):
        raise ValueError(f"{where}: label={label!r} must be from 0 to {num_answers - 1}")
    if task == "copa" and item["question"].strip() not in ("원인", "결과"):
        raise ValueError(f"{where}: question={item['question']!r} must be 원인 or 결과")
    return {key: item[key] for key in (*fields, "label")}
