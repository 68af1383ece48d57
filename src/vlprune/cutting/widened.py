"""A forward that computes in float64 throughout, whatever dtype it asks for.

Many forwards compute a part in float32 by themselves: norms, softmaxes, rotations, routers. In a
model in float64 such a part rounds, so that two sums over the same numbers, one of them with zeros
in between, differ by a ten-millionth. Other forwards make tensors of torch's default dtype, which
no matrix product in float64 takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["as_asked", "widened"]


class _Wide(TorchFunctionMode):
    """Asks for float64 where a forward asks for float32."""

    on = True

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _Wide.on:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def widened() -> Iterator[None]:
    """Let everything that Python code calls in the block compute in float64, not in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def as_asked() -> Iterator[None]:
    """Leave dtypes as they are asked for, inside of :func:`widened`.

    For what is no part of the forward: weights come rounded as a file or a cut would hold them.
    """
    before, _Wide.on = _Wide.on, False
    try:
        yield
    finally:
        _Wide.on = before
