"""The hypernetwork, and how its logits become zeros and ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MEDIAN", "HyperNetwork", "drawn", "level_for", "odds"]

MEDIAN = -math.log(math.log(2))
"""The median of Gumbel(0, 1), 0.3665: a logit above -MEDIAN is kept in over half of all draws."""


class HyperNetwork(nn.Module):
    """Maps fixed random inputs, one per vector, to ``sizes[i]`` logits for vector i.

    The state that a vector's logits are read from has length 1. So a step of size x against the
    gradient of a head moves each of its logits by x times that logit's own gradient.
    """

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
                head.mul_(0.1)  # the first draws hardly prefer any unit

    def forward(self) -> list[Tensor]:
        """One row of logits per vector, (its size,) each."""
        states, _ = self.rnn(self.inputs)
        states = nn.functional.normalize(nn.functional.gelu(self.norm(states)), dim=1)
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


class Decided(torch.autograd.Function):
    """Exactly 1 above 0 and exactly 0 elsewhere, with the gradient of the number itself."""

    @staticmethod
    def forward(ctx: Any, number: Tensor) -> Tensor:
        return (number > 0).to(number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def drawn(logits: Sequence[Tensor], level: float, generator: torch.Generator) -> list[Tensor]:
    """A random 0 or 1 for each logit, 1 where logit plus Gumbel noise is above the level.

    In the same shapes. Gradients pass to the logit as if it were the 0 or 1 (straight-through).
    """
    decided = []
    for logit in logits:
        uniform = torch.rand(logit.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        decided.append(Decided.apply(logit - (-uniform.log()).log() - level))
    return decided


def odds(logits: Sequence[Tensor], level: float) -> list[Tensor]:
    """How likely each number of :func:`drawn` is 1, in the same shapes."""
    return [-torch.expm1(-(logit - level).clamp(-50, 50).exp()) for logit in logits]


def level_for(cost: Callable[[float], float], goal: float, logits: Sequence[Tensor]) -> float:
    """The lowest level at which ``cost(level)``, which falls with it, is at most ``goal``.

    To a thousandth of a logit. ``-inf`` where any level will do.
    """
    if cost(-math.inf) <= goal:
        return -math.inf
    low = min(float(logit.min()) for logit in logits) - 30
    high = max(float(logit.max()) for logit in logits) + 30
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > goal else (low, middle)
    return high
