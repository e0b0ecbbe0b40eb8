"""What is known of a loaded model that neither its config nor its weights say: the one attribute that this package
sets on models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers.utils import CONFIG_NAME, extract_commit_hash

from ..data import find_file


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
        adapted: how they were, an adapter's among them, when their fingerprint was last computed.
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
    adapted: Any = None
    run: Any = None
    is_dequantized: bool = False

    def forget(self) -> None:
        """Drops what is known of the weights, which are others now."""
        self.report = self.merge = self.results = self.mark = self.adapted = self.run = None


# Where a model was loaded from, folder or commit: nothing is set on a model before somebody asks.
_ORIGINS: WeakKeyDictionary[Any, tuple[str | None, str | None]] = WeakKeyDictionary()


def note_origin(model: Any, source: Any, subfolder: str = "", commit: str | None = None) -> None:
    """Lets `facts_of(model)` say where a model came from.

    Args:
        model: that was loaded. source: folder or Hub id; anything else is no place.
        commit: of the Hub's repository that `source` was read at. A later look at the cache might find another one.
    """
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        # From elsewhere a relative path reads like a name on the Hub.
        _ORIGINS[model] = (os.path.realpath(os.path.join(source, subfolder)), None)
    elif model.name_or_path == source:  # and not the base of an adapter that was named
        _ORIGINS[model] = (None, commit)


def facts_of(model: Any) -> ModelFacts:
    """The facts of a model, or of the one that a PEFT model wraps; where it has none, those that tell where it came
    from, which it keeps."""
    plain = without_peft(model)
    facts: ModelFacts | None = vars(plain).get("ksparse")
    if facts is None:
        folder, commit = _ORIGINS.get(plain, (None, None))
        facts = plain.ksparse = ModelFacts(folder=folder, commit=commit)
    return facts


def commit_of(source: Any, file_name: str = CONFIG_NAME, **loading: Any) -> str | None:
    """Commit of the repository on the Hub that a model is, or was, loaded from; None for a folder."""
    try:
        path = find_file(source, file_name, **loading)
    except OSError:
        return None
    # A file of a Hub snapshot lies in a folder named after its commit.
    commit: str | None = extract_commit_hash(path, None)
    return commit


def without_peft(model: Any) -> Any:
    """The model that a PEFT model wraps; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def sparsity_report(model: Any) -> Any:
    """`model.sparsity_report` of every `PreTrainedModel`. Raises AttributeError where there is none."""
    report = getattr(vars(model).get("ksparse"), "report", None)
    if report is None:
        raise AttributeError(f"{type(model).__name__!r} object has no attribute 'sparsity_report'")
    return report
