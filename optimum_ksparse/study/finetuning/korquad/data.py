"""KorQuAD 1.0: reading it from a file in the form of SQuAD 1.1, or from the Hub."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ....data.dataset import describe_dataset
from ....data.documents import hub_rows
from ..settings import KorQuADSettings

logger = logging.get_logger(__name__)

KORQUAD_DATASET = "KorQuAD/squad_kor_v1"
_TRAIN_SHARE = 0.8  # of the articles of a file that is split


@dataclass(frozen=True)
class Question:
    """A question over a paragraph of an article, with the texts of its right answers. `span` are the characters of the
    first answer that the paragraph holds at its offset, or else once: first, and one after the last. None where there
    is none: the question does not train, and is measured."""

    id: str
    article: str
    question: str
    context: str
    answers: tuple[str, ...]
    span: tuple[int, int] | None


@dataclass(frozen=True)
class KorQuADData:
    """Questions in the order of the data, name or file and SHA-256 of these, and which part of them it is."""

    questions: list[Question]
    description: dict[str, Any]
    split: str


def korquad_data(settings: KorQuADSettings) -> tuple[KorQuADData, KorQuADData]:
    """What to train and what to measure on: two files, a file split by article with the seed, or the Hub's KorQuAD
    1.0."""
    if settings.train_file is None:
        return read_korquad(split="train"), read_korquad(split="validation")
    if settings.eval_file is None:
        return split_by_article(read_korquad(settings.train_file), settings.seed)
    return read_korquad(settings.train_file, "train"), read_korquad(settings.eval_file, "test")


def read_korquad(source: str | os.PathLike[str] = KORQUAD_DATASET, split: str | None = None) -> KorQuADData:
    """Reads KorQuAD 1.0, or anything else in the form of SQuAD 1.1: a JSON file, or a dataset on the Hub, whose
    `split` is "validation" unless it is named. Of a file it is the name to record. Raises FileNotFoundError for a
    missing `.json`, ValueError where the data are not in that form, or an id comes twice, ConnectionError where the
    Hub's cannot be read."""
    if os.path.isfile(source) or os.fspath(source).endswith(".json") or isinstance(source, os.PathLike):
        description, rows, split = describe_dataset(Path(source)), _file_rows(Path(source)), split or "all"
    else:
        split = split or "validation"
        name, offline = os.fspath(source), "without a network pass train_file, JSON in the form of SQuAD 1.1"
        read = list(hub_rows(f"{name}, {split},", name, split=split, offline=offline))
        hashed = describe_dataset([json.dumps(row, ensure_ascii=False, sort_keys=True) for row in read])
        description = {"name": name, "sha256": hashed["sha256"]}
        rows = ((row["title"], row["context"], row) for row in read)
    questions: dict[str, Question] = {}
    moved = 0
    try:
        for article, context, row in rows:
            question, is_moved = _question(article, context, row)
            if question.id in questions:
                raise ValueError(f"the id {question.id!r} comes twice")
            questions[question.id] = question
            moved += is_moved
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{os.path.basename(source)} is not in the form of SQuAD 1.1 after {len(questions)} questions: "
            f"{type(error).__name__}: {error}"
        ) from None
    if not questions:
        raise ValueError(f"{os.fspath(source)} holds no questions")
    lost = [question.id for question in questions.values() if question.span is None]
    if moved or lost:
        logger.warning(
            f"{os.path.basename(source)}: {moved} answers were not at their offset and are found elsewhere in their "
            f"paragraph; {len(lost)} questions have no answer that is in their paragraph, these do not train"
            f"{': ' + ', '.join(lost[:5]) if lost else ''}"
        )
    return KorQuADData(list(questions.values()), description, split)


def split_by_article(data: KorQuADData, seed: int) -> tuple[KorQuADData, KorQuADData]:
    """Splits data into "train", four fifths of the articles, and "test". Raises ValueError where one of them would be
    empty."""
    articles = list(dict.fromkeys(question.article for question in data.questions))
    random.Random(seed).shuffle(articles)
    count = round(_TRAIN_SHARE * len(articles))
    if count == len(articles):
        raise ValueError(
            f"train_file holds {len(articles)} articles, too few to leave some to measure on: pass eval_file"
        )
    name = f"{_TRAIN_SHARE:g} of the articles, seed {seed}"
    chosen = set(articles[:count])
    train = [question for question in data.questions if question.article in chosen]
    test = [question for question in data.questions if question.article not in chosen]
    return (
        KorQuADData(train, data.description, f"train: {name}"),
        KorQuADData(test, data.description, f"test: all but {name}"),
    )


def _file_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Article, paragraph and entry of each question."""
    for number, article in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"]):
        for paragraph in article["paragraphs"]:
            yield from ((str(number), paragraph["context"], entry) for entry in paragraph["qas"])


def _question(article: str, context: Any, row: Mapping[str, Any]) -> tuple[Question, bool]:
    """The question of a row, and whether its span was found elsewhere than at the answer's offset."""
    answers = row["answers"]
    if isinstance(answers, Mapping):  # of the Hub
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
    else:
        pairs = [(answer["text"], answer["answer_start"]) for answer in answers]
    texts = [row["id"], article, row["question"], context, *(text for text, _ in pairs)]
    if not pairs or not all(isinstance(text, str) for text in texts):
        raise ValueError("id, question, context and at least one answer must be texts")
    if not all(type(start) is int and start >= 0 for _, start in pairs):
        raise ValueError("answer_start must be an integer of at least 0")
    question = Question(row["id"], article, row["question"], context, tuple(text for text, _ in pairs), None)
    for text, start in pairs:
        if text and context[start : start + len(text)] == text:
            return replace(question, span=(start, start + len(text))), False
        if text and context.count(text) == 1:
            start = context.index(text)
            return replace(question, span=(start, start + len(text))), True
    return question, False
