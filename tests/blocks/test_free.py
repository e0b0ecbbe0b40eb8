"""Free orders of channels are found in every architecture, and using them changes nothing that a model computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_ksparse.blocks import BlockReplay, DecoderBlocks, find_blocks
from optimum_ksparse.blocks.free import FreeOrder, find_free_orders
from optimum_ksparse.nn import is_linear_map

from ..conftest import ARCHITECTURES, VOCABULARY

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
# Classes and copies of channels by reader: heads of values and the query heads of each, and all of an MLP.
ATTENTION = {"llama": (2, 2), "gemma3": (2, 2), "qwen3": (2, 2), "phi3": (2, 2), "mistral": (2, 2), "rwkv": None}
ATTENTION |= {"falcon": (1, 4), "falcon_alibi": (2, 2)}


def linear_maps(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if is_linear_map(module)}


def found_in(blocks: DecoderBlocks, index: int) -> dict[str, FreeOrder]:
    block, layers = blocks.blocks[index], linear_maps(blocks.blocks[index])
    ids = torch.randint(VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        replay = BlockReplay(blocks, ids, 16)
        return find_free_orders(lambda: replay.output(index, block, 0) - replay.hidden[0], layers, list(layers))


@pytest.fixture
def make(make_model: MakeModel) -> MakeModel:
    """With biases and norms that are not all alike."""

    def with_random_vectors(name: str, **settings: object) -> PreTrainedModel:
        model = make_model(name, **settings).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return model

    return with_random_vectors


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_stays(name: str, make: MakeModel, token_ids: torch.Tensor) -> None:
    model = make(name)
    blocks = find_blocks(model)
    before = model(token_ids).logits.detach()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, block in enumerate(blocks.blocks):
        orders = found_in(blocks, index)
        torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
        heads = ATTENTION.get(name, (4, 1))
        shapes = [(len(order.columns), order.columns.shape[-1]) for order in orders.values()]
        assert sorted(shapes) == sorted(shape for shape in (heads, (1, 1)) if shape is not None)
        for reader, order in orders.items():
            classes, channels, _ = order.columns.shape
            places = torch.stack([torch.arange(channels).roll(1) for _ in range(classes)])
            order.apply(linear_maps(block), reader, places)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model(token_ids).logits.detach()
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_channels_move(make: MakeModel) -> None:
    blocks = find_blocks(make("llama"))
    order, layers = found_in(blocks, 0)["mlp.down_proj"], linear_maps(blocks.blocks[0])
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    order.apply(layers, "mlp.down_proj", torch.arange(order.columns.shape[1]).roll(1)[None])
    assert torch.equal(layers["mlp.down_proj"].weight, before["mlp.down_proj"].roll(1, 1))
    assert torch.equal(layers["mlp.up_proj"].weight, before["mlp.up_proj"].roll(1, 0))
    assert torch.equal(layers["mlp.gate_proj"].weight, before["mlp.gate_proj"].roll(1, 0))


def test_bfloat16_finds_the_same(make: MakeModel) -> None:
    single, half = (found_in(find_blocks(make("gemma3", dtype=dtype)), 0) for dtype in (torch.float32, torch.bfloat16))
    assert single.keys() == half.keys()
    for reader, order in single.items():
        assert torch.equal(order.columns, half[reader].columns)


def test_a_norm_in_between_is_not_elementwise(make: MakeModel) -> None:
    blocks = find_blocks(make("llama"))
    mlp = blocks.blocks[0].mlp
    mlp.down_proj = nn.Sequential(nn.LayerNorm(mlp.down_proj.in_features), mlp.down_proj)
    assert set(found_in(blocks, 0)) == {"self_attn.o_proj"}


def test_weights_per_channel_are_not_free(make: MakeModel) -> None:
    """Elementwise, but every channel has a factor of its own, which does not move along."""

    class Factors(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.factors = nn.Parameter(torch.linspace(0.5, 2, size))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factors

    blocks = find_blocks(make("llama"))
    mlp = blocks.blocks[0].mlp
    mlp.down_proj = nn.Sequential(Factors(mlp.down_proj.in_features), mlp.down_proj)
    assert set(found_in(blocks, 0)) == {"self_attn.o_proj"}
