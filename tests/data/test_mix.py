"""A mix of calibration data: how its samples are shared out, drawn, described and refused."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse import SparsityConfig, prune_checkpoint, sparsify
from optimum_ksparse.commands import parse_words
from optimum_ksparse.commands.parser import dataset as dataset_flag
from optimum_ksparse.commands.recipes import read_recipe
from optimum_ksparse.data.dataset import describe_dataset, holds, is_mix, mix_shares, needs_tokenizer, split_samples
from optimum_ksparse.hub.card import render_card
from optimum_ksparse.hub.metadata import build_metadata
from optimum_ksparse.pruning.plan import draw_tokens
from optimum_ksparse.report import SparsityReport

from ..hub.subjects import make_report, make_subject

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two files of the same name in two folders, of one letter each."""
    paths = []
    for letter in "ab":
        folder = tmp_path / letter
        folder.mkdir()
        (folder / "texts.txt").write_text("\n\n".join([f"{letter} " * 40] * 5), encoding="utf-8")
        paths.append(str(folder / "texts.txt"))
    return paths[0], paths[1]


def draw(make_model: MakeModel, tokenizer: Any, dataset: Any, **given: Any) -> Any:
    config = SparsityConfig.from_flat(dataset=dataset, **{"num_samples": 8, "seq_len": 12, **given})
    return draw_tokens(make_model(), config, tokenizer)


weights_drawn = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


@given(weights_drawn, st.integers(1, 10**6))
def test_split_is_exact_and_each_share_within_one_of_its_quota(weights: list[float], num_samples: int) -> None:
    shares = split_samples(num_samples, weights)
    assert sum(shares) == num_samples
    total = sum(map(Fraction, weights))
    assert all(abs(n - num_samples * Fraction(w) / total) < 1 for n, w in zip(shares, weights, strict=True))


@given(weights_drawn)
def test_a_larger_weight_never_gets_fewer_samples(weights: list[float]) -> None:
    shares = split_samples(97, weights)
    pairs = sorted(zip(weights, shares, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs) if a[0] < b[0])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4))
@settings(max_examples=50)
def test_the_number_of_samples_that_an_error_names_is_enough(parts: list[int]) -> None:
    names = ("mc4-ko", "c4", "kowiki", "self")[: len(parts)]
    mix = {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}
    try:
        mix_shares(mix, 2)
    except ValueError as error:
        enough = int(str(error).split("use num_samples=")[1].split(",")[0])
        assert min(share for _, share in mix_shares(mix, enough)) >= 1


def test_split_of_equal_weights_gives_the_rest_to_the_first() -> None:
    assert split_samples(8, [1 / 3, 1 / 3, 1 / 3]) == [3, 3, 2]
    assert split_samples(128, [0.5, 0.25, 0.25]) == [64, 32, 32]


def test_samples_of_two_files_are_mixed(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str]
) -> None:
    a, b = files
    drawn = draw(make_model, tokenizer, {a: 0.75, b: 0.25}, num_samples=16)
    ids = drawn.ids
    assert ids.shape == (16, 12) and not drawn.begins_with_bos
    letters = [tokenizer.decode(row).strip()[0] for row in ids.tolist()]
    assert letters.count("a") == 12 and letters.count("b") == 4
    assert letters not in (sorted(letters), sorted(letters, reverse=True)), "the samples of one file lie together"
    assert sorted(part["num_samples"] for part in drawn.description["parts"]) == [4, 12]
    assert drawn.description["form"] == "mix" and drawn.description["dataset"] == describe_dataset({a: 0.75, b: 0.25})
    again = draw(make_model, tokenizer, {b: 0.25, a: 0.75}, num_samples=16)  # no mapping's order counts
    assert torch.equal(again.ids, ids)
    other = draw(make_model, tokenizer, {a: 0.75, b: 0.25}, num_samples=16, seed=1)
    assert not torch.equal(other.ids, ids)


def test_a_mix_of_one_file_is_that_file_shuffled(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str]
) -> None:
    alone = draw(make_model, tokenizer, files[0]).ids.tolist()
    mixed = draw(make_model, tokenizer, {files[0]: 1.0}).ids.tolist()
    assert sorted(alone) == sorted(mixed)


