"""`SparsityConfig`: validation, its JSON form, and how data and places are described."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pydoc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from optimum_ksparse import Pattern, SparsityConfig, SparsityReport
from optimum_ksparse.config import METHOD_SETTINGS, QUANT_METHOD, SETTINGS
from optimum_ksparse.pattern import default_pattern
from optimum_ksparse.quantization import GROUP_SIZES

NAMES = "'mc4-ko', 'c4', 'kowiki', 'self'"
IDS = [[5, 6, 7], [8, 9, 10]]


def recorded(config):
    """Settings as a checkpoint holds them."""
    return json.loads(json.dumps(config.to_dict()))


settings_drawn = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["wanda", "sparsegpt", "magnitude", "admm"]),
        "pattern": st.sampled_from(["2:4", "4:8", "1:16", "50%", "62.5%", "1/3", "0.29", 0.5, Pattern("2:4")]),
        "dataset": st.sampled_from(["mc4-ko", "c4", "kowiki", "self"])
        | st.lists(st.text(), min_size=1, max_size=3)
        | st.lists(st.lists(st.integers(0, 2**31), min_size=4, max_size=4), min_size=1, max_size=3),
        "values": st.none() | st.sampled_from(["int8", "int4"]),
        "tokenizer": st.none() | st.sampled_from(["EleutherAI/polyglot-ko-1.3b", "gpt2"]),
        "num_samples": st.integers(1, 10**6),
        "seq_len": st.integers(2, 10**6),
        "batch_size": st.integers(1, 10**3),
        "seed": st.integers(0, 2**63),
        "reconstruct": st.none() | st.just("block"),
        "refine": st.lists(st.sampled_from(["swaps", "exact"]), max_size=2),
        "true_sequential": st.booleans(),
        "modules_to_not_convert": st.none() | st.lists(st.sampled_from(["lm_head", "q_proj", "계층"])),
        "skip_unsupported": st.booleans(),
        "storage": st.sampled_from(["packed", "dense"]),
        "prepend_bos": st.none() | st.booleans(),
    },
)

method_settings_drawn = st.fixed_dictionaries(
    {},
    optional={
        "block_size": st.integers(1, 64).map(lambda groups: 16 * groups),
        "damping": st.floats(0, 1) | st.sampled_from([0, 1]),
        "iterations": st.integers(1, 100),
        "reconstruction_epochs": st.integers(1, 10),
        "reconstruction_lr": st.floats(0, 1),
        "bos_in_statistics": st.booleans(),
        "first_position_share": st.floats(0, 0.9),
    },
)


@given(settings_drawn, method_settings_drawn, st.booleans())
@hypothesis_settings(max_examples=30)
def test_json_round_trip_keeps_every_setting(drawn, own, has_layers):
    read = SparsityConfig(**drawn).read_settings
    own = {name: value for name, value in own.items() if name in read}
    config = SparsityConfig(**drawn, method_settings=own)
    config.layers = {"layers.0.q": {"pattern": "2:4", "num_values": 8}} if has_layers else None
    first = recorded(config)
    again = SparsityConfig.from_dict(first)
    assert again.to_dict() == first == config.to_dict()
    always = {*SETTINGS, "quant_method", "layers", "names"} - {"method_settings", "values", "group_size", "permute"}
    of_values = set() if config.values is None else {"values", "group_size", "format_version"}
    assert {*always, *of_values, *own} <= set(first)
    assert set(first) - {*always, *of_values} <= set(read)
    assert own.items() <= again.method_settings.items()
    for name in drawn.keys() - {"dataset", "pattern", "num_samples", "seq_len"}:
        assert getattr(again, name) == drawn[name]
    assert Pattern(again.pattern) == Pattern(drawn.get("pattern", default_pattern()[0]))


def test_defaults_are_stored_in_full():
    config = SparsityConfig()
    assert recorded(config)["quant_method"] == QUANT_METHOD == "optimum-ksparse"
    assert dict(config) == config.to_dict()
    assert json.loads(config.to_json_string(use_diff=False))["method"] == "admm"
    assert f'"pattern": "{config.pattern}"' in repr(config)


def test_the_text_of_settings_does_not_grow_with_the_model(make_pruned):
    config = make_pruned().config.quantization_config
    text = repr(config)
    assert f"{len(config.layers)} sparse layers" in text and "q_proj" not in text
    assert json.loads(text.removeprefix("SparsityConfig")).keys() == config.to_dict().keys()


@pytest.mark.parametrize(("has_gpu", "pattern"), [(True, "2:4"), (False, "50%")])
def test_the_default_pattern_is_the_one_for_this_machine(monkeypatch, has_gpu, pattern):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = SparsityConfig()
    assert config.pattern == pattern == default_pattern()[0]
    assert "pattern" not in config.given
    assert recorded(config)["pattern"] == pattern  # another machine reads what was pruned


REFUSED = {
    ValueError: [
        {"method": "wandb"},
        {"pattern": "4:2"},
        {"pattern": "100%"},
        *({"storage": "zip"}, {"refine": "exactly"}, {"reconstruct": "model"}, {"activations": "both"}),
        *({"allocation": "best"}, {"iterations": 0}, {"reconstruct": "block", "reconstruction_epochs": 0}),
        {"num_samples": 0},
        {"seq_len": 1},
        {"calibration_dtype": "int8"},
        *({"values": "int3"}, {"values": "int8", "group_size": 32}, {"values": "int8", "group_size": -64}),
        *(
            {"values": "int8", "group_size": 0},
            {"group_size": 64},
            {"storage": "compressed-tensors", "values": "int8"},
        ),
        {"batch_size": 0},
        {"seed": -1},
        {"method": "sparsegpt", "pattern": "3:5", "block_size": 128},
        {"method": "sparsegpt", "block_size": 0},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"dataset": "mc5-ko"},
        {"dataset": "texts.csv"},
        {"dataset": []},
        {"dataset": {"train": "x"}},
        {"dataset": [[1, 2], [3]]},
        {"dataset": [[1, 2], "text"]},
        {"dataset": [[]]},
        {"dataset": torch.ones(2, 3)},
        {"dataset": torch.ones(2, 3) > 0},
        {"dataset": torch.arange(3)},
        {"dataset": np.zeros((2, 3))},
        {"dataset": np.array(["text"])},
        {"dataset": torch.ones(3, 1, dtype=torch.int64)},
    ],
    TypeError: [
        {"method": 3},
        {"storage": None},
        {"num_samples": 8.0},
        *({"values": 8}, {"values": "int8", "group_size": "row"}, {"values": "int8", "group_size": True}),
        {"num_samples": True},
        {"seq_len": "2048"},
        {"batch_size": None},
        {"seed": 0.5},
        {"method": "sparsegpt", "block_size": "x"},
        {"damping": "0.01"},
        {"damping": False},
        {"true_sequential": 1},
        {"skip_unsupported": "no"},
        {"prepend_bos": 1},
        {"bos_in_statistics": 1},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": ["a", 1]},
        {"modules_to_not_convert": iter(["a"])},
        *({"refine": 3}, {"refine": ["exact", None]}),
        {"tokenizer": 5},
        {"dataset": ["text", 5]},
        {"dataset": [5, 6]},
        {"dataset": None},
        {"dataset": 5},
    ],
    FileNotFoundError: [{"dataset": "missing.txt"}, {"dataset": Path("missing.jsonl")}],
}


@pytest.mark.parametrize("error", REFUSED)
def test_refuses_and_names_the_argument(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings in REFUSED[error]:
        with pytest.raises(error, match=list(settings)[-1]):
            SparsityConfig.from_flat(**settings)


def test_an_unknown_value_is_told_what_is_allowed():
    for method in ("wandb", "WANDA"):
        with pytest.raises(ValueError, match=f"method='{method}'.*'wanda'.* allowed: magnitude, wanda, sparsegpt"):
            SparsityConfig(method)
    with pytest.raises(TypeError, match="'sparsity'.* mean 'pattern'.* allowed: method, pattern"):
        SparsityConfig(sparsity=0.5)
    with pytest.raises(ValueError, match=f"dataset='mc5' is not known; allowed: one of {NAMES}; a path to a .txt"):
        SparsityConfig(dataset="mc5")


@pytest.mark.parametrize(
    ("settings", "name", "reader"),
    [
        ({"method": "wanda"}, "damping", "sparsegpt"),
        ({"method": "admm"}, "block_size", "sparsegpt"),
        ({"method": "wanda"}, "reconstruction_lr", "reconstruct"),
        ({"method": "wanda"}, "target_density", "owl"),
        ({"method": "magnitude"}, "bos_in_statistics", "calibration data"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_and_its_reader_named(settings, name, reader):
    value = {"bos_in_statistics": True}.get(name, 0.5 if METHOD_SETTINGS[name].kind is float else 1)
    with pytest.raises(ValueError, match=f"{name}=.*{reader}.*reads"):
        SparsityConfig(**settings, method_settings={name: value})
    assert name not in SparsityConfig.from_dict({**settings, name: value}).method_settings, "earlier ones record all"
    with pytest.raises(TypeError, match=f"method_settings=.*{name}"):
        SparsityConfig(**settings, **{name: value})


def test_method_settings_have_names_of_their_own():
    assert not {*SETTINGS} & {*METHOD_SETTINGS}
    assert len(SETTINGS) - 1 <= 22  # one of them is to go
    with pytest.raises(ValueError, match="method_settings has no setting 'dampng': did you mean 'damping'"):
        SparsityConfig(method_settings={"dampng": 0.1})
    with pytest.raises(TypeError, match="method_settings"):
        SparsityConfig(method_settings=["damping"])
    assert SparsityConfig("wanda", method_settings={"damping": None}).method_settings == {}


def test_only_method_and_pattern_are_positional():
    with pytest.raises(TypeError, match="positional"):
        SparsityConfig(*("wanda", "2:4", "c4"))


def test_a_default_of_the_method_is_recorded():
    assert recorded(SparsityConfig("sparsegpt"))["damping"] == 0.01
    assert recorded(SparsityConfig("admm"))["damping"] == 0.1


def test_a_method_that_an_earlier_version_chose_is_read(tmp_path):
    config = SparsityConfig.from_dict({"quant_method": "optimum-ksparse", "method": "auto", "time_budget": 60.0})
    assert config.method == "admm" and "time_budget" not in config.to_dict()
    choice = {"method": "alps", "reconstruct": "block", "block": 1, "time_budget": 60.0, "trials": []}
    report = {"config": {"method": "auto", "pattern": "2:4", "time_budget": 60.0}, "choice": choice}
    (tmp_path / "report.json").write_text(json.dumps({**report, "schema_version": 1}), encoding="utf-8")
    assert SparsityReport.load(tmp_path / "report.json").method == "alps + block"


def test_block_size_matters_to_sparsegpt_with_groups_only():
    SparsityConfig("wanda", "3:5")
    SparsityConfig("sparsegpt", "50%", method_settings={"block_size": 5})
    SparsityConfig("sparsegpt", "3:5", method_settings={"block_size": 125})


def test_list_of_texts_is_described_by_number_and_hash():
    config = SparsityConfig(dataset=["하나", "둘"])
    assert config.dataset == ["하나", "둘"]
    assert recorded(config)["dataset"].keys() == {"texts", "sha256"}
    assert recorded(config)["dataset"]["texts"] == 2
    others = [["하나둘", ""], ["하나"], ["둘", "하나"], ["하나", "둘", ""]]
    hashes = {recorded(SparsityConfig(dataset=texts))["dataset"]["sha256"] for texts in [config.dataset, *others]}
    assert len(hashes) == 5
    assert recorded(SparsityConfig(dataset=("하나", "둘")))["dataset"] == recorded(config)["dataset"]
    assert recorded(SparsityConfig(dataset=["\ud800"]))["dataset"]["texts"] == 1


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        torch.tensor(IDS).T.contiguous().T,
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        IDS,
        tuple(tuple(row) for row in IDS),
    ],
)
def test_token_ids_set_their_size_and_are_described_by_shape_and_hash(ids):
    config = SparsityConfig(dataset=ids, num_samples=99, seq_len=99)
    assert (config.num_samples, config.seq_len) == (2, 3)
    assert config.dataset is ids
    expected = hashlib.sha256(np.array(IDS, dtype="<i8").tobytes()).hexdigest()
    assert recorded(config)["dataset"] == {"token_ids": [2, 3], "sha256": expected}


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_file_is_described_by_name_and_hash_without_its_folder(tmp_path, as_path, name):
    path = tmp_path / "private" / name
    path.parent.mkdir()
    path.write_text("하나\n\n둘", encoding="utf-8")
    described = recorded(SparsityConfig(dataset=as_path(path)))
    assert described["dataset"] == {"file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert "private" not in json.dumps(described)


def test_dataset_is_described_by_its_fingerprint():
    dataset = datasets.Dataset.from_dict({"text": ["하나", "둘"]})
    config = SparsityConfig(dataset=dataset)
    expected = {"dataset": "Dataset", "rows": 2, "fingerprint": dataset._fingerprint}
    assert recorded(config)["dataset"] == expected
    assert recorded(SparsityConfig.from_dict(recorded(config)))["dataset"] == expected


def test_streamed_dataset_is_taken():
    config = SparsityConfig(dataset=datasets.Dataset.from_dict({"text": ["하나"]}).to_iterable_dataset())
    assert recorded(config)["dataset"] == {"dataset": "IterableDataset", "rows": None, "fingerprint": None}
    SparsityConfig.from_dict(recorded(config))


def test_splits_are_refused():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["하나"]})})
    with pytest.raises(TypeError, match="dataset is a DatasetDict with the splits train: pass one of them"):
        SparsityConfig(dataset=splits)


@pytest.mark.parametrize("reloaded", [True, False])
def test_description_stays_when_the_file_is_gone(tmp_path, reloaded):
    path = tmp_path / "texts.txt"
    path.write_text("하나", encoding="utf-8")
    config = SparsityConfig(dataset=path)
    if reloaded:
        config = SparsityConfig.from_dict(config.to_dict())
    before = config.to_dict()
    path.unlink()
    assert config.to_dict() == before


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize("exists", [True, False])
def test_the_folder_of_a_tokenizer_is_not_recorded(tmp_path, as_path, exists):
    folder = tmp_path / "private" / "tokenizer"
    if exists:
        folder.mkdir(parents=True)
    config = SparsityConfig(tokenizer=as_path(folder))
    assert config.tokenizer == as_path(folder)
    assert recorded(config)["tokenizer"] == "tokenizer"
    assert "private" not in repr(config)
    assert recorded(SparsityConfig(tokenizer=f"{folder}/"))["tokenizer"] == "tokenizer"


def test_a_tokenizer_is_recorded_by_where_it_came_from(tokenizer, tmp_path):
    assert recorded(SparsityConfig(tokenizer="EleutherAI/polyglot-ko-1.3b"))["tokenizer"] == (
        "EleutherAI/polyglot-ko-1.3b"
    )
    assert recorded(SparsityConfig(tokenizer=tokenizer))["tokenizer"] is None
    loaded = SimpleNamespace(name_or_path=str(tmp_path))
    assert recorded(SparsityConfig(tokenizer=loaded))["tokenizer"] == tmp_path.name


@pytest.mark.parametrize(
    ("key", "hint"),
    [("batchsize", "did you mean 'batch_size'"), ("patern", "did you mean 'pattern'"), ("zzz", "allowed.*newer")],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(key, hint):
    with pytest.raises(ValueError, match=f"SparsityConfig has no setting '{key}': {hint}") as caught:
        SparsityConfig.from_dict({"method": "wanda", key: 4})
    assert ("newer" in str(caught.value)) == (key == "zzz"), "a slip is no newer version"


def test_settings_of_another_quantization_method_are_refused():
    with pytest.raises(ValueError, match="quant_method='gptq' is not 'optimum-ksparse'"):
        SparsityConfig.from_dict({"quant_method": "gptq", "bits": 4})


def test_from_dict_takes_known_keywords_and_returns_the_others():
    given_settings = {"method": "wanda", "seed": 1}
    config, unused = SparsityConfig.from_dict(given_settings, return_unused_kwargs=True, seed=2, device_map="auto")
    assert config.seed == 2
    assert unused == {"device_map": "auto"}
    assert given_settings == {"method": "wanda", "seed": 1}
    assert SparsityConfig.from_dict({"seed": 3}).seed == 3


def test_deepcopy_shares_the_data():
    ids = torch.tensor(IDS)
    config = SparsityConfig(dataset=ids)
    copied = copy.deepcopy(config)
    assert copied is not config
    assert copied.dataset is ids
    assert copied.to_dict() == config.to_dict()
    copied.batch_size = 7
    assert config.batch_size != 7


def test_arguments_are_copied_where_they_could_change_later():
    names, own = ["lm_head"], {"damping": 0.5}
    config = SparsityConfig(modules_to_not_convert=names, method_settings=own)
    names.append("q_proj")
    own["damping"] = 0.7
    assert config.modules_to_not_convert == ["lm_head"]
    assert config.method_settings == {"damping": 0.5}


def test_help_and_signature_show_the_settings():
    signature = inspect.signature(SparsityConfig)
    assert tuple(signature.parameters) == SETTINGS
    assert signature.parameters["method"].default == "admm"
    assert {parameter.kind.name for parameter in list(signature.parameters.values())[2:]} == {"KEYWORD_ONLY"}
    assert "seq_len: 'int' = 2048" in pydoc.render_doc(SparsityConfig, renderer=pydoc.plaintext)
    assert SparsityConfig("wanda", seed=1).given == {"method", "seed"}
    assert SparsityConfig.from_flat(damping=0.1).given == {"method_settings"}


def test_settings_that_are_refused_can_be_shown():
    """As debuggers and tracebacks do, which hold the object whose construction has failed."""
    with pytest.raises(ValueError, match="seq_len") as raised:
        SparsityConfig(seq_len=1)
    refused = [frame.frame.f_locals.get("self") for frame in raised.traceback]
    assert {repr(value) for value in refused if isinstance(value, SparsityConfig)} == {"SparsityConfig (seq_len)"}


def test_a_group_size_that_was_not_passed_is_recorded():
    assert SparsityConfig(values="int4").to_dict()["group_size"] == GROUP_SIZES["int4"]
    assert SparsityConfig(values="int8", group_size=192).quantisation == {"values": "int8", "group_size": 192}
    assert SparsityConfig().quantisation == {}
