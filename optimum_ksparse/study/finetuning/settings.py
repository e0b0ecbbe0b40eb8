"""How to fine-tune: the settings of a run, and the adapter that they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ...adapters import require_peft
from ...blocks import find_blocks
from ...checks import check_integer
from ...nn import is_linear_map

# What is trained: low-rank adapters of three kinds, one whose delta is masked, or the sparse weights themselves.
METHODS = ("lora", "masked", "dora", "hira", "full")


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings of a fine-tuning run; the defaults are those of Alpaca-LoRA (https://github.com/tloen/alpaca-lora) on
    all linear maps of attention and MLP.

    Args:
        method: "lora", "masked" (LoRA whose delta keeps the mask, so that merging is exact), "dora", "hira", or "full"
            (no adapter: the weights themselves train, the packed ones with their zeros).
        r, alpha, dropout: rank, scale (the delta is alpha / r · BA) and dropout of the adapter.
        target_modules: names of the linear maps to adapt; None takes all of the decoder blocks.
        learning_rate, warmup_steps: the rate rises linearly over so many steps and falls linearly to zero after them.
        batch_size: examples a step, reached by accumulation over batches of `micro_batch_size` in each process.
        num_epochs: passes over the examples. max_steps: ends earlier (and the learning rate with it).
        seed: of the order of the examples, of dropout and of new weights.
        bf16: matrix products in bfloat16 under autocast, for weights in float32.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        save_steps: steps from one checkpoint to the next, from which an interrupted run goes on.

    Raises:
        TypeError, ValueError: names the setting, what was found and what is allowed.
    """

    method: str = "lora"
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] | None = None
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    batch_size: int = 128
    micro_batch_size: int = 4
    num_epochs: float = 3
    max_steps: int | None = None
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = 50

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not known; allowed: {', '.join(METHODS)}")
        for name in ("r", "alpha", "batch_size", "micro_batch_size", "save_steps"):
            check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            check_integer(name, getattr(self, name), 0)
        if self.max_steps is not None:
            check_integer("max_steps", self.max_steps, 1)
        for name, least, most in (("dropout", 0, 1), ("learning_rate", 0, None), ("num_epochs", 0, None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, found {value!r}")
            if not least <= value or (most is not None and value >= most) or (most is None and value <= least):
                limits = f"from {least} to below {most}" if most is not None else f"above {least}"
                raise ValueError(f"{name}={value} is out of range, it must be {limits}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings, as JSON holds them."""
        return asdict(self)

    def accumulation_steps(self, num_processes: int = 1) -> int:
        """Batches that each process adds up to a step. Raises ValueError where they do not come out even."""
        together = self.micro_batch_size * num_processes
        if self.batch_size % together:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size} times "
                f"{num_processes} processes"
            )
        return self.batch_size // together


def linear_targets(model: PreTrainedModel) -> list[str]:
    """Names, within a decoder block, of all linear maps of the blocks, sparse or dense: what an adapter on attention
    and MLP adapts, and never the output head."""
    names: dict[str, None] = {}
    for block in find_blocks(model).blocks:
        names |= dict.fromkeys(name for name, module in block.named_modules() if is_linear_map(module))
    return list(names)


def adapter_config(
    settings: FinetuningSettings, targets: list[str], *, task_type: str | None = None, **more: Any
) -> Any:
    """The PEFT config of an adapter.

    Args:
        targets: where `settings.target_modules` is None.
        task_type: of PEFT, "CAUSAL_LM" or None.
        more: further arguments of the config, such as `modules_to_save`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the method has no adapter.
    """
    require_peft()
    from peft import HiraConfig

    from ...adapters.config import SparseLoraConfig

    common: dict[str, Any] = {"r": settings.r, "target_modules": settings.target_modules or targets, **more}
    if task_type is not None:
        common["task_type"] = task_type
    if settings.method == "hira":
        return HiraConfig(hira_dropout=settings.dropout, **common)
    if settings.method == "full":
        raise ValueError('method="full" trains the weights themselves, without an adapter')
    return SparseLoraConfig(
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        masked=settings.method == "masked",
        use_dora=settings.method == "dora",
        **common,
    )
