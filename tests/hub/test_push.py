"""Publishing through the real client and the loopback Hub: one commit with everything in it, or nothing at all."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import PushToHubMixin

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.commands import parse_words
from optimum_ksparse.evaluation import Baseline, EvaluationProtocol, evaluate_model, evaluate_perplexity, read_tuning
from optimum_ksparse.integration import register

from ..conftest import HF_HOME, make_config, sample_texts
from ..loopback_hub import Commit, LoopbackHub

pytest.importorskip("matplotlib", reason="needs the extra plot")

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
TOKEN = "hf_loopback"
NAME = "user/name"
TEXTS = [text[:80] for text in sample_texts("evaluation")[:2]]
TEXT_ONLY = EvaluationProtocol(texts=TEXTS, seq_len=32, tasks=())
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
PLAIN_FILES = {"config.json", "generation_config.json", "model.safetensors", "sparsity_report.json"} | TOKENIZER_FILES
FIGURES = {"relative_output_error.png", "dense_and_sparse.png"}
QUICK = PLAIN_FILES | {"README.md"}
UNEVALUATED = QUICK | {"relative_output_error.png"}
EVALUATED = UNEVALUATED | FIGURES | {"evaluation_results.json"}
SECTION = re.compile(r"<!-- optimum-ksparse: begin.*<!-- optimum-ksparse: end -->", re.DOTALL)


# --- Models and helpers ----------------------------------------------------------------------------------------------


def make_dense(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config("llama", **{"max_position_embeddings": 256, **overrides}))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("push") / "tiny-base"
    make_dense().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(base: Path, tokenizer: Tokenizer, token_ids: torch.Tensor) -> Path:
    """A folder with the same model, pruned, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, sparsity_config=SparsityConfig(dataset=token_ids))
    model.save_pretrained(base.parent / "tiny-sparse")
    tokenizer.save_pretrained(base.parent / "tiny-sparse")
    return base.parent / "tiny-sparse"


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def simple(base: Path, tokenizer: Tokenizer) -> Path:
    """A folder with a sparse model whose card has no figures, which take time."""
    sparsify(model := AutoModelForCausalLM.from_pretrained(base), SparsityConfig("magnitude"))
    model.save_pretrained(base.parent / "tiny-simple")
    tokenizer.save_pretrained(base.parent / "tiny-simple")
    return base.parent / "tiny-simple"


