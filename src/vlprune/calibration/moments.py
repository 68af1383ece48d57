"""Streaming second moments of a layer's input, and of the outputs that are wanted from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..device import all_finite
from ..errors import DataError
from ..processes import add_up

__all__ = ["Moments", "check_finite", "first_of_all", "flat", "of_all_processes"]


@dataclass
class Moments:
    """Weighted sums over tokens of x (width,) and, where targets are given, of y (out,).

    ``xx`` (width, width), ``yx`` (out, width), ``x``, ``y`` and the scalars ``yy`` (sum of squared
    lengths of y) and ``weight`` are float64 sums; ``count`` is the number of tokens that counted.
    Products of a batch are computed in float32 or wider, about its mean, so that a large mean takes
    no digits from a small spread.
    """

    x: Tensor
    xx: Tensor
    y: Tensor
    yx: Tensor
    yy: float = 0.0
    weight: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, width: int, out: int = 0, device: torch.device | str = "cpu") -> Moments:
        """Sums over no tokens; with ``out`` 0 there are no targets."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(width), zeros(width, width), zeros(out), zeros(out, width))

    def add(self, x: Tensor, weights: Tensor | None = None, y: Tensor | None = None) -> None:
        """Add tokens: x (tokens, width), weights (tokens,), y (tokens, out).

        Tokens of weight 0 are left out. Raises DataError if a number is not finite.
        """
        x = _wide(x)
        y = None if y is None else _wide(y)
        if weights is not None:
            counts = weights > 0
            x, weights = x[counts], weights[counts].to(x.dtype)
            y = None if y is None else y[counts]
        check_finite(x, *([] if y is None else [y]))
        if not len(x):
            return
        total = float(len(x) if weights is None else weights.sum(dtype=torch.float64))
        x, around = _centred(x)
        weighed = x if weights is None else x * weights[:, None]
        rest = weighed.sum(0, dtype=torch.float64)
        self.x += rest + total * around
        self.xx += weighed.T @ x
        self.xx += (
            torch.outer(around, rest)
            + torch.outer(rest, around)
            + total * torch.outer(around, around)
        )
        if y is not None:
            y, about = _centred(y)
            y_weighed = y if weights is None else y * weights[:, None]
            left = y_weighed.sum(0, dtype=torch.float64)
            self.y += left + total * about
            self.yx += y.T @ weighed
            self.yx += (
                torch.outer(about, rest)
                + torch.outer(left, around)
                + total * torch.outer(about, around)
            )
            self.yy += float((y_weighed * y).sum(dtype=torch.float64))
            self.yy += float(2 * about @ left + total * about @ about)
        self.weight += total
        self.count += len(x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.x + other.x,
            self.xx + other.xx,
            self.y + other.y,
            self.yx + other.yx,
            self.yy + other.yy,
            self.weight + other.weight,
            self.count + other.count,
        )

    def summed(self) -> Moments:
        """The sums over all processes; these same sums where there is one."""
        numbers = torch.tensor(
            [self.yy, self.weight, self.count], dtype=torch.float64, device=self.x.device
        )
        for tensor in (self.x, self.xx, self.y, self.yx, numbers):
            add_up(tensor)
        yy, weight, count = numbers.tolist()
        self.yy, self.weight, self.count = yy, weight, int(count)
        return self

    def covariance(self, centred: bool) -> Tensor:
        """(width, width): of x about its mean if ``centred``, else about 0."""
        mean = self.x / self.weight
        second = self.xx / self.weight
        return second.addr_(mean, mean, alpha=-1) if centred else second


def check_finite(*activations: Tensor) -> None:
    """Raise DataError if a number in the activations is not finite."""
    if not all_finite(activations):
        raise DataError(
            "with these calibration batches an activation is NaN or infinite: check the batches, "
            "and for float16 weights use model.float() or bfloat16"
        )


Value = TypeVar("Value")


def of_all_processes(value: Value) -> list[Value]:
    """The values that the processes call this with, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def first_of_all(count: int) -> int:
    """How many of something the processes before this one have, where this one has ``count``."""
    counts = of_all_processes(count)
    return sum(counts[: dist.get_rank()]) if len(counts) > 1 else 0


def flat(tensor: Tensor) -> Tensor:
    """(..., width) as (tokens, width)."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x about its mean, rounded to x's dtype, and that mean in float64."""
    mean = x.mean(0)
    return x - mean, mean.double()
