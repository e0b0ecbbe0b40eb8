"""Writes checkpoints as compressed-tensors 0.14 wrote them, by its own rules and without any code of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

FORMATS = ("sparse-24-bitmask", "sparse-bitmask", "dense")


def zero(model: PreTrainedModel, n: int | None = 2, m: int = 4, share: float = 0.5, skip: str = "lm_head") -> None:
    """Leaves the n largest of every m weights of each linear map, or drops a share of all where n is None."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and skip not in name:
            weight = module.weight.data
            if n is None:
                scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight[scores < scores.flatten().kthvalue(int(share * scores.numel())).values] = 0
                continue
            groups = weight.view(-1, m)
            groups.scatter_(1, groups.abs().argsort(1)[:, : m - n], 0)


def compressed(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """The tensors in the place of the weight [out, in] of the layer `name`."""
    mask = weight != 0
    if form == "sparse-24-bitmask":
        kept = weight.abs().view(-1, 4).topk(2, dim=1).indices
        mask = torch.zeros(kept.shape[0], 4, dtype=torch.bool).scatter_(1, kept, True).view(weight.shape)
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    shape, counts = torch.tensor(weight.shape), mask.sum(-1)
    if form == "sparse-24-bitmask":
        values = weight[mask].view(len(weight), -1)
        return {f"{name}.compressed": values, f"{name}.bitmask": bits, f"{name}.shape": shape.view(2, 1)}
    return {
        f"{name}.compressed": weight[mask],
        f"{name}.bitmask": bits,
        f"{name}.shape": shape,
        f"{name}.row_offsets": counts.cumsum(0) - counts,
    }


def write(
    model: PreTrainedModel,
    folder: Path,
    form: str = "sparse-24-bitmask",
    files: int = 1,
    sparsity: Any = None,
    **settings: Any,
) -> Path:
    """Writes a model whose linear maps but the head are sparse; `sparsity` and `settings` go into its config."""
    folder.mkdir(parents=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if form != "dense" and isinstance(module, nn.Linear) and "lm_head" not in name and "embed_out" not in name:
            state |= compressed(name, state.pop(f"{name}.weight"), form)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    names = sorted(state, key=lambda name: hash_of(name) if files > 1 else name)  # a layer's tensors lie in several
    index = {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: state[name].contiguous() for name in names[number::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    two_of_four = form == "sparse-24-bitmask"
    config = {
        "format": form,
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "sparsity_structure": "2:4" if two_of_four else "unstructured",
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "sparsity_config": {**config, **(sparsity or {})},
        "version": "0.14.0",
        **settings,
    }
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": quantization}))
    return folder


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 17