@pytest.fixture
def quick(simple: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(simple)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def pushed(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> list[Commit]:
    """The commits after the empty first one."""
    return hub.commits(name, revision)[1:]


def changes(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> list[list[str]]:
    return [commit.changed for commit in pushed(hub, name, revision)]


def sent(hub: LoopbackHub, method: str, part: str = "") -> list[str]:
    return [request.path for request in hub.requests if request.method == method and part in request.path]


def created(hub: LoopbackHub) -> list[str]:
    """What was asked of the Hub that changes something there."""
    return [request.target for request in hub.requests if request.method not in ("GET", "HEAD")]


def card_of(hub: LoopbackHub, name: str = NAME, revision: str = "main") -> str:
    return hub.files(name, revision)["README.md"].decode()


def metadata(hub: LoopbackHub, name: str = NAME) -> dict[str, Any]:
    return ModelCard(card_of(hub, name), ignore_metadata_errors=False).data.to_dict()


def prune_from_hub(hub: LoopbackHub, base: Path, token_ids: torch.Tensor) -> PreTrainedModel:
    """A model that was pruned from the Hub, where a newer commit has come since."""
    name = "org/tiny-base"
    hub.add_repo(name, read(base))
    config = SparsityConfig(dataset=token_ids)
    model = AutoModelForCausalLM.from_pretrained(name, sparsity_config=config)
    make_dense(seed=1).save_pretrained(base.parent / "newer")
    hub.commit(name, read(base.parent / "newer"), "Other weights")
    return model


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# --- One commit ------------------------------------------------------------------------------------------------------


def test_everything_is_one_commit(
    hub: LoopbackHub, model: PreTrainedModel, base: Path, token_ids: torch.Tensor
) -> None:
    info = model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    (commit,) = pushed(hub)
    assert (commit.id, commit.message, set(commit.files)) == (info.oid, "Upload sparse model", EVALUATED)
    assert hub.unknown == []
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.sparsity_report == model.sparsity_report
    assert again.ksparse.results == model.ksparse.results
    assert AutoTokenizer.from_pretrained(NAME)("한국어").input_ids
    assert "](dense_and_sparse.png)" in card_of(hub)
    assert "](relative_output_error.png)" in card_of(hub)


@pytest.mark.parametrize("private", [None, False, True])
def test_private(private: bool | None, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    quick.push_to_hub(NAME, private=private)
    assert hub.repo(NAME).private is bool(private)


def test_arguments_of_transformers(hub: LoopbackHub, model: PreTrainedModel) -> None:
    hub.required_token, hub.user = TOKEN, "somebody"
    more = {"commit_message": "한국어 message", "commit_description": "Why", "tags": ["korean", "sparse"]}
    info = model.push_to_hub("name", token=TOKEN, max_shard_size="40KB", **more)
    assert info.commit_url.startswith(f"{hub.url}/somebody/name/commit/")
    (commit,) = pushed(hub, "somebody/name")
    assert (commit.message, commit.description) == ("한국어 message", "Why")
    assert len([name for name in commit.files if name.endswith(".safetensors")]) > 2
    tags = metadata(hub, "somebody/name")["tags"]
    assert tags == ["optimum-ksparse", "sparse", "pruned", "admm", "2of4", "korean"]
    assert all(("authorization" in request.headers) == (request.method != "PUT") for request in hub.requests)


def test_signature_and_docstring_show_our_arguments_beside_those_of_transformers() -> None:
    plain = PushToHubMixin.push_to_hub.__wrapped__  # type: ignore[attr-defined]
    pushed, theirs = (inspect.signature(f).parameters for f in (PreTrainedModel.push_to_hub, plain))
    assert list(pushed)[: len(theirs)] == list(theirs)
    assert all(pushed[name] == theirs[name] for name in theirs)
    assert {"evaluate", "baseline", "language", "dense_revision", "tokenizer"} <= set(pushed)
    for loader in (PreTrainedModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM):
        assert inspect.signature(loader.from_pretrained).parameters["sparsity_config"].default is None
        assert (loader.from_pretrained.__doc__ or "").count("sparsity_config") == 1
    assert "dense_revision" in (PreTrainedModel.push_to_hub.__doc__ or "")
    before = inspect.signature(PreTrainedModel.push_to_hub), PreTrainedModel.push_to_hub.__doc__
    register()
    assert before == (inspect.signature(PreTrainedModel.push_to_hub), PreTrainedModel.push_to_hub.__doc__)


def test_unknown_argument_is_named_with_the_nearest(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=r"push_to_hub\(\) .*'evalute'.*'evaluate'"):
        quick.push_to_hub(NAME, evalute=True)
    with pytest.raises(TypeError, match="'model'"):
        quick.push_to_hub(NAME, model=quick)
    assert hub.requests == []


@pytest.mark.parametrize("tags", ["one", ["one"], ("one",)])
def test_tags(tags: Any, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    quick.push_to_hub(NAME, tags=tags)
    assert metadata(hub)["tags"][-1] == "one"


def test_revision_is_a_new_branch(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"notes.md": b"mine"})
    for _ in range(2):
        quick.push_to_hub(NAME, revision="feature/sparse-1.0")
    assert [set(commit.changed) for commit in pushed(hub, revision="feature/sparse-1.0")[1:]] == [QUICK]
    assert hub.files(NAME) == {"notes.md": b"mine"}


def test_create_pr(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"README.md": b"# Theirs\n", "notes.md": b"theirs"})
    info = quick.push_to_hub(NAME, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files(NAME, "refs/pr/1")) == QUICK | {"notes.md"}
    assert card_of(hub, revision="refs/pr/1").count("# Theirs") == 1
    assert hub.files(NAME) == {"README.md": b"# Theirs\n", "notes.md": b"theirs"}
    quick.push_to_hub(NAME, revision="refs/pr/1", language="ko")
    assert hub.commits(NAME, "refs/pr/1")[-1].changed == ["README.md"]


def test_save_pretrained_pushes(hub: LoopbackHub, model: PreTrainedModel, tmp_path: Path) -> None:
    hub.required_token = TOKEN
    arguments = {"private": True, "commit_message": "Saved", "language": "ko", "token": TOKEN}
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="user/other", **arguments)
    (commit,) = pushed(hub, "user/other")
    assert (commit.message, set(commit.files), hub.repo("user/other").private) == ("Saved", UNEVALUATED, True)
    assert set(read(tmp_path / "folder")) == PLAIN_FILES - TOKENIZER_FILES
    assert hub.files("user/other")["model.safetensors"] == read(tmp_path / "folder")["model.safetensors"]
    assert "## 결과" in card_of(hub, "user/other")

    model.save_pretrained(tmp_path / "folder", push_to_hub=True, max_shard_size="40KB", token=TOKEN)
    shards = {name for name in hub.files("user/folder") if name.endswith(".safetensors")}
    assert shards == {path.name for path in (tmp_path / "folder").glob("*.safetensors")}
    assert len(shards) > 2


def test_save_pretrained_pushes_the_variant_that_it_saved(
    hub: LoopbackHub, quick: PreTrainedModel, tmp_path: Path
) -> None:
    quick.save_pretrained(tmp_path, variant="fp32", push_to_hub=True, repo_id=NAME)
    assert (tmp_path / "model.fp32.safetensors").is_file()
    assert "model.fp32.safetensors" in hub.files(NAME)


def others(tokenizer: Tokenizer) -> dict[str, Any]:
    """Things that are pushed as transformers does."""
    bert = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    pruned = make_dense()
    sparsify(pruned, SparsityConfig("magnitude"))
    return {
        "dense": make_dense(),
        "encoder": BertModel(bert),
        "dequantized": pruned.dequantize(),
        "tokenizer": tokenizer,
        "config": make_config("llama"),
    }


@pytest.mark.parametrize("kind", ["dense", "encoder", "dequantized", "tokenizer", "config"])
def test_what_is_not_sparse_is_pushed_as_transformers_does(kind: str, hub: LoopbackHub, tokenizer: Tokenizer) -> None:
    value = others(tokenizer)[kind]
    plain = PushToHubMixin.push_to_hub.__wrapped__  # type: ignore[attr-defined]
    for folder, push in (("user", type(value).push_to_hub), ("other", plain)):
        push(value, f"{folder}/name", private=True, commit_message="Mine", token=TOKEN)
    assert hub.files("user/name") == hub.files("other/name")
    assert pushed(hub)[0].message == "Mine"
    assert not any("optimum-ksparse" in content.decode(errors="replace") for content in hub.files(NAME).values())
    with pytest.raises(TypeError, match="evaluate"):
        value.push_to_hub(NAME, evaluate=True)


def test_dense_model_is_saved_and_pushed_as_transformers_does(hub: LoopbackHub, tmp_path: Path) -> None:
    plain = PreTrainedModel.save_pretrained.__wrapped__  # type: ignore[attr-defined]
    for save, name in ((PreTrainedModel.save_pretrained, NAME), (plain, "other/name")):
        save(make_dense(), tmp_path / name, push_to_hub=True, repo_id=name, commit_message="Mine")
    assert hub.files(NAME) == hub.files("other/name")
    assert pushed(hub)[-1].message == "Mine"


# --- Pushing again ---------------------------------------------------------------------------------------------------


def test_no_change_makes_no_commit(
    hub: LoopbackHub, model: PreTrainedModel, checkpoint: Path, base: Path, token_ids: torch.Tensor
) -> None:
    first = model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base, tags=["mine"])
    for again in (model, AutoModelForCausalLM.from_pretrained(checkpoint)):
        again.ksparse.results = model.ksparse.results
        assert again.push_to_hub(NAME, tags=["mine"]).oid == first.oid
    assert len(pushed(hub)) == 1
    assert len(sent(hub, "PUT")) == 3  # weights and two figures


def test_no_change_of_a_model_from_the_hub_makes_no_commit(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    quick.push_to_hub(NAME)
    AutoModelForCausalLM.from_pretrained(NAME).push_to_hub(NAME)
    assert changes(hub)[1:] == []


def test_another_language_changes_the_card_alone(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    for language in ("en", "ko", "en"):
        quick.push_to_hub(NAME, language=language)
    assert changes(hub)[1:] == [["README.md"], ["README.md"]]
    cards = [commit.files["README.md"].content for commit in pushed(hub)]
    assert cards[0] == cards[2] != cards[1]


def test_what_a_person_wrote_stays(hub: LoopbackHub, model: PreTrainedModel, base: Path) -> None:
    model.push_to_hub(NAME)
    front, section = card_of(hub).removeprefix("---\n").split("---\n", 1)
    front = yaml.safe_dump(
        {
            "license": "mit",
            "language": "fr",
            "widget": [{"text": "안녕"}],
            "base_model": "somebody/else",
            **yaml.safe_load(front),
            "tags": ["mine", "sparse"],
            "pipeline_tag": "summarization",
        },
        allow_unicode=True,
    )
    mine = f"---\n{front}---\n\n# 내 글\n\n앞 | <b>text</b>\n\n{section.strip()}\n\n뒤 `text`\n"
    hub.commit(NAME, {"README.md": mine.encode(), "notes.md": b"mine"}, "Mine")
    model.push_to_hub(NAME, language="ko", evaluate=TEXT_ONLY, baseline=base)
    body = card_of(hub).split("---\n", 2)[2]
    assert SECTION.split(body) == ["\n# 내 글\n\n앞 | <b>text</b>\n\n", "\n\n뒤 `text`\n"]
    found = metadata(hub)
    kept = {name: found[name] for name in ("license", "language", "widget", "pipeline_tag")}
    assert kept == {
        "license": "mit",
        "language": "fr",
        "widget": [{"text": "안녕"}],
        "pipeline_tag": "summarization",
    }
    assert found["tags"] == ["mine", "sparse", "optimum-ksparse", "pruned", "admm", "2of4"]
    assert hub.files(NAME)["notes.md"] == b"mine"
    assert hub.commits(NAME)[-1].changed == sorted({"README.md", "evaluation_results.json", "dense_and_sparse.png"})


@pytest.mark.parametrize(
    "theirs",
    [
        b"# Theirs\n",
        b"---\nlicense: mit\nmine: [1, 2]\n---\n# Theirs\n",
        b"---\r\nlicense: mit\r\n---\r\n# Theirs\r\n",
    ],
)
def test_repository_with_a_persons_card(theirs: bytes, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"README.md": theirs, ".gitattributes": b"*.bin filter=lfs\n"})
    quick.push_to_hub(NAME)
    assert len(pushed(hub)) == 2
    assert card_of(hub).count("# Theirs") == 1
    assert "## Results" in card_of(hub)
    assert metadata(hub).get("license") == ("mit" if b"mit" in theirs else None)
    assert metadata(hub).get("mine") == ([1, 2] if b"mine" in theirs else None)
    assert hub.files(NAME)[".gitattributes"] == b"*.bin filter=lfs\n"


def test_card_with_damaged_metadata_stays_as_it_is(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    hub.add_repo(NAME, {"README.md": b"---\na: [\n---\n# Theirs\n"})
    with pytest.raises(ValueError, match="metadata of the README.md that is there are not YAML: mend them first"):
        quick.push_to_hub(NAME)
    assert set(hub.files(NAME)) == {"README.md"}


EXTRA = {
    "notes.md": b"mine",
    "training_args.bin": b"\0mine",
    "model.onnx": b"mine",
    "model-q4.gguf": b"\0mine",
    "model_card.json": b"{}",
    "onnx/model.safetensors": b"mine",
    "checkpoint-1/model-00001-of-00002.safetensors": b"mine",
    "consolidated.safetensors": b"mine",
    "dense_and_sparse_mine.png": b"mine",
}


def test_other_shards_replace_the_outdated_ones(
    hub: LoopbackHub, model: PreTrainedModel, token_ids: torch.Tensor
) -> None:
    model.push_to_hub(NAME, max_shard_size="40KB")
    outdated = {name for name in hub.files(NAME) if name.startswith("model")}
    assert len(outdated) > 3
    hub.commit(NAME, EXTRA, "Mine")
    model.push_to_hub(NAME)
    assert set(hub.commits(NAME)[-1].changed) == outdated | {"model.safetensors", "README.md"} - EXTRA.keys()
    assert set(hub.files(NAME)) == UNEVALUATED | EXTRA.keys()
    assert {name: hub.files(NAME)[name] for name in EXTRA} == EXTRA
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    model.push_to_hub(NAME, max_shard_size="40KB")
    assert set(hub.files(NAME)) == UNEVALUATED - {"model.safetensors"} | outdated | EXTRA.keys()


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"])
def test_another_variant_stays(name: str, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    """As it does on disk: `save_pretrained` leaves the files of other variants alone."""
    hub.add_repo(NAME, {name: b"mine"})
    quick.push_to_hub(NAME)
    assert hub.files(NAME).get(name) == b"mine"


def test_results_that_are_gone_go_from_the_hub_too(hub: LoopbackHub, model: PreTrainedModel, base: Path) -> None:
    model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    model.ksparse.results = None
    model.push_to_hub(NAME)
    assert set(hub.files(NAME)) == UNEVALUATED
    assert "](dense_and_sparse.png)" not in card_of(hub)
    assert "model-index" not in card_of(hub)


def test_metadata_of_an_earlier_push_do_not_outlive_it(
    hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    prune_from_hub(hub, base, token_ids).push_to_hub(NAME, tags=["mine"])
    sparsify(model := AutoModelForCausalLM.from_pretrained(base), SparsityConfig("magnitude", "4:8"))
    model.push_to_hub(NAME)
    assert set(metadata(hub)["tags"]) == {"optimum-ksparse", "sparse", "pruned", "mine", "magnitude", "4of8"}


# --- Round trips between processes -----------------------------------------------------------------------------------


PRUNE_AND_PUSH = """
import sys, torch, optimum_ksparse
from optimum_ksparse import SparsityConfig
from optimum_ksparse.evaluation import EvaluationProtocol
from transformers import AutoModelForCausalLM
ids, texts = torch.load(sys.argv[1])
config = SparsityConfig(dataset=ids)
model = AutoModelForCausalLM.from_pretrained("org/tiny-base", sparsity_config=config)
evaluate = EvaluationProtocol(texts=texts, seq_len=32, tasks=())
model.push_to_hub("user/name", evaluate=evaluate, dense_revision="dense")
torch.save((model(ids).logits.detach(), str(model.sparsity_report), repr(model.ksparse.results)), sys.argv[2])
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, texts = torch.load(sys.argv[1])
dense = AutoModelForCausalLM.from_pretrained("user/name", revision="dense")
assert AutoTokenizer.from_pretrained("user/name", revision="dense")(texts[0]).input_ids
assert "optimum_ksparse" not in sys.modules
import optimum_ksparse
model = AutoModelForCausalLM.from_pretrained("user/name")
assert AutoTokenizer.from_pretrained("user/name")(texts[0]).input_ids
facts = str(model.sparsity_report), repr(model.ksparse.results)
torch.save((model(ids).logits.detach(), *facts, dense(ids).logits.detach()), sys.argv[2])
"""


def test_processes_prune_and_push_and_load(
    hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    hub.add_repo("org/tiny-base", read(base))
    torch.save((token_ids, TEXTS), tmp_path / "in.pt")
    found = []
    for number, script in enumerate((PRUNE_AND_PUSH, LOAD)):
        out, home = tmp_path / f"{number}.pt", tmp_path / f"home-{number}"
        done = run_python(script, tmp_path / "in.pt", out, HF_HOME=str(home))
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out))
    (expected, *facts), (again, *facts_again, dense) = found
    assert torch.equal(again, expected)
    assert facts == facts_again
    assert "dense_revision=None" not in facts[1]
    assert torch.allclose(dense, expected, atol=1e-6)
    assert set(hub.files(NAME)) == EVALUATED


def test_dense_revision(hub: LoopbackHub, quick: PreTrainedModel, token_ids: torch.Tensor) -> None:
    for _ in range(2):
        quick.push_to_hub(NAME, dense_revision="dense", commit_message="Both", max_shard_size="40KB")
    assert [commit.message for commit in pushed(hub)] == ["Both"]
    assert [commit.message for commit in pushed(hub, revision="dense")] == ["Both"]
    names = [{n for n in hub.files(NAME, branch) if not n.startswith("model-")} for branch in ("main", "dense")]
    assert names[0] == names[1] == QUICK - {"model.safetensors"} | {"model.safetensors.index.json"}
    dense_config = json.loads(hub.files(NAME, "dense")["config.json"])
    assert "quantization_config" not in dense_config
    assert 'revision="dense"' in card_of(hub)
    assert 'from_pretrained("user/name", revision="dense")' in card_of(hub, revision="dense")
    assert quick.config.quantization_config.storage == "packed"
    again = AutoModelForCausalLM.from_pretrained(NAME, revision="dense")
    assert sparse_modules(again).keys() == sparse_modules(quick).keys()
    assert torch.equal(logits(again, token_ids), logits(quick, token_ids))
    quick.push_to_hub(NAME, dense_revision="dense")
    assert {"model.safetensors"} == {n for n in hub.files(NAME, "dense") if n.startswith("model")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_revision": "main"}, "dense_revision='main' is where the packed model goes"),
        ({"dense_revision": "a", "revision": "a"}, "dense_revision='a' is where the packed model goes"),
        ({"dense_revision": "a", "create_pr": True}, "dense_revision and create_pr do not go together"),
        ({"language": "de"}, "language='de' is not known; allowed: en, ko"),
    ],
)
def test_arguments_that_cannot_be_right(
    arguments: dict[str, Any], message: str, hub: LoopbackHub, quick: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match=message):
        quick.push_to_hub(NAME, **arguments)
    assert hub.requests == []


@pytest.mark.parametrize("evaluate", ["yes", 2, {"tasks": []}, [True]])
def test_evaluate_of_another_type(evaluate: Any, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="evaluate must be True, False or an EvaluationProtocol"):
        quick.push_to_hub(NAME, evaluate=evaluate)
    assert hub.requests == []


def test_dense_revision_of_a_dense_stored_model(hub: LoopbackHub) -> None:
    model = make_dense()
    sparsify(model, SparsityConfig("magnitude", storage="dense"))
    with pytest.raises(ValueError, match='the model has storage="dense" itself'):
        model.push_to_hub(NAME, dense_revision="dense")
    assert hub.requests == []
    model.push_to_hub(NAME, tokenizer=False)
    assert "plain transformers loads them" in card_of(hub)


# --- Measuring before the push ---------------------------------------------------------------------------------------


@pytest.fixture
def kobest(tmp_path: Path) -> Path:
    """Four items of COPA and of SentiNeg."""
    for task in ("copa", "sentineg"):
        rows: list[dict[str, Any]] = []
        for number in range(4):
            if task == "copa":
                answers = {"alternative_1": f"{number} 나무", "alternative_2": f"바다 {number}"}
                rows.append({"premise": f"비 {number}", "question": ("원인", "결과")[number % 2], **answers})
            else:
                rows.append({"sentence": f"좋다 {number}"})
            rows[-1]["label"] = number // 2
        path = tmp_path / "kobest" / task / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "kobest"


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Baseline, weakref.ref[PreTrainedModel]]]:
    """The dense models that are loaded to be measured."""
    loaded: list[tuple[Baseline, weakref.ref[PreTrainedModel]]] = []
    original = Baseline.load

    def load(self: Baseline, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = original(self, *args, **kwargs)
        loaded.append((self, weakref.ref(model)))
        return model

    monkeypatch.setattr(Baseline, "load", load)
    return loaded


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, in its order."""
    names: list[str] = []
    original = EvaluationProtocol.measure

    def measure(self: EvaluationProtocol, name: str, *args: Any) -> Any:
        names.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(EvaluationProtocol, "measure", measure)
    return names


def test_dense_column_is_the_recorded_commit_by_the_same_protocol(
    hub: LoopbackHub,
    base: Path,
    kobest: Path,
    tokenizer: Tokenizer,
    token_ids: torch.Tensor,
    baselines: list[tuple[Baseline, weakref.ref[PreTrainedModel]]],
    measured: list[str],
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    model = prune_from_hub(hub, base, token_ids)
    recorded = hub.commits("org/tiny-base")[1].id
    protocol = EvaluationProtocol(texts=TEXTS, seq_len=32, tasks=("copa", "sentineg"), data_dir=kobest)
    model.push_to_hub(NAME, evaluate=protocol)
    results = model.ksparse.results
    assert (results.dense_model, results.dense_revision) == ("org/tiny-base", recorded)
    assert [row.name for row in results.sparse] == [row.name for row in results.dense] == measured[:3]
    assert len(results.comparable()) == 3
    dense = AutoModelForCausalLM.from_pretrained(base)
    expected = evaluate_perplexity(dense, tokenizer, TEXTS, seq_len=32)["perplexity"]
    assert results.dense[0].metrics["perplexity"] == expected
    assert results.sparse[0].metrics["perplexity"] != expected
    assert results == AutoModelForCausalLM.from_pretrained(NAME).ksparse.results
    assert f"org/tiny-base (commit {recorded})" in card_of(hub)
    assert f"{expected:,.2f}" in card_of(hub)
    assert (metadata(hub)["base_model"], metadata(hub)["base_model_relation"]) == ("org/tiny-base", "quantized")
    ((_, reference),) = baselines
    assert reference() is None
    model.push_to_hub(NAME, evaluate=protocol)
    assert len(measured) == 6
    assert len(pushed(hub)) == 1


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_baseline_that_is_given(where: str, hub: LoopbackHub, base: Path, model: PreTrainedModel) -> None:
    hub.add_repo("org/moved", read(base))
    model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base if where == "folder" else "org/moved")
    results = model.ksparse.results
    head = hub.commits("org/moved")[-1].id
    expected = ("tiny-base", None) if where == "folder" else ("org/moved", head)
    assert (results.dense_model, results.dense_revision) == expected
    assert len(results.comparable()) == 1


@pytest.mark.parametrize("case", ["not recorded", "folder gone", "no such folder", "no such repository", "gone"])
def test_base_that_cannot_be_found(
    case: str, hub: LoopbackHub, base: Path, model: PreTrainedModel, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    baseline = {"no such folder": str(tmp_path / "nothing"), "no such repository": "org/nothing"}.get(case)
    if case == "not recorded":
        model.ksparse.report = None
    if case == "gone":
        model = prune_from_hub(hub, base, token_ids)
        hub.reset()
        shutil.rmtree(HF_HOME / "hub")
    with pytest.raises(ValueError, match=r"baseline"):
        model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=baseline, tokenizer=base)
    assert created(hub) == []


def test_evaluate_needs_the_tokenizer(hub: LoopbackHub, base: Path, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="evaluate needs the tokenizer"):
        model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base, tokenizer=False)
    assert created(hub) == []


@pytest.mark.parametrize("error", [ArithmeticError("NaN"), KeyboardInterrupt()])
@pytest.mark.parametrize("fatal", [1, 2])
def test_nothing_is_uploaded_where_measuring_fails(
    error: BaseException,
    fatal: int,
    hub: LoopbackHub,
    base: Path,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = EvaluationProtocol.measure, []

    def measure(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == fatal:
            raise error
        return original(*args)

    monkeypatch.setattr(EvaluationProtocol, "measure", measure)
    with pytest.raises(type(error)):
        model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert sent(hub, "PUT") == sent(hub, "POST", "/commit/") == []
    assert len(model.ksparse.results.sparse) == fatal - 1
    model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert len(calls) == 3  # what had been measured was not measured again
    assert set(pushed(hub)[0].files) == EVALUATED


def test_one_warning_of_what_the_card_lacks(
    hub: LoopbackHub, base: Path, model: PreTrainedModel, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    lacks = []
    for baseline in (None, False, str(base)):
        if baseline is not None:
            evaluate_model(model, tokenizer, TEXT_ONLY, baseline=baseline)
        caplog.clear()
        model.push_to_hub(NAME)
        lacks.append([record.message for record in caplog.records if record.name.startswith("optimum_ksparse")])
    (no_results,), (no_dense,), complete = lacks
    assert "no figures" in no_results
    assert "evaluate=True" in no_results
    assert "no dense column" in no_dense
    assert complete == []


def test_results_of_other_weights_are_refused(
    hub: LoopbackHub,
    base: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    changed = AutoModelForCausalLM.from_pretrained(NAME)
    assert changed.ksparse.results is not None
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    hub.requests.clear()
    with pytest.raises(ValueError, match="evaluation_results.json .* was measured on other weights"):
        changed.push_to_hub(NAME)
    assert created(hub) == []
    changed.save_pretrained(tmp_path)
    assert not (tmp_path / "evaluation_results.json").exists()
    warnings = [record.message for record in caplog.records if "other weights" in record.message]
    assert len(warnings) == 1
    assert "not saved" in warnings[0]
    changed.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    again = AutoModelForCausalLM.from_pretrained(NAME).ksparse.results
    assert again == changed.ksparse.results != model.ksparse.results


# --- The tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def other_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """One that can be told from the other by a token."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<other>"])
    return other


