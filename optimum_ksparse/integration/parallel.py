"""Packed checkpoints that transformers spreads over processes (`DistributedConfig`): what is made ready, and refused,
before a tensor is read."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from ..checkpoint import sparse_modules
from ..nn import SparseLinear


def prepare_parallel(model: PreTrainedModel, config: Any) -> None:
    """Makes the empty sparse modules of a model ready for a `DistributedConfig`. Under tensor parallelism their masks
    and scales become parameters, which transformers then splits, reads and gathers as it does the values. FSDP needs
    nothing: it leaves buffers whole.

    Raises:
        ValueError: the plan would split a layer as its packed form cannot be; names it.
    """
    data = any((getattr(config, name, None) or 1) > 1 for name in ("fsdp_size", "dp_replicate_size"))
    if (config.pp_size or 1) > 1 or config.enable_expert_parallel or (config.tp_size > 1 and data):
        raise ValueError(
            "a packed sparse checkpoint is spread over processes by tensor parallelism or by FSDP, by one of them "
            "alone, and by no pipeline or expert parallelism: set tp_size or fsdp_size of DistributedConfig, no other"
        )
    if config.tp_size == 1:
        return
    plan = model.tp_plan if config.tp_plan != {} else {}
    plan = {**plan, **(config.tp_plan if isinstance(config.tp_plan, dict) else {})}
    for name, module in sparse_modules(model).items():
        generic = replace_layer_number_by_wildcard(name)
        owner = generic.rpartition(".")[0]  # the rule of experts is one of the parameter, or of what holds it
        keys = (f"{generic}.weight", generic) if isinstance(module, SparseLinear) else (generic, owner)
        rule = next((plan[key] for key in keys if key in plan), None)
        if rule is None:
            continue
        reason = _why_not(module, ALL_PARALLEL_STYLES.get(rule), config.tp_size)
        if reason is not None:
            raise ValueError(
                f"{name} cannot be split over {config.tp_size} processes ({rule} in the tp_plan): {reason}. "
                "Load with another tp_size, with FSDP (fsdp_size), or with device_map"
            )
        if isinstance(module, SparseLinear):
            module.weight_mask = nn.Parameter(module.weight_mask, requires_grad=False)
            # The one scale of a row holds of all its columns.
            by_rows = not isinstance(ALL_PARALLEL_STYLES.get(rule), RowwiseParallel)
            if module.weight_scale is not None and (by_rows or module.weight_scale.shape[1] > 1):
                module.weight_scale = nn.Parameter(module.weight_scale, requires_grad=False)


def _why_not(module: Any, style: Any, ranks: int) -> str | None:
    """Why a style of transformers cannot split a sparse module; None where it can, or does not split it."""
    if not isinstance(module, SparseLinear):
        return "packed experts are not split"
    if style is None or type(style).shard_param is TensorParallelLayer.shard_param:
        return None
    if not isinstance(style, ColwiseParallel | RowwiseParallel):
        return "packed layers are split by rows (colwise) or by columns (rowwise), and not in strides"
    if not module.pattern.is_semi_structured:
        return f"the rows of pattern {module.pattern} keep different numbers of weights; patterns n:m can be split"
    multiple = ranks * math.lcm(8, module.pattern.m or 1)
    if isinstance(style, RowwiseParallel) and module.in_features % multiple:
        return (
            f"its {module.in_features} inputs must be a multiple of {multiple}, so that no process gets part of a "
            f"byte of the mask or of a group of {module.pattern.m}"
        )
    if isinstance(style, RowwiseParallel) and module.weight_scale is not None:
        return _why_not_scaled(module, ranks)
    return None


def _why_not_scaled(module: SparseLinear, ranks: int) -> str | None:
    """Why the columns of a layer with quantised values cannot be split; None where they can."""
    columns = module.in_features // ranks
    if module.in_features > module.group_size and columns % module.group_size:
        return f"no process may get part of a group of {module.group_size} columns, which has one scale"
    if module.values == "int4" and columns // (module.pattern.m or 1) * (module.pattern.n or 1) % 2:
        return "its rows would keep an odd number of int4 values in each process, and a byte holds two"
    return None
