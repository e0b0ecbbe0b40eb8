"""The Hub as the commands use it: with `--token` and `--cache-dir`, and models that are looked for before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from transformers.utils import CONFIG_NAME

from ..checkpoint.staging import recover
from ..records import is_repo_id
from ..records.sources import clean_token
from .errors import UsageError


@contextmanager
def hub_access(token: str | None, cache_dir: str | None) -> Iterator[None]:
    """Within it every request to the Hub, of this process and of those that it starts, is sent with this token, and
    downloads are kept in this folder. A token that is passed on by each function would be left out by some."""
    names = ("HF_HUB_CACHE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_OFFLINE")
    environment, kept = dict(os.environ), {name: getattr(constants, name) for name in names}
    if token is not None:
        try:
            os.environ["HF_TOKEN"] = clean_token(token)
        except ValueError as error:
            raise UsageError(str(error)) from None
        os.environ.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
        constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = False
    if cache_dir is not None:
        os.environ["HF_HUB_CACHE"] = constants.HF_HUB_CACHE = os.path.abspath(os.path.expanduser(cache_dir))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for name, value in kept.items():
            setattr(constants, name, value)


def check_source(name: str, source: str, revision: str | None = None) -> None:
    """Raises FileNotFoundError where a model, or a tokenizer, is neither a folder nor a repository on the Hub that can
    be read, and says which of them it was taken for; at once, because each library that reads it would try again.
    What a save that was cut off has left in a folder is put right, before any of its files is read."""
    if os.path.isdir(source):
        recover(source)
        return
    if os.path.exists(source):
        raise NotADirectoryError(f"{name}={source!r} is a file; name the folder of the model, or a Hub id")
    is_name = is_repo_id(source) and source.count("/") <= 1 and source[0] not in "./~"
    if not is_name or os.path.isdir(os.path.dirname(source)):  # it can only have been meant for a folder
        raise FileNotFoundError(f"{name}={source!r}: there is no such folder")
    try:
        # One request, where downloading would try for half a minute to reach a Hub that cannot be reached.
        get_hf_file_metadata(hf_hub_url(source, CONFIG_NAME, revision=revision))
    except errors.EntryNotFoundError:
        return  # a repository without a config, such as an adapter's, or one of GGUF files
    except errors.HfHubHTTPError as error:
        log_in = "pass token=… or log in with `hf auth login`"
        if isinstance(error, errors.GatedRepoError):
            reason = f"the Hub gives it to those alone who have accepted its terms: do so on its page, and {log_in}"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"there is no such branch, tag or commit: revision={revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = (
                f"there is no such folder, and no such model on the Hub that may be read; for a private one {log_in}"
            )
        elif error.response is not None and error.response.status_code == 401:
            reason = f"the Hub does not accept the token (401): {log_in} again"
        else:
            reason = f"the Hub does not answer as it should: {next(iter(str(error).splitlines()), error)}"
        raise FileNotFoundError(f"{name}={source!r}: {reason}") from error
    except (errors.HTTPError, OSError) as error:
        reason = (
            "the Hub cannot be reached" if not constants.HF_HUB_OFFLINE else "the Hub is switched off (HF_HUB_OFFLINE)"
        )
        if not isinstance(try_to_load_from_cache(source, CONFIG_NAME, revision=revision), str):
            raise FileNotFoundError(
                f"{name}={source!r}: there is no such folder, {reason}, and it was not downloaded before"
            ) from error
        constants.HF_HUB_OFFLINE = True  # what reads it now takes the download at once
