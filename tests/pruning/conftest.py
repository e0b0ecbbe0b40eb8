"""A checkpoint that the tests of pruning from disk to disk share, and what pruning it gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from optimum_ksparse import SparsityConfig, prune_checkpoint
from optimum_ksparse.pruning.streaming import Workspace, place

from ..conftest import make_config
from .test_streaming import contents, fails


@pytest.fixture(scope="session")
def config(token_ids: torch.Tensor) -> Callable[..., SparsityConfig]:
    def make(method: str = "sparsegpt", pattern: str = "2:4", **settings: Any) -> SparsityConfig:
        return SparsityConfig.from_flat(method, pattern, **{"dataset": token_ids, "batch_size": 2, **settings})

    return make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A Llama of three blocks in several shards, with its tokenizer. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("shared") / "source"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", num_hidden_layers=3))
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy of `source` to write into."""
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture(scope="session")
def finished(source: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with `config()` that nothing cuts off makes of `source`. Nobody writes into it."""
    output = tmp_path_factory.mktemp("whole") / "disk"
    prune_checkpoint(source, output, config())
    return output


@pytest.fixture(scope="session")
def whole(finished: Path) -> dict[str, bytes | dict]:
    """What `finished` holds."""
    return contents(finished)


@pytest.fixture(scope="session")
def cut_off(source: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was cut off after two of three blocks. Nobody writes into it."""
    output = tmp_path_factory.mktemp("cut") / "disk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "_SNAPSHOT_SECONDS", -1.0)
        patch.setattr(Workspace, "add_block", fails(Workspace.add_block, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, output, config())
    return output


@pytest.fixture
def unfinished(cut_off: Path, tmp_path: Path, always_snapshot: None) -> Path:
    """A copy of `cut_off` to go on with."""
    return shutil.copytree(cut_off, tmp_path / "disk")


@pytest.fixture
def always_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_SNAPSHOT_SECONDS", -1.0)
