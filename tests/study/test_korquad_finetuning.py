"""Span models: over any decoder, trained, saved, loaded, cut off and gone on with, and their predictions."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from optimum_ksparse import EvaluationResults, SparsityConfig, sparsify
from optimum_ksparse.__main__ import parse as parse_words
from optimum_ksparse.checkpoint import fingerprint
from optimum_ksparse.study.finetuning import FinetuningSettings
from optimum_ksparse.study.finetuning.korquad import (
    WindowSettings,
    evaluate_korquad,
    finetune_korquad,
    load_korquad_model,
    make_span_model,
    predict,
    read_korquad,
)
from optimum_ksparse.study.finetuning.korquad.features import END, SEPARATOR, Window, collate, make_windows
from optimum_ksparse.study.finetuning.korquad.model import prepare_tokens
from optimum_ksparse.study.finetuning.korquad.prediction import best_spans
from optimum_ksparse.study.finetuning.sampler import LengthSampler

pytest.importorskip("peft", reason="needs the extra finetune")

FAMILIES = ("llama", "gpt_neox", "gemma3", "gpt2", "opt", "falcon", "bloom", "mpt")
TIED = ("gemma3", "gpt2", "opt")
WINDOWS = WindowSettings(seq_len=56, max_question_tokens=12, stride=16, prepend_bos=False)
FAST = FinetuningSettings(
    r=4, dropout=0.1, learning_rate=5e-3, warmup_steps=2, batch_size=4, micro_batch_size=2, max_steps=4, save_steps=2
)


@pytest.fixture
def own_tokenizer(tokenizer, tmp_path):
    """A copy, because a run adds tokens to it."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def data_file(tmp_path):
    """Questions whose answer follows the sign that they name; the second article is long."""
    articles = []
    for i in range(4):
        context = f"ab cd #{i}{i} ef gh %x{i} ij kl" + " mn op qr" * (9 * (i == 1)) + (" ~zz" if i == 1 else "")
        asked = {"#": f"{i}{i}", "%": f"x{i}", **({"~": "zz"} if i == 1 else {})}
        qas = [
            {
                "id": f"{i}{sign}",
                "question": sign,
                "answers": [{"text": text, "answer_start": context.index(sign + text) + 1}],
            }
            for sign, text in asked.items()
        ]
        articles.append({"title": str(i), "paragraphs": [{"context": context, "qas": qas}]})
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": "1", "data": articles}), encoding="utf-8")
    return path


@pytest.fixture
def data(data_file):
    return read_korquad(data_file)


