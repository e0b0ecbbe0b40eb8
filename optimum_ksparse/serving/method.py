"""How vLLM computes a linear layer with sparse weights: by this package's own operators, packed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from .packed import packed

if TYPE_CHECKING:
    from .config import ServingConfig

# vLLM's own mark, which it takes away when it loads a layer again.
_DONE = "_already_called_process_weights_after_loading"


class SparseLinearMethod(LinearMethodBase):
    """The method of a layer into which vLLM may have merged several (q, k and v), and of which it may hold a share
    (tensor parallelism). vLLM joins and cuts dense weights; what comes of it is packed here, layer by layer.

    Args:
        config: of the model.
        names: recorded names of the layers that are merged, None for a dense one; a single name stands for all.
    """

    # With `initialize_online_processing`: a layer's dense weight is made when all its tensors have come, not before.
    uses_meta_device = True

    def __init__(self, config: ServingConfig, names: list[str | None]) -> None:
        self.config, self.names = config, names
        # Whether scales have come: not to a layer of another tower, which has the name of a sparse one.
        self.is_scaled = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        layers = self.config.layers
        for name in filter(None, self.names):
            self.config.in_features.setdefault(name, set()).add(input_size)
        patterns = [layers[name]["pattern"] if name else None for name in self.names]
        sizes = output_partition_sizes
        if len(patterns) != len(sizes):
            patterns, sizes = patterns[:1], [sum(sizes)]
        runs = itertools.groupby(zip(patterns, sizes, strict=True), key=lambda item: item[0])
        # Neighbours of one pattern are computed in one product.
        self.parts = [(pattern, sum(size for _, size in run)) for pattern, run in runs]
        weight = torch.empty(sum(sizes), input_size_per_partition, dtype=params_dtype, device="meta")
        loader = options["weight_loader"]
        layer.weight = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        if self.config.quantisation:
            loader = self._noting(loader)
            layer.weight_scale = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        initialize_online_processing(layer)

    def _noting(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load_scale(*args: Any, **kwargs: Any) -> Any:
            self.is_scaled = True
            return loader(*args, **kwargs)

        return load_scale

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, _DONE, False):
            return
        setattr(layer, _DONE, True)
        patterns, heights = zip(*self.parts, strict=True)
        weight = layer.weight.data
        scales = layer.weight_scale.data.split(heights) if self.is_scaled else [None] * len(heights)
        parts = zip(weight.split(heights), patterns, scales, strict=True)
        layer.parts = nn.ModuleList([packed(*part, self.config.quantisation) for part in parts])
        # It tells others of the layer's device: LoRA layers ask for that.
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        if self.config.quantisation:
            layer.weight_scale = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(self.parts) == 1:
            return layer.parts[0].linear(x, bias)
        biases = [None] * len(self.parts) if bias is None else bias.split([height for _, height in self.parts])
        return torch.cat([part.linear(x, own) for part, own in zip(layer.parts, biases, strict=True)], -1)
