"""Decoders of several stacks of blocks, decoders that run blocks more than once, and towers beside the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GitConfig, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from optimum_ksparse import SparseLinear, SparsityConfig, drop_layers, prune_checkpoint, sparsify
from optimum_ksparse.blocks import BlockReplay, find_blocks
from optimum_ksparse.pruners.statistics import ColumnNorms
from optimum_ksparse.pruning.streaming import Workspace

torch.set_num_threads(1)

IDS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


class LoopedModel(LlamaModel):
    """A prelude, a core that runs three times with what came before it, and a norm between the two."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.prelude, self.layers = nn.ModuleList(self.layers[:1]), nn.ModuleList(self.layers[1:])
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> transformers.modeling_outputs.BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = self.rotary_emb(hidden, positions)
        for block in self.prelude:
            hidden = block(hidden, position_embeddings=rotary)
        first = hidden
        for _ in range(3):
            hidden = self.norm(hidden + first)
            for block in self.layers:
                hidden = block(hidden, position_embeddings=rotary)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class RepeatedModel(LoopedModel):
    """One list, which runs three times."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers, self.prelude = nn.ModuleList([*self.prelude, *self.layers]), nn.ModuleList()


class LoopedForCausalLM(LlamaForCausalLM):
    inner = LoopedModel

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = self.inner(config)
        self.post_init()


class RepeatedForCausalLM(LoopedForCausalLM):
    inner = RepeatedModel


class SharedModel(LoopedModel):
    """The blocks of the core have one MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers[1].mlp = self.layers[0].mlp


class SharedForCausalLM(LoopedForCausalLM):
    inner = SharedModel
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        f"model.layers.1.mlp.{name}_proj.weight": f"model.layers.0.mlp.{name}_proj.weight"
        for name in ("gate", "up", "down")
    }


@pytest.fixture
def shared() -> PreTrainedModel:
    torch.manual_seed(0)
    return SharedForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture
def looped() -> PreTrainedModel:
    torch.manual_seed(0)
    return LoopedForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture
def hrm() -> PreTrainedModel:
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this transformers has no HRM-Text")
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(**SIZES, num_layers_per_stack=2, head_dim=8)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def reversible() -> PreTrainedModel:
    """Blocks that hand on two streams of hidden states."""
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        **SIZES,
        feed_forward_size=64,
        attention_head_size=8,
        attn_layers=["local"] * 3,
        local_attn_chunk_length=4,
        axial_pos_shape=(3, 4),
        axial_pos_embds_dim=(16, 16),
        is_decoder=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def cached() -> PreTrainedModel:
    """Blocks in two lists by turns, which write into a cache whether asked to or not."""
    torch.manual_seed(0)
    config = transformers.XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_index=0)
    return transformers.XLMWithLMHeadModel(config).eval()


@pytest.mark.parametrize(("kind", "method"), [("hrm", "wanda"), ("looped", "magnitude")])
def test_every_stack_is_pruned(kind, method, request):
    model = request.getfixturevalue(kind)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    report = sparsify(model, SparsityConfig(method, "2:4", dataset=IDS, batch_size=8))
    assert {f"model.{row.name}" for row in report.layers} == names
    assert {name for name, module in model.named_modules() if isinstance(module, SparseLinear)} == names
    assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize("kind", ["hrm", "looped", "reversible", "cached"])
@torch.no_grad()
def test_statistics_are_those_of_all_calls_in_the_model_as_it_is(kind, request):
    model = request.getfixturevalue(kind)
    blocks = find_blocks(model)
    replay, last = BlockReplay(blocks, IDS, 4), len(blocks.blocks) - 1
    assert not replay.in_line
    for index in range(last):
        for parameter in blocks.blocks[index].parameters():
            parameter.mul_(0.5)  # as if pruned
        replay.advance(index, blocks.blocks[index])
    layer = next(module for module in blocks.blocks[last].modules() if isinstance(module, nn.Linear))
    expected = ColumnNorms(layer.in_features)
    with layer.register_forward_pre_hook(lambda module, args: expected.update(args[0])):
        for batch in IDS.split(4):
            model(batch)
    found = replay.collect(last, blocks.blocks[last], {"it": layer}, lambda layer: ColumnNorms(layer.in_features))
    assert found["it"].num_tokens == expected.num_tokens == replay.num_rows >= IDS.numel()
    torch.testing.assert_close(found["it"].squared_norms, expected.squared_norms)


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "stacks": ("hrm", {}),
    "reconstruct": ("looped", {"reconstruct": "block", "reconstruction_epochs": 1}),
    "shared": ("shared", {"skip_unsupported": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_a_looped_checkpoint_is_pruned_on_disk_as_in_memory(kind, settings, request, tmp_path: Path, monkeypatch):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path / "dense")
    config = SparsityConfig.from_flat("wanda", "2:4", dataset=IDS, batch_size=8, **settings)
    report = sparsify(model, config)
    assert all(row.loss_after <= row.loss_before for row in report.reconstruction)
    original = Workspace.add_block

    def stop(workspace: Workspace, index: int, *arguments: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        original(workspace, index, *arguments)

    arguments: dict[str, Any] = {"model_class": type(model), "activation_memory": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "add_block", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "dense", tmp_path / "cut", config, **arguments)
    # Blocks that are pruned already are called again by later rounds.
    prune_checkpoint(tmp_path / "dense", tmp_path / "cut", config, **arguments)
    streamed = type(model).from_pretrained(tmp_path / "cut").state_dict()
    assert model.state_dict().keys() == streamed.keys()
    for path, value in model.state_dict().items():
        assert torch.equal(value, streamed[path]), path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "dense"}, "activations='dense' .*LoopedForCausalLM"),
        ({"activations": "mixed", "reconstruct": "block", "allocation": "owl"}, "activations='mixed'"),
    ],
)
def test_what_a_looped_model_cannot_have_is_refused_before_any_work(looped, settings, message):
    before = {name: value.clone() for name, value in looped.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sparsify(looped, SparsityConfig.from_flat("wanda", "50%", dataset=IDS, batch_size=2, **settings))
    assert all(torch.equal(value, before[name]) for name, value in looped.state_dict().items())


def test_blocks_that_do_not_run_one_after_another_cannot_be_dropped(looped):
    repeated = RepeatedForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()
    for model, reason in ((repeated, "one after another"), (looped, "several stacks")):
        with pytest.raises(ValueError, match=reason):
            drop_layers(model, 1, IDS)
    assert len(repeated.model.layers) == 3


def test_a_block_that_text_passes_by_is_named_before_any_work(make_model, token_ids):
    model = make_model("llama")
    layers = model.model.layers
    layers.append(nn.Sequential(nn.Linear(32, 32)))  # the model calls as many as its config says
    before = layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"layers\.2: no calibration token reached this block"):
        sparsify(model, SparsityConfig("wanda", "2:4", dataset=token_ids))
    assert layers[0].mlp.up_proj is before
    settings = {"modules_to_not_convert": [r"model\.layers\.2\."], "reconstruct": "block", "reconstruction_epochs": 1}
    report = sparsify(
        model, SparsityConfig.from_flat("wanda", "2:4", dataset=token_ids, true_sequential=True, **settings)
    )
    assert list(report.skipped) == ["layers.2.0"]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "meta"])
def test_an_image_encoder_larger_than_the_decoder_is_not_taken_for_it(on_disk):
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = GitConfig(vision_config={**vision, "image_size": 32}, **SIZES, num_hidden_layers=2)
    with torch.device("meta" if on_disk else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    assert find_blocks(model).paths == ["encoder.layer.0", "encoder.layer.1"]


def test_lists_that_cannot_be_told_apart_are_refused_by_name(looped, monkeypatch):
    def fail(*arguments: Any, **more: Any) -> None:
        raise KeyError("pixel_values")

    monkeypatch.setattr(LoopedModel, "forward", fail)
    with pytest.raises(ValueError, match=r"several lists of blocks \(layers, prelude\).*KeyError: 'pixel_values'"):
        find_blocks(looped)
