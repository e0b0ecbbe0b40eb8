"""Where the tensors of a module are: spread over processes, or offloaded by accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.distributed.utils import is_dtensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over several, by tensor parallelism or FSDP."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def onloaded(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of the module itself; one that accelerate has offloaded from where it is kept."""
    tensor: torch.Tensor = getattr(module, name)
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]) if tensor.is_meta else ():
        if getattr(one, "weights_map", None) is not None:
            tensor = one.weights_map[name]
    return tensor
