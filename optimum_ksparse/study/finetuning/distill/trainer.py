"""Distillation by transformers' `Trainer`. TRL's `DistillationTrainer` learns from text that the student writes, for
which the teacher is in memory, or served, at every step; here the text is given, and the teacher runs over it once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from ....blocks.running import replaced_forward
from ....checkpoint import find_weight_files, without_peft
from ....checkpoint.model_class import load_model
from ....data import calibration_tokens
from ....data.dataset import describe_dataset, holds
from ....data.texts import describe_texts
from ....data.tokens import check_context
from ....evaluation import evaluate_perplexity
from ....evaluation.running import bases_of, map_head
from ....nn import check_trainable
from ....pruning.distributed import current
from ....records import describe_source
from ..run import TaskTrainer, add_adapter
from ..settings import DistillSettings
from .loss import distillation_loss
from .teacher import TeacherLogits, check_teacher, vocabulary_digest


class DistillTrainer(TaskTrainer):
    """Trains kept values, norms and biases, or an adapter, on the teacher's logits. Weights are in float32 while they
    train, and are saved in their own dtype."""

    task, figure = "distill", "perplexity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DistillSettings,
        arguments: dict[str, Any],
    ) -> None:
        self.settings, self.tokenizer, self.data = settings, tokenizer, settings.calibration(tokenizer)
        self._check(model)
        files = find_weight_files(settings.checked_teacher, revision=settings.teacher_revision)
        record = {
            "teacher": describe_source(settings.teacher),
            "teacher_sha256": files.sha256(),
            "tokenizer_sha256": vocabulary_digest(tokenizer),
            "dataset": describe_dataset(self.data.dataset),
            **{name: getattr(self.data, name) for name in ("num_samples", "seq_len", "seed", "prepend_bos")},
            **{name: getattr(settings, name) for name in ("top_k", "temperature", "bf16")},
        }
        texts = None if settings.texts is None else describe_texts(settings.texts)
        self.described = {**record, "learning_rate": settings.learning_rate, "texts": texts}
        logits = TeacherLogits(Path(settings.cache or Path(arguments["output_dir"], "teacher")), record)
        self.dtype, self.dtypes = model.dtype, {name: tensor.dtype for name, tensor in _tensors(model)}
        if settings.method == "full":
            model.float()
        tuned = add_adapter(model, settings, "CAUSAL_LM")
        for module in model.modules() if settings.method == "full" else ():
            if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
                module.requires_grad_(False)
        config = self._arguments({**arguments, "learning_rate": settings.learning_rate})
        super().__init__(
            model=tuned, args=config, train_dataset=logits, eval_dataset=logits, callbacks=[_Restore(self)]
        )
        self.logits = logits
        self._head: nn.Parameter | None = None  # its weight in bfloat16
        self.model_accepts_loss_kwargs = False  # the loss is a mean, over samples of one length

    def _check(self, model: PreTrainedModel) -> None:
        settings, data = self.settings, self.data
        if settings.method == "full":
            check_trainable(model)
        check_context(model, data.seq_len)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        if settings.top_k >= vocabulary:
            raise ValueError(f"top_k={settings.top_k} must be below the vocabulary of {vocabulary} tokens")
        if data.num_samples % settings.batch_size:
            raise ValueError(
                f"num_samples={data.num_samples} is not a multiple of batch_size={settings.batch_size}: the last step "
                "would have fewer samples"
            )
        check_teacher(settings.checked_teacher, settings.teacher_revision, model, self.tokenizer, data.seq_len)

    def _arguments(self, arguments: dict[str, Any]) -> TrainingArguments:
        settings = self.settings
        steps = settings.max_steps or math.ceil(settings.num_epochs * self.data.num_samples / settings.batch_size)
        warmup_steps = math.ceil(steps / 20) if settings.warmup_steps is None else settings.warmup_steps
        return TrainingArguments(
            **{**arguments, "warmup_steps": warmup_steps},
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            eval_strategy="no" if settings.texts is None else "steps",
            eval_steps=settings.eval_every or steps,
            eval_on_start=settings.texts is not None,
        )

    def prepare(self) -> None:
        def load() -> PreTrainedModel:
            teacher = load_model(self.settings.checked_teacher, revision=self.settings.teacher_revision)
            moved: PreTrainedModel = teacher.to(self.args.device)
            return moved

        def draw(model: PreTrainedModel) -> torch.Tensor:
            return calibration_tokens(self.data, model, self.tokenizer).ids

        # Tokens that the teacher writes wait for it; the others are drawn, and may be too few, before it is there.
        drawn_for = None if holds(self.data.dataset, "self") else without_peft(self.model)
        self.logits.fill(load, draw, self.settings.micro_batch_size, current(), drawn_for)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean over all positions but the last of each sample. Logits and their gradients, which with a large
        vocabulary are larger than all else, are there for a part of the positions at a time: the head runs forward
        and backward here, and `backward` goes on from its input."""
        student, ids = without_peft(self.model), inputs["input_ids"]
        with _without_head(student) as outputs, self._head_in_product_dtype():
            model(input_ids=ids)
        (output,) = outputs
        hidden = output[0].detach().requires_grad_()
        of_base = set(student.base_model.parameters())
        # Of a head with more maps than one, or with an adapter.
        others = [p for p in student.parameters() if p.requires_grad and p not in of_base]

        def loss_of(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            targets = ids[:, 1:][:, part], inputs["indices"][:, part], inputs["log_probs"][:, part]
            loss = distillation_loss(logits, *targets, self.settings.temperature, self.settings.cross_entropy)
            loss = loss / ids[:, 1:].numel()
            return loss.detach(), *torch.autograd.grad(loss, [hidden, *others])

        with self.accelerator.autocast(), self._head_in_product_dtype():
            parts = map_head(student, ids, type(output)(last_hidden_state=hidden), loss_of)
        total, *grads = (functools.reduce(torch.Tensor.add_, column) for column in zip(*parts, strict=True))
        loss: torch.Tensor = _WithGradients.apply(total, grads, output[0], *others)
        return loss

    @contextmanager
    def _head_in_product_dtype(self) -> Iterator[None]:
        """Autocast keeps no copy of weights that are not trained: it would make one of the head for each part."""
        head = without_peft(self.model).get_output_embeddings()
        before = head.weight
        if not self.args.bf16 or before.dtype is torch.bfloat16 or "weight" not in head._parameters:  # an adapter's
            yield
            return
        if self._head is None:
            self._head = nn.Parameter(before.detach().bfloat16(), requires_grad=False)
        head.weight = self._head
        try:
            yield
        finally:
            head.weight = before

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        step, settings = self.state.global_step, self.settings
        assert settings.texts is not None and self.args.eval_steps is not None
        measured = any(entry["step"] == step and self.figure in entry for entry in self.state.log_history)
        if measured or step % self.args.eval_steps:  # `eval_on_start` comes here when a run goes on, too
            return {}
        how: dict[str, Any] = {name: getattr(settings, name) for name in ("prepend_bos", "max_tokens")}
        how |= {"seq_len": self.data.seq_len, "batch_size": 1}
        with self.accelerator.autocast(), self._head_in_product_dtype():
            row = evaluate_perplexity(without_peft(self.model), self.tokenizer, settings.texts, **how)
        return self.log_figures({self.figure: round(row[self.figure], 4)})

    def outcome(self, steps: int) -> dict[str, Any]:
        """The tokens that were learnt from."""
        return {"tokens": steps * self.settings.batch_size * self.data.seq_len}

    def restore_dtypes(self) -> None:
        """Gives each weight and buffer the dtype that it came with."""
        if self.settings.method == "full":
            others = {
                name: tensor.detach().to(self.dtypes[name])
                for name, tensor in _tensors(self.model)
                if self.dtypes[name] != self.dtype
            }
            self.model.to(self.dtype)
            for name, tensor in _tensors(self.model):
                if name in others:
                    tensor.data = others[name]

    def save(self, folder: Path) -> None:
        self.restore_dtypes()  # a run that was cut off while it was saved has not trained again
        super().save(folder)


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[list[ModelOutput]]:
    """Within it the model's forward notes what its base gives, and runs the head on the last position alone."""
    outputs: list[ModelOutput] = []
    bases, called = bases_of(model), []
    forwards = [base.forward for base in bases]

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.append(index)
            output = forwards[index](*args, **kwargs)
            if called[0] != index:  # inside the one that the head called
                return output
            outputs.append(output)
            return type(output)(last_hidden_state=output[0][:, -1:])

        return forward

    with replaced_forward(bases, make):
        yield outputs


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients to `tensors` are known."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, grads: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(grad * grad_loss for grad in ctx.saved_tensors)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


class _Restore(TrainerCallback):
    """Restores the dtypes when training ends, before the report notes what training made of the weights."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_dtypes()
