"""What `Trainer`, and the trainers of TRL, which are subclasses of it, do with a sparse model beyond what they do with
any: their training is in the model's report, and what they push carries report, tags and card."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from ..checkpoint import facts_of
from ..evaluation import TrainingRun, settle_records
from ..hub import CARD_NAME, is_adapter, is_ours, write_trained_card
from ..kernels import fast_products
from ..nn import check_trainable
from ..records import MERGE_REPORT_NAME, REPORT_NAME, RESULTS_NAME

# Builders of `datasets` that read files, of which they say nothing.
_BUILDERS = ("arrow", "csv", "generator", "json", "pandas", "parquet", "text")


def recording(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `Trainer.__init__`: adds to trainers of sparse models, and of adapters on them, what this file has."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        model = args[0] if args else kwargs.get("model")
        _check_trains(model)
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        original(self, *args, **kwargs)
        if is_ours(self.model):
            _check_trains(self.model)  # what `model_init` gave
            self.add_callback(_Provenance(self, use_cache))
            self.create_model_card = _with_section(self, self.create_model_card)
            self.training_step = _with_fast_products(self, self.training_step)
            self.prediction_step = _with_fast_products(self, self.prediction_step)

    return __init__


def _check_trains(model: Any) -> None:
    """Raises ValueError where the weights of a model were to be trained, and are integers."""
    if is_ours(model) and not is_adapter(model):
        check_trainable(model)


def _with_section(trainer: Any, original: Any) -> Any:
    """`trainer.create_model_card`, whose card has this package's section as well."""

    @functools.wraps(original)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if trainer.is_world_process_zero() and is_ours(trainer.model):
            options = {"repo_id": trainer.hub_model_id, "language": kwargs.get("language")}
            write_trained_card(trainer.model, trainer.args.output_dir, **options)

    return create_model_card


def _with_fast_products(trainer: Any, original: Any) -> Any:
    """A step of `trainer`, gradients included, without products that this CPU is slow in."""

    @functools.wraps(original)
    def step(model: Any, *args: Any, **kwargs: Any) -> Any:
        with fast_products(model, torch.bfloat16 if trainer.args.bf16 else None):
            return original(model, *args, **kwargs)

    return step


class _Provenance(TrainerCallback):
    """Notes the training on the model, and puts report and card beside the weights of each push. When it ends, the
    model has its cache of keys and values again, which `Trainer` turns off in the config that is saved."""

    def __init__(self, trainer: Any, use_cache: bool | None) -> None:
        self.trainer, self.use_cache = trainer, use_cache

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = TrainingRun(type(self.trainer).__name__, _dataset_name(self.trainer.train_dataset), state)
        facts_of(self.trainer.model).run = run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache
        run = facts_of(model).run
        if isinstance(run, TrainingRun):
            if not is_adapter(model) and is_ours(model):
                settle_records(model)
            run.ended = True

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a checkpoint `Trainer` pushes config and weights alone, which it copies into the output's folder."""
        checkpoint, output = Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir)
        if not (state.is_world_process_zero and checkpoint.is_dir() and is_ours(self.trainer.model)):
            return
        for name in (REPORT_NAME, MERGE_REPORT_NAME, RESULTS_NAME):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, output)
            else:
                (output / name).unlink(missing_ok=True)
        write_trained_card(self.trainer.model, output, weights=checkpoint, repo_id=self.trainer.hub_model_id)
        if (checkpoint / CARD_NAME).is_file():  # PEFT's form, with the path of a local base in it
            write_trained_card(self.trainer.model, checkpoint, repo_id=self.trainer.hub_model_id)


def _dataset_name(dataset: Any) -> str | None:
    """The name of a data set of `datasets` that is more than the kind of its files."""
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return name if isinstance(name, str) and name not in _BUILDERS else None
