"""What ties a report and results to the weights: whether these are still the ones that they are of.

A fingerprint says so for certain and reads all weights, about 0.6 GB a second on one core. It is computed when a model
that was pruned here is saved for the first time, when it is measured, and when it is published or a card is written.
In between, as at each checkpoint of a training run, a mark does: of each tensor some values, the version counter that
PyTorch counts up at each write, and where it lies. A value that differs proves a change. A write of which no sample
tells is settled by the fingerprint where one is known, and is otherwise a change. What the mark cannot see, a few
values written past PyTorch (`weight.data[0, 0] = 1`), is found by the next fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import facts_of, logical_parameters
from ..checkpoint.digests import fingerprint
from ..nn import local
from ..report import Change, SparsityReport

logger = logging.get_logger(__name__)

_SAMPLES = 64  # of each tensor
# What `from_pretrained` reads beside the weights, and `sparsify` and `merge_adapter` make.
RECORDS = ("report", "merge", "results")
_OTHER_WEIGHTS = "model.ksparse.results was measured on other weights than these; it is not saved with them."


@dataclass
class WeightsMark:
    """How the weights of a model were at some time: of each tensor dtype, shape and bytes of some values (what is
    offloaded has none), and address and version counter; their fingerprint, where it is known; and whether the report
    was made of these weights, and not read from a file."""

    samples: dict[str, tuple[Any, ...]]
    writes: dict[str, tuple[int, int]]
    fingerprint: str | None = None
    pruned_here: bool = False


@dataclass
class TrainingRun:
    """A run of `Trainer` on a model: the trainer's class, the data's name on the Hub, where it has one,
    `TrainerState`, what the report says of it so far, and whether it has ended, so that later changes are not its."""

    trainer: str
    dataset: str | None
    state: Any
    change: Change = field(default_factory=lambda: Change("trained", steps=0))
    ended: bool = False


def mark_weights(model: nn.Module, fingerprint: str | None = None, *, pruned_here: bool = False) -> None:
    """Notes on a model how its weights are now."""
    mark = _mark(_tensors(model))
    mark.fingerprint, mark.pruned_here = fingerprint, pruned_here
    facts_of(model).mark = mark


def is_unchanged(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None, now: str | None = None
) -> bool:
    """Whether the weights, or those that are saved instead of them, are the ones that were marked; also where none
    were. `now` is their fingerprint, where it is known."""
    mark: WeightsMark | None = facts_of(model).mark
    if mark is None:
        return True
    if state_dict is not None:
        given = _mark(state_dict).samples
        return all(mark.samples[name] == given[name] for name in mark.samples.keys() & given.keys())
    current = _mark(_tensors(model))
    if current.samples != mark.samples:
        return False
    if now is None and current.writes == mark.writes:
        return True
    if mark.fingerprint is not None and not (dist.is_available() and dist.is_initialized()):
        return (now or fingerprint(model)) == mark.fingerprint
    # A tensor that lies elsewhere was moved; one that was written to where it lies may have changed anywhere.
    return all(
        current.writes[name] == (at, n) for name, (at, n) in mark.writes.items() if current.writes[name][0] == at
    )


def settle_records(model: PreTrainedModel, *, now: str | None = None) -> None:
    """Makes a model's report say whether the weights are still the ones that pruning left, and drops results of other
    ones. `now` is their fingerprint, where it has been computed: then it decides."""
    facts = facts_of(model)
    mark, results = facts.mark, facts.results
    if getattr(model, "peft_config", None):  # report and mark are of the model that the adapter was added to
        current = None if now is None and results is None else adapted_fingerprint(model, now)
    else:
        unchanged = is_unchanged(model, now=now)
        current = now or (mark.fingerprint if mark is not None and unchanged else None)
        pruned_here = mark is not None and mark.pruned_here and unchanged
        if current is None and unchanged and (pruned_here or results is not None):
            current = fingerprint(model)
        report, fresh = facts.report, now or (current if pruned_here else None)
        if report is not None:
            others = not pruned_here and fresh is not None and report.fingerprint not in (None, fresh)
            if not unchanged or others:
                _note_change(model, report)
                report.fingerprint = fresh
            elif fresh is not None and (pruned_here or report.changes):
                report.fingerprint = fresh
        mark_weights(model, current, pruned_here=pruned_here)
    if results is not None and results.fingerprint != current:
        logger.warning(_OTHER_WEIGHTS)
        facts.results = None


def adapted_fingerprint(model: PreTrainedModel, now: str | None = None) -> str | None:
    """The fingerprint of a model with its adapter: `now`, or the last one where nothing was written since."""
    facts, current = facts_of(model), _mark(_tensors(model))
    mark: WeightsMark | None = facts.adapted
    if now is None and mark is not None and (mark.samples, mark.writes) == (current.samples, current.writes):
        return mark.fingerprint
    current.fingerprint = now or fingerprint(model)
    facts.adapted = current
    return current.fingerprint


def settled_records(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None = None) -> list[Any]:
    """A model's `RECORDS` as they are saved beside its weights, after `settle_records`. Beside other weights, saved
    instead of them, go copies that say what holds of these: the model's own records stay as they are."""
    if state_dict is None or getattr(model, "peft_config", None):  # then the state is that of an adapter
        settle_records(model)
        return [getattr(facts_of(model), name) for name in RECORDS]
    facts = facts_of(model)
    report, results, unchanged = facts.report, facts.results, is_unchanged(model, state_dict)
    if report is not None:
        report = replace(report, changes=list(report.changes))
        if not unchanged:
            _note_change(model, report)
            report.fingerprint = None
    current = facts.mark.fingerprint if facts.mark is not None and unchanged else None
    if results is not None and results.fingerprint != current:
        logger.warning_once(_OTHER_WEIGHTS)
        results = None
    return [report, facts.merge, results]