def test_a_mix_with_text_that_the_model_writes(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str]
) -> None:
    mix = {files[0]: 0.5, "self": 0.5}
    drawn = draw(make_model, tokenizer, mix, prepend_bos=True)
    assert drawn.begins_with_bos and bool((drawn.ids[:, 0] == 1).all())
    assert sorted(part["form"] for part in drawn.description["parts"]) == ["crops", "generated"]
    drawn = draw(make_model, tokenizer, mix)
    assert not drawn.begins_with_bos and int((drawn.ids[:, 0] == 1).sum()) == 4
    assert sorted(part["begins_with_bos"] for part in drawn.description["parts"]) == [False, True]
    with pytest.raises(ValueError, match="bos_in_statistics=False leaves out .* pass prepend_bos=True"):
        draw(make_model, tokenizer, mix, bos_in_statistics=False)
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        draw(make_model, None, mix)
    assert draw(make_model, None, {"self": 1}).ids.shape == (8, 12)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ({"c4": 0.5, "self": 0.4}, ValueError, "must sum to one, they sum to 0.9: use 'c4': 0.5556, 'self': 0.4444"),
        ({"c4": 2, "self": 2}, ValueError, "must sum to one, they sum to 4: use 'c4': 0.5, 'self': 0.5"),
        ({"c4": 1.5, "self": -0.5}, ValueError, "the weight of 'self' is -0.5: it must be positive, or leave it out"),
        ({"c4": 1.0, "self": 0}, ValueError, "the weight of 'self' is 0: it must be positive"),
        ({"c4": float("nan"), "self": 0.5}, ValueError, "the weight of 'c4' is nan: it must be positive"),
        ({"c4": 0.5, "self": "0.5"}, TypeError, "the weight of 'self' must be a number, found '0.5'"),
        ({"c4": 0.5, "self": True}, TypeError, "the weight of 'self' must be a number, found True"),
        ({"mc5": 0.5, "self": 0.5}, ValueError, "dataset='mc5' is not known; allowed: one of"),
        ({"gone.txt": 0.5, "self": 0.5}, FileNotFoundError, "dataset='gone.txt': there is no such file"),
        ({("a", "b"): 0.5, "self": 0.5}, TypeError, "keys of a mix"),
        ({"c4": 0.999, "self": 0.001}, ValueError, "weight 0.001 of 'self' gives no sample .* num_samples=1000, a"),
        ({}, ValueError, "dataset is a dict without the checksum"),
        ({"mix": []}, ValueError, "must sum to one, they sum to 0"),
        ({"mix": "c4"}, ValueError, "'c4' is no part of a mix as a checkpoint records it"),
        ({"mix": [{"dataset": "a.txt", "weight": 1}]}, ValueError, "is no part of a mix as a checkpoint records it"),
        ({"mix": [{"dataset": "c4"}]}, ValueError, "is no part of a mix as a checkpoint records it"),
        ({"mix": [{"dataset": "c4", "weight": 0.5}]}, ValueError, "must sum to one, they sum to 0.5"),
    ],
)
def test_bad_mixes(dataset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsityConfig(dataset=dataset)


def test_weights_may_be_off_by_rounding() -> None:
    SparsityConfig(dataset={"c4": 1 / 3, "kowiki": 1 / 3, "mc4-ko": 0.33333333})


def test_description_is_stable_and_keeps_files_of_one_name_apart(files: tuple[str, str]) -> None:
    a, b = files
    mix = {b: 0.5, a: 0.25, "self": 0.25}
    described = describe_dataset(mix)
    assert describe_dataset(described) == described == json.loads(json.dumps(described))
    names = [part["dataset"] for part in described["mix"]]
    hashes = {part["sha256"] for part in names if isinstance(part, dict)}
    assert len(hashes) == 2 and {part["file"] for part in names if isinstance(part, dict)} == {"texts.txt"}
    assert str(Path(a).parent) not in json.dumps(described)
    recorded = SparsityConfig(dataset=mix).to_dict()
    again = SparsityConfig.from_dict(json.loads(json.dumps(recorded)))
    assert again.to_dict() == recorded and is_mix(again.dataset)


def test_fingerprints_and_mixes_are_kept_apart(files: tuple[str, str], token_ids: torch.Tensor) -> None:
    for data in (files[0], ["text"], token_ids):
        fingerprint = describe_dataset(data)
        assert not is_mix(fingerprint) and describe_dataset(fingerprint) == fingerprint
        SparsityConfig(dataset=fingerprint)
    assert is_mix({"self": 1.0}) and not is_mix({"train": "x"}) and not is_mix("self")


def test_a_recorded_mix_prunes_again_only_where_it_holds_no_file(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str]
) -> None:
    record = describe_dataset({files[0]: 0.5, "self": 0.5})
    with pytest.raises(ValueError, match="record of an earlier mix.* only the checksum: pass the mix again"):
        draw(make_model, tokenizer, record)
    names = describe_dataset({"self": 1.0})
    assert torch.equal(draw(make_model, None, names).ids, draw(make_model, None, {"self": 1.0}).ids)


def test_through_config_and_report_of_a_checkpoint(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str], tmp_path: Path
) -> None:
    mix = {files[0]: 0.5, files[1]: 0.25, "self": 0.25}
    model = make_model()
    report = sparsify(model, SparsityConfig(dataset=mix, num_samples=4, seq_len=12), tokenizer)
    assert sorted(part["num_samples"] for part in report.calibration["parts"]) == [1, 1, 2]
    model.save_pretrained(tmp_path / "sparse")
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", sparsity_config=SparsityConfig(dataset=mix, num_samples=4, seq_len=12)
    )
    assert reloaded.config.quantization_config.dataset == describe_dataset(mix)
    with pytest.raises(ValueError, match="sparse already, with other settings .*dataset: passed"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "sparse", sparsity_config=SparsityConfig(dataset={files[0]: 0.5, "self": 0.5})
        )


