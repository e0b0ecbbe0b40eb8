"""Instruction tuning on KoAlpaca v1.1a (https://github.com/Beomi/KoAlpaca), in its form, with the loss on the answer
and its end token alone, by TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ...data.dataset import describe_dataset
from ...data.tokens import check_context
from .instructions import instruction_rows, koalpaca_prompt
from .run import TaskTrainer, add_adapter
from .settings import KoAlpacaSettings

logger = logging.get_logger(__name__)


class KoAlpacaTrainer(TaskTrainer, SFTTrainer):
    task = "koalpaca"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: KoAlpacaSettings,
        arguments: dict[str, Any],
    ) -> None:
        check_context(model, settings.max_length, "max_length")
        name, rows = instruction_rows(settings.data, settings.max_examples)
        examples = koalpaca_examples(rows, tokenizer, settings.max_length)
        hashed = describe_dataset([text for row in rows for text in row.values()])
        self.described = {"data": name, "data_sha256": hashed["sha256"], "examples": len(examples)}
        config = SFTConfig(**arguments, max_length=settings.max_length)
        tuned = add_adapter(model, settings, "CAUSAL_LM")
        super().__init__(model=tuned, args=config, train_dataset=examples, processing_class=tokenizer)


def koalpaca_examples(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`prompt` and `completion` of instructions and answers, as TRL takes them. The model learns to go on from the
    colon; the space after it belongs to the answer, as it does to words in the middle of a text. Raises ValueError
    where the tokenizer has no end token, or no prompt is shorter than `max_length` tokens."""
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end token, without which the model would not learn to stop: set tokenizer.eos_token "
            "to the one that the model was trained with"
        )
    pairs = [{"prompt": koalpaca_prompt(row["instruction"]), "completion": f" {row['output']}"} for row in rows]
    prompts = tokenizer([pair["prompt"] for pair in pairs], verbose=False)["input_ids"]
    short = [pair for pair, ids in zip(pairs, prompts, strict=True) if len(ids) < max_length]
    if len(short) < len(rows):
        what = f"{len(rows) - len(short)} of {len(rows)} examples have a prompt of {max_length=} tokens or more"
        if not short:
            raise ValueError(f"{what}, which leaves none: raise max_length")
        logger.warning(f"{what} and are left out.")
    return Dataset.from_list(short)
