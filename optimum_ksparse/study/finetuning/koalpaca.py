"""Instruction tuning on KoAlpaca v1.1a (https://github.com/Beomi/KoAlpaca), in its form, with the loss on the answer
alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...checkpoint import fingerprint
from ...checkpoint.model_class import class_for_source
from ...checks import check_integer
from ...data.tokenizer import read_tokenizer
from ...data.tokens import context_length, prepends_bos
from ...evaluation.environment import check_causal_lm
from .answers import answer_loss
from .instructions import fingerprint_of, instruction_rows
from .runs import add_adapter, claims_output, finished_model, save_run
from .settings import FinetuningSettings
from .training import finish, finished, train

logger = logging.get_logger(__name__)

KOALPACA = "beomi/KoAlpaca-v1.1a"
_BATCH = 256


@claims_output
def finetune_koalpaca(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    settings: FinetuningSettings,
    output: str | os.PathLike[str],
    *,
    max_length: int = 512,
    max_examples: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Any:
    """Tunes a causal LM, sparse or dense, to answer instructions: `### 질문: {instruction}\\n\\n### 답변: {output}`
    and the end token, with the loss on the answer and its end token.

    The prompt's tokens are those that `koalpaca_prompt` has by itself, because generation sees these. The model learns
    to go on from the colon; the space after it belongs to the answer, as it does to words in the middle of a text.

    Args:
        model: the model, or a folder or Hub id, which is read in the dtype of its weights.
        tokenizer: the model's; None reads the one beside it.
        data: `"beomi/KoAlpaca-v1.1a"` or another data set on the Hub with its columns, a file of JSON lines, or rows;
            each with an `instruction` and an `output`.
        settings: how to train.
        output: folder for the adapter (with `method="full"` the whole model), the tokenizer and `finetuning.json`.
        max_length: tokens of an example, as in the commands of Alpaca-LoRA (its code has 256 where they say nothing).
            Longer answers are cut and then have no end token; examples whose prompt alone is as long are left out.
        max_examples: use the first ones alone.
        resume: go on with an unfinished run in `output`; False starts over.
        overwrite: replace a finished run in `output`. Without it, one of the same job is loaded and returned.

    Returns:
        The PEFT model, or with `method="full"` the model, in evaluation mode.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the model has no language model head.
        ValueError: an argument or the data are not as above, the tokenizer has no end token, or `output` holds another
            model or another run.
        FileExistsError, NotADirectoryError, BlockingIOError: `output` holds something else, is a file, or is in use.
        ConnectionError: the data set cannot be read from the Hub.
    """
    check_integer("max_length", max_length, 2)
    if max_examples is not None:
        check_integer("max_examples", max_examples, 1)
    if not isinstance(model, PreTrainedModel):
        loaded: PreTrainedModel = class_for_source(model).from_pretrained(os.fspath(model), dtype="auto")
        model = loaded
    check_causal_lm(model)
    context = context_length(model)
    if context is not None and max_length > context:
        raise ValueError(f"max_length={max_length} is above the model's context of {context} positions")
    base = str(model.name_or_path)
    tokenizer = tokenizer or read_tokenizer(base)
    name, rows = instruction_rows(data, KOALPACA, max_examples)
    examples = koalpaca_examples(rows, tokenizer, max_length)
    words: Any = model.get_input_embeddings().weight
    if max(max(example["input_ids"]) for example in examples) >= words.shape[0]:
        raise ValueError("the tokenizer has tokens that the model does not know: pass the tokenizer of this model")
    job = {
        "task": "koalpaca",
        "base": base,
        "base_fingerprint": fingerprint(model),
        "data": name,
        "data_sha256": fingerprint_of(examples),
        "max_length": max_length,
        "examples": len(examples),
    }
    if finished(output, settings, job, overwrite=overwrite) is not None:
        return finished_model(model, settings, output)
    tuned = add_adapter(model, settings, task_type="CAUSAL_LM")
    with answer_loss(model):
        log = train(tuned, examples, Collator(model, tokenizer), settings, output, job=job, resume=resume)
    if save_run(tuned, tokenizer, output):
        finish(output, settings, log, job)
    return tuned.eval()


def koalpaca_prompt(instruction: str) -> str:
    """What the model is asked with; it answers with a space, the answer and the end token."""
    return f"### 질문: {instruction}\n\n### 답변:"


def koalpaca_examples(
    rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` (−100 over the prompt) of instructions and answers.

    The text is tokenised as a whole where that begins with the tokens of the prompt, so that the answer is tokenised
    as the rest of a text is; where the tokenizer merges over the border, prompt and answer are tokenised apart.

    Raises:
        ValueError: the tokenizer has no end token, or no example is left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "the tokenizer has no end token, without which the model would not learn to stop: set tokenizer.eos_token "
            "to the one that the model was trained with"
        )
    begin = [tokenizer.bos_token_id] if prepends_bos(tokenizer, None) else []

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    examples = []
    for start in tqdm(range(0, len(rows), _BATCH), desc="Examples", unit="batch", leave=False):
        batch = rows[start : start + _BATCH]
        prompts = encode([koalpaca_prompt(instruction) for instruction, _ in batch])
        wholes = encode([f"{koalpaca_prompt(instruction)} {answer}" for instruction, answer in batch])
        for prompt, whole, (_, answer) in zip(prompts, wholes, batch, strict=True):
            rest = whole[len(prompt) :] if whole[: len(prompt)] == prompt else encode([f" {answer}"])[0]
            ids = [*begin, *prompt, *rest, end][:max_length]
            asked = len(begin) + len(prompt)
            if asked < max_length:
                examples.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    if len(examples) < len(rows):
        found = f"{len(rows) - len(examples)} of {len(rows)} examples have an instruction of max_length={max_length}"
        if not examples:
            raise ValueError(f"{found} tokens or more, which leaves none: raise max_length")
        logger.warning(f"{found} tokens or more and are left out.")
    return examples


class Collator:
    """Makes a batch: examples padded on the right to the longest of them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id
        self._fill = {"input_ids": tokenizer.eos_token_id if pad is None else pad, "labels": -100}
        # Models of images and text, such as Gemma 3 from 4B, want to know which tokens are text: all, with 0.
        config: Any = model.config
        self._kinds = config.get_text_config(decoder=True) is not config and "gemma3" in config.model_type

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(example["input_ids"]) for example in examples]
        longest = max(lengths)
        batch = {
            name: torch.tensor([e[name] + [fill] * (longest - len(e[name])) for e in examples])
            for name, fill in self._fill.items()
        }
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        if self._kinds:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch
