"""Publishing through the real client and the loopback Hub: one commit with everything in it, or nothing at all."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import PushToHubMixin

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import facts, facts_of, fingerprint, sparse_modules
from optimum_ksparse.commands import parse_words
from optimum_ksparse.evaluation import Baseline, EvaluationProtocol, evaluate_perplexity, read_tuning
from optimum_ksparse.hub.subject import Subject
from optimum_ksparse.integration import register

from ..conftest import HF_HOME, make_config, sample_texts
from ..loopback_hub import Commit, LoopbackHub

pytest.importorskip("matplotlib", reason="needs the extra plot")

torch.set_num_threads(1)

Tokenizer = PreTrainedTokenizerBase
TOKEN = "hf_loopback"
NAME = "user/name"
TEXTS = [text[:80] for text in sample_texts("evaluation")[:2]]
TEXT_ONLY = EvaluationProtocol(texts=TEXTS, seq_len=32, tasks=())
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
PLAIN_FILES = {"config.json", "generation_config.json", "model.safetensors", "sparsity_report.json"} | TOKENIZER_FILES
QUICK = PLAIN_FILES | {"README.md"}
UNEVALUATED = QUICK | {"relative_output_error.png"}
EVALUATED = UNEVALUATED | {"dense_and_sparse.png", "evaluation_results.json"}


def make_dense(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    more = {"max_position_embeddings": 256, "num_hidden_layers": 1, **overrides}
    return AutoModelForCausalLM.from_config(make_config("llama", **more))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("push") / "tiny-base"
    make_dense().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prune(source: Any, config: SparsityConfig, folder: Path, tokenizer: Tokenizer) -> Path:
    AutoModelForCausalLM.from_pretrained(source, sparsity_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(base: Path, tokenizer: Tokenizer, token_ids: torch.Tensor) -> Path:
    """A folder with the same model, pruned, and the tokenizer."""
    return prune(base, SparsityConfig(dataset=token_ids), base.parent / "tiny-sparse", tokenizer)


@pytest.fixture(scope="session")
def simple(base: Path, tokenizer: Tokenizer) -> Path:
    """A folder with a sparse model whose card has no figures, which take time."""
    return prune(base, SparsityConfig("magnitude"), base.parent / "tiny-simple", tokenizer)


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def quick(simple: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(simple)


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def pushed(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> list[Commit]:
    """The commits after the empty first one."""
    return hub.commits(name, revision)[1:]


def sent(hub: LoopbackHub, method: str, part: str = "") -> list[str]:
    return [request.path for request in hub.requests if request.method == method and part in request.path]


def created(hub: LoopbackHub) -> list[str]:
    """What was asked of the Hub that changes something there."""
    return [request.target for request in hub.requests if request.method not in ("GET", "HEAD")]


def card_of(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> str:
    return hub.files(name, revision)["README.md"].decode()


def metadata(hub: LoopbackHub, name: str = NAME) -> dict[str, Any]:
    return ModelCard(card_of(hub, name), ignore_metadata_errors=False).data.to_dict()


# --- One commit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the weights, and what is known of a model, are read."""
    counts: Counter[str] = Counter()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        return wrapper

    for name, module in list(sys.modules.items()):
        for function in (fingerprint, facts_of):
            if name.startswith("optimum_ksparse") and vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, counted(function))
    monkeypatch.setattr(Subject, "read", counted(Subject.read))
    return counts


def test_everything_is_one_commit_for_which_the_weights_are_read_once(
    hub: LoopbackHub, model: PreTrainedModel, base: Path, token_ids: torch.Tensor, calls: Counter[str]
) -> None:
    info = model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert (calls["fingerprint"], calls["read"]) == (1, 1)
    assert calls["facts_of"] < 40, "what is known of a model is passed on"
    (commit,) = pushed(hub)
    assert (commit.id, commit.message, set(commit.files)) == (info.oid, "Upload sparse model", EVALUATED)
    assert hub.unknown == []
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.sparsity_report == model.sparsity_report
    assert again.ksparse.results == model.ksparse.results
    assert AutoTokenizer.from_pretrained(NAME)("한국어").input_ids
    assert "](dense_and_sparse.png)" in card_of(hub) and "](relative_output_error.png)" in card_of(hub)
    calls.clear()
    assert model.push_to_hub(NAME).oid == info.oid  # no change makes no commit
    assert (calls["fingerprint"], calls["read"], len(pushed(hub))) == (1, 1, 1)
    model.ksparse.results = None
    model.push_to_hub(NAME)
    assert set(hub.files(NAME)) == UNEVALUATED and "model-index" not in card_of(hub)


def test_the_attributes_of_a_model_are_one(model: PreTrainedModel, base: Path) -> None:
    plain = set(vars(make_dense())) | {"_is_hf_initialized", "hf_quantizer", "is_quantized", "quantization_method"}
    added = {name for name in set(vars(model)) - plain if not name.startswith("_")}
    assert added <= {"ksparse", "quantization_config", "model_tags"}
    assert isinstance(model.ksparse, facts.ModelFacts) and model.sparsity_report is model.ksparse.report
    assert not hasattr(make_dense(), "sparsity_report")


def test_arguments_of_transformers(hub: LoopbackHub, quick: PreTrainedModel, tmp_path: Path) -> None:
    hub.required_token, hub.user = TOKEN, "somebody"
    more = {"commit_message": "한국어 message", "commit_description": "Why", "tags": ["korean", "sparse"]}
    info = quick.push_to_hub("name", token=TOKEN, max_shard_size="40KB", private=True, **more)
    assert info.commit_url.startswith(f"{hub.url}/somebody/name/commit/")
    (commit,) = pushed(hub, "somebody/name")
    assert (commit.message, commit.description) == ("한국어 message", "Why")
    assert hub.repo("somebody/name").private
    assert len([name for name in commit.files if name.endswith(".safetensors")]) > 2
    tags = metadata(hub, "somebody/name")["tags"]
    assert tags == ["optimum-ksparse", "sparse", "pruned", "magnitude", "2of4", "korean"]
    arguments = {"commit_message": "Saved", "language": "ko", "token": TOKEN, "variant": "fp32"}
    quick.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="user/other", **arguments)
    (commit,) = pushed(hub, "user/other")
    assert commit.message == "Saved" and "## 결과" in card_of(hub, "user/other")
    content = read(tmp_path / "folder")["model.fp32.safetensors"]
    assert hub.files("user/other")["model.fp32.safetensors"] == content


def test_signature_and_docstring_show_our_arguments_beside_those_of_transformers() -> None:
    plain = inspect.unwrap(PushToHubMixin.push_to_hub)
    ours, theirs = (inspect.signature(f).parameters for f in (PreTrainedModel.push_to_hub, plain))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {"evaluate", "baseline", "language", "dense_revision", "tokenizer"} <= set(ours)
    assert "dense_revision" in (PreTrainedModel.push_to_hub.__doc__ or "")
    before = inspect.signature(PreTrainedModel.push_to_hub), PreTrainedModel.push_to_hub.__doc__
    register()
    assert before == (inspect.signature(PreTrainedModel.push_to_hub), PreTrainedModel.push_to_hub.__doc__)


def test_branches_and_pull_requests(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"README.md": b"# Theirs\n", "notes.md": b"theirs"})
    for _ in range(2):
        quick.push_to_hub(NAME, revision="feature/sparse-1.0")
    assert [set(commit.changed) for commit in pushed(hub, revision="feature/sparse-1.0")[1:]] == [QUICK]
    info = quick.push_to_hub(NAME, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files(NAME, "refs/pr/1")) == QUICK | {"notes.md"}
    assert card_of(hub, revision="refs/pr/1").count("# Theirs") == 1
    assert hub.files(NAME) == {"README.md": b"# Theirs\n", "notes.md": b"theirs"}
    quick.push_to_hub(NAME, revision="refs/pr/1", language="ko")
    assert hub.commits(NAME, "refs/pr/1")[-1].changed == ["README.md"]