def test_streaming_takes_a_mix_of_files_and_refuses_self_in_one(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    how = {"num_samples": 4, "seq_len": 12}
    with pytest.raises(ValueError, match='dataset="self" needs the whole model'):
        prune_checkpoint(
            tmp_path / "dense", tmp_path / "out", SparsityConfig.from_flat(dataset={files[0]: 0.5, "self": 0.5}, **how)
        )
    mix = {files[0]: 0.5, files[1]: 0.5}
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", SparsityConfig.from_flat(dataset=mix, **how))
    assert report.calibration["dataset"] == describe_dataset(mix)
    assert len(report.calibration["parts"]) == 2


def test_what_a_mix_holds(files: tuple[str, str]) -> None:
    assert holds({"self": 0.5, "c4": 0.5}, "self") and not holds({"c4": 1.0}, "self") and holds("self", "self")
    assert needs_tokenizer({"self": 0.5, "c4": 0.5}) and not needs_tokenizer({"self": 1.0})
    assert not needs_tokenizer("self") and needs_tokenizer("c4") and not needs_tokenizer([[1, 2]])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mc4-ko", "mc4-ko"),
        ("a=b.txt", "a=b.txt"),
        ("mc4-ko=0.5,self=0.5", {"mc4-ko": 0.5, "self": 0.5}),
        ("a,b.txt", "a,b.txt"),
        ("a=1.txt=0.25, c4=75e-2", {"a=1.txt": 0.25, "c4": 0.75}),
    ],
)
def test_the_flag(text: str, found: Any) -> None:
    assert dataset_flag(text) == found


def test_flags_and_recipes_become_settings(tmp_path: Path) -> None:
    flags = ("--dataset", "mc4-ko=0.5,self=0.5", "--allocation", "owl", "--target-density", "0.6")
    args = parse_words(["prune", "model", "output", *flags]).args
    config = SparsityConfig(
        dataset=args.dataset, allocation=args.allocation, method_settings={"target_density": args.target_density}
    )
    assert config.dataset == {"mc4-ko": 0.5, "self": 0.5} and config.method_settings == {"target_density": 0.6}
    (tmp_path / "recipe.yaml").write_text("dataset: {mc4-ko: 0.5, self: 0.5}\nallocation: owl\ntarget_density: 0.6\n")
    recipe = read_recipe(str(tmp_path / "recipe.yaml"), ["dataset", "allocation", "target_density"])
    assert SparsityConfig.from_flat(**recipe).to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["mc4-ko=0.5,self", "c4=0.5,c4=0.5", "c4=1.2.3"])
def test_a_wrong_flag(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a name, a file, or a mix"):
        dataset_flag(text)


@pytest.mark.parametrize(
    ("mix", "repositories", "language"),
    [
        ({"mc4-ko": 0.5, "self": 0.5}, ["allenai/c4"], "ko"),
        ({"mc4-ko": 0.5, "kowiki": 0.5}, ["wikimedia/wikipedia", "allenai/c4"], "ko"),
        ({"mc4-ko": 0.5, "c4": 0.5}, ["allenai/c4"], None),
        ({"self": 1.0}, None, None),
    ],
)
def test_metadata_of_the_card(mix: dict[str, float], repositories: Any, language: Any) -> None:
    config = SparsityConfig(dataset=mix)
    parts = [{"dataset": part, "num_samples": share} for part, share in mix_shares(mix, 128)]
    report = SparsityReport(config.to_dict(), {"dataset": config.to_dict()["dataset"], "parts": parts})
    found = build_metadata(make_subject(report, None, inherited={})).to_dict()
    assert found.get("datasets") == repositories and found.get("language") == language


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_card_lists_the_parts(language: str) -> None:
    mix = {"mix": [{"dataset": {"file": "my text.txt", "sha256": "5ba256"}, "weight": 0.5}]}
    parts = [
        {
            "dataset": {"file": "my text.txt", "sha256": "5ba256"},
            "num_samples": 1000,
            "form": "crops",
            "begins_with_bos": False,
        },
        {"dataset": "self", "num_samples": 24, "form": "generated", "begins_with_bos": True},
    ]
    report = make_report(dataset=mix, form="mix", parts=parts, begins_with_bos=False)
    title = {"en": "## Calibration", "ko": "## 보정 데이터"}[language]
    text = render_card(make_subject(report), language).split(title)[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == 3
    for fact in ("my text.txt", "5ba256", "1,000", "`self`", "24", "generated"):
        assert fact in lines[0], fact
    assert "1,024" in lines[1] and ("model wrote" in lines[2] or "모델이 직접 쓴" in lines[2])
