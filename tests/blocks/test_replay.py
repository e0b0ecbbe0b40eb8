"""Running tokens block by block is running the model, and statistics are those of the model's own activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_ksparse import SparseLinear, SparsityConfig, prune_weight, sparsify
from optimum_ksparse.blocks import BlockReplay, find_blocks
from optimum_ksparse.nn import dense_weight
from optimum_ksparse.pruners.statistics import ColumnNorms, GramMatrix

from ..conftest import ARCHITECTURES, DISTINCT, EVERY_ARCHITECTURE, thinned

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
SEPARATE_PROJECTIONS = {
    "llama": "self_attn.{}",
    "gemma3": "self_attn.{}",
    "qwen3": "self_attn.{}",
    "mistral": "self_attn.{}",
    "opt": "self_attn.{}",
    "gpt_neo": "attn.attention.{}",
}


def linear_maps(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def make_gram(linear: nn.Module) -> GramMatrix:
    return GramMatrix(dense_weight(linear).shape[1])


def block_outputs(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states after each block of the model itself."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in find_blocks(model).blocks
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def layer_inputs(model: PreTrainedModel, block: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a block's linear maps in the model itself, [samples, positions, in] float64."""
    inputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda m, args: inputs.__setitem__(name, args[0].reshape(*tokens.shape, -1).double())

    handles = [module.register_forward_pre_hook(record(name)) for name, module in linear_maps(block).items()]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


@torch.no_grad()
def collect(
    replay: BlockReplay, index: int, make: Callable[[nn.Module], ColumnNorms] = make_gram
) -> dict[str, ColumnNorms]:
    block = replay._decoder_blocks.blocks[index]
    return replay.collect(index, block, linear_maps(block), make)


@torch.no_grad()
def replay_at(model: PreTrainedModel, tokens: torch.Tensor, index: int, first_weight: float = 1) -> BlockReplay:
    """A replay that has gone through the dense blocks before `index`."""
    blocks = find_blocks(model)
    replay = BlockReplay(blocks, tokens, 4, first_weight)
    for i in range(index):
        replay.advance(i, blocks.blocks[i])
    return replay


