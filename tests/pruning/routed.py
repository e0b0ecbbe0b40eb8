"""Llamas whose blocks do not call each of their layers once for each batch, in one order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..conftest import VOCABULARY, make_config

MARKED = VOCABULARY // 2  # tokens from here on go to the second expert


class Experts(nn.Module):
    """Two experts, each for the tokens of one sign of the first channel, called in their order; or the last first
    where most tokens are its own."""

    def __init__(self, sorts: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 64, bias=False), "down": nn.Linear(64, 32, bias=False)})
            for _ in range(2)
        )
        self.sorts = sorts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second = x[..., 0] > 0
        chosen = [(self.experts[0], ~second), (self.experts[1], second)]
        if self.sorts and second.float().mean() > 0.5:
            chosen.reverse()
        output = torch.zeros_like(x)
        for expert, tokens in chosen:
            if tokens.any():
                hidden: Any = expert
                output[tokens] = hidden["down"](torch.relu(hidden["up"](x[tokens])))
        return output


class Twice(nn.Module):
    """Calls its first layer twice, or its last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.last:
            return self.down(torch.relu(self.up(x))) + self.down(torch.sigmoid(self.up(x)))
        return self.down(torch.relu(self.up(x)) - torch.relu(self.up(2 * x)))


def make_routed(kind: str) -> PreTrainedModel:
    """A Llama of two blocks with other MLPs: "experts", "sorted" ones, "twice" or "last twice"."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama")).eval()
    for layer in model.model.layers:
        layer.mlp = Twice(kind == "last twice") if "twice" in kind else Experts(kind == "sorted")
    with torch.no_grad():  # a channel that all blocks leave nearly as it is
        channel = model.model.embed_tokens.weight[:, 0]
        channel.fill_(-9.0)
        channel[MARKED:] = 9.0
    return model


def routed_ids() -> torch.Tensor:
    """[6, 24]: the first sample reaches both experts, others one of them alone, or mostly."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(3, MARKED, (6, 24), generator=generator)
    shares = torch.tensor([0.3, 1.0, 0.8, 0.0, 0.0, 0.0])
    return low + MARKED * (torch.rand(6, 24, generator=generator) < shares[:, None]) - 2
