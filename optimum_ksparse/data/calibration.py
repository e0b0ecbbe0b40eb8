"""`CalibrationData`: what calibration tokens are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checks import check_boolean, check_integer
from ..records import describe_source, printable
from .dataset import check_dataset, is_mix, is_token_ids, mix_shares, needs_tokenizer, token_ids_shape
from .tokenizer import check_tokenizer, read_tokenizer


@dataclass
class CalibrationData:
    """What calibration tokens are drawn from.

    Args:
        dataset, tokenizer, num_samples, seq_len, seed, prepend_bos: as in `SparsityConfig`. Token ids have their own
            `num_samples` and `seq_len`.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is allowed.
        FileNotFoundError: the calibration file is missing.
    """

    dataset: Any
    tokenizer: Any = None
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("seq_len", 2), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        if self.prepend_bos is not None:
            check_boolean("prepend_bos", self.prepend_bos)
        check_tokenizer(self.tokenizer)
        check_dataset(self.dataset)
        if is_mix(self.dataset):
            mix_shares(self.dataset, self.num_samples)  # raises where a part would get no sample
        if is_token_ids(self.dataset):
            self.num_samples, self.seq_len = token_ids_shape(self.dataset)


def load_tokenizer(data: CalibrationData, source: Any, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer for calibration text: `data.tokenizer`, or the one of `source`, loaded with `arguments` of
    `from_pretrained`. None where none is needed.

    Raises:
        ValueError: one is needed, and none can be loaded.
    """
    if is_token_ids(data.dataset):
        return None
    if isinstance(data.tokenizer, PreTrainedTokenizerBase):
        return data.tokenizer
    if data.tokenizer is not None:  # another repository than the weights': it has its own revisions and folders
        source = data.tokenizer
        arguments = {k: v for k, v in arguments.items() if k not in ("revision", "subfolder", "gguf_file")}
    try:
        if not source:
            raise OSError("the model was loaded from nowhere")
        return read_tokenizer(source, **arguments)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        if not needs_tokenizer(data.dataset):
            return None
        where = f" from {describe_source(source)!r}" if source else ""
        raise ValueError(
            f"no tokenizer could be loaded{where}: pass tokenizer=, or token ids as the dataset; {printable(error)}"
        ) from error
