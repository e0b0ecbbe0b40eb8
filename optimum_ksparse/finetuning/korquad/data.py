"""KorQuAD 1.0: reading it from a file in the form of SQuAD 1.1, or from the Hub."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...config import describe_dataset

logger = logging.get_logger(__name__)

KORQUAD_DATASET = "KorQuAD/squad_kor_v1"


@dataclass(frozen=True)
class Question:
    """A question over a paragraph.

    Attributes:
        id: of the question. article: what the paragraph is from. question, context: texts.
        answers: texts of the right answers. starts: character of the paragraph at which each begins; None where it is
            not there.
    """

    id: str
    article: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int | None, ...]

    @property
    def span(self) -> tuple[int, int] | None:
        """Characters of the first answer that the paragraph holds: first, and one after the last."""
        for text, start in zip(self.answers, self.starts, strict=True):
            if start is not None:
                return start, start + len(text)
        return None

    @property
    def reference(self) -> dict[str, Any]:
        """As the metric takes it."""
        return {"id": self.id, "answers": {"text": list(self.answers), "answer_start": list(self.starts)}}


@dataclass
class KorQuADData:
    """Questions, and where they are from.

    Attributes:
        questions: in the order of the data.
        description: name or file, and SHA-256, as JSON holds it. split: which part of the data it is.
        mended: answers that were not at their offset, and once elsewhere in their paragraph, where they are taken to
            be.
        lost: ids of questions none of whose answers is found in the paragraph: they do not train, and are measured.
    """

    questions: list[Question]
    description: dict[str, Any]
    split: str = "all"
    mended: int = 0
    lost: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)

    def part(self, questions: Sequence[Question], split: str) -> KorQuADData:
        """Some of the questions, as a split of that name."""
        ids = {question.id for question in questions}
        lost = [name for name in self.lost if name in ids]
        return KorQuADData(list(questions), self.description, split, self.mended, lost)


def read_korquad(source: str | os.PathLike[str] = KORQUAD_DATASET, split: str | None = None) -> KorQuADData:
    """Reads KorQuAD 1.0, or anything else in the form of SQuAD 1.1.

    Args:
        source: a JSON file, or a dataset on the Hub (`KorQuAD/squad_kor_v1`, `squad_kor_v1`).
        split: of the dataset on the Hub: "train" or "validation", which is the default there. Of a file it is the name
            to record.

    Raises:
        FileNotFoundError: `source` ends in `.json`, and there is no such file.
        ValueError: the data are not in that form; names article, paragraph, question and field.
        ImportError, ConnectionError: the Hub's data cannot be read.
    """
    if os.path.isfile(source):
        description, rows = describe_dataset(Path(source)), _read_file(Path(source))
        split = split or "all"
    elif os.fspath(source).endswith(".json") or isinstance(source, os.PathLike):
        raise FileNotFoundError(f"{os.fspath(source)!r}: there is no such file")
    else:
        split = split or "validation"
        rows = _read_hub(os.fspath(source), split)
        hashed = describe_dataset([json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows])
        description = {"dataset": os.fspath(source), "sha256": hashed["sha256"]}
    data = KorQuADData([], description, split)
    seen: set[str] = set()
    for row in rows:
        where = row["where"]
        if row["id"] in seen:
            raise ValueError(f"{where}: the id {row['id']!r} comes twice")
        seen.add(row["id"])
        data.questions.append(_question(row, data))
    if not data.questions:
        raise ValueError(f"{os.fspath(source)} holds no questions")
    if data.mended or data.lost:
        logger.warning(
            f"{os.path.basename(source)}: {data.mended} answers were not at their offset and are found elsewhere in "
            f"their paragraph; {len(data.lost)} questions have no answer that is in their paragraph, these do not "
            f"train{': ' + ', '.join(data.lost[:5]) if data.lost else ''}"
        )
    return data


def split_by_article(data: KorQuADData, share: float = 0.8, seed: int = 0) -> tuple[KorQuADData, KorQuADData]:
    """Splits data into "train" and "test" with no article in both.

    Args:
        share: of the articles that train. seed: draws them.

    Raises:
        ValueError: `share` leaves one of the two empty.
    """
    articles = list(dict.fromkeys(question.article for question in data.questions))
    random.Random(seed).shuffle(articles)
    count = round(share * len(articles)) if 0 < share < 1 else 0
    if not 0 < count < len(articles):
        raise ValueError(f"share={share} of {len(articles)} articles leaves no articles to train, or none to test")
    chosen = set(articles[:count])
    name = f"{share:g} of the articles, seed {seed}"
    train = [question for question in data.questions if question.article in chosen]
    test = [question for question in data.questions if question.article not in chosen]
    return data.part(train, f"train: {name}"), data.part(test, f"test: all but {name}")


def _question(row: Mapping[str, Any], data: KorQuADData) -> Question:
    """The question of a row, whose answers are sought where they are not at their offset."""
    context, starts = row["context"], []
    for text, start in zip(row["answers"], row["starts"], strict=True):
        found: int | None = start
        if not text or context[start : start + len(text)] != text:
            once = bool(text) and context.count(text) == 1
            found = context.index(text) if once else None
            data.mended += once
        starts.append(found)
    question = Question(row["id"], row["article"], row["question"], context, tuple(row["answers"]), tuple(starts))
    if question.span is None:
        data.lost.append(question.id)
    return question


def _read_file(path: Path) -> list[dict[str, Any]]:
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


def _read_hub(name: str, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('data on the Hub need datasets: pip install "datasets>=4.0"') from error
    try:
        found = load_dataset(name, split=split)
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds here
        raise ConnectionError(
            f"KorQuAD ({name}, {split}) cannot be read from the Hub: {type(error).__name__}: {error}; without a "
            "network pass a JSON file in the form of SQuAD 1.1"
        ) from error
    rows = []
    for number, row in enumerate(found):
        where = f"{name}, {split}, question {number}"
        texts, starts = (row["answers"][field] for field in ("text", "answer_start"))
        pairs = [({"text": t, "answer_start": s}, where) for t, s in zip(texts, starts, strict=True)]
        fields = {name: _text(row, name, where) for name in ("id", "question", "context")}
        rows.append({"where": where, **fields, "article": _text(row, "title", where), **_answers(pairs, where)})
    return rows
