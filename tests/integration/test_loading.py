"""`from_pretrained` prunes, and loads what is sparse already."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from optimum_ksparse import SparseLinear, SparsityConfig, sparsify
from optimum_ksparse.blocks import BlockReplay
from optimum_ksparse.checkpoint import sparse_modules
from optimum_ksparse.integration import register
from optimum_ksparse.pruners import METHODS
from optimum_ksparse.pruning import prune_blocks

from ..conftest import sample_texts


@pytest.fixture
def dense(tmp_path, make_model, tokenizer):
    """A folder with a tiny dense Llama and its tokenizer."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def config(token_ids):
    return SparsityConfig(dataset=token_ids, batch_size=4)


@pytest.fixture
def packed(tmp_path, dense, config):
    AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def test_one_argument_prunes(dense, config):
    as_dict = {"method": "magnitude", "pattern": "1:4"}
    arguments = {"sparsity_config": config, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(dense, **arguments)
    assert not info["missing_keys"] and model.sparsity_report.density == 0.5
    assert len(sparse_modules(LlamaForCausalLM.from_pretrained(dense, quantization_config=config))) == 14
    assert AutoModelForCausalLM.from_pretrained(dense, sparsity_config=as_dict).sparsity_report.density == 0.25
    with pytest.raises(ValueError, match="pass one of them"):
        AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config, quantization_config=config)
    with pytest.raises(TypeError, match="sparsity_config"):
        AutoModelForCausalLM.from_pretrained(dense, sparsity_config="2:4")


def test_text_goes_through_the_models_own_tokenizer(dense):
    config = SparsityConfig(dataset=sample_texts("calibration"), num_samples=4, seq_len=32)
    report = AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config).sparsity_report
    assert report.calibration["form"] == "crops"
    assert report.calibration["num_samples"] == 4


def test_without_a_tokenizer_the_error_says_what_to_pass(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    config = SparsityConfig(dataset=sample_texts("calibration"), num_samples=4, seq_len=32)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=config)


@pytest.mark.parametrize(("dtype", "device_map"), [(torch.bfloat16, "auto"), (torch.float16, "cpu")])
def test_dtypes_and_device_maps(dense, config, dtype, device_map, token_ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config, dtype=dtype, device_map=device_map)
    assert next(iter(sparse_modules(model).values())).weight.dtype == dtype
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device_map)
    assert again.dtype == dtype
    assert torch.equal(logits(model, token_ids), logits(again, token_ids))


def test_a_head_over_the_loaded_decoder_is_pruned(dense, config):
    model = AutoModelForSequenceClassification.from_pretrained(dense, sparsity_config=config)
    assert len(sparse_modules(model)) == 14
    assert not isinstance(model.score, SparseLinear)
    assert len(sparse_modules(AutoModel.from_pretrained(dense, sparsity_config=config))) == 14


def test_a_random_decoder_is_an_error(tmp_path, make_model, config):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "mlp.c_fc.weight" not in name}
    save_file(kept, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="h.0.mlp.c_fc.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", sparsity_config=config)


def test_question_answering_prunes_what_it_loads_or_refuses(dense, config, packed, token_ids):
    """transformers gives Llama with a question answering head another prefix: nothing random is kept."""
    for folder, kwargs in ((dense, {"sparsity_config": config}), (packed, {})):
        try:
            model = AutoModelForQuestionAnswering.from_pretrained(folder, **kwargs)
        except ValueError as error:
            assert "would be random" in str(error)
        else:
            reference = AutoModelForCausalLM.from_pretrained(packed)
            hidden = model.get_decoder()(token_ids)[0], reference.get_decoder()(token_ids)[0]
            assert torch.equal(*hidden)


def test_pipeline(dense, config, packed, tokenizer):
    pruned = pipeline("text-generation", model=str(dense), model_kwargs={"sparsity_config": config})
    assert sparse_modules(pruned.model)
    pruned.model.save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    loaded = pipeline("text-generation", model=str(packed))
    prompt = {"max_new_tokens": 4, "do_sample": False}
    assert loaded("안녕", **prompt) == pruned("안녕", **prompt)


def test_same_settings_load_a_sparse_checkpoint(packed, config, token_ids):
    model = AutoModelForCausalLM.from_pretrained(packed, sparsity_config=config)
    reference = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model, token_ids), logits(reference, token_ids))
    assert model.sparsity_report == reference.sparsity_report


def test_run_time_settings_may_change(packed, token_ids, tmp_path):
    config = SparsityConfig(dataset=token_ids, batch_size=1, storage="dense")
    model = AutoModelForCausalLM.from_pretrained(packed, sparsity_config=config)
    model.save_pretrained(tmp_path / "dense_again")
    assert "quantization_config" not in json.loads((tmp_path / "dense_again" / "config.json").read_text())


def test_other_settings_for_a_sparse_checkpoint_are_an_error(dense, packed, tmp_path, token_ids):
    config = SparsityConfig(dataset=token_ids, storage="dense")
    AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config).save_pretrained(tmp_path / "sparse")
    other = SparsityConfig("sparsegpt", "4:8", dataset=token_ids)
    for folder in (packed, tmp_path / "sparse"):
        with pytest.raises(ValueError, match="method: passed 'sparsegpt', recorded 'admm'.*pattern"):
            AutoModelForCausalLM.from_pretrained(folder, sparsity_config=other)
    weights = load_file(tmp_path / "sparse" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1  # its zeros are lost
    save_file(weights, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", sparsity_config=config)


def test_quantized_and_sharded_loading_are_refused(dense, config, monkeypatch):
    with pytest.raises(ValueError, match="do not go together"):
        quantized = BitsAndBytesConfig(load_in_8bit=True)
        AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config, quantization_config=quantized)
    with pytest.raises(ValueError, match="prune in one process"):
        AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config, tp_plan="auto")
    monkeypatch.setattr("optimum_ksparse.integration.arguments.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="prune in one process"):
        AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config)


def test_zero3_is_refused_for_packed_checkpoints(packed, monkeypatch):
    monkeypatch.setattr("optimum_ksparse.integration.quantizer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_the_wrappers_keep_signature_and_docstring_and_wrap_once():
    for name in ("from_pretrained", "save_pretrained"):
        wrapped = getattr(PreTrainedModel, name)
        register()
        assert getattr(PreTrainedModel, name) == wrapped
        assert wrapped.__doc__
        original = inspect.unwrap(wrapped)
        assert original is not wrapped
        assert inspect.signature(original).parameters.keys() >= {"kwargs"}


def test_other_models_load_from_a_folder_without_a_config(dense, token_ids):
    """With a new head, whose weights are missing from the checkpoint."""
    config = AutoConfig.from_pretrained(dense)
    (dense / "config.json").unlink()
    model = AutoModelForSequenceClassification.from_pretrained(dense, config=config)
    assert not sparse_modules(model)


def test_dequantize_gives_the_class_back(packed, token_ids):
    model = AutoModelForCausalLM.from_pretrained(packed)
    expected = logits(model, token_ids)
    model.dequantize()
    assert not sparse_modules(model)
    assert not hasattr(model.config, "quantization_config")
    assert torch.allclose(logits(model, token_ids), expected, atol=1e-6)


def test_a_model_offloaded_by_accelerate_is_not_pruned(make_model, config):
    import accelerate

    model = make_model()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="prune_checkpoint"):
        sparsify(model, config)


def test_a_sparse_model_with_a_block_on_the_disk(tmp_path, packed, token_ids):
    reference = AutoModelForCausalLM.from_pretrained(packed)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    arguments = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    model = AutoModelForCausalLM.from_pretrained(packed, **arguments)
    assert torch.equal(logits(model, token_ids), logits(reference, token_ids))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, token_ids), logits(reference, token_ids))
    with pytest.raises(ValueError, match="offloaded"):
        model.dequantize()


