"""Publishing a sparse model, or an adapter on one, in one commit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint import describe_model
from ..checkpoint.staging import write_text
from ..evaluation import EvaluationProtocol, EvaluationResults, check_protocol, choose_baseline, evaluate_model
from ..records import REPORT_NAME, TUNING_NAME, describe_source, to_json
from ..records.sources import clean_token
from .commit import commit_folder, explained
from .sources import choose_tokenizer, copy_own_processor
from .subject import Subject
from .writing import CARD_NAME, CardOptions, check_target, write_card_of

logger = logging.get_logger(__name__)

_HOW_IT_LOADED = ("is_local", "local_files_only")  # of a tokenizer


def push_model(
    model: Any,
    repo_id: str,
    *,
    evaluate: bool | EvaluationProtocol = False,
    baseline: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | bool | None = None,
    language: str = "en",
    dense_revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    tags: list[str] | str | None = None,
    readme: str | None = None,
    trust_remote_code: bool | None = None,
) -> CommitInfo:
    """Publishes a sparse model, one that has lost blocks, or an adapter on one: config, weights, tokenizer, report,
    results, figures and card in one commit. What did not change is not uploaded again, what a person wrote into the
    card stays, and weight files of an earlier push that are no part of this one go. Where it fails nothing is
    published; a dense variant is a commit of its own, after the other.

    Args:
        model: a sparse model of transformers, one that has lost blocks, or a PEFT model on one.
        repo_id: `"user/name"`, or a name in the token's own namespace.
        evaluate: measure before the push what is not measured yet: the sparse model, then the dense model that it was
            made from, alone on the device. True takes the default protocol.
        baseline: Hub id or folder of that dense model, where the recorded one is not at hand.
        tokenizer: to publish with the model; None loads the recorded one, False leaves it out.
        language: of the card, "en" or "ko".
        dense_revision: a branch for the same weights with their zeros written out, which plain transformers loads.
        readme: text of a card to go on from where the repository has none yet.
        trust_remote_code: run the code that the tokenizer comes with.
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size, variant, tags: as
            in transformers.

    Raises:
        TypeError, ValueError: an argument cannot be right, there is no tokenizer, or the results are of other weights.
        PermissionError: the Hub does not accept the token, or the token may not write there.
        ConnectionError: the Hub cannot be reached, or breaks off.
    """
    subject = Subject.read(model)
    plain = subject.plain
    if evaluate not in (True, False) and not isinstance(evaluate, EvaluationProtocol):
        raise TypeError(f"evaluate must be True, False or an EvaluationProtocol, found {type(evaluate).__name__}")
    check_target(repo_id, revision, dense_revision, create_pr)
    token = clean_token(token)
    more_tags = [tags] if isinstance(tags, str) else list(tags or [])
    options = CardOptions(language, repo_id, dense_revision, more_tags, token)
    if dense_revision is not None and (subject.is_adapter or subject.settings.storage != "packed"):
        raise ValueError("dense_revision: an adapter, or a model that is not stored packed, has no dense variant")
    dense = choose_baseline(plain, baseline, token) if evaluate else None
    loading = {"token": token, "trust_remote_code": trust_remote_code}
    tokenizer = choose_tokenizer(plain, tokenizer, base=dense, can_lack=not evaluate, **loading)
    results = None if evaluate else subject.results()  # those of other weights are refused here
    if evaluate:
        if tokenizer is None:
            raise ValueError("evaluate needs the tokenizer: pass one instead of tokenizer=False")
        protocol = check_protocol(plain, tokenizer, None if evaluate is True else evaluate)
    api = HfApi(token=token)
    with explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        for branch in (revision, dense_revision):
            if branch is not None and not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
    if dense is not None and tokenizer is not None:
        results = evaluate_model(plain, tokenizer, protocol, baseline=dense)
    if results is None or not results.dense:
        lacking = "no figures" if results is None else "no dense column"
        logger.warning(
            f"The card has {lacking}: push_to_hub(..., evaluate=True) measures, "
            "or `optimum-cli ksparse eval CHECKPOINT --baseline` before the push."
        )
    options = replace(options, repo_id=repo_id)
    commit_message = commit_message or f"Upload {'adapter' if subject.is_adapter else 'sparse model'}"
    commit: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
    how = {"max_shard_size": max_shard_size, "variant": variant}

    def publish(**where: Any) -> CommitInfo:
        with tempfile.TemporaryDirectory() as name, explained(repo_id):
            folder = Path(name)
            _save(subject, folder, tokenizer, results, token, how)

            def write(there: str | None) -> None:
                write_card_of(subject, folder, results, options, existing=readme or "" if there is None else there)

            return commit_folder(api, repo_id, folder, write, **commit, **where)

    info = publish(revision=revision, create_pr=create_pr)
    if dense_revision is not None:
        stored: Any = plain.config.quantization_config
        stored.storage = "dense"
        try:
            publish(revision=dense_revision)
        finally:
            stored.storage = "packed"
    return info


def _save(
    subject: Subject,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    results: EvaluationResults | None,
    token: bool | str | None,
    how: dict[str, Any],
) -> None:
    """Everything but the card into an empty folder; `how` are arguments of `save_pretrained`."""
    plain = subject.plain

    def hide_local_base(settings: dict[str, Any]) -> None:  # whose path PEFT writes
        name = settings.get("base_model_name_or_path")
        hidden = describe_model(plain) if name == plain.name_or_path else describe_source(name)
        settings["base_model_name_or_path"] = hidden

    if not subject.is_adapter:
        copy_own_processor(plain, folder, token)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _edit(folder / "tokenizer_config.json", lambda settings: [settings.pop(name, None) for name in _HOW_IT_LOADED])
    if isinstance(subject.model, PreTrainedModel):
        subject.model.save_pretrained(folder, **how)
    else:
        subject.model.save_pretrained(folder)
        if results is not None:
            results.save(folder)
    if subject.facts.tuning is not None:  # without the path of a local base
        tuning = {**subject.facts.tuning, "base": describe_source(subject.facts.tuning.get("base"))}
        write_text(folder / TUNING_NAME, to_json(tuning))
    if subject.is_adapter:
        for config in folder.rglob("adapter_config.json"):  # adapters with names of their own lie in folders
            _edit(config, hide_local_base)
        (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's form, with the path of a local base in it
        (folder / REPORT_NAME).unlink(missing_ok=True)  # the base's own


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a JSON file, where it is there."""
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        change(settings)
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
