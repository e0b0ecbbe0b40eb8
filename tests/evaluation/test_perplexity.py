"""Perplexity and bits per byte equal a slow, obvious reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from optimum_ksparse import evaluate_perplexity
from optimum_ksparse.data.dataset import describe_dataset
from optimum_ksparse.data.documents import HELD_OUT_EVERY, HUB_DATASETS, documents
from optimum_ksparse.data.texts import NUM_ARTICLES
from optimum_ksparse.kernels import fast_products

from ..conftest import CONTEXT, EVERY_ARCHITECTURE, VOCABULARY, sample_texts
from ..loopback_hub import LoopbackHub

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerBase
TEXTS = [text[:60] for text in sample_texts("evaluation")[:4]]
# None of it is in the tokenizer's training text: characters of two, three and four bytes fall apart into single bytes.
RARE_TEXTS = ["뷁쀍뛟 é 꽶팷", "𠀋 emoji 😀😀 뙗훍 끝"]


class SlowTokenizer:
    """A tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        if return_offsets_mapping:
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return self._tokenizer(text, **kwargs)


def reference_windows(
    count: int, seq_len: int, stride: int | None, bos: bool, max_tokens: int | None
) -> list[tuple[int, int]]:
    """[start, stop) of every window's text tokens."""
    windows = []
    start = used = 0
    while start < count:
        room = seq_len if max_tokens is None else min(seq_len, max_tokens - used)
        stop = min(start + room - bos, count)
        if stop <= start:
            break
        windows.append((start, stop))
        used += stop - start + bos
        if stop == count:
            break
        start = start + stride if stride else stop
    return windows


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    ids: list[int],
    seq_len: int,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int | None = None,
) -> tuple[dict[int, float], int]:
    """Negative log-likelihood of each token that is scored, by its index, and the number of windows that score any:
    full logits, one window at a time, and of two windows the first that can score a token does."""
    losses: dict[int, float] = {}
    num_windows = 0
    for start, stop in reference_windows(len(ids), seq_len, stride, bos, max_tokens):
        window = [1] * bos + ids[start:stop]
        log_probabilities = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        before = len(losses)
        for position in range(1, len(window)):
            token = start + position - bos
            losses.setdefault(token, -float(log_probabilities[position - 1, window[position]]))
        num_windows += len(losses) > before
    return losses, num_windows


def reference_bytes(text: str, offsets: list[tuple[int, int]], scored: set[int]) -> int:
    """UTF-8 bytes of the characters that a scored token is the first to hold."""
    owner: dict[int, int] = {}
    for token, (start, stop) in enumerate(offsets):
        for character in range(start, stop):
            owner.setdefault(character, token)
    return sum(len(text[character].encode()) for character, token in owner.items() if token in scored)


