"""KoBEST figures equal those of lm-evaluation-harness itself on the same data."""

from __future__ import annotations

import copy
import functools
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.evaluation import KOBEST_TASKS, STUDY_TASKS, evaluate_kobest
from optimum_ksparse.evaluation.kobest import KOBEST_DATASET

from ..conftest import VOCABULARY, SlowProducts, sample_texts
from ..loopback_hub import LoopbackHub

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
Row = dict[str, Any]
PARAGRAPHS = sample_texts("evaluation")
# Answers of one token each, because a random model would always take the shorter one; syllables, for shorter prompts.
WORDS = ["아니오", "예", "부정", "긍정", *sorted({c for c in "".join(PARAGRAPHS) if "가" <= c <= "힣"} - {"예"})]


def item(task: str, number: int) -> Row:
    """One item; no two numbers give the same."""

    def piece(place: int, length: int) -> str:
        text = PARAGRAPHS[(7 * number + place) % len(PARAGRAPHS)]
        return f"{number} {text[place : place + length]}"

    items: dict[str, Row] = {
        "boolq": {"paragraph": piece(0, 60), "question": f"{piece(9, 12)}인가?", "label": number % 2},
        "copa": {
            "premise": piece(1, 20),
            "question": ("원인", "결과")[number // 2 % 2],
            "alternative_1": piece(2, 15),
            "alternative_2": piece(3, 18),
            "label": number % 2,
        },
        "hellaswag": {
            "context": piece(4, 40),
            **{f"ending_{i}": piece(4 + i, 10 + 2 * i) for i in range(1, 5)},
            "label": number % 4,
        },
        "sentineg": {"sentence": piece(5, 20), "label": number % 2},
        "wic": {"word": "단수", "context_1": piece(6, 20), "context_2": piece(8, 20), "label": number % 2},
    }
    return items[task]


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_task(folder: Path, task: str, **numbers: range) -> None:
    for split, chosen in numbers.items():
        write(folder / task / f"{split}.jsonl", (item(task, number) for number in chosen))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Five items of each task, and as many to draw few-shot examples from."""
    for task in KOBEST_TASKS:
        write_task(tmp_path / "kobest", task, train=range(10, 15), validation=range(5))
    return tmp_path / "kobest"


@pytest.fixture(scope="module")
def answering(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    answering = copy.deepcopy(tokenizer)
    answering.add_tokens(WORDS)
    return answering


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    """Far from uniform, so that its answers depend on all of the prompt."""
    model = make_model(vocab_size=VOCABULARY + len(WORDS), max_position_embeddings=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() == 2 else 1)
    return model


def harness(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    data_dir: Path,
    folder: Path,
    tasks: Iterable[str] = KOBEST_TASKS,
    split: str = "validation",
    **settings: Any,
) -> dict[str, Row]:
    """lm-evaluation-harness by its own way in, with task files in `folder`: task → metrics."""
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    packaged = Path(lm_eval.tasks.__file__).parent / "kobest"
    for task in tasks:
        own = {
            "include": str(packaged / f"kobest_{task}.yaml"),
            "task": f"direct_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {name: str(data_dir / task / f"{name}.jsonl") for name in ("train", split)}
            },
            "validation_split": split,
            "test_split": None,
        }
        write(folder / f"direct_{task}.yaml", [yaml.safe_dump(own)])
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4),
        tasks=[f"direct_{task}" for task in tasks],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        **settings,
    )
    return {
        task: {
            **found["results"][f"direct_{task}"],
            "num_samples": found["n-samples"][f"direct_{task}"]["effective"],
            "version": found["versions"][f"direct_{task}"],
        }
        for task in tasks
    }


@pytest.fixture
def direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second, and not asked for
    return functools.partial(harness, folder=tmp_path / "direct")


def assert_equal(found: dict[str, Any], expected: dict[str, Row]) -> None:
    assert found.keys() == {*expected, "mean_f1"}
    for task, metrics in expected.items():
        assert found[task]["acc"] == metrics["acc,none"], task
        assert found[task]["f1"] == metrics["f1,none"], task
        assert found[task].get("acc_norm") == metrics.get("acc_norm,none"), task
        assert found[task]["acc_stderr"] == pytest.approx(metrics["acc_stderr,none"]), task
        assert (found[task]["num_samples"], found[task]["task_version"]) == (
            metrics["num_samples"],
            metrics["version"],
        )


def figures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        task: {name: found[task].get(name) for name in ("acc", "f1", "acc_norm", "items_sha256", "num_samples")}
        for task in found.keys() & {*KOBEST_TASKS}
    }


@pytest.mark.slow
def test_equals_the_harness_on_real_items(
    model: PreTrainedModel, answering: Tokenizer, direct: Callable[..., dict], shared: Path
) -> None:
    data_dir = shared / "data/kobest"
    expected = direct(model, answering, data_dir, num_fewshot=1, limit=3)
    found = evaluate_kobest(model, answering, num_fewshot=1, limit=3, data_dir=data_dir)
    assert_equal(found, expected)
    assert [found[task]["num_samples"] for task in KOBEST_TASKS] == [3] * 5
    assert found["mean_f1"] == pytest.approx(sum(expected[task]["f1,none"] for task in STUDY_TASKS) / 4)


@pytest.mark.parametrize(("num_fewshot", "one_token_answers"), [(0, True), (2, False)])
def test_equals_the_harness_on_items_made_here(
    one_token_answers: bool,
    num_fewshot: int,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    answering: Tokenizer,
    direct: Callable[..., dict],
    data_dir: Path,
) -> None:
    tokenizer = answering if one_token_answers else tokenizer
    expected = direct(model, tokenizer, data_dir, num_fewshot=num_fewshot)
    found = evaluate_kobest(model, tokenizer, num_fewshot=num_fewshot, data_dir=data_dir)
    assert_equal(found, expected)
    assert [found[task]["num_samples"] for task in KOBEST_TASKS] == [5] * 5


def test_row_says_how_it_was_measured(
    model: PreTrainedModel, answering: Tokenizer, data_dir: Path, slow_products: SlowProducts
) -> None:
    model = model.bfloat16()
    row = evaluate_kobest(model, answering, tasks=["wic"], num_fewshot=1, limit=3, batch_size=2, data_dir=data_dir)
    row = row["wic"]
    versions = row.pop("versions")
    assert {"lm-eval", "torch", "transformers", "optimum-ksparse"} <= versions.keys()
    assert len(row.pop("items_sha256")) == len(row["data"].pop("files_sha256")) == 64
    assert all(isinstance(row.pop(name), float) for name in ("acc", "acc_stderr", "f1"))
    assert row == {
        "num_samples": 3,
        "task": "kobest_wic",
        "task_version": 1.0,
        "num_fewshot": 1,
        "limit": 3,
        "data": {},
        "split": "validation",
        "prepend_bos": False,
        "batch_size": 2,
        "dtype": "bfloat16",
        "product_dtype": "float32",
        "device": "cpu",
    }
    assert slow_products.seen == []


@pytest.mark.slow
def test_sparse_model_gives_the_same_as_its_dense_twin(
    model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    how: dict[str, Any] = {"data_dir": data_dir}
    dense = figures(evaluate_kobest(model, answering, **how))
    sparsify(model, SparsityConfig("magnitude", "2:4"))
    twin = copy.deepcopy(model)
    twin.dequantize()
    assert sparse_modules(model) and not sparse_modules(twin)
    found = figures(evaluate_kobest(model, answering, **how))
    assert found == figures(evaluate_kobest(twin, answering, **how))
    assert found != dense


def test_batch_size_changes_nothing(model: PreTrainedModel, answering: Tokenizer, data_dir: Path) -> None:
    rows = [
        figures(evaluate_kobest(model, answering, tasks=["copa"], num_fewshot=1, batch_size=size, data_dir=data_dir))
        for size in (1, 3, 3)
    ]
    assert rows[0] == rows[1] == rows[2]


def test_test_split_is_preferred(
    model: PreTrainedModel, answering: Tokenizer, data_dir: Path, direct: Callable[..., dict]
) -> None:
    write_task(data_dir, "copa", test=range(20, 27))
    found = evaluate_kobest(model, answering, tasks=["copa", "wic"], num_fewshot=2, data_dir=data_dir)
    assert (found["copa"]["split"], found["copa"]["num_samples"]) == ("test", 7)
    assert (found["wic"]["split"], found["wic"]["num_samples"]) == ("validation", 5)
    del found["wic"]
    assert_equal(found, direct(model, answering, data_dir, tasks=["copa"], split="test", num_fewshot=2))


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_limit_takes_the_first_items(
    limit: int, model: PreTrainedModel, answering: Tokenizer, data_dir: Path, tmp_path: Path
) -> None:
    found = evaluate_kobest(model, answering, tasks=["copa"], limit=limit, data_dir=data_dir)["copa"]
    assert (found["num_samples"], found["limit"]) == (min(limit, 5), limit)
    assert (found["acc_stderr"] is None) == (limit == 1)
    write_task(tmp_path / "first", "copa", validation=range(min(limit, 5)))
    first = evaluate_kobest(model, answering, tasks=["copa"], data_dir=tmp_path / "first")["copa"]
    assert {name: first[name] for name in ("acc", "f1", "items_sha256")} == {
        name: found[name] for name in ("acc", "f1", "items_sha256")
    }


@pytest.mark.parametrize(
    "change",
    [
        {"num_fewshot": 1},
        {"limit": 4},
        {"edit": {"premise": "다른 글"}},
        {"edit": {"label": 1}},
    ],
)
def test_items_sha256_is_of_the_items_and_their_prompts(
    change: dict, model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    settings = {"tasks": ["copa"], "data_dir": data_dir}
    before = evaluate_kobest(model, answering, **settings)["copa"]
    edit = change.pop("edit", {})
    write(data_dir / "copa/validation.jsonl", [{**item("copa", 0), **edit}, *(item("copa", i) for i in range(1, 5))])
    after = evaluate_kobest(model, answering, **settings, **change)["copa"]
    assert before["items_sha256"] != after["items_sha256"]
    assert (before["data"] != after["data"]) == bool(edit or "num_fewshot" in change)


@pytest.mark.parametrize("padded", [True, False])
def test_model_tokenizer_and_random_states_are_left_as_they_were(
    padded: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data_dir: Path
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if not padded:
        tokenizer.pad_token = None

    def state() -> Any:
        modes = {name: module.training for name, module in model.named_modules()}
        numbers = np.random.get_state()
        drawn = random.getstate(), torch.get_rng_state().tolist(), numbers[1].tolist(), numbers[2:]
        settings = tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side
        return modes, drawn, settings, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()

    model.train()
    model.model.layers[1].eval()
    before = state()
    evaluate_kobest(model, tokenizer, tasks=["copa", "boolq"], num_fewshot=1, data_dir=data_dir, prepend_bos=False)
    assert state() == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_items_begin_with_the_beginning_token_as_the_row_says(
    prepend_bos: bool | None,
    adds_bos: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data_dir: Path,
) -> None:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chosen = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    first: set[int] = set()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: first.update(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    found = evaluate_kobest(model, chosen, tasks=["copa"], data_dir=data_dir, prepend_bos=prepend_bos)["copa"]
    assert found["prepend_bos"] is (adds_bos if prepend_bos is None else prepend_bos)
    assert (first == {1}) == found["prepend_bos"]
    assert (1 in first) == found["prepend_bos"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"tasks": ["helaswag"]}, ValueError, "'helaswag' is not a task; did you mean 'hellaswag'"),
        ({"tasks": ["kobest_bolq"]}, ValueError, "'kobest_bolq' .* did you mean 'boolq'"),
        ({"tasks": ["korquad"]}, ValueError, "allowed: copa, hellaswag, boolq, sentineg, wic"),
        ({"tasks": []}, ValueError, "no tasks"),
        ({"tasks": "copa"}, TypeError, "tasks must be a list of names"),
        ({"tasks": [1]}, TypeError, "tasks must be a list of names"),
        ({"limit": 0}, ValueError, "limit=0 is too small, it must be at least 1"),
        ({"limit": -1}, ValueError, "limit=-1"),
        ({"limit": True}, TypeError, "limit must be an integer of at least 1, found True"),
        ({"limit": 1.5}, TypeError, "limit must be an integer of at least 1, found 1.5"),
        ({"num_fewshot": -1}, ValueError, "num_fewshot=-1 is too small, it must be at least 0"),
        ({"num_fewshot": False}, TypeError, "num_fewshot must be an integer"),
        ({"num_fewshot": None}, TypeError, "num_fewshot must be an integer"),
        ({"num_fewshot": 6}, ValueError, "num_fewshot=6"),  # of five items
        ({"num_fewshot": 5}, ValueError, "num_fewshot=5"),  # without a test split the harness draws one more
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": "auto"}, TypeError, "batch_size must be an integer"),
        ({"prepend_bos": "yes"}, TypeError, "prepend_bos"),
        ({"prepend_bos": 1}, TypeError, "prepend_bos"),
    ],
)
def test_argument_out_of_range_is_named(
    arguments: dict, error: type[Exception], match: str, model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    with pytest.raises(error, match=match):
        evaluate_kobest(model, answering, **{"data_dir": data_dir, "tasks": ["copa"], **arguments})


@pytest.mark.parametrize(
    ("task", "rows", "match"),
    [
        ("copa", [], "copa/validation.jsonl has no items"),
        ("copa", ["", "  "], "copa/validation.jsonl has no items"),
        ("copa", [item("copa", 0), "", "{premise"], "copa/validation.jsonl, line 3 is not JSON"),
        ("copa", [[1]], "copa/validation.jsonl, line 1 is list, not an object"),
        ("wic", [{"word": "말", "context_1": "말", "label": 0}], "line 1: the field 'context_2' must be a text"),
        ("boolq", [{**item("boolq", 0), "question": 5}], "boolq/.*, line 1: the field 'question' must be a text"),
        ("sentineg", [{"sentence": "좋다"}], "sentineg/.*, line 1: label=None must be from 0 to 1"),
        *(
            ("sentineg", [item("sentineg", 1), {**item("sentineg", 0), "label": label}], "line 2: label=")
            for label in (2, -1, "1", True, 0.5, 1.0, [0], None)
        ),
        ("hellaswag", [{**item("hellaswag", 0), "label": 4}], "hellaswag/.*: label=4 must be from 0 to 3"),
        ("copa", [{**item("copa", 0), "question": "이유"}], "copa/.*: question='이유' must be 원인 or 결과"),
    ],
)
def test_damaged_item_is_named(
    task: str, rows: list, match: str, model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    write(data_dir / task / "validation.jsonl", rows)
    with pytest.raises(ValueError, match=match) as error:
        evaluate_kobest(model, answering, tasks=[task], data_dir=data_dir)
    assert str(data_dir) not in str(error.value)


@pytest.mark.parametrize("content", ["", '{"other": "글", "label": "zero"}\n'])
def test_training_file_is_not_read_without_few_shot_examples(
    content: str, model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    expected = figures(evaluate_kobest(model, answering, tasks=["copa"], data_dir=data_dir))
    (data_dir / "copa/train.jsonl").write_text(content, encoding="utf-8")
    assert figures(evaluate_kobest(model, answering, tasks=["copa"], data_dir=data_dir)) == expected


def test_blank_lines_and_other_fields_change_nothing(
    model: PreTrainedModel, answering: Tokenizer, data_dir: Path
) -> None:
    tasks = ("copa", "wic")
    expected = evaluate_kobest(model, answering, tasks=tasks, num_fewshot=2, data_dir=data_dir)
    for task in tasks:
        rows = [{"guid": f"{task}-{i}", **item(task, i)} for i in range(5)]
        write(data_dir / task / "validation.jsonl", [rows[0], "", *rows[1:], "  "])
    found = evaluate_kobest(model, answering, tasks=tasks, num_fewshot=2, data_dir=data_dir)
    for task in tasks:
        assert (found[task]["acc"], found[task]["f1"]) == (expected[task]["acc"], expected[task]["f1"])


def test_texts_that_look_like_dates_stay_texts(model: PreTrainedModel, answering: Tokenizer, data_dir: Path) -> None:
    rows = [{"sentence": f"2024-01-0{number}", "label": number % 2} for number in range(1, 5)]
    write(data_dir / "sentineg/validation.jsonl", rows)
    read: list[str] = []
    tokenizer = copy.deepcopy(answering)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(map(tokenizer.decode, kwargs["input_ids"])), with_kwargs=True
    )
    evaluate_kobest(model, tokenizer, tasks=["sentineg"], batch_size=1, data_dir=data_dir)
    assert {text.split(" 긍부정")[0] for text in read} == {f"문장: {row['sentence']}" for row in rows}


def test_few_shot_examples_need_a_training_file(model: PreTrainedModel, answering: Tokenizer, data_dir: Path) -> None:
    (data_dir / "copa/train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"num_fewshot=2 needs copa/train.jsonl in data_dir"):
        evaluate_kobest(model, answering, tasks=["copa"], num_fewshot=2, data_dir=data_dir)


@pytest.mark.parametrize("hidden", ["lm_eval", "lm_eval.models.huggingface"])
def test_missing_harness_is_named_with_its_extra(
    hidden: str, model: PreTrainedModel, answering: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delattr(lm_eval.models, "huggingface", raising=False)
    with pytest.raises(ImportError, match=r'tasks need lm-eval: pip install "evaluate.*" "lm-eval'):
        evaluate_kobest(model, answering, tasks=["copa"], data_dir=data_dir)


@pytest.fixture
def kobest_hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A Hub whose data sets nobody has read before."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return hub


def test_data_are_read_from_the_hub_by_name(
    kobest_hub: LoopbackHub, model: PreTrainedModel, answering: Tokenizer, tmp_path: Path
) -> None:
    tasks = ["copa", "hellaswag"]
    for task in tasks:
        write_task(tmp_path / "data", task, train=range(10, 15), validation=range(5), test=range(20, 27))
    files = {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in tmp_path.glob("data/*/*.jsonl")}
    configs = [
        {
            "config_name": task,
            "data_files": [
                {"split": name, "path": f"{task}/{name}.jsonl"} for name in ("train", "validation", "test")
            ],
        }
        for task in tasks
    ]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    kobest_hub.add_repo(KOBEST_DATASET, {**files, "README.md": card.encode()}, repo_type="dataset")

    found = evaluate_kobest(model, answering, tasks=tasks, num_fewshot=2)
    assert [found[task]["split"] for task in tasks] == ["test"] * 2
    assert [found[task]["data"] for task in tasks] == [{"name": KOBEST_DATASET}] * 2
    local = evaluate_kobest(model, answering, tasks=tasks, num_fewshot=2, data_dir=tmp_path / "data")
    assert figures(found) == figures(local)


@pytest.mark.parametrize("refused", [True, False])
def test_without_the_hub_the_error_says_what_works(
    refused: bool, kobest_hub: LoopbackHub, model: PreTrainedModel, answering: Tokenizer
) -> None:
    if refused:
        kobest_hub.add_repo(KOBEST_DATASET, {"README.md": b""}, repo_type="dataset", private=True)
        kobest_hub.required_token = "secret"
    with pytest.raises(ConnectionError, match=r"KoBEST \(skt/kobest_v1, copa\) .* pass data_dir, a folder of copa/"):
        evaluate_kobest(model, answering, tasks=["copa"])


def test_cut_prompts_are_told_of(
    make_model: MakeModel, answering: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("optimum_ksparse.evaluation.harness.logger.warning", told.append)
    short = make_model(vocab_size=VOCABULARY + len(WORDS), max_position_embeddings=96)
    evaluate_kobest(short, answering, tasks=["copa"], num_fewshot=4, data_dir=data_dir)
    assert len(told) == 1 and "longer than the model's context" in told[0]


def test_context_that_is_too_short_for_an_answer(make_model: MakeModel, answering: Tokenizer, data_dir: Path) -> None:
    short = make_model(vocab_size=VOCABULARY + len(WORDS), max_position_embeddings=2)
    with pytest.raises(ValueError, match="context of 2 tokens is too short for an answer of kobest_copa"):
        evaluate_kobest(short, answering, tasks=["copa"], data_dir=data_dir)
