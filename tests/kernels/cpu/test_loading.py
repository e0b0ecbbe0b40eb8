"""The native library is compiled once, kept, opened only where it is whole and nobody else can have written it, and
its absence costs speed alone. The compiler is a script that hands out a library compiled before."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest

from optimum_ksparse.kernels.cpu import build, loading, native, why_not_native

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no native code here: {why_not_native()}")


@pytest.fixture(autouse=True)
def no_unit_is_named(monkeypatch) -> None:
    """Whatever unit the tests are run with."""
    monkeypatch.delenv(loading.UNIT_VARIABLE, raising=False)


# $OUT is the word behind -o.
SCRIPT = """#!/bin/sh
echo "$@" >> {log}
for word; do [ "$last" = -o ] && out=$word; last=$word; done
cp {library} "$out"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and `CC`."""
    script = tmp_path / "compiler"
    script.write_text(SCRIPT.format(log=tmp_path / "log", library=native._loaded().functions._name))
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("KSPARSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def links(cache: Path) -> int:
    """How often a library was linked."""
    log = cache.with_name("log")
    return log.read_text().count("-shared") if log.exists() else 0


def is_kept(library: ctypes.CDLL, cache: Path) -> bool:
    return Path(library._name).is_relative_to(cache)


def test_it_is_compiled_once(cache):
    for _ in range(2):
        assert is_kept(loading.load_library(), cache)
    assert links(cache) == 1
    assert {path.suffix for path in loading._kept_path().parent.iterdir()} == {".so", ".sha256"}


def test_two_processes_fill_the_cache(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=loading.load_library) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    count = links(cache)
    assert is_kept(loading.load_library(), cache)
    assert links(cache) == count


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty digest", "no digest"])
def test_a_damaged_file_is_compiled_again(cache, damage):
    loading.load_library()
    path = loading._kept_path()
    digest = loading._digest_path(path)
    content = path.read_bytes()
    path.unlink()  # this process has it open
    if damage == "no digest":
        digest.unlink()
    elif damage == "empty digest":
        digest.write_text("")
    path.write_bytes({"truncated": content[:5000], "foreign": b"MZ" + content}.get(damage, content))
    assert is_kept(loading.load_library(), cache)
    assert path.read_bytes() == content
    assert links(cache) == 2


def test_another_version_is_compiled_again(cache, tmp_path):
    if not shutil.which("cc"):
        pytest.skip("there is no cc")
    path = loading._kept_path()
    path.parent.mkdir(mode=0o700, parents=True)
    (tmp_path / "old.c").write_text("int ksparse_version(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "old.c", "-o", path], check=True)
    path.chmod(0o755)
    loading._digest_path(path).write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert loading.load_library().ksparse_version() == loading.VERSION
    assert links(cache) == 1


def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(cache):
    cache.write_text("a file, where a folder should be")
    library = loading.load_library()
    assert not is_kept(library, cache)
    assert library.ksparse_version() == loading.VERSION


@pytest.mark.parametrize("target", ["folder", "file"])
def test_what_others_can_write_is_not_opened(cache, target):
    loading.load_library()
    path = loading._kept_path()
    (path if target == "file" else path.parent).chmod(0o777)
    library = loading.load_library()
    assert links(cache) == 2
    assert is_kept(library, cache) == (target == "file")  # it was replaced
    assert path.stat().st_mode & 0o022 == 0 or not is_kept(library, cache)


@pytest.mark.parametrize("compiler", ["false", "there-is-no-such-compiler --flag"])
def test_without_a_compiler_speed_is_lost_alone(cache, compiler, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(native.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert compiler.split()[0] in native._library.__wrapped__()
    assert len([record for record in caplog.records if compiler.split()[0] in record.getMessage()]) == 1
    monkeypatch.setenv("KSPARSE_CPU", "portable")
    with pytest.raises(RuntimeError, match=compiler.split()[0]):
        native._library.__wrapped__()


def test_the_last_words_of_the_compiler_are_told(tmp_path, monkeypatch):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\nfor i in $(seq 100); do echo line $i; done\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(build.CompilerError, match="gave 3:(?s:.*)line 100") as error:
        build.compile_library(tmp_path / "library.so")
    assert "line 90\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


def test_it_can_be_turned_off(monkeypatch, caplog):
    monkeypatch.setenv("KSPARSE_NATIVE", "0")
    assert "KSPARSE_NATIVE" in native._library.__wrapped__()
    assert not caplog.records


class Library:
    """One whose units are new (not of this CPU), wrong (does not agree), and portable."""

    def __init__(self) -> None:
        def ksparse_unit(index, runs):
            runs._obj.value = index != 0
            return ([b"new", b"wrong", b"portable"] + [None] * 8)[index]

        self.ksparse_unit, self.ksparse_check = ksparse_unit, lambda index: index == 2


def test_a_unit_that_cannot_run_or_errs_is_passed_over(monkeypatch):
    assert loading.choose_unit(Library()) == (2, "portable")
    for name, reason in {"new": "instructions", "wrong": "other results", "none": "new, wrong, portable"}.items():
        monkeypatch.setenv("KSPARSE_CPU", name)
        with pytest.raises(ValueError, match=f"KSPARSE_CPU='{name}'.*{reason}"):
            loading.choose_unit(Library())
    monkeypatch.setenv("KSPARSE_CPU", "portable")
    assert loading.choose_unit(Library()) == (2, "portable")


def test_every_unit_of_this_cpu_agrees():
    library = native._loaded().functions
    units = loading._units(library)
    assert list(units)[-1] == "portable"
    assert all(library.ksparse_check(number) for number, runs in units.values() if runs)
