"""Fine-tuning on KorQuAD 1.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import SAFE_WEIGHTS_NAME

from ..run import TaskTrainer, add_adapter
from ..settings import KorQuADSettings
from .data import korquad_data
from .model import SpanModel
from .prediction import evaluate_korquad
from .windows import collate, fitted, make_windows


class KorQuADTrainer(TaskTrainer):
    """Trains on all windows, those without the answer towards their end, and measures exact match and F1 in the place
    of a loss."""

    task, figure = "korquad", "exact_match"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: KorQuADSettings,
        arguments: dict[str, Any],
    ) -> None:
        data, self.eval_data = korquad_data(settings)
        self.settings, self.tokenizer = fitted(settings, model, tokenizer), tokenizer
        questions = data.questions[: settings.max_examples]
        windows = [w for w in make_windows(questions, tokenizer, self.settings) if w["start_positions"] >= 0]
        if not windows:
            raise ValueError("data: no question has an answer that is in its paragraph, there is nothing to train on")
        self.described = {
            "data": {**data.description, "split": data.split, "questions": len(questions)},
            "eval_data": {**self.eval_data.description, "split": self.eval_data.split},
            "num_windows": len(windows),
            **{name: getattr(self.settings, name) for name in ("seq_len", "prepend_bos")},
        }
        self.span_model = SpanModel(add_adapter(model, settings)).train()
        if settings.head_only:
            self.span_model.backbone.requires_grad_(False)
        config = TrainingArguments(
            **arguments,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            eval_strategy="no" if settings.eval_every is None else "steps",
            eval_steps=settings.eval_every,
        )
        super().__init__(
            model=self.span_model,
            args=config,
            data_collator=collate,
            train_dataset=windows,
            eval_dataset=windows[:1],
        )

    def save(self, folder: Path) -> None:
        self.span_model.save(folder)

    def measure(self) -> dict[str, Any]:
        return evaluate_korquad(self.span_model, self.tokenizer, self.eval_data, self.settings)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        row = self.measure()
        return self.log_figures({name: round(row[name], 4) for name in ("exact_match", "f1")})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)  # of what trains alone
        self.span_model.load_state_dict(tensors, strict=False)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        sampler = super()._get_train_sampler(*args, **kwargs)
        assert isinstance(sampler, LengthGroupedSampler)
        return _EpochSampler(self.args.seed, sampler.batch_size, lengths=sampler.lengths)


class _EpochSampler(LengthGroupedSampler):
    """The order of an epoch follows from the seed and its number alone, so that a run that goes on finds it again."""

    def __init__(self, seed: int, batch_size: int, lengths: list[int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
