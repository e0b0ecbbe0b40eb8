"""The safetensors files of a checkpoint: found, downloaded where they are on the Hub, and checked by their headers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

# Pieces of a file that identify it, and how long each is: reading all of it would take as long as pruning begins.
_PIECES, _PIECE_BYTES = 64, 16384


@dataclass
class WeightFiles:
    """The weight files of a checkpoint, whole as far as their headers tell.

    Attributes:
        paths: of the files, by their names in the checkpoint.
        num_bytes: of all of them.
    """

    paths: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths.values())

    def fingerprint(self) -> str:
        """Tells whether the files are those of an earlier run: SHA-256 of names, sizes, headers and pieces spread over
        the weights."""
        digest = hashlib.sha256()
        for name, path in sorted(self.paths.items()):
            size = path.stat().st_size
            digest.update(f"{name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
                for piece in range(_PIECES):
                    file.seek(piece * max(0, size - _PIECE_BYTES) // (_PIECES - 1))
                    digest.update(file.read(_PIECE_BYTES))
        return digest.hexdigest()


def find_weight_files(source: str | os.PathLike[str], **hub_arguments: Any) -> WeightFiles:
    """The weight files of a local folder, or of a repository on the Hub, from which they are downloaded.

    Raises:
        FileNotFoundError: there are none, or the index names one that is missing.
        ValueError: there are pickle files only; a file is truncated or damaged; the index names a tensor that its file
            does not hold.
    """

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)

    single, index = find(SAFE_WEIGHTS_NAME), None
    if single is not None:
        files = WeightFiles({SAFE_WEIGHTS_NAME: Path(single)})
    else:
        index_path = find(SAFE_WEIGHTS_INDEX_NAME)
        if index_path is None:
            raise _no_weights(source, pickled=find(WEIGHTS_NAME) is not None or find(WEIGHTS_INDEX_NAME) is not None)
        index = _read_index(Path(index_path))
        paths = {name: find(name) for name in sorted(set(index.values()))}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            raise FileNotFoundError(
                f"{source} has no {missing[0]}, which its {SAFE_WEIGHTS_INDEX_NAME} names"
                + (f" ({len(missing)} files are missing)" if len(missing) > 1 else "")
                + "; download or copy the checkpoint again"
            )
        files = WeightFiles({name: Path(path) for name, path in paths.items() if path is not None})
    _check_headers(files, index)
    return files


def _no_weights(source: str | os.PathLike[str], pickled: bool) -> Exception:
    if not pickled:
        return FileNotFoundError(f"{source} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    return ValueError(
        f"{source} has its weights as pickle only ({WEIGHTS_NAME}), which runs code when it is read and cannot be "
        "read block by block; convert it once, on a machine that holds the model: "
        'AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(folder)'
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → file. Names that leave the folder are not followed."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is damaged: {type(error).__name__}: {error}") from None
    outside = [file for file in names.values() if os.path.basename(file) != file or not file.endswith(".safetensors")]
    if outside or not names:
        raise ValueError(f"{path.name} names {outside[0]!r} as a weight file" if outside else f"{path.name} is empty")
    return names


def _check_headers(files: WeightFiles, index: dict[str, str] | None) -> None:
    for name, path in files.paths.items():
        try:
            with safe_open(path, framework="pt") as file:
                found = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is truncated or damaged: {error}; download or copy it again") from error
        absent = sorted(tensor for tensor, where in (index or {}).items() if where == name and tensor not in found)
        if absent:
            raise ValueError(
                f"the index says that {name} holds {absent[0]}, which it does not"
                + (f" (nor {len(absent) - 1} more)" if len(absent) > 1 else "")
                + "; download or copy the checkpoint again"
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