def base_folder(make_model, tokenizer, tmp_path, name="llama", sparse=False):
    model = make_model(name)
    if sparse:
        sparsify(model, SparsityConfig("magnitude", "2:4"))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def randomized(model):
    """A span model whose head and adapters do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.normal_(std=0.2)
    return model.eval()


# The model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_any_family_do_not_depend_on_padding(make_model, own_tokenizer, data, name):
    model = make_model(name)
    span_model = randomized(make_span_model(model, own_tokenizer, FAST))
    windows = sorted(make_windows(data.questions, own_tokenizer, WINDOWS), key=len)
    batch = collate([windows[0], windows[-1]], 0)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        together, alone = span_model(**batch), span_model(**collate(windows[:1], 0))
    short = len(windows[0])
    for logits, own in ((together.start_logits, alone.start_logits), (together.end_logits, alone.end_logits)):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits[:1, :short], own, atol=1e-4, rtol=1e-4)
        outside = ~batch["span_mask"]
        assert (logits[outside] == -math.inf).all() and logits[~outside].isfinite().all()


def test_the_head_reads_the_decoder_with_its_norm(make_model, own_tokenizer, data):
    model = make_model("llama")
    span_model = randomized(make_span_model(model, own_tokenizer, FAST, head_only=True))
    batch = collate(make_windows(data.questions, own_tokenizer, WINDOWS)[:3], 0)
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        logits = span_model.head(hidden.hidden_states[-1])
        output = span_model(**batch)
    inside = batch["span_mask"]
    torch.testing.assert_close(output.end_logits[inside], logits[..., 1][inside])
    wanted = [
        -torch.log_softmax(logits[row, :, side].masked_fill(~inside[row], -math.inf), -1)[batch[name][row]]
        for side, name in enumerate(("start_positions", "end_positions"))
        for row in range(3)
    ]
    torch.testing.assert_close(output.loss, torch.stack(wanted).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_head_adapter_and_marker_embeddings_train_alone(make_model, own_tokenizer, data, name):
    model = make_model(name)
    assert model.config.tie_word_embeddings == (name in TIED) or name in ("falcon", "bloom", "mpt")
    span_model = make_span_model(model, own_tokenizer, FAST)
    names = set(span_model.trained_parameters())
    assert {"head.weight", "head.bias", "marker_embeddings"} < names
    assert all("lora_" in name for name in names - {"head.weight", "head.bias", "marker_embeddings"})
    before = model.get_input_embeddings().weight.detach().clone()
    torch.nn.init.normal_(span_model.head.weight)  # it begins at zero, where nothing else has a gradient
    optimizer = torch.optim.SGD(span_model.trained_parameters().values(), lr=1.0)
    start = span_model.marker_embeddings.detach().clone()
    span_model(**collate(make_windows(data.questions, own_tokenizer, WINDOWS)[:4], 0)).loss.backward()
    optimizer.step()
    assert (span_model.marker_embeddings != start).any(1).tolist() == [True, True]
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert set(span_model.state_dict()) == names


def test_tokens_take_rows_that_are_free(make_model, own_tokenizer):
    model = make_model("gpt_neox", vocab_size=400)
    ids = prepare_tokens(model, own_tokenizer)
    assert ids == [384, 385] and own_tokenizer.convert_tokens_to_ids([SEPARATOR, END]) == ids
    assert model.get_input_embeddings().weight.shape[0] == 400  # as Polyglot-Ko, whose vocabulary is padded
    assert prepare_tokens(model, own_tokenizer) == ids


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embeddings_are_resized_where_no_row_is_free(make_model, own_tokenizer, name):
    model = make_model(name)
    mean = model.get_input_embeddings().weight[:384].mean(0)
    assert prepare_tokens(model, own_tokenizer) == [384, 385]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 386
    torch.testing.assert_close(model.get_input_embeddings().weight[385], mean)


def test_a_token_that_is_known_is_used(make_model, own_tokenizer):
    own_tokenizer.add_tokens([END], special_tokens=True)
    span_model = make_span_model(make_model("llama", vocab_size=385), own_tokenizer, FAST)
    assert span_model.marker_tokens == [385, 384] and span_model.marker_embeddings.shape == (2, 32)


def test_a_tokenizer_serves_one_model_after_another(make_model, own_tokenizer):
    """The second model finds the tokens there, and needs rows for them all the same."""
    first, second = (make_span_model(make_model("llama"), own_tokenizer, FAST) for _ in range(2))
    assert first.marker_tokens == second.marker_tokens == [384, 385]
    assert torch.equal(first.marker_embeddings, second.marker_embeddings)


def test_a_slow_tokenizer_is_refused(make_model):
    with pytest.raises(TypeError, match="slow"):
        prepare_tokens(make_model("llama"), type("SlowTokenizer", (), {"is_fast": False})())


def test_the_adapter_of_polyglot_ko():
    from peft import get_peft_model

    from optimum_ksparse.study.finetuning import adapter_config, linear_targets

    sizes = {"hidden_size": 4096, "num_hidden_layers": 28, "intermediate_size": 16384, "num_attention_heads": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=30080, **sizes))
        settings = FinetuningSettings()
        trained, total = get_peft_model(
            model, adapter_config(settings, linear_targets(model))
        ).get_nb_trainable_parameters()
    assert trained == 28 * 8 * (4 * 4096 + 2 * 4096 + 2 * (4096 + 16384)) == 14_680_064
    assert round(100 * trained / total, 2) == 0.25


# Predictions


def test_best_spans_are_those_of_a_search_over_all(make_model, own_tokenizer, data):
    span_model = randomized(make_span_model(make_model("llama"), own_tokenizer, FAST))
    windows = make_windows(data.questions, own_tokenizer, WINDOWS)
    assert max(sum(window.question == n for window in windows) for n in range(len(data))) > 2
    found = best_spans(span_model, windows, max_answer_tokens=5, num_best=64, batch_size=3)
    for number in range(len(data)):
        scores: dict[tuple[int, int], float] = {}
        for window in (window for window in windows if window.question == number):
            with torch.no_grad():
                output = span_model(**collate([window], 0))
            start, end = (torch.log_softmax(x[0], -1).tolist() for x in (output.start_logits, output.end_logits))
            for a in range(window.first, len(window) - 1):
                for b in range(a, min(a + 5, len(window) - 1)):
                    place = window.offsets[a - window.first][0], window.offsets[b - window.first][1]
                    scores[place] = max(start[a] + end[b], scores.get(place, -math.inf))
        best = max(scores.values())
        assert found[number][0].score == pytest.approx(best, abs=1e-4)
        assert scores[found[number][0].start, found[number][0].end] == pytest.approx(best, abs=1e-4)
        assert [span.score for span in found[number]] == sorted((s.score for s in found[number]), reverse=True)


class Fixed(torch.nn.Module):
    """Logits by hand: 0, but for those given as {(token, side): value}."""

    device = torch.device("cpu")

    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, input_ids, attention_mask, span_mask):
        sides = []
        for side in (0, 1):
            logits = torch.zeros(input_ids.shape)
            for (token, own), value in self.given.items():
                logits[input_ids == token] += value * (own == side)
            sides.append(logits.masked_fill(~span_mask, -math.inf))
        return type("Output", (), {"start_logits": sides[0], "end_logits": sides[1]})


def test_a_window_without_the_answer_has_no_say():
    """Of two windows with the same raw logits the one loses whose end token, "not here", is likely."""
    there = [(i, i + 1) for i in range(3)]
    one = Window(0, [5, 11, 12, 13, 9], 1, there, None, None)
    two = Window(0, [5, 21, 22, 23, 8], 1, [(a + 10, b + 10) for a, b in there], None, None)
    given = {(12, 0): 3, (12, 1): 3, (22, 0): 3, (22, 1): 3, (9, 0): 6, (9, 1): 6}
    found = best_spans(Fixed(given), [one, two])[0]
    assert (found[0].start, found[0].end) == (11, 12)
    assert best_spans(Fixed(given | {(8, 0): 9, (8, 1): 9}), [one, two])[0][0].start == 1


def test_answers_are_in_order_and_short():
    window = Window(0, [5, 11, 12, 13, 14, 9], 1, [(i, i + 1) for i in range(4)], None, None)
    reversed_ends = {(13, 0): 9, (11, 1): 9, (14, 1): 1}
    best = best_spans(Fixed(reversed_ends), [window])[0][0]
    assert (best.start, best.end) == (2, 4)
    far = {(11, 0): 9, (14, 1): 9}
    spans = best_spans(Fixed(far), [window], max_answer_tokens=3)[0]
    assert all(span.end - span.start <= 3 for span in spans)
    assert len(best_spans(Fixed(far), [window], num_best=2)[0]) <= 2


# Training


def test_a_model_learns_saves_and_loads(make_model, own_tokenizer, data, tmp_path):
    base = base_folder(make_model, own_tokenizer, tmp_path, sparse=True)
    model, tokenizer = load(base)
    settings = FinetuningSettings(
        **{
            **asdict(FAST),
            "dropout": 0.0,
            "learning_rate": 6e-3,
            "batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 240,
            "save_steps": 240,
            "r": 8,
        }
    )
    record = finetune_korquad(
        model, tokenizer, data, settings, tmp_path / "out", eval_data=data, windows=WINDOWS, eval_every=120
    )
    assert record["loss"][0] > 2 and sum(record["loss"][-5:]) / 5 < 0.6
    assert record["results"]["exact_match"] > 40 < record["results"]["f1"], record["results"]
    assert [row["step"] for row in record["history"]] == [120, 240]
    assert json.loads((tmp_path / "out/finetuning.json").read_text(encoding="utf-8")) == record
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"adapter_model.safetensors", "korquad_head.safetensors", "tokenizer.json"} < set(names)
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_size < 60_000  # no embeddings in it
    for base_model in (base, AutoModelForCausalLM.from_pretrained(base)):
        loaded, its_tokenizer = load_korquad_model(tmp_path / "out", base_model)
        row = evaluate_korquad(loaded, its_tokenizer, data, windows=WINDOWS)
        assert {**row, "batch_size": 0} == {**record["results"], "batch_size": 0}
        assert not loaded.training
    assert row["num_samples"] == 9 and row["split"] == "all" and row["dtype"] == "float32"
    answers = predict(loaded, its_tokenizer, data.questions, WINDOWS)
    assert len(answers) == 9 and all(answers[q.id] in q.context for q in data.questions)


@pytest.mark.parametrize("method", ["masked", "dora", "hira", "full", "head_only"])
def test_every_method_saves_and_loads(make_model, own_tokenizer, data, tmp_path, method):
    base = base_folder(make_model, own_tokenizer, tmp_path, "gpt_neox", sparse=True)
    model, tokenizer = load(base)
    head_only = method == "head_only"
    settings = FinetuningSettings(**{**asdict(FAST), "method": "lora" if head_only else method, "max_steps": 2})
    record = finetune_korquad(
        model, tokenizer, data, settings, tmp_path / "out", eval_data=data, windows=WINDOWS, head_only=head_only
    )
    loaded, its_tokenizer = load_korquad_model(tmp_path / "out", None if method == "full" else base)
    row = evaluate_korquad(loaded, its_tokenizer, data, windows=WINDOWS)
    assert row["f1"] == record["results"]["f1"] and record["num_trained"] > 0
    assert (tmp_path / "out/model.safetensors").exists() == (method == "full")
    if head_only:
        with pytest.raises(ValueError, match="a head alone: pass base"):
            load_korquad_model(tmp_path / "out")
    elif method != "full":  # the folder that an adapter names is not opened
        with pytest.raises(ValueError, match="names no base model on the Hub.*pass base"):
            load_korquad_model(tmp_path / "out")
    if method == "full":
        with pytest.raises(ValueError, match="leave base out"):
            load_korquad_model(tmp_path / "out", base)


def test_a_finished_run_is_not_run_again(make_model, own_tokenizer, data, tmp_path):
    base = base_folder(make_model, own_tokenizer, tmp_path)
    run = {"output": tmp_path / "out", "windows": WINDOWS}
    record = finetune_korquad(base, None, data, FAST, **run)
    assert finetune_korquad(base, None, data, FAST, **run) == record and record["results"] is None
    other = FinetuningSettings(**{**asdict(FAST), "r": 2})
    with pytest.raises(ValueError, match="r=4, not 2"):
        finetune_korquad(base, None, data, other, **run)
    assert finetune_korquad(base, None, data, other, overwrite=True, **run)["r"] == 2


def test_gradient_checkpointing_changes_nothing(make_model, own_tokenizer, data, tmp_path):
    base = base_folder(make_model, own_tokenizer, tmp_path)
    losses = [
        finetune_korquad(
            base,
            None,
            data,
            FinetuningSettings(**{**asdict(FAST), "dropout": 0.0, "gradient_checkpointing": recompute}),
            tmp_path / f"out{recompute}",
            windows=WINDOWS,
        )["loss"]
        for recompute in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] != losses[0][-1]


def test_arguments_are_checked(make_model, own_tokenizer, data, tmp_path):
    with pytest.raises(ValueError, match="needs eval_data"):
        finetune_korquad(make_model("llama"), own_tokenizer, data, FAST, tmp_path / "out", eval_every=2)
    with pytest.raises(TypeError, match="max_train_questions"):
        finetune_korquad(make_model("llama"), own_tokenizer, data, FAST, tmp_path / "out", max_train_questions=1.5)
    with pytest.raises(FileNotFoundError, match="korquad_head"):
        load_korquad_model(tmp_path)
    with pytest.raises(RuntimeError, match=r"head\.bias is missing"):
        make_span_model(make_model("llama"), own_tokenizer, FAST, head_only=True).load_state_dict(
            {"head.weight": torch.zeros(2, 32), "marker_embeddings": torch.zeros(2, 32)}
        )


def test_the_head_of_another_base_is_named(make_model, own_tokenizer, data, tmp_path):
    base = base_folder(make_model, own_tokenizer, tmp_path)
    finetune_korquad(base, None, data, FAST, tmp_path / "out", windows=WINDOWS, head_only=True)
    with pytest.raises(ValueError, match=r"weight is \[2, 32\], this base needs \[2, 64\]"):
        load_korquad_model(tmp_path / "out", make_model("llama", hidden_size=64))


_KILLED = """
import os, signal, sys
import torch
from optimum_ksparse.study.finetuning import FinetuningSettings
from optimum_ksparse.study.finetuning.korquad import SpanModel, WindowSettings, finetune_korquad, read_korquad
base, file, output, settings, windows = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4]), eval(sys.argv[5])
torch.set_num_threads(1)
forward, calls = SpanModel.forward, []
def counted(self, *args, **kwargs):
    calls.append(0)
    if self.training and len(calls) > 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)
