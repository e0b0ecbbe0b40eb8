"""A training run: the `Trainer` of transformers with checkpoints from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerState
from transformers.utils import logging

from ...checkpoint.staging import write_text
from ...records import RESULTS_NAME, TUNING_NAME, read_record, to_json
from .checkpoints import FOLDER, MarkWhole, differences, last_checkpoint
from .sampler import LengthSampler
from .settings import FinetuningSettings

logger = logging.get_logger(__name__)

RECORDS = (TUNING_NAME, RESULTS_NAME)  # what says that a run is finished, and its figures; they go with its files


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
    from transformers import TrainingArguments

    from .trainer import ResumableTrainer

    checkpoints = Path(output) / FOLDER
    world = int(os.environ.get("WORLD_SIZE", "1"))
    recompute: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
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
        **recompute,
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        ddp_find_unused_parameters=False if world > 1 else None,
    )
    # One process trains on one device; `Trainer` would spread batches over all GPUs, and make a step that much larger.
    arguments._n_gpu = min(1, arguments.n_gpu)
    with arguments.main_process_first(local=False, desc="checkpoints"):
        wanted, is_main = {**job, **settings.to_dict(), "num_processes": world}, arguments.process_index == 0
        last = last_checkpoint(checkpoints, wanted, resume=resume, is_main=is_main)
    if last is not None:
        logger.warning(f"Going on from {os.path.basename(last)}.")
    sampler = None if lengths is None else LengthSampler(lengths, settings.micro_batch_size * world, settings.seed)
    with _own_forward(model):
        trainer = ResumableTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collate,
            callbacks=[*callbacks, MarkWhole()],
            sampler=sampler,
        )
        if last is not None and (ended := _ended(last)) is not None:
            trainer._load_from_checkpoint(last)
            return ended
        trainer.train(resume_from_checkpoint=last)
    return list(trainer.state.log_history)


def _ended(checkpoint: str) -> list[dict[str, Any]] | None:
    """The log of a run whose last step this checkpoint is, from which `Trainer` would make one step more."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    return list(state.log_history) if state.global_step >= state.max_steps else None


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Takes off what accelerate has put around the forward pass by the end."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before


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
    write_text(Path(output) / TUNING_NAME, to_json(record))
    shutil.rmtree(Path(output) / FOLDER, ignore_errors=True)
    return record


def finished(
    output: str | os.PathLike[str], settings: FinetuningSettings, job: dict[str, Any], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The record of a finished run of the same job in `output`; None where there is none, or it may be overwritten.

    Raises:
        ValueError: `output` holds another run, or a model that no run wrote, which an adapter must not lie beside.
    """
    folder = Path(output)
    path = folder / TUNING_NAME
    if not path.is_file():
        for name in ("config.json", "adapter_config.json"):
            # A run that was cut off while it was saved has its checkpoints still.
            if (folder / name).exists() and not (folder / FOLDER).is_dir():
                raise ValueError(f"output={os.fspath(output)!r} holds a model already ({name}): use another folder")
        return None
    found = read_record(dict[str, Any], path, "is no record of a tuning")
    results = ("steps", "loss", "history", "results", "num_trained")
    before = {name: value for name, value in found.items() if name not in results}
    wanted = json.loads(json.dumps({**job, **settings.to_dict()}))
    if overwrite:
        if (found.get("method") == "full") != (settings.method == "full"):
            raise ValueError(
                f"{folder} holds a run with method={found.get('method')!r}, whose files method={settings.method!r} "
                "does not replace: use another folder"
            )
        return None
    if different := differences(before, wanted):
        raise ValueError(
            f"{folder} holds a finished run with {different}: use another folder, or overwrite=True to replace it"
        )
    logger.warning(f"{folder} holds this run, finished already; overwrite=True (--overwrite) makes it again.")
    return dict(found)
