"""Several processes prune one model together: real ones, started by torchrun, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.packing import unpack_mask
from optimum_ksparse.pruning.distributed import Processes, current, joined

from ..conftest import REPOSITORY
from .routed import make_routed, routed_ids
from .test_streaming import tensors

torch.set_num_threads(1)

_WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, logging
from optimum_ksparse import SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.pruning.distributed import joined
from tests.pruning.routed import make_routed, routed_ids
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
source, folder = sys.argv[1:]
folder, rank = Path(folder), int(os.environ["RANK"])
ids = torch.load(folder / "ids.pt")
def config(method="wanda", **settings):
    return SparsityConfig(method, "2:4", **{"dataset": ids, "batch_size": 2, **settings})
def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def unlucky(rank):
    model, calls = make_routed("experts"), []
    def fails(*arguments):
        calls.append(rank)
        if calls.count(1) > 2:
            raise ArithmeticError("on purpose")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(fails)
    return model
found = {}
prune_checkpoint(source, folder / "wanda", config(allocation="owl", method_settings={"target_density": 0.6}))
assert not dist.is_initialized()
prune_checkpoint(source, folder / "sparsegpt", config("sparsegpt"), activation_memory=0)
prune_checkpoint(source, folder / "in-step", config("sparsegpt", true_sequential=True))
prune_checkpoint(source, folder / "int4", config("sparsegpt", values="int4", group_size=64))
with joined() as processes:
    for kind in ("experts", "sorted"):
        model = make_routed(kind)
        sparsify(model, config("sparsegpt", true_sequential=True, dataset=routed_ids(), batch_size=1))
        torch.save(model.state_dict(), folder / f"{kind}-{rank}.pt")
    found["in step"] = message(lambda: sparsify(unlucky(rank), config(true_sequential=True)))
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=config(dataset=ids[:3]))
    torch.save(model.state_dict(), folder / f"memory-{rank}.pt")
    found["settings"] = message(lambda: sparsify(model.dequantize(), config(seed=rank)))
    found["samples"] = message(lambda: prune_checkpoint(source, folder / "few", config(dataset=ids[:1])))
    from optimum_ksparse.pruning import group
    original = group.prune_layer
    def fails(path, *rest):
        if path.endswith("up_proj") and rank == 1 or "v_proj" in path:
            raise ArithmeticError(f"{path}: singular")
        return original(path, *rest)
    group.prune_layer = fails
    found["layer"] = message(lambda: prune_checkpoint(source, folder / "error", config("sparsegpt")))
    group.prune_layer = original
(folder / f"found-{rank}.json").write_text(json.dumps(found))
# In the last run the second process is killed.
from optimum_ksparse.pruning.streaming import place
from optimum_ksparse.blocks import BlockReplay
place._SNAPSHOT_SECONDS = -1.0
if rank == 1:
    advance = BlockReplay.advance
    def dying(self, index, block):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self, index, block)
    BlockReplay.advance = dying
prune_checkpoint(source, folder / "killed", config())
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, source: Path, token_ids: torch.Tensor) -> Any:
    """The folder with everything that two processes did, what each says of its errors, and how they ended: the second
    was killed in the last run."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.save(token_ids, folder / "ids.pt")
    (folder / "worker.py").write_text(_WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*launch, "worker.py", str(source), str(folder)], capture_output=True, text=True, env=environment, cwd=folder
    )
    files = [folder / f"found-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return folder, [json.loads(file.read_text()) for file in files], done


def alone(source: Path, folder: Path, name: str, method: str = "wanda", **settings: Any) -> Path:
    ids = torch.load(folder / "ids.pt")
    config = SparsityConfig.from_flat(method, "2:4", **{"dataset": ids, "batch_size": 2, **settings})
    prune_checkpoint(source, folder / name, config)
    return folder / name


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Of two sparse models: nearly the same masks."""
    assert expected.keys() == found.keys()
    same = total = 0
    for name, bits in expected.items():
        if name.endswith("mask"):
            equal = unpack_mask(bits, 8 * bits.shape[1]) == unpack_mask(found[name], 8 * bits.shape[1])
            same, total = same + int(equal.sum()), total + equal.numel()
    assert same / total >= 0.999


@pytest.mark.processes
def test_two_processes_give_nearly_the_masks_of_one(scene: Any, source: Path) -> None:
    folder, *_ = scene
    for name, true_sequential in {"sparsegpt": False, "in-step": True}.items():
        expected = alone(source, folder, f"{name}-alone", "sparsegpt", true_sequential=true_sequential)
        assert_close(tensors(folder / name), tensors(expected))


@pytest.mark.processes
def test_two_processes_quantise_nearly_as_one(scene: Any, source: Path) -> None:
    folder, *_ = scene
    expected = alone(source, folder, "int4-alone", "sparsegpt", values="int4", group_size=64)
    assert_close(tensors(folder / "int4"), tensors(expected))
    scales = {name: tensor for name, tensor in tensors(expected).items() if name.endswith("scale")}
    for name, tensor in scales.items():
        torch.testing.assert_close(tensors(folder / "int4")[name], tensor, rtol=0.05, atol=1e-5)
    assert len(scales) == 21


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["experts", "sorted"])
def test_a_layer_that_one_process_never_calls(kind: str, scene: Any) -> None:
    """The tokens of the second process reach one expert alone, or both in another order."""
    folder, *_ = scene
    states = [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    model = make_routed(kind)
    sparsify(model, SparsityConfig("sparsegpt", "2:4", dataset=routed_ids(), true_sequential=True))
    assert_close(states[0], model.state_dict())


@pytest.mark.processes
def test_two_processes_choose_one_allocation(scene: Any, source: Path) -> None:
    folder, *_ = scene
    expected = alone(source, folder, "owl-alone", allocation="owl", method_settings={"target_density": 0.6})
    assert_close(tensors(folder / "wanda"), tensors(expected))
    reports = [SparsityReport.load(path / "sparsity_report.json") for path in (expected, folder / "wanda")]
    assert reports[0].skipped == reports[1].skipped and reports[0].num_left_dense
    # Energies are of other rows of the calibration data.
    pairs = zip(*([row.sensitivity for row in report.layers] for report in reports), strict=True)
    assert all(a == pytest.approx(b, rel=0.2) for a, b in pairs)


@pytest.mark.processes
def test_a_model_in_memory_ends_the_same_in_all_processes(scene: Any, source: Path) -> None:
    """Of samples that do not divide evenly."""
    folder, *_ = scene
    states = [torch.load(folder / f"memory-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    model = AutoModelForCausalLM.from_pretrained(source)
    sparsify(model, SparsityConfig("wanda", "2:4", dataset=torch.load(folder / "ids.pt")[:3], batch_size=2))
    assert_close(states[0], model.state_dict())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("settings", "ValueError: the processes were started with different settings: seed is 0 in rank 0 and 1 in"),
        ("samples", "ValueError: 2 processes share num_samples=1 calibration samples"),
        ("layer", "ArithmeticError: layers.0."),
        ("in step", "ArithmeticError: on purpose"),
    ],
)
def test_an_error_is_told_to_all(what: str, message: str, scene: Any) -> None:
    _, found, _ = scene
    assert found[0][what] == found[1][what]
    assert found[0][what].startswith(message)


@pytest.mark.processes
def test_when_one_dies_all_stop_and_another_number_of_processes_goes_on(scene: Any, source: Path) -> None:
    folder, _, done = scene
    assert done.returncode != 0
    assert "Signal 9" in done.stderr or "SIGKILL" in done.stderr
    journal = json.loads((folder / "killed" / ".ksparse-pruning" / "journal.json").read_text())
    assert len(journal["blocks"]) == 1
    assert not (folder / "killed" / "config.json").exists()
    assert_close(tensors(alone(source, folder, "killed")), tensors(alone(source, folder, "killed-alone")))


# ---- parts, in one process


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 5, 7, 128])
def test_shares_are_even_and_complete(number: int, size: int) -> None:
    shares = [Processes(rank, size).share(number) for rank in range(size)]
    assert [i for share in shares for i in range(number)[share]] == list(range(number))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_work_is_shared_out_by_its_cost() -> None:
    assert Processes(0, 2).owners([1, 1, 1, 3]) == [1, 1, 1, 0]
    assert Processes(0, 1).owners([1, 2]) == [0, 0]


def test_one_process_needs_no_group() -> None:
    with joined() as processes:
        assert (processes.rank, processes.size) == (0, 1)
        assert processes.gather("x") == ["x"]
        assert processes.once(lambda: 3) == 3
        processes.agree({"a": 1})
    assert current().size == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Tensors must be contiguous"), RuntimeError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), ConnectionError),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), ConnectionError),
    ],
)
def test_a_process_that_is_gone_is_told_from_other_errors(error: RuntimeError, kind: type, monkeypatch: Any) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(torch.distributed, "all_gather_object", fail)
    with pytest.raises(kind) as raised:
        Processes(0, 2).gather(1)
    assert raised.type is kind
