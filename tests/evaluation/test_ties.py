"""What is read of a model whose weights have changed since pruning: reports, results and cards, and what `Trainer` and
TRL publish of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from optimum_ksparse import SparsityConfig, SparsityReport, sparsify, write_card
from optimum_ksparse.checkpoint import fingerprint
from optimum_ksparse.evaluation import EvaluationProtocol, EvaluationResults, evaluate_model, ties

from ..conftest import make_config, sample_texts, thinned
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

TAGS = {"optimum-ksparse", "sparse", "pruned", "sparsegpt", "2of4"}
ERROR = re.compile(r"Output error.*W\)ᵀ|relative_output_error.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a pruned model and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", num_hidden_layers=1))
    sparsify(model, SparsityConfig("sparsegpt", "2:4", dataset=torch.randint(4, 300, (2, 32))))
    folder = tmp_path_factory.mktemp("ties") / "sparse"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A model for each time that all of its weights were read."""
    found: list[Any] = []
    monkeypatch.setattr(ties, "fingerprint", lambda model: found.append(model) or fingerprint(model))
    return found


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


def make_trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    settings = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, **{**settings, **more})
    return Trainer(model, arguments, train_dataset=Rows())


def report_in(folder: Path) -> SparsityReport:
    return SparsityReport.load(folder / "sparsity_report.json")


def kinds(report: SparsityReport) -> list[str]:
    return [change.kind for change in report.changes]


def value_of(model: PreTrainedModel) -> torch.nn.Parameter:
    return model.model.layers[0].mlp.up_proj.weight


# --- The report and the weights --------------------------------------------------------------------------------------


def test_a_report_is_tied_to_its_weights_when_it_is_saved(checkpoint: Path, model: PreTrainedModel) -> None:
    assert report_in(checkpoint).fingerprint == fingerprint(model) and report_in(checkpoint).changes == []
    assert ERROR.search(write_card(model, checkpoint).read_text(encoding="utf-8"))


def test_saving_again_reads_no_weights_and_changes_nothing(
    model: PreTrainedModel, hashed: list[Any], tmp_path: Path
) -> None:
    before = copy.deepcopy(model.sparsity_report)
    for name in ("packed", "again"):
        model.save_pretrained(tmp_path / name)
    model.config.quantization_config.storage = "dense"
    model.save_pretrained(tmp_path / "dense")
    assert not hashed
    assert before == report_in(tmp_path / "again") == report_in(tmp_path / "dense")
    assert ERROR.search(write_card(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path).read_text())


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "scaled past autograd": lambda model: value_of(model).data.mul_(1.5),
    "one value written": lambda model: value_of(model).detach()[0, 3].add_(1),
    "other values": lambda model: model.load_state_dict({**model.state_dict(), "lm_head.weight": torch.ones(384, 32)}),
    "a norm": lambda model: model.model.norm.weight.data.fill_(0.5),
    "more tokens": lambda model: model.resize_token_embeddings(400),
    "another dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fresh", thinned([False, True], [False]))
