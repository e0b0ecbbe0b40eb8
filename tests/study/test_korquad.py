"""KorQuAD: the official script's figures, the data, the windows, and span models that train, go on and predict."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer

from optimum_ksparse import EvaluationResults, SparsityConfig, sparsify
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import fingerprint
from optimum_ksparse.study.finetuning import KorQuADSettings
from optimum_ksparse.study.finetuning.korquad.data import read_korquad, split_by_article
from optimum_ksparse.study.finetuning.korquad.model import SpanModel, load_korquad_model
from optimum_ksparse.study.finetuning.korquad.prediction import (
    best_span,
    evaluate_korquad,
    exact_match,
    f1,
    korquad_scores,
    normalize_answer,
    predict,
)
from optimum_ksparse.study.finetuning.korquad.windows import END, SEPARATOR, collate, fitted, make_windows

pytest.importorskip("peft", reason="needs the extra finetune")

from optimum_ksparse.study.finetuning.korquad.trainer import _EpochSampler
from optimum_ksparse.study.finetuning.run import TaskTrainer, add_adapter, finetune

from ..conftest import thinned

FAMILIES = ("llama", "gpt_neox", "gemma3", "gpt2", "opt", "falcon", "bloom", "mpt")
SIGNS = "'\"《》<>〈〉()‘’"
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from(SIGNS + "!#,.-_ \t\n　“”ＡaB가각힣İßſ́ᄀ")), max_size=30)
WINDOWS = {"seq_len": 56, "max_question_tokens": 12, "stride": 16, "prepend_bos": False}
TRAINING = {"r": 4, "learning_rate": 6e-3, "warmup_steps": 2, "batch_size": 4, "micro_batch_size": 4}
FAST = KorQuADSettings(**WINDOWS, **TRAINING, max_steps=2, save_steps=2)


def squad(*questions, context="가나다 라마바 사아자"):
    """Data in the form of SQuAD 1.1: (id, text, start) each."""
    qas = [
        {"id": name, "question": "무엇인가?", "answers": [{"text": text, "answer_start": start}]}
        for name, text, start in questions
    ]
    return {"version": "1", "data": [{"title": "글", "paragraphs": [{"context": context, "qas": qas}]}]}


def written(folder, content):
    path = folder / "data.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# The metric


def test_the_official_scripts_figures(shared):
    oracle = json.loads((shared / "oracles/korquad_predictions.json").read_text(encoding="utf-8"))
    data = read_korquad(shared / "data/korquad/public.json")
    assert len(oracle["predictions"]) < len(data.questions) == 4051  # some are missing, which count 0
    scores = korquad_scores(oracle["predictions"], {question.id: question.answers for question in data.questions})
    assert scores == pytest.approx({name: oracle["official"][name] for name in ("exact_match", "f1")}, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("‘A’<b>〈C〉\"d\"'e'《가》(나)", "a b c d e 가 나"),
        (" 가\t나\n\n다　라 ", "가 나 다 라"),
        ("1,000.5% 가-나_다 !?", "10005 가나다"),  # dropped, not a space
        ("“가”「나」ＡＢ", "“가”「나」ａｂ"),  # not among the signs of the script
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


@given(TEXTS, TEXTS)
@settings(max_examples=100)
def test_properties_of_the_metric(one, two):
    normal = normalize_answer(one)
    assert not set(normal) & set(SIGNS) and "  " not in normal and normal == normal.strip()
    assert f1(one, two) == f1(two, one) and exact_match(one, two) == exact_match(two, one)
    if exact_match(one, two):
        assert f1(one, two) == (1 if normal else 0)  # of empty answers as the official script
    characters = [Counter(normalize_answer(text).replace(" ", "")) for text in (one, two)]
    assert (f1(one, two) == 1) == (characters[0] == characters[1] and bool(characters[0]))
    assert (f1(one, two) == 0) == (not characters[0] & characters[1])


def test_scores():
    assert f1("가나다", "가나") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert korquad_scores({"a": "나"}, {"a": ["가", "나"], "b": ["가"]}) == {"exact_match": 50, "f1": 50}


# The data


def test_reading_mends_and_counts(tmp_path, caplog):
    content = squad(("a", "라마바", 4), ("b", "라마바", 0), ("c", "가", 3), ("d", "없음", 0), ("e", "사아자", 99))
    data = read_korquad(written(tmp_path, content))
    assert [question.span for question in data.questions] == [(4, 7), (4, 7), (0, 1), None, (8, 11)]
    assert data.description["file"] == "data.json" and data.questions[3].answers == ("없음",)
    twice = read_korquad(written(tmp_path, squad(("a", "가", 1), context="가나가")))
    assert twice.questions[0].span is None  # not guessed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda paragraph: paragraph.pop("qas"), "'qas'"),
        (lambda paragraph: paragraph.update(context=3), "texts"),
        (lambda paragraph: paragraph["qas"][0].update(answers=[]), "texts"),
        (lambda paragraph: paragraph["qas"].append("x"), "after 1 questions"),
        (lambda paragraph: paragraph["qas"][0]["answers"][0].update(answer_start=True), "answer_start"),
        (lambda paragraph: paragraph["qas"].append(paragraph["qas"][0]), "'a' comes twice"),
        (lambda paragraph: paragraph["qas"].clear(), "holds no questions"),
    ],
)
def test_damaged_data_are_refused(tmp_path, change, named):
    content = squad(("a", "가", 0))
    change(content["data"][0]["paragraphs"][0])
    with pytest.raises(ValueError, match=named):
        read_korquad(written(tmp_path, content))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_korquad("none.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_korquad(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="eval_file"):
        KorQuADSettings(eval_file="x.json")


def test_the_hubs_form(monkeypatch):
    datasets = pytest.importorskip("datasets")
    answers = {"text": ["나"], "answer_start": [1]}
    rows = [{"id": "a", "title": "글", "context": "가나", "question": "?", "answers": answers}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    data = read_korquad(split="train")
    assert data.split == "train" and data.questions[0].span == (1, 2) and data.questions[0].article == "글"
    assert data.description["name"] == "KorQuAD/squad_kor_v1" and len(data.description["sha256"]) == 64
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(ConnectionError, match="KorQuAD/squad_kor_v1, validation.*pass train_file"):
        read_korquad()


def test_articles_are_split_whole(shared):
    data = read_korquad(shared / "data/korquad/public.json")
    train, test = split_by_article(data, seed=1)
    articles = [{question.article for question in part.questions} for part in (train, test)]
    assert list(map(len, articles)) == [80, 20] and not articles[0] & articles[1]
    assert len(train.questions) + len(test.questions) == len(data.questions)
    assert split_by_article(data, seed=1)[0].questions == train.questions
    few = [question for question in data.questions if question.article == data.questions[0].article]
    with pytest.raises(ValueError, match="eval_file"):
        split_by_article(replace(data, questions=few), seed=1)


# The windows


def test_windows_hold_the_question_and_all_of_the_paragraph(tokenizer, shared):
    questions = read_korquad(shared / "data/korquad/public.json").questions[:12]
    how = KorQuADSettings(seq_len=128, max_question_tokens=30, stride=40, prepend_bos=True)
    windows = make_windows(questions, tokenizer, how)
    for number, question in enumerate(questions):
        mine = [window for window in windows if window["question"] == number]
        tokens = tokenizer(question.question, add_special_tokens=False)["input_ids"][:30]
        covered = set()
        for window in mine:
            ids, first = window["input_ids"], window["first"]
            assert ids[:first] == [tokenizer.bos_token_id, *tokens, SEPARATOR] and ids[-1] == END and len(ids) <= 128
            assert len(window["offsets"]) == len(ids) - first - 1
            covered |= {character for a, b in window["offsets"] for character in range(a, b)}
            span = window["start_positions"], window["end_positions"]
            if span != (len(ids) - 1, len(ids) - 1):
                start, end = (window["offsets"][position - first] for position in span)
                assert question.context[start[0] : end[1]].strip() == question.answers[0]
        assert covered == set(range(len(question.context)))
        assert any(window["start_positions"] != len(window["input_ids"]) - 1 for window in mine)
    longest = [window for window in windows if window["question"] == 0]
    assert len(longest) > 2 and longest[1]["offsets"][0] == longest[0]["offsets"][40]


def test_special_tokens_in_a_text_are_text_and_lost_answers(tokenizer, tmp_path):
    data = read_korquad(written(tmp_path, squad(("a", "나다", 1), ("b", "없", 0), context="가나다</s>라")))
    found, lost = make_windows(data.questions, tokenizer, KorQuADSettings(prepend_bos=False))
    assert tokenizer.eos_token_id not in found["input_ids"] and lost["start_positions"] == -1
    assert collate([lost])["span_mask"].sum() == len(lost["offsets"]) + 1


def test_window_settings_are_checked(tokenizer, make_model):
    with pytest.raises(ValueError, match=r"seq_len=64 .* at least 107"):
        KorQuADSettings(seq_len=64)
    model = make_model("llama")
    settings = fitted(KorQuADSettings(max_question_tokens=16), model, tokenizer)
    assert (settings.seq_len, settings.prepend_bos) == (64, False)
    with pytest.raises(ValueError, match="context of 64"):
        fitted(KorQuADSettings(seq_len=200), model, tokenizer)


# Predictions


def test_the_best_span_is_in_order_and_short():
    def logits(**values):
        return torch.tensor([float(values.get(name, 0)) for name in "abcde"])  # e is the end: "not here"

    assert best_span(logits(b=3), logits(c=3))[1:] == (1, 2)
    assert best_span(logits(c=9), logits(a=9, d=1))[1:] == (2, 3)
    assert best_span(logits(a=9), logits(d=9), max_answer_tokens=3)[2] < 3
    # Of two windows with the same raw logits the one loses whose end is likely.
    assert best_span(logits(b=3), logits(b=3))[0] > best_span(logits(b=3, e=9), logits(b=3, e=9))[0]


# The model


@pytest.fixture
def data_file(tmp_path):
    """Questions whose answer follows the sign that they name; the second article is long."""
    articles = []
    for i in range(4):
        context = f"ab cd #{i}{i} ef gh %x{i} ij kl" + " mn op qr" * (9 * (i == 1)) + (" ~zz" if i == 1 else "")
        texts = {"#": f"{i}{i}", "%": f"x{i}", **({"~": "zz"} if i == 1 else {})}
        qas = [
            {"id": f"{i}{s}", "question": s, "answers": [{"text": t, "answer_start": context.index(s + t) + 1}]}
            for s, t in texts.items()
        ]
        articles.append({"title": str(i), "paragraphs": [{"context": context, "qas": qas}]})
    return written(tmp_path, {"version": "1", "data": articles})


def base_folder(make_model, tokenizer, tmp_path, name="llama", sparse=True):
    model = make_model(name)
    if sparse:
        sparsify(model, SparsityConfig("magnitude", "2:4"))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def on(data_file, **more):
    """Settings that train and measure on the same file."""
    return KorQuADSettings(**{**WINDOWS, **TRAINING, "max_steps": 2, "save_steps": 2} | more
                           | {"train_file": str(data_file), "eval_file": str(data_file)})  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_any_family_do_not_depend_on_padding(make_model, tokenizer, data_file, name):
    span_model = SpanModel(add_adapter(make_model(name), FAST)).eval()
    torch.manual_seed(1)
    trained = span_model.state_dict()
    assert all("lora" in key or key in ("markers", "head.weight", "head.bias") for key in trained)
    for tensor in trained.values():
        tensor.normal_(std=0.2)
    windows = sorted(make_windows(read_korquad(data_file).questions, tokenizer, FAST), key=lambda w: len(w["offsets"]))
    batch = collate([windows[0], windows[-1]])
    assert not batch["attention_mask"].all()
    together, alone = span_model(**batch), span_model(**collate(windows[:1]))
    short = len(windows[0]["input_ids"])
    for logits, mine in ((together.start_logits, alone.start_logits), (together.end_logits, alone.end_logits)):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits[:1, :short], mine, atol=1e-4, rtol=1e-4)
        assert (logits[~batch["span_mask"]] == -math.inf).all() and logits[batch["span_mask"]].isfinite().all()
    together.loss.backward()
    assert span_model.markers.grad.abs().sum(1).bool().all()


def test_the_head_reads_the_decoder_with_its_norm(make_model, tokenizer, data_file):
    model = make_model("llama")
    span_model = SpanModel(model)
    span_model.head.weight.data.normal_()
    batch = collate(make_windows(read_korquad(data_file).questions, tokenizer, FAST)[:3])
    embeddings = model.get_input_embeddings()(batch["input_ids"].clamp(min=0))
    embeddings[batch["input_ids"] < 0] = model.get_input_embeddings().weight.mean(0)
    hidden = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], output_hidden_states=True)
    logits, output = span_model.head(hidden.hidden_states[-1]), span_model(**batch)
    torch.testing.assert_close(output.end_logits[batch["span_mask"]], logits[..., 1][batch["span_mask"]])
    losses = [
        -torch.log_softmax(logits[row, :, side].masked_fill(~batch["span_mask"][row], -math.inf), -1)[batch[key][row]]
        for side, key in enumerate(("start_positions", "end_positions"))
        for row in range(3)
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


# Training


@pytest.mark.slow
def test_a_model_learns_saves_and_loads(make_model, tokenizer, data_file, tmp_path):
    base, output = base_folder(make_model, tokenizer, tmp_path), tmp_path / "out"
    settings = on(data_file, dropout=0.0, batch_size=8, micro_batch_size=8, max_steps=50, eval_every=25, r=8)
    record = finetune(base, None, settings, output)
    assert record["loss"][0] > 2 and sum(record["loss"][-5:]) / 5 < 1.6
    assert record["results"]["exact_match"] > 10 < record["results"]["f1"], record["results"]
    assert [row["step"] for row in record["history"]] == [25, 50]
    assert json.loads((output / "finetuning.json").read_text(encoding="utf-8")) == record
    assert (output / "adapter_model.safetensors").stat().st_size < 60_000  # no embeddings in it
    loaded, its_tokenizer = load_korquad_model(output, AutoModelForCausalLM.from_pretrained(base))
    data = read_korquad(data_file, "test")
    assert evaluate_korquad(loaded, its_tokenizer, data, settings) == record["results"]
    answers = predict(loaded, its_tokenizer, data.questions, settings)
    assert len(answers) == 9 and all(answers[question.id] in question.context for question in data.questions)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_korquad_model(output, make_model("llama", hidden_size=64))
    with pytest.raises(FileNotFoundError, match="korquad_head"):
        load_korquad_model(tmp_path)


@pytest.mark.parametrize("method", thinned(["hira", "full", "head_only"], ["hira"]))
def test_every_method_saves_and_loads(make_model, tokenizer, data_file, tmp_path, method):
    base, output = base_folder(make_model, tokenizer, tmp_path, "gpt_neox"), tmp_path / "out"
    head_only = method == "head_only"
    settings = on(data_file, head_only=head_only, method="lora" if head_only else method)
    record = finetune(base, None, settings, output)
    assert record["num_trained"] == (130 if head_only else record["num_trained"]) > 0
    is_whole = method == "full"
    assert (output / "model.safetensors").exists() == is_whole
    model = AutoModelForCausalLM.from_pretrained(base)
    loaded, its_tokenizer = load_korquad_model(output, None if is_whole else model)
    row = evaluate_korquad(loaded, its_tokenizer, read_korquad(data_file, "test"), settings)
    assert row == record["results"]
    with pytest.raises(ValueError, match="leave base out" if is_whole else "pass base"):
        load_korquad_model(output, model if is_whole else None)


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_with_the_same_losses(make_model, tokenizer, data_file, tmp_path, monkeypatch):
    base = base_folder(make_model, tokenizer, tmp_path)
    settings = on(data_file, batch_size=4, micro_batch_size=2, max_steps=8, save_steps=4)  # 6 steps an epoch
    whole = finetune(base, None, settings, tmp_path / "whole")
    step, calls = TaskTrainer.training_step, []

    def killed(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 15:  # in the second epoch, between two checkpoints
            raise SystemExit
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(SystemExit):
            finetune(base, None, settings, tmp_path / "cut")
    kept = list((tmp_path / "cut/.checkpoints").glob("checkpoint-*"))
    assert sum(path.stat().st_size for path in kept[0].iterdir()) < 200_000  # the backbone is not in it
    with pytest.raises(ValueError, match="max_examples"):
        finetune(base, None, on(data_file, max_examples=3), tmp_path / "cut")
    assert finetune(base, None, settings, tmp_path / "cut") == whole and len(whole["loss"]) == 8


def test_like_lengths_come_together_and_every_epoch_is_another():
    lengths = [i % 37 for i in range(203)]
    sampler = _EpochSampler(0, 4, lengths)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(203))
    parts = [[lengths[i] for i in orders[0][j : j + 4]] for j in range(0, 200, 4)]
    assert sum(max(part) - min(part) for part in parts) / len(parts) < 3


# The commands


def run_command(*words):
    parse_words([str(word) for word in words]).execute()


@pytest.mark.slow
def test_merging_keeps_the_head_and_pushing_is_refused(make_model, tokenizer, data_file, tmp_path):
    base, output = base_folder(make_model, tokenizer, tmp_path), tmp_path / "out"
    record = finetune(base, None, on(data_file, method="masked"), output)
    run_command("merge", output, tmp_path / "merged", "--base", base)
    model, its_tokenizer = load_korquad_model(tmp_path / "merged")
    row = evaluate_korquad(model, its_tokenizer, read_korquad(data_file, "test"), on(data_file))
    assert row["f1"] == pytest.approx(record["results"]["f1"])
    assert json.loads((tmp_path / "merged/finetuning.json").read_text())["task"] == "korquad"
    with pytest.raises(ValueError, match="--tuned-results"):
        run_command("push", output, "user/name")


@pytest.mark.slow
def test_the_command(make_model, tokenizer, data_file, tmp_path, capsys):
    pytest.importorskip("optimum.commands")
    base = base_folder(make_model, tokenizer, tmp_path, sparse=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seq_len: 56\nmax_question_tokens: 12\nr: 2\nmax_steps: 5\n", encoding="utf-8")
    flags = f"--train-file {data_file} --config {recipe} --max-steps 2 --batch-size 4 --max-eval-questions 2"
    command = parse_words(["finetune", "korquad", str(base), str(tmp_path / "out"), *flags.split()])
    command.execute()
    record = json.loads((tmp_path / "out/finetuning.json").read_text(encoding="utf-8"))
    assert (record["r"], record["steps"], record["seq_len"]) == (2, 2, 56)
    assert record["results"]["split"].startswith("test: all but 0.8") and record["results"]["num_samples"] == 2
    assert "exact match" in capsys.readouterr().out
    # The figures are rows of the model that was tuned, a dense one here.
    tuned = EvaluationResults.load(tmp_path / "out/evaluation_results.json")
    results = EvaluationResults(fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype="auto")))
    results.take_tuned(tuned)
    assert [(row.name, row.tuning["task"], row.tuning["r"]) for row in results.dense] == [("korquad", "korquad", 2)]
    assert results.dense[0].metrics["f1"] == record["results"]["f1"] and not results.sparse
    assert not {"base", "loss", "results", "eval_data"} & results.dense[0].tuning.keys()
    # What is tuned is known by its weights: another model under the same name is another run.
    model = AutoModelForCausalLM.from_pretrained(base)
    next(model.parameters()).data.mul_(2)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match="base_fingerprint"):
        command.execute()
