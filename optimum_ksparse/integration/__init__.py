"""What transformers calls: the quantizer's hooks, and what this package puts in the place of functions of transformers
and PEFT (`patches`)."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

from optimum_ksparse_autoload import withdraw

from ..api import dequantize_values
from ..checkpoint import sparsity_report
from ..config import QUANT_METHOD, SparsityConfig
from ..runtime import autotune_kernels
from .describing import describe_functions
from .patches import apply_patches
from .quantizer import SparsityQuantizer, register_foreign


def register() -> None:
    """Registers with transformers, and with PEFT as soon as it is imported; a second call does nothing."""
    withdraw()
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparsityConfig)
        register_quantizer(QUANT_METHOD)(SparsityQuantizer)
    register_foreign()
    apply_patches()
    describe_functions()
    PreTrainedModel.sparsity_report = property(sparsity_report)  # type: ignore[attr-defined]
    PreTrainedModel.dequantize_values = dequantize_values  # type: ignore[attr-defined]
    PreTrainedModel.autotune_kernels = autotune_kernels  # type: ignore[attr-defined]
