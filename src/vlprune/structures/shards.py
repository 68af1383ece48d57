"""Weights of which every process holds a part: the whole of one, and the part of a whole.

torch's FSDP2 keeps such weights as DTensors, whose shape is that of the whole. Everything here
also takes ordinary tensors, which are whole already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["changing", "copies_of", "is_part", "local", "part_of", "scale_", "whole"]


def is_part(tensor: Any) -> bool:
    """Whether a process holds only a part of this weight."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole weight, gathered if it lies in parts; then all processes must call this.

    Differentiable, for processes that compute the same from the whole weight: each takes its part
    of the gradient, without adding up.
    """
    if not is_part(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """The part of a weight that lies in this process."""
    if not is_part(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def copies_of(part: Any) -> int:
    """How many processes hold the same part of this weight (more than one in hybrid sharding)."""
    mesh = part.device_mesh
    return math.prod(mesh.size(n) for n, p in enumerate(part.placements) if p.is_replicate())


def part_of(full: Tensor, like: Any) -> Tensor:
    """``full`` laid out like the weight ``like``: each process keeps its part, nothing is sent."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(full, like.device_mesh, everywhere, run_check=False)
    part: Tensor = spread.redistribute(placements=like.placements)
    return part


@contextmanager
def changing(weight: Tensor) -> Iterator[Tensor]:
    """The whole weight, to be changed in place; each process then keeps its part of the result."""
    full = whole(weight.detach())
    yield full
    if is_part(weight):
        weight.copy_(part_of(full, weight))


@torch.no_grad()
def scale_(weight: Tensor, axis: int, factors: Tensor) -> None:
    """Multiply the slices of ``weight`` along ``axis`` by ``factors`` (its length,), in place."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    whole_factors = factors.to(weight.device, weight.dtype).reshape(shape).expand(weight.shape)
    weight.mul_(part_of(whole_factors.contiguous(), weight) if is_part(weight) else whole_factors)
