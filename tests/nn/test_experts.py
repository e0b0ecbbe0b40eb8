"""Experts stacked in one parameter: pruned matrix by matrix, packed, run, saved and loaded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from optimum_ksparse import (
    RuntimeConfig,
    SparsityConfig,
    SparsityReport,
    configure,
    prune_checkpoint,
    prune_weight,
    sparsify,
)
from optimum_ksparse.blocks.experts import ExpertStack, observable, observed_matrices
from optimum_ksparse.checkpoint import fingerprint, sparse_experts, sparsify_dense
from optimum_ksparse.nn import SparseExperts, SparseLinear, densified
from optimum_ksparse.pattern import Pattern
from optimum_ksparse.pruners import METHODS
from optimum_ksparse.pruners.statistics import SAMPLE_ROWS, ColumnNorms, GramMatrix
from optimum_ksparse.pruning.layer import prune_layer

from ..conftest import CONTEXT, VOCABULARY

torch.set_num_threads(1)

IDS = torch.randint(3, VOCABULARY, (16, 48), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
KINDS = {
    "mixtral": {},
    "qwen3_moe": {"head_dim": 8},
    "olmoe": {"pad_token_id": 0},
    # Shared experts beside the stack, and a first block without one.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    # Its checkpoints have the stacks under other names.
    "granitemoe": {"pad_token_id": 0},
    # Its experts know nothing of `experts_implementation`, and the parameter is called weight.
    "jetmoe": {"kv_channels": 8},
    # Stored transposed, one with biases, one multiplied all at once.
    "gpt_oss": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "pad_token_id": 0},
}
TRANSPOSED = ("gpt_oss", "llama4_text")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SETTINGS = [
    ("mixtral", "wanda", "2:4"),
    ("qwen3_moe", "wanda", "50%"),
    ("olmoe", "sparsegpt", "4:8"),
    ("mixtral", "sparsegpt", "50%"),
    ("mixtral", "magnitude", "2:4"),
]


def make(kind: str = "mixtral", dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS.get(kind, {}), **overrides})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def prune(model: PreTrainedModel, method: str = "wanda", pattern: str = "2:4", **settings: object) -> SparsityReport:
    defaults = {"dataset": IDS, "batch_size": len(IDS), **({"block_size": 16} if method == "sparsegpt" else {})}
    return sparsify(model, SparsityConfig.from_flat(method=method, pattern=pattern, **{**defaults, **settings}))


def logits(model: nn.Module, ids: torch.Tensor = IDS[:4]) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def stacks_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(stack.shape) for name, stack in sparse_experts(model).items()}


def random_stack(experts: int = 3, out: int = 8, width: int = 24, pattern: str = "2:4") -> tuple[torch.Tensor, ...]:
    weight = torch.randn(experts, out, width, generator=torch.Generator().manual_seed(1))
    mask = Pattern(pattern).mask(weight.abs())
    return weight, mask, SparseExperts.from_dense(nn.Parameter(weight), mask, Pattern(pattern))


def routed_inputs(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """What each expert of the first block multiplies, worked out from the inputs of its experts module."""
    experts, found = model.model.layers[0].mlp.experts, {}

    def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen = args[0], args[1]
        rows = [hidden[torch.where((chosen == expert).T)[1]] for expert in range(4)]
        found["gate_up_proj"] = rows
        halves = [(x @ w.T).chunk(2, dim=-1) for x, w in zip(rows, module.gate_up_proj, strict=True)]
        found["down_proj"] = [module.act_fn(gate) * up for gate, up in halves]

    with experts.register_forward_pre_hook(record):
        logits(model, IDS)
    return found


@pytest.mark.parametrize(("kind", "method", "pattern"), SETTINGS)
def test_each_expert_is_pruned_with_the_tokens_routed_to_it(kind: str, method: str, pattern: str) -> None:
    model = make(kind)
    dense = {name: p.detach().clone() for name, p in model.model.layers[0].mlp.experts.named_parameters()}
    inputs = routed_inputs(model)
    settings = {"block_size": 16} if method == "sparsegpt" else {}
    report = prune(model, method, pattern)
    rows = {row.name: row for row in report.layers}
    for name, weight in dense.items():
        stack = model.get_submodule(f"model.layers.0.mlp.experts.{name}")
        difference = size = 0.0
        for expert, found in enumerate(stack.to_dense_weight()):
            x = inputs[name][expert]
            assert len(x) >= GramMatrix.min_tokens
            expected, _ = prune_weight(weight[expert], x, method=method, pattern=pattern, **settings)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(found != 0, expected != 0)
            stride = -(-768 // SAMPLE_ROWS)  # one sample row stands for so many of the 768 tokens
            sample = x[stride // 2 :: stride]
            difference += float((sample @ (expected - weight[expert]).T).square().sum())
            size += float((sample @ weight[expert].T).square().sum())
        row = rows[f"layers.0.mlp.experts.{name}"]
        assert row.shape == (4 * weight.shape[1], weight.shape[2])
        assert row.num_values == weight.numel() // 2
        assert row.note == ""
        error = None if method == "magnitude" else pytest.approx((difference / size) ** 0.5, rel=1e-3)
        assert row.relative_output_error == error


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_are_pruned_saved_and_loaded_in_both_storages(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    stacks = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    shapes = {name: tuple((p.mT if kind in TRANSPOSED else p).shape) for name, p in stacks.items()}
    assert shapes
    before = logits(model)
    report = prune(model, modules_to_not_convert=["feed_forward.router"] if kind == "llama4_text" else None)
    assert stacks_of(model) == shapes
    assert all("rout" in name or "gate" in name for name in report.skipped)
    found = logits(model)
    assert not torch.allclose(found, before)
    for storage in ("packed", "dense"):
        model.config.quantization_config.storage = storage
        model.save_pretrained(tmp_path / storage)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / storage)
        assert stacks_of(loaded) == shapes
        assert torch.equal(logits(loaded), found)
        assert fingerprint(loaded) == fingerprint(model)
        assert loaded.sparsity_report.layers == report.layers
    packed = load_file(tmp_path / "packed/model.safetensors")
    for name, (experts, out, width) in shapes.items():
        assert packed[f"{name}.weight"].shape == (experts, out, width // 2)
        assert packed[f"{name}.weight_mask"].shape == (experts, out, width // 8)


@pytest.mark.processes
@pytest.mark.usefixtures("without_the_package")
def test_dense_storage_is_the_ordinary_format_and_loads_without_the_plugin(tmp_path: Path) -> None:
    kinds = ["mixtral", "granitemoe"]
    expected = {}
    for kind in kinds:
        folder = tmp_path / kind
        make(kind).save_pretrained(folder / "plain")
        model = AutoModelForCausalLM.from_pretrained(folder / "plain")
        prune(model, "sparsegpt", "50%", storage="dense")
        model.save_pretrained(folder / "dense")
        ordinary = load_file(folder / "plain/model.safetensors").keys()
        assert load_file(folder / "dense/model.safetensors").keys() == ordinary
        expected[kind] = logits(model)
        # What was packed in between is written in the ordinary format all the same.
        model.config.quantization_config.storage = "packed"
        model.save_pretrained(folder / "packed")
        AutoModelForCausalLM.from_pretrained(folder / "packed").dequantize().save_pretrained(folder / "again")
        assert load_file(folder / "again/model.safetensors").keys() == ordinary
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "for kind in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(f'{kind}/dense')\n"
        "    torch.save(model(torch.load('ids.pt')).logits, f'{kind}/logits.pt')\n"
        "assert 'optimum_ksparse' not in sys.modules\n"
    )
    torch.save(IDS[:4], tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", script, *kinds], cwd=tmp_path, check=True, capture_output=True)
    for kind, of_sparse in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / kind / "logits.pt"), of_sparse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["jetmoe"])
def test_dequantize_gives_back_the_parameters_and_the_logits(kind: str) -> None:
    model = make(kind)
    names, implementation = {name for name, _ in model.named_parameters()}, model.config._experts_implementation
    prune(model, "sparsegpt", "50%")
    found = logits(model)
    model.dequantize()
    assert {name for name, _ in model.named_parameters()} == names
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)
    assert model.dequantize is not None and not sparse_experts(model)


def test_sixteen_bit_stacks_take_nine_sixteenths(tmp_path: Path) -> None:
    make(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")  # rotary embeddings in float32
    report = prune(model, "magnitude")
    for stack in sparse_experts(model).values():
        assert stack.packed_bytes == 0.5625 * stack.dense_bytes
        assert stack.density == 0.5
    assert report.packed_ratio == 0.5625
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_weights_train_and_zeros_stay() -> None:
    sparse = make()
    prune(sparse, "wanda", "4:8")
    dense = copy.deepcopy(sparse).dequantize()
    for model in (sparse, dense):
        model(IDS[:4], labels=IDS[:4]).loss.backward()
    for name, stack in sparse_experts(sparse).items():
        full = dense.get_parameter(name).grad
        mask = stack.to_dense_weight() != 0
        torch.testing.assert_close(stack.weight.grad, full[mask].view_as(stack.weight), rtol=1e-4, atol=1e-6)
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()
    for stack in sparse_experts(sparse).values():
        assert int(stack.to_dense_weight().count_nonzero()) <= stack.weight.numel()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "62.5%"])
def test_a_matrix_computes_as_its_dense_weight(pattern: str) -> None:
    weight, mask, stack = random_stack(pattern=pattern)
    x, bias = torch.randn(2, 5, 24), torch.randn(8)
    for expert in (0, torch.tensor(2), -1):
        expected = (weight * mask)[expert]
        matrix = stack[expert]
        torch.testing.assert_close(F.linear(x, matrix, bias), F.linear(x, expected, bias))
        torch.testing.assert_close(F.linear(input=x, weight=matrix), F.linear(x, expected))
        torch.testing.assert_close(x @ matrix.T, x @ expected.T)
        torch.testing.assert_close(matrix @ x[0].T, expected @ x[0].T)
        torch.testing.assert_close(torch.mul(matrix, 2), 2 * expected)
        assert (matrix.shape, matrix.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(stack.to_dense_weight(), weight * mask)
    torch.matmul(x, stack[1].T).sum().backward()
    assert stack.weight.grad[1].abs().sum() > 0 and stack.weight.grad[0].abs().sum() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, stack[0], bias).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        stack[3]


def test_a_stack_copies_pickles_and_counts() -> None:
    _, _, stack = random_stack()
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(twin.to_dense_weight(), stack.to_dense_weight())
    assert len(list(stack)) == len(stack) == 3
    assert "num_experts=3, in_features=24, out_features=8, pattern=2:4" in repr(stack)


def test_matrices_that_keep_other_numbers_of_weights_cannot_be_stacked() -> None:
    weight = torch.ones(2, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="equally many weights, found 12 to 16"):
        SparseExperts.from_dense(weight, mask, Pattern("50%"))
    with pytest.raises(ValueError, match="num_values is 33, which 2 matrices cannot share"):
        SparseExperts((2, 4, 4), pattern=Pattern("50%"), num_values=33)
    with pytest.raises(ValueError, match="num_values must be given"):
        SparseExperts((2, 4, 4), pattern=Pattern("50%"))


def test_a_densified_stack_gives_its_dense_matrices() -> None:
    _, _, stack = random_stack()
    with torch.no_grad(), densified(nn.ModuleList([stack])):
        assert torch.equal(stack[1], stack.to_dense_weight()[1])
    assert not isinstance(stack[0], torch.Tensor)


def test_a_runtime_config_reaches_the_stacks() -> None:
    model = make()
    prune(model, "magnitude")
    configure(model, RuntimeConfig(kernel="reference"))
    assert {stack.kernel for stack in sparse_experts(model).values()} == {"reference"}


def test_calibration_and_sparse_models_take_experts_one_by_one(tmp_path: Path, caplog) -> None:
    model = make()
    assert model.config._experts_implementation == "grouped_mm"
    prune(model)
    assert model.config._experts_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert loaded.config._experts_implementation == "eager"
    assert torch.equal(logits(loaded), logits(model))
    for implementation, error in {"grouped_mm": AttributeError, "batched_mm": TypeError}.items():
        loaded.set_experts_implementation(implementation)
        with pytest.raises(error, match=r'set_experts_implementation\("eager"\)'):
            logits(loaded)


@pytest.mark.parametrize("model_of", [make, lambda: make("gpt_oss", layer_types=["full_attention"] * 2, head_dim=8)])
def test_models_whose_experts_stay_dense_keep_their_implementation(model_of: Callable[[], PreTrainedModel]) -> None:
    model = model_of()
    report = prune(model, skip_unsupported=True, modules_to_not_convert=STACKS, dataset=IDS[:4])
    assert any("experts" in name for name in report.skipped)
    assert model.config._experts_implementation == "grouped_mm"


def test_an_error_gives_the_parameters_and_the_implementation_back(monkeypatch) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("optimum_ksparse.blocks.BlockReplay.advance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparsify(model, SparsityConfig("wanda", "2:4", dataset=IDS), restore_on_error=True)
    assert model.config._experts_implementation == "grouped_mm"
    after = dict(model.state_dict())
    assert after.keys() == before.keys()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def few_statistics(kind: type[ColumnNorms]) -> tuple[list[ColumnNorms | None], list[torch.Tensor]]:
    """Of four experts, the second with too few tokens and the third with none."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 32)
    rows = [torch.randn(count, 32, generator=generator) * scales.roll(i) for i, count in enumerate((200, 9, 0, 150))]
    found: list[ColumnNorms | None] = []
    for x in rows:
        found.append(kind(32) if len(x) else None)
        if found[-1] is not None:
            found[-1].update(x)
    return found, rows


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "50%"), ("sparsegpt", "2:4")])
def test_an_expert_with_few_tokens_takes_the_shared_statistics(method: str, pattern: str) -> None:
    experts = make().model.layers[0].mlp.experts
    statistics, rows = few_statistics(METHODS[method].statistics)
    own = {"block_size": 16} if method == "sparsegpt" else {}
    config = SparsityConfig(method=method, pattern=pattern, dataset=IDS, method_settings=own)
    stack, row = prune_layer("mlp.experts", ExpertStack(experts, "gate_up_proj"), statistics, config)
    least = METHODS[method].statistics.min_tokens
    assert row.note == (
        f"experts 1, 2: fewer than {least} calibration tokens each, pruned with the statistics of all experts' tokens"
    )
    settings = {"block_size": 16} if method == "sparsegpt" else {}
    for expert, found in enumerate(stack.to_dense_weight()):
        inputs = torch.cat(rows) if expert in (1, 2) else rows[expert]
        weight = experts.gate_up_proj[expert].detach()
        expected, _ = prune_weight(weight, inputs, method=method, pattern=pattern, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_expert_that_no_token_reaches_is_named_in_the_report() -> None:
    model = make(num_experts_per_tok=1)
    gate = model.model.layers[0].mlp.gate.weight
    gate.data[3] = gate.data[:3].mean(0)  # never the largest
    notes = {row.name: row.note for row in prune(model).layers if row.note}
    assert set(notes) == {f"layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert all(note.startswith("experts 3: fewer than 32 calibration tokens") for note in notes.values())


def test_warnings_of_a_method_name_the_experts() -> None:
    statistics: list[ColumnNorms | None] = []
    for expert in range(4):
        statistics.append(GramMatrix(32))
        rows = torch.ones(200, 32) if expert == 2 else torch.randn(200, 32)
        statistics[expert].update(rows)
    config = SparsityConfig(
        method="sparsegpt", pattern="2:4", dataset=IDS, method_settings={"damping": 0.0, "block_size": 16}
    )
    _, row = prune_layer("e", ExpertStack(make().model.layers[0].mlp.experts, "gate_up_proj"), statistics, config)
    assert row.note.startswith("experts 2: singular Gram matrix: damping raised")


def test_a_stack_that_no_token_reaches_is_refused_by_name() -> None:
    model = make()
    model.model.layers[0].mlp.unused = MixtralExperts(model.config)
    for parameter in model.model.layers[0].mlp.unused.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.unused\.gate_up_proj: no calibration token reached it"):
        prune(model)
    assert not sparse_experts(model)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    statistics = [ColumnNorms(32) for _ in range(4)]
    for expert, own in enumerate(statistics):
        own.update(torch.full((40, 32), float("inf") if expert == 1 else 1.0))
    stack = ExpertStack(make().model.layers[0].mlp.experts, "gate_up_proj")
    with pytest.raises(ValueError, match=r"^mlp\.experts\[1\]: its inputs hold NaN or Inf"):
        prune_layer("mlp.experts", stack, statistics, SparsityConfig(method="wanda", pattern="2:4", dataset=IDS))


def test_true_sequential_sees_the_pruned_inputs_of_the_second_stack() -> None:
    one_by_one, together = make(), make()
    order = [row.name for row in prune(one_by_one, true_sequential=True).layers if ".0.mlp" in row.name]
    assert order == [f"layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    prune(together)
    first, second = (sparse_experts(model.model.layers[0]) for model in (one_by_one, together))
    assert not torch.equal(first["mlp.experts.down_proj"].weight_mask, second["mlp.experts.down_proj"].weight_mask)
    assert fingerprint(one_by_one) != fingerprint(together)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "admm", "values": "int8"},
        {"method": "wanda", "reconstruct": "block", "reconstruction_epochs": 1},
        {"method": "wanda", "pattern": "50%", "allocation": "owl"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_stacks_pruned_in_memory_and_from_disk_to_disk(kind: str, settings: dict, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path / "dense")
    routers = ["feed_forward.router"] if kind == "llama4_text" else None
    asked = {"dataset": IDS, "modules_to_not_convert": routers, **settings}
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "disk", SparsityConfig.from_flat(**asked))
    assert not any("experts" in name for name in report.skipped)
    model = make(kind)
    sparsify(model, SparsityConfig.from_flat(**asked))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_modules_to_not_convert_leaves_a_stack_dense(tmp_path: Path) -> None:
    model = make()
    report = prune(model, modules_to_not_convert=["mlp.experts.down_proj"])
    assert report.skipped == {f"layers.{i}.mlp.experts.down_proj": "in modules_to_not_convert" for i in range(2)}
    assert set(stacks_of(model)) == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert torch.equal(logits(loaded), logits(model))


class Halves(nn.Module):
    """Reads a part of each matrix by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(x, self.up[expert]) + F.linear(x, self.up[expert][:8])


def test_which_experts_are_read_matrix_by_matrix() -> None:
    """By the marks of transformers, and for the few classes that have none by their names."""
    config = MixtralConfig(**COMMON)
    with torch.device("meta"):
        mixtral, jetmoe, aria = MixtralExperts(config), JetMoeParallelExperts(2, 4, 8), AriaExperts(AriaTextConfig())
        llama4, longcat = object.__new__(Llama4TextExperts), object.__new__(LongcatFlashExperts)
    readable = [(mixtral, "gate_up_proj"), (mixtral, "down_proj"), (jetmoe, "weight"), (longcat, "gate_up_proj")]
    transposed = [(aria, "gate_up_proj"), (llama4, "down_proj")]
    others = [(mixtral, "up_proj"), (Halves(), "up")]
    assert all(ExpertStack(*stack).reads_matrices() for stack in readable + transposed)
    assert [ExpertStack(*stack).is_transposed for stack in readable + transposed] == [False] * 4 + [True] * 2
    assert not any(ExpertStack(*stack).reads_matrices() for stack in others)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": torch.float64}, r"gate_up_proj cannot be pruned: .*torch\.float64"),
        ({"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}, r"36 input features, which m=8"),
    ],
)
def test_what_no_stack_can_be_is_refused(change: dict, match: str) -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    with pytest.raises(ValueError, match=match):
        prune(make(**change), "magnitude", "4:8", modules_to_not_convert=names)


def test_a_stack_of_two_blocks_is_refused_by_both_names() -> None:
    model = make()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    match = r"layers\.0\.mlp\.experts\.gate_up_proj .*shares its weight with layers\.1\.mlp\.experts\.gate_up_proj"
    with pytest.raises(ValueError, match=match):
        prune(model)


def test_a_stack_that_is_not_finite_is_refused() -> None:
    model = make()
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj cannot be pruned: .*NaN or Inf"):
        prune(model)


def test_only_whole_matrices_of_the_stack_are_observed() -> None:
    halves, seen = Halves(), []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen.append((name, args[0].shape[0]))

    with torch.no_grad(), observed_matrices(observable({"up": ExpertStack(halves, "up")}), hook):
        halves(torch.randn(3, 4), 1)
        F.linear(torch.randn(2, 4), halves.up[0][1:])
        F.linear(torch.randn(2, 4), torch.randn(8, 4))
        F.linear(torch.randn(0, 4), halves.up[0])
        F.linear(input=torch.randn(5, 4), weight=halves.up[torch.tensor(0)])
    assert seen == [("up[1]", 3), ("up[0]", 5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = make()
    prune(model, "magnitude")
    model.save_pretrained(folder)
    return folder


NAME = "model.layers.1.mlp.experts.down_proj"


def damaged(saved: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.weight_mask"][2, 0, 0] ^= 0xFF
    tensors[f"{NAME}.weight_mask"][2, 0, 1] = 0


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][..., :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (flip, r"down_proj\.weight_mask\[2\] keeps \d+ weights, but there are 1024 values; the file is damaged"),
        (lambda tensors: tensors.pop(f"{NAME}.weight"), r"down_proj\.weight is missing"),
        (lambda tensors: tensors.pop(f"{NAME}.weight_mask"), r"down_proj\.weight_mask is missing"),
        (narrow, r"down_proj\.weight is F32 \[4, 32, 31\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensor(saved: Path, tmp_path: Path, change, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(damaged(saved, tmp_path, change))


def test_a_record_that_cannot_be_right_is_refused_by_the_layer(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path, lambda tensors: None)
    for old, new, match in (
        ('"num_values": 4096', '"num_values": 4095', "record of layer layers.0.mlp.experts.down_proj cannot be right"),
        ("layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.act_fn", "act_fn, where MixtralForCausalLM has SiLU"),
        (
            "layers.0.mlp.experts.down_proj",
            "layers.0.mlp.experts.up",
            "experts.up, where MixtralForCausalLM has nothing",
        ),
        ("layers.0.mlp.experts.down_proj", "layers.0.mlp.gate.weight", "gate.weight, where .* has Parameter"),
    ):
        text = (saved / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=match):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_state_dict_with_a_damaged_mask_is_refused() -> None:
    model = make()
    prune(model, "magnitude")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flip(state)
    with pytest.raises(RuntimeError, match=r"down_proj\.weight_mask\[2\] keeps"):
        model.load_state_dict(state)


def test_kept_zeros_of_a_dense_checkpoint_are_kept_again() -> None:
    model = make()
    prune(model, "magnitude", "50%")
    layers = copy.deepcopy(model.config.quantization_config.layers)
    model.dequantize()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[1][experts.down_proj[1] > 0.03] = 0  # trained away
    found = logits(model)
    sparsify_dense(model, layers)
    assert experts.down_proj.weight.shape == (4, 1024)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)


def test_a_dense_matrix_with_more_weights_than_recorded_is_refused() -> None:
    model = make()
    prune(model, "magnitude", "50%")
    layers = copy.deepcopy(model.config.quantization_config.layers)
    model.dequantize()
    layers["layers.0.mlp.experts.down_proj"]["num_values"] -= 4
    with pytest.raises(ValueError, match=r"down_proj: a matrix has more nonzero weights than the recorded 1023"):
        sparsify_dense(model, layers)
    assert not sparse_experts(model) and not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_sparse_checkpoint_loaded_with_an_offloaded_block(place: str, tmp_path: Path) -> None:
    reference = make()
    prune(reference)
    reference.save_pretrained(tmp_path / "saved")
    where = {"model.embed_tokens": "cpu", "model.layers.0": place, "model.layers.1": "cpu", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    folder = str(tmp_path / "offload")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map=where, offload_folder=folder)
    assert loaded.model.layers[0].mlp.experts.down_proj.weight.is_meta == (place == "disk")
    assert torch.equal(logits(loaded), logits(reference))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    torch.testing.assert_close(again, load_file(tmp_path / "saved/model.safetensors"), rtol=0, atol=0)
    if place == "disk":
        with pytest.raises(ValueError, match="offloaded"):
            loaded.dequantize()