def multimodal():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**text, "vocab_size": 384, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**text, "hidden_size": 16, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=383,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_the_text_decoder_of_a_multimodal_model(tmp_path, token_ids, storage):
    """Its vision tower has layers of the same names."""
    model = multimodal()
    ids = token_ids.clamp(max=380)
    sparsify(model, SparsityConfig("magnitude", dataset=None, storage=storage))
    assert all("language_model" in name for name in sparse_modules(model))
    model.save_pretrained(tmp_path)
    again = Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    if storage == "packed":
        with pytest.raises(ValueError, match="would be random|were passed over"):
            Gemma3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_an_interrupted_sparsify_gives_the_dense_model_back(
    make_model, config, token_ids, monkeypatch, tmp_path, error
):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune, calls = METHODS[config.method].prune, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 9:
            raise error("now")
        return prune(*args, **kwargs)

    monkeypatch.setitem(METHODS, config.method, dataclasses.replace(METHODS[config.method], prune=interrupted))
    with pytest.raises(error):
        sparsify(model, config, restore_on_error=True)
    assert not sparse_modules(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    calls.clear()
    with pytest.raises(error) as raised:  # by default no dense weight is kept, and what is left cannot be saved
        sparsify(model, config)
    assert "load it again" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="sparse modules"):
        model.save_pretrained(tmp_path)


def test_dense_weights_are_let_go_block_by_block(dense, config, monkeypatch):
    first_block, alive = [], []

    def observe(job, *rest):
        first_block.extend(weakref.ref(linear) for linear in job.targets[0].values())
        return prune_blocks(job, *rest)

    def collect(self, index, *rest):
        alive.append([index, sum(linear() is not None for linear in first_block)])
        return BlockReplay.collect(self, index, *rest)

    monkeypatch.setattr("optimum_ksparse.pruning.plan.prune_blocks", observe)
    observed = type("Observed", (BlockReplay,), {"collect": collect})
    monkeypatch.setattr("optimum_ksparse.pruning.job.BlockReplay", observed)
    AutoModelForCausalLM.from_pretrained(dense, sparsity_config=config)
    assert alive[0] == [0, 7]
    assert alive[1][1] <= 1  # the last layer, which the loop still names


def test_inference_mode_is_refused_before_any_work(make_model, config):
    model = make_model("llama")
    with torch.inference_mode():
        with pytest.raises(ValueError, match="under torch.inference_mode"):
            sparsify(model, config)
        inside = make_model("llama")
    with pytest.raises(ValueError, match="under torch.inference_mode"):
        sparsify(inside, config)
    with torch.no_grad():
        sparsify(model, config)


def test_an_error_of_a_method_names_the_layer(make_model, config, monkeypatch, error=ArithmeticError):
    def fails(*_, **__):
        raise error("the updated weights are too large for torch.float16")

    monkeypatch.setattr("optimum_ksparse.pruning.layer.prune", fails)
    with pytest.raises(error, match="^layers.0.*_proj: the updated weights are too large"):
        sparsify(make_model("llama"), config)


@pytest.mark.slow
def test_a_compiled_model_is_refused(make_model, config):
    model = make_model()
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="prune it first, then compile"):
        sparsify(model, config)


def test_a_damaged_report_does_not_stop_a_model_from_loading(packed):
    (packed / "sparsity_report.json").write_text("{")
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert sparse_modules(model)
    assert not hasattr(model, "sparsity_report")


def test_a_local_folder_is_not_named_in_full(packed, dense):
    for file in ("config.json", "sparsity_report.json"):
        assert str(dense.parent) not in (packed / file).read_text()


@pytest.mark.parametrize("cast", ["half", "double"])
def test_the_casts_of_torch_modules_are_those_of_to(packed, token_ids, cast):
    dtype = {"half": torch.float16, "double": torch.float64}[cast]
    first, second = (AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16) for _ in range(2))
    model, expected = getattr(first, cast)(), second.to(dtype)
    assert model is first and {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {module.weight_mask.dtype for module in sparse_modules(model).values()} == {torch.uint8}
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))


def test_a_loaded_model_is_pickled(packed, token_ids):
    model = AutoModelForCausalLM.from_pretrained(packed)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, token_ids), logits(model, token_ids))


def test_other_quantized_models_are_cast_as_before(make_model):
    model = make_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()
