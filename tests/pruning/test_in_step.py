"""Pruning in one pass gives, bit for bit, what a pass for each group of layers gives, whatever a block does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.blocks.in_step import InStep
from optimum_ksparse.pruners.statistics import GramMatrix
from optimum_ksparse.pruning import block as pruning_block

from ..conftest import EVERY_ARCHITECTURE, thinned
from .routed import make_routed, routed_ids
from .test_streaming import contents

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def threads_of_libraries(make_pruned: MakeModel) -> None:
    """Some begin with the first run, and stay."""
    make_pruned()


@pytest.fixture(autouse=True)
def no_thread_is_left(threads_of_libraries: None) -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each block that was to be pruned in one pass, whether it was."""
    original, done = pruning_block._prune_in_step, []

    def noting(*arguments: Any) -> Any:
        done.append(False)
        rows = original(*arguments)
        done[-1] = True
        return rows

    monkeypatch.setattr(pruning_block, "_prune_in_step", noting)
    return done


def pruned(
    model: PreTrainedModel, ids: torch.Tensor, **settings: Any
) -> tuple[dict[str, torch.Tensor], SparsityReport]:
    settings = {"method": "sparsegpt", "true_sequential": True, **settings}
    report = sparsify(model, SparsityConfig.from_flat(dataset=ids, **settings), restore_on_error=True)
    return model.state_dict(), report


def assert_as_in_several_passes(make: Callable[[], PreTrainedModel], ids: torch.Tensor, **settings: Any) -> None:
    found, report = pruned(make(), ids, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning_block, "_has_room", lambda *rest: False)
        expected, expected_report = pruned(make(), ids, **settings)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    errors = [{row.name: row.relative_output_error for row in r.layers} for r in (report, expected_report)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_one_pass_is_a_pass_for_each_group(
    name: str, make_model: MakeModel, token_ids: torch.Tensor, in_step: list[bool]
) -> None:
    assert_as_in_several_passes(lambda: make_model(name), token_ids)
    assert in_step
    assert all(in_step)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda"},
        {"reconstruct": "block", "reconstruction_epochs": 1},
        *thinned(
            [
                {"method": "admm", "iterations": 4},
                {"bos_in_statistics": False, "prepend_bos": True, "batch_size": 4},
                {"calibration_dtype": "bfloat16"},
                {"activations": "dense"},
                {"refine": ["swaps", "exact"]},
            ]
        ),
    ],
)
def test_other_settings(settings: Any, make_model: MakeModel, token_ids: torch.Tensor, in_step: list[bool]) -> None:
    assert_as_in_several_passes(make_model, token_ids, **settings)
    assert all(in_step)


def test_each_batch_runs_once(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    model, calls = make_model(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    pruned(model, token_ids, batch_size=2)
    first, last = model.model.layers
    # One more tells how the layers of such blocks follow each other; beside it one sample runs to look at the model.
    assert calls.count(last.mlp) <= 3 + 1
    assert calls.count(first.mlp) <= 3 + 2


@pytest.mark.parametrize(("kind", "expected"), [("experts", [True, True]), ("sorted", [False]), ("twice", [False])])
def test_blocks_whose_layers_are_called_otherwise(kind: str, expected: list[bool], in_step: list[bool]) -> None:
    assert_as_in_several_passes(lambda: make_routed(kind), routed_ids())
    assert in_step == expected


def test_more_batches_than_may_wait_side_by_side_are_put_together(make_model: MakeModel, in_step: list[bool]) -> None:
    ids = torch.randint(3, 99, (20, 8), generator=torch.Generator().manual_seed(0))
    pruned(make_model(), ids)
    assert in_step == [True, True]


_ERRORS = [RuntimeError("on purpose"), KeyboardInterrupt(), torch.OutOfMemoryError("full")]


@pytest.mark.parametrize("error", thinned(_ERRORS, _ERRORS[1:2]))
@pytest.mark.parametrize("place", ["statistics", "forward", "pruning"])
def test_an_error_ends_all_and_restores_the_model(
    place: str, error: BaseException, make_model: MakeModel, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def failing(*arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if len(calls) > 8:
            raise error

    handle = None
    if place == "forward":
        handle = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(failing)
        calls += range(4)
    elif place == "statistics":
        original = GramMatrix.update
        monkeypatch.setattr(GramMatrix, "update", lambda *args: (failing(), original(*args)))
    else:
        prune = pruning_block.prune_group
        monkeypatch.setattr(pruning_block, "prune_group", lambda *args: (failing(), prune(*args))[1])
        calls += range(4)
    with pytest.raises(type(error)) as raised:
        pruned(model, token_ids)
    assert raised.value is error
    if handle is not None:
        handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.slow
def test_a_run_that_breaks_off_goes_on(
    tmp_path: Path, source: Path, config: Any, always_snapshot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(true_sequential=True)
    prune_checkpoint(source, tmp_path / "whole", asked)
    original, calls = InStep.finish, []

    def failing(self: InStep) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        return original(self)

    monkeypatch.setattr(InStep, "finish", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        prune_checkpoint(source, tmp_path / "again", asked)
    prune_checkpoint(source, tmp_path / "again", asked)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
