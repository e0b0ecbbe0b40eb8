"""What a card or a push is about: a sparse model, or an adapter on one. Read once, and passed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..adapters import MergeReport
from ..checkpoint import ModelFacts, describe_model, facts_of, fingerprint, made_with, sparse_modules, without_peft
from ..config import SparsityConfig
from ..evaluation import EvaluationResults, adapted_fingerprint, settle_records
from ..records import RESULTS_NAME, names_repository
from ..report import SparsityReport


@dataclass(frozen=True)
class Subject:
    """A model that may be published: of PEFT or of transformers, and the transformers model in it (`plain`); what is
    known of it; what it was pruned with; and whether an adapter is published, and not the model that it is on."""

    model: Any
    plain: PreTrainedModel
    facts: ModelFacts
    settings: SparsityConfig
    is_adapter: bool

    @classmethod
    def read(cls, model: Any) -> Subject:
        """Raises TypeError where the model is neither sparse nor an adapter on a sparse one."""
        plain = without_peft(model)
        settings = made_with(plain) if isinstance(plain, PreTrainedModel) else None
        if settings is None:
            raise TypeError(f"{type(model).__name__} is no sparse model: prune it, or load a sparse checkpoint")
        return cls(model, plain, facts_of(plain), settings, is_adapter(model))

    def base(self) -> dict[str, str | None]:
        """What the model, or the adapter, was made from, as `CardSubject` has it."""
        report = self.facts.report
        if self.is_adapter:
            name, revision = describe_model(self.plain), self.facts.commit
        else:
            name, revision = (report.base_model, report.base_revision) if report is not None else (None, None)
        on_hub = names_repository(name, revision)
        return {
            "base_model": name if on_hub else None,
            "base_name": name,
            "base_revision": revision if on_hub else None,
        }

    def results(self) -> EvaluationResults | None:
        """What was measured of the model, or of an adapter on its base; None where nothing was. All weights are read,
        and the report says from then on whether they are those that pruning left. Raises ValueError where the results
        are of other weights than the model has now."""
        results: EvaluationResults | None = self.facts.results
        report = self.facts.report
        if self.is_adapter:  # the base's own, from before the adapter, are of other weights
            theirs = results is not None and adapted_fingerprint(self.plain, fingerprint(self.plain))
            return results if results is not None and results.fingerprint == theirs else None
        is_known = results is not None or (report is not None and (report.fingerprint or report.changes))
        now = fingerprint(self.plain) if is_known else None
        if results is not None and results.fingerprint != now:
            raise ValueError(
                f"{RESULTS_NAME} (model.ksparse.results) was measured on other weights, or in another dtype: measure "
                "again with evaluate=True or `optimum-cli ksparse eval`, or delete the results"
            )
        settle_records(self.plain, now=now)
        return results


@dataclass
class CardSubject:
    """What a card is about: its title `name`, `report` and `results`, `storage` ("packed" or "dense"), the weights'
    dtype and the bytes of all their files, and:

    `repo_id`, where it is published, None while it is not; `dense_revision`, the branch of its dense variant.
    `base_model`, the Hub id of what was pruned, or of an adapter's sparse base, None for a local folder, whose name is
    then `base_name`; `base_revision`, its commit; what is `inherited` of its card: license, language, pipeline tag.
    `figures`, file → whether it was drawn. `adapter`, None for a model of its own, otherwise its `kind` ("LORA"),
    `settings` by name and `num_parameters`. `auto_class`, which class of transformers loads it. `merge`, of the
    adapters that became part of the weights, where nothing has changed them since. `tuning`, `title` and settings by
    name. `local_source`, the folder that it was loaded from, which the card does not name. Further `tags`."""

    name: str
    report: SparsityReport | None
    results: EvaluationResults | None
    storage: str
    dtype: str
    file_bytes: int
    repo_id: str | None = None
    base_model: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    dense_revision: str | None = None
    figures: dict[str, bool] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    auto_class: str = "AutoModelForCausalLM"
    merge: MergeReport | None = None
    tuning: dict[str, Any] | None = None
    local_source: str | None = None
    inherited: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)


def is_adapter(model: Any) -> bool:
    """A PEFT model, or a transformers model to which an adapter was added."""
    return hasattr(model, "peft_config") and (
        not isinstance(model, PreTrainedModel) or bool(getattr(model, "_hf_peft_config_loaded", False))
    )


def is_ours(model: Any) -> bool:
    """Whether it is a sparse model, or an adapter on one."""
    plain = without_peft(model)
    return isinstance(plain, PreTrainedModel) and bool(sparse_modules(plain))
