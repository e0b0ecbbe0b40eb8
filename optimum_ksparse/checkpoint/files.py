"""The files of a checkpoint: found, downloaded from the Hub, checked by their headers, and known again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    extract_commit_hash,
)

from ..data import find_file
from ..records import RESULTS_NAME, build

# Files beside the weights that say what a model is: its config, its tokenizer, its code.
_SUFFIXES = {".json", ".py", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".spm", ".vocab"}
DIGESTS = "sha256"  # of each weight file, in the metadata of an index that `prune_checkpoint` wrote
_AGAIN = "download or copy the checkpoint again"
_PIECE_BYTES = 1 << 22
_SHOWN_BYTES = 1 << 30  # reading less is done before anybody has read what a bar says
# What headers call the dtypes of weights.
FLOATS = ("F64", "F32", "F16", "BF16")


class Header(NamedTuple):
    """What a safetensors file says of a tensor; `file` is its name."""

    shape: list[int]
    dtype: str
    file: str


class WeightFiles:
    """The weight files of a checkpoint by their names, whole as far as their headers tell; and what says what the
    model is: files `beside` them, for which on the Hub the repository's `commit` stands."""

    def __init__(self, paths: dict[str, Path], beside: dict[str, Path], commit: str | None) -> None:
        self.paths, self._commit = paths, commit
        self._files = {**beside, **paths}
        self._digests: dict[str, str] = {}
        self._states: dict[str, tuple[int, ...]] = {}  # as they were when they were read

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.paths.values())

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, read to its end once, by its name; and the commit. `check` notices a file that was
        written meanwhile."""
        if not self._digests:
            files = self._files
            size = sum(path.stat().st_size for path in files.values())
            bar = tqdm(None, "Reading the source", size, False, unit="B", unit_scale=True, disable=size < _SHOWN_BYTES)
            with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                self._states = {name: _state(path) for name, path in files.items()}
                digests = pool.map(lambda path: sha256_of(path, bar), files.values())
                self._digests = dict(zip(files, digests, strict=True))
            if self._commit is not None:
                self._digests["commit"] = self._commit
        return self._digests

    def sha256(self) -> str:
        """SHA-256 of `digests`: tells whether the files are those of an earlier run."""
        return hashlib.sha256(json.dumps(self.digests(), sort_keys=True).encode()).hexdigest()

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises OSError where a file of these names, or any file, is no longer what `digests` has read. One whose
        times alone have changed is read again."""
        for name in self._states if names is None else self._states.keys() & names:
            state = _state(self._files[name])
            if state != self._states[name] and sha256_of(self._files[name]) != self._digests[name]:
                raise OSError(
                    f"{self._files[name]} has changed since the run began: let it be what it was and call again, or "
                    "start over with resume=False"
                )
            self._states[name] = state


def _state(path: Path) -> tuple[int, ...]:
    """What changes with the content of a file: its time of change too, which no copying program sets back."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_of(path: Path, bar: Any = None) -> str:
    """SHA-256 of a file; `bar` is told of the bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            if bar is not None:
                bar.update(len(piece))
    return digest.hexdigest()


