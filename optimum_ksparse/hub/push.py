"""Publishing a sparse model, or an adapter on one, in one commit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint import describe_model, facts_of
from ..checkpoint.staging import write_text
from ..evaluation import EvaluationProtocol, check_protocol, evaluate_model
from ..records import REPORT_NAME, TUNING_NAME, describe_source
from .commit import commit_folder, with_retries
from .models import current_results, is_adapter, sparse_part
from .sources import choose_baseline, choose_tokenizer, copy_own_processor
from .writing import CARD_NAME, check_branch, check_language, check_repository

logger = logging.get_logger(__name__)


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
    plain = sparse_part(model)
    if evaluate not in (True, False) and not isinstance(evaluate, EvaluationProtocol):
        raise TypeError(f"evaluate must be True, False or an EvaluationProtocol, found {type(evaluate).__name__}")
    check_language(language)
    check_target(repo_id, revision, dense_revision, create_pr)
    _check_storage(model, plain, dense_revision)
    token = _clean_token(token)
    dense = choose_baseline(plain, baseline, token) if evaluate else None
    loading = {"token": token, "trust_remote_code": trust_remote_code}
    found_tokenizer = choose_tokenizer(plain, tokenizer, base=dense, can_lack=not evaluate, **loading)
    if evaluate:
        if found_tokenizer is None:
            raise ValueError("evaluate needs the tokenizer: pass one instead of tokenizer=False")
        protocol = check_protocol(plain, found_tokenizer, evaluate if evaluate is not True else None)
    results = None if evaluate else current_results(model)  # those of other weights are refused here
    api = HfApi(token=token)
    repo_id = with_retries(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    for branch in (revision, dense_revision):
        if branch is not None and not branch.startswith("refs/"):
            with_retries(repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))  # noqa: B023
    if evaluate:
        evaluate_model(plain, found_tokenizer, protocol, baseline=dense)  # type: ignore[arg-type]
        results = facts_of(plain).results
    if results is None or not results.dense:
        lacking = "no figures" if results is None else "no dense column"
        logger.warning(
            f"The card has {lacking}: push_to_hub(..., evaluate=True) measures, "
            "or `optimum-cli ksparse eval CHECKPOINT --baseline` before the push."
        )
    more_tags = [tags] if isinstance(tags, str) else list(tags or [])
    message = commit_message or ("Upload adapter" if is_adapter(model) else "Upload sparse model")
    card: dict[str, Any] = {"language": language, "repo_id": repo_id, "tags": more_tags, "token": token}
    card |= {"dense_revision": dense_revision, "existing": readme or "", "results": results}
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder), found_tokenizer, max_shard_size, variant, token)
        info = commit_folder(
            api, repo_id, Path(folder), model, card, message, commit_description, revision, create_pr=create_pr
        )
    if dense_revision is not None:
        with tempfile.TemporaryDirectory() as folder, _dense_storage(plain):
            _save(model, Path(folder), found_tokenizer, max_shard_size, variant, token)
            commit_folder(api, repo_id, Path(folder), model, card, message, commit_description, dense_revision)
    return info


def check_target(
    repo_id: str, revision: str | None = None, dense_revision: str | None = None, create_pr: bool = False
) -> None:
    """Raises ValueError for names that the Hub does not allow, or that do not go together."""
    check_repository(repo_id)
    check_branch("revision", revision)
    check_branch("dense_revision", dense_revision)
    if dense_revision is not None and dense_revision == (revision or "main"):
        raise ValueError(f"dense_revision={dense_revision!r} is where the packed model goes; name another branch")
    if dense_revision is not None and create_pr:
        raise ValueError("dense_revision and create_pr do not go together: push the dense variant to its branch")


def _check_storage(model: Any, plain: PreTrainedModel, dense_revision: str | None) -> None:
    if dense_revision is None:
        return
    if is_adapter(model):
        raise ValueError("dense_revision: an adapter has no dense variant; publish its base with one")
    if plain.config.quantization_config.storage == "dense":
        raise ValueError('dense_revision: the model has storage="dense" itself')


def _clean_token(token: bool | str | None) -> bool | str | None:
    """A token as it is read from a file, with a line break at its end, could not be sent, and would be shown."""
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token is empty, or has signs in it that a token cannot have")
    return token


def _save(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    variant: str | None,
    token: bool | str | None,
) -> None:
    """Everything but the card into an empty folder."""
    if not is_adapter(model):
        copy_own_processor(model, folder, token)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _drop(folder / "tokenizer_config.json", "is_local", "local_files_only")  # how it was loaded here
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
    else:
        model.save_pretrained(folder)
        results = current_results(model)
        if results is not None:
            results.save(folder)
    tuning = facts_of(model).tuning
    if tuning is not None:  # without the path of a local base
        kept = {**tuning, "base": describe_source(tuning.get("base"))}
        write_text(folder / TUNING_NAME, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    configs = list(folder.rglob("adapter_config.json"))  # adapters with names of their own lie in folders
    for config in configs:
        _hide_local_base(config, sparse_part(model))
    if configs:
        (folder / CARD_NAME).unlink(missing_ok=True)  # PEFT's form, with the path of a local base in it
        (folder / REPORT_NAME).unlink(missing_ok=True)  # the base's own


def _drop(config: Path, *names: str) -> None:
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        kept = {name: value for name, value in settings.items() if name not in names}
        write_text(config, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _hide_local_base(config: Path, base: PreTrainedModel) -> None:
    """PEFT writes the path of a local base model into an adapter's config."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    name = settings.get("base_model_name_or_path")
    settings["base_model_name_or_path"] = describe_model(base) if name == base.name_or_path else describe_source(name)
    write_text(config, json.dumps(settings, indent=2, sort_keys=True))


@contextmanager
def _dense_storage(model: PreTrainedModel) -> Iterator[None]:
    config = model.config.quantization_config
    config.storage = "dense"
    try:
        yield
    finally:
        config.storage = "packed"
