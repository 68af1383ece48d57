"""Experts of a width that the kernel for all experts at once does not take.

torch's grouped product wants every row to begin at a multiple of 16 bytes: 8 neurons in half
precision, 4 in float32. A cut may leave any number. transformers does not look, so under its
default implementation of experts such a model would end in an error of the kernel.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ALIGNED", "is_aligned", "register"]

ALIGNED = 16
"""Bytes of which the rows of a grouped product must be a multiple."""


def register(moe: Any) -> None:
    """Let experts of any width run under "grouped_mm" (``moe``: transformers' module of experts).

    What the kernel takes runs as before; other widths, and float64, expert by expert as under
    "eager".
    """
    stock = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def grouped_mm(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a gated module's class is derived from the one that transformers has decorated
        forwards: Any = (cls.__dict__.get("forward") for cls in type(self).__mro__)
        one_by_one = next((f.__wrapped__ for f in forwards if hasattr(f, "__wrapped__")), None)
        if one_by_one is None or is_aligned(self):
            return stock(self, *args, **kwargs)
        return one_by_one(self, *args, **kwargs)

    moe.ALL_EXPERTS_FUNCTIONS.register("grouped_mm", grouped_mm)


def is_aligned(experts: Any) -> bool:
    """Whether the kernel takes an experts module's weights: rows of multiples of 16 bytes."""
    named = (getattr(experts, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    return all(
        weight.dtype != torch.float64
        and all(size * weight.element_size() % ALIGNED == 0 for size in weight.shape[1:])
        for weight in named
        if weight is not None
    )
