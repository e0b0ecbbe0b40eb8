"""Instructions and their answers, from the Hub, a file or memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from transformers.utils import logging

from ...data import reached_or_cached

logger = logging.get_logger(__name__)

_FIELDS = ("instruction", "output")


def instruction_rows(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]], usual: str, max_examples: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Name of the data, and (instruction, answer) of each row.

    Args:
        data: a file of JSON lines, a data set on the Hub (split "train"), or rows; other fields than `instruction` and
            `output` are ignored.
        usual: the data set that messages point to.
        max_examples: of the first rows alone.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or a row has not the two texts; names file, line and field.
        ImportError, ConnectionError: `datasets` is missing, or the Hub has no such data set.
    """
    if not isinstance(data, str | os.PathLike):
        found = (_texts(row, f"data, row {number}") for number, row in enumerate(data))
        rows, name = list(islice(found, max_examples)), "rows"
    elif is_file(data):
        name = os.path.basename(data)
        rows = list(islice(_file_rows(os.fspath(data)), max_examples))
    else:
        name = os.fspath(data)
        rows = _hub_rows(name, usual, max_examples)
    if not rows:
        raise ValueError(f"data={name!r} holds no example")
    return name, rows


def is_file(data: str | os.PathLike[str]) -> bool:
    """Whether `data` names a file, there or not, and no data set on the Hub."""
    return os.path.exists(data) or os.fspath(data).endswith((".jsonl", ".json"))


def fingerprint_of(examples: list[dict[str, list[int]]]) -> str:
    """SHA-256 of examples as tokens."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


def _file_rows(path: str) -> Iterator[tuple[str, str]]:
    name = os.path.basename(path)
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{name}, line {number}"
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{where} is not JSON: {error}") from None
                    yield _texts(row, where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error}; convert it first") from None


def _hub_rows(name: str, usual: str, max_examples: int | None) -> list[tuple[str, str]]:
    """Rows of a data set whose empty rows the user cannot mend: they are left out, and that is reported."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"data={name!r} needs the package datasets: pip install datasets") from error
    try:
        with reached_or_cached(name):
            found = load_dataset(name, split="train")
    except Exception as error:  # the libraries between here and the network raise their own kinds
        raise ConnectionError(
            f"data={name!r} is no file, and cannot be read from the Hub: {type(error).__name__}: {error}; pass a "
            f"file of JSON lines with instruction and output, or {usual!r}"
        ) from error
    missing = [field for field in _FIELDS if field not in found.column_names]
    if missing:
        raise ValueError(f"data={name!r} has no column {missing[0]!r}, but {', '.join(found.column_names)}")
    rows: list[tuple[str, str]] = []
    empty = 0
    for number, row in enumerate(found):
        if len(rows) == max_examples:
            break
        if all(isinstance(row[field], str) and row[field].strip() for field in _FIELDS):
            rows.append(_texts(row, f"{name}, row {number}"))
        else:
            empty += 1
    if empty:
        logger.warning(f"{empty} rows of {name} have an empty instruction or output, and are left out.")
    return rows


def _texts(row: Any, where: str) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object with `instruction` and `output`, found {type(row).__name__}")
    for field in _FIELDS:
        if not isinstance(row.get(field), str):
            found = type(row[field]).__name__ if field in row else f"the fields {', '.join(map(str, row)) or '(none)'}"
            raise ValueError(f"{where}: `{field}` must be a text, found {found}")
        if not row[field].strip():
            raise ValueError(f"{where}: `{field}` is empty")
    return row["instruction"].strip(), row["output"].strip()
