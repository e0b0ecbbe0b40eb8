"""Every unit of the native code computes what `units.c` does in double precision, and touches no byte that is not its
own; units for other machines run emulated."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_ksparse.kernels.cpu import build

FOLDER = Path(__file__).parent
# -O1 takes a minute to compile.
SANITIZERS = ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
EMULATED = ("-I", str(FOLDER / "emulated"))
ARM = "aarch64-linux-gnu-gcc"
pytestmark = pytest.mark.processes


def compile_test(folder: Path, compiler: str, units: dict[str, tuple[str, ...]], flags: tuple[str, ...]) -> Path:
    """The program of `units.c` with these units; skips where the compiler or what it links is missing."""
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    warnings = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I", str(build.SOURCE))
    sources = {FOLDER / "units.c": (), **{build.SOURCE / name: own for name, own in units.items()}}
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([compiler, *warnings, *own, *flags, "-c", source, "-o", target])
        for (source, own), target in zip(sources.items(), objects, strict=True)
    ]
    assert [process.wait() for process in compilers] == [0] * len(compilers)
    link = [compiler, *flags, *objects, "-lm", "-o", folder / "units"]
    linked = subprocess.run(link, capture_output=True, text=True)
    if missing := re.search(r"cannot find .*(lib[au]\w*san|-lc)", linked.stderr):
        pytest.skip(f"the compiler {missing[0]}")
    assert linked.returncode == 0, linked.stderr
    return folder / "units"


def run_test(unit: str, rounds: int, *command: str | Path) -> None:
    done = subprocess.run([*command, unit, str(rounds)], capture_output=True, text=True)
    if done.returncode == 77:
        return  # the CPU has not these instructions
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("flags", [("-O2",), SANITIZERS], ids=["optimized", "sanitizers"])
def test_units_of_this_machine(tmp_path, flags):
    units = build._sources()
    program = compile_test(tmp_path, "cc", units, flags)
    amx = {"avx512amx"} if platform.machine() == "x86_64" and sys.platform == "linux" else set()
    for unit in ({Path(name).stem for name in units} | amx) - {"ksparse", "check"}:
        run_test(unit, 150 if flags == ("-O2",) else 30, program)


# The last one has all of avx512bf16.
@pytest.mark.parametrize(
    ("unit", "file", "flags", "instructions"),
    [("avx512", "avx512.c", (), "avx512_vbmi2"), ("avx512amx", "avx512bf16.c", ("-D__AVX512BF16__",), "amx_bf16")],
)
def test_avx512_emulated(tmp_path, unit, file, flags, instructions):
    if platform.machine() != "x86_64":
        pytest.skip("the unit is for x86-64")
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and instructions in cpu.read_text():
        pytest.skip("this CPU runs the unit itself")
    units = {**build._sources(), file: (*EMULATED, *flags)}
    program = compile_test(tmp_path, "cc", units, ("-O1", f"-DFORCED=unit_{unit}"))
    run_test(unit, 50, program)


def test_neon_emulated(tmp_path):
    if not (emulator := shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")):
        pytest.skip("there is no qemu-aarch64 (package qemu-user)")
    units = {"ksparse.c": (), "check.c": (), "portable.c": (), **build._ARM}
    program = compile_test(tmp_path, ARM, units, ("-O1", "-static"))
    for unit in ("neon", "neonbf16"):
        run_test(unit, 100, emulator, "-cpu", "max", program)
