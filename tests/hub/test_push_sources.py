"""What a push measures before it, and the tokenizer that it sends along."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import facts_of
from optimum_ksparse.evaluation import EvaluationProtocol, evaluate_perplexity

from ..conftest import HF_HOME
from ..loopback_hub import LoopbackHub
from .pushes import NAME, TEXT_ONLY, TEXTS, Tokenizer, card_of, created, make_dense, metadata, pushed, read, sent

pytest.importorskip("matplotlib", reason="needs the extra plot")

# --- Measuring before the push ---------------------------------------------------------------------------------------


def prune_from_hub(hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tmp_path: Path) -> PreTrainedModel:
    """A model that was pruned from the Hub, where a newer commit has come since."""
    hub.add_repo("org/tiny-base", read(base))
    model = AutoModelForCausalLM.from_pretrained(
        "org/tiny-base", sparsity_config=SparsityConfig(pattern="2:4", dataset=token_ids)
    )
    make_dense(seed=1).save_pretrained(tmp_path / "newer")
    hub.commit("org/tiny-base", read(tmp_path / "newer"), "Other weights")
    return model


@pytest.mark.slow
def test_the_dense_column_is_the_recorded_commit(
    hub: LoopbackHub,
    base: Path,
    tokenizer: Tokenizer,
    token_ids: torch.Tensor,
    tmp_path: Path,
    measured: list[str],
    naps: list[float],
) -> None:
    model = prune_from_hub(hub, base, token_ids, tmp_path)
    commit = hub.commits("org/tiny-base")[1].id
    hub.fail("/commit/", [500])
    with pytest.raises(ConnectionError, match=NAME):  # what was measured outlives a push that fails
        model.push_to_hub(NAME, evaluate=TEXT_ONLY)
    model.push_to_hub(NAME, evaluate=TEXT_ONLY)
    assert measured == ["perplexity"] * 2 and len(pushed(hub)) == 1
    results = model.ksparse.results
    assert (results.dense_model, results.dense_revision) == ("org/tiny-base", commit)
    dense = AutoModelForCausalLM.from_pretrained(base)
    expected = evaluate_perplexity(dense, tokenizer, TEXTS, seq_len=32)["perplexity"]
    assert results.dense[0].metrics["perplexity"] == expected != results.sparse[0].metrics["perplexity"]
    assert f"org/tiny-base (commit {commit})" in card_of(hub) and f"{expected:,.2f}" in card_of(hub)
    assert (metadata(hub)["base_model"], metadata(hub)["base_model_relation"]) == ("org/tiny-base", "quantized")


def test_a_base_that_cannot_be_found(
    hub: LoopbackHub, base: Path, quick: PreTrainedModel, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    gone = prune_from_hub(hub, base, token_ids, tmp_path)
    hub.reset()
    shutil.rmtree(HF_HOME / "hub")
    unrecorded = copy.copy(quick)
    unrecorded.ksparse = replace(quick.ksparse, report=None)
    cases: list[tuple[PreTrainedModel, Any, Any]] = [
        (unrecorded, None, base),
        (gone, None, base),
        (quick, base, False),
    ]
    cases += [(quick, str(tmp_path / "nothing"), base), (quick, "org/nothing", base)]
    for model, baseline, tokenizer in cases:
        with pytest.raises(ValueError, match="baseline|tokenizer"):
            model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=baseline, tokenizer=tokenizer)
    assert created(hub) == []


@pytest.mark.slow
def test_nothing_is_uploaded_where_measuring_fails(
    hub: LoopbackHub, base: Path, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = EvaluationProtocol.measure, []

    def measure(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(EvaluationProtocol, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        quick.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert sent(hub, "PUT") == sent(hub, "POST", "/commit/") == []
    quick.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert len(calls) == 3  # what had been measured was not measured again


@pytest.mark.slow
def test_results_of_other_weights_are_refused(
    hub: LoopbackHub, base: Path, quick: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    changed = AutoModelForCausalLM.from_pretrained(NAME)
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    hub.requests.clear()
    with pytest.raises(ValueError, match="other weights"):
        changed.push_to_hub(NAME)
    assert created(hub) == []
    changed.save_pretrained(tmp_path)
    assert not (tmp_path / "evaluation_results.json").exists()
    assert len([record for record in caplog.records if "other weights" in record.message]) == 1
    changed.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    again = AutoModelForCausalLM.from_pretrained(NAME).ksparse.results
    assert again == changed.ksparse.results != quick.ksparse.results


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer(hub: LoopbackHub, base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path / "tokenizer")
    hub.add_repo("org/tokenizer", read(tmp_path / "tokenizer"))
    sparsify(model := AutoModelForCausalLM.from_pretrained(base), SparsityConfig("magnitude", "2:4", tokenizer=other))
    given: list[Any] = [None, other, tmp_path / "tokenizer", "org/tokenizer"]  # None: that of the calibration
    for i, value in enumerate(given):
        model.push_to_hub(f"user/{i}", tokenizer=value)
        assert b"<other>" in hub.files(f"user/{i}")["tokenizer.json"]
    model.push_to_hub("user/without", tokenizer=False)
    assert "tokenizer.json" not in hub.files("user/without")
    model.save_pretrained(tmp_path / "sparse")
    hub.requests.clear()
    with pytest.raises(ValueError, match="tokenizer") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").push_to_hub(NAME)
    assert str(tmp_path) not in str(caught.value) and created(hub) == []


def test_the_commit_of_a_model_is_the_one_that_was_loaded(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    """And not the one that the cached branch is at when somebody asks."""
    hub.add_repo("org/tiny-base", read(base))
    models = [cls.from_pretrained("org/tiny-base") for cls in (LlamaForCausalLM, AutoModelForCausalLM)]
    make_dense(seed=1, num_hidden_layers=2).save_pretrained(tmp_path / "newer")
    hub.commit("org/tiny-base", read(tmp_path / "newer"), "Other weights")
    AutoConfig.from_pretrained("org/tiny-base")
    first, newest = (commit.id for commit in pushed(hub, "org/tiny-base"))
    assert [facts_of(model).commit for model in models] == [first, first]
    assert facts_of(LlamaForCausalLM.from_pretrained("org/tiny-base")).commit == newest


def test_the_tokenizer_of_the_base_is_that_of_the_recorded_commit(
    hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = prune_from_hub(hub, base, token_ids, tmp_path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path / "tokenizer")
    hub.commit("org/tiny-base", read(tmp_path / "tokenizer"), "Another tokenizer")
    model.push_to_hub(NAME)
    assert b"<other>" not in hub.files(NAME)["tokenizer.json"]
