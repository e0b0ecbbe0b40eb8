"""What to measure, and how."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import prepends_bos
from ..calibration.tokens import check_context, context_length
from ..config import check_integer
from .environment import check_causal_lm, check_prepend_bos
from .kobest import check_tasks, evaluate_kobest, import_lm_eval
from .kobest_data import KOBEST_TASKS, describe_data, read_items
from .perplexity import evaluate_perplexity
from .results import Measurement
from .texts import describe_texts

_MOST_POSITIONS = 2048


@dataclass(frozen=True)
class EvaluationProtocol:
    """What to measure, and how: the same for a sparse model and for its dense baseline.

    Args:
        texts: for perplexity: `"kowiki"`, a `.txt` or `.jsonl` file, a list of texts, or None for no perplexity.
        seq_len: window positions; None takes the model's context, at most 2048.
        stride, max_tokens: as in `evaluate_perplexity`.
        tasks: of KoBEST, none where empty. num_fewshot, limit, data_dir: as in `evaluate_kobest`.
        prepend_bos: begin each window and item with the beginning token; None does so where the tokenizer does.
        batch_size: windows or items in one forward pass.

    Raises:
        TypeError, ValueError, FileNotFoundError: names the argument, what was found and what is allowed.
    """

    texts: str | os.PathLike[str] | Sequence[str] | None = "kowiki"
    seq_len: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    tasks: Sequence[str] = KOBEST_TASKS
    num_fewshot: int = 0
    limit: int | None = None
    data_dir: str | os.PathLike[str] | None = None
    prepend_bos: bool | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "stride": 1, "max_tokens": 2, "limit": 1, "num_fewshot": 0, "batch_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None or name in ("num_fewshot", "batch_size"):
                check_integer(name, value, lowest)
        check_prepend_bos(self.prepend_bos)
        _check_stride(self.stride, self.seq_len)
        if self.texts is not None:
            describe_texts(self.texts)
        object.__setattr__(self, "tasks", () if self.tasks in ([], ()) else check_tasks(self.tasks))
        if self.texts is None and not self.tasks:
            raise ValueError("texts is None and tasks is empty: there is nothing to measure")
        for task in self.tasks if self.data_dir is not None else ():
            read_items(task, self.data_dir, self.num_fewshot)  # type: ignore[arg-type]

    def requests(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """For each measurement that this asks for, the part of its protocol that is known beforehand."""
        common = {
            "prepend_bos": prepends_bos(tokenizer, self.prepend_bos),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        asked: dict[str, dict[str, Any]] = {}
        if self.texts is not None:
            windows = {"seq_len": self.window(model), "stride": self.stride, "max_tokens": self.max_tokens}
            asked["perplexity"] = {"texts": describe_texts(self.texts), **windows, **common}
        for task in self.tasks:
            data = describe_data(task, self.data_dir, self.num_fewshot)
            asked[task] = {"num_fewshot": self.num_fewshot, "limit": self.limit, "data": data, **common}
        return asked

    def measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measurement:
        """Takes one of the measurements that `requests` names."""
        if name == "perplexity":
            assert self.texts is not None
            row = evaluate_perplexity(
                model,
                tokenizer,
                self.texts,
                seq_len=self.window(model),
                stride=self.stride,
                prepend_bos=self.prepend_bos,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
            )
        else:
            row = evaluate_kobest(
                model,
                tokenizer,
                tasks=[name],
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                batch_size=self.batch_size,
                data_dir=self.data_dir,
                prepend_bos=self.prepend_bos,
            )[name]
        return Measurement.from_row(name, row)

    def window(self, model: PreTrainedModel) -> int:
        """Window positions for a model."""
        return self.seq_len or min(_MOST_POSITIONS, context_length(model) or _MOST_POSITIONS)


def _check_stride(stride: int | None, seq_len: int | None) -> None:
    if stride is not None and seq_len is not None and stride > seq_len - 1:
        raise ValueError(f"stride={stride} is out of range, it must be from 1 to seq_len - 1 = {seq_len - 1}")


def check_protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol | None
) -> EvaluationProtocol:
    """The protocol, the default one for None. Finds before any work what would fail later.

    Raises:
        TypeError, ValueError, ImportError: model, tokenizer and protocol do not fit, or lm-eval is not installed.
    """
    protocol = protocol or EvaluationProtocol()
    if not isinstance(protocol, EvaluationProtocol):
        raise TypeError(f"protocol must be an EvaluationProtocol, found {type(protocol).__name__}")
    check_causal_lm(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    prepends_bos(tokenizer, protocol.prepend_bos)
    if protocol.texts is not None:
        check_context(model, protocol.window(model))
        _check_stride(protocol.stride, protocol.window(model))
    if protocol.tasks:
        import_lm_eval()
    return protocol
