"""Fine-tuning: settings, targets, KoAlpaca's data and examples, and runs that are cut off."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.study.finetuning import KoAlpacaSettings, koalpaca_prompt, linear_targets, study_settings
from optimum_ksparse.study.finetuning.instructions import instruction_rows

from ..conftest import REPOSITORY, held_by_another, make_config, sample_texts

pytest.importorskip("trl", reason="needs the extra finetune")

from optimum_ksparse.study.finetuning.koalpaca import KoAlpacaTrainer
from optimum_ksparse.study.finetuning.run import finetune, trainer_arguments

DATA = REPOSITORY / "tests/study/koalpaca.jsonl"
SMALL = {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2, "learning_rate": 0.01, "dropout": 0.2}
RUN = {**SMALL, "save_steps": 2, "max_steps": 6, "data": str(DATA), "max_length": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A packed 2:4 model with its tokenizer."""
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("gpt_neox", max_position_embeddings=256))
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# settings and targets


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "qlora"}, "method"),
        ({"r": 0}, "r is 0"),
        ({"r": 8.0}, "r is 8.0"),
        ({"dropout": 1}, "dropout"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"bf16": "yes"}, "bf16"),
        ({"max_length": 1}, "max_length"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size"),
    ],
)
def test_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        KoAlpacaSettings(**settings)


