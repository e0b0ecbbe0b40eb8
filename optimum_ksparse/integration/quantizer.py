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
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import CompressedTensorsConfig

from ..blocks import decoder_of
from ..checkpoint import (
    MASK_SUFFIX,
    check_headers,
    check_scales,
    dense_state_dict,
    facts_of,
    install_layers,
    is_elsewhere,
    is_offloaded,
    read_headers,
    replace_module,
    sparse_experts,
    sparse_modules,
)
from ..checkpoint.bitmask import BESIDE, check_targets, compressed_state_dict, read_layers, renamings
from ..config import FOREIGN_RECORD, MODULE_NAMES, ForeignConfig, SparsityConfig
from ..hub import tag_model
from ..nn import compute_by_torch, compute_natively
from ..pruning.recognition import NotSparseError
from ..records import COMPRESSED_TENSORS, sparse_format
from .parallel import prepare_parallel
from .source import current_source

logger = logging.get_logger(__name__)


class CompressedTensorsOrSparse(CompressedTensorsConfig):
    """What transformers makes of a `quantization_config` of compressed-tensors: the settings by which this package
    reads a sparse model, and for any other what it has always made."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if sparse_format(config_dict) is None:
            return CompressedTensorsConfig.from_dict(config_dict, *args, **kwargs)
        config = ForeignConfig(FOREIGN_RECORD["method"])
        config.targets = config_dict["sparsity_config"].get("targets")
        return config


def register_foreign() -> None:
    """Lets transformers ask here what a config of compressed-tensors is; a second call does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = CompressedTensorsOrSparse


class SparsityQuantizer(HfQuantizer):
    """Prunes dense models when they are loaded; loads, saves and undoes packed sparse ones."""

    requires_calibration = False
    is_trainable = is_compileable = True
    quantization_config: SparsityConfig
    # What `save_pretrained(state_dict=...)` was given: transformers asks here, and forgets it.
    state_dict: dict[str, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the reference to the model, which cannot be pickled and is needed while it is loaded."""
        return {name: value for name, value in vars(self).items() if name != "_model"}

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained."""
        return self.quantization_config.values is None

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
        config = self.quantization_config
        if config.layers is None and not isinstance(config, ForeignConfig):
            raise ValueError(
                "quantization_config of the checkpoint records no `layers`; it was not written by this plugin"
            )
        current_source().check_index()
        readable = checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files)
        headers = read_headers(checkpoint_files or ()) if readable else {}
        distributed = getattr(model.config, "distributed_config", None)
        if isinstance(config, ForeignConfig):
            if distributed is not None:
                raise ValueError(
                    f"a sparse checkpoint of {COMPRESSED_TENSORS} is not split as it is: make it one of this package "
                    "first, by `optimum-cli ksparse convert`"
                )
            check_targets(model, config.targets)
            config.layers = read_layers(model, checkpoint_files or ()) if headers else {}
            install_layers(model, config.layers)
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *BESIDE}
            return model
        if headers and not any(name.endswith(MASK_SUFFIX) for name in headers):
            return model  # its config is that of a sparse model, its weights are not
        install_layers(model, config.layers or {}, **config.quantisation)
        if distributed is not None:
            prepare_parallel(model, distributed)
        if headers:
            check_headers(headers, sparse_modules(decoder_of(model)))
            check_scales(checkpoint_files or (), sparse_modules(model).values())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self.remove_quantization_config(model)  # it is a dense model still
            current_source().prune(model, self.quantization_config)
        elif isinstance(self.quantization_config, ForeignConfig) and not self.quantization_config.layers:
            self.remove_quantization_config(model)  # dense weights, with zeros in them
            self._recognise(model)
        elif sparse_modules(model):
            compute_natively(model)
        # Its weights have an ordinary dtype: `half` and `float` cast them as those of any other model.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def _recognise(self, model: PreTrainedModel) -> None:
        """Makes sparse modules of dense weights with zeros in them, where they are in memory."""
        if is_offloaded(model) or is_elsewhere(model):
            return
        try:
            current_source().prune(model, SparsityConfig(self.quantization_config.method))
        except NotSparseError as error:
            logger.warning(f"The checkpoint says that it is sparse, but {error}; it is loaded as a dense model.")

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Where tensors have the names of modules nothing is renamed, but by a user's `key_mapping`, which comes
        first. Those of compressed-tensors have ours before anything else is done to them."""
        model = model or self._model()  # before 5.21 transformers does not pass it
        if model is None or not sparse_modules(model):
            return weight_conversions
        if isinstance(self.quantization_config, ForeignConfig):
            return [*renamings(), *weight_conversions]
        if self.quantization_config.names != MODULE_NAMES:
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
        compute_by_torch(model)
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
        if self.quantization_config.storage == COMPRESSED_TENSORS and packed:
            return compressed_state_dict(model, "", given or model.state_dict()), {}
        return given, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True