def test_what_is_not_sparse_is_pushed_as_transformers_does(
    hub: LoopbackHub, tokenizer: Tokenizer, quick: PreTrainedModel
) -> None:
    bert = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    values: list[Any] = [make_dense(), BertModel(bert), quick.dequantize(), tokenizer, make_config("llama")]
    plain = inspect.unwrap(PushToHubMixin.push_to_hub)
    for i, value in enumerate(values):
        for folder, push in (("user", type(value).push_to_hub), ("other", plain)):
            push(value, f"{folder}/name-{i}", private=True, commit_message="Mine", token=TOKEN)
        files = hub.files(f"user/name-{i}")
        assert files == hub.files(f"other/name-{i}")
        assert not any(b"optimum-ksparse" in content for content in files.values())
        with pytest.raises(TypeError, match="evaluate"):
            value.push_to_hub(NAME, evaluate=True)


# --- What is there already -------------------------------------------------------------------------------------------

EXTRA = {
    "notes.md": b"mine",
    ".gitattributes": b"*.bin filter=lfs\n",
    "model-q4.gguf": b"\0mine",
    "onnx/model.safetensors": b"mine",
    "checkpoint-1/model-00001-of-00002.safetensors": b"mine",
    "model.fp16.safetensors": b"mine",  # another variant
}


def test_what_a_person_wrote_stays_and_outdated_weights_go(
    hub: LoopbackHub, quick: PreTrainedModel, token_ids: torch.Tensor
) -> None:
    quick.push_to_hub(NAME, max_shard_size="40KB")
    outdated = {name for name in hub.files(NAME) if name.startswith("model")}
    assert len(outdated) > 3
    front, section = card_of(hub).removeprefix("---\n").split("---\n", 1)
    person = {"license": "mit", "widget": [{"text": "안녕"}], "base_model": "somebody/else"}
    person |= {"tags": ["mine", "4of8", "wanda"], "pipeline_tag": "summarization"}
    front = yaml.safe_dump({**yaml.safe_load(front), **person}, allow_unicode=True)
    mine = f"---\n{front}---\n\n# 내 글\n\n앞 | <b>text</b>\n\n{section.strip()}\n\n뒤 `text`\n"
    hub.commit(NAME, {"README.md": mine.encode(), **EXTRA}, "Mine")
    quick.push_to_hub(NAME, language="ko")
    assert set(hub.commits(NAME)[-1].changed) == outdated | {"model.safetensors", "README.md"}
    assert {name: hub.files(NAME)[name] for name in EXTRA} == EXTRA
    text = card_of(hub).split("---\n", 2)[2]
    assert text.startswith("\n# 내 글\n\n앞 | <b>text</b>\n\n<!--") and text.endswith("-->\n\n뒤 `text`\n")
    kept = metadata(hub)
    assert {name: kept[name] for name in ("license", "widget", "pipeline_tag")} == {
        name: person[name] for name in ("license", "widget", "pipeline_tag")
    }
    assert kept["tags"] == ["mine", "optimum-ksparse", "sparse", "pruned", "magnitude", "2of4"]
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(logits(again, token_ids), logits(quick, token_ids))
    again.push_to_hub(NAME, language="ko")
    assert len(pushed(hub)) == 3  # no change of a model from the Hub makes no commit


def test_a_card_with_damaged_metadata_stays_as_it_is(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"README.md": b"---\na: [\n---\n# Theirs\n"})
    with pytest.raises(ValueError, match=r"README\.md"):
        quick.push_to_hub(NAME)
    assert set(hub.files(NAME)) == {"README.md"}


