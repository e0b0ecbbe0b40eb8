"""`merge_adapter`: a PEFT adapter becomes part of the sparse weights, and every zero stays zero."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..blocks import BlockReplay, evaluation_mode, find_blocks
from ..checkpoint import facts_of
from ..checks import check_integer, check_keys, check_number, check_one_of
from ..data import CalibrationData, calibration_tokens, load_tokenizer
from ..data.tokens import context_length
from ..evaluation import note_merge
from ..kernels import fast_products
from ..version import library_versions
from .adapted import active, adapted_layers, adapters_of, check_mergeable, describe_adapters, is_sparse
from .blocks import merge_blocks
from .report import MergeReport
from .targets import base_of

MERGE_METHODS = ("masked", "solve")
_share = partial(check_number, least=0, most=1)
_SOLVER_SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "damping": _share,
    "max_steps": partial(check_integer, least=1),
    "tolerance": _share,
}


def merge_adapter(
    peft_model: PeftModel,
    *,
    method: str = "masked",
    adapter_names: list[str] | None = None,
    dataset: Any = None,
    batch_size: int = 1,
    method_settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Merges adapters into a sparse model: their masks, and so their densities and packed sizes, stay as they are to
    the bit. What PEFT's own merging does with them is the method "masked".

    A masked LoRA and HiRA change kept weights alone, and either method merges them exactly. Of LoRA and DoRA, "masked"
    throws away what lies outside the mask; "solve" then finds the kept weights with which each layer, fed with what
    the layers merged before it give, comes nearest to its outputs in the unmerged model, on calibration text. Layers
    that are not sparse are merged as PEFT does it, and modules trained as a whole (`modules_to_save`) are taken over.

    Quantised values become integers again, of other scales: with "masked" those nearest to the merged weight, with
    "solve" those whose outputs are. `peft_model.get_base_model().dequantize_values()` before makes ordinary values of
    them, which merging then does not round.

    Args:
        peft_model: a PEFT model on a sparse transformers model; it is used up, as by `merge_and_unload`.
        method: "masked", or "solve", which needs `dataset`.
        adapter_names: those to merge; None: the active ones.
        dataset: calibration text or token ids, as in `SparsityConfig`, in 128 samples of 512 tokens, or of the
            model's context where that is shorter; or `CalibrationData`, which says how they are drawn. With "masked"
            it serves to measure the error.
        batch_size: calibration samples in one forward pass.
        method_settings: of the solver: `damping`, `max_steps`, `tolerance`, see `pruners.solve.solve_on_mask`.

    Returns:
        The model without PEFT. `model.ksparse.merge` says what happened; it is saved with the model. Results measured
        before are no longer those of this model and are dropped. Layers that kept a second form of their weight do so
        no longer: call `model.autotune_kernels()` again.

    Raises:
        TypeError, ValueError: a setting is wrong, or these adapters cannot be merged; nothing has been changed. On
            these and all other errors, and on Ctrl-C, `peft_model` is what it was.
    """
    check_one_of("method", method, MERGE_METHODS)
    if method == "solve" and dataset is None:
        raise ValueError('method="solve" needs calibration text: pass dataset=, or use method="masked"')
    check_integer("batch_size", batch_size, 1)
    check_keys(method_settings or {}, tuple(_SOLVER_SETTINGS), "method_settings")
    settings = {name: _SOLVER_SETTINGS[name](name, value) for name, value in (method_settings or {}).items()}
    names = check_mergeable(peft_model, adapter_names)
    model: Any = peft_model.get_base_model()
    started = time.perf_counter()
    data = None
    if dataset is not None:
        length = min(512, context_length(model) or 512)
        drawn = dataset if isinstance(dataset, CalibrationData) else CalibrationData(dataset, seq_len=length)
        with evaluation_mode(model), active(model, names):
            data = calibration_tokens(drawn, model, load_tokenizer(drawn, model.name_or_path))
    report = MergeReport(method, describe_adapters(peft_model, names), {} if data is None else data.description)
    with _as_it_was_on_error(model, names), active(model, names):
        with evaluation_mode(model), torch.no_grad(), fast_products(model):
            blocks = find_blocks(model)
            replay = None if data is None else BlockReplay(blocks, data.ids, batch_size)
            if replay is not None and not replay.in_line:
                raise ValueError(
                    f"{type(model).__name__} does not run its blocks one after another, which merging with a dataset "
                    "needs: take method='masked' without one"
                )
            report.layers = merge_blocks(blocks, names, replay, settings if method == "solve" else None)
        tied = _is_tied(model)
        report.dense_layers = _merge_dense(model, names)
        tuner: Any = peft_model.base_model
        tuner.unload()
        if tied and not _is_tied(model):
            model.config.tie_word_embeddings = False
        report.versions = library_versions("torch", "transformers", "peft")
        report.seconds = round(time.perf_counter() - started, 2)
        facts = facts_of(model)
        facts.results, facts.merge = None, report
        note_merge(model, report.change())
    return model


@contextmanager
def _as_it_was_on_error(model: Any, names: list[str]) -> Iterator[None]:
    """Takes back what is done to modules, parameters and sparse weights of the model within it, where that fails."""
    before = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    layers, attached = adapted_layers(model, names).values(), getattr(model, "peft_config", None)
    tied = getattr(model.config, "tie_word_embeddings", None)
    try:
        yield
    except BaseException:
        for module, modules, parameters in before:
            module._modules.update(modules)
            module._parameters.update(parameters)
        for layer in layers:
            if is_sparse(layer) and layer.merged:
                layer.unmerge()
            layer.merged_adapters.clear()
        if attached is not None:
            model.peft_config = attached
        if tied is not None:
            model.config.tie_word_embeddings = tied
        raise


def _merge_dense(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Merges layers that are not sparse, as PEFT does it, into parameters of their own: those that other modules use
    as well (tied embeddings) stay as they are there."""
    dense: dict[str, Any] = {p: layer for p, layer in adapted_layers(model, names).items() if not is_sparse(layer)}
    for layer in dense.values():
        parameters = layer.get_base_layer()._parameters
        parameters |= {
            name: nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            for name, parameter in parameters.items()
            if parameter is not None
        }
        layer.merge(safe_merge=True, adapter_names=adapters_of(layer, names))
    return list(dense)


def _is_tied(model: PreTrainedModel) -> bool:
    head, embeddings = (base_of(module) for module in (model.get_output_embeddings(), model.get_input_embeddings()))
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", 0)
