"""Publishing through the real client and the loopback Hub: one commit with everything in it, and nothing else."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, PreTrainedModel
from transformers.utils import PushToHubMixin

from optimum_ksparse import SparsityConfig
from optimum_ksparse.checkpoint import facts, sparse_modules
from optimum_ksparse.evaluation import EvaluationProtocol
from optimum_ksparse.integration import register

from ..conftest import make_config
from ..loopback_hub import LoopbackHub
from .pushes import (
    EVALUATED,
    NAME,
    QUICK,
    TEXT_ONLY,
    TEXTS,
    TOKEN,
    UNEVALUATED,
    Tokenizer,
    card_of,
    created,
    logits,
    make_dense,
    metadata,
    pushed,
    read,
)

pytest.importorskip("matplotlib", reason="needs the extra plot")

# --- One commit ------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
    config = SparsityConfig(pattern="2:4", dataset=str(tmp_path / "secret/calibration.txt"), **settings)
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


def test_quantised_values_are_published_and_described(hub: LoopbackHub, make_pruned: Any) -> None:
    model = make_pruned("llama", values="int8", group_size=64)
    model.push_to_hub(NAME, tokenizer=False)
    assert len(pushed(hub)) == 1
    again = AutoModelForCausalLM.from_pretrained(NAME)
    assert {module.values for module in sparse_modules(again).values()} == {"int8"}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert "int8" in metadata(hub)["tags"] and "bits a weight" in " ".join(card_of(hub).split())
