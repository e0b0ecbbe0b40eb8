"""Packed checkpoints spread over two processes, forked once for all tests: by the tensor parallelism of transformers,
by its FSDP, by torch's and by accelerate's. `Spread` is what one way made of a checkpoint."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.distributed import DistributedConfig

from optimum_ksparse import SparseLinear, SparsityConfig, sparsify

from ..conftest import VOCABULARY

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes cannot use a GPU"),
]
RANKS = 2
WIDE = "llama 2:4 int4 256"  # layers of several groups
TENSOR_PARALLEL = ("llama 2:4", "llama 1:8", "qwen3 4:8", "gpt_neox 2:4", "llama 2:4 int8", WIDE)
FSDP = ("llama 2:4", "llama 50%", "llama 2:4 int8")
REFUSED = {  # and which layer is named
    "llama 50%": "self_attn.q_proj",
    "llama 50%/4x4": "self_attn.q_proj",
    "narrow 2:4": "model.layers.0.mlp.down_proj",
    "mixtral 2:4": "model.layers.0.mlp.experts",
    "llama 2:4 int8 192": "model.layers.0.mlp.down_proj",
    "llama 1:16 int4": "model.layers.0.self_attn.o_proj",
}


class Spread(NamedTuple):
    """What a model gives: logits, and its parameters after a step of SGD, whole."""

    logits: torch.Tensor
    parameters: dict[str, torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_mixtral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def step(model: Any, ids: torch.Tensor) -> Spread:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, foreach=False
    )  # of FSDP's shards, before a pass joins them
    before = logits(model, ids)
    model(ids).logits.square().mean().backward()
    optimizer.step()
    return Spread(before, {name: whole(tensor.detach()) for name, tensor in model.named_parameters()})


def load(folder: Path, case: str, **settings: Any) -> Any:
    options = {"distributed_config": DistributedConfig(**settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(folder / case, **options)


def with_torch(folder: Path, case: str, ids: torch.Tensor) -> Spread:
    model = load(folder, case)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return step(model, ids)


def with_accelerate(folder: Path, case: str, ids: torch.Tensor) -> Spread:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    # An `Accelerator` of CPUs takes DDP in the place of FSDP.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=dist.get_rank() == 0
    )
    return step(fsdp2_prepare_model(accelerator, load(folder, case)), ids)


def message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run(rank: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    ids = torch.load(folder / "ids.pt")
    results: dict[str, Any] = {}
    for case in TENSOR_PARALLEL:
        model = load(folder, case, tp_plan="auto")
        layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
        results[f"held {case}"] = [layer.weight.to_local().nbytes / layer.weight.nbytes for layer in layers]
        results[f"text {case}"] = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
        model.save_pretrained(folder / f"{case} saved")
        results[f"dense {case}"] = message(model.dequantize)
        parts = {"save_directory": folder / f"{case} parts", "distributed_checkpoint": True}
        results[f"parts {case}"] = message(lambda model=model, parts=parts: model.save_pretrained(**parts))
        results[f"tensor parallel {case}"] = step(model, ids)
    for case in FSDP:
        results[f"torch {case}"] = with_torch(folder, case, ids)
        model = load(folder, case, fsdp_size=RANKS)
        model.save_pretrained(folder / f"{case} saved by FSDP")
        results[f"transformers {case}"] = step(model, ids)
    results["accelerate llama 2:4"] = with_accelerate(folder, "llama 2:4", ids)
    results["dense storage"] = logits(load(folder, "stored dense", tp_plan="auto"), ids)
    for case in REFUSED:
        results[f"refused {case}"] = message(lambda case=case: load(folder, case, tp_plan="auto"))
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    results["from one process"] = message(lambda: load(folder, "llama 2:4"))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, make_model: Any, token_ids: torch.Tensor) -> Any:
    """The folder of the checkpoints, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.save(token_ids, folder / "ids.pt")
    cases = {*TENSOR_PARALLEL, *FSDP, *REFUSED} - {"narrow 2:4", "mixtral 2:4"}
    widths = {case: [int(width) for width in case.split()[3:]] for case in cases}
    models = {
        case: make_model(case.split()[0], **({"intermediate_size": widths[case][0]} if widths[case] else {}))
        for case in sorted(cases)
    }
    models["narrow 2:4"] = make_model("llama", intermediate_size=40)
    models["mixtral 2:4"] = make_mixtral()
    for case, model in models.items():
        _, pattern, *values = case.split()
        quantisation = {"values": values[0], "group_size": 64} if values else {}
        sparsify(model, SparsityConfig("magnitude", pattern, dataset=token_ids, **quantisation))
        model.save_pretrained(folder / case)
    models["llama 2:4"].config.quantization_config.storage = "dense"
    models["llama 2:4"].save_pretrained(folder / "stored dense")
    torch.multiprocessing.start_processes(run, (folder,), nprocs=RANKS, start_method="fork")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_step_of_one_process(scene: Any, way: str, case: str, token_ids: torch.Tensor) -> None:
    folder, results = scene
    expected = step(load(folder, case), token_ids)
    for found in (result[f"{way} {case}"] for result in results):
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
        for name, parameter in expected.parameters.items():
            assert torch.allclose(found.parameters[name], parameter, atol=1e-6), name


