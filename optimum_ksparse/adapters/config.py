"""`SparseLoraConfig`: PEFT's settings of LoRA, and whether the delta is masked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig


@dataclass
class SparseLoraConfig(LoraConfig):
    """`peft.LoraConfig` with one more setting.

    Args:
        masked: train with the delta masked, so that merging is exact: y = x·(W + s·(B·A)∘M)ᵀ, where M is the mask of
            the sparse weight W. Plain LoRA trains with the whole B·A, of which merging keeps what lies at the mask.

    Raises:
        ValueError: `masked` together with DoRA or another variant of LoRA.
    """

    masked: bool = field(
        default=False, metadata={"help": "Train with the delta masked, so that merging into a sparse weight is exact."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.masked, bool):
            raise TypeError(f"masked must be True or False, found {self.masked!r}")
        others = lora_variants(self)
        if self.masked and others:
            raise ValueError(f"masked=True goes with LoRA and rsLoRA, not together with {', '.join(others)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings of `LoraConfig`, and `masked` where it is True: plain PEFT does not know it."""
        settings = super().to_dict()
        if not self.masked:
            del settings["masked"]
        return settings


def lora_variants(config: LoraConfig) -> list[str]:
    """Names of the settings that turn LoRA into another method."""
    fields = [entry.name for entry in dataclasses.fields(config) if entry.metadata.get("is_lora_variant")]
    return [name for name in [*fields, "use_qalora", "target_parameters"] if getattr(config, name, None)]


def with_mask(config: LoraConfig, masked: bool) -> SparseLoraConfig:
    """The settings of a `LoraConfig`, masked or not."""
    names = [entry.name for entry in dataclasses.fields(LoraConfig) if entry.init]
    return SparseLoraConfig(**{name: getattr(config, name) for name in names}, masked=masked)
