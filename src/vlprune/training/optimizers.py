"""Optimizers that outlive a cut: they go on with the parameters that replaced their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..structures.units import plain_name

__all__ = ["exchange", "replaced"]


def replaced(before: Mapping[str, Tensor], model: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
    """{id(old): (old, new)} of the parameters that a cut has replaced, found by name."""
    now = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return {
        id(old): (old, now[plain_name(name)])
        for name, old in before.items()
        if plain_name(name) in now and now[plain_name(name)] is not old
    }


def exchange(optimizer: Any, new: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Let an optimizer train the new parameters; their moments start anew, all others go on."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)][1] if id(p) in new else p for p in group["params"]]
    for old, _ in new.values():
        optimizer.state.pop(old, None)