def test_a_change_is_told_and_the_errors_go(
    name: str, fresh: bool, model: PreTrainedModel, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Also between pruning and the first time that the model is saved."""
    if fresh:
        model = make_model("llama", num_hidden_layers=1)
        sparsify(model, SparsityConfig("sparsegpt", "2:4", dataset=torch.randint(4, 300, (2, 32))))
    CHANGES[name](model)
    model.save_pretrained(tmp_path)
    assert kinds(report_in(tmp_path)) == ["unknown"]
    for source in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")):
        card = write_card(source, tmp_path).read_text(encoding="utf-8")
        assert "## After pruning" in card and not ERROR.search(card)
        assert kinds(source.sparsity_report) == ["unknown"]


def test_other_weights_that_are_saved_leave_the_models_own_report_as_it_is(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.sparsity_report)
    model.ksparse.results = EvaluationResults(before.fingerprint)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "other", state_dict=other)
    assert kinds(report_in(tmp_path / "other")) == ["unknown"]
    assert not (tmp_path / "other/evaluation_results.json").exists() and "model.norm.weight" in other
    model.save_pretrained(tmp_path / "same", state_dict=model.state_dict())
    assert report_in(tmp_path / "same") == before == model.sparsity_report
    assert (tmp_path / "same/evaluation_results.json").exists() and model.ksparse.results is not None


@pytest.mark.parametrize("tokens", [300, 400])
def test_the_parameters_are_counted_again(tokens: int, model: PreTrainedModel, tmp_path: Path) -> None:
    before = model.sparsity_report.num_parameters
    model.resize_token_embeddings(tokens)
    model.save_pretrained(tmp_path)
    wanted = before + 2 * (tokens - 384) * 32  # embeddings and head
    assert report_in(tmp_path).num_parameters == wanted
    assert f"{wanted:,} parameters (zeros included)" in write_card(model, tmp_path).read_text(encoding="utf-8")


def test_one_value_written_past_pytorch_is_found_when_the_card_is_written(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    value_of(model).data[3, 5] += 1
    card = write_card(model, tmp_path).read_text(encoding="utf-8")
    assert "## After pruning" in card and not ERROR.search(card)


def test_weights_that_another_program_wrote_into_the_folder_are_found(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    card = write_card(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).read_text(encoding="utf-8")
    assert "## After pruning" in card and not ERROR.search(card)


def test_a_report_of_an_earlier_version_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = json.loads((tmp_path / "sparsity_report.json").read_text())
    del data["fingerprint"], data["changes"]
    (tmp_path / "sparsity_report.json").write_text(json.dumps(data))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ERROR.search(write_card(model, tmp_path).read_text(encoding="utf-8"))
    model.save_pretrained(tmp_path / "again")
    assert report_in(tmp_path / "again").fingerprint is None  # whose weights they were is not known
    value_of(model).data.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    assert kinds(report_in(tmp_path / "changed")) == ["unknown"]


def test_a_model_without_records_has_none(checkpoint: Path, tmp_path: Path) -> None:
    names = ("report", "merge", "results")
    for path in checkpoint.iterdir():
        if path.name != "sparsity_report.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [getattr(model.ksparse, name) for name in names] == [None] * 3
    assert "## How to load" in write_card(model, tmp_path).read_text(encoding="utf-8")
    dense = AutoModelForCausalLM.from_pretrained(checkpoint).dequantize()
    assert [getattr(dense.ksparse, name) for name in names] == [None] * 3
    assert not dense.model_tags


# --- Training --------------------------------------------------------------------------------------------------------


def test_training_reads_all_weights_at_no_checkpoint_and_warns_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hashed: list[Any],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    protocol = EvaluationProtocol(texts=sample_texts("evaluation")[:1], seq_len=16, tasks=(), max_tokens=32)
    evaluate_model(model, tokenizer, protocol)
    hashed.clear()
    make_trainer(model, tmp_path, max_steps=3).train()
    model.save_pretrained(tmp_path / "end")
    assert not hashed
    assert sum("other weights" in record.message for record in caplog.records) == 1
    steps = [report_in(tmp_path / f"checkpoint-{n}").changes[0].steps for n in (1, 2, 3)]
    assert steps == [1, 2, 3] and not (tmp_path / "checkpoint-1/evaluation_results.json").exists()
    assert (model.sparsity_report.changes[0].by, model.sparsity_report.changes[0].steps) == ("Trainer", 3)
    value_of(model).data.mul_(2)
    model.save_pretrained(tmp_path / "end")
    assert kinds(report_in(tmp_path / "end")) == ["trained", "unknown"]


def check_published(hub: LoopbackHub, name: str, trainer: str, steps: int) -> None:
    files = hub.files(name)
    report = json.loads(files["sparsity_report.json"])
    assert (report["changes"][0]["by"], report["changes"][0]["steps"]) == (trainer, steps)
    card = files["README.md"].decode()
    assert set(ModelCard(card).data.tags) >= TAGS
    assert f'from_pretrained("{name}")' in card and "optimum-ksparse" in card
    assert "## After pruning" in card and f"`{trainer}`" in card and not ERROR.search(card)
    assert f" {len(files['model.safetensors']) / 1e6:.2f} |" in card


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_what_trainer_pushes(strategy: str, model: PreTrainedModel, hub: LoopbackHub, tmp_path: Path) -> None:
    more = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_strategy": strategy, "hub_always_push": True}
    trainer = make_trainer(model, tmp_path / "out", **more)
    trainer.train()
    trainer._finish_current_push()
    if strategy == "every_save":
        check_published(hub, "user/trained", "Trainer", 2)
    trainer.push_to_hub()
    check_published(hub, "user/trained", "Trainer", 2)
    assert str(tmp_path) not in hub.files("user/trained")["README.md"].decode()
    again = AutoModelForCausalLM.from_pretrained("user/trained")
    assert again.sparsity_report == model.sparsity_report
    trainer.create_model_card(language="ko", tags="mine")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "## 불러오기" in card and set(ModelCard(card).data.tags) >= TAGS | {"mine"}


def test_what_trl_pushes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hub: LoopbackHub, tmp_path: Path
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    more = {"push_to_hub": True, "hub_model_id": "user/sft", "hub_strategy": "every_save", "hub_always_push": True}
    settings = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "max_length": 16}
    rows = datasets.Dataset.from_dict({"text": sample_texts("calibration")[:4]})
    arguments = trl.SFTConfig(str(tmp_path / "out"), disable_tqdm=True, learning_rate=1e-2, **settings, **more)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer._finish_current_push()
    check_published(hub, "user/sft", "SFTTrainer", 2)
    trainer.push_to_hub()
    check_published(hub, "user/sft", "SFTTrainer", 2)
    assert "sft" in ModelCard(hub.files("user/sft")["README.md"].decode()).data.tags


def test_what_trainer_pushes_of_an_adapter(model: PreTrainedModel, hub: LoopbackHub, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    more = {"push_to_hub": True, "hub_model_id": "user/lora", "hub_strategy": "all_checkpoints"}
    trainer = make_trainer(adapted, tmp_path / "out", hub_always_push=True, **more)
    trainer.train()
    trainer._finish_current_push()
    trainer.push_to_hub()
    cards = {name: text.decode() for name, text in hub.files("user/lora").items() if name.endswith("README.md")}
    assert cards.keys() == {"README.md", "checkpoint-1/README.md", "checkpoint-2/README.md"}
    assert not [name for name, text in cards.items() if str(tmp_path.parent) in text]
    card = cards["README.md"]
    assert 'AutoPeftModelForCausalLM.from_pretrained("user/lora")' in card
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert kinds(model.sparsity_report) == []
    merged = __import__("optimum_ksparse").merge_adapter(adapted)
    change = merged.sparsity_report.changes[0]
    assert (change.kind, change.by, change.adapters, change.steps) == ("merged", "masked", ["LORA"], 2)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    text = write_card(again, tmp_path / "merged").read_text(encoding="utf-8")
    assert "LORA merged into the weights" in text and "(merge_report.json)" in text and not ERROR.search(text)
    assert kinds(again.sparsity_report) == ["merged"]
    value_of(again).data.mul_(2)
    text = write_card(again, tmp_path / "merged").read_text(encoding="utf-8")
    assert "LORA merged into the weights" in text and "(merge_report.json)" not in text


def test_a_trainer_of_another_model_is_as_it_was(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = make_model("llama", num_hidden_layers=1)
    trainer = make_trainer(model, tmp_path)
    assert "create_model_card" not in vars(trainer)
    assert not any(type(callback).__module__.startswith("optimum") for callback in trainer.callback_handler.callbacks)
    trainer.create_model_card()
    assert "ksparse" not in (tmp_path / "README.md").read_text()
