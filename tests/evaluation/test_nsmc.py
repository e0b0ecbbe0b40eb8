"""NSMC equals a slow, obvious reference; what is drawn is the same everywhere; borders that a tokenizer merges."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from optimum_ksparse import SparsityConfig
from optimum_ksparse.evaluation import EvaluationProtocol, EvaluationResults, evaluate_model, evaluate_nsmc, nsmc
from optimum_ksparse.evaluation.answers import Query, answer_queries, score_answers
from optimum_ksparse.evaluation.nsmc_data import NSMC_DATASET, PARQUET_REVISION, draw_nsmc, keep_hangul

from ..conftest import ARCHITECTURES
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
WORDS = ["좋다", "별로", "그냥", "최고", "지루함", "ㅋㅋ", "감동", "돈 아까움"]
PROMPTS = {"1": "문장: {}\n감정:", "2": "다음 문장은 긍정일까요 부정일까요?\n{}\n정답:"}
ANSWERS = [" 부정", " 긍정"]
FEW: dict[str, Any] = {"num_fewshot": 2, "num_samples": 6, "seed": 7}


def review(i: int) -> dict[str, Any]:
    return {"id": str(i), "document": f"{WORDS[i % 8]} {WORDS[i // 8 % 8]}!", "label": i * 7 // 3 % 2}


def write(folder: Path, **splits: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write(tmp_path / "data/nsmc", train=[review(i) for i in range(20, 40)], test=[review(i) for i in range(20)])
    return tmp_path / "data"


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model(max_position_embeddings=512)


def make_tokenizer(*merges: tuple[str, str]) -> Tokenizer:
    """Of single signs, and of those that are merged."""
    signs = sorted({*"".join((*PROMPTS.values(), *ANSWERS, *WORDS)), "\n", "!"} - set("{}"))
    vocabulary = ["<s>", "<unk>", *signs, *("".join(pair) for pair in merges)]
    bpe = models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges), unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=RawTokenizer(bpe), bos_token="<s>", unk_token="<unk>")


# --- The text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("좋다!! 정말, 10점 ★", "좋다 정말 점"),
        ("ㅋㅋㅋ ㅠㅠ... GOOD", "ㅋㅋㅋ ㅠㅠ"),
        ("  가\t나\n\n다\u3000라 ", "가 나 다 라"),
        ("좋다.정말", "좋다정말"),
        ("123 !? abc", ""),
        ("漢字 かな 한글", "한글"),
        ("\u3164\u115f\u1160\uffa0", ""),  # fillers, which nobody sees
    ],
)
def test_text_is_reduced_to_hangul_and_spaces(text: str, expected: str) -> None:
    assert keep_hangul(text) == expected


@given(st.text() | st.text(alphabet="가힣ㄱㅣ각 \t\na1!"))
def test_what_is_left_of_any_text(text: str) -> None:
    found = keep_hangul(text)
    assert all(char == " " or unicodedata.name(char).startswith("HANGUL") for char in found)
    assert found == " ".join(found.split()) == keep_hangul(found)
    left = iter(text)
    assert all(char in left for char in found.replace(" ", ""))
    assert [char for char in text if "가" <= char <= "힣"] == [char for char in found if "가" <= char <= "힣"]


# --- The draw --------------------------------------------------------------------------------------------------------


def test_the_draw_is_the_same_everywhere(data_dir: Path, tokenizer: Tokenizer) -> None:
    found = draw_nsmc(tokenizer, data_dir, 3, 4, 25, 1234)
    assert [row.text for row in found.examples] == DRAWN[0]
    assert [row.text for row in found.items] == DRAWN[1]
    assert found == draw_nsmc(tokenizer, data_dir / "nsmc", 3, 4, 25, 1234)
    other = draw_nsmc(tokenizer, data_dir, 3, 4, 25, 1235)
    assert other.items != found.items and other.examples != found.examples and other.sha256 != found.sha256
    labels = {keep_hangul(row["document"]): row["label"] for row in map(review, range(40))}
    assert all(labels[row.text] == row.label for row in (*found.examples, *found.items))


DRAWN = (["돈 아까움 지루함", "별로 지루함", "좋다 최고"], ["감동 별로", "최고 좋다", "좋다 좋다", "그냥 좋다"])


def test_long_examples_and_empty_texts_are_passed_over(tmp_path: Path) -> None:
    rows = [{"document": text, "label": 1} for text in ("좋다", "!?", "", "좋다좋다", "1 2 3", "좋다 좋")]
    write(tmp_path, train=rows, validation=rows)
    found = draw_nsmc(make_tokenizer(), tmp_path, 2, 3, 4, 0)
    assert {row.text for row in found.examples} <= {"좋다", "좋다좋다", "좋다 좋"}
    assert {row.text for row in found.items} == {"좋다", "좋다좋다", "좋다 좋"}
    assert found.split == "validation"
    assert {row.text for row in draw_nsmc(make_tokenizer(), tmp_path, 1, 1, 3, 0).examples} == {"좋다"}
    with pytest.raises(ValueError, match="num_fewshot=2 is too large: .* 1 reviews of at most max_example_tokens=3"):
        draw_nsmc(make_tokenizer(), tmp_path, 2, 1, 3, 0)
    with pytest.raises(ValueError, match="num_samples=4 is too large: the validation split of NSMC has 3 reviews"):
        draw_nsmc(make_tokenizer(), tmp_path, 1, 4, 4, 0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"nsmc/test.jsonl, line 2 is not JSON"),
        ('{"label": 1}', r"nsmc/test.jsonl, line 2: the field 'document' must be a text"),
        ('{"document": null, "label": 1}', r"nsmc/test.jsonl, line 2: the field 'document' must be a text"),
        ('{"document": "좋다"}', r"nsmc/test.jsonl, line 2: label=None must be from 0 to 1"),
        ('{"document": "좋다", "label": 2}', r"nsmc/test.jsonl, line 2: label=2 must be from 0 to 1"),
        ('{"document": "좋다", "label": true}', r"nsmc/test.jsonl, line 2: label=True"),
    ],
)
def test_a_line_that_is_not_as_it_must_be_is_named(
    line: str, match: str, data_dir: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    write(data_dir / "nsmc", test=[review(0), line])
    with pytest.raises(ValueError, match=match):
        evaluate_nsmc(model, tokenizer, data_dir=data_dir, **FEW)
    with pytest.raises(ValueError, match=match):
        EvaluationProtocol(None, tasks=["nsmc"], data_dir=data_dir)


def test_a_missing_file_is_named(data_dir: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    (data_dir / "nsmc/train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="num_fewshot=2 needs nsmc/train.jsonl"):
        evaluate_nsmc(model, tokenizer, data_dir=data_dir, **FEW)
    assert evaluate_nsmc(model, tokenizer, data_dir=data_dir, **{**FEW, "num_fewshot": 0})["1"]["example_labels"] == []
    with pytest.raises(FileNotFoundError, match="data_dir has no nsmc/test.jsonl"):
        evaluate_nsmc(model, tokenizer, data_dir=data_dir.parent, **FEW)


# --- The figures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference(model: PreTrainedModel, tokenizer: Tokenizer, data: Any, prompt: str, bos: bool) -> dict[str, float]:
    """One item and one answer at a time, with all logits, for a tokenizer that merges nothing over the border."""
    solved = "".join(PROMPTS[prompt].format(row.text) + ANSWERS[row.label] + "\n\n" for row in data.examples)
    chosen, greedy = [], []
    for row in data.items:
        start = [tokenizer.bos_token_id] * bos
        asked = start + tokenizer(solved + PROMPTS[prompt].format(row.text), add_special_tokens=False)["input_ids"]
        totals, firsts = [], []
        for answer in ANSWERS:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([asked + ids])).logits[0].double().log_softmax(-1)
            totals.append(sum(float(logits[len(asked) - 1 + i, token]) for i, token in enumerate(ids)))
            firsts.append(ids[0])
        chosen.append(int(totals[1] > totals[0]))
        greedy.append(int(model(torch.tensor([asked])).logits[0, -1].argmax()) == firsts[row.label])
    labels = [row.label for row in data.items]
    hits = [a == b for a, b in zip(chosen, labels, strict=True)]
    return {"accuracy": sum(hits) / len(hits), "greedy_accuracy": sum(greedy) / len(greedy)}


@pytest.mark.parametrize("bos", [False, True])
def test_figures_equal_the_reference(bos: bool, make_model: MakeModel, data_dir: Path) -> None:
    tokenizer = make_tokenizer((" ", "긍"), (" ", "부"))
    model = make_model(max_position_embeddings=512)
    answers = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
    with torch.no_grad():  # so that now one answer is generated and now the other
        model.lm_head.weight[answers[0]] *= 60
        model.lm_head.weight[answers[1]] = -model.lm_head.weight[answers[0]]
    found = evaluate_nsmc(model, tokenizer, data_dir=data_dir, num_fewshot=2, num_samples=20, seed=7, prepend_bos=bos)
    data = draw_nsmc(tokenizer, data_dir, 2, 20, 25, 7)
    for prompt, row in found.items():
        expected = reference(model, tokenizer, data, prompt, bos)
        assert {name: row[name] for name in expected} == expected
        assert 0 < row["accuracy"] < 1 and 0 < row["greedy_accuracy"] < 1
        assert row["accuracy_stderr"] == pytest.approx(math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / 19))
        assert row["prepend_bos"] is bos and row["greedy_note"] is None
        assert row["prompt"] == PROMPTS[prompt].replace("{}", "{s}")
        assert row["example_labels"] == [example.label for example in data.examples]
        assert row["items_sha256"] == data.sha256
    assert {**found["1"], "prompt": ""}.keys() == found["2"].keys()


def test_metrics_of_known_scores(model: PreTrainedModel, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every review is called positive, and every third one's next token is that of the negative answer."""
    tokenizer = make_tokenizer((" ", "긍"), (" ", "부"), (" 긍", "정"), (" 부", "정"))
    negative, positive = (tokenizer(answer)["input_ids"][0] for answer in ANSWERS)
    number = iter(range(100))

    def score(model: PreTrainedModel, batch: list[Query]) -> list[tuple[list[float], int]]:
        assert all(query.targets == [[negative], [positive]] for query in batch)
        return [([-2.0, -1.0], negative if next(number) % 3 == 0 else 0) for _ in batch]

    monkeypatch.setattr(nsmc, "score_answers", score)
    row = evaluate_nsmc(model, tokenizer, data_dir=data_dir, num_fewshot=1, num_samples=20, prompts=["2"])["2"]
    share = sum(review(i)["label"] for i in range(20)) / 20
    assert row["accuracy"] == share
    assert row["macro_f1"] == pytest.approx(2 * share / (1 + share) / 2)
    assert 0 <= row["greedy_accuracy"] <= 7 / 20


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_batch_equals_one_by_one(name: str, make_model: MakeModel) -> None:
    model = make_model(name)
    ids = torch.randint(3, 380, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()
    queries = [
        Query(ids[0][:9], 8, (0, 1), [[5], [6]]),
        Query(ids[1], 20, (0,), [[*ids[1][21:], 7]]),
        Query(ids[2][:15], 13, (1,), [[ids[2][14], 9]]),
        Query(ids[3][:1], 0, (0,), [[4]]),
    ]
    together = score_answers(model, queries)
    for query, (values, best) in zip(queries, together, strict=True):
        (alone, alone_best) = score_answers(model, [query])[0]
        assert values == pytest.approx(alone, abs=2e-5) and best == alone_best
        logits = model(torch.tensor([query.ids])).logits[0].log_softmax(-1)[query.first :]
        expected = [sum(float(logits[i, token]) for i, token in enumerate(target)) for target in query.targets]
        assert values == pytest.approx(expected, abs=2e-5) and best == int(logits[0].argmax())


def test_batches_change_no_figure(model: PreTrainedModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    rows = [evaluate_nsmc(model, tokenizer, data_dir=data_dir, batch_size=size, **FEW) for size in (1, 5)]
    for prompt in PROMPTS:
        assert {**rows[0][prompt], "batch_size": 5} == rows[1][prompt]


def test_the_head_sees_the_answers_alone(model: PreTrainedModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    shapes: list[torch.Size] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    evaluate_nsmc(model, tokenizer, data_dir=data_dir, batch_size=4, **FEW)
    hook.remove()
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in ANSWERS)
    assert shapes and all(shape[0] <= 4 and shape[1] <= longest + 1 for shape in shapes)


def test_evaluation_leaves_the_model_as_it_was(model: PreTrainedModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    model.train()
    evaluate_nsmc(model, tokenizer, data_dir=data_dir, prompts=["1"], **FEW)
    assert model.training and "forward" not in vars(model.base_model)


# --- Borders ---------------------------------------------------------------------------------------------------------


def test_answers_are_told_apart_after_a_border_that_is_merged(model: PreTrainedModel, data_dir: Path) -> None:
    tokenizer = make_tokenizer((":", " "), (": ", "긍"))
    asked, *answers = (tokenizer("감정:" + answer)["input_ids"] for answer in ("", *ANSWERS))
    assert len(asked) == 3
    queries = answer_queries(asked, *answers)
    assert [query.first for query in queries] == [1, 1]  # from before the sign that one answer takes into its token
    assert [query.ids[:2] + query.targets[0] for query in queries] == answers
    found = evaluate_nsmc(model, tokenizer, data_dir=data_dir, **FEW)
    assert all(row["greedy_accuracy"] is not None for row in found.values())


def test_greedy_cannot_tell_answers_that_begin_alike(model: PreTrainedModel, data_dir: Path) -> None:
    for merges in ([], [(":", " ")]):
        found = evaluate_nsmc(model, make_tokenizer(*merges), data_dir=data_dir, **FEW)
        for row in found.values():
            assert row["greedy_accuracy"] is None and row["greedy_note"] == "both answers begin with the same token"
            assert 0 <= row["accuracy"] <= 1


@pytest.mark.parametrize("ids", [([5, 6], [5, 6, 7], [5, 6, 8]), ([5, 6, 1], [5, 6, 7], [5, 6, 8])])
def test_answers_of_one_token_share_a_query(ids: Any) -> None:
    assert answer_queries(*ids) == [Query([5, 6], 1, (0, 1), [[7], [8]])]


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (([5, 6], [9, 7], [5, 6, 8]), "splits a prompt in another way"),
        (([5, 6], [5, 6, 1], [5, 6, 1]), "the same tokens of every answer"),
    ],
)
def test_answers_that_cannot_be_told_apart_are_refused(ids: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        answer_queries(*ids)


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_context_that_is_too_short(make_model: MakeModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"longest prompt of NSMC has \d+ tokens, .* context is 64: pass fewer"):
        evaluate_nsmc(make_model(), tokenizer, data_dir=data_dir, **FEW)


def test_nan_is_no_figure(model: PreTrainedModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="gives NaN for this text"):
        evaluate_nsmc(model, tokenizer, data_dir=data_dir, **FEW)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_fewshot": -1}, ValueError, "num_fewshot=-1"),
        ({"num_samples": 0}, ValueError, "num_samples=0"),
        ({"max_example_tokens": 0}, ValueError, "max_example_tokens=0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"prompts": []}, ValueError, "prompts="),
        ({"prompts": ["3"]}, ValueError, "prompts="),
        ({"prepend_bos": "yes"}, TypeError, "prepend_bos must be"),
        ({"tokenizer": None}, TypeError, "tokenizer must be"),
        ({"model": None}, TypeError, "model must be"),
    ],
)
def test_arguments_out_of_range(
    arguments: dict[str, Any], error: type[Exception], match: str, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(error, match=match):
        evaluate_nsmc(**{"model": model, "tokenizer": tokenizer, "data_dir": "nowhere", **arguments})


# --- The Hub ---------------------------------------------------------------------------------------------------------


def test_data_are_read_from_the_hub(
    hub: LoopbackHub, data_dir: Path, model: PreTrainedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    files = {}
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (data_dir / f"nsmc/{split}.jsonl").read_text("utf-8").splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / split)
        files[f"default/{split}/0000.parquet"] = (tmp_path / split).read_bytes()
    repository = hub.add_repo(NSMC_DATASET, files, repo_type="dataset")
    repository.new_ref(PARQUET_REVISION, repository.find("main"))
    hub.commit(NSMC_DATASET, {"nsmc.py": b"raise SystemExit"}, "a script", repo_type="dataset")
    found = evaluate_nsmc(model, tokenizer, prompts=["1"], **FEW)["1"]
    local = evaluate_nsmc(model, tokenizer, data_dir=data_dir, prompts=["1"], **FEW)["1"]
    assert found["data"] == {"name": "e9t/nsmc", "revision": "refs/convert/parquet"}
    assert {**found, "data": local["data"]} == local


def test_without_the_hub_the_error_says_what_works(
    hub: LoopbackHub, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConnectionError, match=r"NSMC \(e9t/nsmc, .* pass data_dir, a folder of nsmc/<train"):
        evaluate_nsmc(model, tokenizer, **FEW)


# --- In a protocol ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path: Path, make_model: MakeModel, tokenizer: Tokenizer, data_dir: Path) -> Path:
    """A sparse checkpoint with its tokenizer, and more training reviews than the study's shots."""
    make_model(max_position_embeddings=1024).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=SparsityConfig("magnitude"))
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "sparse"


def test_a_protocol_may_ask_for_nsmc(
    sparse: Path, tokenizer: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse)
    protocol = EvaluationProtocol(None, tasks=["nsmc"], data_dir=data_dir, limit=4)
    assert "nsmc" not in EvaluationProtocol().tasks
    requests = protocol.requests(model, tokenizer)
    assert list(requests) == ["nsmc_1", "nsmc_2"]
    results = evaluate_model(model, tokenizer, protocol, baseline=str(sparse.parent / "dense"))
    assert [row.name for row in results.sparse] == [row.name for row in results.dense] == ["nsmc_1", "nsmc_2"]
    assert len(results.comparable()) == 2
    for row in results.sparse:
        assert row.follows(requests[row.name])
        assert (row.num_fewshot, row.protocol["num_samples"]) == (10, 4)
        assert not any(row.follows({**requests[row.name], key: "?"}) for key in requests[row.name])
    monkeypatch.setattr(nsmc, "score_answers", lambda *_: pytest.fail("measured again"))
    evaluate_model(model, tokenizer, protocol)


def run_eval(*arguments: object) -> None:
    from optimum_ksparse.commands import parse_words

    parse_words(["eval", *map(str, arguments)]).execute()


@pytest.mark.parametrize("form", [["nsmc"], ["--texts", "none", "--tasks", "nsmc"]])
def test_eval_nsmc(form: list[str], sparse: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optimum")
    flags = ["--data-dir", data_dir, "--limit", 3]
    run_eval(*([*form, sparse] if form == ["nsmc"] else [sparse, *form]), *flags)
    results = EvaluationResults.load(sparse / "evaluation_results.json")
    assert [row.name for row in results.sparse] == ["nsmc_1", "nsmc_2"]
    printed = capsys.readouterr().out
    assert re.search(r"^NSMC, prompt 1 +accuracy +not evaluated +0\.\d{4}$", printed, re.M)
    assert "perplexity" not in printed


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["nsmc"], "checkpoint is missing"), ([], "checkpoint is missing"), (["nsmc", "a", "b"], "found a b"),
     (["korquad", "a"], "found korquad a")],
)  # fmt: skip
def test_eval_of_no_one_checkpoint(arguments: list[str], match: str) -> None:
    pytest.importorskip("optimum")
    with pytest.raises(ValueError, match=match):
        run_eval(*arguments)


