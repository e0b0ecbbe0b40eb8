"""The table of evaluation tasks: what each kind of measurement is, and how tables, cards and the Hub name it. Other
packages add theirs with `add_task`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..records import As, Between

if TYPE_CHECKING:
    from .protocol import EvaluationProtocol

Fields = dict[str, Any]  # name → annotation, as `records.build` takes it


class Named(TypedDict, total=False):
    """Data as they are described, so far as cards and the model index show it."""

    name: str
    dataset: str
    configuration: str
    slice: str
    file: str


DATA = Annotated[dict[str, Any], As(Named, is_open=True)]
PER_CENT = Annotated[float, Between(0.0, 100.0)]
LENGTH = Annotated[int, Between(2)]


@dataclass(frozen=True)
class HubEntry:
    """How the Hub's model index names a task, in the terms of `huggingface_hub.EvalResult`: each metric with the Hub's
    type of metric, and a name where that does not say it; `arguments` are parts of the protocol beside the figure."""

    task_type: str
    dataset: str
    dataset_name: str
    metrics: dict[str, tuple[str, str | None]]
    arguments: tuple[str, ...] = ("num_fewshot", "limit", "num_samples")
    dataset_config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of measurement: what its rows of results hold. One that can be measured by itself, and not only by the
    code that tunes for it, has a `word`, by which `EvaluationProtocol.tasks` calls it, perhaps with others, and
    implements the methods.

    Attributes:
        name: of its rows. title: in tables, after `suite`, whose tasks share a figure.
        metrics: its figures; `optional` names those that may be missing. protocol: how it was measured.
        shown: metrics in tables, in their order. stderr: metric → its standard error.
        usual_shots: number of solved examples that a table does not name.
    """

    name: str
    title: str
    metrics: Fields
    protocol: Fields
    shown: tuple[str, ...] = ()
    suite: str = ""
    optional: tuple[str, ...] = ()
    stderr: dict[str, str] = field(default_factory=dict)
    usual_shots: int = 0
    word: str | None = None
    hub: HubEntry | None = None

    @property
    def full_title(self) -> str:
        return f"{self.suite} {self.title}".strip()

    def is_per_cent(self, metric: str) -> bool:
        """Whether a figure is in per cent, and not a share from 0 to 1."""
        return self.metrics.get(metric) is PER_CENT

    def check(self, protocol: EvaluationProtocol) -> None:
        """Raises ValueError or FileNotFoundError for data that cannot be measured on."""

    def check_model(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> None:
        """Raises ValueError or ImportError for what would fail while measuring."""

    def request(self, model: PreTrainedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
        """The part of a row's protocol that is known before measuring."""
        raise NotImplementedError

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol
    ) -> dict[str, Any]:
        """Metrics, protocol and environment in one dict."""
        raise NotImplementedError


TASKS: dict[str, Task] = {}


def add_task(task: Task) -> Task:
    """Adds a task to the table, in the place of one of the same name."""
    TASKS[task.name] = task
    return task


def task_of(name: str) -> Task:
    """The task of a row. A name that is not in the table, of a package that is not imported here, has a task of which
    nothing is known, so that its rows are kept."""
    return TASKS.get(name) or Task(name=name, title=name, metrics={}, protocol={})


def chosen_tasks(words: Sequence[str]) -> list[Task]:
    """The tasks that these words call. Raises TypeError or ValueError, with the nearest, where one calls none."""
    allowed = list(dict.fromkeys(task.word for task in TASKS.values() if task.word is not None))
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"tasks must be a list of names out of {', '.join(allowed)}; found {words!r}")
    for word in words:
        if word not in allowed:
            near = difflib.get_close_matches(word.removeprefix("kobest_"), allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"tasks: {word!r} is not a task; {hint}allowed: {', '.join(allowed)}, and those of packages that are "
                "imported before"
            )
    return [task for word in dict.fromkeys(words) for task in TASKS.values() if task.word == word]