@pytest.mark.parametrize("case", TENSOR_PARALLEL)
def test_tensor_parallelism_computes_and_trains_as_one_process(scene, token_ids, case):
    folder, results = scene
    assert_step_of_one_process(scene, "tensor parallel", case, token_ids)
    text = load(folder, case).generate(token_ids[:1], max_new_tokens=8, do_sample=False)
    for result in results:
        assert torch.equal(result[f"text {case}"], text)
        assert set(result[f"held {case}"]) == {1 / RANKS}


@pytest.mark.parametrize("way", ["torch", "transformers"])
@pytest.mark.parametrize("case", FSDP)
def test_fsdp_computes_and_trains_as_one_process(scene, token_ids, way, case):
    assert_step_of_one_process(scene, way, case, token_ids)


def test_fsdp_of_accelerate_computes_and_trains_as_one_process(scene, token_ids):
    assert_step_of_one_process(scene, "accelerate", "llama 2:4", token_ids)


@pytest.mark.parametrize("case", [*(f"{c} saved" for c in TENSOR_PARALLEL), *(f"{c} saved by FSDP" for c in FSDP)])
def test_a_spread_model_is_saved_whole(scene, case):
    folder, _ = scene
    saved, original = folder / case, folder / case.partition(" saved")[0]
    found, expected = [load_file(path / "model.safetensors") for path in (saved, original)]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("config.json", "sparsity_report.json"):
        assert json.loads((saved / name).read_text()) == json.loads((original / name).read_text())


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_before_weights_are_read(scene, case):
    for result in scene[1]:
        assert result[f"refused {case}"].startswith("ValueError")
        assert REFUSED[case] in result[f"refused {case}"]


def test_dense_storage_stays_dense_under_tensor_parallelism(scene, token_ids):
    folder, results = scene
    for result in results:
        assert torch.allclose(result["dense storage"], logits(load(folder, "llama 2:4"), token_ids), atol=1e-6)


def test_accelerate_cannot_hand_out_a_packed_model_from_one_process(scene):
    for result in scene[1]:
        assert "fsdp_cpu_ram_efficient_loading" in result["from one process"]


def test_a_spread_model_is_neither_made_dense_nor_saved_in_parts(scene):
    folder, results = scene
    assert not (folder / f"{TENSOR_PARALLEL[0]} parts").exists()
    for result in results:
        assert "distributed_checkpoint" in result[f"parts {TENSOR_PARALLEL[0]}"]
        assert "load it in one process" in result[f"dense {TENSOR_PARALLEL[0]}"]
