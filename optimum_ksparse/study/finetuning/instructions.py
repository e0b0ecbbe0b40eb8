"""Instructions and their answers, from the Hub, a file or memory, and the form in which a model sees them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import logging

from ...data.documents import hub_rows, json_lines

logger = logging.get_logger(__name__)

_FIELDS = ("instruction", "output")


def koalpaca_prompt(instruction: str) -> str:
    """What the model is asked with; it answers with a space, the answer and the end token."""
    return f"### 질문: {instruction}\n\n### 답변:"


def instruction_rows(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]], max_examples: int | None = None
) -> tuple[str, list[dict[str, str]]]:
    """Name of the data (a file of JSON lines, a data set on the Hub, or rows), and their first `max_examples` rows
    with `instruction` and `output` alone, stripped. Rows of which one is empty are left out, with a warning. Raises
    FileNotFoundError or ValueError where the file is missing or no JSON lines, or a row has not the two texts;
    ConnectionError where the Hub's data cannot be read."""
    if not isinstance(data, str | os.PathLike):
        name, read = "rows", data
    elif is_file(data):
        name = os.path.basename(data)
        read = (row for _, row in json_lines(data))
    else:
        name = os.fspath(data)
        offline = "without a network pass data, a file of JSON lines with instruction and output"
        read = hub_rows(f"{name}, train,", name, split="train", offline=offline)
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
