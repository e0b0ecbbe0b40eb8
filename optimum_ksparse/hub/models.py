"""What of a model a card is about: whether it is one of ours, what it wraps, and what was measured of it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import facts_of, fingerprint, made_with, sparse_modules, without_peft
from ..evaluation import EvaluationResults, settle_records
from ..records import RESULTS_NAME


def is_adapter(model: Any) -> bool:
    """A PEFT model, or a transformers model to which an adapter was added."""
    return hasattr(model, "peft_config") and (
        not isinstance(model, PreTrainedModel) or bool(getattr(model, "_hf_peft_config_loaded", False))
    )


def is_ours(model: Any) -> bool:
    """Whether it is a sparse model, or an adapter on one."""
    plain = without_peft(model)
    if not isinstance(plain, PreTrainedModel):
        return False
    return bool(sparse_modules(plain))


def sparse_part(model: Any) -> PreTrainedModel:
    """The transformers model of a sparse model, or of a PEFT model on one.

    Raises:
        TypeError: it is none of them.
    """
    plain = without_peft(model)
    if not isinstance(plain, PreTrainedModel) or made_with(plain) is None:
        raise TypeError(f"{type(model).__name__} is no sparse model: prune it, or load a sparse checkpoint")
    return plain


def current_results(model: Any) -> EvaluationResults | None:
    """The results of a model, or of an adapter on its base; None where it has none. All weights are read, and the
    report says from then on whether they are those that pruning left.

    Raises:
        ValueError: the results are of other weights than the model has now.
    """
    plain = sparse_part(model)
    results, report = facts_of(plain).results, facts_of(plain).report
    if is_adapter(model):
        # The base's own, from before the adapter, are of other weights.
        return results if results is not None and results.fingerprint == fingerprint(plain) else None
    if results is None and (report is None or not (report.fingerprint or report.changes)):
        settle_records(plain)
        return None
    now = fingerprint(plain)
    if results is not None and results.fingerprint != now:
        raise ValueError(
            f"{RESULTS_NAME} (model.ksparse.results) was measured on other weights, or in another dtype: measure "
            "again with evaluate=True or `optimum-cli ksparse eval`, or delete the results"
        )
    settle_records(plain, now=now)
    return results
