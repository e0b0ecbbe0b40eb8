"""Files of a folder or on the Hub; and a Hub that cannot be reached, told at once: each library that reads it would
try again for half a minute."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
from transformers.utils import cached_file

# Arguments of `from_pretrained` that say where on the Hub something is read.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_SECONDS = 5
# Of the client's library, httpx or its successor: nothing came back, not even an error. A slow answer is one.
_NO_CONNECTION = ("ConnectError", "ConnectTimeout")


def hub_arguments(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where on the Hub something is read."""
    return {name: loading[name] for name in HUB_ARGUMENTS if loading.get(name) is not None}


def find_file(source: str | os.PathLike[str], name: str, *, quiet: bool = False, **loading: Any) -> str | None:
    """Path of a file of a folder or of a repository on the Hub, from which it is downloaded; None where it has none,
    or, with `quiet`, cannot be reached. `loading`: arguments of `from_pretrained`. Raises OSError."""
    errors = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": not quiet}
    return cached_file(source, name, **errors, **hub_arguments(loading))


def is_unreachable(error: BaseException) -> bool:
    """Whether a request could not be sent at all: no network, no such host, nothing that listens."""
    return isinstance(error, errors.HTTPError) and type(error).__name__ in _NO_CONNECTION


@contextmanager
def reached_or_cached(repository: str, kind: str = "dataset") -> Iterator[None]:
    """Within it a dataset, or of another `kind` ("model"), is read: from the Hub with all retries of the libraries,
    or, where the Hub cannot be reached, from what was downloaded before.

    Raises:
        ConnectionError: the Hub cannot be reached, and it was not downloaded before.
    """
    unreachable = _unreachable(repository, kind)
    if unreachable is None:
        yield
        return
    modules = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    except Exception as error:  # the libraries raise many kinds here
        raise ConnectionError(
            f"the Hub cannot be reached ({unreachable}), and {repository} was not downloaded before"
        ) from error
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def _unreachable(repository: str, kind: str) -> str | None:
    """Why the Hub cannot be reached, by one request; None where it answers, whatever it says."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, "README.md", repo_type=kind), timeout=_SECONDS)
    except Exception as error:  # what it says is for the libraries to deal with
        return " ".join(str(error).split()) if is_unreachable(error) else None
    return None
