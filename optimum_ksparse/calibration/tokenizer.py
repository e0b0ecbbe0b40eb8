"""Reading a model's tokenizer, and noticing that there is none."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")


def read_tokenizer(source: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a repository on the Hub; `arguments` are those of `from_pretrained`.

    transformers makes some tokenizers out of a model's config alone, where their files are missing: such a one knows
    a handful of tokens, and everything else is unknown to it.

    Raises:
        OSError: there is none, or the Hub cannot be reached. Other errors of transformers pass through.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **arguments)
    if arguments.get("gguf_file") is None:
        hub = {name: arguments[name] for name in _HUB_ARGUMENTS if arguments.get(name) is not None}
        names = {"tokenizer.json", *(name for name in type(tokenizer).vocab_files_names.values() if name)}
        found = (cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in names)
        if not any(found):
            raise OSError(f"it has no file of a tokenizer ({', '.join(sorted(names))})")
    return tokenizer
