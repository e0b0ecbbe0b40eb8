"""A fine-tuning run: the folder that it owns, the checkpoints from which it goes on, and the record of what it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import HiraConfig, PeftConfig, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ...adapters import prepare_for_training
from ...adapters.config import SparseLoraConfig
from ...checkpoint import describe_model, facts_of, fingerprint, sparse_modules
from ...checkpoint.model_class import load_model
from ...checkpoint.staging import check_apart, check_output, claimed, staged, write_text
from ...data import read_tokenizer
from ...evaluation import EvaluationResults, Measurement, tuning_settings
from ...evaluation.running import check_causal_lm
from ...kernels import fast_products
from ...records import RESULTS_NAME, TUNING_NAME, differences, read_record, to_json
from .settings import FinetuningSettings, linear_targets

logger = logging.get_logger(__name__)

CHECKPOINTS = ".checkpoints"  # of an unfinished run, in its output
_JOB = "job.json"  # whose they are
_LOCK = ".finetuning.lock"
# Settings in whose place the trainer describes what it read; and those that no record has.
_PATHS = ("data", "train_file", "eval_file", "teacher", "dataset", "texts")
_UNRECORDED = (*_PATHS, "cache")
_OUTCOMES = ("steps", "loss", "history", "results", "num_trained", "tokens")


class TaskTrainer(Trainer):
    """The `Trainer` of a task: made of a model, its tokenizer, the settings, and arguments of `TrainingArguments`."""

    task: str
    figure = ""  # that `evaluate` logs
    described: dict[str, Any]  # the data, as JSON holds them, and what else tells one job from another
    model: Any

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        args._n_gpu = min(1, args.n_gpu)  # one device a process: a step has `batch_size` examples
        super().__init__(args=args, **kwargs)

    def log_figures(self, figures: dict[str, float]) -> dict[str, float]:
        """Logs what `evaluate` has measured, and gives it back."""
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def prepare(self) -> None:
        """What takes long, and is done before training alone."""

    def save(self, folder: Path) -> None:
        """Writes what was trained."""
        self.model.save_pretrained(folder)

    def outcome(self, steps: int) -> dict[str, Any]:
        """What the record says beside what all tasks have."""
        return {}

    def measure(self) -> dict[str, Any] | None:
        """The row of results that the task has."""
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """`Trainer` itself reads tensors by the names of the modules, not strictly, so that those that are renamed
        when they are saved (the head of GPT-NeoX) stay as they are before training (transformers 5.23)."""
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())


def finetune(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str | None,
    settings: FinetuningSettings,
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    **loading: Any,
) -> dict[str, Any]:
    """Tunes a causal LM, sparse or dense, on the task that `settings` are of (`DistillSettings`, `KoAlpacaSettings`,
    `KorQuADSettings`), saves and measures it. The model is changed in place; it, and the tokenizer (None: the one
    beside the model), may be named by folder or Hub id, with `loading` arguments of `from_pretrained`; the dtype is
    that of the weights otherwise.

    `output` then holds the adapter (with `method="full"` the weights), the tokenizer and `finetuning.json`, whose
    content is returned (by the first process): what the run was, `loss` of each step, for KorQuAD `results`, and
    `history`, the figures on the way. After KorQuAD it also holds the span head (`load_korquad_model` reads it), and
    `evaluation_results.json` with the figures as rows after tuning of the model that was tuned
    (`EvaluationResults.take_tuned`). A run that was cut off goes on from its last checkpoint when it is called again,
    unless `resume` is False; a finished one of the same job is returned as it is, unless `overwrite` replaces it.

    Raises TypeError or ValueError where the model, the tokenizer, the data or a setting do not fit, or `output` holds
    another model or run; FileExistsError, NotADirectoryError or BlockingIOError where it holds something else, is a
    file, or is in use; ConnectionError where the data cannot be read from the Hub."""
    reads = [getattr(model, "name_or_path", model), tokenizer, *(getattr(settings, name, None) for name in _PATHS)]
    with _claimed(output, reads, overwrite=overwrite):
        if not isinstance(model, PreTrainedModel):
            model = cast(PreTrainedModel, load_model(model, **loading))
        check_causal_lm(model)
        results = EvaluationResults(fingerprint(model))
        part = "sparse" if sparse_modules(model) else "dense"
        if part == "dense":
            results.dense_model, results.dense_revision = describe_model(model), facts_of(model).commit
        base = {"base": str(model.name_or_path), "base_fingerprint": results.fingerprint}
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            names = ("trust_remote_code",) if tokenizer else ("trust_remote_code", "revision")
            remote = {name: loading[name] for name in names if name in loading}
            tokenizer = read_tokenizer(tokenizer or base["base"], **remote)
        with _with_own_cache(model):
            trainer = settings.trainer_class()(model, tokenizer, settings, trainer_arguments(settings, output))
            chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _UNRECORDED}
            job = {
                "task": trainer.task,
                **base,
                **chosen,
                **trainer.described,
                "num_processes": trainer.args.world_size,
            }
            with suppress(OSError):
                (Path(output) / CHECKPOINTS).rmdir()  # `Trainer` made it; where there is something in it, it stays
            if (record := _finished(Path(output), job, overwrite=overwrite)) is not None:
                return record
            log = _train(trainer, job, resume=resume)
        if not trainer.is_world_process_zero():
            return {}
        with staged(output, gone=(TUNING_NAME, RESULTS_NAME)) as staging:
            trainer.save(staging)
            tokenizer.save_pretrained(staging)
            # PEFT's empty form of a card; the card of this model is written from what is known of it.
            (staging / "README.md").unlink(missing_ok=True)
        if (row := trainer.measure()) is not None:
            results.add(part, Measurement.from_row(trainer.task, {**row, "tuning": tuning_settings(job)}))
            results.save(output)
        steps = max((entry["step"] for entry in log), default=0)
        record = {
            **job,
            "steps": steps,
            "loss": [round(entry["loss"], 6) for entry in log if "loss" in entry],
            "history": [entry for entry in log if trainer.figure in entry],
            "results": row,
            **trainer.outcome(steps),
            "num_trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        write_text(Path(output) / TUNING_NAME, to_json(record))  # it says that everything else is written
        shutil.rmtree(Path(output) / CHECKPOINTS, ignore_errors=True)
        return record


@contextmanager
def _claimed(output: str | os.PathLike[str], reads: list[object], *, overwrite: bool) -> Iterator[None]:
    """Within it, `output` is this run's, which may begin once more in it: checked before anything is loaded. Of what
    is read it must be apart anyhow."""
    if os.environ.get("RANK", "0") != "0":  # the first process writes
        yield
        return
    check_output(output, reads=reads, ours=(TUNING_NAME, CHECKPOINTS), overwrite=overwrite)
    check_apart(output, reads)
    busy = f"another process is tuning into {os.fspath(output)}; wait for it, or name another folder"
    with claimed(Path(output), _LOCK, busy):
        yield


@contextmanager
def _with_own_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within it `Trainer` may turn the cache of keys and values off, which the saved config would say too."""
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache


def add_adapter(model: PreTrainedModel, settings: FinetuningSettings, task_type: str | None = None) -> Any:
    """The PEFT model that `settings` ask for, drawn with their seed; with `method="full"` the model itself, all of
    whose weights train. `task_type` is PEFT's."""
    set_seed(settings.seed)
    if settings.method == "full":
        if model.dtype.itemsize < 4:
            logger.warning(f"The weights train in {model.dtype}, where small updates are lost: load them in float32.")
        return model.requires_grad_(True).train()
    common: dict[str, Any] = {"r": settings.r, "task_type": task_type}
    common["target_modules"] = settings.target_modules or linear_targets(model)
    config: PeftConfig = HiraConfig(hira_dropout=settings.dropout, **common)
    if settings.method != "hira":
        common |= {"masked": settings.method == "masked", "use_dora": settings.method == "dora"}
        config = SparseLoraConfig(lora_alpha=settings.alpha, lora_dropout=settings.dropout, **common)
    prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
    return get_peft_model(model, config).train()


def trainer_arguments(settings: FinetuningSettings, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings as `TrainingArguments` have them. Raises ValueError where a step does not come out even."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, rest = divmod(settings.batch_size, settings.micro_batch_size * world)
    if rest:
        raise ValueError(
            f"batch_size={settings.batch_size} is not a multiple of micro_batch_size={settings.micro_batch_size} "
            f"times {world} processes"
        )
    same = ("learning_rate", "warmup_steps", "seed", "bf16", "gradient_checkpointing", "save_steps")
    return {
        **{name: getattr(settings, name) for name in same},
        "output_dir": str(Path(output) / CHECKPOINTS),
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": settings.num_epochs,
        "max_steps": settings.max_steps or -1,
        "use_cpu": not torch.accelerator.is_available(),  # it has bf16 on a CPU that is asked for alone
        "dataloader_pin_memory": torch.accelerator.is_available(),  # otherwise torch warns of it
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "logging_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "ddp_find_unused_parameters": False if world > 1 else None,
    }


def _train(trainer: TaskTrainer, job: dict[str, Any], *, resume: bool) -> list[dict[str, Any]]:
    """Trains, from the last checkpoint of the same job on, and gives the log: a dict of `step`, `loss`, … a step."""
    folder = Path(str(trainer.args.output_dir))
    with trainer.args.main_process_first(local=False, desc="checkpoints"):
        if trainer.is_world_process_zero():
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            _check_job(folder / _JOB, job, "resume=False to start over")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / _JOB, to_json(job))
        last, state = _last_checkpoint(folder)
    if last is not None and state.global_step >= state.max_steps:  # `Trainer` would make one step more
        trainer._load_from_checkpoint(last)
        return list(state.log_history)
    if last is not None:
        logger.warning(f"Going on from step {state.global_step}.")
    trainer.prepare()
    with fast_products(trainer.model, torch.bfloat16 if trainer.args.bf16 else None):
        trainer.train(resume_from_checkpoint=last)
    return list(trainer.state.log_history)


