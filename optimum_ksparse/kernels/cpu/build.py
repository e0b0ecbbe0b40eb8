"""Compiles `source/`: each instruction set is a unit with flags of its own; the library asks the CPU which it runs."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden", "-std=gnu11")
_UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2.c": ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2")},
}


def compile_library(library: Path) -> None:
    """Compiles the library for this kind of machine; `library` appears whole or not at all.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.CalledProcessError: the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    units = {"ksparse.c": (), "portable.c": (), **_UNITS.get(platform.machine(), {})}
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = []
        for name, flags in units.items():
            objects.append(str(Path(folder, f"{name}.o")))
            _run([*compiler, *_FLAGS, *flags, "-c", str(SOURCE / name), "-o", objects[-1]])
        result = Path(folder, library.name)
        _run([*compiler, "-shared", *objects, "-o", str(result)])
        os.replace(result, library)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def library_path() -> Path:
    """The library for this machine, compiled where there is none yet. Raises as `compile_library` does."""
    import hashlib

    from ..cache import cache_folder

    digest = hashlib.sha256(repr((_FLAGS, _UNITS, platform.machine())).encode())
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.read_bytes())
    library = cache_folder() / f"libksparse-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        compile_library(library)
    return library
