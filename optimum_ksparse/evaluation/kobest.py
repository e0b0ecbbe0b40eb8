"""KoBEST (Kim et al. 2022, https://arxiv.org/abs/2204.04541) through lm-evaluation-harness."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..blocks import evaluation_mode
from ..checks import check_integer
from ..data import prepends_bos, reached_or_cached
from ..version import install_hint
from .environment import check_causal_lm, check_prepend_bos, environment
from .kobest_data import FIELDS, KOBEST_DATASET, KOBEST_TASKS, STUDY_TASKS, describe_data, read_items

logger = transformers_logging.get_logger(__name__)

# What lm-evaluation-harness seeds the drawing of few-shot examples with, unless told otherwise.
_FEWSHOT_SEED = 1234
# split → what the harness calls it in a task
_SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


def evaluate_kobest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = KOBEST_TASKS,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    data_dir: str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> dict[str, Any]:
    """Accuracy and macro F1 of a causal LM on KoBEST, by the tasks of lm-evaluation-harness (extra `eval`).

    Args:
        model: causal LM, dense or sparse, where it is.
        tokenizer: the model's; it is not changed.
        tasks: any of `"copa"`, `"hellaswag"`, `"boolq"`, `"sentineg"`, `"wic"`.
        num_fewshot: solved examples before each item, drawn from the training split.
        limit: items of each task, from the first on; None takes all. Figures with a limit are for trying out.
        batch_size: items in one forward pass.
        data_dir: a folder of `<task>/<train | validation | test>.jsonl` with the fields of `skt/kobest_v1`, which
            needs no network. The test split is measured, where there is none the validation split.
        prepend_bos: begin each item with the beginning token; None does so where the tokenizer does.

    Returns:
        For each task a dict of `acc`, `acc_stderr` (standard error of the accuracy), `f1` (macro), for HellaSwag
        `acc_norm` (choices by likelihood per character) as well, `num_samples`, and how they were measured:
        `task_version`, `num_fewshot`, `limit`, `data`, `split`, `items_sha256` (of the prompts), `prepend_bos`,
        `dtype`, `batch_size`, `device`, `versions`. Beside the tasks `mean_f1` over COPA, HellaSwag, BoolQ and
        SentiNeg, None where not all four were measured.

    Raises:
        ImportError: lm-eval is not installed.
        TypeError, ValueError: an argument is out of range, or a line of the data is not as it must be.
        FileNotFoundError: a file of `data_dir` is missing.
        ConnectionError: the data cannot be read from the Hub.
    """
    tasks = check_tasks(tasks)
    check_integer("num_fewshot", num_fewshot, 0)
    check_integer("batch_size", batch_size, 1)
    if limit is not None:
        check_integer("limit", limit, 1)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    check_causal_lm(model)
    begins = prepends_bos(tokenizer, check_prepend_bos(prepend_bos))
    import_lm_eval()
    items = {task: None if data_dir is None else read_items(task, data_dir, num_fewshot) for task in tasks}
    splits = {task: "test" if found is None or "test" in found else "validation" for task, found in items.items()}
    measured = environment(model, "lm-eval")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _undisturbed(), evaluation_mode(model):
        built = {task: _build_task(task, items[task], num_fewshot, Path(folder)) for task in tasks}
        for task in tasks:
            results[task] = {
                **_run(built[task], model, tokenizer, limit, batch_size, prepend_bos),
                "task": f"kobest_{task}",
                "num_fewshot": num_fewshot,
                "limit": limit,
                "data": describe_data(task, data_dir, num_fewshot),
                "split": splits[task],
                "prepend_bos": begins,
                "batch_size": batch_size,
                **measured,
            }
    results["mean_f1"] = mean_f1(results)
    return results


def mean_f1(results: dict[str, Any]) -> float | None:
    """Mean macro F1 over the study's four tasks; None where not all were measured."""
    if any(task not in results for task in STUDY_TASKS):
        return None
    return math.fsum(results[task]["f1"] for task in STUDY_TASKS) / len(STUDY_TASKS)


def check_tasks(tasks: Sequence[str], allowed: Sequence[str] = KOBEST_TASKS) -> tuple[str, ...]:
    """The tasks as a tuple. Raises ValueError for one that is not allowed, naming the nearest."""
    names = ", ".join(allowed)
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"tasks must be a list of names out of {names}; found {tasks!r}")
    if not tasks:
        raise ValueError(f"tasks is empty; allowed: {names}")
    for task in tasks:
        if task not in allowed:
            near = difflib.get_close_matches(task.removeprefix("kobest_"), allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"tasks: {task!r} is not a task of KoBEST; {hint}allowed: {names}")
    return tuple(dict.fromkeys(tasks))


