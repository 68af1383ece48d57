"""Rows of a batch from all processes, in the order of their ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..processes import world

__all__ = ["from_all", "gathered", "padded_from_all"]


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, the sum of their gradients for the own rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.start, context.count = dist.get_rank() * len(rows), len(rows)
        return from_all(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[context.start : context.start + context.count]


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes; their gradients flow back to each process."""
    found: Tensor = _Gather.apply(rows) if world()[0] > 1 else rows
    return found


def from_all(rows: Tensor) -> Tensor:
    """The rows of all processes, without gradients; each process has as many."""
    if world()[0] == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world()[0])]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def padded_from_all(rows: Tensor) -> Tensor:
    """Like :func:`from_all` for rows (batch, tokens), padded with 0 to the longest of any process.

    Processes pad their batches each to its own longest text.
    """
    if world()[0] == 1:
        return rows
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return from_all(F.pad(rows, (0, int(longest) - rows.shape[1])))
