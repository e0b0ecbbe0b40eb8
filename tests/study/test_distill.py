"""Distillation: the loss, the teacher's logits on the disk, what is refused before any work, and runs."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

from optimum_ksparse import SparsityConfig, evaluate_perplexity, sparsify
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.commands.base import load_checkpoint
from optimum_ksparse.evaluation import running
from optimum_ksparse.kernels import fast_products
from optimum_ksparse.study.finetuning import DistillSettings

from ..conftest import CONTEXT, EVERY_ARCHITECTURE, REPOSITORY, VOCABULARY, make_config, sample_texts

pytest.importorskip("peft", reason="needs the extra finetune")

from optimum_ksparse.study.finetuning.distill import teacher as teacher_module
from optimum_ksparse.study.finetuning.distill import trainer as trainer_module
from optimum_ksparse.study.finetuning.distill.loss import distillation_loss, log_outcomes
from optimum_ksparse.study.finetuning.run import finetune

TEXTS = str(REPOSITORY / "examples/data/korean_evaluation.txt")
SMALL = {"num_samples": 8, "seq_len": 24, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 3e-3, "top_k": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> tuple[Path, Path]:
    """A dense model, which knows a little, and the packed 2:4 model made from it, in bfloat16, with a tokenizer."""
    root = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", tie_word_embeddings=True))
    ids = torch.tensor(tokenizer("\n\n".join(sample_texts("calibration")))["input_ids"][: 32 * 24]).view(32, 24)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in ids.split(8) * 4:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.bfloat16()
    for name in ("dense", "sparse"):
        if name == "sparse":
            sparsify(model, SparsityConfig("magnitude", "2:4"))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "dense", root / "sparse"


@pytest.fixture
def settings(folders, tmp_path):
    """Makes settings of a small run."""
    texts = tmp_path / "calibration.txt"
    texts.write_text("\n\n".join(sample_texts("calibration")), encoding="utf-8")
    return lambda **more: DistillSettings(**{"teacher": str(folders[0]), "dataset": str(texts), **SMALL, **more})


def load(folder: Path, **how: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# the loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_whole_distribution_where_one_token_is_left(temperature, weight):
    """With k + 1 tokens in the vocabulary nothing is cut; loss and gradient are those of torch."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 9).requires_grad_(), torch.randn(2, 5, 9)
    ids = torch.randint(0, 9, (2, 5))
    indices = (teacher / temperature).topk(8).indices
    log_probs = log_outcomes(teacher / temperature, indices)
    value = distillation_loss(student, ids, indices.int(), log_probs, temperature, weight)
    (3 * value).backward()
    gradient, student.grad = student.grad, None
    q, p = ((x / temperature).log_softmax(-1).flatten(0, 1) for x in (student, teacher))
    divergence = F.kl_div(q, p, log_target=True, reduction="sum")
    cross_entropy = F.cross_entropy(student.flatten(0, 1), ids.flatten(), reduction="sum")
    expected = (1 - weight) * temperature**2 * divergence + weight * cross_entropy
    (3 * expected).backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, student.grad)


def test_the_divergence_of_cut_distributions_is_proper():
    torch.manual_seed(0)
    teacher, ids = 3 * torch.randn(1, 40, 50), torch.randint(0, 50, (1, 40))
    indices = teacher.topk(5).indices
    log_probs = log_outcomes(teacher.clone(), indices)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 40))
    for shift in (0.0, 0.1, 1.0):
        student = teacher + shift * torch.randn_like(teacher)
        value = distillation_loss(student, ids, indices, log_probs)
        p, q = (x.log_softmax(-1) for x in (teacher, student))
        whole = F.kl_div(q, p, log_target=True, reduction="sum")
        assert -1e-6 < value <= whole + 1e-4
        assert (value > 1e-2) == (shift > 0)


def test_a_token_that_no_model_ever_takes_does_not_spoil_the_loss():
    logits = torch.randn(1, 4, 12)
    logits[..., 6:] = -torch.inf
    indices = logits.topk(8).indices
    student = logits.clone().requires_grad_()
    value = distillation_loss(
        student, torch.zeros(1, 4, dtype=torch.long), indices, log_outcomes(logits.clone(), indices)
    )
    value.backward()
    assert value.abs() < 1e-6 and student.grad.isfinite().all()


