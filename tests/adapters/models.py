"""Sparse models with adapters that do something: what the tests of PEFT share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra finetune")

from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model

from optimum_ksparse import SparseLinear
from optimum_ksparse.adapters import SparseLoraConfig
from optimum_ksparse.adapters.layers import SparseHiraLinear, SparseLoraLinear

FAMILIES = {
    "llama": ["q_proj", "up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
METHODS = {
    "lora": lambda **settings: LoraConfig(r=4, **settings),
    "rslora": lambda **settings: LoraConfig(r=4, use_rslora=True, **settings),
    "dora": lambda **settings: LoraConfig(r=4, use_dora=True, **settings),
    "masked": lambda **settings: SparseLoraConfig(r=4, masked=True, **settings),
    "hira": lambda **settings: HiraConfig(r=4, **settings),
}


def adapted(model, method, name="llama", seed=0, adapter="default", **settings):
    """The model with an adapter that does something."""
    settings = {"target_modules": FAMILIES[name], "task_type": "CAUSAL_LM", **settings}
    config = METHODS[method](**settings)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
    else:
        model = get_peft_model(model, config, adapter)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name and ("lora_" in name or "hira_" in name):
                parameter.mul_(1.2) if "magnitude" in name else parameter.normal_(std=0.3)
    return model


def trained(model):
    """Names and gradients of what is trained."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


def wrapped(model):
    return [module for module in model.modules() if isinstance(module, SparseLoraLinear | SparseHiraLinear)]


def state(model):
    """Packed values and masks of all sparse layers."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return [(layer.weight.detach().clone(), layer.weight_mask.clone()) for layer in layers]


def same(first, second):
    return all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )
