"""What PEFT refuses and counts on sparse models, and how adapters are saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_ksparse import Pattern
from optimum_ksparse.nn import SparseExperts

from ..conftest import REPOSITORY, thinned
from .models import adapted, logits, trained, wrapped

peft = pytest.importorskip("peft", reason="needs the extra finetune")
mapping = pytest.importorskip("peft.mapping")
lora = pytest.importorskip("peft.tuners.lora.config")

# Of what the smallest config does not tell: settings; and those that do not wrap modules by their name.
SETTINGS = {"ADALORA": {"total_step": 5}}
WITHOUT_TARGETS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "XLORA",
}
REFUSED = sorted(kind.value for kind in mapping.PEFT_TYPE_TO_TUNER_MAPPING if kind.value not in {"LORA", "HIRA"})
REFUSED = [kind for kind in REFUSED if kind not in WITHOUT_TARGETS]


def make_config(kind, **settings):
    config = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(config)}
    settings = {"target_modules": ["lm_head", "q_proj"], "feedforward_modules": []} | SETTINGS.get(kind, {}) | settings
    return config(task_type="CAUSAL_LM", **{name: value for name, value in settings.items() if name in names})


def modules(model):
    return {name: type(module) for name, module in model.named_modules()}


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_tuners_are_refused_by_name_and_change_nothing(make_pruned, token_ids):
    model = make_pruned()
    before, expected = modules(model), logits(model, token_ids)
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(REFUSED) > 20
    for kind in REFUSED:
        with pytest.raises(TypeError, match=f"^{kind} .*q_proj"):
            peft.get_peft_model(model, make_config(kind))
        assert modules(model) == before
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert torch.equal(logits(model, token_ids), expected)


def test_every_tuner_of_peft_is_in_one_of_the_lists():
    assert not WITHOUT_TARGETS - {kind.value for kind in mapping.PEFT_TYPE_TO_TUNER_MAPPING}
    for kind in WITHOUT_TARGETS:
        names = {field.name for field in dataclasses.fields(mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        assert "target_modules" not in names or kind == "ADAPTION_PROMPT", kind


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IA3", {"target_modules": ["lm_head"]}),
        ("LOHA", {"target_modules": ["lm_head"]}),
        ("LN_TUNING", {"target_modules": None}),
        ("TRAINABLE_TOKENS", {"target_modules": None, "token_indices": [3]}),
        ("PROMPT_TUNING", {"num_virtual_tokens": 2}),
        ("PREFIX_TUNING", {"num_virtual_tokens": 2}),
        ("ADAPTION_PROMPT", {"target_modules": None, "adapter_len": 2, "adapter_layers": 1}),
    ],
)
def test_tuners_that_touch_no_sparse_layer_work(make_pruned, token_ids, kind, settings):
    config = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(config)}
    settings = {"task_type": "CAUSAL_LM", "feedforward_modules": [], **settings}
    model = peft.get_peft_model(make_pruned(), config(**{k: v for k, v in settings.items() if k in names}))
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert trained(model)
    assert all(grad is not None for grad in trained(model).values())


def test_what_lora_cannot_do_without_a_dense_weight(make_pruned):
    model = make_pruned()
    before = modules(model)
    inits = ("pissa", "pissa_niter_2", "olora", "corda", "lora_ga", "mica")
    for settings, name in (
        *(({"init_lora_weights": init}, "init_lora_weights") for init in inits),
        ({"use_bdlora": lora.BdLoraConfig()}, "use_bdlora"),
        ({"monteclora_config": lora.MontecloraConfig()}, "monteclora_config"),
        ({"kasa_config": lora.KasaConfig()}, "kasa_config"),
        ({"arrow_config": lora.ArrowConfig()}, "arrow_config"),
        ({"use_qalora": True}, "use_qalora"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*layers.0.self_attn.q_proj"):
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], **settings))
        assert modules(model) == before
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"velora_config": lora.VeloraConfig(num_groups=4)},
        {"alora_invocation_tokens": [5, 6]},
    ],
)
def test_what_lora_can_do(make_pruned, token_ids, settings):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(make_pruned(), config).train()
    ids = token_ids.clone()
    ids[:, 4:6] = torch.tensor([5, 6])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(grad is not None for grad in trained(model).values())
    if "alora_invocation_tokens" in settings:
        with pytest.raises(NotImplementedError, match="acts on some tokens only"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        assert wrapped(model)[0].get_base_layer().density == 0.5


@pytest.mark.slow
def test_eva(make_pruned, token_ids):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    model = peft.get_peft_model(make_pruned(), config)
    data = [{"input_ids": ids[None]} for ids in token_ids]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    rows = next(layer.lora_A["default"].weight for layer in wrapped(model))
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)


def test_targets_that_are_not_there(make_pruned):
    with pytest.raises(ValueError, match=r"Target modules \{'nothing'\} not found in the base model"):
        peft.get_peft_model(make_pruned(), peft.LoraConfig(target_modules=["nothing"]))


def test_a_second_adapter_that_is_refused_leaves_the_first(make_pruned, token_ids):
    model = adapted(make_pruned(), "lora")
    expected = logits(model, token_ids)
    refused = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="pissa"):
        model.add_adapter("second", refused)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, token_ids), expected)
    mixed = peft.get_peft_model(make_pruned(), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(TypeError, match="^LOHA"):
        mixed.add_adapter("second", peft.LoHaConfig(target_modules=["up_proj"]))
    model = make_pruned()
    with pytest.raises(TypeError, match="^IA3"):
        model.add_adapter(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        weight = torch.randn(2, 4, 8)
        self.gate_up_proj = SparseExperts.from_dense(weight, weight > weight.median(-1, keepdim=True).values, PATTERN)
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.other(x), self.gate_up_proj[0])


PATTERN = Pattern("50%")


@pytest.mark.parametrize("target", ["gate_up_proj", "gate_up_proj.weight"])
def test_experts(target):
    with pytest.raises(TypeError, match=rf"target_parameters='{target}' .* is gate_up_proj, a SparseExperts"):
        peft.get_peft_model(Experts(), peft.LoraConfig(target_modules=[], target_parameters=[target]))
    with pytest.raises(TypeError, match="cannot adapt gate_up_proj, a SparseExperts"):
        peft.get_peft_model(Experts(), peft.LoraConfig(target_modules=["gate_up_proj"]))
    with pytest.raises(TypeError, match="^LOHA .* cannot adapt gate_up_proj, .* sparse layer .SparseExperts"):
        peft.get_peft_model(Experts(), peft.LoHaConfig(target_modules=["gate_up_proj"]))
    model = peft.get_peft_model(Experts(), peft.LoraConfig(target_modules=["other"]))
    assert model.get_nb_trainable_parameters() == (128, 128 + 64 + 72)


def test_masked_needs_a_sparse_target(make_pruned, make_model):
    from optimum_ksparse.adapters import SparseLoraConfig

    for model, target in ((make_pruned(), "lm_head"), (make_model(), "q_proj")):
        before = modules(model)
        with pytest.raises(ValueError, match="masked=True, but no sparse layer is targeted"):
            peft.get_peft_model(model, SparseLoraConfig(target_modules=[target], masked=True))
        assert modules(model) == before
    peft.get_peft_model(make_pruned(), SparseLoraConfig(target_modules=["lm_head", "q_proj"], masked=True))


def test_masked_does_not_go_with_other_variants():
    from optimum_ksparse.adapters import SparseLoraConfig

    with pytest.raises(ValueError, match="masked=True goes with LoRA and rsLoRA, not together with use_dora"):
        SparseLoraConfig(masked=True, use_dora=True)
    with pytest.raises(ValueError, match="not together with target_parameters"):
        SparseLoraConfig(masked=True, target_parameters=["experts.weight"])
    with pytest.raises(TypeError, match="masked must be True or False, found 'yes'"):
        SparseLoraConfig(masked="yes")


# --- Counts ----------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_as_those_of_the_dense_model(make_pruned, name="gpt2"):
    config = peft.LoraConfig(target_modules="all-linear", r=2)
    sparse = peft.get_peft_model(make_pruned(name, "50%"), config)
    dense = peft.get_peft_model(make_pruned(name, "50%").dequantize(), copy.deepcopy(config))
    assert sparse.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()


# --- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_pruned, tmp_path):
    make_pruned().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("method", thinned(["dora", "masked", "hira"], ["masked"]))
def test_adapters_are_saved_and_loaded(folder, tmp_path, token_ids, method):
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), method).eval()
    expected, adapter = logits(model, token_ids), tmp_path / "adapter"
    model.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert ("masked" in settings) == (method == "masked")
    base = AutoModelForCausalLM.from_pretrained
    inside = base(folder)
    inside.load_adapter(str(adapter))
    for again in (
        peft.PeftModel.from_pretrained(base(folder), adapter),
        peft.PeftModel.from_pretrained(base(folder), adapter, low_cpu_mem_usage=True),
        peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
        base(adapter),
        inside,
    ):
        assert len(wrapped(again)) == len(wrapped(model))
        torch.testing.assert_close(logits(again, token_ids), expected)
        if method == "masked":
            assert all(layer.is_masked("default") for layer in wrapped(again))


FRESH = """
import sys, optimum_ksparse
assert "peft" not in sys.modules
{first}
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
layer = model.base_model.model.model.layers[0].self_attn.q_proj
print(type(layer).__name__, layer.is_masked("default"))
"""


@pytest.mark.processes
@pytest.mark.parametrize("first", ["", "from optimum_ksparse.adapters import SparseLoraConfig"], ids=["peft", "ours"])
def test_a_masked_adapter_in_a_fresh_process(folder, tmp_path, first):
    """`AutoPeftModel` reads the adapter's settings before a sparse layer is made; either may import PEFT."""
    adapted(AutoModelForCausalLM.from_pretrained(folder), "masked").save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH.format(first=first), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["SparseLoraLinear", "True"], done.stderr


