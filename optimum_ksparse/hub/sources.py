"""Where a sparse model's tokenizer and its dense baseline are."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..checkpoint import describe_model, facts_of, made_with
from ..data import copy_processor, read_tokenizer
from ..evaluation import Baseline, recorded_baseline
from ..records import describe_source
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
    this process or came with, or that of `base`; what the model's files name is not read: nobody here has named it.

    Args:
        base: the dense model that the user asked for; its tokenizer will do where the model has none.
        can_lack: tokenizer=False is a way out, which the error names.
        arguments: `token`, `trust_remote_code`, as the user passed them.

    Raises:
        TypeError, OSError, ValueError: it cannot be one, or cannot be loaded, or the model has none.
    """
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
    live = facts.tokenizer
    if isinstance(live, PreTrainedTokenizerBase):
        return live
    sources: list[tuple[Any, dict[str, Any]]] = [(live, {}), (model.name_or_path, _place(model))]
    if base is not None:
        sources.append((base.source, {**base.arguments, "revision": base.revision}))
    failed = []
    for source, more in sources:
        if not source:
            continue
        known = {name: value for name, value in {**arguments, **more}.items() if value is not None}
        try:
            return read_tokenizer(os.fspath(source), **known)
        except Exception as error:  # transformers and huggingface_hub raise many kinds here
            failed.append(f"{describe_source(source)}: {type(error).__name__}")
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


def choose_baseline(model: PreTrainedModel, given: str | os.PathLike[str] | None, token: Any) -> Baseline:
    """The dense model that is named, or the recorded one.

    Raises:
        ValueError: it is not recorded, or cannot be read.
    """
    found = recorded_baseline(model) if given is None else Baseline(os.fspath(given))
    more = {} if token is None else {"token": token}
    found = Baseline(found.source, found.revision, {**found.arguments, **more})
    names = ("token", "subfolder", "cache_dir")
    hub = {name: found.arguments[name] for name in names if found.arguments.get(name) is not None}
    try:
        cached_file(found.source, found.arguments.get("gguf_file") or CONFIG_NAME, revision=found.revision, **hub)
    except Exception as error:  # transformers and huggingface_hub raise many kinds here
        raise ValueError(
            f"the dense baseline {describe_source(found.source)!r} cannot be read ({type(error).__name__}): pass "
            "baseline=<Hub id or folder> to say where it is"
        ) from error
    return found
