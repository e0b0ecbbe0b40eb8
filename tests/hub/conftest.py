"""Models to publish, dense and sparse, and what is counted meanwhile."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ksparse import SparsityConfig
from optimum_ksparse.checkpoint import facts_of, fingerprint
from optimum_ksparse.hub.subject import Subject

from .pushes import Tokenizer, make_dense, prune


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("push") / "tiny-base"
    make_dense().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(base: Path, tokenizer: Tokenizer, token_ids: torch.Tensor) -> Path:
    """A folder with the same model, pruned, and the tokenizer."""
    return prune(base, SparsityConfig(pattern="2:4", dataset=token_ids), base.parent / "tiny-sparse", tokenizer)


@pytest.fixture(scope="session")
def simple(base: Path, tokenizer: Tokenizer) -> Path:
    """A folder with a sparse model whose card has no figures, which take time."""
    return prune(base, SparsityConfig("magnitude", "2:4"), base.parent / "tiny-simple", tokenizer)


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def quick(simple: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(simple)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the weights, and what is known of a model, are read."""
    counts: Counter[str] = Counter()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        return wrapper

    for name, module in list(sys.modules.items()):
        for function in (fingerprint, facts_of):
            if name.startswith("optimum_ksparse") and vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, counted(function))
    monkeypatch.setattr(Subject, "read", counted(Subject.read))
    return counts


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"
