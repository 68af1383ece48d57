"""Modules of a stock class with a few numbers in place of their weights, to try a forward on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..cutting.wrappers import stock_class

__all__ = ["stand_in"]


def stand_in(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    children: Mapping[str, nn.Module],
    numbers: Mapping[str, int],
) -> Any:
    """A module of the same stock class, with other parameters, children and attributes."""
    made: Any = object.__new__(stock_class(module))
    made.__dict__.update(nn.Module().__dict__)
    made.__dict__ |= {n: v for n, v in module.__dict__.items() if n not in made.__dict__}
    own = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    made.__dict__ |= {
        "_parameters": {**dict.fromkeys(module._parameters), **own},
        "_buffers": dict(module._buffers),
        "_modules": dict(children),
        "training": False,
        **numbers,
    }
    made.__dict__.pop("forward", None)  # of an instance, as accelerate sets it
    return made
