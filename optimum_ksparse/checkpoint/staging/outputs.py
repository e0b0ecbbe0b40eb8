"""Where the package may write: the one rule of all commands and functions that have an output folder; and what of an
earlier model goes when another one takes its place: files that would be read beside the new ones."""

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

# What a folder may hold beforehand: a repository's own files, and hidden ones.
_HARMLESS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_HUB_CACHE = re.compile(r"(models|datasets|spaces)--.+")


def check_output(
    output: str | os.PathLike[str],
    *,
    reads: Iterable[object] = (),
    ours: Iterable[str] = (),
    overwrite: bool | None = False,
) -> None:
    """Raises an error where nothing may be written into the folder `output`; called before any work.

    It may be a new or an empty folder (but for a README, a licence and hidden files), or one with what an earlier run
    of the same kind left there. With `overwrite` it may be any folder but the Hub's cache: files of the same names are
    replaced, and what would be read beside the new ones goes (`outdated`); what else is there stays.

    Args:
        reads: what the caller reads from there on: folders and files are looked at, names on the Hub passed over.
        ours: names of files by which an earlier run of the same kind is known.
        overwrite: None where the caller has no such setting.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: it is, holds, or lies in one of `reads`; or it is in the Hub's cache.
        FileExistsError: it holds something else, such as another model.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output={os.fspath(output)!r} is a file; pass a folder")
    if any(_HUB_CACHE.fullmatch(part) for part in path.resolve().parts):
        raise ValueError(f"output={os.fspath(output)!r} is in the Hub's cache; pass a folder of your own")
    if overwrite:
        return
    check_apart(output, reads)
    if not path.exists() or any(os.path.lexists(path / name) for name in ours):
        return
    other = sorted(entry.name for entry in path.iterdir() if entry.name not in _HARMLESS and entry.name[0] != ".")
    if other:
        raise FileExistsError(
            f"output={os.fspath(output)!r} holds something else ({', '.join(other[:3])}"
            f"{', …' if len(other) > 3 else ''}); pass an empty folder, or one that does not exist yet"
            + ("" if overwrite is None else "; or set overwrite (--overwrite) to write over it")
        )


def check_apart(output: str | os.PathLike[str], reads: Iterable[object]) -> None:
    """Raises ValueError where the folder `output` is, holds, or lies in something that is read meanwhile."""
    target = Path(output).resolve()
    for source in reads:
        if not isinstance(source, str | os.PathLike) or not os.path.exists(source):
            continue
        path = Path(source).resolve()
        folder = path if path.is_dir() else path.parent
        if target == folder or (target.exists() and os.path.samefile(target, folder)):
            relation = "is" if path.is_dir() else "holds"
        elif path.is_relative_to(target):
            relation = "holds"
        elif path.is_dir() and target.is_relative_to(folder):
            relation = "lies in"
        else:
            continue
        raise ValueError(
            f"output={os.fspath(output)!r} {relation} the source {os.fspath(source)!r}; pass another folder"
        )


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
