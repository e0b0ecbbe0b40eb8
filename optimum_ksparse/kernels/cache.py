"""What was measured, kept in a small file for each GPU and set of versions.

`<folder>/<GPU>-<digest>.json`: `{"gpu", "versions", "timings": {problem: {kernel: {"config", "us"}}}}`. The folder is
`KSPARSE_CACHE`, or `ksparse` in the cache of Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..version import library_versions

logger = logging.get_logger(__name__)

Timings = dict[str, dict[str, dict[str, Any]]]


def cache_path(device: torch.device) -> Path:
    """The file for a device; of another GPU, or with other versions, there is another."""
    identity = _identity(device)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity['gpu']).strip('-')}-{digest}.json"


def read_timings(device: torch.device) -> Timings:
    """What the file holds; empty where there is none, or where it is damaged, which is warned of."""
    path = cache_path(device)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        timings = data["timings"]
        if {name: data[name] for name in ("gpu", "versions")} != _identity(device):
            raise ValueError("it is of another GPU or other versions")
        for kernels in timings.values():
            for row in kernels.values():
                float(row["us"]), dict(row["config"])
        return dict(timings)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning(f"The measured speeds in {path} cannot be used and will be measured again: {error}")
        return {}


def write_timings(device: torch.device, timings: Timings) -> None:
    """Adds to what the file holds. Other processes may do so at the same time; a reader never sees half a file. Where
    nothing can be written, that is warned of: measurements then last as long as the process."""
    from filelock import FileLock

    path = cache_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=30):
            merged = {**read_timings(device), **timings}
            write_whole(path, json.dumps({**_identity(device), "timings": merged}, indent=1).encode())
    except (OSError, TimeoutError) as error:
        logger.warning_once(f"Measured speeds of kernels cannot be kept in {path.parent}: {error}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; other processes may do so at the same time."""
    file, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(file, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("KSPARSE_CACHE") or Path(HF_HOME) / "ksparse")


def _identity(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        gpu = f"{torch.cuda.get_device_name(device)} {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    else:
        gpu = device.type
    versions = library_versions("torch", "triton") | {"cuda": str(torch.version.cuda)}
    del versions["python"]
    return {"gpu": gpu, "versions": versions}