def _last_checkpoint(folder: Path) -> tuple[str | None, TrainerState]:
    """The last checkpoint that is whole. The state is what `Trainer` writes last of one; what a process that is killed
    meanwhile leaves is written again."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2])):
        try:
            return str(path), TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):
            continue
    return None, TrainerState()


def _finished(output: Path, job: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """The record of a finished run of the same job in `output`; None where there is none, or it may be overwritten.
    Raises ValueError where it holds another run, or a model that no run wrote, which an adapter must not lie
    beside."""
    path = output / TUNING_NAME
    if not path.is_file():
        for name in ("config.json", "adapter_config.json"):
            # A run that was cut off while it was saved has its checkpoints still.
            if (output / name).exists() and not (output / CHECKPOINTS).is_dir():
                raise ValueError(f"output={os.fspath(output)!r} holds a model already ({name}): use another folder")
        return None
    if overwrite:
        method = read_record(dict[str, Any], path, "is no record of a tuning").get("method")
        if (method == "full") != (job["method"] == "full"):
            raise ValueError(f"{output} holds a run with {method=}, which {job['method']!r} does not replace")
        return None
    record = _check_job(path, job, "overwrite=True to replace it")
    logger.warning(f"{output} holds this run, finished already; overwrite=True (--overwrite) makes it again.")
    return record


def _check_job(path: Path, job: dict[str, Any], remedy: str) -> dict[str, Any]:
    """The record of a run at `path`. Raises ValueError, which names the difference, where it is of another job."""
    if not path.is_file():
        return {}
    record: dict[str, Any] = read_record(dict[str, Any], path, "is no record of a tuning", f"; {remedy}")
    earlier = {name: value for name, value in record.items() if name not in _OUTCOMES}
    if changes := differences(earlier, job):
        raise ValueError(f"{path.parent} holds another run ({'; '.join(changes)}): use another folder, or {remedy}")
    return record
