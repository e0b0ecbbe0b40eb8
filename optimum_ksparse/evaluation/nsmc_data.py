"""NSMC's data: the solved examples and the items of a run, drawn with a seed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import reached_or_cached
from .kobest_data import describe_data, read_items

NSMC_DATASET = "e9t/nsmc"
# The repository itself holds a script, which datasets 4 no longer runs; the Hub keeps its rows as Parquet beside it.
PARQUET_REVISION = "refs/convert/parquet"

# Hangul: syllables; single letters, as ㅋㅋ and ㅠㅠ; conjoining letters. Not the fillers, which nobody sees.
_NOT_HANGUL = re.compile(r"[^\s가-힣\u3131-\u3163\u3165-\u318e\u1100-\u115e\u1161-\u11ff\ua960-\ua97c\ud7b0-\ud7fb]")


@dataclass(frozen=True)
class Review:
    """`text` is of Hangul and spaces; `label` is 1 for a positive review and 0 for a negative one."""

    text: str
    label: int


@dataclass(frozen=True)
class NsmcData:
    """What a run is made of: solved `examples`, `items` to solve, the `split` that these are of."""

    examples: list[Review]
    items: list[Review]
    split: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the examples and the items."""
        rows = [[(review.text, review.label) for review in part] for part in (self.examples, self.items)]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def keep_hangul(text: str) -> str:
    """A text reduced to Hangul and single spaces. Single letters (ㅋㅋ, ㅠㅠ) are Hangul too; any white space is a
    space; everything else is dropped without one."""
    return " ".join(_NOT_HANGUL.sub("", text).split())


def describe_nsmc(data_dir: str | os.PathLike[str] | None, num_fewshot: int) -> dict[str, str]:
    """Which data are measured on: the name on the Hub, or the SHA-256 of the local files that are read."""
    if data_dir is None:
        return {"name": NSMC_DATASET, "revision": PARQUET_REVISION}
    return describe_data("nsmc", data_dir, num_fewshot)


def draw_nsmc(
    tokenizer: PreTrainedTokenizerBase,
    data_dir: str | os.PathLike[str] | None,
    num_fewshot: int,
    num_samples: int,
    max_example_tokens: int,
    seed: int,
) -> NsmcData:
    """Reads the data, reduces each text to Hangul and spaces, leaves empty ones out, and draws with `seed`: from the
    training split `num_fewshot` examples of at most `max_example_tokens` tokens, from the test split (where a folder
    has none, the validation split) `num_samples` items. The labels are as they come.

    Raises:
        ValueError: there are too few, or a line of a file is not as it must be.
        FileNotFoundError: a file of `data_dir` is missing.
        ImportError, ConnectionError: `datasets` is not installed, or the Hub cannot be read.
    """
    splits = read_items("nsmc", data_dir, num_fewshot) if data_dir is not None else _read_hub(num_fewshot)
    split = "test" if "test" in splits else "validation"
    reviews = _clean(splits[split])
    if num_samples > len(reviews):
        raise ValueError(
            f"num_samples={num_samples} is too large: the {split} split of NSMC has {len(reviews)} reviews with Hangul"
        )
    items = random.Random(seed).sample(reviews, num_samples)
    train = _clean(splits.get("train", ()))
    random.Random(seed).shuffle(train)
    return NsmcData(_short(train, tokenizer, num_fewshot, max_example_tokens), items, split)


def _short(reviews: list[Review], tokenizer: PreTrainedTokenizerBase, count: int, most: int) -> list[Review]:
    """The first `count` reviews of at most `most` tokens."""
    found: list[Review] = []
    for review in reviews:
        if len(found) == count:
            return found
        if len(tokenizer(review.text, add_special_tokens=False)["input_ids"]) <= most:
            found.append(review)
    if len(found) < count:
        raise ValueError(
            f"num_fewshot={count} is too large: the train split of NSMC has {len(found)} reviews of at most "
            f"max_example_tokens={most} tokens"
        )
    return found


def _clean(rows: Iterable[dict[str, Any]]) -> list[Review]:
    reviews = [Review(keep_hangul(row["document"] or ""), row["label"]) for row in rows]
    return [review for review in reviews if review.text]


def _read_hub(num_fewshot: int) -> dict[str, Iterable[dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f'NSMC needs datasets: pip install "datasets>=4.0" ({error})') from error
    try:
        with reached_or_cached(NSMC_DATASET):
            return {
                split: load_dataset(NSMC_DATASET, revision=PARQUET_REVISION, split=split)
                for split in ("test", *(("train",) if num_fewshot else ()))
            }
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds here
        raise ConnectionError(
            f"NSMC ({NSMC_DATASET}, {PARQUET_REVISION}) cannot be read from the Hub: {type(error).__name__}: {error}; "
            "without a network pass data_dir, a folder of nsmc/<train | test>.jsonl"
        ) from error
