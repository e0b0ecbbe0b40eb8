"""What vLLM calls: the settings of a packed checkpoint, and the tensors that its models load."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import DefaultModelLoader

from ..config import QUANT_METHOD, SparsityConfig
from .method import SparseLinearMethod
from .weights import dense_weights, recorded_name

_load_tensors = DefaultModelLoader.get_all_weights
# Whose modules store the transpose of what vLLM's layers hold.
_CONV1D_MODELS = ("gpt2",)


class ServingConfig(QuantizationConfig):
    """The sparse layers of a packed checkpoint.

    Attributes:
        layers: what the checkpoint records of them: path in the decoder → pattern and number of values.
        quantisation: that of the checkpoint's `SparsityConfig`.
        in_features: of those that vLLM's model has; several where another tower of it has layers of the same name.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], quantisation: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.layers, self.quantisation = layers, quantisation or {}
        self.in_features: dict[str, set[int]] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServingConfig:
        settings = SparsityConfig.from_dict(dict(config))
        if settings.layers is None:
            raise ValueError("quantization_config of the checkpoint records no `layers`: nothing says what is sparse")
        return cls(settings.layers, settings.quantisation)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear layer; None for others: embeddings, heads and attention stay vLLM's."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, merged = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(merged, [merged])
        records = [recorded_name(f"{parent}.{name}", self.layers) for name in names]
        return SparseLinearMethod(self, records) if any(records) else UnquantizedLinearMethod()

    def check_layers(self) -> None:
        """Raises ValueError where vLLM's model has no linear layer for one of the checkpoint's: it would be dense."""
        missing = self.layers.keys() - self.in_features.keys()
        if missing and get_pp_group().world_size == 1:
            raise ValueError(
                f"vLLM computes {len(missing)} sparse layers of the checkpoint in a form of its own, such as stacked "
                f"experts, which cannot be packed, among them {min(missing)}. Serve the model dense: load it, call "
                "model.dequantize(), save it in another folder, and serve that"
            )


def register_config() -> None:
    """Registers `ServingConfig` with vLLM, and has its loader make packed tensors of such checkpoints dense.

    Raises:
        ValueError: another plugin has registered the name.
    """
    if QUANT_METHOD in QUANTIZATION_METHODS:
        other = get_quantization_config(QUANT_METHOD)
        if other is not ServingConfig:
            raise ValueError(
                f"two plugins of vLLM register quant_method {QUANT_METHOD!r}, this package and {other.__module__}: "
                "uninstall one, or name those to load in VLLM_PLUGINS"
            )
        return
    register_quantization_config(QUANT_METHOD)(ServingConfig)
    DefaultModelLoader.get_all_weights = _all_weights


@functools.wraps(_load_tensors)
def _all_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = _load_tensors(loader, model_config, model)
    configs = (getattr(module, "quant_config", None) for module in model.modules())
    config = next((config for config in configs if isinstance(config, ServingConfig)), None)
    if config is None:
        return tensors
    config.check_layers()
    transposed = model_config.hf_config.model_type in _CONV1D_MODELS
    return dense_weights(tensors, config.layers, config.in_features, transposed, config.quantisation)
