"""Every form of `dataset` as a stream of documents."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .reaching import reached_or_cached

# name → (repository on the Hub, configuration)
HUB_DATASETS = {
    "mc4-ko": ("allenai/c4", "ko"),
    "c4": ("allenai/c4", "en"),
    "kowiki": ("wikimedia/wikipedia", "20231101.ko"),
}
_SHUFFLE_BUFFER = 10_000
# Articles of "kowiki" whose page id this number divides are for measuring, and all others for calibration.
HELD_OUT_EVERY = 50
_OFFLINE_FORMS = (
    'without a network, use a path to a .txt or .jsonl file or dataset="self"; in Python also a list of texts, a '
    "datasets.Dataset or token ids"
)


def documents(dataset: Any, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the documents of `dataset` in an order drawn with `seed`, empty ones left out. Conversations go through
    the tokenizer's chat template.

    Raises:
        ConnectionError: a name was given and cannot be read.
        ValueError: a file or a dataset has no text; names line and field.
    """
    if isinstance(dataset, str) and dataset in HUB_DATASETS:
        rows: Iterable[Any] = _calibration_stream(dataset, seed)
    elif isinstance(dataset, str | os.PathLike):
        rows = _shuffled(read_file(os.fspath(dataset)), seed)
    elif isinstance(dataset, list | tuple):
        rows = _shuffled(list(dataset), seed)
    elif hasattr(dataset, "column_names"):
        rows = _dataset_rows(dataset, seed)
    else:
        raise ValueError(
            f"dataset is the record of earlier calibration data, {dataset}, not the data: pass them again to "
            "prune with"
        )
    for row in rows:
        text = _text_of(row, tokenizer)
        if text.strip():
            yield text


def _calibration_stream(name: str, seed: int) -> Iterator[Any]:
    rows = stream(name, prepare=lambda data: data.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    return (row for row in rows if name != "kowiki" or not is_held_out(row))


def is_held_out(row: Any) -> bool:
    """Whether an article of "kowiki" is for measuring."""
    return int(row["id"]) % HELD_OUT_EVERY == 0


def hub_rows(
    what: str,
    repository: str,
    *configuration: str,
    offline: str = _OFFLINE_FORMS,
    prepare: Callable[[Any], Any] = lambda rows: rows,
    **how: Any,
) -> Iterator[Any]:
    """Rows of a data set on the Hub, or of what was downloaded of it before.

    Args:
        what: messages call the data. offline: tells the user what works without a network.
        prepare: may shuffle the data set. how: arguments of `load_dataset`.

    Raises:
        ConnectionError: the Hub cannot be reached, or does not have it.
    """
    from datasets import load_dataset

    try:
        with reached_or_cached(repository):
            rows = prepare(load_dataset(repository, *configuration, **how))
        yield from rows
    except Exception as error:  # the libraries between here and the network raise their own kinds
        raise ConnectionError(
            f"{what} cannot be read from the Hub: {type(error).__name__}: {error}; {offline}"
        ) from error


def stream(name: str, **how: Any) -> Iterator[Any]:
    """Rows of the training split of one of `HUB_DATASETS`, streamed; `how` as in `hub_rows`."""
    place = HUB_DATASETS[name]
    return hub_rows(f"dataset={name!r} ({', '.join(place)})", *place, split="train", streaming=True, **how)


def _shuffled(rows: list[Any], seed: int) -> list[Any]:
    random.Random(seed).shuffle(rows)
    return rows


def read_file(path: str) -> list[Any]:
    """Paragraphs of a .txt file (apart by blank lines), or rows of a .jsonl file."""
    if path.endswith(".txt"):
        return re.split(r"\n\s*\n", read_text(path))
    return [_checked_row(row, where) for where, row in json_lines(path)]


def read_text(path: str | os.PathLike[str], name: str | None = None) -> str:
    """The text of a file, which messages call `name`. Raises ValueError where it is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name or os.path.basename(path)} is not UTF-8: {error}; convert it first") from None


def json_lines(path: str | os.PathLike[str], name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The place, such as "file.jsonl, line 3", and the value of each line that is not blank. Raises ValueError for
    what is not JSON, or not UTF-8."""
    for number, line in enumerate(read_text(path, name).split("\n"), start=1):
        where = f"{name or os.path.basename(path)}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from None


def _checked_row(row: Any, where: str) -> Any:
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return {"messages": row["messages"]}
    fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{where} has neither a text in `text` nor a list in `messages`, but {fields}")


def _dataset_rows(dataset: Any, seed: int) -> Iterator[Any]:
    columns = list(dataset.column_names or ())  # a streamed dataset may not know its columns
    if columns and not {"text", "messages"} & set(columns):
        raise ValueError(
            f"dataset has the columns {', '.join(columns)}; needed: `text`, or `messages` for conversations: "
            f"dataset.rename_column({columns[0]!r}, 'text') makes one of another"
        )
    for number, row in enumerate(dataset.shuffle(seed=seed)):
        yield _checked_row(row, f"dataset, row {number} after shuffling")


def _text_of(row: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(row, dict) and "messages" in row:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "dataset has `messages`, and the tokenizer has no chat template to write them with: "
                "pass a tokenizer that has one, or plain `text`"
            )
        text = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        # Some templates write the beginning token out; whether a sample begins with it is `prepend_bos`.
        return text.removeprefix(tokenizer.bos_token) if isinstance(tokenizer.bos_token, str) else text
    return row if isinstance(row, str) else str(row["text"])
