"""KorQuAD 1.0: reading it from a file in the form of SQuAD 1.1, or from the Hub."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ....dataset import describe_dataset
from .rows import file_rows, hub_rows

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
        mended: ids of questions with an answer that was not at its offset, and once elsewhere in the paragraph, where
            it is taken to be.
        lost: ids of questions none of whose answers is found in the paragraph: they do not train, and are measured.
    """

    questions: list[Question]
    description: dict[str, Any]
    split: str = "all"
    mended: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)

    def part(self, questions: Sequence[Question], split: str) -> KorQuADData:
        """Some of the questions, as a split of that name."""
        ids = {question.id for question in questions}
        mended, lost = ([name for name in names if name in ids] for names in (self.mended, self.lost))
        return KorQuADData(list(questions), self.description, split, mended, lost)


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
        description, rows = describe_dataset(Path(source)), file_rows(Path(source))
        split = split or "all"
    elif os.fspath(source).endswith(".json") or isinstance(source, os.PathLike):
        raise FileNotFoundError(f"{os.fspath(source)!r}: there is no such file")
    else:
        split = split or "validation"
        rows = hub_rows(os.fspath(source), split)
        hashed = describe_dataset([json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows])
        description = {"name": os.fspath(source), "sha256": hashed["sha256"]}
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
            f"{os.path.basename(source)}: {len(data.mended)} answers were not at their offset and are found elsewhere "
            f"in their paragraph; {len(data.lost)} questions have no answer that is in their paragraph, these do not "
            f"train{': ' + ', '.join(data.lost[:5]) if data.lost else ''}"
        )
    return data


def korquad_data(
    train_file: str | os.PathLike[str] | None = None, eval_file: str | os.PathLike[str] | None = None, seed: int = 0
) -> tuple[KorQuADData, KorQuADData]:
    """What to train and what to measure on: two files, a file split by article with `seed`, or the Hub's KorQuAD 1.0.

    Raises:
        ValueError: `eval_file` without `train_file`; and as `read_korquad` and `split_by_article`.
    """
    if train_file is None and eval_file is not None:
        raise ValueError("eval_file without train_file: give both, or neither for the Hub's KorQuAD 1.0")
    if train_file is None:
        return read_korquad(split="train"), read_korquad(split="validation")
    if eval_file is None:
        return split_by_article(read_korquad(train_file), seed=seed)
    return read_korquad(train_file, "train"), read_korquad(eval_file, "test")


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
            data.mended += [row["id"]] * once
        starts.append(found)
    question = Question(row["id"], row["article"], row["question"], context, tuple(row["answers"]), tuple(starts))
    if question.span is None:
        data.lost.append(question.id)
    return question
