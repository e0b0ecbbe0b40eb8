"""Cells as processes: some at a time, none of which outlives the study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

LOG_NAME = "log.txt"
# -P: the current folder is no place to import from, unless it is one in this process.
CELL_COMMAND = [sys.executable, "-P", "-c", "from optimum_ksparse.study.cell import main; main()"]
_POLL_SECONDS = 0.1


def run_cells(folders: Sequence[Path], processes: int, ended: Callable[[Path, int], Any]) -> None:
    """Runs a process for each folder, at most `processes` at a time, and calls `ended` with folder and exit status of
    each. On Ctrl-C or an error all that run are killed; where this process is killed they end by themselves."""
    waiting, slots = list(folders), list(range(processes))
    running: dict[subprocess.Popen[bytes], tuple[Path, int]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                folder, slot = waiting.pop(0), slots.pop(0)
                running[_start(folder, _environment(slot, processes))] = folder, slot
            time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                folder, slot = running.pop(process)
                slots.append(slot)
                _end(process)
                ended(folder, process.returncode)
    finally:
        for process in running:
            _end(process)


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / LOG_NAME, "wb") as log:
        return subprocess.Popen(
            [*CELL_COMMAND, os.fspath(folder)],
            stdin=subprocess.PIPE,  # its end tells the child that this process has ended
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started, where they are still there."""
    with suppress(ProcessLookupError, PermissionError):  # gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def end_with_parent() -> None:
    """Ends this process, and what it starts, when the one that started it is gone, however it went: its end of the
    pipe at our standard input is then closed. Standard input is empty from here on."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        if os.getpid() == os.getpgrp():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _environment(slot: int, processes: int) -> dict[str, str]:
    """That of this process, with its places to import from, a share of the processors and, where there are several
    GPUs, one of them for each cell that runs at a time."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["PYTHONUNBUFFERED"] = "1"
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        if (count := torch.cuda.device_count()) > 1:
            names = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % count]
    return environment


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The last lines of a log that hold something, without bars of progress."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n")]
    return [line for line in lines if line and "it/s]" not in line and "|" not in line[:24]][-count:]
