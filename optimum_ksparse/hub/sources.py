"""Where a sparse model's tokenizer and processor are."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint import describe_model, facts_of, made_with
from ..data import copy_processor, read_tokenizer
from ..evaluation import Baseline
from ..records import describe_source, printable
from ..report import BASE_ARGUMENTS

logger = logging.get_logger(__name__)


def choose_tokenizer(
    model: PreTrainedModel,
    given: PreTrainedTokenizerBase | str | bool | None,
    *,
    base: Baseline | None = None,
    can_lack: bool = False,
    **arguments: Any,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is given or named, for False none. For None the one that the model was calibrated with in
    this process or came with, or that of `base`, the dense model; what the model's files name is not read: nobody here
    has named it. `arguments` are `token` and `trust_remote_code`; where it `can_lack`, the error says so. Raises
    TypeError, OSError or ValueError where it cannot be one, or cannot be loaded, or the model has none."""
    if given is False:
        return None
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None and not isinstance(given, str | os.PathLike):
        raise TypeError(f"tokenizer must be a tokenizer, its name, None or False, found {type(given).__name__}")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if given is not None:
        return read_tokenizer(os.fspath(given), **arguments)
    facts = facts_of(model)
    if isinstance(facts.tokenizer, PreTrainedTokenizerBase):
        return facts.tokenizer
    sources: list[tuple[Any, dict[str, Any]]] = [(facts.tokenizer, {}), (model.name_or_path, _place(model))]
    sources += [] if base is None else [(base.source, base.loading)]
    failed = []
    for source, place in sources:
        if not source:
            continue
        place = {name: value for name, value in {**arguments, **place}.items() if value is not None}
        try:
            return read_tokenizer(os.fspath(source), **place)
        except Exception as error:  # transformers and huggingface_hub raise many kinds here
            failed.append(f"{describe_source(source)}: {textwrap.shorten(printable(error), 120)}")
    recorded = [getattr(made_with(model), "tokenizer", None), getattr(facts.report, "base_model", None)]
    named = " or ".join(dict.fromkeys(repr(name) for name in recorded if isinstance(name, str)))
    without = ", or tokenizer=False to publish without one" if can_lack else ""
    raise ValueError(
        f"no tokenizer was found ({'; '.join(failed) or 'no source is known'}): pass tokenizer="
        f"{f' (the checkpoint names {named})' if named else ''}{without}"
    )


def copy_own_processor(model: PreTrainedModel, folder: str | os.PathLike[str], token: Any = None) -> None:
    """Copies the processor of a model that takes more than text from where the model was loaded."""
    if not model.name_or_path:
        return
    try:
        copy_processor(model.name_or_path, folder, **_place(model), token=token)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        if model.config.sub_configs:
            source = describe_source(model.name_or_path)
            logger.warning(f"A processor, if the model has one, is not with it: {source}: {type(error).__name__}")


def _place(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` for what lies beside the weights that a model was loaded from."""
    facts = facts_of(model)
    place, report = {"revision": facts.commit}, facts.report
    if report is not None and describe_model(model) == report.base_model:  # pruned in this process
        place |= {name: report.base_arguments.get(name) for name in BASE_ARGUMENTS}
    return place
