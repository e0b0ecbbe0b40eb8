"""Tasks of lm-evaluation-harness (extra `eval`) on a loaded model."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..blocks import evaluation_mode
from ..data import prepends_bos, reached_or_cached
from ..kernels import fast_products
from ..records import Count, Positive, Share
from ..version import install_hint
from .items import files_digest, read_items
from .running import environment
from .tasks import DATA, Fields, Task

if TYPE_CHECKING:
    from .protocol import EvaluationProtocol

logger = transformers_logging.get_logger(__name__)

# What lm-evaluation-harness seeds the drawing of few-shot examples with, unless told otherwise.
_FEWSHOT_SEED = 1234
# split → what the harness calls it in a task
_SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
_METRICS: Fields = {
    "acc": Share,
    "acc_stderr": Share | None,
    "f1": Share,
    "acc_norm": Share,  # choices by likelihood per character
    "exact_match": Share,  # the model's greedy continuation is the right choice
}
_PROTOCOL: Fields = {
    "task": str,
    "task_version": int | float | str,
    "num_fewshot": Count,
    "limit": Positive | None,
    "data": DATA,
    "split": str,
    "num_samples": Positive,
    "items_sha256": str,
    "prepend_bos": bool,
    "dtype": str,
}


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Task):
    """A multiple-choice task of lm-evaluation-harness, by its name there, with the metrics `acc` and `f1`; `folder`
    has its YAML file, None for the tasks that the harness brings. `dataset` is the Hub id of its data, `fields` their
    text fields, `allowed` texts that one may hold; the `label` is below `num_answers`. `fixed_shots` is a number of
    solved examples whatever a protocol says, `softmax_dtype` that of the log-softmax, None the model's, as usual
    there."""

    harness_name: str
    dataset: str
    fields: tuple[str, ...]
    num_answers: int
    folder: Path | None = None
    allowed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fixed_shots: int | None = None
    softmax_dtype: str | None = None
    metrics: Fields = field(default_factory=lambda: _METRICS)
    protocol: Fields = field(default_factory=lambda: _PROTOCOL)
    optional: tuple[str, ...] = ("acc_norm", "exact_match")
    shown: tuple[str, ...] = ("acc", "f1")
    stderr: dict[str, str] = field(default_factory=lambda: {"acc": "acc_stderr"})

    def shots(self, protocol: EvaluationProtocol) -> int:
        return protocol.num_fewshot if self.fixed_shots is None else self.fixed_shots

    def check(self, protocol: EvaluationProtocol) -> None:
        if protocol.data_dir is not None:
            read_items(self, protocol.data_dir, self.shots(protocol))

    def check_model(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> None:
        import_lm_eval()

    def request(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
        shots, data = self.shots(protocol), self.describe_data(protocol)
        return {"num_fewshot": shots, "limit": protocol.limit, "data": data}

    def describe_data(self, protocol: EvaluationProtocol) -> dict[str, str]:
        """The name of the data on the Hub, or the SHA-256 of the local files that are read."""
        if protocol.data_dir is None:
            return {"name": self.dataset}
        return {"files_sha256": files_digest(self, protocol.data_dir, self.shots(protocol))}

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol
    ) -> dict[str, Any]:
        shots, data_dir = self.shots(protocol), protocol.data_dir
        items = None if data_dir is None else read_items(self, data_dir, shots)
        with tempfile.TemporaryDirectory() as folder, _undisturbed(), evaluation_mode(model):
            built = _build(self, items, shots, tokenizer, Path(folder))
            row = _run(self, built, model, tokenizer, protocol)
        return {
            **row,
            "task": self.harness_name,
            **self.request(model, protocol),
            "split": "test" if items is None or "test" in items else "validation",
            "prepend_bos": prepends_bos(tokenizer, protocol.prepend_bos),
            "batch_size": protocol.batch_size,
            **environment(model, "lm-eval"),
        }


def _build(
    task: HarnessTask, items: dict[str, list[dict[str, Any]]] | None, num_fewshot: int, tokenizer: Any, folder: Path
) -> Any:
    """The harness's own task, on the data that were asked for."""
    import lm_eval.tasks
    from datasets import Dataset, Features, Value

    name = task.harness_name
    packaged = task.folder or Path(lm_eval.tasks.__file__).parent / name.split("_")[0]
    settings: dict[str, Any] = {"include": str(packaged / f"{name}.yaml"), "task": name, "num_fewshot": num_fewshot}
    if items is not None:
        # Not the files themselves: the reader of JSON lines takes texts for dates, and stumbles over blank lines.
        features = Features({**{field: Value("string") for field in task.fields}, "label": Value("int64")})
        for split, rows in items.items():
            Dataset.from_list(rows, features=features).to_parquet(folder / split)
        files = {split: str(folder / split) for split in items}
        settings |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            **{setting: split if split in files else None for split, setting in _SPLITS.items()},
        }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    # Tasks whose data depend on a tokenizer take it from here.
    metadata: dict[str, Any] = {"tokenizer": tokenizer}
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    try:
        with reached_or_cached(task.dataset) if items is None else nullcontext():
            if hasattr(manager, "load"):
                built = manager.load([name])["tasks"][name]
            else:  # older releases, such as 0.4.10
                built = lm_eval.tasks.get_task_dict([name], manager)[name]
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds here
        if items is not None:
            raise
        raise ConnectionError(
            f"{task.suite} ({task.dataset}, {task.word}) cannot be read from the Hub: {type(error).__name__}: "
            f"{error}; without a network pass data_dir, a folder of {task.word}/<split>.jsonl, or other tasks"
        ) from error
    built.set_fewshot_seed(_FEWSHOT_SEED)
    return built


