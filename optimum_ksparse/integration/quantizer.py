"""`SparsityQuantizer`: the hooks that transformers calls for a model that is sparse already."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.quantizers.base import HfQuantizer

from ..blocks import decoder_of
from ..checkpoint import (
    MASK_SUFFIX,
    check_headers,
    dense_state_dict,
    facts_of,
    install_layers,
    is_offloaded,
    read_headers,
    replace_module,
    sparse_experts,
    sparse_modules,
)
from ..config import MODULE_NAMES, SparsityConfig
from ..hub import tag_model
from .parallel import prepare_parallel
from .source import current_source


class SparsityQuantizer(HfQuantizer):
    """Prunes dense models when they are loaded; loads, saves and undoes packed sparse ones."""

    requires_calibration = False
    is_trainable = is_qat_trainable = is_compileable = True
    quantization_config: SparsityConfig
    # What `save_pretrained(state_dict=...)` was given: transformers asks here, and forgets it.
    state_dict: dict[str, torch.Tensor] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "a packed sparse checkpoint cannot be loaded under DeepSpeed ZeRO-3, which leaves parameters empty "
                "between forward passes, when saving and the dense form read them: use ZeRO-2, DDP or FSDP"
            )
        if is_fsdp_enabled() and os.environ.get("FSDP_VERSION") == "2":
            raise ValueError(
                "accelerate's FSDP2 cannot hand out from one process a model that has masks, which are buffers: set "
                "fsdp_cpu_ram_efficient_loading: false in its config"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        self._model = weakref.ref(model)
        if not self.pre_quantized:
            return model
        if self.quantization_config.layers is None:
            raise ValueError(
                "quantization_config of the checkpoint records no `layers`; it was not written by this plugin"
            )
        current_source().check_index()
        readable = checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files)
        headers = read_headers(checkpoint_files or ()) if readable else {}
        if headers and not any(name.endswith(MASK_SUFFIX) for name in headers):
            return model  # its config is that of a sparse model, its weights are not
        install_layers(model, self.quantization_config.layers)
        distributed = getattr(model.config, "distributed_config", None)
        if distributed is not None:
            prepare_parallel(model, distributed)
        if headers:
            check_headers(headers, sparse_modules(decoder_of(model)))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self.remove_quantization_config(model)  # it is a dense model still
            current_source().prune(model, self.quantization_config)
        # Its weights have an ordinary dtype: `half` and `float` cast them as those of any other model.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Where tensors have the names of modules nothing is renamed, but by a user's `key_mapping`, which comes
        first."""
        model = model or self._model()  # before 5.21 transformers does not pass it
        if model is None or self.quantization_config.names != MODULE_NAMES or not sparse_modules(model):
            return weight_conversions
        return weight_conversions[: len(weight_conversions) - len(get_model_conversion_mapping(model))]

    @torch.no_grad()
    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Back to dense modules; each keeps its dtype unless `dtype` is given."""
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        stacks = sparse_experts(model)
        if is_offloaded(model):
            raise ValueError("accelerate has offloaded weights of the model; load it without that to make it dense")
        for name, module in sparse_modules(model).items():
            dense = module.to_dense()
            if isinstance(dense, nn.Parameter):
                dense.data = dense.data.to(dtype or dense.dtype)
            elif dtype is not None:
                dense.to(dtype)
            replace_module(model, name, dense)
        if stacks:
            model.set_experts_implementation(model.get_correct_experts_implementation(None))  # its own choice
        facts = facts_of(model)
        facts.forget()
        facts.is_dequantized = True
        tag_model(model, None, None)
        self.remove_quantization_config(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        given = self.state_dict
        packed = given is None or any(name.endswith(MASK_SUFFIX) for name in given)
        if self.quantization_config.storage == "dense" and packed:
            return dense_state_dict(model), {}
        return given, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True
