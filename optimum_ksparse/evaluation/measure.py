"""Measuring a sparse model and the dense model it was made from by one protocol."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import prepends_bos
from ..calibration.tokens import check_context, context_length
from ..checkpoint import describe_model, sparse_modules
from ..config import check_integer, describe_source, names_repository
from ..report import SparsityReport
from .environment import check_causal_lm, check_prepend_bos
from .fingerprint import fingerprint
from .kobest import check_tasks, evaluate_kobest, import_lm_eval
from .kobest_data import KOBEST_TASKS, describe_data, read_items
from .perplexity import evaluate_perplexity
from .results import EvaluationResults, Measurement
from .texts import describe_texts

_MOST_POSITIONS = 2048


@dataclass(frozen=True)
class EvaluationProtocol:
    """What to measure, and how: the same for a sparse model and for its dense baseline.

    Args:
        texts: for perplexity: `"kowiki"`, a `.txt` or `.jsonl` file, a list of texts, or None for no perplexity.
        seq_len: window positions; None takes the model's context, at most 2048.
        stride, max_tokens: as in `evaluate_perplexity`.
        tasks: of KoBEST, none where empty. num_fewshot, limit, data_dir: as in `evaluate_kobest`.
        prepend_bos: begin each window and item with the beginning token; None does so where the tokenizer does.
        batch_size: windows or items in one forward pass.

    Raises:
        TypeError, ValueError, FileNotFoundError: names the argument, what was found and what is allowed.
    """

    texts: str | os.PathLike[str] | Sequence[str] | None = "kowiki"
    seq_len: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    tasks: Sequence[str] = KOBEST_TASKS
    num_fewshot: int = 0
    limit: int | None = None
    data_dir: str | os.PathLike[str] | None = None
    prepend_bos: bool | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        least = {"seq_len": 2, "stride": 1, "max_tokens": 2, "limit": 1, "num_fewshot": 0, "batch_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None or name in ("num_fewshot", "batch_size"):
                check_integer(name, value, lowest)
        check_prepend_bos(self.prepend_bos)
        _check_stride(self.stride, self.seq_len)
        if self.texts is not None:
            describe_texts(self.texts)
        object.__setattr__(self, "tasks", () if self.tasks in ([], ()) else check_tasks(self.tasks))
        if self.texts is None and not self.tasks:
            raise ValueError("texts is None and tasks is empty: there is nothing to measure")
        for task in self.tasks if self.data_dir is not None else ():
            read_items(task, self.data_dir, self.num_fewshot)  # type: ignore[arg-type]

    def requests(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """For each measurement that this asks for, the part of its protocol that is known beforehand."""
        common = {
            "prepend_bos": prepends_bos(tokenizer, self.prepend_bos),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        asked: dict[str, dict[str, Any]] = {}
        if self.texts is not None:
            windows = {"seq_len": self.window(model), "stride": self.stride, "max_tokens": self.max_tokens}
            asked["perplexity"] = {"texts": describe_texts(self.texts), **windows, **common}
        for task in self.tasks:
            data = describe_data(task, self.data_dir, self.num_fewshot)
            asked[task] = {"num_fewshot": self.num_fewshot, "limit": self.limit, "data": data, **common}
        return asked

    def measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measurement:
        """Takes one of the measurements that `requests` names."""
        if name == "perplexity":
            assert self.texts is not None
            row = evaluate_perplexity(
                model,
                tokenizer,
                self.texts,
                seq_len=self.window(model),
                stride=self.stride,
                prepend_bos=self.prepend_bos,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
            )
        else:
            row = evaluate_kobest(
                model,
                tokenizer,
                tasks=[name],
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                batch_size=self.batch_size,
                data_dir=self.data_dir,
                prepend_bos=self.prepend_bos,
            )[name]
        return Measurement.from_row(name, row)

    def window(self, model: PreTrainedModel) -> int:
        """Window positions for a model."""
        return self.seq_len or min(_MOST_POSITIONS, context_length(model) or _MOST_POSITIONS)


@dataclass(frozen=True)
class Baseline:
    """The dense model to measure beside a sparse one.

    Attributes:
        source: Hub id or folder.
        revision: commit; None for a folder, or for the newest.
        arguments: what else `from_pretrained` needs to load it (`gguf_file`, `subfolder`, `token`, …).
    """

    source: str
    revision: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self, like: PreTrainedModel | type[PreTrainedModel], dtype: torch.dtype, device: Any) -> PreTrainedModel:
        """Loads it with a class of model, in a dtype, on a device or by a device map."""
        arguments = dict(self.arguments)
        if arguments.get("gguf_file") is not None:
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        if self.revision is not None:
            arguments["revision"] = self.revision
        cls: Any = like if isinstance(like, type) else type(like)
        placed = isinstance(device, str | dict)
        if placed:
            arguments["device_map"] = device
        model = cls.from_pretrained(self.source, dtype=dtype, **arguments)
        if sparse_modules(model):
            raise ValueError(f"{describe_source(self.source)} is sparse itself, and no dense baseline")
        return model if placed else model.to(device)


def recorded_baseline(model: PreTrainedModel) -> Baseline:
    """The dense model that a sparse one was made from: the recorded Hub id and commit, or the folder that it was
    pruned from where it is still at hand.

    Raises:
        ValueError: it is not recorded, or was a folder that is not here.
    """
    report = getattr(model, "sparsity_report", None)
    if not isinstance(report, SparsityReport) or not report.base_model:
        raise ValueError("no sparsity_report names the model's dense base: pass baseline=<Hub id or folder>")
    if names_repository(report.base_model, report.base_revision):
        return Baseline(report.base_model, report.base_revision, report.base_arguments)
    source = model.name_or_path or ""
    if os.path.isdir(source) and describe_source(source) == report.base_model:
        return Baseline(source, None, report.base_arguments)
    raise ValueError(
        f"the model was pruned from {report.base_model!r}, a local folder or a model without a recorded commit: "
        "pass baseline=<Hub id or folder> to say where the dense model is"
    )


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol | None = None,
    *,
    baseline: Baseline | str | os.PathLike[str] | bool = False,
    on_measured: Callable[[EvaluationResults], None] | None = None,
) -> EvaluationResults:
    """Measures a sparse model, and after it the dense model it was made from; the results are also
    `model.evaluation_results`, which `save_pretrained` and `push_to_hub` write. What has been measured of the same
    weights by the same protocol is not measured again. A dense model is measured as well, into the dense column.

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
    dense = recorded_baseline(model) if baseline is True else baseline
    if isinstance(dense, str | os.PathLike):
        dense = Baseline(os.fspath(dense))
    found = fingerprint(model)
    results = getattr(model, "evaluation_results", None)
    if not isinstance(results, EvaluationResults) or results.fingerprint != found:
        results = EvaluationResults(found)
    model.evaluation_results = results  # type: ignore[assignment]
    part = "sparse" if sparse_modules(model) else "dense"
    if part == "dense":
        if dense:
            raise ValueError("the model is dense: it is its own baseline")
        results.dense_model = describe_model(model)
        results.dense_revision = getattr(model, "hub_commit", None)
    _measure_missing(results, part, model, tokenizer, protocol, on_measured)
    if isinstance(dense, Baseline):
        report = getattr(model, "sparsity_report", None)
        size = report.num_parameters if isinstance(report, SparsityReport) else None
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
        num_parameters: of the sparse model, zeros included; a dense model with another number is refused.

    Raises:
        ValueError: the dense model is sparse itself, or of another size.
    """
    protocol = protocol or EvaluationProtocol()
    model = baseline.load(like, dtype, device)
    try:
        if num_parameters is not None and model.num_parameters() != num_parameters:
            raise ValueError(
                f"the baseline {describe_source(baseline.source)} has {model.num_parameters():,} parameters, the "
                f"model that was pruned had {num_parameters:,}: it is another model"
            )
        name = describe_model(model)
        revision = getattr(model, "hub_commit", None)
        if (results.dense_model, results.dense_revision) != (name, revision):
            results.dense.clear()  # figures of another dense model
        results.dense_model, results.dense_revision = name, revision
        _measure_missing(results, "dense", model, tokenizer, protocol, on_measured)
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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


def _check_stride(stride: int | None, seq_len: int | None) -> None:
    if stride is not None and seq_len is not None and stride > seq_len - 1:
        raise ValueError(f"stride={stride} is out of range, it must be from 1 to seq_len - 1 = {seq_len - 1}")


def check_protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol | None
) -> EvaluationProtocol:
    """The protocol, the default one for None. Finds before any work what would fail later.

    Raises:
        TypeError, ValueError, ImportError: model, tokenizer and protocol do not fit, or lm-eval is not installed.
    """
    protocol = protocol or EvaluationProtocol()
    if not isinstance(protocol, EvaluationProtocol):
        raise TypeError(f"protocol must be an EvaluationProtocol, found {type(protocol).__name__}")
    check_causal_lm(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be the model's tokenizer, found {type(tokenizer).__name__}")
    prepends_bos(tokenizer, protocol.prepend_bos)
    if protocol.texts is not None:
        check_context(model, protocol.window(model))
        _check_stride(protocol.stride, protocol.window(model))
    if protocol.tasks:
        import_lm_eval()
    return protocol
