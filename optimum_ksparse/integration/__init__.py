"""What transformers calls: the quantizer's hooks, and the wrappers of `from_pretrained`, `save_pretrained` and
`push_to_hub`."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils import PushToHubMixin

from ..adapters import extend_peft
from ..checkpoint import sparsity_report
from ..config import QUANT_METHOD, SparsityConfig
from ..nn import before_first
from ..runtime.execution import autotune_kernels
from .casting import wrap_casts
from .describing import describe_auto_classes
from .loading import wrap_from_pretrained
from .publishing import describe_push_to_hub, wrap_push_to_hub
from .quantizer import SparsityQuantizer
from .recovering import wrap_reader
from .saving import wrap_save_pretrained
from .trainer_import import watch_trainer


def register() -> None:
    """Registers with transformers, and with PEFT when the first sparse module is made; a second call does nothing."""
    if extend_peft not in before_first:
        before_first.append(extend_peft)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparsityConfig)
        register_quantizer(QUANT_METHOD)(SparsityQuantizer)
    # All Auto classes and model classes end in these.
    wrap_from_pretrained(PreTrainedModel)
    describe_auto_classes()
    wrap_reader(PreTrainedConfig, "get_config_dict")
    wrap_reader(AutoTokenizer, "from_pretrained")
    wrap_reader(PreTrainedTokenizerBase, "from_pretrained")
    wrap_save_pretrained(PreTrainedModel)
    wrap_casts(PreTrainedModel)
    # That of PreTrainedModel ends here, and so does that of PEFT's models.
    wrap_push_to_hub(PushToHubMixin)
    describe_push_to_hub(PreTrainedModel.push_to_hub)
    watch_trainer()
    PreTrainedModel.sparsity_report = property(sparsity_report)  # type: ignore[attr-defined]
    PreTrainedModel.autotune_kernels = autotune_kernels  # type: ignore[attr-defined]
