"""A training run: the `Trainer` of transformers with checkpoints from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..report import TUNING_NAME
from ..staging import write_text
from .sampler import LengthSampler
from .settings import FinetuningSettings

logger = logging.get_logger(__name__)

# In the output, until the run is done.
_CHECKPOINTS = ".checkpoints"
_JOB = "job.json"


def train(
    model: nn.Module,
    examples: Dataset[Any] | Sequence[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    settings: FinetuningSettings,
    output: str | os.PathLike[str],
    *,
    job: dict[str, Any],
    resume: bool = True,
    callbacks: Sequence[Any] = (),
    lengths: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Trains what of `model` trains. A run that was cut off goes on from its last checkpoint, with the loss curve of
    one that was not; its checkpoints lie in a hidden folder in `output`, and go with `finish`.

    Args:
        model: a PEFT model, or a sparse model itself; its forward returns a `loss`.
        examples, collate: the data, and what makes a batch of some of them.
        job: what the run is besides its settings (task, base, data), as JSON holds it: another run's checkpoints are
            refused.
        resume: False throws an earlier run's checkpoints away.
        callbacks: of `Trainer`.
        lengths: of the examples: those of like length then come together, so that little of a batch is padding.

    Returns:
        The log: a dict of `step`, `loss`, `learning_rate`, … for each step.

    Raises:
        ValueError: the checkpoints are of another run (names the difference), or a batch does not come out even.
    """
    from transformers import Trainer, TrainingArguments

    checkpoints = Path(output) / _CHECKPOINTS
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.accumulation_steps(world),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps or -1,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # it has bf16 on a CPU that is asked for alone
        **(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            if settings.gradient_checkpointing
            else {}
        ),
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        ddp_find_unused_parameters=False if world > 1 else None,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    if lengths is not None:
        sampler = LengthSampler(lengths, settings.micro_batch_size * world, settings.seed)
        trainer._get_train_sampler = lambda dataset=None: sampler  # type: ignore[method-assign]
    with arguments.main_process_first(local=False, desc="checkpoints"):
        last = _last_checkpoint(checkpoints, {**job, **settings.to_dict()}, resume, arguments.process_index == 0)
    if last is not None:
        logger.warning(f"Going on from {os.path.basename(last)}.")
    trainer.train(resume_from_checkpoint=last)
    return list(trainer.state.log_history)


def finish(
    output: str | os.PathLike[str], settings: FinetuningSettings, log: list[dict[str, Any]], job: dict[str, Any]
) -> dict[str, Any]:
    """Writes `finetuning.json`, what the run was and its loss curve, into `output` and removes the checkpoints: called
    when everything else is written. Returns what it wrote."""
    steps = max((row["step"] for row in log), default=0)
    record = {
        **job,
        **settings.to_dict(),
        "steps": steps,
        "loss": [round(row["loss"], 6) for row in log if "loss" in row],
    }
    write_text(Path(output) / TUNING_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(Path(output) / _CHECKPOINTS, ignore_errors=True)
    return record


def _last_checkpoint(folder: Path, job: dict[str, Any], resume: bool, is_main: bool) -> str | None:
    """The checkpoint to go on from; notes the job beside it."""
    job = json.loads(json.dumps(job))
    path = folder / _JOB
    if not resume and is_main:
        shutil.rmtree(folder, ignore_errors=True)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in {*found, *job} if found.get(key) != job.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"{folder.parent} holds an unfinished run with {key}={found.get(key)!r}, not {job.get(key)!r}: use "
                "the same settings, another folder, or resume=False to start over"
            )
    elif is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(job, indent=2, ensure_ascii=False) + "\n")
    return get_last_checkpoint(str(folder))
