"""Weights of which every process holds a part: the whole of one, and the part of a whole.

torch's FSDP2 keeps such weights as DTensors, whose shape is that of the whole. DeepSpeed's ZeRO-3
keeps empty parameters with a part, ``ds_tensor``, beside them. Everything here also takes ordinary
tensors, which are whole already.

Give parameters themselves, not what ``detach()`` returns: ZeRO-3 keeps its notes on the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "changing",
    "copies_of",
    "is_dtensor",
    "is_part",
    "is_zero",
    "local",
    "part_of",
    "scale_",
    "shape_of",
    "whole",
]


def is_dtensor(tensor: Any) -> bool:
    """Whether this weight is a distributed tensor of torch, as FSDP2 makes them."""
    return hasattr(tensor, "full_tensor")


def is_zero(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has split this weight, even if it is gathered at the moment."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_status")


def is_part(tensor: Any) -> bool:
    """Whether a process holds only a part of this weight."""
    return is_dtensor(tensor) or is_zero(tensor)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole weight, also where ZeRO-3 shows an empty one."""
    return tuple(tensor.ds_shape if is_zero(tensor) else tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """The whole weight, gathered if it lies in parts; then all processes must call this.

    Differentiable for DTensors, for processes that compute the same from the whole weight: each
    takes its part of the gradient, without adding up. A weight of ZeRO-3 comes as a copy, alone.
    """
    if is_zero(tensor):
        with _gathered(tensor):
            return tensor.detach().clone()
    if not is_part(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


@contextmanager
def _gathered(weight: Any, changed: bool = False) -> Iterator[None]:
    """A weight of ZeRO-3, whole while the block runs; with ``changed`` its parts are renewed."""
    if weight.ds_status.name == "AVAILABLE" and not changed:  # a small one, which stays gathered
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters([weight], modifier_rank=0 if changed else None):
        yield


def local(tensor: Any) -> Tensor:
    """The part of a weight that lies in this process; of ZeRO-3's flat, without its padding."""
    part: Tensor
    if is_zero(tensor):
        length = tensor.ds_tensor.numel()
        before = length * tensor.ds_zero_partition_rank
        part = tensor.ds_tensor[: max(0, min(length, tensor.ds_numel - before))]
        return part
    if not is_part(tensor):
        part = tensor
        return part
    part = tensor.to_local()
    return part


def copies_of(part: Any) -> int:
    """How many processes hold the same part of this weight (more than one in hybrid sharding)."""
    if is_zero(part):
        return 1
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
@torch.no_grad()
def changing(weight: Any) -> Iterator[Tensor]:
    """The whole weight, to be changed in place, in all processes alike.

    Each process then keeps its part of the result. The optimizer of a DeepSpeed engine (ZeRO-1 and
    ZeRO-2) has a copy of every weight in float32, from which it makes the weight anew at each step:
    that copy is changed then, and the weight becomes what it is rounded to.
    """
    if is_dtensor(weight):
        full = whole(weight.detach())
        yield full
        weight.copy_(part_of(full, weight))
        return
    if is_zero(weight):
        with _gathered(weight, changed=True):
            yield weight.detach()
        return
    hooks = getattr(weight, "_post_accumulate_grad_hooks", None)  # gone once the engine has ended
    if not (hooks and hasattr(weight, "_hp_mapping")):
        yield weight.detach()
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    copy = safe_get_full_fp32_param(weight)
    yield copy
    safe_set_full_fp32_param(weight, copy)
    weight.copy_(copy)


@torch.no_grad()
def scale_(weight: Tensor, axis: int, factors: Tensor) -> None:
    """Multiply the slices of ``weight`` along ``axis`` by ``factors`` (its length,), in place."""
    shape = [1] * len(shape_of(weight))
    shape[axis] = -1
    factors = factors.to(weight.device, weight.dtype).reshape(shape)
    if is_dtensor(weight):  # which needs no gathering for it
        weight.mul_(part_of(factors.expand(weight.shape).contiguous(), weight))
        return
    with changing(weight) as full:
        full.mul_(factors.to(full.dtype))