def test_dense_revision(hub: LoopbackHub, quick: PreTrainedModel, token_ids: torch.Tensor) -> None:
    for _ in range(2):
        quick.push_to_hub(NAME, dense_revision="dense", commit_message="Both")
    assert [commit.message for commit in pushed(hub)] == ["Both"]
    assert [commit.message for commit in pushed(hub, revision="dense")] == ["Both"]
    assert set(hub.files(NAME)) == set(hub.files(NAME, "dense")) == QUICK
    assert "quantization_config" not in json.loads(hub.files(NAME, "dense")["config.json"])
    assert 'revision="dense"' in card_of(hub)
    assert 'from_pretrained("user/name", revision="dense")' in card_of(hub, revision="dense")
    assert quick.config.quantization_config.storage == "packed"
    again = AutoModelForCausalLM.from_pretrained(NAME, revision="dense")
    assert sparse_modules(again).keys() == sparse_modules(quick).keys()
    assert torch.equal(logits(again, token_ids), logits(quick, token_ids))
    again.push_to_hub("user/dense", tokenizer=False)
    assert "plain transformers loads them" in card_of(hub, "user/dense")
    with pytest.raises(ValueError, match="dense_revision"):
        again.push_to_hub("user/dense", dense_revision="dense")


WRONG: list[dict[str, Any]] = [
    {"dense_revision": "main"},
    {"dense_revision": "a", "revision": "a"},
    {"dense_revision": "a", "create_pr": True},
    {"language": "de"},
    *({"revision": name} for name in ("", "a b", "a..b", "a\n", "/a", ".a", "a//b", "a.lock", "이름")),
    *({"repo_id": name} for name in ("bad name", "a/b/c", "", "../x", "user/name.git", "user/이름", None, 5)),
    {"evaluate": "yes"},
    {"tokenizer": 1},
    {"evalute": True},
]


