"""The `Trainer` of a run."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer


class ResumableTrainer(Trainer):
    """`Trainer` itself reads a checkpoint's tensors by the names of the modules, not strictly, so that those that are
    renamed when they are saved (the head of GPT-NeoX) stay as they are before training (transformers 5.23).

    Args:
        sampler: gives the order of the examples; None: a random one.
    """

    def __init__(self, *args: Any, sampler: Sampler[int] | None = None, **kwargs: Any) -> None:
        self._sampler = sampler
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_train_sampler(*args, **kwargs) if self._sampler is None else self._sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