def note_merge(model: PreTrainedModel, change: Change) -> None:
    """Makes the report say that adapters became part of the weights, and on what they were trained here."""
    facts = facts_of(model)
    report, run = facts.report, facts.run
    if run is not None and run.state.global_step > 0:
        change.dataset, change.steps, change.epochs = run.dataset, run.state.global_step, run.state.epoch
        facts.run = None
    if report is not None:
        report.changes.append(change)
        report.fingerprint = None
    mark_weights(model)


def _note_change(model: PreTrainedModel, report: SparsityReport) -> None:
    if not (dist.is_available() and dist.is_initialized()):  # a process may hold a part of each
        report.num_parameters = logical_parameters(model)
    run = facts_of(model).run
    if run is not None and not run.ended and run.state.global_step > 0:
        change = run.change
        change.by, change.dataset = run.trainer, run.dataset
        change.steps, change.epochs = run.state.global_step, run.state.epoch
        if not any(other is change for other in report.changes):
            report.changes.append(change)
    elif not report.changes or report.changes[-1].kind != "unknown":
        report.changes.append(Change("unknown"))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; tied ones once; what is local of those that are spread over processes. No
    process waits for others here, as in `state_dict`."""
    buffers = {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {name: local(tensor) for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


def _mark(tensors: Mapping[str, torch.Tensor]) -> WeightsMark:
    picked: dict[torch.device, dict[str, torch.Tensor]] = {}
    samples: dict[str, tuple[Any, ...]] = {}
    writes = dict.fromkeys(tensors, (0, 0))
    for name, tensor in tensors.items():
        samples[name] = (tensor.dtype, tuple(tensor.shape))
        if type(tensor.data) is not torch.Tensor:  # in parts, spread over processes: nothing is known of it
            samples[name] += (object(),)
        elif not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // _SAMPLES) | 1].contiguous().view(torch.uint8)
            picked.setdefault(tensor.device, {})[name] = values
            writes[name] = tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
    for parts in picked.values():  # one copy from each device instead of one for each tensor
        copied = torch.cat(list(parts.values())).cpu().split([len(values) for values in parts.values()])
        for name, values in zip(parts, copied, strict=True):
            samples[name] += (values.numpy().tobytes(),)
    return WeightsMark(samples, writes)