def test_arguments_that_cannot_be_right(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    for arguments in WRONG:
        with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
            quick.push_to_hub(**{"repo_id": NAME, **arguments})
    assert created(hub) == []


# --- Measuring before the push ---------------------------------------------------------------------------------------


def prune_from_hub(hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tmp_path: Path) -> PreTrainedModel:
    """A model that was pruned from the Hub, where a newer commit has come since."""
    hub.add_repo("org/tiny-base", read(base))
    model = AutoModelForCausalLM.from_pretrained("org/tiny-base", sparsity_config=SparsityConfig(dataset=token_ids))
    make_dense(seed=1).save_pretrained(tmp_path / "newer")
    hub.commit("org/tiny-base", read(tmp_path / "newer"), "Other weights")
    return model


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
    sparsify(model := AutoModelForCausalLM.from_pretrained(base), SparsityConfig("magnitude", tokenizer=other))
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


# --- A Hub or a network that fails -----------------------------------------------------------------------------------

# kind of request → path, method
REQUESTS: dict[str, tuple[str, str]] = {
    "create": ("^/api/repos/create", "POST"),
    "branch": ("/branch/", "POST"),
    "info": (r"^/api/models/user/name(/revision/.*)?$", "GET"),
    "card": ("/resolve/.*/README.md", "GET"),
    "preupload": ("/preupload/", "POST"),
    "batch": ("/objects/batch", "POST"),
    "upload": ("^/lfs/", "PUT"),
    "commit": ("/commit/", "POST"),
}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_an_error_that_stays(
    hub: LoopbackHub, quick: PreTrainedModel, simple: Path, naps: list[float], scratch: Path
) -> None:
    before = read(simple)
    hub.add_repo(NAME, {"README.md": b"# Theirs\n"})
    cases = [(kind, 500, ConnectionError) for kind in REQUESTS]
    # Another status is another sentence, wherever it comes from.
    cases += [("info", 401, PermissionError), ("commit", 403, PermissionError)]
    for kind, status, error in cases:
        path, method = REQUESTS[kind]
        hub.fail(path, [status] * 1000, method=method)
        with pytest.raises(error, match=NAME):
            quick.push_to_hub(NAME, revision="other")
        hub._faults.clear()
    assert [len(hub.commits(NAME, ref.removeprefix("refs/heads/"))) for ref in hub.repo(NAME).refs] in ([2], [2, 2])
    assert read(simple) == before and list(scratch.iterdir()) == []
    quick.push_to_hub(NAME, revision="other")
    assert set(hub.files(NAME, "other")) == QUICK


def test_an_upload_that_breaks_off(hub: LoopbackHub, naps: list[float], scratch: Path) -> None:
    model = make_dense(hidden_size=256, intermediate_size=1024)
    sparsify(model, SparsityConfig("magnitude"))
    hub.cut("^/lfs/", after_bytes=200_000, times=1000)
    with pytest.raises(ConnectionError, match=NAME):
        model.push_to_hub(NAME, tokenizer=False)
    assert (pushed(hub), hub.repo(NAME).objects, list(scratch.iterdir())) == ([], {}, [])
    hub._faults.clear()
    hub.cut("^/lfs/", after_bytes=200_000)  # once: the client tries again
    model.push_to_hub(NAME, tokenizer=False)
    assert len(pushed(hub)) == 1


def test_a_hub_that_is_not_there(hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("optimum_ksparse.hub.push.HfApi", lambda **kwargs: HfApi("http://127.0.0.1:9", **kwargs))
    with pytest.raises(ConnectionError, match="ConnectError"):
        quick.push_to_hub(NAME)
    assert hub.requests == []


@pytest.mark.parametrize("times", [1, 3])
def test_somebody_else_commits_in_between(
    times: int, hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(NAME, {"README.md": b"# Old\n"})
    original, calls = HfApi.create_commit, []

    def create_commit(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) <= times:
            theirs = f"---\nlicense: mit\n---\n# Theirs {len(calls)}\n".encode()
            hub.commit(NAME, {"README.md": theirs, "notes.md": b"theirs"}, "Theirs")
        return original(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    if times == 3:
        with pytest.raises(ConnectionError, match=NAME):
            quick.push_to_hub(NAME)
        assert {commit.message for commit in pushed(hub)} == {"Add files", "Theirs"}
        return
    quick.push_to_hub(NAME)
    assert [commit.message for commit in pushed(hub)] == ["Add files", "Theirs", "Upload sparse model"]
    assert "# Old" not in card_of(hub) and card_of(hub).count("# Theirs") == 1
    assert metadata(hub)["license"] == "mit" and set(hub.files(NAME)) == QUICK | {"notes.md"}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LoopbackHub, quick: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.create_commit

    def create_commit(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise HTTPError("the answer was lost")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    with pytest.raises(ConnectionError, match="push again"):
        quick.push_to_hub(NAME)
    monkeypatch.setattr(HfApi, "create_commit", original)
    info = quick.push_to_hub(NAME)
    assert [commit.id for commit in pushed(hub)] == [info.oid]


INTERRUPTED = {
    "saving": "transformers.modeling_utils.safe_save_file",
    "the card": "optimum_ksparse.hub.push.write_card_of",
    "the upload": "huggingface_hub._commit_api._upload_lfs_files",
    "the commit": "huggingface_hub._commit_api._send_commit",
}


@pytest.mark.parametrize(("place", "fatal"), [*((place, 1) for place in INTERRUPTED), ("the commit", 2)])
def test_interrupt(
    place: str, fatal: int, hub: LoopbackHub, quick: PreTrainedModel, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first commit, or in that of the dense variant: what was committed before stays whole."""
    path, calls = INTERRUPTED[place], []
    module, name = path.rsplit(".", 1)
    original = getattr(importlib.import_module(module), name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(path, interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [fatal - 1, 0]
    assert list(scratch.iterdir()) == [] and quick.config.quantization_config.storage == "packed"
    quick.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [1, 1]


# --- Nothing of this machine -----------------------------------------------------------------------------------------


def test_a_token_is_shown_nowhere(hub: LoopbackHub, quick: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """As a file with a token in it is read; httpx2 names the header that cannot be sent."""
    caplog.set_level(logging.DEBUG)
    hub.required_token = TOKEN
    token = "hf_MARKEDtoken\n"
    with pytest.raises(PermissionError) as caught:
        quick.push_to_hub(NAME, token=token)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "hf_MARKED" not in told.replace(r'"hf_MARKEDtoken\n"', "")


def test_nothing_tells_of_the_machine(
    hub: LoopbackHub, base: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, base and tokenizer in folders whose names are secret; from elsewhere "secret/base" reads like a name on
    the Hub."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    shutil.copytree(base, tmp_path / "secret/base")
    (tmp_path / "secret/calibration.txt").write_text("\n\n".join(TEXTS * 20), encoding="utf-8")
    (tmp_path / "secret/held out.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = {"tokenizer": str(tmp_path / "secret/base"), "num_samples": 2, "seq_len": 16}
    config = SparsityConfig(dataset=str(tmp_path / "secret/calibration.txt"), **settings)
    model = AutoModelForCausalLM.from_pretrained("secret/base", sparsity_config=config)
    monkeypatch.chdir(tmp_path / "secret")
    protocol = EvaluationProtocol(texts=str(tmp_path / "secret/held out.txt"), seq_len=32, tasks=())
    model.push_to_hub(NAME, evaluate=protocol, baseline=tmp_path / "secret/base", dense_revision="dense")
    model.save_pretrained(tmp_path / "secret/saved")
    monkeypatch.chdir(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained("secret/saved")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    peft.get_peft_model(reloaded, lora, adapter_name="korean").push_to_hub("user/adapter", tokenizer=False)
    refs = [(NAME, "main"), (NAME, "dense"), ("user/adapter", "main")]
    files = {f"{name}@{ref}/{path}": content for name, ref in refs for path, content in hub.files(name, ref).items()}
    files |= read(tmp_path / "secret/saved")
    assert len(files) > 20
    assert [path for path, content in files.items() if b"secret" in content or bytes(tmp_path) in content] == []
    assert not any(b"secret" in request.body for request in hub.requests)
    for content in (content for path, content in files.items() if path.endswith(".png")):
        assert not any(kind in content for kind in (b"tEXt", b"iTXt", b"tIME", b"eXIf"))


# --- Adapters --------------------------------------------------------------------------------------------------------


def lora(model: PreTrainedModel, kind: str) -> Any:
    """A model with a LoRA adapter that has been trained a little, by PEFT or by transformers."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM")
    if kind == "peft":
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_an_adapter(
    kind: str, hub: LoopbackHub, simple: Path, base: Path, token_ids: torch.Tensor, calls: Counter[str]
) -> None:
    """The base's own results are not the adapter's, and the adapter's are measured with it."""
    AutoModelForCausalLM.from_pretrained(simple).push_to_hub("user/sparse", evaluate=TEXT_ONLY, baseline=base)
    plain = AutoModelForCausalLM.from_pretrained("user/sparse")
    plain.ksparse.tuning = {"task": "koalpaca", "base": str(simple), "r": 8}  # as `load_checkpoint` sets it
    model = lora(plain, kind)
    expected = logits(model, token_ids)
    for _ in range(2):
        calls.clear()
        model.push_to_hub("user/adapter")
        assert calls["fingerprint"] <= 1  # the base's results might be the adapter's
    (commit,) = pushed(hub, "user/adapter")
    files = {"adapter_config.json", "adapter_model.safetensors", "ksparse_adapter.json", "finetuning.json"}
    assert set(commit.files) - {"generation_config.json"} == files | TOKENIZER_FILES | {"README.md"}
    assert commit.message == "Upload adapter"
    front = metadata(hub, "user/adapter")
    assert (front["base_model"], front["base_model_relation"]) == ("user/sparse", "adapter")
    assert json.loads(commit.files["adapter_config.json"].content)["base_model_name_or_path"] == "user/sparse"
    assert read_tuning("user/adapter") == {**plain.ksparse.tuning, "base": "tiny-simple"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("user/adapter").eval(), token_ids), expected)
    plain.ksparse.tuning = None
    calls.clear()
    model.push_to_hub("user/adapter", evaluate=TEXT_ONLY, baseline=base)
    assert calls["fingerprint"] == 1
    results, of_base = (
        json.loads(hub.files(name)["evaluation_results.json"]) for name in ("user/adapter", "user/sparse")
    )
    assert results["dense"][0]["metrics"] == of_base["dense"][0]["metrics"]
    assert results["sparse"][0]["metrics"] != of_base["sparse"][0]["metrics"]
    assert "sparse with this adapter" in card_of(hub, "user/adapter")
    with pytest.raises(ValueError, match="dense_revision"):
        model.push_to_hub("user/adapter", dense_revision="dense")


def test_an_adapter_and_a_model_in_one_place(
    hub: LoopbackHub, quick: PreTrainedModel, simple: Path, base: Path, token_ids: torch.Tensor
) -> None:
    """An adapter's files beside a model would be loaded, with the adapter's base, in its place."""
    lora(AutoModelForCausalLM.from_pretrained(simple), "peft").push_to_hub(NAME)
    quick.push_to_hub(NAME)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(NAME), token_ids), logits(quick, token_ids))
    before = set(hub.files(NAME))
    lora(AutoModelForCausalLM.from_pretrained(NAME), "peft").push_to_hub(NAME)
    assert before <= set(hub.files(NAME))
    lora(AutoModelForCausalLM.from_pretrained(base), "peft").push_to_hub("user/dense")
    assert "optimum-ksparse" not in card_of(hub, "user/dense")


def test_a_private_baseline_is_loaded_with_its_token(hub: LoopbackHub, base: Path) -> None:
    hub.add_repo("user/dense", read(base), private=True)
    hub.required_token = TOKEN
    model = Baseline("user/dense", None, {"token": TOKEN}).load(AutoModelForCausalLM, torch.float32, "cpu")
    assert model.num_parameters() > 0
    shutil.rmtree(HF_HOME / "hub")
    with pytest.raises(OSError, match="user/dense"):
        Baseline("user/dense").load(AutoModelForCausalLM, torch.float32, "cpu")


def test_a_base_that_only_a_file_names_is_not_asked_for_its_card(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    theirs = b"---\nlicense: apache-2.0\nlanguage: [ko, 7]\npipeline_tag: text-generation\n---\n"
    hub.add_repo("org/tiny-base", {**read(base), "README.md": theirs})
    model = AutoModelForCausalLM.from_pretrained("org/tiny-base", sparsity_config=SparsityConfig("magnitude"))
    assert model.sparsity_report.base_card == {"license": "apache-2.0", "pipeline_tag": "text-generation"}
    model.save_pretrained(tmp_path / "sparse")
    hub.requests.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").push_to_hub(NAME, tokenizer=False)
    assert not sent(hub, "GET", "tiny-base") + sent(hub, "HEAD", "tiny-base")
    assert metadata(hub)["license"] == "apache-2.0"


def test_the_command_goes_on_from_the_card_in_the_folder(
    hub: LoopbackHub, simple: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(simple, tmp_path / "sparse")
    (folder / "README.md").write_text("Mine.\n", encoding="utf-8")
    assert parse_words(["push", str(folder), NAME]).run() == 0
    assert "published: " in capsys.readouterr().out and "Mine." in card_of(hub)
