"""Reading data in the form of SQuAD 1.1 into rows, a dict for each question.

| key | meaning |
|---|---|
| `where` | file, article, paragraph and number of the question, for messages |
| `id`, `question`, `context` | texts |
| `article` | number or title of the article |
| `answers`, `starts` | texts of the answers, and the character of the paragraph at which each is said to begin |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ....data import reached_or_cached


def file_rows(path: Path) -> list[dict[str, Any]]:
    """The questions of a file in the form of SQuAD 1.1."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON in UTF-8: {error}") from None
    return list(_rows(content, path.name))


def _rows(content: Any, name: str) -> Iterator[dict[str, Any]]:
    """The questions of data in the form of SQuAD 1.1."""
    for i, article in enumerate(_list(content, "data", name)):
        in_article = f"{name}, article {i}"
        for j, paragraph in enumerate(_list(article, "paragraphs", in_article)):
            in_paragraph = f"{in_article}, paragraph {j}"
            context = _text(paragraph, "context", in_paragraph)
            for k, entry in enumerate(_list(paragraph, "qas", in_paragraph)):
                where = f"{in_paragraph}, question {k}"
                answers = _list(entry, "answers", where)
                yield {
                    "where": where,
                    "id": _text(entry, "id", where),
                    "article": f"{i}",
                    "question": _text(entry, "question", where),
                    "context": context,
                    **_answers([(a, f"{where}, answer {n}") for n, a in enumerate(answers)], where),
                }


def _answers(found: Iterable[tuple[Any, str]], where: str) -> dict[str, Any]:
    answers, starts = [], []
    for answer, place in found:
        answers.append(_text(answer, "text", place))
        start = answer.get("answer_start")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"{place}: the field 'answer_start' must be an integer of at least 0, found {start!r}")
        starts.append(start)
    if not answers:
        raise ValueError(f"{where}: the field 'answers' is empty, a question needs an answer")
    return {"answers": answers, "starts": starts}


def _list(holder: Any, name: str, where: str) -> list[Any]:
    found = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        kind = f"{type(found).__name__}" if isinstance(holder, dict) else f"no object but {type(holder).__name__}"
        raise ValueError(f"{where}: the field {name!r} must be a list, found {kind}")
    return found


def _text(holder: Any, name: str, where: str) -> str:
    found = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(found, str):
        kind = f"{type(found).__name__}" if isinstance(holder, dict) else f"no object but {type(holder).__name__}"
        raise ValueError(f"{where}: the field {name!r} must be a text, found {kind}")
    return found


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    """The questions of a split of a dataset on the Hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('data on the Hub need datasets: pip install "datasets>=4.0"') from error
    try:
        with reached_or_cached(name):
            found = load_dataset(name, split=split)
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds here
        raise ConnectionError(
            f"KorQuAD ({name}, {split}) cannot be read from the Hub: {type(error).__name__}: {error}; without a "
            "network pass train_file, JSON in the form of SQuAD 1.1"
        ) from error
    rows = []
    for number, row in enumerate(found):
        where = f"{name}, {split}, question {number}"
        texts, starts = (row["answers"][field] for field in ("text", "answer_start"))
        pairs = [({"text": t, "answer_start": s}, where) for t, s in zip(texts, starts, strict=True)]
        fields = {name: _text(row, name, where) for name in ("id", "question", "context")}
        rows.append({"where": where, **fields, "article": _text(row, "title", where), **_answers(pairs, where)})
    return rows