def test_eval_before_and_after_tuning(sparse: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sparse and dense, each before tuning and after it, stand side by side in the results of the tuned model."""
    pytest.importorskip("optimum")
    dense, flags = sparse.parent / "dense", ["--data-dir", data_dir, "--limit", 3]
    run_eval("nsmc", sparse, "--baseline", dense, *flags)
    run_eval("nsmc", dense, *flags)
    for source in (sparse, dense):
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        tuned = source.with_name(source.name + "-tuned")
        model.save_pretrained(tuned)
        PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(tuned)
        tuning = {"task": "koalpaca", "base": str(source), "r": 8, "steps": 3}
        (tuned / "finetuning.json").write_text(json.dumps(tuning), encoding="utf-8")
    run_eval("nsmc", dense.with_name("dense-tuned"), *flags)
    capsys.readouterr()
    folder, column = sparse.with_name("sparse-tuned"), dense.with_name("dense-tuned")
    for _ in range(2):  # and again from what is there
        run_eval("nsmc", folder, *flags, "--baseline-results", column, "--before-results", sparse)
        results = EvaluationResults.load(folder / "evaluation_results.json")
        assert len(results.sparse) == len(results.dense) == len(results.comparable()) == 4
        after = [pair for pair in results.comparable() if pair[0].tuning is not None]
        assert [pair[1].tuning for pair in after] == [{"task": "koalpaca", "r": 8, "steps": 3}] * 2
        assert results.dense_model == "dense"
        printed = capsys.readouterr().out
        assert re.search(r"^NSMC, prompt 2, after KoAlpaca tuning +accuracy +0\.\d{4} +0\.\d{4}", printed, re.M)
    assert str(sparse.parent) not in (folder / "evaluation_results.json").read_text("utf-8")
    with pytest.raises(ValueError, match="must be of a dense model"):
        run_eval("nsmc", sparse, *flags, "--baseline-results", sparse)
    with pytest.raises(ValueError, match="dense-tuned was tuned.*--baseline-results"):
        run_eval("nsmc", sparse, *flags, "--baseline", column)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"task": 5}', "\udcff"])
def test_a_damaged_tuning_is_named(text: str, sparse: Path) -> None:
    pytest.importorskip("optimum")
    (sparse / "finetuning.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="finetuning.json"):
        run_eval("nsmc", sparse)


def test_real_data(shared: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    row = evaluate_nsmc(model, tokenizer, data_dir=shared / "data", num_fewshot=1, num_samples=3, prompts=["1"])["1"]
    assert (row["split"], row["num_samples"], len(row["example_labels"])) == ("validation", 3, 1)
