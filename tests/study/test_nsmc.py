"""NSMC by lm-evaluation-harness equals a slow, obvious reference; what is drawn is the same everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from optimum_ksparse import SparsityConfig
from optimum_ksparse.__main__ import parse
from optimum_ksparse.evaluation import (
    EvaluationProtocol,
    EvaluationResults,
    HarnessTask,
    evaluate_kobest,
    evaluate_model,
)
from optimum_ksparse.study.quantities import NSMC_DATASET, NSMC_TASKS

from ..loopback_hub import LoopbackHub

pytest.importorskip("lm_eval", reason="needs the extra eval")
from optimum_ksparse.study.nsmc.utils import REVISION, keep_hangul, load

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
WORDS = ["좋다", "별로", "그냥", "최고", "지루함", "ㅋㅋ", "감동", "돈 아까움"]
PROMPTS = ["문장: {}\n감정:", "다음 문장은 긍정일까요 부정일까요?\n{}\n정답:"]
ANSWERS = [" 부정", " 긍정"]


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


def measure(model: PreTrainedModel, tokenizer: Tokenizer, **settings: Any) -> list[dict[str, Any]]:
    found = evaluate_kobest(model, tokenizer, tasks=["nsmc"], **settings)
    return [found[name] for name in NSMC_TASKS]


def make_tokenizer(*merges: tuple[str, str]) -> Tokenizer:
    """Of single signs, and of those that are merged."""
    signs = sorted({*"".join((*PROMPTS, *ANSWERS, *WORDS)), "\n", "!"} - set("{}"))
    vocabulary = ["<s>", "<unk>", *signs, *("".join(pair) for pair in merges)]
    bpe = models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges), unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=RawTokenizer(bpe), bos_token="<s>", unk_token="<unk>")


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


def parquet(folder: Path) -> dict[str, str]:
    datasets = pytest.importorskip("datasets")
    files = {path.stem: str(path.with_suffix(".parquet")) for path in folder.glob("*.jsonl")}
    for split, path in files.items():
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(path)
    return files


def test_the_draw_is_the_same_everywhere(data_dir: Path, tokenizer: Tokenizer) -> None:
    drawn = load(tokenizer, data_files=parquet(data_dir / "nsmc"))
    assert drawn["train"]["document"][:3] == ["돈 아까움 지루함", "별로 지루함", "좋다 최고"]
    assert drawn["test"]["document"][:3] == DRAWN
    assert (len(drawn["train"]), len(drawn["test"])) == (10, 20)
    labels = {keep_hangul(row["document"]): row["label"] for row in map(review, range(40))}
    assert all(labels[row["document"]] == row["label"] for split in drawn.values() for row in split)


DRAWN = ["감동 별로", "최고 좋다", "좋다 좋다"]


def test_long_examples_and_empty_texts_are_passed_over(tmp_path: Path) -> None:
    texts = ["좋다", "!?", "", "좋다" * 13, "1 2 3"]
    write(tmp_path, train=[{"document": text, "label": 1} for text in [*texts, *["좋다"] * 9]])
    write(tmp_path, validation=[{"document": text, "label": 1} for text in texts])
    files = parquet(tmp_path)
    drawn = load(make_tokenizer(), data_files=files)
    assert {*drawn["validation"]["document"]} == {"좋다", "좋다" * 13}
    assert drawn["train"]["document"] == ["좋다"] * 10
    write(tmp_path, train=[{"document": text, "label": 1} for text in texts])
    with pytest.raises(ValueError, match="has 1 reviews"):
        load(make_tokenizer(), data_files=parquet(tmp_path))


@torch.no_grad()
def reference(model: PreTrainedModel, tokenizer: Tokenizer, data: Any, prompt: str, bos: bool) -> dict[str, float]:
    """One item and one answer at a time, for a tokenizer that merges nothing over the border."""
    solved = "".join(prompt.format(row["document"]) + ANSWERS[row["label"]] + "\n\n" for row in data["train"])
    hits, exact = 0, 0
    for row in data["test"]:
        start = [tokenizer.bos_token_id] * bos
        asked = start + tokenizer(solved + prompt.format(row["document"]), add_special_tokens=False)["input_ids"]
        totals, greedy = [], []
        for answer in ANSWERS:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([asked + ids])).logits[0].double().log_softmax(-1)[len(asked) - 1 : -1]
            totals.append(sum(float(logits[i, token]) for i, token in enumerate(ids)))
            greedy.append(logits.argmax(-1).tolist() == ids)
        hits += int(totals[1] > totals[0]) == row["label"]
        exact += greedy[row["label"]]
    return {"acc": hits / len(data["test"]), "exact_match": exact / len(data["test"])}


@pytest.mark.slow
@pytest.mark.parametrize("bos", [False, True])
def test_figures_equal_the_reference(bos: bool, make_model: MakeModel, data_dir: Path) -> None:
    tokenizer = make_tokenizer((" ", "긍"), (" ", "부"), (" 긍", "정"), (" 부", "정"))
    model = make_model(max_position_embeddings=512)
    answers = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
    with torch.no_grad():  # so that now one answer is generated and now the other
        model.lm_head.weight[answers[0]] *= 60
        model.lm_head.weight[answers[1]] = -model.lm_head.weight[answers[0]]
    data = load(tokenizer, data_files=parquet(data_dir / "nsmc"))
    for prompt, row in zip(PROMPTS, measure(model, tokenizer, data_dir=data_dir, prepend_bos=bos), strict=True):
        expected = reference(model, tokenizer, data, prompt, bos)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert 0 < row["acc"] < 1 and 0 < row["exact_match"] < 1
        assert (row["prepend_bos"], row["num_fewshot"], row["num_samples"]) == (bos, 10, 20)


def test_nan_is_no_figure(make_model: MakeModel, tokenizer: Tokenizer, data_dir: Path) -> None:
    model = make_model(max_position_embeddings=1024)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="gives NaN for nsmc_prompt1"):
        measure(model, tokenizer, data_dir=data_dir, limit=2)


@pytest.mark.slow
def test_data_are_read_from_the_hub(
    hub: LoopbackHub, data_dir: Path, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model(max_position_embeddings=1024)
    files = {f"default/{split}/0000.parquet": Path(path) for split, path in parquet(data_dir / "nsmc").items()}
    repository = hub.add_repo(NSMC_DATASET, {k: v.read_bytes() for k, v in files.items()}, repo_type="dataset")
    repository.new_ref(REVISION, repository.find("main"))
    hub.commit(NSMC_DATASET, {"nsmc.py": b"raise SystemExit"}, "a script", repo_type="dataset")
    found, local = measure(model, tokenizer), measure(model, tokenizer, data_dir=data_dir)
    assert found[0]["data"] == {"name": "e9t/nsmc"}
    assert [{**row, "data": 0} for row in found] == [{**row, "data": 0} for row in local]


def test_without_the_hub_the_error_says_what_works(
    hub: LoopbackHub, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConnectionError, match=r"NSMC \(e9t/nsmc, .* pass data_dir, a folder of nsmc/"):
        measure(make_model(), tokenizer)


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


@pytest.mark.slow
def test_a_protocol_may_ask_for_nsmc(
    sparse: Path, tokenizer: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse)
    protocol = EvaluationProtocol(None, tasks=["nsmc"], data_dir=data_dir, limit=4)
    assert "nsmc" not in EvaluationProtocol().tasks
    requests = protocol.requests(model, tokenizer)
    assert list(requests) == [*NSMC_TASKS]
    results = evaluate_model(model, tokenizer, protocol, baseline=str(sparse.parent / "dense"))
    assert [row.name for row in results.sparse] == [row.name for row in results.dense] == [*NSMC_TASKS]
    assert len(results.comparable()) == 2
    for row in results.sparse:
        assert row.follows(requests[row.name])
        assert (row.num_fewshot, row.protocol["num_samples"]) == (10, 4)
        assert not any(row.follows({**requests[row.name], key: "?"}) for key in requests[row.name])
    monkeypatch.setattr(HarnessTask, "measure", lambda *_: pytest.fail("measured again"))
    evaluate_model(model, tokenizer, protocol)


def run_eval(*arguments: object) -> None:
    parse(["eval", *map(str, arguments)]).execute()


def run_nsmc(*arguments: object) -> None:
    run_eval(*arguments, "--texts", "none", "--tasks", "nsmc", "--limit", 3)


@pytest.mark.slow
def test_eval_before_and_after_tuning(sparse: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sparse and dense, each before tuning and after it, stand side by side in the results of the tuned model."""
    pytest.importorskip("optimum")
    dense, flags = sparse.parent / "dense", ["--data-dir", data_dir]
    run_nsmc(sparse, "--baseline", dense, *flags)
    run_nsmc(dense, *flags)
    for source in (sparse, dense):
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        tuned = source.with_name(source.name + "-tuned")
        model.save_pretrained(tuned)
        PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(tuned)
        tuning = {"task": "koalpaca", "base": str(source), "r": 8, "steps": 3}
        (tuned / "finetuning.json").write_text(json.dumps(tuning), encoding="utf-8")
    run_nsmc(dense.with_name("dense-tuned"), *flags)
    capsys.readouterr()
    folder, column = sparse.with_name("sparse-tuned"), dense.with_name("dense-tuned")
    for _ in range(2):  # and again from what is there
        run_nsmc(folder, *flags, "--baseline-results", column, "--before-results", sparse)
        results = EvaluationResults.load(folder / "evaluation_results.json")
        assert len(results.sparse) == len(results.dense) == len(results.comparable()) == 4
        after = [pair for pair in results.comparable() if pair[0].tuning is not None]
        assert [pair[1].tuning for pair in after] == [{"task": "koalpaca", "r": 8, "steps": 3}] * 2
        assert results.dense_model == "dense"
        printed = capsys.readouterr().out
        assert re.search(r"^NSMC 2, after KoAlpaca tuning +acc +[01]\.\d{4} +[01]\.\d{4}", printed, re.M)
    assert str(sparse.parent) not in (folder / "evaluation_results.json").read_text("utf-8")
    with pytest.raises(ValueError, match="must be of a dense model"):
        run_nsmc(sparse, *flags, "--baseline-results", sparse)
    with pytest.raises(ValueError, match="dense-tuned was tuned.*--baseline-results"):
        run_nsmc(sparse, *flags, "--baseline", column)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"task": 5}', "\udcff"])
def test_a_damaged_tuning_is_named(text: str, sparse: Path) -> None:
    pytest.importorskip("optimum")
    (sparse / "finetuning.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="finetuning.json"):
        run_nsmc(sparse)
