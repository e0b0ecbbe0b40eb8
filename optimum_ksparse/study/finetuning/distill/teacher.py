"""The teacher: whether it fits the student, and its logits on the disk.

| file of the cache | key | shape | dtype | meaning |
|---|---|---|---|---|
| `cache.json` | | | | what was written: teacher, tokenizer, data, k, temperature, dtype of products |
| `tokens.safetensors` | `input_ids` | [samples, seq_len] | int32 | the text |
| `00000.safetensors`, … | `indices` | [samples, seq_len − 1, k] | int32 | the likeliest tokens after each position |
| | `log_probs` | [samples, seq_len − 1, k + 1] | float16 | their log-probabilities, and that of all others together |

Each file is written whole or not at all, so that what was cut off goes on with the files that are missing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ....blocks import evaluation_mode
from ....blocks.running import device_of
from ....checkpoint import check_space
from ....checkpoint.staging import check_output, save_tensors, write_text
from ....data import read_tokenizer
from ....data.tokens import check_context
from ....evaluation.running import check_causal_lm, map_logits
from ....kernels import fast_products
from ....pruning.distributed import Processes
from ....records import differences, read_record, to_json
from .loss import log_outcomes

logger = logging.get_logger(__name__)

_RECORD, _TOKENS = "cache.json", "tokens.safetensors"
# Of a file of logits: what a process that is killed loses.
_TOKENS_A_FILE = 1 << 14


def check_teacher(
    teacher: str, revision: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> None:
    """Raises ValueError where the vocabulary of the teacher, a folder or Hub id, is not that of the student, or its
    tokenizer, where it has one, makes other tokens, or samples are longer than its context. Its weights are not
    read."""
    config = AutoConfig.from_pretrained(teacher, revision=revision).get_text_config(decoder=True)
    size = model.get_output_embeddings().weight.shape[0]
    if config.vocab_size != size:
        raise ValueError(
            f"teacher={teacher!r} has a vocabulary of {config.vocab_size}, the model one of {size}: their logits "
            "cannot be compared; name the dense model that it was made from, or another one of the same vocabulary"
        )
    check_context(config, seq_len, "with this teacher seq_len")
    try:
        vocabulary = read_tokenizer(teacher, revision=revision).get_vocab()
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        logger.warning(f"The tokenizer of the teacher could not be read and is taken to be the model's: {error}")
        return
    for token, number in tokenizer.get_vocab().items() ^ vocabulary.items():
        raise ValueError(
            f"teacher={teacher!r} has another tokenizer: {token!r} is {number} in one of the two alone; name a "
            "teacher with the tokenizer of the model"
        )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class TeacherLogits(Dataset[dict[str, torch.Tensor]]):
    """The samples with the teacher's logits, in a folder by the table above; of a sample `input_ids`, `indices` and
    `log_probs`, without its first dimension."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        """`record`: what the logits are of; `num_samples`, `seq_len`, `top_k`, `temperature` and `bf16` among it."""
        self.folder, self.record = folder, record
        self.samples_a_file = max(1, _TOKENS_A_FILE // record["seq_len"])
        starts = range(0, record["num_samples"], self.samples_a_file)
        self.files = [folder / f"{number:05}.safetensors" for number in range(len(starts))]

    def fill(
        self,
        load: Callable[[], PreTrainedModel],
        draw: Callable[[PreTrainedModel], torch.Tensor],
        batch_size: int,
        processes: Processes,
        drawn_for: PreTrainedModel | None,
    ) -> None:
        """Writes what is missing: every process runs the teacher on its share. The teacher, which `load` gives, is in
        memory meanwhile alone.

        Args:
            draw: gives the tokens [samples, seq_len] for a model.
            drawn_for: a model of the same vocabulary, for which they are drawn before the teacher is there; None
                where the teacher has to write them.
            batch_size: samples in one forward pass.

        Raises:
            ValueError: the folder holds logits of something else. FileExistsError: it holds other files. OSError: the
                disk has no room.
        """
        if processes.once(self._claim):
            return
        if drawn_for is not None:
            processes.once(lambda: self._write_tokens(draw, drawn_for))
        self._run(processes.each(load), draw, batch_size, processes)
        gc.collect()
        torch.cuda.empty_cache()

    def _claim(self) -> bool:
        """Makes the folder this job's, and says whether all is there."""
        check_output(self.folder, ours=(_RECORD,), overwrite=None)
        path = self.folder / _RECORD
        if path.is_file():
            earlier = read_record(dict[str, Any], path, "is no record of a teacher's logits")
            if changes := differences(earlier, self.record):
                raise ValueError(
                    f"cache={os.fspath(self.folder)!r} holds logits of something else ({'; '.join(changes)}): "
                    "name another folder, or remove this one"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = self.record["num_samples"] * (self.record["seq_len"] - 1) * (self.record["top_k"] + 1)
            check_space(self.folder, 6 * numbers, "the teacher's logits")
            write_text(path, to_json(self.record))
        return all(file.is_file() for file in [self.folder / _TOKENS, *self.files])

    def _run(
        self,
        teacher: PreTrainedModel,
        draw: Callable[[PreTrainedModel], torch.Tensor],
        batch_size: int,
        processes: Processes,
    ) -> None:
        processes.once(lambda: self._write_tokens(draw, teacher))
        processes.each(lambda: self._write_share(teacher, batch_size, processes))

    def _write_tokens(self, draw: Callable[[PreTrainedModel], torch.Tensor], model: PreTrainedModel) -> None:
        if not (tokens := self.folder / _TOKENS).is_file():
            save_tensors({"input_ids": draw(model).int()}, tokens)

    @torch.no_grad()
    def _write_share(self, teacher: PreTrainedModel, batch_size: int, processes: Processes) -> None:
        check_causal_lm(teacher)
        tokens = load_file(self.folder / _TOKENS)["input_ids"].long()
        parts = list(zip(self.files, tokens.split(self.samples_a_file), strict=True))
        missing = [(file, ids) for file, ids in parts[processes.rank :: processes.size] if not file.is_file()]
        bar = tqdm(missing, "Logits of the teacher", unit="file", disable=not processes.is_main)
        with evaluation_mode(teacher):
            for file, ids in bar:
                rows = [self._largest(teacher, batch) for batch in ids.split(batch_size)]
                indices, log_probs = (torch.cat(column) for column in zip(*rows, strict=True))
                save_tensors({"indices": indices, "log_probs": log_probs}, file)

    def _largest(self, teacher: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`indices` and `log_probs` of token ids [samples, seq_len]."""

        def keep(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = logits.float() / self.record["temperature"]
            indices = logits.topk(self.record["top_k"], sorted=False).indices
            return indices.int().cpu(), log_outcomes(logits, indices).half().cpu()

        device, dtype = device_of(teacher), torch.bfloat16 if self.record["bf16"] else None
        with fast_products(teacher, dtype), torch.autocast(device.type, dtype, enabled=dtype is not None):
            parts = map_logits(teacher, ids.to(device), keep)
        indices, log_probs = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return indices, log_probs

    def __len__(self) -> int:
        return int(self.record["num_samples"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Raises ValueError, which names the file, where one is damaged."""
        number, row = divmod(index, self.samples_a_file)
        length, k = self.record["seq_len"], self.record["top_k"]
        sample = {"input_ids": _row(self.folder / _TOKENS, "input_ids", index, [length]).long()}
        for key, width in (("indices", k), ("log_probs", k + 1)):
            sample[key] = _row(self.files[number], key, row, [length - 1, width])
        return sample


def _row(path: Path, key: str, row: int, shape: list[int]) -> torch.Tensor:
    """A row of a tensor in a safetensors file, of which nothing else is read."""
    try:
        with safe_open(path, framework="pt") as file:
            values: torch.Tensor = file.get_slice(key)[row : row + 1]
        if list(values.shape) != [1, *shape]:
            raise ValueError(f"row {row} of {key} is {list(values.shape[1:])}, not {shape}")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and it is written again") from None
    return values[0]
