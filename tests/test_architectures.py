"""Pruning whole models: every kind of decoder, and what is refused before a weight changes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    ModernBertDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from optimum_ksparse import SparseLinear, SparsityConfig, SparsityReport, prune_checkpoint, sparsify
from optimum_ksparse.blocks import find_blocks

from .conftest import ARCHITECTURES, DISTINCT, VOCABULARY

torch.set_num_threads(1)

MakeModel = Callable[..., PreTrainedModel]
METHODS = [("sparsegpt", "2:4"), ("wanda", "50%")]
# Each kind of decoder with one of the methods in turn; those with other linear maps (transposed, joined) with both.
PAIRS = [(name, *pair) for name, pair in zip(ARCHITECTURES, itertools.cycle(METHODS))]
PAIRS += [(name, *pair) for name in ("llama", "gpt2", "falcon_alibi") for pair in METHODS]
PAIRS = list(dict.fromkeys(PAIRS))
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="session")
def prune(token_ids: torch.Tensor) -> Callable[..., SparsityReport]:
    def run(model: PreTrainedModel, method: str = "wanda", pattern: str = "2:4", **settings: object) -> SparsityReport:
        defaults = {"dataset": token_ids, "batch_size": 4, **({"block_size": 16} if method == "sparsegpt" else {})}
        return sparsify(model, SparsityConfig.from_flat(method=method, pattern=pattern, **{**defaults, **settings}))

    return run


@contextmanager
def refused(model: PreTrainedModel, error: type[Exception], match: str) -> Iterator[None]:
    """Expects an error that leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        yield
    after = dict(model.state_dict())
    assert after.keys() == before.keys()
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def sparse_names(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def block_linear_names(model: PreTrainedModel) -> set[str]:
    blocks = find_blocks(model)
    return {
        blocks.name_in_model(index, name)
        for index, block in enumerate(blocks.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def embedding_addresses(model: PreTrainedModel) -> tuple[int, int]:
    return model.get_input_embeddings().weight.data_ptr(), model.get_output_embeddings().weight.data_ptr()


@dataclass
class Pruned:
    """A model before and after; nobody changes either."""

    dense: PreTrainedModel
    model: PreTrainedModel
    report: SparsityReport
    embeddings: tuple[int, int]  # where they were before


@pytest.fixture(
    scope="module",
    params=[pytest.param(pair, marks=() if pair[0] in DISTINCT else pytest.mark.slow) for pair in PAIRS],
    ids="-".join,
)
def pruned(request: pytest.FixtureRequest, make_model: MakeModel, prune: Callable[..., SparsityReport]) -> Pruned:
    name, method, pattern = request.param
    dense, model = make_model(name), make_model(name)
    before = embedding_addresses(model)
    return Pruned(dense, model, prune(model, method, pattern), before)


def test_all_linear_maps_of_the_blocks_and_no_others_become_sparse(pruned: Pruned) -> None:
    expected = block_linear_names(pruned.dense)
    assert expected
    assert sparse_names(pruned.model) == expected
    decoder = find_blocks(pruned.model).decoder_name
    assert {f"{decoder}.{row.name}" for row in pruned.report.layers} == expected
    for module in pruned.model.modules():
        if isinstance(module, SparseLinear):
            dense = module.to_dense_weight()
            assert 2 * module.weight.numel() == 2 * int(dense.count_nonzero()) == dense.numel()


def test_pruning_changes_every_layers_outputs_by_less_than_themselves(pruned: Pruned, token_ids: torch.Tensor) -> None:
    assert all(0 < row.relative_output_error < 1 for row in pruned.report.layers)
    after = logits(pruned.model, token_ids)
    assert after.isfinite().all()
    assert not torch.allclose(after, logits(pruned.dense, token_ids))


def test_saved_model_loads_with_equal_logits_and_embeddings_as_they_were_tied(
    pruned: Pruned, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = pruned.model
    tied = pruned.embeddings[0] == pruned.embeddings[1]
    assert tied == model.config.tie_word_embeddings
    assert embedding_addresses(model) == pruned.embeddings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_names(loaded) == sparse_names(model)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    first, second = embedding_addresses(loaded)
    assert (first == second) == tied


def test_dequantize_gives_the_original_classes_and_the_same_logits(pruned: Pruned, token_ids: torch.Tensor) -> None:
    model = copy.deepcopy(pruned.model)
    model.dequantize()
    classes = [{path: type(module) for path, module in each.named_modules()} for each in (model, pruned.dense)]
    assert classes[0] == classes[1]
    torch.testing.assert_close(logits(model, token_ids), logits(pruned.model, token_ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_that_changes_its_weights_when_it_runs_is_refused(
    make_model: MakeModel, prune: Callable[..., SparsityReport], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model("rwkv", rescale_every=1)  # halves weights before the first block, hidden states after each
    model.save_pretrained(tmp_path / "dense")
    for _ in range(2):  # it has run by the second time
        with pytest.raises(ValueError, match="rescale_every=0"):
            prune(model)
    with pytest.raises(ValueError, match="rescale_every=0"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", SparsityConfig("wanda", "2:4", dataset=token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", rescale_every=0)
    assert prune(model).density == 0.5


@pytest.mark.parametrize(
    ("name", "method", "pattern", "dtype"),
    [
        ("llama", "sparsegpt", "2:4", torch.bfloat16),
        ("opt", "sparsegpt", "2:4", torch.float16),
        ("gpt2", "wanda", "50%", torch.float16),
        ("falcon_alibi", "wanda", "50%", torch.bfloat16),
    ],
)
def test_half_precision_models_are_pruned_saved_and_loaded(
    name: str,
    method: str,
    pattern: str,
    dtype: torch.dtype,
    make_model: MakeModel,
    prune: Callable[..., SparsityReport],
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    make_model(name, dtype).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune(model, method, pattern)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.dtype == dtype
    found = logits(model, token_ids)
    assert found.isfinite().all()
    assert torch.equal(logits(loaded, token_ids), found)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(BertForMaskedLM, BertConfig), (DebertaV2ForMaskedLM, DebertaV2Config)]
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_encoder_is_refused(
    model_class: type, config_class: type, method: str, prune: Callable[..., SparsityReport]
) -> None:
    model = model_class(config_class(**ENCODER)).eval()
    with refused(model, ValueError, f"{model_class.__name__} is not a decoder"):
        prune(model, method)


def test_decoder_that_calls_its_output_layer_decoder_is_pruned(prune: Callable[..., SparsityReport]) -> None:
    config = ModernBertDecoderConfig(
        **ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(prune(model).layers) == 2 * 6
    assert model.decoder.weight.shape == (VOCABULARY, 32)


def test_encoder_decoder_is_refused(prune: Callable[..., SparsityReport]) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    with refused(model, ValueError, "T5ForConditionalGeneration is an encoder-decoder"):
        prune(model)


def test_model_without_a_list_of_blocks_is_refused_with_what_it_holds(prune: Callable[..., SparsityReport]) -> None:
    class Flat(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self) -> None:
            super().__init__(PreTrainedConfig())
            self.mixer = nn.Linear(32, 32)
            self.post_init()

    model = Flat()
    with refused(
        model, ValueError, r"Flat has no decoder blocks: no ModuleList in Flat, which holds mixer \(Linear\)"
    ):
        prune(model)


def test_module_that_is_no_transformers_model_is_refused(prune: Callable[..., SparsityReport]) -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, found Sequential"):
        prune(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("pattern", "overrides", "match"),
    [
        ("2:5", {}, r"layers\.0\.self_attn\.q_proj .*32 input features, which m=5"),
        ("2:6", {}, r"layers\.0\.self_attn\.q_proj .*32 input features, which m=6"),
        ("2:4", {"intermediate_size": 62}, r"layers\.0\.mlp\.down_proj .*62 input features, which m=4"),
    ],
)
def test_input_size_that_m_does_not_divide_is_refused(
    pattern: str, overrides: dict, match: str, make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model("llama", **overrides)
    with refused(model, ValueError, match):
        prune(model, pattern=pattern)


def test_skip_unsupported_leaves_indivisible_layers_dense(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model("llama", intermediate_size=62)
    report = prune(model, skip_unsupported=True)
    assert report.skipped.keys() == {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"}
    assert all("62 input features" in reason for reason in report.skipped.values())


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        ("o_proj", {"layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"}),
        ("layers.1.mlp.up_proj", {"layers.1.mlp.up_proj"}),
        ("model.layers.1.mlp.up_proj", {"layers.1.mlp.up_proj"}),
        (
            r".*\.0\.mlp\..*",
            {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"},
        ),
    ],
)
def test_modules_to_not_convert_stay_dense_and_are_listed(
    excluded: str, expected: set[str], make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    weights = {name: model.get_submodule(f"model.{name}").weight.clone() for name in expected}
    report = prune(model, "sparsegpt", modules_to_not_convert=[excluded])
    assert report.skipped == dict.fromkeys(expected, "in modules_to_not_convert")
    assert block_linear_names(model) - sparse_names(model) == {f"model.{name}" for name in expected}
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(f"model.{name}").weight, weight)


def test_lm_head_may_be_named_among_modules_to_not_convert(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    assert prune(make_model(), modules_to_not_convert=["lm_head"]).skipped == {}


def test_misspelt_module_to_not_convert_is_refused_with_the_names_there_are(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    with refused(model, ValueError, r"'q_prj' matches nothing; the blocks hold .*self_attn\.q_proj"):
        prune(model, modules_to_not_convert=["o_proj", "q_prj"])


@pytest.mark.parametrize("excluded", ["mlp", "layers.1"])
def test_module_to_not_convert_that_leaves_nothing_dense_is_not_ignored(
    excluded: str, make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    try:
        report = prune(make_model(), modules_to_not_convert=[excluded])
    except ValueError as error:
        assert excluded in str(error)
    else:
        assert report.skipped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(
    value: float, make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with refused(model, ValueError, r"layers\.1\.mlp\.up_proj .*NaN or Inf"):
        prune(model)


@pytest.mark.parametrize(
    ("method", "dtype"), [("wanda", torch.float32), ("sparsegpt", torch.bfloat16), ("wanda", torch.float16)]
)
def test_infinite_embedding_is_refused(
    method: str,
    dtype: torch.dtype,
    make_model: MakeModel,
    prune: Callable[..., SparsityReport],
    token_ids: torch.Tensor,
) -> None:
    model = make_model(dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[token_ids[0, 0]] = float("inf")
    with refused(model, ValueError, r"layers\.0 .*NaN or Inf"):
        prune(model, method)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_overflow_in_a_later_block_is_refused_before_the_first_is_pruned(
    method: str, make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[1].mlp.up_proj.weight.fill_(5e2)
    with refused(model, ValueError, r"layers\.1 .*NaN or Inf in torch\.float16"):
        prune(model, method)


def test_infinite_activation_in_a_later_sample_names_the_layer(
    make_model: MakeModel, prune: Callable[..., SparsityReport], token_ids: torch.Tensor
) -> None:
    model = make_model()
    tokens = token_ids.clamp(min=4)
    tokens[5, 3] = 3
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("inf")
    with refused(model, ValueError, r"layers\.0\.self_attn\.q_proj: its inputs hold NaN or Inf"):
        prune(model, dataset=tokens)


def test_sparse_model_is_refused(make_model: MakeModel, prune: Callable[..., SparsityReport]) -> None:
    model = make_model()
    prune(model)
    with refused(model, ValueError, "sparse already"):
        prune(model)


def test_dequantized_model_can_be_pruned_again(make_model: MakeModel, prune: Callable[..., SparsityReport]) -> None:
    model = make_model()
    prune(model)
    model.dequantize()
    assert prune(model, pattern="1:4").density == 0.25


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class RewrittenLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def test_subclass_that_computes_something_else_is_refused_by_name(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj = ScaledLinear(32, 64, bias=False)
    with refused(model, ValueError, r"layers\.1\.mlp\.up_proj .*ScaledLinear computes something else"):
        prune(model)


@pytest.mark.parametrize("bias", [True, False])
def test_subclass_that_computes_the_same_is_pruned(
    bias: bool, make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj = RewrittenLinear(32, 64, bias=bias)
    prune(model)
    assert isinstance(model.model.layers[1].mlp.up_proj, SparseLinear)
    model.dequantize()
    assert type(model.model.layers[1].mlp.up_proj) is RewrittenLinear


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training: bool, make_model: MakeModel, prune: Callable[..., SparsityReport]) -> None:
    model = make_model().train(training)
    prune(model)
    assert {module.training for module in model.modules()} == {training}


def test_training_mode_is_kept_on_an_error(
    make_model: MakeModel, prune: Callable[..., SparsityReport], token_ids: torch.Tensor
) -> None:
    model = make_model().train()
    with refused(model, ValueError, "vocabulary"):
        prune(model, dataset=token_ids + VOCABULARY)
    assert all(module.training for module in model.modules())


def test_dropout_does_not_touch_calibration(make_model: MakeModel, prune: Callable[..., SparsityReport]) -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    twin = copy.deepcopy(model).train()
    prune(model, "sparsegpt")
    prune(twin, "sparsegpt")
    torch.testing.assert_close(dict(twin.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_linear_maps_that_share_a_weight_are_refused_by_both_names(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with refused(
        model, ValueError, r"layers\.0\.self_attn\.q_proj .*shares its weight with layers\.1\.self_attn\.q_proj"
    ):
        prune(model)


def test_linear_map_in_two_places_of_a_block_is_refused_by_name(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model(num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    attention.k_proj = attention.q_proj
    with refused(model, ValueError, r"q_proj .*shares its weight with layers\.0\.self_attn\.k_proj"):
        prune(model)


def test_linear_map_that_no_token_reaches_is_refused_before_its_block_is_pruned(
    make_model: MakeModel, prune: Callable[..., SparsityReport]
) -> None:
    model = make_model()
    model.model.layers[0].mlp.unused = nn.Linear(32, 32)
    with refused(model, ValueError, r"layers\.0\.mlp\.unused: no calibration token reached it"):
        prune(model)
