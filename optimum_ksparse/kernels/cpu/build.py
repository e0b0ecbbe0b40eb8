"""Compiles `source/`: each instruction set is a unit with flags of its own; the library asks the CPU which it runs.

The standard library alone, for `hatch_build.py` builds the library into a wheel before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
LIBRARY = "libksparse.dylib" if sys.platform == "darwin" else "libksparse.so"
_MACOS = ("-mmacosx-version-min=11.0",) if sys.platform == "darwin" else ()
_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden", "-std=gnu11", *_MACOS)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vbmi2")
_X86 = {"avx2.c": _AVX2, "avx512.c": _AVX2 + _AVX512, "avx512bf16.c": (*_AVX2, *_AVX512, "-mavx512bf16")}
_ARM = {"neon.c": (), "neonbf16.c": ("-march=armv8.2-a+bf16",)}
_UNITS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "aarch64": _ARM, "arm64": _ARM}
_LINES = 8  # of the compiler's last words that an error repeats


class CompilerError(OSError):
    """There is no compiler, or it fails; says why."""


def compile_library(library: Path) -> None:
    """Compiles the library for this kind of machine; `library` appears whole or not at all.

    Raises:
        CompilerError: there is no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = Path(folder, library.name)
        commands = {name: [*_compiler(), *flags, "-c", str(SOURCE / name)] for name, flags in _sources().items()}
        _run_all([[*command, "-o", f"{Path(folder, name)}.o"] for name, command in commands.items()])
        objects = [f"{Path(folder, name)}.o" for name in commands]
        _run_all([[*_compiler(), "-shared", *objects, "-o", str(result)]])
        os.replace(result, library)


def source_digest() -> str:
    """A digest of all that a library is made from: its file is named after it."""
    digest = hashlib.sha256(repr((_compiler(), _sources(), platform.machine())).encode())
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    return [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS]


def _sources() -> dict[str, tuple[str, ...]]:
    units = _UNITS.get(platform.machine(), {})
    # Where there is another unit, hardly a CPU runs this one, and it takes longest to compile.
    return {"ksparse.c": (), "check.c": (), "portable.c": ("-O2",) if units else (), **units}


def _run_all(commands: list[list[str]]) -> None:
    """Runs commands at the same time; raises for the first that fails, when all have ended."""
    started: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            pipe = subprocess.PIPE
            started.append(
                subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
            )
    except OSError as error:
        name = commands[0][0]
        raise CompilerError(f"there is no C compiler {name!r} ({error.strerror}); CC may name another") from error
    finally:
        outputs = [process.communicate()[0] for process in started]
    for command, process, output in zip(commands, started, outputs, strict=True):
        if process.returncode:
            words = "\n".join(output.strip().splitlines()[-_LINES:])
            raise CompilerError(f"{shlex.join(command)} gave {process.returncode}:\n{words}")
