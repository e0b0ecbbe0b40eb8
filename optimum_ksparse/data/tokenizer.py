"""Reading a model's tokenizer, and noticing that there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_FILE,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from ..records.sources import check_no_token
from .reaching import find_file

# What a model that takes more than text has beside its tokenizer; one name serves images and sound.
_PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME)
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# The processor's and the tokenizer's: without a processor it is saved with the tokenizer, or not wanted.
_TEMPLATES = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)


def check_tokenizer(value: Any) -> None:
    """Raises TypeError or ValueError for what is no tokenizer, nor the name of one."""
    check_no_token("tokenizer", value)
    if value is not None and not isinstance(value, str | os.PathLike) and not hasattr(value, "name_or_path"):
        raise TypeError(f"tokenizer must be a name, a folder, a tokenizer or None, found {type(value).__name__}")


def read_tokenizer(source: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a repository on the Hub; `arguments` are those of `from_pretrained`.

    transformers makes some tokenizers out of a model's config alone, where their files are missing: such a one knows
    a handful of tokens, and everything else is unknown to it.

    Raises:
        OSError: there is none, or the Hub cannot be reached. Other errors of transformers pass through.
    """
    # Not left out: transformers would ask at the terminal whether to run what came with a checkpoint.
    arguments = {**arguments, "trust_remote_code": bool(arguments.get("trust_remote_code"))}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **arguments)
    except ValueError:  # which asks for libraries to make a tokenizer with, also where there is nothing to make it of
        _check_files(source, _FILES, arguments)
        raise
    _check_files(source, {_FILES[0], *filter(None, type(tokenizer).vocab_files_names.values())}, arguments)
    return tokenizer


def _check_files(source: str, names: Collection[str], arguments: Mapping[str, Any]) -> None:
    if arguments.get("gguf_file") is None and not any(find_file(source, name, **arguments) for name in names):
        raise OSError(f"it has no file of a tokenizer ({', '.join(sorted(names))})")


def save_tokenizer(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], **arguments: Any
) -> Exception | None:
    """Saves the tokenizer of a folder or of a repository on the Hub into `folder`, and with it the processor.

    Returns:
        The error for which the source's could not be read, and there is none in `folder`; None where there is one.

    Raises:
        OSError: `folder` cannot be written to.
    """
    processor: dict[str, str] = {}
    tokenizer = unread = None
    try:
        processor = _processor_files(source, arguments)
        tokenizer = read_tokenizer(os.fspath(source), **arguments)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        unread = error
    _copy(processor, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return unread


def copy_processor(source: str | os.PathLike[str], folder: str | os.PathLike[str], **arguments: Any) -> None:
    """Copies the files of the processor of a model that takes more than text, as they are: to load one may need
    libraries for images or sound. A model without one has nothing to copy.

    Raises:
        OSError: the source cannot be read, or `folder` cannot be written to.
    """
    _copy(_processor_files(source, arguments), folder)


def _processor_files(source: str | os.PathLike[str], arguments: dict[str, Any]) -> dict[str, str]:
    """Name → where it lies, of those that the source has."""
    if arguments.get("gguf_file") is not None:
        return {}
    paths = {name: find_file(source, name, **arguments) for name in _PROCESSOR_FILES}
    if any(paths.values()):
        paths |= {name: find_file(source, name, **arguments) for name in _TEMPLATES}
    return {name: path for name, path in paths.items() if path is not None}


def _copy(files: dict[str, str], folder: str | os.PathLike[str]) -> None:
    for name, path in files.items():
        shutil.copyfile(path, Path(folder) / name)


# Of everyday words, so that a tokenizer that was made on the language has them.
_KOREAN = "오늘은 날씨가 좋아서 친구와 함께 공원에서 점심을 먹고 책을 읽었다."
_ENGLISH = "The weather was good today, so I had lunch in the park with a friend and read a book."
# Tokens for a character: those made on Korean take 0.4 to 0.8, those that cut its characters into bytes more than 1.
_MANY = 1.0


def tell_default_text(dataset: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One or two sentences on the default calibration text; the second where the tokenizer has little Korean in it."""
    text = f"Calibration text: dataset={dataset!r}, the default, which is Korean."
    korean, english = (_tokens_for_a_character(tokenizer, sample) for sample in (_KOREAN, _ENGLISH))
    if korean is None or english is None or (korean > _MANY and english < korean):
        what = "has no tokens for Korean" if korean is None else f"takes {korean:.1f} tokens for a Korean character"
        text += (
            f" The model's tokenizer {what}: for a model of another language pass text of that language, such as "
            "dataset='c4' (English), or dataset='self'."
        )
    return text


def _tokens_for_a_character(tokenizer: PreTrainedTokenizerBase, text: str) -> float | None:
    """Tokens per character of a text; None where the tokenizer does not know some of it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return None
    return len(ids) / len(text)
