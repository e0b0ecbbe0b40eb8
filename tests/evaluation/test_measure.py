"""A sparse model and its dense baseline measured by one protocol; the fingerprint that ties figures to weights."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import fingerprint, sparse_modules
from optimum_ksparse.evaluation import (
    TASKS,
    Baseline,
    EvaluationProtocol,
    EvaluationResults,
    HarnessTask,
    evaluate_baseline,
    evaluate_kobest,
    evaluate_model,
    evaluate_perplexity,
    measure,
    recorded_baseline,
    set_aside,
)
from optimum_ksparse.evaluation.results import RESULTS_NAME

from ..conftest import sample_texts, thinned
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
KINDS: dict[Any, str] = {type(TASKS["perplexity"]): "perplexity", HarnessTask: "kobest"}
TEXTS = [text[:60] for text in sample_texts("evaluation")[:2]]


@pytest.fixture
def dense(tmp_path: Path, make_model: MakeModel, tokenizer: Tokenizer) -> Path:
    """A folder with a tiny dense Llama and its tokenizer."""
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def model(dense: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(dense, sparsity_config=SparsityConfig("magnitude", "2:4"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Four items of SentiNeg."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    rows = [{"sentence": text[:20], "label": i % 2} for i, text in enumerate(sample_texts("evaluation")[:4])]
    folder = tmp_path / "kobest/sentineg"
    folder.mkdir(parents=True)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "kobest"


@pytest.fixture
def protocol(data_dir: Path) -> EvaluationProtocol:
    return EvaluationProtocol(TEXTS, seq_len=16, tasks=["sentineg"], data_dir=data_dir)


@pytest.fixture
def words() -> EvaluationProtocol:
    """Perplexity alone."""
    return EvaluationProtocol(TEXTS, seq_len=16, tasks=())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each measurement was taken."""
    counts: Counter[str] = Counter()
    for kind, name in KINDS.items():

        def measure(self: Any, *args: Any, inner: Any = kind.measure, name: str = name) -> Any:
            counts[name] += 1
            return inner(self, *args)

        monkeypatch.setattr(kind, "measure", measure)
    return counts


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[PreTrainedModel]]:
    """The baselines that were loaded."""
    found: list[weakref.ref[PreTrainedModel]] = []
    load = Baseline.load

    def watched(self: Baseline, *args: Any) -> PreTrainedModel:
        model = load(self, *args)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Baseline, "load", watched)
    return found


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "fingerprint", lambda *_, **__: pytest.fail("fingerprint was called"))
    for kind in KINDS:
        monkeypatch.setattr(kind, "measure", lambda *_: pytest.fail("a task was measured"))


def change_one_weight(model: nn.Module, name: str = "model.norm.weight") -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1