def assert_untouched(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in vars(module), name


@pytest.mark.parametrize(
    ("name", "batch_size"), [*thinned([(name, 4) for name in ARCHITECTURES], DISTINCT), ("llama", 1), ("llama", 7)]
)
@torch.no_grad()
def test_blocks_one_by_one_give_the_models_hidden_states(
    name: str, batch_size: int, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model(name)
    expected = block_outputs(model, token_ids)
    blocks = find_blocks(model)
    replay = BlockReplay(blocks, token_ids, batch_size)
    assert [len(hidden) for hidden in replay.hidden] == [len(part) for part in token_ids.split(batch_size)]
    for index, block in enumerate(blocks.blocks):
        replay.advance(index, block)
        torch.testing.assert_close(torch.cat(list(replay.hidden)), expected[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("last", "first_weight"), [(False, 0), (True, 1), (False, 9)])
@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_statistics_are_those_of_the_models_own_inputs(
    name: str, last: bool, first_weight: float, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model(name)
    blocks = find_blocks(model)
    index = len(blocks.blocks) - 1 if last else 0
    expected = layer_inputs(model, blocks.blocks[index], token_ids)
    replay = replay_at(model, token_ids, index, first_weight)
    grams = collect(replay, index)
    norms = collect(replay, index, lambda linear: ColumnNorms(dense_weight(linear).shape[1]))
    assert grams.keys() == norms.keys() == linear_maps(blocks.blocks[index]).keys()
    for layer, inputs in expected.items():
        counted = torch.cat([inputs[:, :1] * first_weight**0.5, inputs[:, 1:]], dim=1)
        rows = (counted if first_weight else inputs[:, 1:]).flatten(0, 1)
        gram = rows.T @ rows / len(rows)
        scale = float(gram.diagonal().max())
        assert grams[layer].num_tokens == norms[layer].num_tokens == len(rows)
        torch.testing.assert_close(grams[layer].gram.double(), gram, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(norms[layer].squared_norms.double(), gram.diagonal(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", SEPARATE_PROJECTIONS)
def test_projections_of_one_input_share_one_statistics_object(
    name: str, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    statistics = collect(replay_at(make_model(name), token_ids, 0), 0)
    path = SEPARATE_PROJECTIONS[name]
    query, key, value = (statistics[path.format(f"{kind}_proj")] for kind in "qkv")
    output = statistics[path.format("out_proj" if name in ("opt", "gpt_neo") else "o_proj")]
    assert query is key is value
    assert output is not query
    if "mlp.gate_proj" in statistics:
        assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
        assert len({id(found) for found in statistics.values()}) == 4


def test_input_groups_are_in_the_order_of_the_calls(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    model = make_model()
    block = find_blocks(model).blocks[0]
    with torch.no_grad():
        groups = replay_at(model, token_ids, 0).input_groups(0, block, linear_maps(block))
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


class ChunkedMLP(nn.Module):
    """Runs the two halves of the positions one after the other, as memory-saving models do."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = [self.gate_proj(half) * self.up_proj(half) for half in x.chunk(2, dim=1)]
        return torch.cat([self.down_proj(half) for half in halves], dim=1)


class RepeatedMLP(ChunkedMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x)) + self.down_proj(self.up_proj(x))


@pytest.mark.parametrize("kind", [ChunkedMLP, RepeatedMLP])
def test_layers_called_twice_count_every_input_once(
    kind: type[nn.Module], make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model()
    block = model.model.layers[0]
    block.mlp = kind(block.mlp)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linear_maps(block)}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].flatten(0, 1)))
        for name, module in linear_maps(block).items()
    ]
    with torch.no_grad():
        model(token_ids)
    for handle in handles:
        handle.remove()
    statistics = collect(replay_at(model, token_ids, 0), 0)
    for name, inputs in seen.items():
        rows = torch.cat(inputs)
        assert statistics[name].num_tokens == len(rows), name
        torch.testing.assert_close(statistics[name].gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


class RoutedMLP(ChunkedMLP):
    """Calls `up_proj` only for batches of `routed` samples."""

    routed = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.gate_proj(x)
        return self.down_proj(hidden * self.up_proj(2 * x) if len(x) == self.routed else hidden)


@pytest.mark.parametrize("routed", [4, 2])
def test_layer_called_for_some_batches_counts_their_tokens(
    routed: int, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model()
    model.model.layers[0].mlp = RoutedMLP(model.model.layers[0].mlp)
    model.model.layers[0].mlp.routed = routed
    statistics = collect(replay_at(model, token_ids, 0), 0)
    assert statistics["mlp.up_proj"].num_tokens == routed * token_ids.shape[1]
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert statistics[name].num_tokens == token_ids.numel()


@pytest.mark.parametrize("counted", [True, False])
def test_bos_in_statistics_counts_the_first_position_or_not(
    counted: bool, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    tokens = token_ids.clone()
    tokens[:, 0] = 1
    model = make_model("opt")
    layer = model.model.decoder.layers[0].fc1
    weight = layer.weight.detach().clone()
    inputs = layer_inputs(model, model.model.decoder.layers[0], tokens)["fc1"].float()
    sparsify(
        model,
        SparsityConfig(
            method="sparsegpt", pattern="2:4", dataset=tokens, method_settings={"bos_in_statistics": counted}
        ),
    )
    expected, _ = prune_weight(weight, inputs if counted else inputs[:, 1:], method="sparsegpt", pattern="2:4")
    found = model.model.decoder.layers[0].fc1.to_dense_weight()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "share"), [("sparsegpt", 0.5), ("admm", 0.25), ("admm", None), ("wanda", None)])
def test_the_first_position_has_at_least_its_share_of_the_statistics(
    method: str, share: float | None, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model("opt")
    layer = model.model.decoder.layers[0].fc1
    weight = layer.weight.detach().clone()
    inputs = layer_inputs(model, model.model.decoder.layers[0], token_ids)["fc1"].float()
    settings = {} if share is None else {"first_position_share": share}
    sparsify(model, SparsityConfig(method=method, pattern="2:4", dataset=token_ids, method_settings=settings))
    share = (0.1 if method == "admm" else 0) if share is None else share
    others = inputs.shape[1] - 1
    inputs[:, 0] *= max(1, share / (1 - share) * others) ** 0.5
    expected, _ = prune_weight(weight, inputs, method=method, pattern="2:4")
    torch.testing.assert_close(model.model.decoder.layers[0].fc1.to_dense_weight(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "last_layer"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("opt", "fc2")])
def test_forward_pass_stops_at_the_last_layer(
    name: str, last_layer: str, make_model: MakeModel, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    replay = replay_at(model, token_ids, 0)
    layer = find_blocks(model).blocks[0].get_submodule(last_layer)
    forward = layer.forward
    calls = []
    monkeypatch.setattr(layer, "forward", lambda x: calls.append(x.shape) or forward(x))
    statistics = collect(replay, 0)
    assert len(calls) == 1
    assert statistics[last_layer].num_tokens == token_ids.numel()


class WritingBlock(nn.Module):
    """Writes into its input, and into what it is given beside it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        kwargs["position_embeddings"][0].mul_(0.5)
        hidden.add_(1)
        return self.inner(hidden, *args, **kwargs)


@torch.no_grad()
def test_what_a_block_writes_into_its_arguments_does_not_reach_its_next_run(
    make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model(num_hidden_layers=1)
    layers = model.model.layers
    layers[0] = WritingBlock(layers[0])
    expected = torch.cat([block_outputs(model, ids)[0] for ids in token_ids.split(2)])
    replay = BlockReplay(find_blocks(model), token_ids, 2)
    first, second = collect(replay, 0), collect(replay, 0)
    assert torch.equal(first["inner.mlp.down_proj"].gram, second["inner.mlp.down_proj"].gram)
    torch.testing.assert_close(torch.cat(list(replay.outputs(0, layers[0]))), expected)


def test_a_block_that_accelerate_offloads_is_put_away_after_statistics(
    make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    accelerate = pytest.importorskip("accelerate")
    replay = replay_at(make_model(), token_ids, 0)
    block = replay._decoder_blocks.blocks[0]
    whole = {"preload_module_classes": [type(block).__name__]}  # one hook brings all weights of the block
    accelerate.cpu_offload(block, execution_device=torch.device("cpu"), **whole)
    collect(replay, 0, lambda linear: ColumnNorms(linear.in_features))
    assert all(parameter.is_meta for parameter in block.parameters())


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "2:4"), ("wanda", "50%"), ("sparsegpt", "2:4")])
def test_true_sequential_gives_other_masks_to_later_layers(
    method: str, pattern: str, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    masks = []
    for true_sequential in (False, True):
        model = make_model(num_hidden_layers=2)
        with torch.no_grad():
            for layer in model.model.layers:  # larger than at random, so that one layer's error moves the next one's
                for linear in linear_maps(layer).values():
                    linear.weight.mul_(20)
        config = SparsityConfig(
            method=method,
            pattern=pattern,
            dataset=token_ids,
            method_settings={"block_size": 16} if method == "sparsegpt" else {},
            true_sequential=true_sequential,
        )
        report = sparsify(model, config)
        assert report.density == 0.5
        assert all(row.density == 0.5 for row in report.layers)
        masks.append({n: m.weight_mask for n, m in model.named_modules() if isinstance(m, SparseLinear)})
    default, sequential = masks
    assert default.keys() == sequential.keys()
    same = {name.removeprefix("model.layers.") for name in default if torch.equal(default[name], sequential[name])}
    assert {"0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"} <= same
    assert not {"0.mlp.gate_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj"} & same


@pytest.mark.parametrize(
    ("name", "true_sequential"),
    [*thinned([(name, True) for name in ARCHITECTURES], DISTINCT), ("llama", False), ("gpt2", False)],
)
def test_later_blocks_are_calibrated_on_the_pruned_ones(
    name: str, true_sequential: bool, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model(name)
    config = SparsityConfig(
        method="sparsegpt",
        dataset=token_ids,
        method_settings={"block_size": 16},
        batch_size=4,
        true_sequential=true_sequential,
    )
    errors = {row.name: row.relative_output_error for row in sparsify(model, config).layers}
    blocks = find_blocks(model)
    last = len(blocks.blocks) - 1
    inputs = layer_inputs(model, blocks.blocks[last], token_ids)
    dense = linear_maps(find_blocks(make_model(name)).blocks[last])
    first_called = next(iter(inputs))
    for layer in inputs if true_sequential else [first_called]:
        rows = inputs[layer].flatten(0, 1)
        weight = dense_weight(dense[layer]).detach().double()
        pruned = blocks.blocks[last].get_submodule(layer).to_dense_weight().double()
        expected = torch.linalg.norm(rows @ (pruned - weight).T) / torch.linalg.norm(rows @ weight.T)
        assert errors[blocks.name_in_decoder(last, layer)] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_hook_and_no_stand_in_is_left_behind(name: str, make_model: MakeModel, token_ids: torch.Tensor) -> None:
    model = make_model(name)
    sparsify(model, SparsityConfig(pattern="2:4", dataset=token_ids, batch_size=4))
    assert_untouched(model)


def failing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("place", ["model.layers.1.mlp.act_fn", "model.norm"])
def test_nothing_is_left_behind_by_an_error_while_activations_are_captured(
    place: str, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model().train()
    handle = model.get_submodule(place).register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        sparsify(model, SparsityConfig(pattern="2:4", dataset=token_ids))
    handle.remove()
    assert_untouched(model)
    assert all(module.training for module in model.modules())


def test_nothing_is_left_behind_by_an_error_in_the_stand_ins(
    make_model: MakeModel, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr("optimum_ksparse.blocks.calls.Pool.share", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        sparsify(model, SparsityConfig(pattern="2:4", dataset=token_ids))
    assert_untouched(model)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_nothing_is_left_behind_by_an_error_while_statistics_are_collected(
    true_sequential: bool, make_model: MakeModel, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(ColumnNorms, "update", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        sparsify(model, SparsityConfig(pattern="2:4", dataset=token_ids, true_sequential=true_sequential))
    assert_untouched(model)


def test_a_forward_of_the_blocks_own_comes_back(make_model: MakeModel, token_ids: torch.Tensor) -> None:
    model = make_model()
    block = model.model.layers[0]
    original = block.forward
    calls = []

    def forward(*args: object, **kwargs: object) -> object:
        calls.append(len(args))
        return original(*args, **kwargs)

    block.forward = forward
    sparsify(model, SparsityConfig(pattern="2:4", dataset=token_ids))
    assert vars(block)["forward"] is forward
    assert calls


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_products_in_bfloat16_leave_float32_activations_nearly_as_they_are(
    name: str, make_model: MakeModel, token_ids: torch.Tensor
) -> None:
    model = make_model(name)
    config = SparsityConfig("sparsegpt", "2:4", dataset=token_ids, calibration_dtype="bfloat16", num_samples=6)
    expected = block_outputs(model, token_ids)
    blocks = find_blocks(model)
    replay = BlockReplay(blocks, token_ids, 4, dtype=torch.bfloat16)
    grams = collect(replay, 0)
    assert all(gram.gram.dtype == torch.float32 for gram in grams.values())
    for index, block in enumerate(blocks.blocks):
        replay.advance(index, block)
        found = torch.cat(list(replay.hidden))
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected[index])
        assert torch.linalg.norm(found - expected[index]) < 0.02 * torch.linalg.norm(expected[index])
    report = sparsify(model, config)
    assert report.config["calibration_dtype"] == "bfloat16"
    assert all(module.weight.dtype == torch.float32 for module in model.modules() if isinstance(module, SparseLinear))
