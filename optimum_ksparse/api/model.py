"""Pruning a loaded model in place, and making ordinary values of quantised ones."""

from __future__ import annotations

import time

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks import find_blocks
from ..checkpoint import facts_of, is_offloaded, made_with, sparse_modules
from ..config import SparsityConfig
from ..data import load_tokenizer, usual_context
from ..evaluation import mark_weights, settle_records
from ..hub import card_of_source, tag_model
from ..pruning.distributed import current
from ..pruning.job import Place
from ..pruning.model import as_pruned, attach, check_model, make_report, note_values, quantised_report, record_settings
from ..pruning.plan import run
from ..report import SparsityReport


def sparsify(
    model: PreTrainedModel,
    config: SparsityConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    restore_on_error: bool = False,
) -> SparsityReport:
    """Prunes a loaded model in place: swaps in `SparseLinear`.

    Everything that can be checked is checked before a weight is touched, one calibration sample run through the dense
    model included. The model is then a sparse one for `save_pretrained`, `push_to_hub`, `Trainer` and `dequantize`;
    its report is `model.sparsity_report`.

    Where a process group of torch.distributed is initialised, all of its processes must call this with the same
    settings: each runs a part of the calibration samples and prunes a part of the layers, and all end with the same
    model.

    Args:
        model: a decoder-only model in float32, bfloat16 or float16, on one device or on several.
        config: what to do.
        tokenizer: for calibration text; None takes `config.tokenizer`, then the model's own name.
        restore_on_error: keep all dense weights in memory until the end, and on an error or Ctrl-C put them back. By
            default each goes as it is pruned, and an error leaves a model to throw away, which cannot be saved.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or the settings or the data do not fit it.
        ArithmeticError: a layer's Gram matrix stays singular.
        ConnectionError: the calibration data cannot be read from the Hub, or another process has stopped.
    """
    check_model(model, config)
    config = config.fitted(usual_context(model.config))
    started = time.perf_counter()
    processes, blocks = current(), find_blocks(model)
    processes.agree({"model": type(model).__name__, "blocks": len(blocks.blocks), **config.to_dict()})
    earlier, made = facts_of(model).report, made_with(model) if sparse_modules(model) else None
    recorded = record_settings(config)
    place = Place(
        model, blocks, processes, lambda: tokenizer or load_tokenizer(config.calibration, model.name_or_path)
    )
    try:
        job = run(place, config, restore_on_error)
    except BaseException as error:
        if sparse_modules(model):
            error.add_note("The model is pruned in part, and cannot be saved: load it again.")
        raise
    recorded = as_pruned(recorded.changed(pattern=job.config.pattern), made)  # that was found, with method="existing"
    attach(model, recorded)
    if config.tokenizer is not None:
        facts_of(model).tokenizer = config.tokenizer  # the object or the whole path, for `push_to_hub`
    report = make_report(job)
    if made is not None and earlier is not None:
        report = quantised_report(report, earlier, recorded)
    else:
        report.base_card = processes.once(lambda: card_of_source(model))
    report.seconds = round(time.perf_counter() - started, 2)
    facts_of(model).report = report
    mark_weights(model, pruned_here=True)
    tag_model(model, report, recorded)
    return report


def dequantize_values(model: PreTrainedModel) -> PreTrainedModel:
    """`model.dequantize_values()` of every `PreTrainedModel`: makes ordinary kept values of quantised ones, on the
    same masks, in the dtype of the model, so that they can be trained. It stays a sparse model of the same weights.

    Raises:
        ValueError: the model is not sparse, or its weights are elsewhere, by accelerate or spread over processes.
    """
    config = made_with(model)
    if config is None:
        raise ValueError(f"{type(model).__name__} is not sparse: it has no quantised values")
    if is_offloaded(model):
        raise ValueError("accelerate has offloaded weights of the model: load it without that")
    settle_records(model)  # what is known of its weights holds of them in another form
    for module in sparse_modules(model).values():
        module.dequantize_values()
    config.values = config.group_size = None
    note_values(model)
    if (mark := facts_of(model).mark) is not None:
        mark_weights(model, mark.fingerprint, pruned_here=mark.pruned_here)
    return model