def find_weight_files(source: str | os.PathLike[str], **loading: Any) -> WeightFiles:
    """The weight files of a local folder, or of a repository on the Hub, from which they are downloaded; and the files
    beside them.

    Raises:
        FileNotFoundError: there are none, or the index names one that is missing.
        PermissionError: one may not be read.
        ValueError: there are pickle files only; a file is truncated or damaged; the index and the files do not hold
            the same tensors, each of them once.
    """

    def find(name: str) -> str | None:
        return find_file(source, name, **loading)

    names, index = [SAFE_WEIGHTS_NAME], None
    if find(SAFE_WEIGHTS_NAME) is None:
        index_path = find(SAFE_WEIGHTS_INDEX_NAME)
        if index_path is None and (find(WEIGHTS_NAME) or find(WEIGHTS_INDEX_NAME)):
            raise ValueError(
                f"{source} has its weights as pickle only ({WEIGHTS_NAME}), which runs code when it is read and "
                "cannot be read block by block; convert it once, on a machine that holds the model: "
                'AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(folder)'
            )
        if index_path is None:
            raise FileNotFoundError(f"{source} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
        index = read_index(Path(index_path))
        names = sorted(set(index.values()))
    paths = {}
    for name in names:
        if (path := find(name)) is None:
            raise FileNotFoundError(f"{source} has no {name}, which its {SAFE_WEIGHTS_INDEX_NAME} names; {_AGAIN}")
        paths[name] = Path(path)
    headers = read_headers(paths.values())
    if index is not None:
        _check_index(index, headers)
    if os.path.isdir(source):
        return WeightFiles(paths, _files_beside(Path(source, loading.get("subfolder") or "")), None)
    return WeightFiles(paths, {}, extract_commit_hash(str(paths[names[0]]), None))


def _files_beside(folder: Path) -> dict[str, Path]:
    """Files of a folder, and of those in it, that say what a model is; none that is hidden, and no results of ours."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES}
    return {
        name.as_posix(): path
        for name, path in paths.items()
        if path.is_file() and path.name != RESULTS_NAME and not any(part.startswith(".") for part in name.parts)
    }


def check_index(source: str | os.PathLike[str], variant: str | None = None, **loading: Any) -> None:
    """Raises ValueError where the index of the weight files, if there is one, is damaged or names files elsewhere."""
    ending = ".json" if variant is None else f".{variant}.json"
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = find_file(source, name.removesuffix(".json") + ending, **loading)
        if path is not None:
            read_index(Path(path), (".safetensors", ".bin"))


def changed_files(folder: Path) -> list[str]:
    """Weight files in a folder that are not what `prune_checkpoint` wrote, as the index tells."""
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata", {}) if path.is_file() else {}
    digests = build(dict[str, str], metadata.get(DIGESTS, {}), DIGESTS)
    total = sum((folder / name).stat().st_size for name in digests)
    with tqdm(total=total, desc="Checking the weights", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        return [name for name, digest in digests.items() if sha256_of(folder / name, bar) != digest]


def read_index(path: Path, endings: tuple[str, ...] = (".safetensors",)) -> dict[str, str]:
    """Tensor → file. Names that leave the folder are not followed.

    Raises:
        ValueError: it is no index, or names files elsewhere, or of other endings.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is damaged: {type(error).__name__}: {error}") from None
    outside = [file for file in names.values() if re.search(r"[/\\]", file) or not file.endswith(endings)]
    if outside:
        raise ValueError(
            f"{path.name} names {outside[0]!r} as a weight file; allowed: files beside it that end in "
            f"{' or '.join(endings)}"
        )
    if not names:
        raise ValueError(f"{path.name} is empty")
    return names


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, Header]:
    """Shape, dtype and file of each tensor in safetensors files, by name.

    Raises:
        PermissionError: a file may not be read.
        ValueError: a file is truncated, or a tensor is in two of them.
    """
    headers: dict[str, Header] = {}
    for path in files:
        name = os.path.basename(path)
        try:
            with open(path, "rb"), safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in headers:
                        raise ValueError(
                            f"{key} is in {headers[key].file} and in {name}, and which of the two counts cannot be "
                            f"told: {_AGAIN}, or save it anew"
                        )
                    view = file.get_slice(key)
                    headers[key] = Header(view.get_shape(), view.get_dtype(), name)
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is truncated or damaged: {error}; {_AGAIN}") from error
    return headers


def _check_index(index: dict[str, str], headers: dict[str, Header]) -> None:
    """Raises ValueError where the index and the files do not hold the same tensors."""
    holders = {tensor: header.file for tensor, header in headers.items()}
    if index != holders:
        tensor = min(tensor for tensor, _ in index.items() ^ holders.items())
        raise ValueError(
            f"{tensor} is in {index.get(tensor, 'no file')} by the index, and in fact in "
            f"{holders.get(tensor, 'none of the files')}; {_AGAIN}"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises OSError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"about {needed / 1e9:.2f} GB are needed for {what}, and {free / 1e9:.2f} GB are free; make space, or "
            "name an output folder on another disk",
            os.fspath(folder),
        )