def _build_task(task: str, items: dict[str, list[dict[str, Any]]] | None, num_fewshot: int, folder: Path) -> Any:
    """The harness's own task, on the data that were asked for."""
    import lm_eval.tasks

    name = f"kobest_{task}"
    packaged = Path(lm_eval.tasks.__file__).parent / "kobest" / f"{name}.yaml"
    settings: dict[str, Any] = {"include": str(packaged), "task": name, "num_fewshot": num_fewshot}
    if items is not None:
        # Not the files themselves: the reader of JSON lines takes texts for dates, and stumbles over blank lines.
        files = {split: _write_parquet(task, rows, folder / f"{task}-{split}") for split, rows in items.items()}
        settings |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            **{setting: split if split in files else None for split, setting in _SPLITS.items()},
        }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    try:
        with reached_or_cached(KOBEST_DATASET) if items is None else nullcontext():
            if hasattr(manager, "load"):
                built = manager.load([name])["tasks"][name]
            else:  # older releases, such as 0.4.10
                built = lm_eval.tasks.get_task_dict([name], manager)[name]
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds here
        if items is not None:
            raise
        raise ConnectionError(
            f"KoBEST ({KOBEST_DATASET}, {task}) cannot be read from the Hub: {type(error).__name__}: {error}; without "
            "a network pass data_dir, a folder of <task>/<split>.jsonl, or no tasks of KoBEST"
        ) from error
    built.set_fewshot_seed(_FEWSHOT_SEED)
    return built


def _write_parquet(task: str, rows: list[dict[str, Any]], path: Path) -> str:
    from datasets import Dataset, Features, Value

    fields, _ = FIELDS[task]
    features = Features({**{field: Value("string") for field in fields}, "label": Value("int64")})
    Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def _run(
    task: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    batch_size: int,
    prepend_bos: bool | None,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    name = task.config.task
    # A copy, because the harness gives a tokenizer without a padding token one.
    lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, add_bos_token=prepend_bos)
    if prepend_bos and not prepends_bos(tokenizer, None):
        # The harness can ask a tokenizer for its special tokens only, and this one adds none by itself.
        lm.tok_encode = functools.partial(_encode_with_bos, lm.tok_encode, tokenizer.bos_token_id)
    try:
        found = lm_eval.evaluate(lm, {name: task}, limit=limit, bootstrap_iters=0)
    except AssertionError as error:  # the harness asserts that the longest answer fits
        raise ValueError(
            f"the model's context of {lm.max_length} tokens is too short for an answer of {name}"
        ) from error
    metrics, num_samples = found["results"][name], found["n-samples"][name]["effective"]
    items = hashlib.sha256()
    for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
        items.update(sample["doc_hash"].encode() + sample["prompt_hash"].encode() + sample["target_hash"].encode())
    acc = float(metrics["acc,none"])
    row = {
        "acc": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / (num_samples - 1)) if num_samples > 1 else None,
        "f1": float(metrics["f1,none"]),
    }
    if "acc_norm,none" in metrics:
        row["acc_norm"] = float(metrics["acc_norm,none"])
    return {
        **row,
        "num_samples": num_samples,
        "task_version": found["versions"][name],
        "items_sha256": items.hexdigest(),
    }


def _encode_with_bos(
    encode: Callable[..., list[int]], bos: int, text: str, add_special_tokens: bool | None = None, **kwargs: Any
) -> list[int]:
    ids = encode(text, add_special_tokens=False, **kwargs)
    return ids if add_special_tokens is False else [bos, *ids]


def import_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"KoBEST needs lm-eval: {install_hint('eval')} ({error})") from error


class _CutPrompts(logging.Filter):
    """Counts the prompts that the harness cuts on the left because they are longer than the model's context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "Truncating" in record.getMessage()
        return False


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness warns of a model that is passed live, and of the metric hub being out of reach though its tasks
    bring their own F1; its progress bars stay, and prompts that it cut are told of once. It draws the names of its
    tasks from Python's random numbers."""
    everything, models = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    levels, state, cut = (everything.level, models.level), random.getstate(), _CutPrompts()
    everything.setLevel(logging.CRITICAL)
    models.setLevel(logging.WARNING)
    models.addFilter(cut)
    try:
        yield
    finally:
        everything.setLevel(levels[0])
        models.setLevel(levels[1])
        models.removeFilter(cut)
        random.setstate(state)
    if cut.count:
        logger.warning(f"{cut.count} prompts of KoBEST are longer than the model's context and were cut on the left.")
