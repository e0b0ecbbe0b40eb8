"""What to measure, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_integer
from ..data import prepends_bos
from ..data.texts import describe_texts
from ..data.tokens import check_context, context_length
from .environment import check_causal_lm, check_prepend_bos
from .kobest import check_tasks, evaluate_kobest, import_lm_eval
from .kobest_data import KOBEST_TASKS, describe_data, read_items
from .nsmc import MAX_EXAMPLE_TOKENS, NUM_FEWSHOT, NUM_SAMPLES, PROMPTS, SEED, evaluate_nsmc
from .nsmc_data import describe_nsmc
from .perplexity import evaluate_perplexity
from .results import Measurement
from .tuning import tuning_of

NSMC_TASK = "nsmc"
_TASKS = (*KOBEST_TASKS, NSMC_TASK)
_MOST_POSITIONS = 2048


@dataclass(frozen=True)
class EvaluationProtocol:
    """What to measure, and how: the same for a sparse model and for its dense baseline.

    Args:
        texts: for perplexity: `"kowiki"`, a `.txt` or `.jsonl` file, a list of texts, or None for no perplexity.
        seq_len: window positions; None takes the model's context, at most 2048.
        stride, max_tokens: as in `evaluate_perplexity`.
        tasks: of KoBEST, and `"nsmc"`, which is not in the default; none where empty.
        num_fewshot: of KoBEST's tasks; NSMC has the study's 10.
        limit: as in `evaluate_kobest`; items of NSMC, 500 where None.
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
        check_prepend_bos(self.prepend_bos)
        _check_stride(self.stride, self.seq_len)
        if self.texts is not None:
            describe_texts(self.texts)
        object.__setattr__(self, "tasks", () if self.tasks in ([], ()) else check_tasks(self.tasks, _TASKS))
        if self.texts is None and not self.tasks:
            raise ValueError("no texts and no tasks: there is nothing to measure")
        for task in self.tasks if self.data_dir is not None else ():
            shots = NUM_FEWSHOT if task == NSMC_TASK else self.num_fewshot
            read_items(task, self.data_dir, shots)  # type: ignore[arg-type]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EvaluationProtocol:
        """The protocol of a recipe or of flags, where "none" stands for no texts, and for no tasks."""
        chosen = dict(settings)
        if chosen.get("texts") == "none":
            chosen["texts"] = None
        if chosen.get("tasks") in ("none", ["none"], []):
            chosen["tasks"] = ()
        return cls(**chosen)

    def requests(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """For each measurement that this asks for, the part of its protocol that is known beforehand."""
        common = {
            "prepend_bos": prepends_bos(tokenizer, self.prepend_bos),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tuning": tuning_of(model),
        }
        asked: dict[str, dict[str, Any]] = {}
        if self.texts is not None:
            windows = {"seq_len": self.window(model), "stride": self.stride, "max_tokens": self.max_tokens}
            asked["perplexity"] = {"texts": describe_texts(self.texts), **windows, **common}
        for task in self.kobest_tasks:
            data = describe_data(task, self.data_dir, self.num_fewshot)
            asked[task] = {"num_fewshot": self.num_fewshot, "limit": self.limit, "data": data, **common}
        if NSMC_TASK in self.tasks:
            drawn = {"num_fewshot": NUM_FEWSHOT, "max_example_tokens": MAX_EXAMPLE_TOKENS, "seed": SEED}
            how = {
                "data": describe_nsmc(self.data_dir, NUM_FEWSHOT),
                "num_samples": self.limit or NUM_SAMPLES,
                **drawn,
            }
            asked |= {f"nsmc_{name}": {"prompt": prompt, **how, **common} for name, prompt in PROMPTS.items()}
        return asked

    def measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measurement:
        """Takes one of the measurements that `requests` names."""
        common = {"batch_size": self.batch_size, "prepend_bos": self.prepend_bos}
        if name == "perplexity":
            assert self.texts is not None
            windows = {"seq_len": self.window(model), "stride": self.stride, "max_tokens": self.max_tokens}
            row = evaluate_perplexity(model, tokenizer, self.texts, **windows, **common)  # type: ignore[arg-type]
        elif name in KOBEST_TASKS:
            settings = {"num_fewshot": self.num_fewshot, "limit": self.limit, "data_dir": self.data_dir, **common}
            row = evaluate_kobest(model, tokenizer, tasks=[name], **settings)[name]  # type: ignore[arg-type]
        else:
            prompt = name.removeprefix("nsmc_")
            settings = {"num_samples": self.limit or NUM_SAMPLES, "data_dir": self.data_dir, **common}
            row = evaluate_nsmc(model, tokenizer, prompts=[prompt], **settings)[prompt]  # type: ignore[arg-type]
        tuning = tuning_of(model)
        return Measurement.from_row(name, row if tuning is None else {**row, "tuning": tuning})

    @property
    def kobest_tasks(self) -> tuple[str, ...]:
        """The tasks that are KoBEST's."""
        return tuple(task for task in self.tasks if task in KOBEST_TASKS)

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
    if protocol.kobest_tasks:
        import_lm_eval()
    return protocol
