"""The hypernetwork, and how its logits become zeros and ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MEDIAN", "HyperNetwork", "drawn"]

MEDIAN = -math.log(math.log(2))
"""The median of Gumbel(0, 1), 0.3665: a logit above -MEDIAN is kept in over half of all draws."""


class HyperNetwork(nn.Module):
    """Maps fixed random inputs, one per vector, to ``sizes[i]`` logits for vector i."""

    inputs: Tensor

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.randn(len(sizes), 32, generator=generator))
        self.rnn = nn.GRU(32, 64, bidirectional=True)
        self.norm = nn.LayerNorm(128)
        self.heads = nn.ModuleList(nn.Linear(128, size, bias=False) for size in sizes)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter is not self.norm.weight and parameter is not self.norm.bias:
                    width = 128 if parameter.dim() == 2 and parameter.shape[1] == 128 else 64
                    parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
            for head in self.heads.parameters():
                head.mul_(0.1)  # so that no draw removes anything at first

    def forward(self) -> list[Tensor]:
        """One row of logits per vector, (its size,) each."""
        states, _ = self.rnn(self.inputs)
        states = nn.functional.gelu(self.norm(states))
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


class Rounded(torch.autograd.Function):
    """Exactly 0 or 1, with the gradient of the number that was rounded (straight-through)."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        return soft.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def drawn(logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> list[Tensor]:
    """A random 0 or 1 for each logit, in the same shapes, that gradients can pass through."""
    decided = []
    for logit in logits:
        uniform = torch.rand(logit.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        soft = ((logit - (-uniform.log()).log()) / temperature).sigmoid()
        decided.append(Rounded.apply(soft))
    return decided
