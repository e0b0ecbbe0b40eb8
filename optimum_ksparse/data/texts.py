"""Text to measure perplexity on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

from .dataset import TEXT_SUFFIXES, describe_dataset
from .documents import HELD_OUT_EVERY, HUB_DATASETS, is_held_out, read_file, stream

# Of "kowiki": enough for a stable figure (some 200,000 tokens), little enough to stream in a minute.
NUM_ARTICLES = 256

_FORMS = 'allowed: "kowiki", or a .txt or .jsonl file; in Python also a list of texts ([text] for one)'


def describe_texts(texts: str | os.PathLike[str] | Sequence[str]) -> dict[str, Any]:
    """What JSON says of the texts, without reading more than a local file.

    Raises:
        TypeError, ValueError: they have none of the allowed forms.
        FileNotFoundError: the file is missing.
    """
    if isinstance(texts, str) and texts == "kowiki":
        repository, configuration = HUB_DATASETS[texts]
        return {
            "name": texts,
            "dataset": repository,
            "configuration": configuration,
            "slice": f"first {NUM_ARTICLES} articles whose id is divisible by {HELD_OUT_EVERY}",
        }
    if isinstance(texts, str | os.PathLike):
        if not os.fspath(texts).endswith(TEXT_SUFFIXES):
            shown = os.fspath(texts)
            raise ValueError(f"texts={shown if len(shown) < 80 else shown[:79] + '…'!r} is not known; {_FORMS}")
        if not os.path.isfile(texts):
            raise FileNotFoundError(f"texts={os.fspath(texts)!r}: there is no such file; {_FORMS}")
    elif not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts is {type(texts).__name__}, or holds something that is no text; {_FORMS}")
    elif not texts:
        raise ValueError(f"texts is empty; {_FORMS}")
    return dict(describe_dataset(list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else texts))


def evaluation_texts(texts: str | os.PathLike[str] | Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The texts, in their order, and their description with the SHA-256 of what was read.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `describe_texts`; or a row has no text.
        ConnectionError: they cannot be read from the Hub.
    """
    description = describe_texts(texts)
    if isinstance(texts, str) and texts == "kowiki":
        offline = "without a network, measure on a .txt or .jsonl file or on a list of texts"
        articles = itertools.islice(filter(is_held_out, stream(texts, offline=offline)), NUM_ARTICLES)
        documents = [str(article["text"]) for article in articles]
        return documents, {**description, "sha256": describe_dataset(documents)["sha256"]}
    if isinstance(texts, str | os.PathLike):
        rows = read_file(os.fspath(texts))
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, str):
                raise ValueError(f"{os.path.basename(texts)}, row {number} is a conversation; perplexity needs texts")
        return rows, description
    return list(texts), description
