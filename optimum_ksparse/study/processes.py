"""Cells as processes: some at a time, none of which outlives the study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.staging import write_text
from .files import LOG_NAME
from .places import without_places

# -P: the current folder is no place to import from, unless it is one in this process.
CELL_COMMAND = [sys.executable, "-P", "-m", "optimum_ksparse.study.cell"]
_POLL_SECONDS, _GRACE_SECONDS = 0.1, 5.0


@dataclass
class _Child:
    folder: Path
    process: subprocess.Popen[bytes]
    slot: int


def run_cells(folders: Sequence[Path], processes: int, ended: Callable[[Path, int], Any]) -> None:
    """Runs a process for each folder, at most `processes` at a time, and calls `ended` with folder and exit status of
    each. On Ctrl-C, SIGTERM or an error all that run are stopped; where this process is killed they end by
    themselves."""
    waiting, running = list(folders), list[_Child]()
    try:
        with _sigterm_raises():
            while waiting or running:
                while waiting and len(running) < processes:
                    slot = min(set(range(processes)) - {child.slot for child in running})
                    running.append(_start(waiting.pop(0), slot, processes))
                time.sleep(_POLL_SECONDS)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    _close(child)
                    ended(child.folder, child.process.returncode)
    finally:
        _stop(running)


def _start(folder: Path, slot: int, processes: int) -> _Child:
    with open(folder / LOG_NAME, "wb") as log:
        process = subprocess.Popen(
            [*CELL_COMMAND, os.fspath(folder)],
            stdin=subprocess.PIPE,  # its end tells the child that this process has ended
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(slot, processes),
            start_new_session=True,
        )
    return _Child(folder, process, slot)


def _environment(slot: int, processes: int) -> dict[str, str]:
    """That of this process, with its places to import from, a share of the processors and, where there are several
    GPUs, one of them for each cell that runs at a time."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    found["PYTHONUNBUFFERED"] = "1"
    if processes > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        if (count := torch.cuda.device_count()) > 1:
            names = found.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
            found["CUDA_VISIBLE_DEVICES"] = names[slot % count]
    return found


def _stop(children: Sequence[_Child]) -> None:
    for child in children:
        _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        _signal(child, signal.SIGKILL)  # what it started, too
        child.process.wait()
        _close(child)


def _signal(child: _Child, number: int) -> None:
    try:
        os.killpg(child.process.pid, number)
    except (ProcessLookupError, PermissionError):  # gone
        pass


def _close(child: _Child) -> None:
    assert child.process.stdin is not None
    child.process.stdin.close()
    log = child.folder / LOG_NAME
    text = log.read_text(encoding="utf-8", errors="replace")
    write_text(log, without_places(text, child.folder.parents[1]))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that its children are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The last lines of a log that hold something, without bars of progress."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n")]
    return [line for line in lines if line and "it/s]" not in line and "|" not in line[:24]][-count:]
