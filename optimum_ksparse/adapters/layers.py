"""PEFT's layers of LoRA and HiRA over a `SparseLinear`: they compute as PEFT's do over the dense weight with its
zeros, and merging never fills a zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.hira import layer as hira
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import VeloraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge

from ..kernels import PackedWeight
from ..nn import SparseLinear, masked_linear
from ..packing import pack, unpack_mask
from ..pruners.rounding import quantise
from ..pruners.statistics import GramMatrix
from ..quantization import pack_integers
from .variants import MaskedVariant, SparseAloraVariant, SparseDoraVariant, onloaded, packed_weight


class _KeepsZeros:
    """Merging for both: the packed values become those of the effective weight at the mask, which is computed in
    float32 from the values before, with all merged adapters, and rounded once, to integers with scales of their own
    where the values are quantised; unmerging puts the same bits back."""

    merged_adapters: list[str]
    other_param_names: tuple[str, ...]
    fan_in_fan_out: bool
    get_base_layer: Callable[[], SparseLinear]
    _get_available_adapters: Callable[[], set[str]]
    _before_merge: tuple[PackedWeight, torch.Tensor | None] | None = None

    def __init__(self, base_layer: SparseLinear, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)  # type: ignore[call-arg]
        # By adapter why it must not be merged into this layer, if so; PEFT deletes the entry with the adapter.
        self.refused_merges: dict[str, str | None] = {}
        self.other_param_names = (*self.other_param_names, "refused_merges")
        self.fan_in_fan_out = False  # the dense weight of a sparse layer is [out, in], that of GPT-2 too

    def _get_base_layer_device_and_dtype(self, base_layer: SparseLinear) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of new adapters: PEFT would take the dtype of the integers."""
        return base_layer.weight.device, base_layer.dtype

    def _adapt(self, name: str, effective: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The effective weight with one more adapter; `weight` is that without adapters. All are [out, in], in float32
        or float64."""
        raise NotImplementedError

    def _merged_bias(self, bias: torch.Tensor | None, names: list[str]) -> torch.Tensor | None:
        return bias

    def _leaves_mask(self, name: str) -> bool:
        """Whether an adapter changes weights that are zero."""
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT, by `merge_kept`; a warning tells of what it throws away.

        Args:
            safe_merge: raise ValueError, and change nothing, where a result is not finite.
            adapter_names: those to merge, the active ones by default; they are skipped, with a warning, where they are
                merged already.
        """
        wanted = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        names = [name for name in dict.fromkeys(wanted) if name in self._get_available_adapters()]
        if any(self._leaves_mask(name) for name in names):
            warnings.warn(
                "merging throws away what an adapter adds where the weights of sparse layers are zero: "
                'optimum_ksparse.merge_adapter(model, method="solve", dataset=...) makes up for it',
                stacklevel=3,
            )
        self.merge_kept(names, safe_merge)

    @torch.no_grad()
    def merge_kept(self, names: list[str], safe_merge: bool = True) -> None:
        """Merges adapters of this layer into the packed weight: W + s·(B·A)∘M for LoRA, m/‖V‖·(W + s·B·A) at the mask
        for DoRA, W∘(1 + B·A) for HiRA; several, in the order in which they are merged, as the forward pass takes them
        one after the other.

        Raises:
            RuntimeError: an adapter has a bias, the base layer has none.
            ValueError: an adapter was trained over other masks; or, with `safe_merge`, a result is not finite.
        """
        if not names:
            return
        refused = [why for name in names if (why := self.refused_merges.get(name))]
        if refused:
            raise ValueError(refused[0])
        base, merged = self.get_base_layer(), [*self.merged_adapters, *names]
        before = self._original()
        effective, mask = self._effective(merged)
        bias = self._merged_bias(before[1], merged)
        kept = effective[mask].to(base.dtype)
        if safe_merge and not all(bool(t.isfinite().all()) for t in (kept, bias) if t is not None):
            raise ValueError(f"merging gives values that are not finite: an adapter of {', '.join(names)} is broken")
        values, scale = kept_values(base, effective, mask)
        self._before_merge = before
        self._put(values, scale, bias)
        self.merged_adapters[:] = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the packed weight, and the bias, back as they were before the first merge."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        packed, bias = self._before_merge
        values, scale = packed.values, packed.scale
        if packed.value_type != self.get_base_layer().values:  # dequantised since
            mask = unpack_mask(packed.bits, packed.in_features)
            values, scale = kept_values(self.get_base_layer(), packed.dense(), mask)
        self._put(values, scale, bias)
        self._before_merge = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def effective_weight(self, adapter_names: list[str] | None = None) -> torch.Tensor:
        """The dense weight that the unmerged layer computes with, [out, in] in float32: the base weight and what each
        adapter does to it, at the mask or everywhere.

        Args:
            adapter_names: those that count; the active ones by default. Names that this layer lacks do not count.
        """
        names = self.active_adapters if adapter_names is None else adapter_names  # type: ignore[attr-defined]
        return self._effective([name for name in names if name in self._get_available_adapters()])[0].float()

    def _effective(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The effective weight, in float32 or float64, and the mask, [out, in] both."""
        packed, device = self._original()[0], onloaded(self.get_base_layer(), "weight").device
        packed = packed.to(device).cast(torch.promote_types(packed.dtype, torch.float32))
        weight = effective = packed.dense()
        mask = unpack_mask(packed.bits, packed.in_features)
        for name in names:
            effective = self._adapt(name, effective, weight, mask)
        return effective, mask

    def _original(self) -> tuple[PackedWeight, torch.Tensor | None]:
        """Packed weight and bias without adapters. A merged layer keeps them in the computer's own memory, as PEFT
        does."""
        if self._before_merge is not None:
            return self._before_merge
        base = self.get_base_layer()
        bias = None if base.bias is None else onloaded(base, "bias").detach().cpu()
        weight = packed_weight(base, torch.device("cpu"))
        # Tensors of their own, in which what is written into those of the layer does not come.
        scale = None if weight.scale is None else weight.scale.detach()
        return weight._replace(values=weight.values.detach(), scale=scale), bias

    def _put(self, values: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        base = self.get_base_layer()
        device = base.weight.device
        base.replace_values(values.to(device), None if scale is None else scale.to(device))
        if bias is not None and base.bias is not None:
            base.bias.data = bias.to(base.bias.device, base.bias.dtype)


def kept_values(
    base: SparseLinear, weight: torch.Tensor, mask: torch.Tensor, statistics: GramMatrix | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a layer keeps of a weight, [out, in] in any floating dtype, at its mask: packed values and, where its own
    values are quantised, the scale of theirs, rounded by the statistics of the inputs, where there are some."""
    kept = weight.to(base.dtype).masked_fill(~mask, 0)
    if base.values is None:
        return pack(kept, mask, base.pattern)[0], None
    rounded = quantise(weight, kept, mask, statistics, base.values, base.group_size)
    return pack_integers(pack(rounded.integers, mask, base.pattern)[0], base.values), rounded.scale


class SparseLoraLinear(_KeepsZeros, lora.Linear):
    """LoRA over a `SparseLinear`: plain, rsLoRA, DoRA, with a masked delta, aLoRA and VeLoRA."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[lora.LoraVariant] | None]:
        """As in PEFT: the classes of the variants that work over a packed weight."""
        return {
            (): None,
            ("use_dora",): SparseDoraVariant,
            ("alora_invocation_tokens",): SparseAloraVariant,
            ("velora_config",): VeloraLinearVariant,
        }

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> lora.LoraVariant | None:
        """As in PEFT, and the masked one."""
        return MaskedVariant() if getattr(config, "masked", False) else super().resolve_lora_variant(config=config)

    def is_masked(self, adapter_name: str) -> bool:
        """Whether the delta of an adapter is masked in the forward pass."""
        return isinstance(self.lora_variant.get(adapter_name), MaskedVariant)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The delta s·B·A of an adapter, dense, [out, in]; with zeros where the weight has them if it is masked."""
        delta = super().get_delta_weight(adapter)
        if self.is_masked(adapter):
            base = self.get_base_layer()
            delta = delta * unpack_mask(packed_weight(base, delta.device).bits, base.in_features)
        return delta

    def _leaves_mask(self, name: str) -> bool:
        return not self.is_masked(name) and bool(onloaded(self.lora_B[name], "weight").any())

    def _merged_bias(self, bias: torch.Tensor | None, names: list[str]) -> torch.Tensor | None:
        for name in names:
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(
                        f"adapter {name!r} has a bias (lora_bias=True), the base layer has none: it cannot be merged"
                    )
                module: Any = self.lora_B[name]
                bias = bias + module.bias.detach().to(bias) * float(self.scaling[name])
        return bias

    def _adapt(self, name: str, effective: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        variant = self.lora_variant.get(name)
        if isinstance(variant, SparseAloraVariant):
            raise NotImplementedError(f"adapter {name!r} (aLoRA) acts on some tokens only and cannot be merged")
        a, b = (onloaded(factors[name], "weight").detach().to(weight) for factors in (self.lora_A, self.lora_B))
        delta = (b * float(self.scaling[name])) @ a
        if isinstance(variant, MaskedVariant):
            delta *= mask
        if not isinstance(variant, SparseDoraVariant):
            return effective + delta
        magnitudes = onloaded(self.lora_magnitude_vector[name], "weight").detach().to(weight)
        # PEFT scales the output of the layer as it is by then, with the adapters before this one.
        return (magnitudes / torch.linalg.vector_norm(weight + delta, dim=1))[:, None] * (effective + delta)


class SparseHiraLinear(_KeepsZeros, hira.Linear):
    """HiRA over a `SparseLinear`: W∘(1 + B·A) has the mask of W."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in PEFT, without a dense matrix that is kept for the backward pass."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.hira_A:
                continue
            a, b = onloaded(self.hira_A, name), onloaded(self.hira_B, name)
            x = self._cast_input_dtype(x, a.dtype)
            weight = packed_weight(self.get_base_layer())
            result = result + masked_linear(self.hira_dropout[name](x), a, b, weight)
        return result.to(dtype)

    def _adapt(self, name: str, effective: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        a, b = (onloaded(factors, name).detach().to(weight) for factors in (self.hira_A, self.hira_B))
        return effective + weight * (b @ a)


SPARSE_LAYERS = (SparseLoraLinear, SparseHiraLinear)
