"""How LoRA's variants compute over a packed weight: with a masked delta, DoRA and aLoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer, cache_decorator
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import nn

from ..kernels import PackedWeight
from ..nn import SparseLinear, masked_linear, row_norms


def onloaded(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor of a module, wherever accelerate has offloaded it: only the module's own forward pass brings it in."""
    tensor: torch.Tensor = getattr(module, name)
    hook: Any = getattr(module, "_hf_hook", None)
    if tensor.is_meta and getattr(hook, "offload", False):
        return hook.weights_map[name].to(hook.execution_device)
    return tensor


def packed_weight(base: SparseLinear, device: torch.device | None = None) -> PackedWeight:
    """The packed weight of a sparse layer, all of it on one device: that of the values, or another. Gradients reach
    the values."""
    values, scale = onloaded(base, "weight"), None if base.weight_scale is None else onloaded(base, "weight_scale")
    weight = base.packed()._replace(values=values, bits=onloaded(base, "weight_mask"), scale=scale)
    return weight.to(values.device if device is None else device)


class MaskedVariant(LoraVariant):
    """y = x·(W + s·(B·A)∘M)ᵀ. Merging is the layer's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Has no state of its own."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Adds the masked delta's product, and LoRA's bias, to the base layer's output."""
        lora_b = module.lora_B[active_adapter]
        a, b = onloaded(module.lora_A[active_adapter], "weight"), onloaded(lora_b, "weight")
        scaling = float(module.scaling[active_adapter])
        bits = packed_weight(module.get_base_layer(), x.device).bits
        dropped = module.lora_dropout[active_adapter](x)
        result = result + masked_linear(dropped, a, b, bits, scaling)
        return result if lora_b.bias is None else result + onloaded(lora_b, "bias") * scaling


class SparseDoraLayer(DoraLinearLayer):
    """The magnitudes of DoRA over a packed weight. The norms of rows, which PEFT takes from the dense sum of weight
    and delta, come from a few dense rows at a time."""

    @cache_decorator("weight-norm")
    def get_weight_norm(
        self,
        base_layer: SparseLinear,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        adapter_name: str | None = None,
    ) -> torch.Tensor:
        """‖W + s·B·A‖₂ of each row, [out], in the dtype of A."""
        return row_norms(packed_weight(base_layer, lora_a.device), lora_a.detach(), lora_b.detach(), scaling)

    def update_layer(
        self,
        *,
        base_layer: SparseLinear,
        lora_A: torch.Tensor,  # noqa: N803
        lora_B: torch.Tensor,  # noqa: N803
        scaling: float,
        place_on_cpu: bool = False,
    ) -> None:
        """Sets the magnitudes to what they are before training."""
        if lora_A.is_meta or (base_layer.weight.is_meta and not hasattr(base_layer, "_hf_hook")):
            norm = lora_A.new_empty(base_layer.out_features)
        else:
            norm = self.get_weight_norm(base_layer, lora_A, lora_B, float(scaling))
        self.weight = nn.Parameter(norm.cpu() if place_on_cpu else norm, requires_grad=True)


class SparseDoraVariant(DoraLinearVariant):
    """DoRA with magnitudes of packed weights. Merging is the layer's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Adds the magnitudes of an adapter."""
        magnitudes = SparseDoraLayer(fan_in_fan_out=False)
        magnitudes.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = magnitudes

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As in PEFT; the norm is a constant to the gradient (section 4.3 of https://arxiv.org/abs/2402.09353)."""
        base, scaling = module.get_base_layer(), float(module.scaling[active_adapter])
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitudes, dropout = module.lora_magnitude_vector[active_adapter], module.lora_dropout[active_adapter]
        base_result = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base_result = base(x.to(base.dtype))
        if base.bias is not None:
            base_result = base_result - onloaded(base, "bias")
        a, b = onloaded(lora_a, "weight"), onloaded(lora_b, "weight")
        norm = magnitudes.get_weight_norm(base, a, b, scaling, adapter_name=active_adapter)
        scale = onloaded(magnitudes, "weight") / norm
        return result + (scale - 1) * base_result + scale * lora_b(lora_a(x)) * scaling


class SparseAloraVariant(ALoraLinearVariant):
    """aLoRA writes into the base layer's output: into a copy here, as autograd needs it of what an operator gives."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As in PEFT."""
        return ALoraLinearVariant.forward(module, active_adapter, x, result.clone(), **kwargs)
