"""What of an earlier model goes when another one takes its place: files that would be read beside the new ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)

from ...records import HEAD_NAME, MASKS_NAME, MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME, TUNING_NAME

_WEIGHT_FILE = re.compile(r"model(\.[^.-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^.]+)?\.json)?")
_RECORDS = (REPORT_NAME, RESULTS_NAME, MERGE_REPORT_NAME, TUNING_NAME)
_BESIDE_WEIGHTS = (
    *(*_RECORDS, GENERATION_CONFIG_NAME, HEAD_NAME),
    # `from_pretrained` loads an adapter that lies beside a model on top of it.
    *(ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, MASKS_NAME),
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Each kind of tokenizer has some of these, and reads what it finds of the others.
_BESIDE_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *(CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE),
)


def outdated(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Names, of those in a folder or a repository, that go when the files `new` take their places: beside new weights
    those of an earlier checkpoint of the same variant, its records and its adapter; beside a new tokenizer the other
    files of an earlier one."""
    new = set(new)
    variants = {_variant(name) for name in new if _WEIGHT_FILE.fullmatch(name)}
    gone = {*(_BESIDE_WEIGHTS if variants else ()), *(_BESIDE_TOKENIZER if _TOKENIZER_CONFIG in new else ())}
    return sorted(
        name
        for name in set(there) - new
        if name in gone or (_WEIGHT_FILE.fullmatch(name) and _variant(name) in variants)
    )


def drop_records(folder: str | os.PathLike[str]) -> None:
    """Removes what is recorded of a sparse model, in whose place another has been written that has no records."""
    if (Path(folder) / REPORT_NAME).is_file():
        for name in _RECORDS:
            (Path(folder) / name).unlink(missing_ok=True)


def _variant(name: str) -> str | None:
    match = _WEIGHT_FILE.fullmatch(name)
    return None if match is None else match[1] or match[4]


def check_places(directory: Path) -> None:
    """Raises FileExistsError where a folder is in the place of a file of a checkpoint: before the work, not after."""
    for path in directory.iterdir() if directory.is_dir() else ():
        is_file = path.name in (CONFIG_NAME, REPORT_NAME) or _WEIGHT_FILE.fullmatch(path.name)
        if is_file and path.is_dir() and not path.is_symlink():
            raise FileExistsError(f"{path} is a folder, where a file has to be: move it away")
