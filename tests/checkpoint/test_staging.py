"""A folder after a save that was killed, interrupted or refused at any of its steps holds the old or the new files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.api.inspection import inspect_checkpoint
from optimum_ksparse.checkpoint.staging import locked, recover, staged, write_text
from optimum_ksparse.commands.base import folder_of
from optimum_ksparse.commands.hub import check_source
from optimum_ksparse.pruning.streaming import Workspace
from optimum_ksparse.records import REPORT_NAME

# All by which a save changes the disk, or waits for it.
STEPS = ("replace", "fsync", "unlink", "mkdir", "rmdir")


class Steps:
    """Counts the steps of a save, and does something before or after the ones of some numbers."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], numbers: set[int], after: bool
    ) -> None:
        self.count, self.trace = 0, []
        for name in STEPS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name), act, numbers, after))

    def _counted(self, name: str, step: Any, act: Callable[[], None], numbers: set[int], after: bool) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[name == "replace"]
            self.trace.append((name, os.fspath(path)))
            self.count += 1
            due = self.count in numbers
            if due and not after:
                act()
            # What a disk does is not measured here.
            result = None if name == "fsync" else step(*args, **kwargs)
            if due and after:
                act()
            return result

        return counted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, save: Callable[[], Any]) -> bool:
    """Whether a process that saves is killed before its step of that number."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, kill, {number}, after=False)
                save()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OLD = {"README.md": b"mine", "config.json": b"old", "model.safetensors": b"old"}
NEW = {"README.md": b"mine", "config.json": b"new", "more/model": b"new", "model-00001-of-00001.safetensors": b"new"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def save_new(folder: Path) -> None:
    with staged(folder) as staging:
        write(staging, {name: content for name, content in NEW.items() if content == b"new"})


def number_of_steps(folder: Path, save: Callable[[Path], Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, kill, set(), after=False)
        save(folder)
    return steps.count


@pytest.mark.processes
def test_killed_at_any_step(tmp_path: Path) -> None:
    total = number_of_steps(write(tmp_path / "counted", OLD), save_new)
    found = []
    for number in range(1, total + 1):
        folder = write(tmp_path / str(number), OLD)
        assert killed_at(number, lambda folder=folder: save_new(folder))
        recover(folder)
        assert contents(folder) in ({**OLD}, NEW), number
        found.append(contents(folder) == NEW)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], number
    assert found == sorted(found) and {True, False} == set(found), "first the old, then the new"


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_two_errors_at_any_two_steps(tmp_path: Path, after: bool) -> None:
    errors: list[BaseException] = [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")]

    def fail() -> None:
        errors.reverse()
        raise errors[0]

    total = number_of_steps(write(tmp_path / "counted", OLD), save_new)
    for first in range(1, total + 1):
        second = last = first
        while second <= last:  # beyond the last step it is as with one error
            folder = write(tmp_path / f"{first}-{second}", OLD)
            with pytest.MonkeyPatch.context() as patch:
                steps = Steps(patch, fail, {first, second}, after)
                with suppress(KeyboardInterrupt, OSError):
                    save_new(folder)
                last = steps.count
                recover(folder)
            assert contents(folder) in (OLD, NEW), (first, second)
            second += 1


def test_errors_without_end(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    for first in range(1, number_of_steps(write(tmp_path / "counted", OLD), save_new) + 1):
        folder = write(tmp_path / str(first), OLD)
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, fail, set(range(first, 1000)), after=False)
            with pytest.raises(KeyboardInterrupt):
                save_new(folder)
        save_new(folder)
        assert contents(folder) == NEW


def test_what_is_replaced_goes_after_what_replaces_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "folder", OLD)
    trace = Steps(monkeypatch, kill, set(), after=False).trace
    save_new(folder)
    record = trace.index(("replace", str(folder / ".ksparse-saving.json")))
    before = trace[:record]
    for name, content in NEW.items():
        if content == b"new":
            assert ("fsync", str(folder / ".ksparse-saving" / name)) in before
            moved = trace.index(("replace", str(folder / name)))
            assert ("fsync", str(folder)) in trace[record:moved], "the record is on the disk before the first move"
    assert ("fsync", str(folder / ".ksparse-saving")) in before
    assert trace.index(("unlink", str(folder / "model.safetensors"))) > record
    ends = trace.index(("unlink", str(folder / ".ksparse-saving.json")))
    assert ("fsync", str(folder)) in trace[moved:ends], "and the moves are before it goes"


@pytest.fixture
def models(make_pruned: Any, token_ids: torch.Tensor) -> Iterator[tuple[Any, Any, list[torch.Tensor]]]:
    models = make_pruned(pattern="2:4"), make_pruned(pattern="50%", storage="dense")
    with torch.no_grad():
        yield *models, [model(token_ids).logits for model in models]


@pytest.mark.processes
def test_a_model_loads_after_a_kill_at_any_step(
    tmp_path: Path, models: Any, token_ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, logits = models
    old.save_pretrained(tmp_path / "old")
    total = number_of_steps(shutil.copytree(tmp_path / "old", tmp_path / "counted"), new.save_pretrained)
    for number in range(1, total + 1):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(number))
        assert killed_at(number, lambda folder=folder: new.save_pretrained(folder))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert any(torch.equal(loaded(token_ids).logits, expected) for expected in logits), number
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], number


@pytest.mark.processes
def test_a_published_run_that_is_killed_at_any_step(
    tmp_path: Path, models: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models[0].save_pretrained(tmp_path / "old")
    make_model().save_pretrained(tmp_path / "source")
    config, ready = (
        SparsityConfig("magnitude", "1:4", dataset=None),
        shutil.copytree(tmp_path / "old", tmp_path / "new"),
    )

    def stop(self: Workspace) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "publish", stop)
        prune_checkpoint(tmp_path / "source", ready, config, resume=False)
    old, seen = contents(tmp_path / "old"), set()
    counted = shutil.copytree(ready, tmp_path / "counted")
    total = number_of_steps(counted, lambda folder: Workspace(folder, {}).publish())
    new = contents(counted)
    assert not any(name.startswith(".") for name in new)
    for number in range(1, total + 1):
        folder = shutil.copytree(ready, tmp_path / str(number))
        assert killed_at(number, lambda folder=folder: Workspace(folder, {}).publish())
        is_new = inspect_checkpoint(folder).settings["pattern"] == "1:4"
        found = {
            name: content for name, content in contents(folder).items() if not name.startswith(".ksparse-pruning")
        }
        assert found == (new if is_new else old), number
        if not is_new:  # the run is still there, and ends; what it makes anew has another peak of memory in its report
            prune_checkpoint(tmp_path / "source", folder, config)
        finished = contents(folder)
        assert finished.keys() == new.keys(), number
        assert all(finished[name] == new[name] for name in new if is_new or name != REPORT_NAME), number
        seen.add(is_new)
    assert seen == {True, False}


def cut_off(folder: Path) -> Path:
    """Makes the files of a folder those of a save that was killed before it moved the first of them."""
    names = sorted(contents(folder))
    (folder / ".ksparse-saving").mkdir()
    for name in names:
        (folder / name).rename(folder / ".ksparse-saving" / name)
    record = {"staging": ".ksparse-saving", "files": names, "gone": []}
    (folder / ".ksparse-saving.json").write_text(json.dumps(record))
    return folder


def test_every_reader_finishes_a_save_that_was_cut_off(tmp_path: Path, models: Any, tokenizer: Any) -> None:
    model = models[0]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("model", AutoConfig.from_pretrained),
        ("model", AutoTokenizer.from_pretrained),
        ("model", type(tokenizer).from_pretrained),
        ("model", inspect_checkpoint),
        ("model", folder_of),
        ("adapter", lambda folder: check_source("adapter", str(folder))),
        ("adapter", lambda folder: PeftModel.from_pretrained(adapted.unload(), folder)),
    ]
    for number, (source, read) in enumerate(readers):
        folder = cut_off(shutil.copytree(tmp_path / source, tmp_path / str(number)))
        read(folder)
        assert contents(folder) == contents(tmp_path / source), number


# ---- what lies there already


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"staging": ".ksparse-saving", "files": [1], "gone": []}',
        '{"staging": "..", "files": [], "gone": []}',
        '{"staging": ".ksparse-saving/../..", "files": ["mine"], "gone": []}',
        '{"staging": ".ksparse-saving", "files": ["../mine"], "gone": []}',
        '{"staging": ".ksparse-saving", "files": ["out/mine"], "gone": []}',
        '{"staging": ".ksparse-saving", "files": [], "gone": ["../mine"]}',
        '{"staging": ".ksparse-saving", "files": [], "gone": ["out/mine"]}',
        '{"staging": ".ksparse-out", "files": ["mine"], "gone": []}',
    ],
)
def test_a_record_that_came_with_a_download_reaches_nothing_outside(tmp_path: Path, record: str) -> None:
    (tmp_path / "mine").write_text("mine")
    folder = write(tmp_path / "folder", {".ksparse-saving/mine": b"theirs", ".ksparse-saving/out/mine": b"theirs"})
    (folder / "out").symlink_to(tmp_path)
    (folder / ".ksparse-out").symlink_to(tmp_path)
    (folder / ".ksparse-saving.json").write_text(record)
    with pytest.raises(ValueError, match=r"ksparse-saving\.json is damaged"):
        recover(folder)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (folder / "mine").exists()


def test_a_folder_in_the_place_of_a_file_is_an_error_before_anything_moves(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", OLD)
    (folder / "more" / "model").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="model is a folder"):
        save_new(folder)
    assert contents(folder) == OLD


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "folder", {**OLD, ".ksparse-saving/config.json": b"half"})
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    recover(folder)  # the old files are whole
    (folder / ".ksparse-saving.json").write_text(
        '{"staging": ".ksparse-saving", "files": ["config.json"], "gone": []}'
    )
    with pytest.raises(PermissionError, match="make the folder writable"):
        recover(folder)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="folder") as caught, staged(tmp_path / "folder"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "folder").exists()


# ---- several at once


@pytest.mark.processes
def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path), pytest.raises(BlockingIOError, match="already"), locked(path):
        pass  # a signal handler that saves where its thread is saving
    assert not path.exists()
    ready, child = os.pipe(), os.fork()
    if not child:
        with locked(path):
            os.write(ready[1], b".")
            signal.pause()
    os.read(ready[0], 1)
    with pytest.raises(BlockingIOError, match="busy"), locked(path, "busy"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(path, "busy"):
        pass
    assert not path.exists()


@pytest.mark.processes
def test_texts_written_at_once(tmp_path: Path) -> None:
    path, children = tmp_path / "text", []
    for number in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                for _ in range(50):
                    write_text(path, str(number) * 5000)
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert path.read_text() in [str(number) * 5000 for number in range(4)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]


@pytest.mark.processes
def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    for number in range(1, 4):
        killed_at(number, lambda: write_text(tmp_path / "text", "new"))
    write_text(tmp_path / "text", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]
