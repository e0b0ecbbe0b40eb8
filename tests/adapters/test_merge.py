"""Merging adapters into sparse weights: what stays to the bit, what comes nearer, what is refused, what is undone."""
# ruff: noqa: E402  (without PEFT these tests are skipped)

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="needs the extra finetune")

from peft import HiraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from optimum_ksparse import SparsityConfig, merge_adapter, sparsify
from optimum_ksparse.adapters import MergeReport, SparseLoraConfig, blocks
from optimum_ksparse.adapters.adapted import adapted_layers
from optimum_ksparse.adapters.masks import mask_digest, mismatch, read_record
from optimum_ksparse.checkpoint import sparse_layers
from optimum_ksparse.commands import parse_words
from optimum_ksparse.evaluation import EvaluationResults
from optimum_ksparse.records import MASKS_NAME

from ..conftest import CONTEXT, VOCABULARY, sample_texts, thinned

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="peft")

# Enough tokens for layers of 64 inputs.
IDS = torch.randint(3, VOCABULARY, (24, 24), generator=torch.Generator().manual_seed(5))


def randomise(model, scale=0.05, seed=1):
    """Trained adapters: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hira_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data = (parameter.data + noise if "magnitude" in name else noise).to(parameter.dtype)
    return model.eval()


@pytest.fixture
def adapted(make_model):
    """Makes a sparse model with a random adapter on all its linear maps."""

    def make(name="llama", pattern="2:4", config=None, dtype=torch.float32, seed=1, **overrides):
        model = make_model(name, dtype, **overrides)
        sparsify(model, SparsityConfig("magnitude", pattern, dataset=None))
        model.ksparse.results = EvaluationResults("of other weights")
        config = LoraConfig(r=4, target_modules="all-linear") if config is None else config
        return randomise(get_peft_model(model, config), seed=seed)

    return make


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits.float()


def distance(model, expected):
    return float((logits(model) - expected).norm() / expected.norm())


def packed(model):
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.removesuffix(".base_layer"): (layer.weight.detach().clone(), layer.weight_mask.clone(), layer.pattern)
        for name, layer in sparse_layers(plain).items()
    }


def check_same_masks(before, model):
    after = packed(model)
    assert list(after) == list(before)
    for name, (values, bits, pattern) in after.items():
        assert torch.equal(bits, before[name][1]) and values.shape == before[name][0].shape, name
        assert values.dtype == before[name][0].dtype and pattern == before[name][2]
        dense = sparse_layers(model)[name].to_dense_weight()
        pattern.verify(dense, name)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert model.ksparse.results is None and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    thinned(
        [("llama", "50%", torch.bfloat16), ("gpt_neox", "4:8", torch.float32), ("gpt2", "2:4", torch.float32)],
        ["gpt2"],
    ),
)
def test_masks_stay_and_solving_comes_nearer(adapted, name, pattern, dtype):
    expected = logits(adapted(name, pattern, dtype=dtype))
    reports, distances = {}, {}
    for method in ("masked", "solve"):
        model = adapted(name, pattern, dtype=dtype)
        before = packed(model)
        merged = merge_adapter(model, method=method, dataset=IDS, batch_size=7)
        check_same_masks(before, merged)
        assert any(not torch.equal(values, before[layer][0]) for layer, (values, _, _) in packed(merged).items())
        reports[method], distances[method] = merged.ksparse.merge, distance(merged, expected)
        assert merged.ksparse.merge.calibration["num_samples"] == 24
        assert merged.sparsity_report.density == pytest.approx(merged.ksparse.merge.totals()["density"])
    assert distances["solve"] < 0.85 * distances["masked"]
    for masked, solved in zip(reports["masked"].layers, reports["solve"].layers, strict=True):
        assert masked.name == solved.name and masked.num_values == solved.num_values
        assert (masked.how, solved.how) == ("masked", "solved")
        assert solved.relative_output_error < masked.relative_output_error, masked.name
        assert 0.3 < masked.discarded < 1


def test_masked_is_the_weight_and_the_delta_at_the_mask(adapted):
    model = adapted()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    wanted = layer.effective_weight(["default"])
    merged = merge_adapter(model)
    sparse = merged.model.layers[1].mlp.up_proj
    dense = sparse.to_dense_weight()
    kept = dense != 0
    assert kept.sum() == sparse.weight.numel()
    torch.testing.assert_close(dense[kept], wanted[kept])
    row = merged.ksparse.merge.layers[-2]
    assert (row.name, row.relative_output_error) == ("layers.1.mlp.up_proj", None)
    assert "not measured" in str(merged.ksparse.merge)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (HiraConfig(r=4, target_modules="all-linear"), "solve"),
        (SparseLoraConfig(r=4, target_modules="all-linear", masked=True), "masked"),
    ],
    ids=["hira", "masked"],
)
def test_hira_and_masked_lora_are_exact(adapted, config, method):
    model = adapted("gpt_neox", "50%", config)
    before, expected = packed(model), logits(model)
    with model.disable_adapter():
        assert distance(model, expected) > 1e-4
    merged = merge_adapter(model, method=method, dataset=IDS)
    check_same_masks(before, merged)
    assert distance(merged, expected) < 1e-6
    for row in merged.ksparse.merge.layers:
        assert row.how == "exact" and row.discarded == 0 and row.relative_output_error < 1e-6
    assert "nothing to solve" in str(merged.ksparse.merge)


def test_dora(adapted):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    expected = logits(adapted(config=config))
    model = adapted(config=config)
    before = packed(model)
    merged = merge_adapter(model, method="solve", dataset=IDS)
    check_same_masks(before, merged)
    assert distance(merged, expected) < distance(merge_adapter(adapted(config=config)), expected)
    assert {row.name.split(".")[-1] for row in merged.ksparse.merge.layers} == {"q_proj", "down_proj"}
    assert merged.ksparse.merge.adapters[0]["use_dora"] is True


@pytest.mark.slow
def test_several_adapters(adapted):
    names = ["default", "other"]

    def make():
        model = adapted()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
        return randomise(model, seed=2)

    model = make()
    model.base_model.set_adapter(names)
    expected = logits(model)
    model, plain = make(), make()
    before = packed(model)
    merged = merge_adapter(model, method="solve", adapter_names=names, dataset=IDS)
    check_same_masks(before, merged)
    assert distance(merged, expected) < distance(merge_adapter(plain, adapter_names=names), expected)
    assert [entry["name"] for entry in merged.ksparse.merge.adapters] == names
    assert len(merged.ksparse.merge.layers) == 14


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers_and_modules_to_save(make_model, tied):
    model = make_model("llama", tie_word_embeddings=tied)
    sparsify(model, SparsityConfig("magnitude", "2:4", dataset=None, modules_to_not_convert=["o_proj"]))
    config = SparseLoraConfig(
        r=4, target_modules=["o_proj", "q_proj", "lm_head"], modules_to_save=["norm"], masked=False
    )
    peft_model = randomise(get_peft_model(model, config))
    peft_model.get_base_model().model.norm.modules_to_save["default"].weight.data.mul_(1.5)
    expected, embeddings = logits(peft_model), model.get_input_embeddings().weight.detach().clone()
    merged = merge_adapter(peft_model, method="solve", dataset=IDS)
    outputs = [f"model.layers.{index}.self_attn.o_proj" for index in range(2)]
    assert merged.ksparse.merge.dense_layers == [*outputs, "lm_head"]
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    assert float(merged.model.norm.weight.detach().mean()) == pytest.approx(1.5)
    assert distance(merged, expected) < 0.05


@pytest.mark.slow
def test_saved_and_loaded_again(adapted, tmp_path):
    model = adapted(pattern="4:8")
    merged = merge_adapter(model, method="solve", dataset=IDS)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    check_same_masks(packed(merged), again)
    assert again.ksparse.merge == merged.ksparse.merge
    assert again.sparsity_report == merged.sparsity_report
    sparsified = adapted(pattern="4:8").unload()
    sparsified.ksparse.results = None
    sparsified.save_pretrained(tmp_path)  # what was merged before is not there any more
    assert not (tmp_path / "merge_report.json").exists()
    (tmp_path / "merge_report.json").write_text("{}")
    with pytest.raises(ValueError, match="report of merging"):
        MergeReport.load(tmp_path / "merge_report.json")


def _with_nan(model):
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan


def _other_mask(model):
    for layer in adapted_layers(model, ["default"]).values():
        layer.refused_merges["default"] = "trained over other masks: 'another'"


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (None, {"method": "exact"}, ValueError, "method='exact'.*masked, solve"),
        (None, {"method": "solve"}, ValueError, "needs calibration text"),
        (None, {"adapter_names": ["none"]}, ValueError, "no adapter 'none'.*default"),
        (None, {"adapter_names": "default"}, TypeError, "list of names"),
        (None, {"adapter_names": []}, ValueError, "adapter_names"),
        (None, {"method": "solve", "dataset": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
        (None, {"method": "solve", "dataset": ["text"]}, ValueError, "tokenizer"),
        (None, {"method": "solve", "dataset": IDS + VOCABULARY}, ValueError, "vocabulary"),
        (None, {"dataset": IDS, "batch_size": 0}, ValueError, "batch_size"),
        (None, {"method_settings": {"damping": -1}}, ValueError, "damping"),
        (None, {"method_settings": {"tolerance": "x"}}, TypeError, "tolerance"),
        (None, {"method_settings": {"max_steps": 0}}, ValueError, "max_steps"),
        (_with_nan, {}, ValueError, "lora_B.*NaN"),
        (_other_mask, {}, ValueError, "other masks.*'another'"),
        (lambda model: model.merge_adapter(), {}, ValueError, "merged into it already"),
        (merge_adapter, {}, ValueError, "merged or unloaded before"),
        (lambda model: model.unload(), {}, ValueError, "merged or unloaded before"),
    ],
)
def test_what_is_refused_changes_nothing(adapted, change, arguments, error, message):
    model = adapted(num_hidden_layers=1)
    if change is not None:
        change(model)
    before = packed(model)
    with pytest.raises(error, match=message):
        merge_adapter(model, **arguments)
    for name, (values, bits, _) in packed(model).items():
        assert torch.equal(values, before[name][0]) and torch.equal(bits, before[name][1])


def test_what_is_no_adapter_is_refused(adapted, make_model):
    sparse = adapted().unload()
    with pytest.raises(TypeError, match="PeftModel.from_pretrained"):
        merge_adapter(sparse)
    dense = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="dense: peft_model.merge_and_unload"):
        merge_adapter(dense)
    prompt = get_peft_model(sparse, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING.*cannot be merged"):
        merge_adapter(prompt)
    tokens = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="some tokens only"):
        merge_adapter(adapted(config=tokens))


@pytest.mark.parametrize("where", thinned(["second block", "dense", "unload", "end"], ["second block", "end"]))
def test_an_interrupted_merge_is_undone(make_model, monkeypatch, where):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude", "2:4", dataset=None))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], modules_to_save=["norm"])
    peft_model = randomise(get_peft_model(model, config)).train()
    peft_model.add_adapter("unused", LoraConfig(r=2, target_modules=["q_proj"]))
    modes = [module.training for module in peft_model.modules()]
    trains = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    before, expected = packed(peft_model), logits(peft_model)
    state = {name: tensor.clone() for name, tensor in peft_model.state_dict().items()}
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if where != "second block" or len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = blocks.solve_on_mask
    if where == "dense":
        monkeypatch.setattr(peft.tuners.lora.Linear, "merge", interrupt)
    elif where == "unload":
        unload = type(peft_model.base_model).unload
        monkeypatch.setattr(type(peft_model.base_model), "unload", lambda self: (unload(self), interrupt()))
    elif where == "end":
        monkeypatch.setattr("optimum_ksparse.adapters.merge.library_versions", interrupt)
    else:
        monkeypatch.setattr(blocks, "solve_on_mask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(peft_model, method="solve", adapter_names=["default"], dataset=IDS)
    monkeypatch.undo()
    assert calls
    assert all(torch.equal(values, before[name][0]) for name, (values, _, _) in packed(peft_model).items())
    assert {name: tensor.shape for name, tensor in peft_model.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in peft_model.state_dict().items())
    assert [module.training for module in peft_model.modules()] == modes
    assert [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad] == trains
    assert torch.equal(logits(peft_model), expected)
    check_same_masks(before, merge_adapter(peft_model.eval(), method="solve", dataset=IDS))


def test_an_adapter_remembers_its_masks(adapted, make_model, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / MASKS_NAME).read_text())
    assert record["mask_sha256"] == mask_digest(model) == mask_digest(adapted(seed=7).unload())
    assert mismatch(model, read_record(tmp_path / "adapter"), "adapter") is None
    other = make_model("llama")
    sparsify(other, SparsityConfig("wanda", "2:4", dataset=IDS))
    assert "other masks" in mismatch(other, read_record(tmp_path / "adapter"), "adapter")
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match="other masks"):
        merge_adapter(loaded)
    (tmp_path / "adapter" / MASKS_NAME).unlink()  # as plain PEFT would save it
    merge_adapter(PeftModel.from_pretrained(loaded.unload(), tmp_path / "adapter"))
    assert mask_digest(make_model("llama")) is None


def run(*arguments):
    if status := parse_words(["merge", *map(str, arguments)]).run():
        raise SystemExit(status)


@pytest.fixture
def folders(adapted, tokenizer, tmp_path):
    """A sparse base, and an adapter on it that names it."""
    base = adapted().unload()
    base.ksparse.results = None
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    randomise(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.mark.slow
def test_a_merged_model_in_the_place_of_its_adapter(folders, token_ids):
    before = {path.name: path.read_bytes() for path in (folders / "adapter").iterdir()}
    with pytest.raises(SystemExit):
        run(folders / "adapter", folders / "adapter", "--base", folders / "base")
    assert {path.name: path.read_bytes() for path in (folders / "adapter").iterdir()} == before
    run(folders / "adapter", folders / "apart", "--base", folders / "base")
    run(folders / "adapter", folders / "adapter", "--base", folders / "base", "--overwrite")
    merged = [AutoModelForCausalLM.from_pretrained(folders / name) for name in ("adapter", "apart")]
    assert torch.equal(*(logits(model, token_ids) for model in merged))


def test_texts_are_cut_to_the_context_of_a_model_where_that_is_short(adapted, tokenizer, tmp_path):
    model = adapted()
    tokenizer.save_pretrained(tmp_path)
    model.get_base_model().config.name_or_path = model.get_base_model().name_or_path = str(tmp_path)
    merged = merge_adapter(model, method="solve", dataset=sample_texts("calibration") * 8)
    assert merged.ksparse.merge.calibration["seq_len"] == CONTEXT


@pytest.mark.slow
def test_the_command(folders, tokenizer, capsys):
    text = "\n\n".join(sample_texts("calibration"))
    (folders / "text.txt").write_text(text, encoding="utf-8")
    flags = ("--method", "solve", "--dataset", folders / "text.txt", "--num-samples", "32", "--seq-len", "24")
    run(folders / "adapter", folders / "merged", "--base", folders / "base", *flags)
    printed = capsys.readouterr().out
    assert "14 sparse layers (14 solved), density 0.5000" in printed and "worst" in printed
    names = {path.name for path in (folders / "merged").iterdir()}
    assert {"model.safetensors", "merge_report.json", "sparsity_report.json", "tokenizer.json"} <= names
    assert not any(name.startswith((".", "adapter")) for name in names)
    merged = AutoModelForCausalLM.from_pretrained(folders / "merged")
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 24 * 24]).view(24, 24)
    without = logits(base, ids)
    expected = logits(PeftModel.from_pretrained(base, folders / "adapter"), ids)
    assert (logits(merged, ids) - expected).norm() < (without - expected).norm()
    assert merged.ksparse.merge.adapters[0]["base_model"] == "base"


def test_the_command_refuses_in_one_line(folders, make_model, capsys):
    make_model("llama").save_pretrained(folders / "dense")
    sparse = make_model("gpt_neox")
    sparsify(sparse, SparsityConfig("magnitude", "2:4", dataset=None))
    sparse.save_pretrained(folders / "other")
    for arguments, message in (
        (("adapter",), "output is missing"),
        (("adapter", "out", "--base", folders / "base", "--method", "solve"), "needs calibration text"),
        (("adapter", "out"), "names no base model on the Hub"),  # its folder is not opened
        (("adapter", "out", "--base", folders / "dense"), "is no sparse model"),
        (("adapter", "out", "--base", folders / "other"), "error:"),
        (("nothing", "out"), "error:"),
    ):
        paths = [folders / name if name in ("adapter", "out", "nothing") else name for name in arguments]
        with pytest.raises(SystemExit) as stopped:
            run(*paths)
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == (2 if message == "output is missing" else 1) and message in shown
        assert not (folders / "out").exists()


def test_the_bias_of_an_adapter_is_in_what_later_layers_are_solved_for(make_model, token_ids):
    model = make_model("gpt_neox")
    sparsify(model, SparsityConfig("magnitude"))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["dense"], bias="none", lora_bias=True))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5 if name.endswith("bias") else 0.02)
    unmerged = peft_model(token_ids).logits
    merged = merge_adapter(peft_model, method="solve", dataset=token_ids)
    assert (merged(token_ids).logits - unmerged).norm() < 0.1 * unmerged.norm()
    assert max(row.relative_output_error for row in merged.ksparse.merge.layers) < 0.2


def test_other_masks_are_refused_by_every_way_to_merge(make_model, token_ids, tmp_path, caplog):
    def sparse(pattern):
        model = make_model("llama")
        sparsify(model, SparsityConfig("magnitude", pattern))
        return model

    get_peft_model(sparse("2:4"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse("4:8"), tmp_path)
    for merge in (loaded.merge_and_unload, loaded.merge_adapter, lambda: merge_adapter(loaded)):
        with pytest.raises(ValueError, match="trained over other masks"):
            merge()
    loaded.unload()  # without the adapter there is nothing to refuse
    loaded = PeftModel.from_pretrained(sparse("4:8"), tmp_path)
    loaded.delete_adapter("default")
    loaded.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))  # another one of the same name
    loaded.set_adapter("default")
    merge_adapter(loaded)


def test_what_transformers_saves_of_an_adapter_knows_its_masks(make_model, tmp_path):
    model = make_model("llama")
    sparsify(model, SparsityConfig("magnitude"))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "ksparse_adapter.json").is_file() and not (tmp_path / "config.json").exists()


def test_an_adapter_that_is_merged_elsewhere_is_not_merged_along(make_model):
    model = make_model("gpt_neox")
    sparsify(model, SparsityConfig("magnitude"))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["dense"]), adapter_name="a")
    peft_model.add_adapter("b", LoraConfig(r=2, target_modules=["dense_4h_to_h"]))
    peft_model.base_model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="b is merged into it already"):
        merge_adapter(peft_model, adapter_names=["a"])
