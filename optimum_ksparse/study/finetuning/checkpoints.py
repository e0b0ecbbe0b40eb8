"""The checkpoints of an unfinished run, in a hidden folder of its output."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...checkpoint.staging import sync, sync_tree, write_text
from ...records import read_record, to_json

FOLDER = ".checkpoints"
_JOB = "job.json"
_WHOLE = "whole"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


class MarkWhole(TrainerCallback):
    """Notes in a checkpoint that all of it is written. `Trainer` writes the files of one after the other into the
    folder's final place, and a process that is killed meanwhile leaves a part that looks like a checkpoint."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every process writes the state of its random numbers there
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        sync_tree(folder)
        sync(folder.parent)
        write_text(folder / _WHOLE, "")


def last_checkpoint(folder: Path, job: dict[str, Any], *, resume: bool, is_main: bool) -> str | None:
    """The last whole checkpoint in `folder`; the main process notes the job beside it, and removes what a kill left.

    Args:
        job: what the run is, as JSON holds it.
        resume: False throws away what is there.
        is_main: whether this process writes; it must come here first.

    Raises:
        ValueError: the checkpoints are those of another job (names the difference).
    """
    job = json.loads(json.dumps(job))
    if not resume and is_main:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / _JOB).is_file():
        found = read_record(dict[str, Any], folder / _JOB, "is damaged", "; use resume=False to start over")
        if different := differences(found, job):
            raise ValueError(
                f"{folder.parent} holds an unfinished run with {different}: use the same settings, another folder, or "
                "resume=False to start over"
            )
    elif is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _JOB, to_json(job))
    steps: dict[int, Path] = {}
    for path in folder.iterdir():
        match = _NUMBERED.fullmatch(path.name)
        if match and (path / _WHOLE).is_file():
            steps[int(match[1])] = path
        elif match and is_main:
            shutil.rmtree(path, ignore_errors=True)
    return str(steps[max(steps)]) if steps else None


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Settings of which two jobs differ, for a message; empty where they are the same."""
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"{name}={found.get(name)!r}, not {wanted.get(name)!r}" for name in names)
