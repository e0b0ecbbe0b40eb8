"""Instructions and their answers, from the Hub, a file or memory, and the form in which a model sees them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ...data import reached_or_cached
from ...version import install_hint

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

_FIELDS = ("instruction", "output")


def koalpaca_prompt(instruction: str) -> str:
    """What the model is asked with; it answers with a space, the answer and the end token."""
    return f"### 질문: {instruction}\n\n### 답변:"


def instruction_rows(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]], max_examples: int | None = None
) -> tuple[str, list[dict[str, str]]]:
    """Name of the data, and their rows with `instruction` and `output` alone, stripped. Rows of which one is empty are
    left out, with a warning.

    Args:
        data: a file of JSON lines, a data set on the Hub (split "train"), or rows.
        max_examples: of the first rows alone.

    Raises:
        FileNotFoundError, ValueError: the file is missing or no JSON lines, or a row has not the two texts; names the
            row and the field.
        ImportError, ConnectionError: `datasets` is missing, or the Hub's data cannot be read.
    """
    if not isinstance(data, str | os.PathLike):
        name, read = "rows", data
    elif is_file(data):
        name = os.path.basename(data)
        read = _file_rows(data)
    else:
        name = os.fspath(data)
        read = hub_dataset(name, "train", "data, a file of JSON lines with instruction and output")
    rows: list[dict[str, str]] = []
    empty = 0
    for number, row in enumerate(read):
        for key in _FIELDS:
            if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
                raise ValueError(f"data={name!r}: row {number} must be an object with a text as {key!r}")
        texts = {key: row[key].strip() for key in _FIELDS}
        empty += not all(texts.values())
        rows += [texts] * all(texts.values())
        if len(rows) == max_examples:
            break
    if empty:
        logger.warning(f"{empty} rows of {name} have an empty instruction or output, and are left out.")
    if not rows:
        raise ValueError(f"data={name!r} holds no example")
    return name, rows


def is_file(data: Any) -> bool:
    """Whether `data` names a file, there or not, and no data set on the Hub."""
    return isinstance(data, str | os.PathLike) and (
        os.path.exists(data) or os.fspath(data).endswith((".jsonl", ".json"))
    )


def _file_rows(path: str | os.PathLike[str]) -> Iterable[Any]:
    with open(path, encoding="utf-8") as file:
        try:
            yield from (json.loads(line) for line in file if line.strip())
        except ValueError as error:  # of JSON and of the encoding
            raise ValueError(f"{os.path.basename(path)} is not JSON lines in UTF-8: {error}") from None


def hub_dataset(name: str, split: str, instead: str) -> Dataset:
    """A split of a data set on the Hub, or of what was downloaded of it before.

    Args:
        instead: what the message names that may be passed instead.

    Raises:
        ImportError, ConnectionError: `datasets` is missing, or the data cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"data on the Hub need datasets: {install_hint('finetune')}") from error
    try:
        with reached_or_cached(name):
            return load_dataset(name, split=split)
    except Exception as error:  # the libraries between here and the network raise their own kinds
        raise ConnectionError(
            f"{name}, {split}, cannot be read from the Hub: {type(error).__name__}: {error}; without a network pass "
            f"{instead}"
        ) from error