def test_the_defaults_are_those_of_alpaca_lora(monkeypatch):
    settings = KoAlpacaSettings()
    assert (settings.r, settings.alpha, settings.dropout, settings.learning_rate) == (8, 16, 0.05, 3e-4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert trainer_arguments(settings, "out")["gradient_accumulation_steps"] == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes"):
        trainer_arguments(settings, "out")


def test_a_study_tunes_the_dense_model_alike():
    assert study_settings(KoAlpacaSettings, {"r": 2}, "nsmc.koalpaca").r == 2
    with pytest.raises(ValueError, match="masked"):
        study_settings(KoAlpacaSettings, {"method": "masked"}, "nsmc.koalpaca")
    with pytest.raises(ValueError, match=r"nsmc\.koalpaca.*did you mean 'r'"):
        study_settings(KoAlpacaSettings, {"rr": 2}, "nsmc.koalpaca")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt_neox", {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_targets_are_all_linear_maps_of_the_blocks(make_model, name, targets, sparse):
    model = make_model(name)
    if sparse:
        sparsify(model, SparsityConfig("magnitude", "2:4"))
    assert set(linear_targets(model)) == targets


# data


@pytest.mark.parametrize("line", ["{", "[]", '{"output": "b"}', '{"instruction": "a", "output": 3}'])
def test_a_bad_line_is_refused(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "url": "c"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        instruction_rows(path)
    assert instruction_rows(path, max_examples=1) == ("bad.jsonl", [{"instruction": "a", "output": "b"}])


def test_data_that_is_not_there(tmp_path, hub):
    with pytest.raises(FileNotFoundError):
        instruction_rows(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no example"):
        instruction_rows(tmp_path / "empty.jsonl")
    with pytest.raises(ConnectionError, match="user/none"):
        instruction_rows("user/none")


def test_empty_rows_are_left_out(hub):
    lines = [*DATA.read_text(encoding="utf-8").splitlines()[:3], '{"instruction": " ", "output": "x"}']
    hub.add_repo("user/data", {"train.jsonl": "\n".join(lines).encode()}, repo_type="dataset")
    assert instruction_rows("user/data") == ("user/data", instruction_rows(DATA, 3)[1])


def test_examples_are_the_form_with_labels_on_the_answer(make_model, tokenizer, tmp_path):
    model = make_model(max_position_embeddings=256)
    rows = instruction_rows(DATA)[1]
    longest = sorted(len(tokenizer(koalpaca_prompt(row["instruction"]))["input_ids"]) for row in rows)[-1]
    settings = KoAlpacaSettings(**{**RUN, "max_length": longest})
    trainer = KoAlpacaTrainer(model, tokenizer, settings, trainer_arguments(settings, tmp_path))
    assert 0 < len(trainer.train_dataset) < len(rows)
    short = [row for row in rows if len(tokenizer(koalpaca_prompt(row["instruction"]))["input_ids"]) < longest]
    for row, example in zip(short, trainer.train_dataset, strict=True):
        whole = tokenizer(f"{koalpaca_prompt(row['instruction'])} {row['output']}</s>")["input_ids"]
        prompt = tokenizer(koalpaca_prompt(row["instruction"]))["input_ids"]
        assert example["input_ids"] == whole[:longest]
        assert example["labels"] == [-100] * len(prompt) + whole[len(prompt) : longest]
    with pytest.raises(ValueError, match="max_length"):
        KoAlpacaTrainer(model, tokenizer, KoAlpacaSettings(**RUN | {"max_length": 2}), {})
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        KoAlpacaTrainer(model, endless, settings, {})


# runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_is_cut_off_goes_on_with_the_same_curve(folder, tmp_path, method, token_ids, monkeypatch):
    """Cut off within its second checkpoint, which has its weights by now, and goes on from the first one."""
    settings = {**RUN, "method": method, "max_steps": 3, "save_steps": 1}
    expected = finetune(folder, None, KoAlpacaSettings(**settings), tmp_path / "whole")
    assert expected["steps"] == 3 == len(set(expected["loss"]))
    output, saves, save = tmp_path / "cut", [], Trainer._save_rng_state

    def killed(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 2:
            raise SystemExit
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", killed)
        with pytest.raises(SystemExit):
            finetune(folder, None, KoAlpacaSettings(**settings), output)
    torn = output / ".checkpoints/checkpoint-2"
    assert list(torn.glob("*.safetensors")) and not (output / "tokenizer.json").exists()
    (torn / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="alpha: was 16, is 8"):
        finetune(folder, None, KoAlpacaSettings(**settings, alpha=8), output)
    assert finetune(folder, None, KoAlpacaSettings(**settings), output) == expected
    assert contents(output) == contents(tmp_path / "whole")
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, output))
    assert len(sparse_modules(tuned)) == len(sparse_modules(base)) == 8
    with torch.no_grad():
        assert not torch.allclose(tuned(token_ids).logits, base(token_ids).logits, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_is_cut_off_while_it_is_saved_trains_no_further(folder, tmp_path, monkeypatch):
    settings = KoAlpacaSettings(**{**RUN, "method": "masked", "max_steps": 1})
    output = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(KoAlpacaTrainer, "save", lambda self, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(folder, None, settings, output)
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    assert len(finetune(folder, None, settings, output)["loss"]) == 1
    assert not (output / ".checkpoints").exists() and (output / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_finished_runs(folder, tmp_path, monkeypatch):
    output, settings = tmp_path / "run", {**RUN, "max_steps": 1, "bf16": True, "gradient_checkpointing": True}
    record = finetune(folder, None, KoAlpacaSettings(**settings), output)
    before = contents(output)
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("trained"))
    assert finetune(folder, None, KoAlpacaSettings(**settings), output) == record
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert finetune(model, None, KoAlpacaSettings(**settings), output) == record and model.config.use_cache
    with pytest.raises(ValueError, match="data_sha256"):
        finetune(folder, None, KoAlpacaSettings(**settings, max_examples=3), output)
    with pytest.raises(ValueError, match="is the source"):
        finetune(folder, None, KoAlpacaSettings(**settings), folder, overwrite=True)
    with pytest.raises(ValueError, match="context of 256"):
        finetune(folder, None, KoAlpacaSettings(**settings | {"max_length": 512}), output)
    with pytest.raises(ValueError, match="does not replace"):
        finetune(folder, None, KoAlpacaSettings(**settings, method="full"), output, overwrite=True)
    assert contents(output) == before


# command and examples


def finetune_command(*arguments: object) -> None:
    parse_words(["finetune", "koalpaca", *map(str, arguments)]).execute()


def test_a_second_start_and_foreign_folders_are_refused_before_the_model_is_read(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("loaded")

    monkeypatch.setattr("optimum_ksparse.study.finetuning.run.load_model", fail)
    (tmp_path / "busy").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with held_by_another(tmp_path / "busy" / ".finetuning.lock"):
        for output, error in (("busy", BlockingIOError), ("other", FileExistsError), ("other/config.json", OSError)):
            with pytest.raises(error):
                finetune(folder, None, KoAlpacaSettings(**RUN), tmp_path / output)
            with pytest.raises(error):
                finetune_command(folder, tmp_path / output, "--data", DATA)
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    output = tmp_path / "out"
    recipe = REPOSITORY / "configs/finetune/koalpaca.yaml"
    flags = ("--data", DATA, "--max-steps", 1, "--batch-size", 4, "--max-length", 200, "--r", 4)
    finetune_command(folder, output, "--config", recipe, *flags)
    assert f"saved in {output}" in capsys.readouterr().out
    record = json.loads((output / "finetuning.json").read_text(encoding="utf-8"))
    assert (record["task"], record["r"], record["warmup_steps"], record["steps"]) == ("koalpaca", 4, 100, 1)
    with pytest.raises(ValueError, match="r: was 4, is 8"):
        finetune_command(folder, output, "--config", recipe, *flags[:-2])


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    path = REPOSITORY / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_lora_trainer(folder, tmp_path, monkeypatch):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(sample_texts("calibration")[:4]), encoding="utf-8")
    run_example("lora_trainer.py", monkeypatch, folder, texts, tmp_path / "merged", "--steps", 2)
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", folder))
    for (name, module), (_, before) in zip(sparse_modules(merged).items(), sparse_modules(base).items(), strict=True):
        assert torch.equal(module.weight_mask, before.weight_mask), name
        assert not torch.equal(module.weight, before.weight), name


def test_lora_sft_and_an_adapter_from_the_hub(folder, tmp_path, monkeypatch, hub, capsys):
    hub.add_repo("user/base", contents(folder))
    adapter = tmp_path / "adapter"
    run_example("lora_sft.py", monkeypatch, folder, DATA, adapter, "--steps", 1)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "user/base"}))
    hub.add_repo("user/adapter", contents(adapter))
    capsys.readouterr()
    run_example("load_adapter.py", monkeypatch, "user/adapter", "안녕하세요?", "--max-new-tokens", 3)
    assert capsys.readouterr().out.strip()
    assert not hub.unknown
