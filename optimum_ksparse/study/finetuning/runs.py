"""What the tasks share: the folder of a run, the model that trains, and saving and finding what came of it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ...adapters import require_peft
from ...adapters.prepare import prepare_for_training
from ...checkpoint.staging import check_apart, check_output, claimed, staged
from ...records import TUNING_NAME
from .checkpoints import FOLDER
from .settings import FinetuningSettings, adapter_config, linear_targets
from .training import RECORDS

logger = logging.get_logger(__name__)

_LOCK = ".finetuning.lock"
_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def claimed_output(
    output: str | os.PathLike[str], reads: Iterable[object], *, overwrite: bool = False
) -> Iterator[None]:
    """Within it, `output` is this run's, which may begin once more in it: checked before anything is loaded.

    Raises:
        ValueError, FileExistsError, NotADirectoryError: as `check_output`; of `reads` it must be apart anyhow.
        BlockingIOError: another process is tuning into it.
    """
    if os.environ.get("RANK", "0") != "0":  # the first process writes
        yield
        return
    reads = list(reads)
    check_output(output, reads=reads, ours=(TUNING_NAME, FOLDER), overwrite=overwrite)
    check_apart(output, reads)
    busy = f"another process is tuning into {os.fspath(output)}; wait for it, or name another folder"
    with claimed(Path(output), _LOCK, busy):
        yield


def claims_output(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a task, a function of `model`, `data`, `output` and `overwrite`, within `claimed_output`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs).arguments
        reads = getattr(given["model"], "name_or_path", given["model"]), given["data"]
        with claimed_output(given["output"], reads, overwrite=given.get("overwrite", False)):
            return function(*args, **kwargs)

    return run


def add_adapter(model: PreTrainedModel, settings: FinetuningSettings, **more: Any) -> Any:
    """The PEFT model that `settings` ask for, drawn with their seed; with `method="full"` the model itself, all of
    whose weights train.

    Args:
        more: arguments of `adapter_config`.
    """
    set_seed(settings.seed)
    if settings.method == "full":
        if model.dtype.itemsize < 4:
            logger.warning(
                f"The weights train in {model.dtype}, in which small updates are lost: load them in float32."
            )
        model.config.use_cache = False
        return model.requires_grad_(True).train()
    require_peft()
    from peft import get_peft_model

    config = adapter_config(settings, linear_targets(model), **more)
    prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
    return get_peft_model(model, config).train()


def is_main() -> bool:
    """Whether this is the process that writes: the only one, or the first."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def save_run(model: Any, tokenizer: PreTrainedTokenizerBase, output: str | os.PathLike[str]) -> bool:
    """Saves an adapter or a model, and the tokenizer; whole or not at all. Gives False in all processes but the first
    one, which alone writes."""
    if not is_main():
        return False
    with staged(output, gone=RECORDS) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        # PEFT's empty form of a card; the card of this model is written from what is known of it.
        (staging / "README.md").unlink(missing_ok=True)
    return True


def finished_model(model: PreTrainedModel, settings: FinetuningSettings, output: str | os.PathLike[str]) -> Any:
    """The model that an earlier run saved in `output`."""
    if settings.method == "full":
        return type(model).from_pretrained(os.fspath(Path(output)), dtype=model.dtype)
    require_peft()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, os.fspath(output)).eval()
