"""What to measure, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_integer
from ..data import prepends_bos
from .kobest import KOBEST_TASKS
from .perplexity import PERPLEXITY
from .results import Measurement
from .running import check_causal_lm
from .tasks import Task, chosen_tasks, task_of
from .tuning import tuning_of


@dataclass(frozen=True)
class EvaluationProtocol:
    """What to measure, and how: the same for a sparse model and for its dense baseline.

    Args:
        texts: for perplexity: `"kowiki"`, a `.txt` or `.jsonl` file, a list of texts, or None for no perplexity.
        seq_len: window positions; None takes the model's context, at most 2048.
        stride, max_tokens: as in `evaluate_perplexity`.
        tasks: words of the table of tasks: those of KoBEST, and what other packages have added; none where empty.
        num_fewshot, limit: as in `evaluate_kobest`; some tasks have a number of solved examples of their own.
        data_dir: folder of `<task>/<split>.jsonl`; None reads the Hub.
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
        if not isinstance(self.prepend_bos, bool | None):
            raise TypeError(f"prepend_bos must be True, False or None, found {self.prepend_bos!r}")
        if self.texts is None and not self.tasks:
            raise ValueError("no texts and no tasks: there is nothing to measure")
        for task in self.chosen:
            task.check(self)
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EvaluationProtocol:
        """The protocol of a recipe or of flags, where "none" stands for no texts, and for no tasks."""
        chosen = dict(settings)
        if chosen.get("texts") == "none":
            chosen["texts"] = None
        if chosen.get("tasks") in ("none", ["none"], []):
            chosen["tasks"] = ()
        return cls(**chosen)

    @property
    def chosen(self) -> list[Task]:
        """The tasks of the table that this asks for."""
        return ([] if self.texts is None else [PERPLEXITY]) + chosen_tasks(self.tasks)

    def requests(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """For each measurement that this asks for, the part of its protocol that is known beforehand."""
        common = {
            "prepend_bos": prepends_bos(tokenizer, self.prepend_bos),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tuning": tuning_of(model),
        }

        def known(task: Task) -> dict[str, Any]:
            return {name: value for name, value in common.items() if name in (*task.protocol, "tuning")}

        return {task.name: {**task.request(model, self), **known(task)} for task in self.chosen}

    def measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measurement:
        """Takes one of the measurements that `requests` names."""
        row, tuning = task_of(name).measure(model, tokenizer, self), tuning_of(model)
        return Measurement.from_row(name, row if tuning is None else {**row, "tuning": tuning})


def check_protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol | None
) -> EvaluationProtocol:
    """The protocol, the default one for None. Finds before any work what would fail later: model, tokenizer and
    protocol do not fit, or lm-eval is not installed."""
    protocol = protocol or EvaluationProtocol()
    if not isinstance(protocol, EvaluationProtocol):
        raise TypeError(f"protocol must be an EvaluationProtocol, found {type(protocol).__name__}")
    check_causal_lm(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    prepends_bos(tokenizer, protocol.prepend_bos)
    for task in protocol.chosen:
        task.check_model(model, protocol)
    return protocol
