"""Measuring a sparse model and the dense model it was made from by one protocol."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import describe_model, facts_of, sparse_modules
from ..checkpoint.digests import fingerprint
from ..records import describe_source
from .baseline import Baseline, recorded_baseline, set_aside
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
        TypeError, ValueError, ImportError, FileNotFoundError, ConnectionError: as `evaluate_perplexity`,
            `evaluate_kobest` and `evaluate_nsmc`.
    """
    protocol = check_protocol(model, tokenizer, protocol)
    dense = recorded_baseline(model) if baseline is True else baseline
    if isinstance(dense, str | os.PathLike):
        dense = Baseline(os.fspath(dense))
    found = fingerprint(model)
    facts = facts_of(model)
    results = facts.results
    if not isinstance(results, EvaluationResults) or results.fingerprint != found:
        results = EvaluationResults(found)
    facts.results = results
    settle_records(model, now=found)
    part = "sparse" if sparse_modules(model) else "dense"
    if part == "dense":
        if dense:
            raise ValueError("the model is dense: it is its own baseline")
        if tuning_of(model) is None or results.dense_model is None:
            results.dense_model = describe_model(model)
            results.dense_revision = facts.commit
    _measure_missing(results, part, model, tokenizer, protocol, on_measured)
    if isinstance(dense, Baseline):
        size = None if facts.report is None else facts.report.num_parameters
        with set_aside(model) as device:
            evaluate_baseline(
                results,
                dense,
                tokenizer,
                protocol,
                like=model,
                dtype=model.dtype,
                device=device,
                num_parameters=size,
                on_measured=on_measured,
            )
    return results


def evaluate_baseline(
    results: EvaluationResults,
    baseline: Baseline,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol | None = None,
    *,
    like: PreTrainedModel | type[PreTrainedModel],
    dtype: torch.dtype,
    device: Any = "cpu",
    num_parameters: int | None = None,
    on_measured: Callable[[EvaluationResults], None] | None = None,
) -> None:
    """Loads the dense model, measures it by the same protocol into `results.dense`, and frees it.

    Args:
        like: model or class to load it as. dtype, device: of the sparse model; a string or dict is a device map.
        num_parameters: of the model that was pruned; one with fewer is refused. It may have more: blocks may have been
            dropped before.

    Raises:
        ValueError: the dense model is sparse itself, of another size, or was tuned.
    """
    protocol = protocol or EvaluationProtocol()
    model = baseline.load(like, dtype, device)
    try:
        if num_parameters is not None and model.num_parameters() < num_parameters:
            raise ValueError(
                f"the baseline {describe_source(baseline.source)} has {model.num_parameters():,} parameters, the "
                f"model that was pruned had {num_parameters:,}: it is another model"
            )
        name = describe_model(model)
        revision = facts_of(model).commit
        if (results.dense_model, results.dense_revision) != (name, revision):
            # Figures of another dense model; those after tuning are of a third one anyway.
            results.dense[:] = [row for row in results.dense if row.tuning is not None]
        results.dense_model, results.dense_revision = name, revision
        _measure_missing(results, "dense", model, tokenizer, protocol, on_measured)
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure_missing(
    results: EvaluationResults,
    part: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    on_measured: Callable[[EvaluationResults], None] | None,
) -> None:
    known: list[Measurement] = getattr(results, part)
    for name, request in protocol.requests(model, tokenizer).items():
        if any(row.name == name and row.follows(request) for row in known):
            continue
        results.add(part, protocol.measure(name, model, tokenizer))
        if on_measured is not None:
            on_measured(results)
