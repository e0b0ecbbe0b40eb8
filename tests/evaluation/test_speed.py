"""The decoding speed of whole models among the other results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse import SparsityConfig
from optimum_ksparse.evaluation import (
    KOBEST_TASKS,
    EvaluationProtocol,
    EvaluationResults,
    evaluate_model,
    results_table,
    speed,
)
from optimum_ksparse.evaluation.results import RESULTS_NAME

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
ASKED = EvaluationProtocol(None, tasks=["speed"])


@pytest.fixture
def dense(tmp_path: Path, make_model: MakeModel) -> Path:
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sparse(dense: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(dense, sparsity_config=SparsityConfig("magnitude"))


def test_sparse_and_dense_speed_stand_side_by_side_and_are_kept(
    dense: Path, sparse: PreTrainedModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = evaluate_model(sparse, tokenizer, ASKED, baseline=True)
    ((ours, other),) = results.comparable()
    assert ours.protocol == other.protocol
    assert ours.protocol["threads"] == torch.get_num_threads() and ours.protocol["machine"]
    assert (ours.protocol["prompt_tokens"], ours.protocol["new_tokens"]) == (256, 32)
    assert (ours.protocol["dtype"], ours.protocol["cuda_graph"]) == ("float32", False)
    assert min(ours.metrics["tokens_per_s"], other.metrics["tokens_per_s"]) > 0
    assert ours.recovered("tokens_per_s", other) == ours.metrics["tokens_per_s"] / other.metrics["tokens_per_s"]
    assert "tokens_per_s" in results_table(results)
    results.save(tmp_path)
    assert EvaluationResults.load(tmp_path / RESULTS_NAME) == results
    monkeypatch.setattr(speed, "decoding_speed", lambda *_: pytest.fail("measured again"))
    assert evaluate_model(sparse, tokenizer, ASKED, baseline=True) == results


@pytest.mark.parametrize("fact", [{"threads": 64}, {"machine": "another", "threads": None}])
def test_another_machine_or_number_of_threads_is_measured_anew_and_not_comparable(
    dense: Path, sparse: PreTrainedModel, tokenizer: Tokenizer, fact: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = speed.machine
    evaluate_model(sparse, tokenizer, ASKED, baseline=True)
    monkeypatch.setattr(speed, "machine", lambda device: {**here(device), **fact})
    results = evaluate_model(sparse, tokenizer, ASKED)
    assert len(results.sparse) == 1 and fact.items() <= results.sparse[0].protocol.items()
    assert results.comparable() == []
    assert set(results.sparse[0].differences(results.dense[0])) == set(fact)


def test_speed_is_measured_where_it_is_asked_for_alone() -> None:
    assert "speed" not in EvaluationProtocol().tasks
    both = EvaluationProtocol(tasks=[*KOBEST_TASKS, "speed"])
    assert [task.name for task in both.chosen] == ["perplexity", *KOBEST_TASKS, "speed"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("trained", [False, True])
def test_measuring_leaves_the_model_as_it_was(make_model: MakeModel, kind: str, trained: bool) -> None:
    model = make_model(kind).train(trained)
    ids = torch.arange(8)[None]
    prompt = speed.fitting_prompt(model, 64, 4)
    with torch.no_grad():
        before = model.eval()(ids).logits
        model.train(trained)
        per_second, is_graph = speed.decoding_speed(model, 2, prompt, 4)
        assert model.training is trained
        assert torch.equal(model.eval()(ids).logits, before)
    assert per_second > 0 and not is_graph


def test_a_prompt_leaves_room_in_the_context(make_model: MakeModel) -> None:
    model = make_model(max_position_embeddings=128)
    assert speed.fitting_prompt(model, 256, 32) == 128 - 32 - 16
    assert speed.fitting_prompt(model, 16, 32) == 16


def test_the_speed_is_the_median_step_with_every_sequence_of_the_batch(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a clock by which the first step takes 100 seconds, one later on 50 and all others 2."""
    model, passes, now = make_model(), [], [0.0]
    model.register_forward_hook(lambda module, args, output: passes.append(args[0].shape))
    lasts = iter([100.0, 2.0, 50.0, 2.0, 2.0, 2.0])

    def clock() -> float:
        now[0] += next(lasts) if len(passes) > clock.seen else 0.0  # type: ignore[attr-defined]
        clock.seen = len(passes)  # type: ignore[attr-defined]
        return now[0]

    clock.seen = 1  # type: ignore[attr-defined] # the prompt
    monkeypatch.setattr(speed.time, "perf_counter", clock)
    assert speed.decoding_speed(model, 3, 16, 5) == (1.5, False)
    assert passes == [(3, 16), *[(3, 1)] * 6]
