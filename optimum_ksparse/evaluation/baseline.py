"""The dense model that stands beside a sparse one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..checkpoint import facts_of, sparse_modules
from ..data import hub_arguments
from ..records import describe_source, recorded_repository
from ..report import BASE_ARGUMENTS
from .tuning import read_tuning

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Baseline:
    """The dense model to measure beside a sparse one: `source` is its Hub id or folder, `revision` its commit (None
    for a folder, or for the newest), `arguments` what else `from_pretrained` needs (`gguf_file`, `subfolder`, …). It
    is loaded `like` the sparse model, in its dtype, and has at least the parameters of what was pruned."""

    source: str
    revision: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    like: Any = field(default=AutoModelForCausalLM, compare=False)
    dtype: torch.dtype | str = field(default="auto", compare=False)
    num_parameters: int | None = field(default=None, compare=False)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that find it."""
        return {**self.arguments, **({} if self.revision is None else {"revision": self.revision})}

    def load(self, device: Any) -> PreTrainedModel:
        """Loads it on a device, or by a device map. Raises ValueError where it cannot be a baseline."""
        if read_tuning(self.source, self.revision, self.arguments.get("token")) is not None:
            raise ValueError(
                f"{describe_source(self.source)} was tuned, and is not what the sparse model was made from: measure "
                "it by itself, and take its results with --baseline-results (EvaluationResults.take_baseline)"
            )
        arguments = self.loading
        if arguments.get("gguf_file") is not None:
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        placed = isinstance(device, str | dict)
        if placed:
            arguments["device_map"] = device
        model: Any = self.like.from_pretrained(self.source, dtype=self.dtype, **arguments)
        if sparse_modules(model):
            raise ValueError(f"{describe_source(self.source)} is sparse itself, and no dense baseline")
        if model.num_parameters() < (self.num_parameters or 0):  # more where blocks were dropped before
            raise ValueError(
                f"the baseline {describe_source(self.source)} has {model.num_parameters():,} parameters, the "
                f"model that was pruned had {self.num_parameters:,}: it is another model"
            )
        return model if placed else model.to(device)


def recorded_baseline(model: PreTrainedModel) -> Baseline:
    """The dense model that a sparse one was made from: the recorded Hub id and commit, or the folder that it was
    pruned from where it is still at hand. Raises ValueError where it is not recorded, or was a folder that is not
    here."""
    report = facts_of(model).report
    if report is None or not report.base_model:
        raise ValueError("no sparsity_report names the model's dense base: pass baseline=<Hub id or folder>")
    arguments = {name: report.base_arguments[name] for name in BASE_ARGUMENTS if name in report.base_arguments}
    repository = recorded_repository(report.base_model, report.base_revision)
    if repository is not None:
        commit = "" if report.base_revision is None else f" at commit {report.base_revision}"
        logger.warning(f"The dense baseline is {repository}{commit} on the Hub, which the model's report names.")
        return Baseline(repository, report.base_revision, arguments)
    source = model.name_or_path or ""
    if os.path.isdir(source) and describe_source(source) == report.base_model:
        return Baseline(source, None, arguments)
    raise ValueError(
        f"the model was pruned from {report.base_model!r}, a local folder or a model without a recorded commit, or "
        "there is a folder of that name here: "
        "pass baseline=<Hub id or folder> to say where the dense model is"
    )


def choose_baseline(
    model: PreTrainedModel, given: Baseline | str | os.PathLike[str] | bool | None, token: bool | str | None = None
) -> Baseline:
    """The dense model that is named; for True and None the recorded one. Raises ValueError where that is not known, or
    cannot be read."""
    size = getattr(facts_of(model).report, "num_parameters", None)
    how: dict[str, Any] = {"like": type(model), "dtype": model.dtype, "num_parameters": size}
    if isinstance(given, Baseline):
        return replace(given, **how)
    base = Baseline(os.fspath(given)) if isinstance(given, str | os.PathLike) else recorded_baseline(model)
    if token is not None:
        base = replace(base, arguments={**base.arguments, "token": token})
    try:
        cached_file(base.source, base.arguments.get("gguf_file") or CONFIG_NAME, **hub_arguments(base.loading))
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        raise ValueError(
            f"the dense baseline {describe_source(base.source)!r} cannot be read ({type(error).__name__}): pass "
            "baseline=<Hub id or folder> to say where it is"
        ) from error
    return replace(base, **how)


@contextmanager
def set_aside(model: PreTrainedModel) -> Iterator[Any]:
    """Within it a model on one GPU waits in main memory, so that another has the GPU to itself. Yields where the
    other one belongs: a device, or a device map for a model that is spread or offloaded."""
    if getattr(model, "hf_device_map", None):
        yield "auto"
        return
    device = model.device
    moves = device.type != "cpu"
    if moves:
        model.to("cpu")  # type: ignore[arg-type]
        torch.cuda.empty_cache()
    try:
        yield device
    finally:
        if moves:
            model.to(device)  # type: ignore[arg-type]