def check(
    model: PreTrainedModel, tokenizer: Tokenizer, texts: list[str], found: dict[str, Any], **settings: Any
) -> dict[int, float]:
    """Compares a result with the reference, and gives the reference's losses."""
    text = "\n\n".join(texts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    losses, num_windows = reference(model, encoded["input_ids"], **settings)
    total = math.fsum(losses.values())
    num_bytes = reference_bytes(text, encoded["offset_mapping"], set(losses))
    assert (found["num_tokens"], found["num_windows"]) == (len(losses), num_windows)
    assert found["num_bytes"] == num_bytes
    assert found["perplexity"] == pytest.approx(math.exp(total / len(losses)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / max(1, num_bytes), rel=1e-5)
    return losses


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("perplexity", "bits_per_byte"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    rounded = ("perplexity", "bits_per_byte", "batch_size")
    assert {k: v for k, v in found.items() if k not in rounded} == {
        k: v for k, v in expected.items() if k not in rounded
    }


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    return len(tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"])


@pytest.fixture
def sharp_model(make_model: MakeModel) -> PreTrainedModel:
    """Far from uniform, so that a wrong context or a wrong target shows."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


@pytest.mark.parametrize(
    ("batch_size", "stride", "bos"), [(1, None, True), (3, 1, False), (100, 5, True), (3, 15, False)]
)
def test_equals_the_reference(
    bos: bool, stride: int | None, batch_size: int, sharp_model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    texts = TEXTS[:2]
    found = evaluate_perplexity(
        sharp_model, tokenizer, texts, seq_len=16, stride=stride, prepend_bos=bos, batch_size=batch_size
    )
    losses = check(sharp_model, tokenizer, texts, found, seq_len=16, stride=stride, bos=bos)
    assert (found["seq_len"], found["stride"], found["prepend_bos"]) == (16, stride, bos)
    if bos or stride:
        assert sorted(losses) == list(range(not bos, count_tokens(tokenizer, texts)))


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_equals_the_reference_for_every_architecture(name: str, make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model(name)
    found = evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16, stride=11, prepend_bos=True, batch_size=2)
    check(model, tokenizer, TEXTS[:1], found, seq_len=16, stride=11, bos=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32(
    dtype: torch.dtype, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model(dtype=dtype)
    found = evaluate_perplexity(model, tokenizer, TEXTS[:2], seq_len=16, batch_size=1)
    with fast_products(model):  # rounded where those are
        check(model, tokenizer, TEXTS[:2], found, seq_len=16)


@pytest.mark.parametrize("max_tokens", [2, 16, 17, 40, 10_000])
@pytest.mark.parametrize(("stride", "bos"), [(None, True), (6, False)])
def test_max_tokens_limits_the_positions_used(
    bos: bool, stride: int | None, max_tokens: int, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model()
    settings = {"seq_len": 16, "stride": stride, "max_tokens": max_tokens}
    found = evaluate_perplexity(model, tokenizer, TEXTS[:2], **settings, prepend_bos=bos)
    check(model, tokenizer, TEXTS[:2], found, **settings, bos=bos)
    if stride is None and max_tokens in (16, 32, 48):
        windows = max_tokens // 16
        assert (found["num_windows"], found["num_tokens"]) == (windows, windows * 15)


@pytest.mark.parametrize("rest", [0, 1, 2, 9])
@pytest.mark.parametrize("bos", [True, False])
def test_last_window_may_be_short(bos: bool, rest: int, sharp_model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode(ids[: 2 * (16 - bos) + rest])]
    count = count_tokens(tokenizer, texts)
    assert count == 2 * (16 - bos) + rest
    found = evaluate_perplexity(sharp_model, tokenizer, texts, seq_len=16, prepend_bos=bos)
    check(sharp_model, tokenizer, texts, found, seq_len=16, bos=bos)
    assert found["num_tokens"] == (count if bos else 30 + max(0, rest - 1))


@pytest.mark.parametrize(("stride", "bos"), [(1, True), (5, False), (11, True), (11, False)])
def test_every_token_is_scored_once_with_a_stride(
    bos: bool, stride: int, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    found = evaluate_perplexity(make_model(), tokenizer, TEXTS[:1], seq_len=12, stride=stride, prepend_bos=bos)
    assert found["num_tokens"] == count_tokens(tokenizer, TEXTS[:1]) - (not bos)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_beginning_token_is_the_tokenizers_own_choice(
    adds_bos: bool, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chosen = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    model = make_model()
    found = evaluate_perplexity(model, chosen, TEXTS[:2], seq_len=16)
    assert found["prepend_bos"] is adds_bos
    check(model, tokenizer, TEXTS[:2], found, seq_len=16, bos=adds_bos)


@pytest.mark.parametrize(
    ("bos", "seq_len", "stride", "texts"),
    [
        (True, 3, None, RARE_TEXTS),
        (False, 3, None, TEXTS[:2]),
        (True, 5, 2, TEXTS[:2]),
        (False, 5, 2, RARE_TEXTS),
        (False, 8, None, RARE_TEXTS),
        (True, CONTEXT, None, TEXTS),
    ],
)
def test_bytes_of_characters_split_over_tokens_count_once(
    bos: bool, seq_len: int, stride: int | None, texts: list[str], make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model()
    text = "\n\n".join(texts)
    assert count_tokens(tokenizer, RARE_TEXTS) > 1.5 * len("\n\n".join(RARE_TEXTS))
    found = evaluate_perplexity(
        model, tokenizer, texts, seq_len=seq_len, stride=stride, prepend_bos=bos, batch_size=64
    )
    check(model, tokenizer, texts, found, seq_len=seq_len, stride=stride, bos=bos)
    if bos:
        assert found["num_bytes"] == len(text.encode())


@pytest.mark.parametrize("texts", [TEXTS[:2], RARE_TEXTS])
@pytest.mark.parametrize(("bos", "seq_len", "stride"), [(True, 8, None), (False, 8, 3), (False, CONTEXT, None)])
def test_tokenizer_without_offsets_gives_the_same_to_a_character_a_gap(
    bos: bool, seq_len: int, stride: int | None, texts: list[str], make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model()
    settings = {"seq_len": seq_len, "stride": stride, "prepend_bos": bos}
    found = evaluate_perplexity(model, SlowTokenizer(tokenizer), texts, **settings)
    expected = evaluate_perplexity(model, tokenizer, texts, **settings)
    assert found["perplexity"] == pytest.approx(expected["perplexity"])
    gaps = 0 if bos else 1 if stride else found["num_windows"]
    assert abs(found["num_bytes"] - expected["num_bytes"]) <= 4 * gaps


def test_soft_cap_of_the_logits_is_honoured(tokenizer: Tokenizer) -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        final_logit_softcapping=5.0,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    capped = evaluate_perplexity(model, tokenizer, TEXTS[:2], seq_len=16)
    check(model, tokenizer, TEXTS[:2], capped, seq_len=16)
    model.config.final_logit_softcapping = None
    assert evaluate_perplexity(model, tokenizer, TEXTS[:2], seq_len=16)["perplexity"] > 2 * capped["perplexity"]


@pytest.mark.parametrize("positions", [1, 3, 7])
def test_logits_never_exceed_the_chunk(
    positions: int, sharp_model: PreTrainedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_perplexity(sharp_model, tokenizer, TEXTS, seq_len=16, batch_size=2)
    limit = positions * 2 * VOCABULARY * 4
    monkeypatch.setattr("optimum_ksparse.evaluation.running._LOGITS_BYTES", limit)
    sizes = []
    handle = sharp_model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.numel() * 4))
    found = evaluate_perplexity(sharp_model, tokenizer, TEXTS, seq_len=16, batch_size=2)
    handle.remove()
    assert max(sizes) == limit
    assert_same(found, expected)


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_a_part_of_the_positions_gives_the_same(
    name: str, make_model: MakeModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the head does not call the base, but the decoder inside it, as OPT's does."""
    model = make_model(name)
    expected = evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16)
    monkeypatch.setattr("optimum_ksparse.evaluation.running._LOGITS_BYTES", 1)
    assert_same(evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16), expected)


def test_hopeless_model_has_infinite_perplexity(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16)
    assert found["perplexity"] == math.inf
    assert math.isfinite(found["bits_per_byte"])


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_forward_are_restored(training: bool, make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model("gpt_neox", hidden_dropout=0.5).train(training)
    found = evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16)
    assert {module.training for module in model.modules()} == {training}
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    check(model.eval(), tokenizer, TEXTS[:1], found, seq_len=16)


@pytest.mark.parametrize("place", ["model.layers.1", "lm_head"])
def test_training_mode_and_forward_are_restored_on_an_error(
    place: str, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("on purpose")

    model = make_model().train()
    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate_perplexity(model, tokenizer, TEXTS[:1], seq_len=16)
    handle.remove()
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("wrong", [None, "gpt2"])
def test_what_is_no_tokenizer_is_named(wrong: object, make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match=f"tokenizer must be .*{type(wrong).__name__}"):
        evaluate_perplexity(make_model(), wrong, TEXTS, seq_len=16)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"texts": "한 줄의 글"},
            ValueError,
            r"texts='한 줄의 글' is not known; .* a list of texts \(\[text\] for one",
        ),
        ({"texts": "글" * 100}, ValueError, "texts='글{79}…' is not known"),
        ({"texts": "mc4-ko"}, ValueError, "texts='mc4-ko' is not known; allowed: \"kowiki\""),
        ({"texts": "nowhere.txt"}, FileNotFoundError, "texts='nowhere.txt': there is no such file"),
        ({"texts": Path("nowhere.jsonl")}, FileNotFoundError, "texts='nowhere.jsonl': there is no such file"),
        ({"texts": ["글", 5]}, TypeError, "texts is list, or holds something that is no text"),
        ({"texts": b"abc"}, TypeError, "texts is bytes"),
        ({"texts": None}, TypeError, "texts is NoneType"),
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": [""]}, ValueError, "texts hold 0 tokens, too few to score one"),
        ({"texts": ["a"], "prepend_bos": False}, ValueError, "texts hold 1 tokens, too few to score one"),
        ({"seq_len": CONTEXT + 1}, ValueError, "seq_len=65 is above the model's context of 64 positions"),
        ({"seq_len": 1}, ValueError, "seq_len=1 .* at least 2"),
        ({"stride": 0}, ValueError, "stride=0 is out of range, it must be from 1 to seq_len - 1 = 15"),
        ({"stride": 16}, ValueError, "stride=16 is out of range"),
        ({"stride": -3}, ValueError, "stride=-3 is out of range"),
        ({"batch_size": 0}, ValueError, "batch_size=0 .* at least 1"),
        ({"max_tokens": 1}, ValueError, "max_tokens=1 .* at least 2"),
    ],
)
def test_argument_out_of_range_is_named(
    arguments: dict, error: type[Exception], match: str, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    settings = {"texts": TEXTS, "seq_len": 16, **arguments}
    with pytest.raises(error, match=match):
        evaluate_perplexity(make_model(), tokenizer, settings.pop("texts"), **settings)


def test_prepend_bos_without_a_beginning_token_is_an_error(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="prepend_bos=True, and the tokenizer has no beginning token"):
        evaluate_perplexity(make_model(), bare, TEXTS, seq_len=16, prepend_bos=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_model_without_a_head_is_an_error(name: str, make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = AutoModel.from_config(make_model(name).config).eval()
    with pytest.raises(TypeError, match=f"{type(model).__name__} has no language model head"):
        evaluate_perplexity(model, tokenizer, TEXTS, seq_len=16)


def test_nan_is_an_error_and_not_infinite_perplexity(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate_perplexity(model, tokenizer, ["안녕하세요, 반갑습니다."], seq_len=16)


FILES: dict[str, Callable[[list[str]], str]] = {
    "t.txt": "\n\n".join,
    "spaced.txt": "\n \n\n".join,
    "t.jsonl": lambda texts: "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts),
    "strings.jsonl": lambda texts: "\n\n".join(json.dumps(text, ensure_ascii=False) for text in texts),
}


@pytest.mark.parametrize("form", [str, Path])
@pytest.mark.parametrize("name", FILES)
def test_file_gives_the_same_as_its_texts(
    name: str, form: Callable[[Path], Any], sharp_model: PreTrainedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(FILES[name](TEXTS), encoding="utf-8")
    found = evaluate_perplexity(sharp_model, tokenizer, form(path), seq_len=16)
    expected = evaluate_perplexity(sharp_model, tokenizer, TEXTS, seq_len=16)
    assert found.pop("texts") == describe_dataset(path)
    assert expected.pop("texts") == describe_dataset(TEXTS)
    assert found == expected


def test_description_says_which_texts_they_were(make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model()

    def describe(texts: Any) -> dict[str, Any]:
        return evaluate_perplexity(model, tokenizer, texts, seq_len=16, max_tokens=16)["texts"]

    assert describe(TEXTS) == describe(tuple(TEXTS))
    assert describe(TEXTS)["texts"] == len(TEXTS)
    # Texts that differ only where one ends and the next begins are others.
    hashes = [
        describe(texts)["sha256"] for texts in (["글 하나", "둘"], ["글", "하나둘"], ["글 하나둘"], ["둘", "글 하나"])
    ]
    assert len({*hashes}) == 4
    first, second = (tmp_path / name for name in ("a.txt", "b.txt"))
    for path in (first, second):
        path.write_text(TEXTS[0], encoding="utf-8")
    assert describe(first) == {"file": "a.txt", "sha256": describe(second)["sha256"]}
    second.write_text(TEXTS[1], encoding="utf-8")
    assert describe(first)["sha256"] != describe(second)["sha256"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'"a"\n{"messages": []}', "a.jsonl, row 2 is a conversation"),
        ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1 has neither a text"),
        ("a.jsonl", b'"a"\n{"text":', "a.jsonl, line 2 is not JSON"),
        ("a.txt", "글".encode("cp949"), "a.txt is not UTF-8"),
        ("a.txt", b"", "texts hold 0 tokens"),
        ("a.jsonl", b"", "texts hold 0 tokens"),
    ],
)
def test_damaged_file_is_named(
    name: str, content: bytes, match: str, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        evaluate_perplexity(make_model(), tokenizer, tmp_path / name, seq_len=16)
    assert str(tmp_path) not in str(error.value)


def article(number: int) -> dict[str, str]:
    return {
        "id": str(number),
        "url": f"https://ko.wikipedia.org/wiki/{number}",
        "title": "글",
        "text": f"{number}번 글",
    }


def held_out(texts: list[str]) -> list[bool]:
    return [int(text.removesuffix("번 글")) % HELD_OUT_EVERY == 0 for text in texts]


@pytest.fixture
def wikipedia(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Page ids of a Korean Wikipedia that is streamed from memory."""
    numbers = [7 * i % 20_011 for i in range(1, 20_001)]

    def load_dataset(*names: str, **settings: Any) -> datasets.IterableDataset:
        assert names == HUB_DATASETS["kowiki"]
        assert settings == {"split": "train", "streaming": True}
        return datasets.IterableDataset.from_generator(lambda: map(article, numbers))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return numbers


def test_kowiki_is_the_first_held_out_articles(
    wikipedia: list[int], make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    model = make_model()
    expected = [f"{number}번 글" for number in wikipedia if number % HELD_OUT_EVERY == 0][:NUM_ARTICLES]
    assert len(expected) == NUM_ARTICLES == 256
    found = evaluate_perplexity(model, tokenizer, "kowiki", seq_len=32)
    same = evaluate_perplexity(model, tokenizer, expected, seq_len=32)
    assert found.pop("texts") == {
        "name": "kowiki",
        "dataset": "wikimedia/wikipedia",
        "configuration": "20231101.ko",
        "slice": "first 256 articles whose id is divisible by 50",
        "sha256": same.pop("texts")["sha256"],
    }
    assert found == same


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_never_draws_a_held_out_article(wikipedia: list[int], seed: int, tokenizer: Tokenizer) -> None:
    drawn = list(documents("kowiki", seed, tokenizer))
    assert not any(held_out(drawn))
    assert len(drawn) == sum(number % HELD_OUT_EVERY != 0 for number in wikipedia)
    assert drawn != [f"{number}번 글" for number in wikipedia if number % HELD_OUT_EVERY]


@pytest.mark.parametrize("name", ["mc4-ko", "c4"])
def test_other_calibration_text_is_drawn_whole(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{number}번 글"} for number in range(100)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(lambda: iter(rows))
    )
    assert sorted(documents(name, 0, tokenizer)) == sorted(row["text"] for row in rows)


def test_kowiki_is_streamed_from_the_hub(
    hub: LoopbackHub, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_ksparse.data.texts.NUM_ARTICLES", 3)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # five seconds
    files = {"README.md": b"---\nconfigs:\n- config_name: 20231101.ko\n  data_files: 20231101.ko/*.parquet\n---\n"}
    for part in range(2):
        path = tmp_path / f"train-{part:05}-of-00002.parquet"
        datasets.Dataset.from_list([article(100 * part + i) for i in range(100)]).to_parquet(path)
        files[f"20231101.ko/{path.name}"] = path.read_bytes()
    hub.add_repo("wikimedia/wikipedia", files, repo_type="dataset")
    found = evaluate_perplexity(make_model(), tokenizer, "kowiki", seq_len=8)["texts"]
    assert found["sha256"] == describe_dataset([f"{number}번 글" for number in (0, 50, 100)])["sha256"]
    assert found["slice"].startswith("first 3 articles")
    assert not any(held_out(list(documents("kowiki", 0, tokenizer))))


def test_without_the_hub_the_error_says_what_works(
    hub: LoopbackHub, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(
        ConnectionError, match="'kowiki' .*; without a network, measure on a .txt or .jsonl file or on"
    ):
        evaluate_perplexity(make_model(), tokenizer, "kowiki", seq_len=8)