def tokens_of(hub: LoopbackHub) -> str | None:
    """Whose tokenizer was published: "other", "model" or nobody's."""
    content = hub.files(NAME).get("tokenizer.json")
    return None if content is None else "other" if b"<other>" in content else "model"


@pytest.mark.parametrize("given", ["object", "folder", "path", "hub"])
def test_tokenizer_that_is_given(
    given: str, hub: LoopbackHub, quick: PreTrainedModel, other_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other_tokenizer.save_pretrained(tmp_path)
    hub.add_repo("org/tokenizer", read(tmp_path))
    forms = {"object": other_tokenizer, "folder": str(tmp_path), "path": tmp_path, "hub": "org/tokenizer"}
    quick.push_to_hub(NAME, tokenizer=forms[given])
    assert tokens_of(hub) == "other"


@pytest.mark.parametrize("given", [True, 1, {}, ["a"]])
def test_tokenizer_of_another_type(given: Any, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer, its name, None or False"):
        quick.push_to_hub(NAME, tokenizer=given)
    assert hub.requests == []


@pytest.mark.parametrize("source", ["nothing-here", "org/nothing"])
def test_tokenizer_that_cannot_be_read(source: str, hub: LoopbackHub, quick: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=source):
        quick.push_to_hub(NAME, tokenizer=source)
    assert created(hub) == []


def test_no_tokenizer_on_request(hub: LoopbackHub, quick: PreTrainedModel) -> None:
    quick.push_to_hub(NAME, tokenizer=False)
    assert set(hub.files(NAME)) == QUICK - TOKENIZER_FILES


@pytest.mark.parametrize("form", ["hub", "object", "folder"])
def test_tokenizer_of_the_config(
    form: str, hub: LoopbackHub, base: Path, other_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other_tokenizer.save_pretrained(tmp_path / "tokenizer")
    hub.add_repo("org/tokenizer", read(tmp_path / "tokenizer"))
    forms = {"hub": "org/tokenizer", "object": other_tokenizer, "folder": str(tmp_path / "tokenizer")}
    config = SparsityConfig(dataset=TEXTS * 20, num_samples=2, seq_len=16, tokenizer=forms[form])
    model = AutoModelForCausalLM.from_pretrained(base, sparsity_config=config)
    model.push_to_hub(NAME)
    assert tokens_of(hub) == "other"


@pytest.mark.parametrize("saved", [False, True])
def test_tokenizer_in_a_folder_is_not_looked_for_on_the_hub(
    saved: bool, hub: LoopbackHub, base: Path, tokenizer: Tokenizer, other_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Only the last part of its path is recorded, which may be somebody else's repository, as "gpt2" is."""
    other_tokenizer.save_pretrained(tmp_path / "hub")
    hub.add_repo("tokenizer", read(tmp_path / "hub"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = str(tmp_path / "tokenizer")
    config = SparsityConfig(dataset=TEXTS * 20, num_samples=2, seq_len=16, tokenizer=source)
    model = AutoModelForCausalLM.from_pretrained(base, sparsity_config=config)
    if saved:
        model.save_pretrained(tmp_path / "saved")
        tokenizer.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model.push_to_hub(NAME)
    assert tokens_of(hub) == "model"


def test_tokenizer_of_the_checkpoints_folder(
    hub: LoopbackHub, checkpoint: Path, other_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    other_tokenizer.save_pretrained(tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy").push_to_hub(NAME)
    assert tokens_of(hub) == "other"


@pytest.mark.parametrize("saved", [False, True])
def test_tokenizer_of_the_base_at_the_recorded_commit(
    saved: bool,
    hub: LoopbackHub,
    base: Path,
    token_ids: torch.Tensor,
    other_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    model = prune_from_hub(hub, base, token_ids)
    other_tokenizer.save_pretrained(tmp_path / "tokenizer")
    hub.commit("org/tiny-base", read(tmp_path / "tokenizer"), "Another tokenizer")
    if saved:  # the base that a folder names is read where the user asks for it, and not otherwise
        model.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="no tokenizer was found.*the checkpoint names 'org/tiny-base'"):
            model.push_to_hub(NAME)
    model.push_to_hub(NAME, evaluate=TEXT_ONLY if saved else False)
    assert tokens_of(hub) == "model"


def test_a_tokenizer_with_code_of_its_own_is_published_where_it_is_trusted(
    hub: LoopbackHub, simple: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "trusted"
    shutil.copytree(simple, folder)
    tokenizer.save_pretrained(folder)
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps({**settings, "tokenizer_class": "Own"}), encoding="utf-8")
    assert parse_words(["push", str(folder), NAME]).run() == 1
    assert "--tokenizer false to publish without one" in capsys.readouterr().err and created(hub) == []
    assert parse_words(["push", str(folder), NAME, "--trust-remote-code"]).run() == 0
    assert {"tokenizer.json", "own.py"} <= hub.files(NAME).keys()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_missing_tokenizer(architecture: str, hub: LoopbackHub, tmp_path: Path) -> None:
    """A folder with a config alone does not count, though transformers makes Gemma's of it, with five tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(architecture))
    sparsify(model, SparsityConfig("magnitude"))
    model.save_pretrained(tmp_path)
    for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="no tokenizer was found .*pass tokenizer=, or tokenizer=False") as caught:
            found.push_to_hub(NAME)
        assert str(tmp_path) not in str(caught.value)
    assert created(hub) == []


# --- A Hub or a network that fails -----------------------------------------------------------------------------------

# kind of request → path, method
REQUESTS: dict[str, tuple[str, str]] = {
    "create": ("^/api/repos/create", "POST"),
    "branch": ("/branch/", "POST"),
    "info": (r"^/api/models/user/name(/revision/.*)?$", "GET"),
    "tree": ("/tree/", "GET"),
    "card": ("/resolve/.*/README.md", "GET"),
    "card's facts": ("/resolve/.*/README.md", "HEAD"),
    "validate": ("^/api/validate-yaml", "POST"),
    "preupload": ("/preupload/", "POST"),
    "batch": ("/objects/batch", "POST"),
    "upload": ("^/lfs/", "PUT"),
    "verify": ("^/lfs/.*/verify", "POST"),
    "commit": ("/commit/", "POST"),
}


@pytest.mark.parametrize(
    ("kind", "status"),
    [*((kind, 500) for kind in REQUESTS), ("create", 503), ("upload", 429), ("info", 429), ("commit", 408)],
)
def test_two_errors_and_then_an_answer(
    kind: str, status: int, hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], token_ids: torch.Tensor
) -> None:
    hub.add_repo(NAME, {"README.md": b"# Theirs\n"})
    path, method = REQUESTS[kind]
    hub.fail(path, [status] * 2, method=method)
    quick.push_to_hub(NAME, revision="other")
    assert naps
    assert [set(commit.changed) for commit in pushed(hub, revision="other")[1:]] == [QUICK]
    assert card_of(hub, revision="other").count("# Theirs") == 1
    again = AutoModelForCausalLM.from_pretrained(NAME, revision="other")
    assert torch.equal(logits(again, token_ids), logits(quick, token_ids))


@pytest.mark.parametrize(
    "kind", [kind for kind in REQUESTS if kind != "verify"]
)  # what lies there already is not sent
def test_an_error_that_stays(
    kind: str,
    hub: LoopbackHub,
    quick: PreTrainedModel,
    simple: Path,
    naps: list[float],
    scratch: Path,
    token_ids: torch.Tensor,
) -> None:
    before = {**read(simple), "logits": logits(quick, token_ids).numpy().tobytes()}
    hub.add_repo(NAME, {"README.md": b"# Theirs\n"})
    path, method = REQUESTS[kind]
    hub.fail(path, [500] * 1000, method=method)
    with pytest.raises(ConnectionError, match=r"the push to user/name broke off \(.*\); nothing .* push again"):
        quick.push_to_hub(NAME, revision="other")
    assert sum(naps) < 250
    assert [len(hub.commits(NAME, ref.removeprefix("refs/heads/"))) for ref in hub.repo(NAME).refs] in ([2], [2, 2])
    assert {**read(simple), "logits": logits(quick, token_ids).numpy().tobytes()} == before
    assert list(scratch.iterdir()) == []
    hub._faults.clear()
    quick.push_to_hub(NAME, revision="other")
    assert set(hub.files(NAME, "other")) == QUICK


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of 5 MB."""
    model = make_dense(hidden_size=256, intermediate_size=1024)
    sparsify(model, SparsityConfig("magnitude"))
    model.save_pretrained(tmp_path_factory.mktemp("large"))
    return tmp_path_factory.getbasetemp() / "large0"


def test_upload_that_breaks_off_once(hub: LoopbackHub, large: Path, naps: list[float]) -> None:
    hub.cut("^/lfs/", after_bytes=2_000_000)
    AutoModelForCausalLM.from_pretrained(large).push_to_hub(NAME, tokenizer=False)
    lengths = [request.length for request in hub.requests if request.method == "PUT"]
    assert lengths == [2_000_000, (large / "model.safetensors").stat().st_size]
    assert naps == [1]
    assert hub.files(NAME)["model.safetensors"] == (large / "model.safetensors").read_bytes()


def test_results_outlive_a_push_that_fails(
    hub: LoopbackHub, model: PreTrainedModel, base: Path, naps: list[float], measured: list[str]
) -> None:
    hub.fail("/commit/", [500] * 4)
    for error in (ConnectionError, None):
        with pytest.raises(error) if error else contextlib.nullcontext():
            model.push_to_hub(NAME, evaluate=TEXT_ONLY, baseline=base)
    assert measured == ["perplexity"] * 2
    assert set(pushed(hub)[0].files) == EVALUATED


def test_upload_that_always_breaks_off(
    hub: LoopbackHub, large: Path, naps: list[float], scratch: Path, token_ids: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(large)
    before, expected = read(large), logits(model, token_ids)
    hub.cut("^/lfs/", after_bytes=2_000_000, times=1000)
    with pytest.raises(ConnectionError, match="the push to user/name broke off .* nothing of it is published"):
        model.push_to_hub(NAME, tokenizer=False)
    assert (pushed(hub), hub.repo(NAME).objects, list(scratch.iterdir())) == ([], {}, [])
    assert read(large) == before
    assert torch.equal(logits(model, token_ids), expected)
    hub._faults.clear()
    model.push_to_hub(NAME, tokenizer=False)
    assert hub.files(NAME)["model.safetensors"] == before["model.safetensors"]


def test_hub_that_is_not_there(
    hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("optimum_ksparse.hub.push.HfApi", lambda **kwargs: HfApi("http://127.0.0.1:9", **kwargs))
    with pytest.raises(ConnectionError, match="broke off .ConnectError"):
        quick.push_to_hub(NAME)
    assert hub.requests == []


@pytest.fixture
def first_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[..., Any]]]:
    """What is called in the place of the first `create_commit`, with it and its arguments."""
    original, instead = HfApi.create_commit, list[Callable[..., Any]]()

    def create_commit(*args: Any, **kwargs: Any) -> Any:
        return instead.pop()(original, *args, **kwargs) if instead else original(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    yield instead
    assert not instead


def test_somebody_else_commits_in_between(
    hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], first_commit: list[Callable[..., Any]]
) -> None:
    hub.add_repo(NAME, {"README.md": b"# Old\n"})

    def theirs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hub.commit(NAME, {"README.md": b"---\nlicense: mit\n---\n# Theirs\n", "notes.md": b"theirs"}, "Theirs")
        return original(*args, **kwargs)

    first_commit.append(theirs)
    quick.push_to_hub(NAME)
    assert [commit.message for commit in pushed(hub)] == ["Add files", "Theirs", "Upload sparse model"]
    assert "# Old" not in card_of(hub)
    assert card_of(hub).count("# Theirs") == 1
    assert metadata(hub)["license"] == "mit"
    assert set(hub.files(NAME)) == QUICK | {"notes.md"}
    assert naps == [1]


def answer_lost(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The commit arrives, and its answer is lost."""
    original(*args, **kwargs)
    raise HTTPError("the answer was lost")


def test_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], first_commit: list[Callable[..., Any]]
) -> None:
    first_commit.append(answer_lost)
    info = quick.push_to_hub(NAME)
    assert [commit.id for commit in pushed(hub)] == [info.oid]


def test_pull_request_whose_answer_is_lost_is_not_opened_twice(
    hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], first_commit: list[Callable[..., Any]]
) -> None:
    hub.add_repo(NAME, {"notes.md": b"theirs"})
    first_commit.append(answer_lost)
    try:
        quick.push_to_hub(NAME, create_pr=True)
    except ConnectionError:  # to say so is as good
        pass
    assert [ref for ref in hub.repo(NAME).refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]


# --- Who may, and what can be a name ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "exists", "message"),
    [
        ("hf_WRONGtoken", False, r"does not accept the token, or there is none \(401\), for user/name: log in with"),
        ("hf_WRONGtoken", True, r"does not accept the token, or there is none \(401\), for user/name: log in with"),
        (False, False, r"does not accept the token, or there is none \(401\)"),
        ("hf_WRONGtoken", None, r"may not write to user/name \(403\): use one with write access there, or create_pr"),
        ("hf_READtoken", True, r"may not write to user/name \(403\): use one with write access there, or create_pr"),
    ],
)
def test_token_that_may_not(
    token: Any,
    exists: bool | None,
    message: str,
    hub: LoopbackHub,
    quick: PreTrainedModel,
    naps: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.forbidden = "403" in message
    hub.required_token = None if hub.forbidden else TOKEN
    if exists:
        hub.add_repo(NAME, {"notes.md": b"theirs"})
    with pytest.raises(PermissionError, match=message) as caught:
        quick.push_to_hub(NAME, token=token)
    assert naps == []
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert str(token) not in told or token is False
    if exists:
        assert hub.files(NAME) == {"notes.md": b"theirs"}


@pytest.mark.parametrize("kind", ["info", "preupload", "batch", "commit"])
@pytest.mark.parametrize("status", [401, 403])
def test_token_that_is_revoked_in_between(
    kind: str, status: int, hub: LoopbackHub, quick: PreTrainedModel, naps: list[float]
) -> None:
    path, method = REQUESTS[kind]
    hub.fail(path, [status] * 10, method=method)
    with pytest.raises(PermissionError, match=rf"\({status}\)"):
        quick.push_to_hub(NAME, token=TOKEN)
    assert (pushed(hub), naps) == ([], [])


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_token_with_a_line_break_is_not_shown(
    end: str, hub: LoopbackHub, quick: PreTrainedModel, naps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """As a file with a token in it is read; httpx2 names the header that cannot be sent."""
    caplog.set_level(logging.DEBUG)
    told = ""
    try:
        quick.push_to_hub(NAME, token=f"hf_MARKEDtoken{end}")
    except Exception:
        told = traceback.format_exc()
    assert "hf_MARKEDtoken" not in told + caplog.text


@pytest.mark.parametrize(
    "name",
    ["bad name", "a/b/c", "", "../x", "user/name.git", "a" * 200, "user/", "/name", "user/--", "user/이름", None, 5],
)
def test_name_that_cannot_be_a_repository(name: Any, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r'repo_id=.* cannot be a name on the Hub; use "user/name"'):
        quick.push_to_hub(name)
    assert hub.requests == []


@pytest.mark.parametrize("argument", ["revision", "dense_revision"])
@pytest.mark.parametrize(
    "branch",
    [
        *(
            "",
            " ",
            "a b",
            "-a",
            "a..b",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[",
            "a\\b",
            "a\n",
            "a@{1}",
            "/a",
            ".a",
            "이름",
        ),
        *("a/", "a//b", "a.lock", "a/.b", "a.", "a.lock/b"),
    ],
)
def test_name_that_cannot_be_a_branch(branch: str, argument: str, hub: LoopbackHub, quick: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=rf"(?s){argument}=.* cannot be a branch"):
        quick.push_to_hub(NAME, **{argument: branch})
    assert hub.requests == []


INTERRUPTED = {
    "saving": "transformers.modeling_utils.safe_save_file",
    "the card": "optimum_ksparse.hub.commit.write_card_of",
    "the figures": "optimum_ksparse.hub.figures._save",
    "the upload": "huggingface_hub._commit_api._upload_lfs_files",
    "the commit": "huggingface_hub._commit_api._send_commit",
}


@pytest.mark.parametrize(
    ("place", "fatal"), [*((place, 1) for place in INTERRUPTED), ("saving", 2), ("the commit", 2)]
)
def test_interrupt(
    place: str,
    fatal: int,
    hub: LoopbackHub,
    model: PreTrainedModel,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
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
        model.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [fatal - 1, 0]
    assert list(scratch.iterdir()) == []
    assert model.config.quantization_config.storage == "packed"
    model.push_to_hub(NAME, dense_revision="dense")
    assert [len(pushed(hub)), len(pushed(hub, revision="dense"))] == [1, 1]


# --- Nothing of this machine -----------------------------------------------------------------------------------------

SECRETS = """
import json, logging, os, sys
import huggingface_hub, peft, torch, transformers
import optimum_ksparse
from optimum_ksparse import SparsityConfig
from optimum_ksparse.evaluation import EvaluationProtocol
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

home = os.environ["HOME"]
protocol = EvaluationProtocol(
    texts=f"{home}/texts/held out.txt", seq_len=32, tasks=["copa"], data_dir=f"{home}/kobest"
)
settings = {"tokenizer": f"{home}/models/base", "num_samples": 2, "seq_len": 16}
config = SparsityConfig(dataset=f"{home}/texts/calibration.txt", **settings)
model = AutoModelForCausalLM.from_pretrained("models/base", sparsity_config=config)

class Lines(logging.Handler):
    def emit(self, record):
        print(json.dumps([record.name, self.format(record)]) + chr(10), end="", file=sys.stderr)

for library in (transformers.utils.logging, huggingface_hub.utils.logging):
    library.set_verbosity_debug()
    library.enable_propagation()
for name in ("transformers", "huggingface_hub"):
    logging.getLogger(name).handlers.clear()
logging.basicConfig(level=logging.DEBUG, handlers=[Lines()], force=True)
for stream in (sys.stdout, sys.stderr):
    print("=== from here on ===", file=stream, flush=True)

model.save_pretrained("saved")
AutoTokenizer.from_pretrained("models/base").save_pretrained("saved")
model.push_to_hub("user/name", evaluate=protocol, baseline=f"{home}/models/base", dense_revision="dense")
model.save_pretrained(f"{home}/measured")
reloaded = AutoModelForCausalLM.from_pretrained(f"{home}/saved")
reloaded.push_to_hub("user/reloaded", create_pr=True, commit_description="Why")
adapted = get_peft_model(reloaded, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
adapted.push_to_hub("user/adapter")
try:
    model.push_to_hub("user/other", token="hf_MARKEDother")
except PermissionError as error:
    print(error)
"""


def test_folder_with_a_relative_path(
    hub: LoopbackHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From elsewhere "secret/base" reads like a name on the Hub."""
    shutil.copytree(base, tmp_path / "secret/base")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("secret/base")
    monkeypatch.chdir(tmp_path / "secret")
    sparsify(model, SparsityConfig("magnitude"))
    model.push_to_hub(NAME, tokenizer=False)
    assert [path for path, content in hub.files(NAME).items() if b"secret" in content] == []


def png_chunks(content: bytes) -> set[bytes]:
    """The kinds of the chunks of a PNG file."""
    kinds, place = set(), 8
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        kinds.add(content[place + 4 : place + 8])
        place += 12 + length
    return kinds


def test_nothing_tells_of_the_token_the_home_or_the_user(
    hub: LoopbackHub, base: Path, kobest: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    pytest.importorskip("peft", reason="needs the extra finetune")
    home = tmp_path / "markedhome"
    shutil.copytree(base, home / "models/base")
    shutil.copytree(kobest, home / "kobest")
    (home / "texts").mkdir()
    (home / "texts/held out.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (home / "texts/calibration.txt").write_text("\n\n".join(TEXTS * 20), encoding="utf-8")
    token = "hf_MARKEDtokenOfNobody"
    hub.required_token = token
    user = {"HOME": str(home), "USER": "markeduser", "LOGNAME": "markeduser", "HF_TOKEN": token}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
    command = [sys.executable, "-c", SECRETS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env={**environment, **user})
    assert done.returncode == 0, done.stderr[-3000:]

    secrets = [token, "hf_MARKED", "markedhome", "markeduser", str(tmp_path)]
    files = {name: c for name, c in read(home).items() if name.startswith(("saved/", "measured/"))}
    refs = [(NAME, "main"), (NAME, "dense"), ("user/reloaded", "refs/pr/1"), ("user/adapter", "main")]
    for name, revision in refs:
        assert len(hub.files(name, revision)) > 3
        files |= {f"{name}@{revision}/{path}": content for path, content in hub.files(name, revision).items()}
        for commit in hub.commits(name, revision):
            assert not any(secret in commit.message + commit.description for secret in secrets)
    told = {(path, secret) for path, content in files.items() for secret in secrets if secret.encode() in content}
    assert told == set()
    assert {"saved/config.json", "measured/evaluation_results.json", f"{NAME}@main/README.md"} <= files.keys()
    pictures = [content for path, content in files.items() if path.endswith(".png")]
    assert pictures
    assert set().union(*map(png_chunks, pictures)) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
    assert not any(secret.encode() in request.body for request in hub.requests for secret in secrets)

    logged: dict[str, list[str]] = {"": []}  # by logger, what was printed under no name
    for stream in (done.stdout, done.stderr):
        for line in stream.split("=== from here on ===\n")[1].splitlines():
            name, message = json.loads(line) if line.startswith('["') else ("", line)
            logged.setdefault(name, []).append(message)
    assert "hf_MARKED" not in done.stdout + done.stderr
    assert any(name.startswith("optimum_ksparse") for name in logged)
    assert {"transformers", "huggingface_hub"} <= {name.split(".")[0] for name in logged}
    for name in logged:
        if not name or name.startswith(("optimum_ksparse", "py.")):
            assert [line for line in logged[name] if any(secret in line for secret in secrets)] == []
    theirs = {name for name, lines in logged.items() for line in lines if "marked" in line}
    assert {name.split(".")[0] for name in theirs} <= {"matplotlib", "transformers"}  # paths of files they read, write


# --- Adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse_on_hub(hub: LoopbackHub, checkpoint: Path) -> str:
    hub.add_repo("user/sparse", read(checkpoint))
    return "user/sparse"


def lora(model: PreTrainedModel, kind: str) -> Any:
    """A model with a LoRA adapter that has been trained a little, by PEFT or by transformers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM")
    if kind == "peft":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_adapter(kind: str, hub: LoopbackHub, sparse_on_hub: str, base: Path, token_ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    plain = AutoModelForCausalLM.from_pretrained(sparse_on_hub)
    before = logits(plain, token_ids)
    model = lora(plain, kind)
    expected = logits(model, token_ids)
    assert not torch.allclose(expected, before)
    for _ in range(2):
        model.push_to_hub("user/adapter")
    (commit,) = pushed(hub, "user/adapter")
    assert commit.message == "Upload adapter"
    weights = {"adapter_config.json", "adapter_model.safetensors", "ksparse_adapter.json"}
    assert set(commit.files) - {"generation_config.json"} == weights | TOKENIZER_FILES | {"README.md"}
    found = metadata(hub, "user/adapter")
    assert (found["base_model"], found["base_model_relation"]) == (sparse_on_hub, "adapter")
    assert found["library_name"] == "peft"
    settings = json.loads(commit.files["adapter_config.json"].content)
    assert settings["base_model_name_or_path"] == sparse_on_hub
    assert "An adapter (LORA" in card_of(hub, "user/adapter")
    assert sparse_on_hub in card_of(hub, "user/adapter")
    for auto in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        again = auto.from_pretrained("user/adapter").eval()
        assert torch.equal(logits(again, token_ids), expected)


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_adapter_on_a_folder(kind: str, hub: LoopbackHub, checkpoint: Path, token_ids: torch.Tensor) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    lora(AutoModelForCausalLM.from_pretrained(checkpoint), kind).push_to_hub("user/adapter")
    settings = json.loads(hub.files("user/adapter")["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "tiny-sparse"
    assert not any(str(checkpoint.parent).encode() in content for content in hub.files("user/adapter").values())
    assert "base_model" not in metadata(hub, "user/adapter")
    assert "tiny-sparse (a local folder, which is not on the Hub)" in card_of(hub, "user/adapter")


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_an_adapter_says_how_it_was_tuned(kind: str, hub: LoopbackHub, checkpoint: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain.ksparse.tuning = {"task": "koalpaca", "base": str(checkpoint), "r": 8}  # as `load_checkpoint` sets it
    lora(plain, kind).push_to_hub("user/adapter")
    lora(AutoModelForCausalLM.from_pretrained(checkpoint), kind).push_to_hub("user/untuned")
    assert read_tuning("user/untuned") is None
    assert json.loads(hub.files("user/adapter")["finetuning.json"]) == {**plain.ksparse.tuning, "base": "tiny-sparse"}
    assert read_tuning("user/adapter") == {**plain.ksparse.tuning, "base": "tiny-sparse"}


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_adapter_with_results(kind: str, hub: LoopbackHub, checkpoint: Path, base: Path) -> None:
    """The base's own results are not the adapter's, and the adapter's are measured with it."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain.push_to_hub("user/sparse", evaluate=TEXT_ONLY, baseline=base)
    model = lora(AutoModelForCausalLM.from_pretrained("user/sparse"), kind)
    model.push_to_hub("user/adapter")
    assert "evaluation_results.json" not in hub.files("user/adapter")
    model.push_to_hub("user/adapter", evaluate=TEXT_ONLY, baseline=base)
    results = json.loads(hub.files("user/adapter")["evaluation_results.json"])
    of_base = json.loads(hub.files("user/sparse")["evaluation_results.json"])
    assert results["dense"][0]["metrics"] == of_base["dense"][0]["metrics"]
    assert results["sparse"][0]["metrics"] != of_base["sparse"][0]["metrics"]
    assert "sparse with this adapter" in card_of(hub, "user/adapter")


def test_adapter_has_no_dense_variant(hub: LoopbackHub, model: PreTrainedModel) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    with pytest.raises(ValueError, match="an adapter has no dense variant"):
        lora(model, "peft").push_to_hub(NAME, dense_revision="dense")
    assert hub.requests == []


def test_adapter_on_a_dense_model_is_pushed_as_peft_does(hub: LoopbackHub, base: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    lora(AutoModelForCausalLM.from_pretrained(base), "peft").push_to_hub(NAME)
    assert "optimum-ksparse" not in card_of(hub)


def test_named_adapter_on_a_folder(hub: LoopbackHub, checkpoint: Path) -> None:
    """PEFT writes it into a folder of its name."""
    peft = pytest.importorskip("peft", reason="needs the extra finetune")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config, adapter_name="korean")
    model.push_to_hub("user/adapter")
    assert "korean/adapter_config.json" in hub.files("user/adapter")
    told = [path for path, c in hub.files("user/adapter").items() if str(checkpoint.parent).encode() in c]
    assert told == []
    assert "256 trained parameters" in card_of(hub, "user/adapter")


def test_adapter_on_a_folder_with_a_relative_path(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From elsewhere "secret/sparse" reads like a name on the Hub."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    shutil.copytree(checkpoint, tmp_path / "secret/sparse")
    monkeypatch.chdir(tmp_path)
    model = lora(AutoModelForCausalLM.from_pretrained("secret/sparse"), "peft")
    monkeypatch.chdir(tmp_path / "secret")
    model.push_to_hub("user/adapter", tokenizer=False)
    assert [path for path, content in hub.files("user/adapter").items() if b"secret" in content] == []


def test_adapter_does_not_remove_the_model_beside_it(hub: LoopbackHub, sparse_on_hub: str) -> None:
    pytest.importorskip("peft", reason="needs the extra finetune")
    before = set(hub.files(sparse_on_hub))
    lora(AutoModelForCausalLM.from_pretrained(sparse_on_hub), "peft").push_to_hub(sparse_on_hub)
    assert before <= set(hub.files(sparse_on_hub))


def test_model_in_the_place_of_an_adapter(
    hub: LoopbackHub, sparse_on_hub: str, model: PreTrainedModel, token_ids: torch.Tensor
) -> None:
    """An adapter's files beside it would be loaded, with the adapter's base, in its place."""
    pytest.importorskip("peft", reason="needs the extra finetune")
    lora(AutoModelForCausalLM.from_pretrained(sparse_on_hub), "peft").push_to_hub(NAME)
    model.push_to_hub(NAME)
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_a_private_baseline_is_loaded_with_its_token(hub: LoopbackHub, base: Path) -> None:
    hub.add_repo("user/dense", read(base), private=True)
    hub.required_token = TOKEN
    model = Baseline("user/dense", None, {"token": TOKEN}).load(AutoModelForCausalLM, torch.float32, "cpu")
    assert model.num_parameters() > 0
    shutil.rmtree(HF_HOME / "hub")
    with pytest.raises(OSError, match="user/dense"):
        Baseline("user/dense").load(AutoModelForCausalLM, torch.float32, "cpu")


def test_a_base_that_only_a_file_names_is_not_asked_for_its_card(
    hub: LoopbackHub, base: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = b"---\nlicense: apache-2.0\nlanguage: [ko, 7]\npipeline_tag: text-generation\n---\n"
    hub.add_repo("org/tiny-base", {**read(base), "README.md": theirs})
    model = AutoModelForCausalLM.from_pretrained(
        "org/tiny-base", sparsity_config=SparsityConfig("wanda", "2:4", dataset=token_ids)
    )
    assert model.sparsity_report.base_card == {"license": "apache-2.0", "pipeline_tag": "text-generation"}
    model.save_pretrained(tmp_path / "sparse")
    hub.requests.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").push_to_hub(NAME, tokenizer=False)
    assert not sent(hub, "GET", "tiny-base") + sent(hub, "HEAD", "tiny-base")
    assert metadata(hub)["license"] == "apache-2.0"
    prune_checkpoint("org/tiny-base", tmp_path / "streamed", SparsityConfig("wanda", "2:4", dataset=token_ids))
    assert SparsityReport.load(tmp_path / "streamed/sparsity_report.json").base_card == model.sparsity_report.base_card
