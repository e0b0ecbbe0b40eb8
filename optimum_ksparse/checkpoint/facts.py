"""What is known of a loaded model that neither its config nor its weights say: the one attribute that this package
sets on models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ModelFacts:
    """Where a model came from, what was done to it, and what was measured of it; `model.ksparse`.

    Attributes:
        commit: of the repository on the Hub that it was loaded from; None for a folder, or where it is not known.
        folder: absolute path of the folder that it was loaded from; None for the Hub.
        tokenizer: that it was calibrated with in this process: the object or its path.
        report: `SparsityReport`. merge: `MergeReport`. results: `EvaluationResults`. tuning: what `finetuning.json`
            says. None where there is none.
        mark: how the weights were when `report` and `results` were last known to be theirs (see `evaluation.ties`).
        run: the run of `Trainer` that it is, or was, in.
        is_dequantized: it was sparse, and is dense now.
    """

    commit: str | None = None
    folder: str | None = None
    tokenizer: Any = None
    report: Any = None
    merge: Any = None
    results: Any = None
    tuning: dict[str, Any] | None = None
    mark: Any = None
    run: Any = None
    is_dequantized: bool = False

    def forget(self) -> None:
        """Drops what is known of the weights, which are others now."""
        self.report = self.merge = self.results = self.mark = self.run = None


def facts_of(model: Any) -> ModelFacts:
    """The facts of a model, or of the one that a PEFT model wraps; empty ones, which it keeps, where it has none."""
    plain = without_peft(model)
    facts: ModelFacts = vars(plain).setdefault("ksparse", ModelFacts())
    return facts


def without_peft(model: Any) -> Any:
    """The model that a PEFT model wraps; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def sparsity_report(model: Any) -> Any:
    """`model.sparsity_report` of every `PreTrainedModel`. Raises AttributeError where there is none."""
    report = getattr(vars(model).get("ksparse"), "report", None)
    if report is None:
        raise AttributeError(f"{type(model).__name__!r} object has no attribute 'sparsity_report'")
    return report
