"""`Trainer` that puts a whole model's weights back by the names that they have in files."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer


class ResumableTrainer(Trainer):
    """`Trainer` itself reads a checkpoint's tensors by the names of the modules, not strictly, so that those that are
    renamed when they are saved (the head of GPT-NeoX) stay as they are before training (transformers 5.23)."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
