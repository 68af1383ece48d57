"""The other processes of the same run: how many there are, and what they must do alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import VlpruneError

__all__ = [
    "add_up",
    "all_or_none",
    "first_value",
    "lost_contact",
    "meeting_place",
    "summed",
    "world",
]


def world() -> tuple[int, int]:
    """The number of processes and the rank of this one; (1, 0) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def first_value(value: Any) -> Any:
    """The first process's ``value``, in all processes; all of them must call this."""
    if world()[0] == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def add_up(tensor: Tensor) -> Tensor:
    """The tensor, in place the sum over all processes; all of them must call this.

    It may lie where their backend adds nothing up: NCCL does so on GPUs only.
    """
    if world()[0] == 1:
        return tensor
    there = tensor.to(meeting_place(tensor.device))
    dist.all_reduce(there)
    return tensor if there is tensor else tensor.copy_(there)


def meeting_place(device: torch.device) -> torch.device:
    """``device`` if the processes can send what lies there, else this process's accelerator."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def summed(value: float, device: torch.device) -> float:
    """The sum of the ``value`` of every process; all of them must call this."""
    return float(add_up(torch.tensor(value, dtype=torch.float64, device=device)))


def lost_contact(error: BaseException) -> str:
    """torch's words where an error says that another process has ended or not answered; else ""."""
    one: BaseException | None = error if world()[0] > 1 else None
    while one is not None:
        words = " ".join(str(one).split())
        backend = isinstance(one, RuntimeError) and re.search("gloo|nccl", words, re.IGNORECASE)
        if isinstance(one, dist.DistError) or backend:
            return words[:200] or type(one).__name__
        one = one.__cause__ or one.__context__
    return ""


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that fails in all processes if it fails in one; all of them must enter it.

    The process that failed raises its own error, the others a VlpruneError that names it.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    size, rank = world()
    if size > 1:
        said = "" if failed is None else f"{type(failed).__name__}: {failed}"
        words: list[str] = [""] * size
        dist.all_gather_object(words, said)
        other = next((n for n, one in enumerate(words) if one and n != rank), None)
        if failed is None and other is not None:
            raise VlpruneError(f"process {other} has failed, so this one stops: {words[other]}")
    if failed is not None:
        raise failed