def test_settings_that_have_lost_that_an_adapter_is_masked(folder, tmp_path):
    """As PEFT reads them in a process into which the package comes with the base."""
    adapted(AutoModelForCausalLM.from_pretrained(folder), "masked").save_pretrained(tmp_path / "adapter")
    read = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    plain = peft.LoraConfig(task_type="CAUSAL_LM", r=read.r, target_modules=read.target_modules)
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="masked"):
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=plain)


def test_an_adapter_of_another_model(make_pruned, make_model, tmp_path):
    wide = make_model("llama", intermediate_size=96, num_hidden_layers=3)
    peft.get_peft_model(wide, peft.LoraConfig(target_modules=["up_proj"], r=2)).save_pretrained(tmp_path / "wide")
    with pytest.raises(RuntimeError, match="layers.0.mlp.up_proj.lora_B"):
        peft.PeftModel.from_pretrained(make_pruned(), tmp_path / "wide")
    for name, depth in (("deep", 3), ("small", 1)):
        other = make_model("llama", num_hidden_layers=depth)
        peft.get_peft_model(other, peft.LoraConfig(target_modules=["up_proj"], r=2)).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=rf"layers.{min(depth - 1, 2) or 1}.mlp.up_proj.lora_A"):
            peft.PeftModel.from_pretrained(make_pruned(), tmp_path / name)
    # With modules that are saved whole, and on a dense model, PEFT does as it does.
    config = peft.LoraConfig(target_modules=["up_proj"], r=2, modules_to_save=["lm_head", "down_proj"])
    peft.get_peft_model(make_pruned(), config).save_pretrained(tmp_path / "whole")
    peft.PeftModel.from_pretrained(make_pruned(), tmp_path / "whole")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(make_model(), tmp_path / "small")


def test_an_adapter_from_the_hub(hub, folder, tmp_path, token_ids):
    hub.add_repo("user/sparse", {path.name: path.read_bytes() for path in folder.iterdir()})
    model = adapted(AutoModelForCausalLM.from_pretrained("user/sparse"), "masked").eval()
    model.push_to_hub("user/adapter", tokenizer=False)
    for load in (
        AutoModelForCausalLM.from_pretrained,
        peft.AutoPeftModelForCausalLM.from_pretrained,
        lambda name: peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/sparse"), name),
    ):
        again = load("user/adapter").eval()
        assert all(layer.is_masked("default") for layer in wrapped(again))
        torch.testing.assert_close(logits(again, token_ids), logits(model, token_ids))


def test_plain_adapters_stay_plain(make_pruned, tmp_path):
    """An adapter that is not masked is one for plain PEFT, which warns of settings that it does not know."""
    adapted(make_pruned(), "lora").save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(make_pruned(), tmp_path).save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.LoraConfig.from_pretrained(tmp_path / "again")