counted.__signature__ = __import__("inspect").signature(forward)
SpanModel.forward = counted
settings, windows = FinetuningSettings(**settings), WindowSettings(**windows)
finetune_korquad(base, None, read_korquad(file), settings, output, windows=windows)
"""


def test_a_killed_run_goes_on_with_the_same_losses(make_model, own_tokenizer, data, data_file, tmp_path):
    base = base_folder(make_model, own_tokenizer, tmp_path, sparse=True)
    # 6 steps an epoch: the kill is in the second one, between two checkpoints.
    settings = {**asdict(FAST), "max_steps": 12, "save_steps": 3}
    run = {"settings": FinetuningSettings(**settings), "windows": WINDOWS}
    whole = finetune_korquad(base, None, data, output=tmp_path / "whole", **run)
    arguments = [str(base), str(data_file), str(tmp_path / "cut"), repr(settings), repr(asdict(WINDOWS))]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(path.name for path in (tmp_path / "cut/.checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-6"] and not (tmp_path / "cut/finetuning.json").exists()
    size = sum(path.stat().st_size for path in (tmp_path / "cut/.checkpoints/checkpoint-6").iterdir())
    assert size < 200_000  # the backbone is not in it
    with pytest.raises(ValueError, match="unfinished run with .*num_windows=21, not"):
        finetune_korquad(base, None, data, output=tmp_path / "cut", max_train_questions=3, **run)
    resumed = finetune_korquad(base, None, data, output=tmp_path / "cut", **run)
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-5) and len(whole["loss"]) == 12
    assert not (tmp_path / "cut/.checkpoints").exists()


def test_a_run_cut_off_after_training_trains_no_further(make_model, own_tokenizer, data, tmp_path, monkeypatch):
    base = base_folder(make_model, own_tokenizer, tmp_path)
    run = {"eval_data": data, "output": tmp_path / "out", "windows": WINDOWS, "eval_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr("optimum_ksparse.study.finetuning.korquad.run.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune_korquad(base, None, data, FAST, **run)
    weights = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    record = finetune_korquad(base, None, data, FAST, **run)
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == weights
    assert len(record["loss"]) == record["steps"] == 4 and [row["step"] for row in record["history"]] == [2, 4]


def test_like_lengths_come_together_and_every_epoch_is_another():
    lengths = [i % 37 for i in range(203)]
    sampler = LengthSampler(lengths, 4, seed=0)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second and sorted(first) == sorted(second) == list(range(203)) and len(sampler) == 203
    spread = [max(x) - min(x) for x in ([lengths[i] for i in first[j : j + 4]] for j in range(0, 200, 4))]
    assert sum(spread) / len(spread) < 3
    assert sorted(first[:50]) != first[:50]


# The command


def run_command(*words):
    parse_words([str(word) for word in words]).execute()


def test_merging_keeps_the_head_and_pushing_is_refused(make_model, own_tokenizer, data, tmp_path):
    base, output = base_folder(make_model, own_tokenizer, tmp_path, sparse=True), tmp_path / "out"
    settings = FinetuningSettings(**{**asdict(FAST), "method": "masked"})
    record = finetune_korquad(base, None, data, settings, output, eval_data=data, windows=WINDOWS)
    run_command("merge", output, tmp_path / "merged", "--base", base)
    model, tokenizer = load_korquad_model(tmp_path / "merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    row = evaluate_korquad(model, tokenizer, data, windows=WINDOWS)
    assert row["f1"] == pytest.approx(record["results"]["f1"])
    assert json.loads((tmp_path / "merged/finetuning.json").read_text())["task"] == "korquad"
    with pytest.raises(ValueError, match="holds a span head.*--tuned-results"):
        run_command("push", output, "user/name")


def test_a_finished_run_is_measured_on_what_is_asked_for(make_model, own_tokenizer, data_file, tmp_path):
    base, data, output = base_folder(make_model, own_tokenizer, tmp_path), read_korquad(data_file), tmp_path / "out"
    run = {"windows": WINDOWS}
    assert finetune_korquad(base, None, data, FAST, output, **run)["results"] is None
    first = finetune_korquad(base, None, data, FAST, output, eval_data=data, max_eval_questions=1, **run)
    every = finetune_korquad(base, None, data, FAST, output, eval_data=data, **run)
    assert (first["results"]["num_samples"], every["results"]["num_samples"]) == (1, len(data))
    assert json.loads((output / "finetuning.json").read_text()) == every


def test_the_command(make_model, own_tokenizer, data_file, tmp_path, capsys):
    pytest.importorskip("optimum.commands")
    base = base_folder(make_model, own_tokenizer, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seq_len: 56\nmax_question_tokens: 12\nr: 2\nmax_steps: 5\n", encoding="utf-8")
    flags = f"--train-file {data_file} --config {recipe} --max-steps 2 --batch-size 4 --max-eval-questions 2"
    command = parse_words(["finetune", "korquad", str(base), str(tmp_path / "out"), *flags.split()])
    command.execute()
    record = json.loads((tmp_path / "out/finetuning.json").read_text(encoding="utf-8"))
    assert (record["r"], record["steps"], record["windows"]["seq_len"]) == (2, 2, 56)
    assert record["results"]["split"].startswith("test: all but 0.8") and record["results"]["num_samples"] == 2
    assert "exact match" in capsys.readouterr().out
    # The figures are rows of the model that was tuned, a dense one here.
    tuned = EvaluationResults.load(tmp_path / "out/evaluation_results.json")
    results = EvaluationResults(fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype="auto")))
    results.take_tuned(tuned)
    assert [(row.name, row.tuning["task"], row.tuning["r"]) for row in results.dense] == [("korquad", "korquad", 2)]
    assert results.dense[0].metrics["f1"] == record["results"]["f1"] and not results.sparse
    assert not {"base", "loss", "results"} & results.dense[0].tuning.keys()
    # What is tuned is known by its weights: another model under the same name is another run.
    model = AutoModelForCausalLM.from_pretrained(base)
    next(model.parameters()).data.mul_(2)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match="finished run with base_fingerprint"):
        command.execute()
    args = command.args
    args.train_file, args.eval_file, args.output = None, str(data_file), str(tmp_path / "other")
    with pytest.raises(ValueError, match="eval_file without train_file"):
        command.execute()