@pytest.mark.parametrize("family", [*EVERY_ARCHITECTURE, "modernbert-decoder"])
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_a_step_has_loss_and_gradients_of_all_logits_at_once(
    folders, tokenizer, settings, tmp_path, monkeypatch, family, part_bytes
):
    """However few positions the head has at a time, and whatever a family does to hidden states and logits."""
    monkeypatch.setattr(running, "_LOGITS_BYTES", part_bytes)
    from optimum_ksparse.study.finetuning.run import trainer_arguments

    torch.manual_seed(0)
    different = {"gemma3": {"final_logit_softcapping": 3.0}, "opt": {"word_embed_proj_dim": 16}}.get(family, {})
    if family == "modernbert-decoder":  # whose head has two maps and a norm
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = dict.fromkeys(("pad", "bos", "cls"), 1) | dict.fromkeys(("eos", "sep"), 2)
        special = {f"{name}_token_id": number for name, number in special.items()}
        config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes, **special)
    else:
        config = make_config(family, **different)
    model = AutoModelForCausalLM.from_config(config)
    chosen = settings(cross_entropy=0.3, temperature=2.0, top_k=VOCABULARY - 1)
    trainer = trainer_module.DistillTrainer(model, tokenizer, chosen, trainer_arguments(chosen, tmp_path))
    model.eval()
    ids, teacher = torch.randint(3, VOCABULARY, (2, 6)), torch.randn(2, 5, VOCABULARY)
    indices = (teacher / 2).topk(VOCABULARY - 1).indices
    inputs = {"input_ids": ids, "indices": indices.int(), "log_probs": log_outcomes(teacher / 2, indices)}
    heads = []
    model.get_output_embeddings().register_forward_hook(lambda *args: heads.append(args[1][0].shape[-2]))
    value = trainer.compute_loss(model, inputs)
    assert max(heads) == (1 if part_bytes == 1 else 5)
    assert all(p.grad is None for p in model.parameters())  # they come by `backward` alone, which scales them
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = model(ids).logits[:, :-1]
    expected = distillation_loss(logits, ids[:, 1:], indices, inputs["log_probs"], 2.0, 0.3) / 10
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)


# the cache


