"""Measuring a sparse model and the dense model it was made from by one protocol."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import describe_model, facts_of, sparse_modules
from ..checkpoint.digests import fingerprint
from .baseline import Baseline, choose_baseline, set_aside
from .kobest import KOBEST_TASKS, mean_f1
from .protocol import EvaluationProtocol, check_protocol
from .results import EvaluationResults, Measurement
from .ties import settle_records
from .tuning import tuning_of


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol | None = None,
    *,
    baseline: Baseline | str | os.PathLike[str] | bool = False,
    on_measured: Callable[[EvaluationResults], None] | None = None,
) -> EvaluationResults:
    """Measures a sparse model, and after it the dense model it was made from; the results are also
    `model.ksparse.results`, which `save_pretrained` and `push_to_hub` write. What has been measured of the same
    weights by the same protocol is not measured again. A dense model is measured as well, into the dense column. Where
    `model.ksparse.tuning` is a dict, its rows are those after tuning.

    Args:
        model: causal LM.
        tokenizer: the model's.
        protocol: what to measure, and how; None takes the default of `EvaluationProtocol`.
        baseline: True measures the recorded dense model as well, a Hub id or folder that one. It is loaded in the same
            dtype, and has the GPU to itself.
        on_measured: called after each measurement, so that a long run can keep what it has.

    Raises:
        TypeError, ValueError, ImportError, FileNotFoundError, ConnectionError: as `evaluate_perplexity` and
            `evaluate_kobest`.
    """
    protocol = check_protocol(model, tokenizer, protocol)
    part = "sparse" if sparse_modules(model) else "dense"
    if baseline and part == "dense":
        raise ValueError("the model is dense: it is its own baseline")
    dense = choose_baseline(model, baseline) if baseline else None
    facts, now = facts_of(model), fingerprint(model)
    if facts.results is None or facts.results.fingerprint != now:
        facts.results = EvaluationResults(now)
    results: EvaluationResults = facts.results
    settle_records(model, now=now)
    if part == "dense" and (tuning_of(model) is None or results.dense_model is None):
        results.dense_model, results.dense_revision = describe_model(model), facts.commit
    _measure_missing(results, part, model, tokenizer, protocol, on_measured)
    if dense is not None:
        with set_aside(model) as device:
            evaluate_baseline(results, dense, tokenizer, protocol, device=device, on_measured=on_measured)
    return results


def evaluate_baseline(
    results: EvaluationResults,
    baseline: Baseline,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol | None = None,
    *,
    device: Any = "cpu",
    on_measured: Callable[[EvaluationResults], None] | None = None,
) -> None:
    """Loads the dense model on a device (a string or dict is a device map), measures it by the same protocol into
    `results.dense`, and frees it. Raises ValueError where it cannot be the baseline."""
    protocol = protocol or EvaluationProtocol()
    model = baseline.load(device)
    try:
        earlier = results.dense_model, results.dense_revision
        results.dense_model, results.dense_revision = describe_model(model), facts_of(model).commit
        if earlier != (results.dense_model, results.dense_revision):
            # Figures of another dense model; those after tuning are of a third one anyway.
            results.dense[:] = [row for row in results.dense if row.tuning is not None]
        _measure_missing(results, "dense", model, tokenizer, protocol, on_measured)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


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
        `dtype`, `product_dtype`, `batch_size`, `device`, `versions`. Beside the tasks `mean_f1` over COPA, HellaSwag,
        BoolQ and SentiNeg, None where not all four were measured.

    Raises:
        ImportError: lm-eval is not installed.
        TypeError, ValueError: an argument is out of range, or a line of the data is not as it must be.
        FileNotFoundError: a file of `data_dir` is missing.
        ConnectionError: the data cannot be read from the Hub.
    """
    protocol = EvaluationProtocol(
        None,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        data_dir=data_dir,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
    )
    check_protocol(model, tokenizer, protocol)
    results: dict[str, Any] = {task.name: task.measure(model, tokenizer, protocol) for task in protocol.chosen}
    results["mean_f1"] = mean_f1(results)
    return results


def _measure_missing(
    results: EvaluationResults,
    part: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    on_measured: Callable[[EvaluationResults], None] | None,
) -> None:
    rows: list[Measurement] = getattr(results, part)
    for name, request in protocol.requests(model, tokenizer).items():
        if any(row.name == name and row.follows(request) for row in rows):
            continue
        results.add(part, protocol.measure(name, model, tokenizer))
        if on_measured is not None:
            on_measured(results)
