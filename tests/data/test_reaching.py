"""Data on a Hub that cannot be reached, and a push to one: told at once, and what was downloaded before is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_ksparse import SparsityConfig, evaluate_kobest, evaluate_perplexity, sparsify
from optimum_ksparse.study.finetuning.instructions import instruction_rows
from optimum_ksparse.study.finetuning.korquad.data import read_korquad

from ..loopback_hub import LoopbackHub

datasets = pytest.importorskip("datasets")

DEAD = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def dead(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the network away."""

    def take_away() -> None:
        monkeypatch.setattr(constants, "ENDPOINT", DEAD)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", DEAD + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", DEAD)

    return take_away


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "calibration": lambda model, tokenizer: sparsify(model, SparsityConfig(num_samples=2, seq_len=16), tokenizer),
    "perplexity": lambda model, tokenizer: evaluate_perplexity(model, tokenizer, "kowiki", seq_len=16),
    "kobest": lambda model, tokenizer: evaluate_kobest(model, tokenizer, tasks=("boolq",), limit=1),
    "korquad": lambda model, tokenizer: read_korquad("org/squad", "train"),
    "koalpaca": lambda model, tokenizer: instruction_rows("org/alpaca"),
}


@pytest.mark.parametrize("name", READERS)
def test_data_on_a_hub_that_cannot_be_reached(
    name: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    naps: list[float],
    dead: Callable[[], None],
) -> None:
    if name == "kobest":
        pytest.importorskip("lm_eval")
    dead()
    with pytest.raises(ConnectionError, match=r"the Hub cannot be reached \(.*not downloaded before"):
        READERS[name](make_model("llama", num_hidden_layers=1), tokenizer)
    assert naps == [] and not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_what_was_downloaded_before_is_read(hub: LoopbackHub, naps: list[float], dead: Callable[[], None]) -> None:
    rows = [{"instruction": "1 + 1?", "output": "2"}]
    content = "\n".join(map(json.dumps, rows)).encode()
    hub.add_repo("org/rows", {"train.jsonl": content}, repo_type="dataset")
    before = instruction_rows("org/rows")
    dead()
    assert instruction_rows("org/rows") == before == ("org/rows", rows)
    assert naps == []


def test_a_hub_that_stumbles_is_asked_again(hub: LoopbackHub, naps: list[float]) -> None:
    content = json.dumps({"instruction": "1 + 1?", "output": "2"}).encode()
    hub.add_repo("org/stumbling", {"train.jsonl": content}, repo_type="dataset")
    hub.fail("/resolve/", [503] * 3)
    assert instruction_rows("org/stumbling")[1] == [{"instruction": "1 + 1?", "output": "2"}]


def test_a_push_to_a_hub_that_cannot_be_reached_says_so_at_once(
    make_pruned: Callable[..., PreTrainedModel], naps: list[float], dead: Callable[[], None], tmp_path: Path
) -> None:
    model = make_pruned()
    dead()
    with pytest.raises(ConnectionError, match="broke off .* push again"):
        model.push_to_hub("user/name", tokenizer=False)
    assert naps == []


def test_pruning_does_not_wait_for_the_card_of_the_base(
    make_model: Callable[..., PreTrainedModel], naps: list[float], dead: Callable[[], None]
) -> None:
    model = make_model("llama", num_hidden_layers=1)
    model.name_or_path = "org/tiny-base"
    dead()
    assert sparsify(model, SparsityConfig("magnitude", dataset=None)).base_card == {}
    assert naps == []