def _run(
    task: HarnessTask,
    built: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    name, bos = task.harness_name, protocol.prepend_bos
    # A copy, because the harness gives a tokenizer without a padding token one.
    how = {"batch_size": protocol.batch_size, "add_bos_token": bos, "softmax_dtype": task.softmax_dtype}
    lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), **how)
    if bos and not prepends_bos(tokenizer, None):
        # The harness can ask a tokenizer for its special tokens only, and this one adds none by itself.
        lm.tok_encode = functools.partial(_encode_with_bos, lm.tok_encode, tokenizer.bos_token_id)
    try:
        with fast_products(model):
            outcome = lm_eval.evaluate(lm, {name: built}, limit=protocol.limit, bootstrap_iters=0)
    except AssertionError as error:  # the harness asserts that the longest answer fits
        raise ValueError(
            f"the model's context of {lm.max_length} tokens is too short for an answer of {name}"
        ) from error
    items = hashlib.sha256()
    for sample in sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"]):
        items.update(sample["doc_hash"].encode() + sample["prompt_hash"].encode() + sample["target_hash"].encode())
        if any(math.isnan(likelihood) for likelihood, _ in sample["filtered_resps"]):
            raise ValueError(
                f"{type(model).__name__} gives NaN for {name}; load it in float32 or bfloat16, or look at its weights"
            )
    figures, num_samples = outcome["results"][name], outcome["n-samples"][name]["effective"]
    metrics = [metric for metric in task.metrics if metric != "acc_stderr" and f"{metric},none" in figures]
    row = {metric: float(figures[f"{metric},none"]) for metric in metrics}
    return {
        **row,
        "acc_stderr": math.sqrt(row["acc"] * (1 - row["acc"]) / (num_samples - 1)) if num_samples > 1 else None,
        "num_samples": num_samples,
        "task_version": outcome["versions"][name],
        "items_sha256": items.hexdigest(),
    }


def _encode_with_bos(
    encode: Callable[..., list[int]], bos: int, text: str, add_special_tokens: bool | None = None, **kwargs: Any
) -> list[int]:
    ids = encode(text, add_special_tokens=False, **kwargs)
    return ids if add_special_tokens is False else [bos, *ids]


def import_lm_eval() -> None:
    """Raises ImportError, which says how to install it, where lm-eval is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval: {install_hint('eval')} ({error})") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness warns of a model that is passed live, and of the metric hub being out of reach though its tasks
    bring their own F1; its progress bars stay, and prompts that it cut on the left, because they are longer than the
    model's context, are told of once. It draws the names of its tasks from Python's random numbers."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface")]
    levels, state, cut = [each.level for each in loggers], random.getstate(), 0

    def count(record: logging.LogRecord) -> bool:
        nonlocal cut
        cut += "Truncating" in record.getMessage()
        return False

    for each, level in zip(loggers, (logging.CRITICAL, logging.WARNING), strict=True):
        each.setLevel(level)
    loggers[1].addFilter(count)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        loggers[1].removeFilter(count)
        random.setstate(state)
    if cut:
        logger.warning(f"{cut} prompts are longer than the model's context and were cut on the left.")
