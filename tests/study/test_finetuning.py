"""Fine-tuning: settings, targets, KoAlpaca's examples and labels, the loss, and runs that are cut off."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.study.finetuning import FinetuningSettings, finetune_koalpaca, koalpaca_prompt, linear_targets
from optimum_ksparse.study.finetuning.answers import answer_loss
from optimum_ksparse.study.finetuning.checkpoints import MarkWhole
from optimum_ksparse.study.finetuning.instructions import instruction_rows
from optimum_ksparse.study.finetuning.koalpaca import Collator, koalpaca_examples
from optimum_ksparse.study.finetuning.training import finished

from ..conftest import REPOSITORY, held_by_another, make_config, sample_texts

DATA = REPOSITORY / "tests/study/koalpaca.jsonl"
SMALL = {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2, "learning_rate": 0.01, "dropout": 0.2}


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


@pytest.fixture
def pairs() -> list[tuple[str, str]]:
    return instruction_rows(DATA, "")[1]


# settings and targets


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"method": "qlora"}, ValueError, "method='qlora'"),
        ({"r": 0}, ValueError, "r"),
        ({"r": 8.0}, TypeError, "r"),
        ({"dropout": 1}, ValueError, "dropout=1"),
        ({"dropout": "0.1"}, TypeError, "dropout"),
        ({"learning_rate": 0}, ValueError, "learning_rate=0"),
        ({"num_epochs": -1}, ValueError, "num_epochs=-1"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"batch_size": 6, "micro_batch_size": 4}, ValueError, "not a multiple"),
    ],
)
def test_settings_are_refused_by_name(settings, error, said):
    with pytest.raises(error, match=said):
        FinetuningSettings(**settings)


def test_the_defaults_are_those_of_alpaca_lora():
    settings = FinetuningSettings()
    found = (settings.r, settings.alpha, settings.dropout, settings.learning_rate, settings.warmup_steps)
    assert found == (8, 16, 0.05, 3e-4, 100)
    assert (settings.batch_size, settings.micro_batch_size, settings.num_epochs) == (128, 4, 3)
    assert settings.accumulation_steps(4) == 8
    with pytest.raises(ValueError, match="3 processes"):
        settings.accumulation_steps(3)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt_neox", {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (
            "falcon",
            {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
        (
            "llama",
            {
                *(f"self_attn.{name}_proj" for name in "qkvo"),
                *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            },
        ),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_targets_are_all_linear_maps_of_the_blocks(make_model, name, targets, sparse):
    model = make_model(name)
    if sparse:
        sparsify(model, SparsityConfig("magnitude", "2:4"))
    assert set(linear_targets(model)) == targets


# data


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"bad\.jsonl, line 3 is not JSON"),
        ("[]", r"bad\.jsonl, line 3 must be an object"),
        ('{"output": "b"}', r"line 3: `instruction` must be a text, found the fields output"),
        ('{"instruction": "a", "output": 3}', r"line 3: `output` must be a text, found int"),
        ('{"instruction": " ", "output": "b"}', r"line 3: `instruction` is empty"),
        ('{"instruction": "a", "output": ""}', r"line 3: `output` is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "url": "c"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        instruction_rows(path, "")
    assert instruction_rows(path, "", max_examples=1) == ("bad.jsonl", [("a", "b")])


def test_data_that_is_not_there(tmp_path, hub):
    with pytest.raises(FileNotFoundError):
        instruction_rows(tmp_path / "missing.jsonl", "")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no example"):
        instruction_rows(tmp_path / "empty.jsonl", "")
    with pytest.raises(ConnectionError, match=r"user/none.*user/usual"):
        instruction_rows("user/none", "user/usual")


def test_data_on_the_hub_lose_their_empty_rows(hub, caplog):
    lines = [*DATA.read_text(encoding="utf-8").splitlines()[:3], '{"instruction": "", "output": "x"}']
    hub.add_repo("user/data", {"train.jsonl": "\n".join(lines).encode()}, repo_type="dataset")
    name, rows = instruction_rows("user/data", "")
    assert (name, rows) == ("user/data", instruction_rows(DATA, "", 3)[1])


def test_examples_are_the_form_with_labels_on_the_answer(tokenizer, pairs):
    examples = koalpaca_examples(pairs, tokenizer, 512)
    assert len(examples) == len(pairs)
    for (instruction, answer), example in zip(pairs, examples, strict=True):
        ids, labels = example["input_ids"], example["labels"]
        assert tokenizer.decode(ids) == f"### 질문: {instruction}\n\n### 답변: {answer}</s>"
        prompt = tokenizer(koalpaca_prompt(instruction))["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]


_TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(instruction=_TEXTS, answer=_TEXTS, length=st.integers(2, 80), merges=st.booleans())
def test_the_border_is_that_of_the_prompt_alone(tokenizer, instruction, answer, length, merges):
    class Merging:
        """Puts ": " into one token, over the border."""

        eos_token_id, bos_token_id = 2, None

        def __call__(self, texts, **settings):
            return {"input_ids": [list(text.replace(": ", "\0").encode()) for text in texts]}

    chosen = Merging() if merges else tokenizer
    prompt = chosen([koalpaca_prompt(instruction)], add_special_tokens=False)["input_ids"][0]
    if len(prompt) >= length:
        with pytest.raises(ValueError, match=f"max_length={length}"):
            koalpaca_examples([(instruction, answer)], chosen, length)
        return
    (example,) = koalpaca_examples([(instruction, answer)], chosen, length)
    ids, labels = example["input_ids"], example["labels"]
    assert ids[: len(prompt)] == prompt and len(ids) <= length
    assert labels == [-100] * len(prompt) + ids[len(prompt) :] and len(labels) > len(prompt)
    (whole,) = koalpaca_examples([(instruction, answer)], chosen, 10_000)
    assert ids == whole["input_ids"][:length] and whole["input_ids"][-1] == 2


def test_examples_begin_with_the_beginning_token_where_the_tokenizer_adds_it(tokenizer, pairs):
    class Beginning(type(tokenizer)):
        def __call__(self, texts, add_special_tokens=True, **settings):
            found = super().__call__(texts, add_special_tokens=False, **settings)
            if add_special_tokens and isinstance(texts, str):
                found["input_ids"] = [1, *found["input_ids"]]
            return found

    other = Beginning(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    (plain,), (example,) = (koalpaca_examples(pairs[:1], chosen, 512) for chosen in (tokenizer, other))
    assert example == {"input_ids": [1, *plain["input_ids"]], "labels": [-100, *plain["labels"]]}


def test_long_prompts_are_left_out_and_a_missing_end_token_refused(tokenizer, pairs):
    longest = max(len(tokenizer(koalpaca_prompt(instruction))["input_ids"]) for instruction, _ in pairs)
    assert 0 < len(koalpaca_examples(pairs, tokenizer, longest)) < len(pairs)
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        koalpaca_examples(pairs, endless, 512)


# loss


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "falcon", "gemma3", "bloom", "opt"])
@pytest.mark.parametrize("limit", [1, 2**30])
def test_the_loss_over_answers_is_that_of_the_model(make_model, tokenizer, pairs, monkeypatch, name, limit):
    model = make_model(name, max_position_embeddings=256)
    more = {"final_logit_softcapping": 0.5} if name == "gemma3" else {}
    for key, value in more.items():
        setattr(model.config, key, value)
    batch = Collator(model, tokenizer)(koalpaca_examples(pairs[:3], tokenizer, 200))
    model.eval()  # no dropout
    monkeypatch.setattr("optimum_ksparse.study.finetuning.answers._LOGITS_BYTES", limit)
    losses, gradients = [], []
    for ours in (False, True):
        model.zero_grad()
        if ours:
            with answer_loss(model):
                loss = model(**batch, num_items_in_batch=7).loss
                loss.backward()
        else:
            loss = model(**batch).loss * int((batch["labels"][:, 1:] != -100).sum()) / 7
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert "forward" not in vars(model)


# runs


def train_all(folder: Path, output: Path, **settings: object) -> dict:
    chosen = FinetuningSettings(**{**SMALL, "save_steps": 2, **settings})
    finetune_koalpaca(folder, None, DATA, chosen, output, max_length=200)
    return json.loads((output / "finetuning.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


_CHILD = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from tests.test_finetuning import train_all
folder, output = map(Path, sys.argv[1:3])
save, calls = Trainer._save_rng_state, [0]
def killed(self, output_dir):
    calls[0] += 1
    if calls[0] == 2:  # its second checkpoint, which has its weights by now
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)
Trainer._save_rng_state = killed
train_all(folder, output)
"""