# The protocol


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": [1]}, TypeError, "texts is list"),
        ({"texts": 5}, TypeError, "texts is int"),
        ({"texts": "한 줄의 글"}, ValueError, "texts='한 줄의 글' is not known; allowed: \"kowiki\""),
        ({"texts": "nowhere.txt"}, FileNotFoundError, "texts='nowhere.txt': there is no such file"),
        ({"seq_len": 1}, ValueError, "seq_len=1 is too small, it must be at least 2"),
        ({"seq_len": 16.0}, TypeError, "seq_len must be an integer"),
        ({"stride": 0}, ValueError, "stride=0"),
        ({"stride": True}, TypeError, "stride must be an integer"),
        ({"seq_len": 16, "stride": 16}, ValueError, "stride=16"),
        ({"max_tokens": 1}, ValueError, "max_tokens=1"),
        ({"tasks": ["coppa"]}, ValueError, "'coppa' is not a task; did you mean 'copa'"),
        ({"tasks": "copa"}, TypeError, "tasks must be a list"),
        ({"num_fewshot": -1}, ValueError, "num_fewshot=-1"),
        ({"num_fewshot": None}, TypeError, "num_fewshot must be an integer"),
        ({"limit": 0}, ValueError, "limit=0"),
        ({"limit": True}, TypeError, "limit must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": "auto"}, TypeError, "batch_size must be an integer"),
        ({"prepend_bos": "yes"}, TypeError, "prepend_bos must be True, False or None"),
        ({"prepend_bos": 1}, TypeError, "prepend_bos must be True, False or None"),
        ({"texts": None, "tasks": []}, ValueError, "there is nothing to measure"),
        ({"data_dir": "nowhere"}, FileNotFoundError, "data_dir has no copa/test.jsonl"),
    ],
)
def test_protocol_names_what_is_out_of_range(arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EvaluationProtocol(**{"texts": TEXTS, **arguments})


def test_protocol_reads_the_items(data_dir: Path) -> None:
    path = data_dir / "sentineg/train.jsonl"
    path.write_text('{"sentence": "좋다", "label": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match="sentineg/train.jsonl, line 1: label=2"):
        EvaluationProtocol(TEXTS, tasks=["sentineg"], num_fewshot=1, data_dir=data_dir)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="num_fewshot=1 needs sentineg/train.jsonl"):
        EvaluationProtocol(TEXTS, tasks=["sentineg"], num_fewshot=1, data_dir=data_dir)


@pytest.mark.parametrize(("context", "expected"), [(512, 512), (4096, 2048), (None, 2048)])
def test_windows_are_as_long_as_the_context_up_to_2048(
    context: int | None,
    expected: int,
    make_model: MakeModel,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optimum_ksparse.evaluation.perplexity.context_length", lambda model: context)
    requests = EvaluationProtocol(TEXTS, tasks=()).requests(make_model(), tokenizer)
    assert requests["perplexity"]["seq_len"] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"protocol": {"texts": TEXTS}}, TypeError, "protocol must be an EvaluationProtocol, found dict"),
        ({"model": None}, TypeError, "model must be a transformers PreTrainedModel, found NoneType"),
        ({"tokenizer": None}, TypeError, "tokenizer must be the model's tokenizer, found NoneType"),
        ({"protocol": EvaluationProtocol(TEXTS, seq_len=513, tasks=())}, ValueError, "seq_len=513 is above"),
        ({"protocol": EvaluationProtocol(TEXTS, stride=512, tasks=())}, ValueError, "stride=512"),
        ({"baseline": True}, ValueError, "the model is dense: it is its own baseline"),
    ],
)
def test_what_would_fail_later_is_found_before_any_work(
    arguments: dict,
    error: type[Exception],
    match: str,
    make_model: MakeModel,
    tokenizer: Tokenizer,
    words: EvaluationProtocol,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_work(monkeypatch)
    given = {
        "model": make_model(max_position_embeddings=512),
        "tokenizer": tokenizer,
        "protocol": words,
        **arguments,
    }
    with pytest.raises(error, match=match):
        evaluate_model(**given)


def test_missing_beginning_token_is_found_before_any_work(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_work(monkeypatch)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no beginning token"):
        evaluate_model(make_model(), bare, EvaluationProtocol(TEXTS, seq_len=16, tasks=(), prepend_bos=True))


def test_missing_harness_is_found_before_any_work(
    model: PreTrainedModel, tokenizer: Tokenizer, protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_work(monkeypatch)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install .*lm-eval"):
        evaluate_model(model, tokenizer, protocol)


@pytest.mark.slow
def test_what_is_asked_for_is_what_was_measured(
    model: PreTrainedModel, tokenizer: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS * 50)]
    monkeypatch.setattr("optimum_ksparse.data.texts.stream", lambda *_, **__: iter(articles))
    for texts in ("kowiki", TEXTS, tuple(TEXTS)):
        asked = EvaluationProtocol(
            texts, stride=7, max_tokens=40, num_fewshot=1, limit=2, tasks=["sentineg"], data_dir=data_dir
        )
        requests = asked.requests(model, tokenizer)
        assert list(requests) == ["perplexity", "sentineg"]
        for name, request in requests.items():
            found = asked.measure(name, model, tokenizer)
            assert found.follows(request)
            assert not any(found.follows({**request, key: "?"}) for key in request)


# Measuring


def test_sparse_and_dense_rows_are_of_one_protocol(
    dense: Path, model: PreTrainedModel, tokenizer: Tokenizer, protocol: EvaluationProtocol, tmp_path: Path
) -> None:
    results = evaluate_model(model, tokenizer, protocol, baseline=True)
    assert model.ksparse.results is results
    assert results.fingerprint == fingerprint(model)
    assert (results.dense_model, results.dense_revision) == ("dense", None)
    assert [row.name for row in results.sparse] == [row.name for row in results.dense] == ["perplexity", "sentineg"]
    assert [ours.differences(other) for ours, other in results.pairs()] == [[], []]
    base = AutoModelForCausalLM.from_pretrained(dense)
    for measured, rows in ((model, results.sparse), (base, results.dense)):
        expected = evaluate_perplexity(measured, tokenizer, TEXTS, seq_len=16)
        assert rows[0].metrics["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
        expected = evaluate_kobest(measured, tokenizer, tasks=["sentineg"], data_dir=protocol.data_dir)
        assert rows[1].metrics["f1"] == expected["sentineg"]["f1"]
    assert results.sparse[0].metrics != results.dense[0].metrics
    results.save(tmp_path)
    assert EvaluationResults.load(tmp_path / RESULTS_NAME) == results


def test_nothing_is_measured_again(
    dense: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    protocol: EvaluationProtocol,
    calls: Counter[str],
    tmp_path: Path,
) -> None:
    first = copy.deepcopy(evaluate_model(model, tokenizer, protocol, baseline=True))
    assert calls == {"perplexity": 2, "kobest": 2}
    assert evaluate_model(model, tokenizer, protocol, baseline=True) == first
    model.ksparse.results.save(tmp_path)
    model.ksparse.results = EvaluationResults.load(tmp_path / RESULTS_NAME)
    assert evaluate_model(model, tokenizer, protocol, baseline=str(dense)) == first
    evaluate_baseline(model.ksparse.results, Baseline(str(dense), dtype=model.dtype), tokenizer, protocol)
    assert calls == {"perplexity": 2, "kobest": 2}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limit": 2}, {"kobest": 1}),
        ({"num_fewshot": 1}, {"kobest": 1}),
        ({"seq_len": 8}, {"perplexity": 1}),
        ({"texts": TEXTS[:1]}, {"perplexity": 1}),
        ({"prepend_bos": True}, {"perplexity": 1, "kobest": 1}),
        ({"prepend_bos": False, "batch_size": 2, "tasks": ()}, {}),
    ],
)
def test_what_another_protocol_asks_for_is_measured(
    change: dict,
    expected: dict[str, int],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    protocol: EvaluationProtocol,
    calls: Counter[str],
) -> None:
    before = evaluate_model(model, tokenizer, protocol).sparse
    calls.clear()
    results = evaluate_model(model, tokenizer, dataclasses.replace(protocol, **change))
    assert calls == expected
    assert len(results.sparse) == (3 if "num_fewshot" in change else 2)
    assert results.sparse is before


@pytest.mark.slow
def test_another_dtype_is_measured_again(
    dense: Path, model: PreTrainedModel, tokenizer: Tokenizer, words: EvaluationProtocol, calls: Counter[str]
) -> None:
    results = evaluate_model(model, tokenizer, words, baseline=True)
    evaluate_baseline(results, Baseline(str(dense), dtype=torch.bfloat16), tokenizer, words)
    assert calls["perplexity"] == 3
    assert [row.protocol["dtype"] for row in results.dense] == ["bfloat16"]
    assert results.pairs()[0][0].differences(results.dense[0]) == ["dtype"]
    half = evaluate_model(model.to(torch.bfloat16), tokenizer, words, baseline=True)
    assert calls["perplexity"] == 5
    assert half is not results
    assert [ours.differences(other) for ours, other in half.pairs()] == [[]]


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_results_are_kept_with_the_checkpoint(
    storage: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    words: EvaluationProtocol,
    calls: Counter[str],
    tmp_path: Path,
) -> None:
    model.config.quantization_config.storage = storage
    results = evaluate_model(model, tokenizer, words)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.ksparse.results == results
    assert evaluate_model(again, tokenizer, words) == results
    assert calls == {"perplexity": 1}


def test_results_of_other_weights_are_dropped(
    model: PreTrainedModel, tokenizer: Tokenizer, protocol: EvaluationProtocol, calls: Counter[str]
) -> None:
    before = evaluate_model(model, tokenizer, protocol, baseline=True)
    kept = copy.deepcopy(before)
    change_one_weight(model)
    after = evaluate_model(model, tokenizer, protocol)
    assert before == kept
    assert calls == {"perplexity": 3, "kobest": 3}
    assert model.ksparse.results is after is not before
    assert after.fingerprint != before.fingerprint
    assert (after.dense, after.dense_model) == ([], None)


def test_dense_model_is_measured_into_the_dense_column(
    dense: Path, tokenizer: Tokenizer, words: EvaluationProtocol
) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    results = evaluate_model(model, tokenizer, words)
    assert (results.sparse, results.dense_model, len(results.dense)) == ([], "dense", 1)
    with pytest.raises(ValueError, match="the model is dense: it is its own baseline"):
        evaluate_model(model, tokenizer, words, baseline=str(dense))


@pytest.mark.parametrize("fails_in", ["evaluate_kobest", "on_measured"])
def test_interrupt_keeps_what_was_measured_before_it(
    fails_in: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    protocol: EvaluationProtocol,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    told: list[list[str]] = []

    def on_measured(results: EvaluationResults) -> None:
        told.append([row.name for row in results.sparse])
        if fails_in == "on_measured":
            interrupt()

    with monkeypatch.context() as patch:
        if fails_in == "evaluate_kobest":
            patch.setattr(HarnessTask, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(model, tokenizer, protocol, on_measured=on_measured)
    assert told == [["perplexity"]]
    assert [row.name for row in model.ksparse.results.sparse] == ["perplexity"]
    evaluate_model(model, tokenizer, protocol, on_measured=lambda results: told.append([]))
    assert calls == {"perplexity": 1, "kobest": 1}
    assert told == [["perplexity"], []]


# The baseline


def test_recorded_baseline_of_a_folder(dense: Path, model: PreTrainedModel) -> None:
    assert recorded_baseline(model) == Baseline(str(dense))


def test_recorded_baseline_of_a_hub_id_with_its_commit(
    hub: LoopbackHub, dense: Path, tokenizer: Tokenizer, words: EvaluationProtocol, tmp_path: Path
) -> None:
    hub.add_repo("team/dense", {path.name: path.read_bytes() for path in dense.iterdir()})
    commit = hub.commits("team/dense")[-1].id
    model = AutoModelForCausalLM.from_pretrained("team/dense", sparsity_config=SparsityConfig("magnitude", "2:4"))
    hub.commit("team/dense", {"config.json": b"{}"}, "break it")
    assert recorded_baseline(model) == Baseline("team/dense", commit)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert recorded_baseline(again) == Baseline("team/dense", commit)
    results = evaluate_model(again, tokenizer, words, baseline=True)
    assert (results.dense_model, results.dense_revision) == ("team/dense", commit)
    assert len(results.comparable()) == 1


@pytest.mark.parametrize("missing", ["report", "name", "folder", "moved"])
def test_baseline_that_is_not_recorded_is_asked_for(
    missing: str, dense: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    match missing:
        case "report":
            model.ksparse.report = None
        case "name":
            model.sparsity_report.base_model = None
        case "folder":
            shutil.rmtree(dense)
        case "moved":
            model.save_pretrained(tmp_path / "saved")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="pass baseline=<Hub id or folder>") as error:
        recorded_baseline(model)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("form", [str, Path, lambda folder: Baseline(str(folder))])
def test_baseline_may_be_named(
    form: Callable[[Path], Any], dense: Path, model: PreTrainedModel, tokenizer: Tokenizer, words: EvaluationProtocol
) -> None:
    moved = dense.parent / "moved"
    dense.rename(moved)
    results = evaluate_model(model, tokenizer, words, baseline=form(moved))
    assert (results.dense_model, len(results.comparable())) == ("moved", 1)


@pytest.mark.slow
def test_another_baseline_drops_the_figures_of_the_one_before(
    dense: Path, model: PreTrainedModel, tokenizer: Tokenizer, protocol: EvaluationProtocol, words: EvaluationProtocol
) -> None:
    results = evaluate_model(model, tokenizer, protocol, baseline=True)
    other = AutoModelForCausalLM.from_pretrained(dense)
    change_one_weight(other)
    other.save_pretrained(dense.parent / "other")
    evaluate_model(model, tokenizer, words, baseline=str(dense.parent / "other"))
    assert (results.dense_model, [row.name for row in results.dense]) == ("other", ["perplexity"])


@pytest.mark.parametrize("wrong", thinned(["size", "packed", "sparse, stored dense"], ["packed"]))
def test_wrong_baseline_is_refused(
    wrong: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    words: EvaluationProtocol,
    make_model: MakeModel,
    calls: Counter[str],
    loaded: list[weakref.ref],
    tmp_path: Path,
) -> None:
    results = evaluate_model(model, tokenizer, words, baseline=True)
    before = copy.deepcopy(results)
    other = make_model(num_hidden_layers=1) if wrong == "size" else copy.deepcopy(model)
    if wrong == "sparse, stored dense":
        other.config.quantization_config.storage = "dense"
    other.save_pretrained(tmp_path / "other")
    match = "has .* parameters, the model that was pruned had .*: it is another model" if wrong == "size" else "sparse"
    with pytest.raises(ValueError, match=f"other.*{match}") as error:
        evaluate_model(model, tokenizer, words, baseline=str(tmp_path / "other"))
    assert str(tmp_path) not in str(error.value)
    assert results == before
    assert calls == {"perplexity": 2}
    del error
    gc.collect()
    assert [model() for model in loaded] == [None] * len(loaded)


@pytest.mark.parametrize("error", thinned([None, RuntimeError, KeyboardInterrupt], [KeyboardInterrupt]))
def test_baseline_is_freed(
    error: type[BaseException] | None,
    dense: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    words: EvaluationProtocol,
    loaded: list[weakref.ref],
) -> None:
    alive: list[bool] = []

    def on_measured(results: EvaluationResults) -> None:
        alive.append(loaded[0]() is not None)
        if error is not None:
            raise error

    results = EvaluationResults("")
    base = Baseline(str(dense), dtype=torch.float32)
    if error is None:
        evaluate_baseline(results, base, tokenizer, words, on_measured=on_measured)
    else:
        with pytest.raises(error):
            evaluate_baseline(results, base, tokenizer, words, on_measured=on_measured)
        gc.collect()
    assert alive == [True]
    assert loaded[0]() is None
    assert len(results.dense) == 1


@pytest.mark.parametrize("device", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_baseline_is_loaded_by_a_device_or_a_device_map(device: Any, dense: Path, model: PreTrainedModel) -> None:
    base = Baseline(str(dense), like=type(model), dtype=torch.bfloat16).load(device)
    assert (type(base), base.dtype, base.device.type) == (type(model), torch.bfloat16, "cpu")
    assert not sparse_modules(base)


def test_model_is_set_aside_where_it_has_one_device(dense: Path, model: PreTrainedModel) -> None:
    with set_aside(model) as device:
        assert device == torch.device("cpu")
    spread = AutoModelForCausalLM.from_pretrained(dense, device_map={"": "cpu"})
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with set_aside(spread) as device:
        assert device == "auto"


# The fingerprint


@pytest.fixture
def make_sparse(make_model: MakeModel) -> MakeModel:
    def make(name: str = "llama", pattern: str = "2:4", storage: str = "packed", **kwargs: Any) -> PreTrainedModel:
        model = make_model(name, **kwargs)
        sparsify(model, SparsityConfig("magnitude", pattern, storage=storage))
        return model

    return make


@pytest.mark.parametrize(
    ("name", "pattern", "shards", "storage"),
    [
        ("llama", "2:4", {"max_shard_size": "40KB"}, "packed"),
        ("gpt2", "50%", {}, "packed"),
        ("bloom", "2:4", {}, "dense"),
    ],
)
def test_fingerprint_outlives_saving_and_loading(
    name: str, pattern: str, shards: dict, storage: str, make_sparse: MakeModel, tmp_path: Path
) -> None:
    model = make_sparse(name, pattern, storage, dtype=torch.bfloat16)
    before = fingerprint(model)
    model.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_modules(again)
    assert fingerprint(again) == fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fingerprint_is_that_of_the_dense_twin(name: str, make_sparse: MakeModel) -> None:
    model = make_sparse(name)
    twin = copy.deepcopy(model)
    twin.dequantize()
    assert fingerprint(twin) == fingerprint(model)


def test_fingerprint_of_tied_weights(make_sparse: MakeModel, tmp_path: Path) -> None:
    model = make_sparse(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert fingerprint(again) == before
    again.lm_head.weight = nn.Parameter(again.lm_head.weight.detach().clone())
    assert fingerprint(again) == before


def tensor_names(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict(keep_vars=True).items()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fingerprint_is_another_after_one_weight_changes(name: str, make_sparse: MakeModel) -> None:
    model = make_sparse(name)
    seen = {fingerprint(model)}
    names = [key for key, _ in tensor_names(model) if not key.endswith("weight_mask")]
    for key in names:
        tensor = dict(tensor_names(model))[key].detach().view(-1)
        before = tensor[-1].clone()
        tensor[-1] = before + 1
        seen.add(fingerprint(model))
        tensor[-1] = before
    shared = sum(key == "lm_head.weight" for key in names) if name == "gpt2" else 0  # tied to the embedding
    assert len(seen) == 1 + len(names) - shared
    assert fingerprint(model) in seen


def test_fingerprint_is_another_after_the_mask_changes(make_sparse: MakeModel) -> None:
    model = make_sparse()
    before = fingerprint(model)
    mask = model.model.layers[0].mlp.up_proj.weight_mask
    mask[0, 0] = 0b1010_1010 if mask[0, 0] != 0b1010_1010 else 0b0101_0101
    assert fingerprint(model) != before


@pytest.mark.parametrize("place", ["", "lm_head", "model.layers.1.mlp.up_proj", "model.norm"])
def test_fingerprint_is_another_after_a_dtype_changes(place: str, make_sparse: MakeModel) -> None:
    model = make_sparse()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # so that no value changes
    before = fingerprint(model)
    model.get_submodule(place).to(torch.bfloat16)
    assert fingerprint(model) != before


def test_fingerprint_is_another_after_a_weight_becomes_like_another_one(make_sparse: MakeModel) -> None:
    model = make_sparse()
    norms = [layer.input_layernorm.weight for layer in model.model.layers]
    with torch.no_grad():
        norms[1].fill_(2)
        before = fingerprint(model)
        norms[0].fill_(2)  # as the other one is; that of ones is still in the model
    assert fingerprint(model) != before


def test_fingerprint_takes_minus_zero_for_zero(make_sparse: MakeModel, tmp_path: Path) -> None:
    model = make_sparse(storage="dense")
    with torch.no_grad():
        next(iter(sparse_modules(model).values())).weight[0, :2] = -0.0
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloaded_model_is_measured(
    where: str, make_sparse: MakeModel, tokenizer: Tokenizer, words: EvaluationProtocol, tmp_path: Path
) -> None:
    model = make_sparse()
    expected = evaluate_model(copy.deepcopy(model), tokenizer, words)
    folder = [tmp_path / "offload"] if where == "disk_offload" else []
    getattr(accelerate, where)(model, *folder, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    found = evaluate_model(model, tokenizer, words)
    assert found.fingerprint == expected.fingerprint
    assert found.sparse[0].metrics == pytest.approx(expected.sparse[0].metrics)
    assert model.lm_head.weight.device.type == "meta"
