"""Calibration text: every form of dataset becomes [num_samples, seq_len] token ids of the model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from optimum_ksparse import SparsityConfig, sparsify
from optimum_ksparse.data import CalibrationData, CalibrationTokens, calibration_tokens, prepends_bos
from optimum_ksparse.data.documents import HUB_DATASETS, documents

from ..conftest import CONTEXT, VOCABULARY, sample_texts

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
Calibrate = Callable[..., CalibrationTokens]
BOS = 1
MESSAGES = [
    [{"role": "user", "content": text[:150]}, {"role": "assistant", "content": text[150:]}]
    for text in sample_texts("calibration")
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The fixture's tokenizer, with a beginning token before every text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    chat.chat_template = TEMPLATE
    return chat


@pytest.fixture
def calibrate(make_model: MakeModel, tokenizer: Tokenizer) -> Calibrate:
    """Makes samples of 16 tokens: `calibrate(texts, num_samples=3)`."""

    def run(dataset: Any, tokenizer: Tokenizer | None = tokenizer, **settings: Any) -> CalibrationTokens:
        data = CalibrationData(dataset, **{"num_samples": 4, "seq_len": 16, **settings})
        return calibration_tokens(data, make_model(), tokenizer)

    return run


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def contains(document: list[int], piece: list[int]) -> bool:
    return any(document[i : i + len(piece)] == piece for i in range(len(document) - len(piece) + 1))


def source_documents(tokens: torch.Tensor, texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """For each sample the number of the text that it is a contiguous piece of."""
    encoded = [encode(tokenizer, text) for text in texts]
    return [next(i for i, ids in enumerate(encoded) if contains(ids, crop)) for crop in tokens.tolist()]


def dataset_forms(folder: Path) -> dict[str, Any]:
    """The calibration paragraphs in every form that needs no network."""
    texts = sample_texts("calibration")
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    (folder / "t.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "t.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8"
    )
    (folder / "strings.jsonl").write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    return {
        "txt": str(folder / "t.txt"),
        "txt_path": folder / "t.txt",
        "jsonl": str(folder / "t.jsonl"),
        "jsonl_strings": folder / "strings.jsonl",
        "list": texts,
        "tuple": tuple(texts),
        "dataset": datasets.Dataset.from_list(rows),
        "iterable_dataset": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "generator_dataset": datasets.IterableDataset.from_generator(lambda: iter(rows)),
    }


FORMS = (
    "txt",
    "txt_path",
    "jsonl",
    "jsonl_strings",
    "list",
    "tuple",
    "dataset",
    "iterable_dataset",
    "generator_dataset",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_crops_of_different_documents(
    form: str, calibrate: Calibrate, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = sample_texts("calibration")
    found = calibrate(dataset_forms(tmp_path)[form], num_samples=8)
    assert found.ids.shape == (8, 16)
    assert found.ids.dtype == torch.int64
    assert len(set(source_documents(found.ids, texts, tokenizer))) == 8
    assert found.description["form"] == "crops"
    assert (found.description["num_samples"], found.description["seq_len"]) == (8, 16)


@pytest.mark.parametrize("form", FORMS)
def test_seed_draws_documents_and_crops(form: str, calibrate: Calibrate, tmp_path: Path) -> None:
    dataset = dataset_forms(tmp_path)[form]
    first, same, other = (calibrate(dataset, seed=seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_seed_draws_the_place_of_a_crop(calibrate: Calibrate) -> None:
    text = [sample_texts("calibration")[0]]
    crops = {tuple(calibrate(text, num_samples=1, seed=seed).ids[0].tolist()) for seed in range(5)}
    assert len(crops) > 1


def test_list_of_texts_is_left_as_it_was(calibrate: Calibrate) -> None:
    texts = sample_texts("calibration")
    before = list(texts)
    calibrate(texts)
    assert texts == before


def test_crops_come_from_documents_long_enough(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    long = sample_texts("calibration")[:4]
    found = calibrate(["짧다"] * 40 + long + ["a b"] * 40)
    assert found.description["form"] == "crops"
    assert sorted(source_documents(found.ids, long, tokenizer)) == [0, 1, 2, 3]


def test_document_of_exactly_the_length_is_taken_whole(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, sample_texts("calibration")[0])
    text = tokenizer.decode(ids[:40])
    exact = encode(tokenizer, text)
    assert calibrate([text], num_samples=1, seq_len=len(exact)).ids.tolist() == [exact]


def test_short_texts_are_packed_one_after_another(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    texts = [f"문장 {i}." for i in range(30)]
    assert all(len(encode(tokenizer, text)) < 16 for text in texts)
    found = calibrate(texts, num_samples=5)
    assert found.description["form"] == "packed"
    separator = encode(tokenizer, "\n\n")
    stream = [token for text in documents(texts, 0, tokenizer) for token in (*encode(tokenizer, text), *separator)]
    assert found.ids.flatten().tolist() == stream[: 5 * 16]


def test_too_little_text_is_an_error_with_the_counts_and_what_is_possible(
    calibrate: Calibrate, tokenizer: Tokenizer
) -> None:
    texts = [f"문장 {i}." for i in range(30)]
    num_tokens = sum(len(encode(tokenizer, text)) for text in texts)
    with pytest.raises(ValueError, match="num_samples=50 with seq_len=16 needs 800 tokens") as caught:
        calibrate(texts, num_samples=50)
    message = str(caught.value)
    assert f"30 documents with {num_tokens:,} tokens" in message
    possible = int(message.rpartition("num_samples=")[2])
    assert calibrate(texts, num_samples=possible).ids.shape == (possible, 16)
    with pytest.raises(ValueError, match=f"enough for num_samples={possible}$"):
        calibrate(texts, num_samples=possible + 1)


def test_empty_texts_are_an_error(calibrate: Calibrate, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n\n")
    (tmp_path / "empty.jsonl").write_text("")
    for dataset in (["", " \n"], tmp_path / "empty.txt", tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match="0 documents with 0 tokens, enough for num_samples=0"):
            calibrate(dataset)


def test_a_column_of_another_name_is_an_error_that_says_how_to_rename_it(calibrate: Calibrate) -> None:
    data = datasets.Dataset.from_dict({"document": sample_texts("calibration")})
    with pytest.raises(ValueError, match="columns document; needed: `text`") as caught:
        calibrate(data)
    (remedy,) = re.findall(r"dataset\.(\S+\(.*\))", str(caught.value))
    assert calibrate(eval(f"data.{remedy}", {"data": data})).ids.shape == (4, 16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "rwkv"])
def test_where_there_is_no_tokenizer_that_is_said_and_nothing_else(
    name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model(name).save_pretrained(tmp_path)
    config = SparsityConfig("wanda", dataset=sample_texts("calibration"))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*pass tokenizer=.* has no file of a tokenizer") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=config)
    assert "sentencepiece" not in str(caught.value)
    with pytest.raises(ValueError, match="no tokenizer could be loaded: pass tokenizer=") as caught:
        sparsify(make_model(name), config)
    assert "None" not in str(caught.value) and "''" not in str(caught.value)


def test_empty_texts_are_left_out(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    texts = ["", *sample_texts("calibration")[:2], "\n"]
    assert set(documents(texts, 0, tokenizer)) == set(texts[1:3])
    assert calibrate(texts, num_samples=2).description["form"] == "crops"


@pytest.mark.parametrize("setting", [None, True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_samples_begin_with_the_beginning_token_as_prepend_bos_says(
    setting: bool | None, adds_bos: bool, calibrate: Calibrate, tokenizer: Tokenizer, bos_tokenizer: Tokenizer
) -> None:
    used = bos_tokenizer if adds_bos else tokenizer
    expected = adds_bos if setting is None else setting
    assert prepends_bos(used, setting) is expected
    found = calibrate(sample_texts("calibration"), used, prepend_bos=setting)
    assert found.begins_with_bos == found.description["begins_with_bos"] == expected
    assert found.ids.shape == (4, 16)
    assert bool((found.ids[:, 0] == BOS).all()) == expected
    assert not (found.ids[:, 1:] == BOS).any()
    source_documents(found.ids[:, int(expected) :], sample_texts("calibration"), tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_packed_samples_hold_the_beginning_token_first_only(
    adds_bos: bool, calibrate: Calibrate, tokenizer: Tokenizer, bos_tokenizer: Tokenizer
) -> None:
    found = calibrate([f"문장 {i}." for i in range(30)], bos_tokenizer if adds_bos else tokenizer)
    assert found.description["form"] == "packed"
    assert int((found.ids == BOS).sum()) == 4 * adds_bos


def test_prepend_bos_without_a_beginning_token_is_an_error(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="prepend_bos=True, and the tokenizer has no beginning token"):
        calibrate(sample_texts("calibration"), bare, prepend_bos=True)
    assert not calibrate(sample_texts("calibration"), bare).begins_with_bos


def message_forms(folder: Path) -> dict[str, Any]:
    rows = [{"messages": messages} for messages in MESSAGES]
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {
        "jsonl": folder / "m.jsonl",
        "dataset": datasets.Dataset.from_list(rows),
        "iterable_dataset": datasets.IterableDataset.from_generator(lambda: iter(rows)),
    }


@pytest.mark.parametrize("form", ["jsonl", "dataset", "iterable_dataset"])
def test_messages_go_through_the_chat_template(
    form: str, calibrate: Calibrate, chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = ["".join(f"<|{m['role']}|>{m['content']}" for m in messages) for messages in MESSAGES]
    dataset = message_forms(tmp_path)[form]
    assert sorted(documents(dataset, 0, chat_tokenizer)) == sorted(expected)
    found = calibrate(dataset, chat_tokenizer, prepend_bos=True)
    assert (found.ids[:, 0] == BOS).all()
    assert int((found.ids == BOS).sum()) == 4
    source_documents(found.ids[:, 1:], expected, chat_tokenizer)


def test_messages_without_a_chat_template_are_an_error(calibrate: Calibrate, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`messages`, and the tokenizer has no chat template"):
        calibrate(message_forms(tmp_path)["jsonl"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "열린 따옴표}', r"bad\.jsonl, line 3 is not JSON"),
        (
            '{"content": "다른 이름", "id": 1}',
            r"bad\.jsonl, line 3 has neither .*`text` .*`messages`, but content, id",
        ),
        ('{"text": 5}', r"bad\.jsonl, line 3 has neither"),
        ('{"messages": "가나다"}', r"bad\.jsonl, line 3 has neither"),
        ("[1, 2]", r"bad\.jsonl, line 3 has neither .*but list"),
    ],
)
def test_bad_line_of_a_jsonl_file_is_named(line: str, match: str, calibrate: Calibrate, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "가나다"}}\n\n{line}\n{{"text": "라마바"}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        calibrate(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_paragraphs_of_a_text_file_are_documents(newline: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("첫 줄\n둘째 줄\n\n셋째\n\n\n\n넷째\n".replace("\n", newline).encode())
    assert sorted(text.strip() for text in documents(path, 0, tokenizer)) == ["넷째", "셋째", "첫 줄\n둘째 줄"]


def test_dataset_with_other_columns_is_an_error_that_names_them(calibrate: Calibrate) -> None:
    with pytest.raises(ValueError, match="columns content, label; needed: `text`, or `messages`"):
        calibrate(datasets.Dataset.from_dict({"content": ["가"], "label": [0]}))


def test_streamed_dataset_with_other_columns_is_an_error_that_names_them(calibrate: Calibrate) -> None:
    streamed = datasets.IterableDataset.from_generator(lambda: iter([{"content": "가"}]))
    with pytest.raises(ValueError, match="row 0 after shuffling has neither .*but content"):
        calibrate(streamed)


def test_dataset_row_without_text_is_an_error(calibrate: Calibrate) -> None:
    with pytest.raises(ValueError, match="row 0 after shuffling has neither"):
        calibrate(
            datasets.Dataset.from_dict({"text": [None]}, features=datasets.Features(text=datasets.Value("string")))
        )


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids,
        lambda ids: ids.int(),
        lambda ids: ids.numpy(),
        lambda ids: ids.numpy().astype(np.int16),
        lambda ids: ids.tolist(),
        lambda ids: tuple(map(tuple, ids.tolist())),
    ],
)
def test_token_ids_are_used_as_they_are(
    convert: Callable[[torch.Tensor], Any], calibrate: Calibrate, token_ids: torch.Tensor
) -> None:
    found = calibrate(convert(token_ids), None)
    assert torch.equal(found.ids, token_ids)
    assert found.ids.dtype == torch.int64
    assert found.description["form"] == "token ids"
    assert (found.description["num_samples"], found.description["seq_len"]) == tuple(token_ids.shape)
    assert not found.begins_with_bos


def test_token_ids_may_begin_with_the_beginning_token(calibrate: Calibrate, token_ids: torch.Tensor) -> None:
    tokens = token_ids.clone()
    tokens[:, 0] = BOS
    assert calibrate(tokens, None).begins_with_bos
    tokens[3, 0] = 5
    assert not calibrate(tokens, None).begins_with_bos


@pytest.mark.parametrize("wrong", [VOCABULARY, -1, -100, 2**40])
def test_token_id_out_of_the_vocabulary_is_named(wrong: int, calibrate: Calibrate, token_ids: torch.Tensor) -> None:
    tokens = token_ids.clone()
    tokens[2, 5] = wrong
    with pytest.raises(ValueError, match=f"token id {wrong} at sample 2, position 5 .*vocabulary of {VOCABULARY}"):
        calibrate(tokens, None)


def test_tokenizer_of_another_model_is_an_error(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    config = SparsityConfig(dataset=sample_texts("calibration"), num_samples=4, seq_len=16)
    with pytest.raises(ValueError, match="vocabulary of 300: is this the model's own tokenizer"):
        calibration_tokens(config, make_model(vocab_size=300), tokenizer)


@pytest.mark.parametrize("dataset", ["texts", "self", "token ids"])
def test_seq_len_above_the_context_is_an_error(dataset: str, calibrate: Calibrate) -> None:
    data = {"texts": sample_texts("calibration"), "self": "self", "token ids": torch.zeros(2, 65, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"seq_len=65 is above the model's context of {CONTEXT} positions"):
        calibrate(data[dataset], seq_len=CONTEXT + 1)


def test_the_default_length_is_the_context_where_that_is_shorter(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    settings = {"method": "wanda", "dataset": ["가나다라 마바사 " * 40] * 4, "num_samples": 2}
    model, explicit = make_model(), {**settings, "seq_len": 2048}
    with pytest.raises(ValueError, match="seq_len=2048 is above"):
        sparsify(model, SparsityConfig.from_flat(**explicit), tokenizer)
    report = sparsify(model, SparsityConfig.from_flat(**settings), tokenizer)
    assert report.calibration["seq_len"] == report.config["seq_len"] == CONTEXT


def test_whole_context_can_be_used(calibrate: Calibrate) -> None:
    assert calibrate(sample_texts("calibration"), seq_len=CONTEXT).ids.shape == (4, CONTEXT)


def test_text_without_a_tokenizer_is_an_error(calibrate: Calibrate) -> None:
    with pytest.raises(ValueError, match="a tokenizer is needed .*'texts'"):
        calibrate(sample_texts("calibration"), None)


def test_fingerprint_of_earlier_data_is_not_data(calibrate: Calibrate, token_ids: torch.Tensor) -> None:
    fingerprint = SparsityConfig(dataset=token_ids).to_dict()["dataset"]
    with pytest.raises(ValueError, match="record of earlier calibration data"):
        calibrate(fingerprint)


def test_text_written_by_the_model_is_seeded_and_begins_with_the_beginning_token(calibrate: Calibrate) -> None:
    first, same, other = (calibrate("self", num_samples=35, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, same.ids)
    assert not torch.equal(first.ids, other.ids)
    assert first.ids.shape == (35, 16)
    assert (first.ids[:, 0] == BOS).all()
    assert first.begins_with_bos
    assert first.description["form"] == "generated"
    assert len(set(map(tuple, first.ids.tolist()))) == 35


def test_text_written_by_the_model_has_no_end_token_inside(make_model: MakeModel) -> None:
    model = make_model()
    model.lm_head = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        model.lm_head.bias[2] = 100
    config = SparsityConfig(dataset="self", num_samples=16, seq_len=16)
    assert not (calibration_tokens(config, model, None).ids == 2).any()


def test_text_written_by_the_model_leaves_the_random_state_alone(make_model: MakeModel) -> None:
    model = make_model()
    before = torch.get_rng_state()
    calibration_tokens(SparsityConfig(dataset="self", num_samples=2, seq_len=8), model, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_text_written_by_the_model_needs_no_tokenizer(calibrate: Calibrate, tokenizer: Tokenizer) -> None:
    assert torch.equal(calibrate("self", None).ids, calibrate("self", tokenizer).ids)


def test_model_without_a_head_writes_no_text(make_model: MakeModel) -> None:
    model = AutoModel.from_config(make_model().config).eval()
    with pytest.raises(ValueError, match='dataset="self" needs a model that generates, LlamaModel does not'):
        calibration_tokens(SparsityConfig(dataset="self", num_samples=2, seq_len=8), model, None)


def test_model_without_a_beginning_token_writes_no_text(make_model: MakeModel) -> None:
    model = make_model(bos_token_id=None)
    with pytest.raises(ValueError, match='dataset="self" needs a beginning token'):
        calibration_tokens(SparsityConfig(dataset="self", num_samples=2, seq_len=8), model, None)


def test_model_is_pruned_on_text_of_its_own(make_model: MakeModel) -> None:
    report = sparsify(make_model(), SparsityConfig(dataset="self", num_samples=4, seq_len=16))
    assert report.calibration["dataset"] == "self"
    assert report.calibration["begins_with_bos"]


@pytest.mark.parametrize("name", HUB_DATASETS)
def test_hub_name_without_a_network_is_an_error_with_the_offline_forms(name: str, calibrate: Calibrate) -> None:
    with pytest.raises(ConnectionError) as caught:
        calibrate(name)
    for form in (name, HUB_DATASETS[name][0], ".txt", ".jsonl", "list of texts", "datasets.Dataset", 'dataset="self"'):
        assert form in str(caught.value)


class FakeHub:
    """Stands for `datasets.load_dataset`; counts the rows that are read of an endless stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.rows_read = 0
        self.texts = sample_texts("calibration")

    def rows(self) -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            self.rows_read += 1
            yield {"text": self.texts[i % len(self.texts)], "url": "-", "id": i}

    def load_dataset(self, *args: Any, **kwargs: Any) -> datasets.IterableDataset:
        self.calls.append((args, kwargs))
        return datasets.IterableDataset.from_generator(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr("optimum_ksparse.data.documents._SHUFFLE_BUFFER", 50)
    return fake


@pytest.mark.parametrize(
    ("name", "repository", "configuration"),
    [
        ("mc4-ko", "allenai/c4", "ko"),
        ("c4", "allenai/c4", "en"),
        ("kowiki", "wikimedia/wikipedia", "20231101.ko"),
    ],
)
def test_hub_name_streams_its_repository_and_stops_early(
    name: str, repository: str, configuration: str, hub: FakeHub, calibrate: Calibrate, tokenizer: Tokenizer
) -> None:
    found = calibrate(name, num_samples=8)
    assert hub.calls == [((repository, configuration), {"split": "train", "streaming": True})]
    assert found.ids.shape == (8, 16)
    assert found.description["dataset"] == name
    source_documents(found.ids, sample_texts("calibration"), tokenizer)
    assert hub.rows_read < 200


@pytest.mark.usefixtures("hub")
def test_streamed_documents_are_drawn_with_the_seed(calibrate: Calibrate) -> None:
    first, same, other = (calibrate("mc4-ko", seed=seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_stream_of_short_texts_is_packed_after_enough_documents(hub: FakeHub, calibrate: Calibrate) -> None:
    hub.texts = ["짧은 글", "더 짧다", "글"]
    found = calibrate("kowiki", num_samples=2)
    assert found.description["form"] == "packed"
    assert hub.rows_read < 500


def test_stream_that_breaks_off_is_a_connection_error(
    hub: FakeHub, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"text": "가"}
        raise OSError("reset by peer")

    monkeypatch.setattr(hub, "rows", broken)
    with pytest.raises(ConnectionError, match=r"mc4-ko.*allenai/c4.*reset by peer.*\.jsonl file"):
        calibrate("mc4-ko")