def test_a_run_that_is_killed_goes_on_with_the_same_curve(folder, tmp_path, monkeypatch):
    expected = train_all(folder, tmp_path / "whole")
    assert expected["steps"] == 12 and len(set(expected["loss"])) > 6
    output = tmp_path / "cut"
    for checkpoints in ({2, 4}, {4, 6}):
        command = [sys.executable, "-c", _CHILD, str(folder), str(output)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps = {int(path.name.split("-")[1]) for path in (output / ".checkpoints").glob("checkpoint-*")}
        assert steps >= checkpoints
        assert not (output / "adapter_config.json").exists()

    def interrupts(self, args, state, control, **kwargs):
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_step_end", interrupts)
        with pytest.raises(KeyboardInterrupt):
            train_all(folder, output)
    with pytest.raises(ValueError, match=r"unfinished run with alpha=16, not 8: use the same settings"):
        train_all(folder, output, alpha=8)
    # What a kill within the writing of the state leaves.
    torn = output / ".checkpoints/checkpoint-8"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    began: list[int] = []

    def begins(self, args, state, control, **kwargs):
        began.append(state.global_step)

    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_train_begin", begins)
        assert train_all(folder, output) == expected
    assert began == [6]
    assert contents(output) == contents(tmp_path / "whole")


def test_finished_runs(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    train_all(folder, output, max_steps=1)
    before = contents(output)
    monkeypatch.setattr(
        "optimum_ksparse.study.finetuning.koalpaca.train", lambda *args, **kwargs: pytest.fail("trained")
    )
    settings = FinetuningSettings(**{**SMALL, "save_steps": 2, "max_steps": 1})
    again = finetune_koalpaca(folder, None, DATA, settings, output, max_length=200)
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 8 and not again.training
    with pytest.raises(ValueError, match="finished run with data_sha256"):
        finetune_koalpaca(folder, None, DATA, settings, output, max_length=200, max_examples=3)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is the source"):
            finetune_koalpaca(folder, None, DATA, settings, folder, max_length=200, overwrite=overwrite)
    with pytest.raises(ValueError, match="max_length=512 is above the model's context of 256"):
        finetune_koalpaca(folder, None, DATA, settings, output)
    with pytest.raises(ValueError, match="does not replace"):
        finished(output, FinetuningSettings(method="full"), {}, overwrite=True)
    assert finished(output, settings, {}, overwrite=True) is None
    assert contents(output) == before


@pytest.mark.parametrize("method", ["masked", "hira", "full"])
def test_methods_train_and_load_again(folder, tmp_path, method, token_ids, monkeypatch):
    """A run of each method, cut off and gone on with: what is saved is what was trained, with every zero."""

    def interrupts(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    settings = {"method": method, "max_steps": 4, "learning_rate": 0.01}
    expected = train_all(folder, tmp_path / "whole", **settings)
    output = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_step_end", interrupts)
        with pytest.raises(KeyboardInterrupt):
            train_all(folder, output, **settings)
    assert train_all(folder, output, **settings) == expected
    assert contents(output) == contents(tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(folder)
    tuned = AutoModelForCausalLM.from_pretrained(output)
    assert len(sparse_modules(tuned)) == len(sparse_modules(base)) == 8
    with torch.no_grad():
        assert not torch.allclose(tuned(token_ids).logits, base(token_ids).logits, atol=1e-4)


def test_the_model_is_left_as_it_was(make_model, tokenizer, tmp_path):
    model = make_model("llama", max_position_embeddings=256)
    settings = FinetuningSettings(**SMALL, max_steps=1, bf16=True, gradient_checkpointing=True)
    tuned = finetune_koalpaca(model, tokenizer, DATA, settings, tmp_path, max_length=200)
    for module in tuned.modules():
        assert not {"forward", "_original_forward"} & set(vars(module))
    assert tuned(torch.tensor([[5, 6]])).logits.dtype == torch.float32


# command, recipes and examples


def finetune_command(*arguments: object) -> None:
    parse_words(["finetune", "koalpaca", *map(str, arguments)]).execute()


def test_a_second_start_and_foreign_folders_are_refused_before_the_model_is_read(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("loaded")

    monkeypatch.setattr("optimum_ksparse.study.commands.finetune_koalpaca.load_with_tokenizer", fail)
    monkeypatch.setattr("optimum_ksparse.study.finetuning.koalpaca.class_for_source", fail)
    (tmp_path / "busy").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    settings = FinetuningSettings(**SMALL)
    with held_by_another(tmp_path / "busy" / ".finetuning.lock"):
        for output, error in (("busy", BlockingIOError), ("other", FileExistsError), ("other/config.json", OSError)):
            with pytest.raises(error):
                finetune_koalpaca(folder, None, DATA, settings, tmp_path / output)
            with pytest.raises(error):
                finetune_command(folder, tmp_path / output, "--data", DATA)
    with pytest.raises(ValueError, match="is the source"):
        finetune_command(folder, folder, "--data", DATA, "--overwrite")
    assert not (folder / "adapter_config.json").exists()


def test_the_command(folder, tmp_path, capsys):
    output = tmp_path / "out"
    recipe = REPOSITORY / "configs/finetune/koalpaca.yaml"
    flags = ("--data", DATA, "--max-steps", 1, "--batch-size", 4, "--max-length", 200, "--r", 4)
    finetune_command(folder, output, "--config", recipe, *flags)
    assert f"saved in {output}" in capsys.readouterr().out
    found = json.loads((output / "finetuning.json").read_text(encoding="utf-8"))
    assert (found["task"], found["r"], found["warmup_steps"], found["steps"]) == ("koalpaca", 4, 100, 1)
    with pytest.raises(ValueError, match="output is missing"):
        finetune_command(folder)
    with pytest.raises(ValueError, match="finished run with r=4, not 8"):
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
    for (name, found), (_, before) in zip(sparse_modules(merged).items(), sparse_modules(base).items(), strict=True):
        assert torch.equal(found.weight_mask, before.weight_mask), name
        assert not torch.equal(found.weight, before.weight), name


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
