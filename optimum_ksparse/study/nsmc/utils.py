"""Functions of the NSMC tasks: lm-evaluation-harness loads this file by its path."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

DATASET = "e9t/nsmc"
# The repository itself holds a script, which datasets 4 no longer runs; the Hub keeps its rows as Parquet beside it.
REVISION = "refs/convert/parquet"
NUM_ITEMS, NUM_FEWSHOT, MAX_EXAMPLE_TOKENS, SEED = 500, 10, 25, 1234
# Hangul: syllables; single letters, as ㅋㅋ and ㅠㅠ; conjoining letters. Not the fillers, which nobody sees.
_NOT_HANGUL = re.compile(r"[^\s가-힣\u3131-\u3163\u3165-\u318e\u1100-\u115e\u1161-\u11ff\ua960-\ua97c\ud7b0-\ud7fb]")


def load(tokenizer: Any = None, pretrained: str | None = None, **settings: Any) -> dict[str, Dataset]:
    """The items and the solved examples, drawn with `SEED`, texts reduced to Hangul and single spaces, those with
    nothing left left out: of the test split (where local files have none, the validation split) 500 reviews, of the
    training split ten of at most 25 tokens. Labels are as they come. `pretrained` is the name of the model, as
    `lm_eval --model_args` passes it; `data_files` and `cache_dir` are those of `load_dataset` for Parquet files,
    without which the reviews come from the Hub."""
    local = {key: settings[key] for key in ("data_files", "cache_dir") if key in settings}
    splits = load_dataset("parquet", **local) if local else load_dataset(DATASET, revision=REVISION)
    if not callable(tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained)
    measured = "test" if "test" in splits else "validation"
    reviews = _clean(splits[measured])
    items = random.Random(SEED).sample(reviews, min(NUM_ITEMS, len(reviews)))
    train = _clean(splits["train"])
    random.Random(SEED).shuffle(train)
    short = (
        row
        for row in train
        if len(tokenizer(row["document"], add_special_tokens=False)["input_ids"]) <= MAX_EXAMPLE_TOKENS
    )
    examples = list(itertools.islice(short, NUM_FEWSHOT))
    if len(examples) < NUM_FEWSHOT:
        raise ValueError(
            f"the training split of NSMC has {len(examples)} reviews of at most {MAX_EXAMPLE_TOKENS} tokens, "
            f"{NUM_FEWSHOT} are needed"
        )
    return {measured: Dataset.from_list(items), "train": Dataset.from_list(examples)}


def keep_hangul(text: str) -> str:
    """A text reduced to Hangul and single spaces: any white space is a space, everything else is dropped."""
    return " ".join(_NOT_HANGUL.sub("", text).split())


def macro_f1(items: list[tuple[int, int]]) -> float:
    """Mean over both labels of F1, of (label, prediction)."""
    from sklearn.metrics import f1_score

    return float(f1_score(*zip(*items, strict=True), average="macro", labels=[0, 1], zero_division=0))


def _clean(rows: Dataset) -> list[dict[str, Any]]:
    reviews = [{"document": keep_hangul(row["document"] or ""), "label": row["label"]} for row in rows]
    return [review for review in reviews if review["document"]]