class Counted:
    """Counts how often the teacher is loaded, and keeps no teacher alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.teachers: list[weakref.ref[PreTrainedModel]] = []
        original = trainer_module.load_model

        def load_model(*args, **kwargs):
            model = original(*args, **kwargs)
            self.teachers.append(weakref.ref(model))
            return model

        monkeypatch.setattr(trainer_module, "load_model", load_model)


def make_trainer(folder, tokenizer, settings, output):
    from optimum_ksparse.study.finetuning.run import trainer_arguments

    return trainer_module.DistillTrainer(load(folder), tokenizer, settings, trainer_arguments(settings, output))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_cache_holds_what_the_teacher_says(folders, tokenizer, settings, tmp_path, monkeypatch, bf16):
    counted = Counted(monkeypatch)
    monkeypatch.setattr(teacher_module, "_TOKENS_A_FILE", 3 * 24)  # three samples a file: the last has two
    given = settings(cache=str(tmp_path / "cache"), temperature=2.0, bf16=bf16)
    trainer = make_trainer(folders[1], tokenizer, given, tmp_path)
    trainer.prepare()
    gc.collect()
    assert [reference() for reference in counted.teachers] == [None]  # it is not in memory any more
    assert len(list((tmp_path / "cache").glob("0*.safetensors"))) == 3
    teacher, seen = load(folders[0]), set()
    within = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 2e-3, "atol": 1e-3}
    for i in range(8):
        sample = trainer.logits[i]
        ids, indices, log_probs = sample["input_ids"], sample["indices"].long(), sample["log_probs"].float()
        seen.add(tuple(ids.tolist()))
        with torch.no_grad(), fast_products(teacher):  # rounded where those are
            whole = (teacher(ids[None]).logits[0, :-1].float() / 2).log_softmax(-1)
        largest = whole.topk(16).values.sort().values
        torch.testing.assert_close(log_probs[:, :-1].sort().values, largest, **within)
        torch.testing.assert_close(whole.gather(-1, indices), log_probs[:, :-1], **within)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(23), rtol=2e-3, atol=1e-3)
    assert len(seen) == 8
    trainer.prepare()
    assert len(counted.teachers) == 1


def test_a_cache_that_was_cut_off_goes_on_with_what_is_missing(folders, tokenizer, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "_TOKENS_A_FILE", 2 * 24)
    whole = make_trainer(folders[1], tokenizer, settings(cache=str(tmp_path / "whole")), tmp_path)
    whole.prepare()
    chosen = settings(cache=str(tmp_path / "cut"))
    trainer = make_trainer(folders[1], tokenizer, chosen, tmp_path)
    save, saved = teacher_module.save_tensors, []

    def killed(tensors, path, *args):
        saved.append(path.name)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(tensors, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.prepare()
        assert len(contents(tmp_path / "cut")) == 4  # the record, the text and two files of logits
        patch.setattr(trainer_module, "calibration_tokens", lambda *args: pytest.fail("drawn again"))
        again = make_trainer(folders[1], tokenizer, chosen, tmp_path)
        again.prepare()
    assert saved[4:] == ["00002.safetensors", "00003.safetensors"]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_stale_or_damaged_cache_is_refused_by_name(folders, tokenizer, settings, tmp_path):
    cache = tmp_path / "cache"
    make_trainer(folders[1], tokenizer, settings(cache=str(cache)), tmp_path).prepare()
    other = tmp_path / "other"
    dense = load(folders[0])
    dense.model.norm.weight.data.mul_(1.5)
    dense.save_pretrained(other)
    tokenizer.save_pretrained(other)
    changes = [
        ({"teacher": str(other)}, "teacher_sha256"),
        ({"dataset": TEXTS}, "dataset"),
        ({"seed": 1}, "seed"),
        ({"top_k": 8}, "top_k"),
        ({"temperature": 2.0}, "temperature"),
        ({"seq_len": 16}, "seq_len"),
        ({"bf16": True}, "bf16"),
    ]
    for change, named in changes:
        trainer = make_trainer(folders[1], tokenizer, settings(cache=str(cache), **change), tmp_path)
        with pytest.raises(ValueError, match=rf"cache='.*' holds logits of something else.*{named}"):
            trainer.prepare()
    file = next(cache.glob("0*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    trainer = make_trainer(folders[1], tokenizer, settings(cache=str(cache)), tmp_path)
    trainer.prepare()
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        trainer.logits[0]
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError):
        make_trainer(folders[1], tokenizer, settings(cache=str(full)), tmp_path).prepare()


@pytest.mark.parametrize("form", ["ids", "self", "texts"])
def test_the_text_has_the_forms_of_calibration_data(folders, tokenizer, settings, tmp_path, form):
    ids = torch.randint(3, VOCABULARY, (4, 12))
    dataset = {"ids": ids, "self": "self", "texts": sample_texts("calibration")}[form]
    trainer = make_trainer(folders[1], tokenizer, settings(dataset=dataset, num_samples=4, seq_len=12), tmp_path)
    trainer.prepare()
    rows = torch.stack([trainer.logits[i]["input_ids"] for i in range(4)])
    assert len(trainer.logits) == 4 and rows.shape == (4, 12)
    assert torch.equal(rows, ids) == (form == "ids")
    assert bool((rows[:, 0] == 1).all()) == (form == "self")


# what is refused


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "qlora"}, "method"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0}, "temperature"),
        ({"cross_entropy": 1.5}, "cross_entropy"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"dataset": "mc4-kp"}, "dataset"),
        ({"seq_len": 1}, "seq_len"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size"),
    ],
)
def test_settings_are_refused_by_name(given, named):
    with pytest.raises(ValueError, match=named):
        DistillSettings(**given)


def test_what_does_not_fit_is_refused_before_the_teacher_is_read(folders, tokenizer, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    torch.manual_seed(1)
    larger = tmp_path / "larger"
    AutoModelForCausalLM.from_config(make_config("llama", vocab_size=VOCABULARY + 8)).save_pretrained(larger)
    renamed = tmp_path / "renamed"
    load(folders[0]).save_pretrained(renamed)
    tokenizer.save_pretrained(renamed)
    text = (renamed / "tokenizer.json").read_text(encoding="utf-8")
    (renamed / "tokenizer.json").write_text(text.replace("</s>", "<end>"), encoding="utf-8")
    short = tmp_path / "short"
    shutil.copytree(folders[0], short)
    facts = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**facts, "max_position_embeddings": 16}))
    quantised = tmp_path / "int8"
    model = load(folders[0])
    sparsify(model, SparsityConfig("magnitude", "2:4", values="int8"))
    model.save_pretrained(quantised)
    tokenizer.save_pretrained(quantised)
    cases = [
        (folders[1], {"teacher": None}, "teacher is missing"),
        (folders[1], {"teacher": str(larger)}, f"teacher=.* has a vocabulary of {VOCABULARY + 8}"),
        (folders[1], {"teacher": str(renamed)}, "teacher=.* has another tokenizer: '(</s>|<end>)'"),
        (folders[1], {"top_k": VOCABULARY}, f"top_k={VOCABULARY}"),
        (folders[1], {"num_samples": 9}, "num_samples=9 .*batch_size=2"),
        (folders[1], {"seq_len": CONTEXT + 1}, f"context of {CONTEXT}"),
        (folders[1], {"teacher": str(short)}, "seq_len=24 is above the model's context of 16"),
        (quantised, {}, "int8 values.*dequantize_values"),
        (folders[1], {"num_samples": 4096}, "num_samples=4096 .* needs"),
    ]
    for model, given, message in cases:
        with pytest.raises(ValueError, match=message):
            finetune(model, None, settings(**given), tmp_path / "out")
    assert not (tmp_path / "out/finetuning.json").exists()


# runs


def test_a_run_comes_nearer_to_the_teacher_and_keeps_zeros_and_embeddings(folders, tokenizer, settings, tmp_path):
    output, texts = tmp_path / "out", str(tmp_path / "texts.txt")
    Path(texts).write_text("\n\n".join(sample_texts("calibration")[:2]), encoding="utf-8")
    record = finetune(folders[1], None, settings(num_epochs=5, texts=texts, eval_every=10), output)
    assert (record["task"], record["steps"], record["tokens"]) == ("distill", 20, 20 * 2 * 24)
    assert record["teacher"] == "dense" and "cache" not in record
    assert sum(record["loss"][-4:]) < 0.8 * sum(record["loss"][:4])
    assert [row["step"] for row in record["history"]] == [0, 10, 20]
    before, after = load(folders[1]), load(output)
    for row, model in ((record["history"][0], before), (record["history"][2], after)):
        measured = evaluate_perplexity(model.float(), tokenizer, texts, seq_len=24)["perplexity"]
        assert row["perplexity"] == pytest.approx(measured, rel=1e-2)  # after training the weights are rounded
    teacher, ids = load(folders[0]).float(), torch.tensor([tokenizer(sample_texts("evaluation")[0])["input_ids"][:48]])
    with torch.no_grad():
        p, q, r = (model(ids).logits[0].log_softmax(-1) for model in (teacher, before, after))
    distances = [F.kl_div(x, p, log_target=True, reduction="sum") for x in (q, r)]
    assert distances[1] < 0.9 * distances[0]
    before, after = load(folders[1]), load(output)
    assert after.config.use_cache == before.config.use_cache
    assert {p.dtype for p in after.parameters()} == {torch.bfloat16}
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(after.model.norm.weight, before.model.norm.weight)
    for (name, old), (_, new) in zip(sparse_modules(before).items(), sparse_modules(after).items(), strict=True):
        assert torch.equal(old.weight_mask, new.weight_mask), name
        assert not torch.equal(old.weight, new.weight), name
    assert not (output / ".checkpoints").exists()
    tuned = load_checkpoint(output, {})
    tuned.save_pretrained(tmp_path / "card")
    from optimum_ksparse.hub import write_card

    card = Path(write_card(tuned, tmp_path / "card")).read_text(encoding="utf-8")
    assert "`teacher` dense, `tokens` 960" in card and "`r`" not in card
    assert "with `DistillTrainer`: 20 steps" in card and "no record" not in card


def test_buffers_stay_as_they_are(folders, tokenizer, settings, tmp_path):
    """Of a bfloat16 model some are float32, such as the biases of DeepSeek's routers and rotary frequencies."""
    trainer = make_trainer(folders[1], tokenizer, settings(), tmp_path)
    trainer.restore_dtypes()
    before = dict(load(folders[1]).named_buffers())
    assert any(buffer.dtype is torch.float32 for buffer in before.values())
    torch.testing.assert_close(dict(trainer.model.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_with_the_same_curve(folders, settings, tmp_path, monkeypatch):
    texts = tmp_path / "texts.txt"
    texts.write_text(sample_texts("evaluation")[0], encoding="utf-8")
    given = {"save_steps": 1, "texts": str(texts), "eval_every": 2, "cross_entropy": 0.5, "micro_batch_size": 2}
    expected = finetune(folders[1], None, settings(**given), tmp_path / "whole")
    output, saves, save = tmp_path / "cut", [], Trainer._save_rng_state

    def killed(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 3:
            raise SystemExit
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", killed)
        with pytest.raises(SystemExit):
            finetune(folders[1], None, settings(**given), output)
    with pytest.raises(ValueError, match="temperature: was 1.0, is 2.0"):
        finetune(folders[1], None, settings(**given, temperature=2.0), output)
    counted = Counted(monkeypatch)
    assert finetune(folders[1], None, settings(**given), output) == expected
    assert not counted.teachers
    assert {**contents(output), "finetuning.json": b""} == {**contents(tmp_path / "whole"), "finetuning.json": b""}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"method": "masked"}, {"method": "lora", "target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_learns_from_the_teacher_too(folders, settings, tmp_path, more, bf16):
    texts = tmp_path / "texts.txt"
    texts.write_text(sample_texts("evaluation")[0], encoding="utf-8")
    chosen = settings(r=4, max_steps=2, bf16=bf16, texts=str(texts), **more)
    record = finetune(folders[1], None, chosen, tmp_path / "out", dtype=torch.float32)
    assert [row["step"] for row in record["history"]] == [0, 2]
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    moved = {name for name, tensor in weights.items() if "lora_B" in name and tensor.any()}
    assert moved == {name for name in weights if "lora_B" in name}
    assert (tmp_path / "out/adapter_model.safetensors").exists() and record["tokens"] == 2 * 2 * 24
    assert not (tmp_path / "out/model.safetensors").exists()


def test_the_learning_rate_falls_as_a_cosine_after_its_warm_up(folders, tokenizer, settings, tmp_path):
    trainer = make_trainer(folders[1], tokenizer, settings(learning_rate=3e-5), tmp_path)
    assert trainer.args.learning_rate == trainer.described["learning_rate"] == 3e-5
    assert trainer.args.lr_scheduler_type == "cosine" and trainer.args.warmup_steps == math.ceil(4 / 20)


@pytest.mark.processes
def test_two_processes_share_the_teachers_work_and_train_as_one(folders, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "_TOKENS_A_FILE", 2 * 24)
    chosen = settings(cache=str(tmp_path / "one-cache"))
    one = finetune(folders[1], None, chosen, tmp_path / "one")
    script = f"""
import os, sys
from pathlib import Path
import optimum_ksparse
from optimum_ksparse.__main__ import main
from optimum_ksparse.study.finetuning.distill import teacher
teacher._TOKENS_A_FILE = 2 * 24
save = teacher.save_tensors
def noted(tensors, path, *args):
    with open(Path({str(tmp_path)!r}, "written-" + os.environ["RANK"]), "a") as file:
        file.write(path.name + chr(10))
    save(tensors, path, *args)
teacher.save_tensors = noted
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "worker.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    words = ["finetune", "distill", folders[1], tmp_path / "two", "--cache", tmp_path / "two-cache"]
    for name, value in {**SMALL, "teacher": chosen.teacher, "dataset": chosen.dataset}.items():
        words += [f"--{name.replace('_', '-')}", value]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [(tmp_path / f"written-{rank}").read_text().split() for rank in range(2)]
    assert written == [
        ["tokens.safetensors", "00000.safetensors", "00002.safetensors"],
        ["00001.safetensors", "00003.safetensors"],
    ]
    assert contents(tmp_path / "two-cache") == contents(tmp_path / "one-cache")
    two = json.loads((tmp_path / "two/finetuning.json").read_text(encoding="utf-8"))
    assert two["tokens"] == one["tokens"] and two["num_processes"] == 2
    a, b = load(tmp_path / "one"), load(tmp_path / "two")
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_the_command(folders, tokenizer, settings, tmp_path, capsys):
    output, chosen = tmp_path / "out", settings()
    texts = tmp_path / "texts.txt"
    texts.write_text(sample_texts("evaluation")[0], encoding="utf-8")
    recipe = REPOSITORY / "configs/finetune/distill.yaml"
    flags = [
        "--teacher",
        chosen.teacher,
        "--dataset",
        chosen.dataset,
        "--texts",
        texts,
        "--max-tokens",
        48,
        "--max-steps",
        1,
    ]
    for name in ("num_samples", "seq_len", "batch_size", "micro_batch_size"):
        flags += [f"--{name.replace('_', '-')}", SMALL[name]]
    words = ["finetune", "distill", folders[1], output, "--config", recipe, *flags]
    parse_words(list(map(str, words))).execute()
    shown = capsys.readouterr().out
    record = json.loads((output / "finetuning.json").read_text(encoding="utf-8"))
    assert f"saved in {output}" in shown and shown.count("perplexity ") == 2 == len(record["history"])
    expected = evaluate_perplexity(load(folders[1]).float(), tokenizer, str(texts), seq_len=24, max_tokens=48)
    assert record["history"][0]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert len(sparse_modules(load(output))) == len(sparse_modules(load(folders[1])))
