"""Adapters on the Hub, and what they name as their base."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig
from optimum_ksparse.commands import parse_words
from optimum_ksparse.evaluation import Baseline, read_tuning

from ..conftest import HF_HOME
from ..loopback_hub import LoopbackHub
from .pushes import NAME, TEXT_ONLY, TOKEN, TOKENIZER_FILES, card_of, logits, lora, metadata, pushed, read, sent

pytest.importorskip("matplotlib", reason="needs the extra plot")


@pytest.mark.slow
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
    model = Baseline("user/dense", None, {"token": TOKEN}).load("cpu")
    assert model.num_parameters() > 0
    shutil.rmtree(HF_HOME / "hub")
    with pytest.raises(OSError, match="user/dense"):
        Baseline("user/dense").load("cpu")


def test_a_base_that_only_a_file_names_is_not_asked_for_its_card(hub: LoopbackHub, base: Path, tmp_path: Path) -> None:
    theirs = b"---\nlicense: apache-2.0\nlanguage: [ko, 7]\npipeline_tag: text-generation\n---\n"
    hub.add_repo("org/tiny-base", {**read(base), "README.md": theirs})
    model = AutoModelForCausalLM.from_pretrained("org/tiny-base", sparsity_config=SparsityConfig("magnitude", "2:4"))
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
