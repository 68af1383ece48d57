"""Rotary embeddings in heads that have become smaller.

A rotary embedding turns dimensions i and i + size/2 of a query or key together, by an angle of
their own, so a unit is such a pair, and the forward needs the angles of the pairs that stay. A norm
over a head's dimensions counts those that are gone as zeros. These are mixins for the stock
classes, whose forwards do the rest. Not from either paper.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.native import register_native_forward
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from .fused import source_of

__all__ = ["PAIRS", "WholeNorm", "head_norms", "turns_halves"]

PAIRS = "pairs"
"""The buffer of an attention module that holds the pairs that stay, ascending, int64."""

NORMS = ("q_norm", "k_norm")
ANGLES = "position_embeddings"


@register_native_forward("pairs")
class RotaryPairs:
    """Attention that gives its stock forward the cosines and sines of the pairs that stay."""

    pairs: Tensor

    def adopt(self) -> None:
        """Do nothing: the cut itself notes the pairs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock forward; ``position_embeddings`` are those of uncut heads."""
        place = _place_of_angles(stock_class(self))  # type: ignore[arg-type]
        given = kwargs.get(ANGLES, args[place] if place < len(args) else None)
        if given is not None:
            columns = torch.cat([self.pairs, self.pairs + given[0].shape[-1] // 2])
            given = tuple(angles.index_select(-1, columns) for angles in given)
        if place < len(args):
            args = (*args[:place], given, *args[place + 1 :])
        else:
            kwargs[ANGLES] = given
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@register_native_forward("norm")
class WholeNorm:
    """A root-mean-square norm that sees the dimensions that are gone as the zeros they were.

    Its own weight stays whole: a few numbers, and the same bits as under the gates.
    """

    pairs: Tensor
    weight: Tensor

    def adopt(self) -> None:
        """Do nothing: the cut itself notes the pairs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., dimensions that stay) -> the same shape."""
        whole = int(shape_of(self.weight)[0])
        columns = torch.cat([self.pairs, self.pairs + whole // 2])
        every = hidden_states.new_zeros(*hidden_states.shape[:-1], whole)
        every = every.index_copy(-1, columns, hidden_states)
        return super().forward(every).index_select(-1, columns)  # type: ignore[misc]


@cache
def _place_of_angles(cls: Any) -> int:
    """The position of ``position_embeddings`` among a forward's arguments, ``self`` not counted."""
    return [*inspect.signature(cls.forward).parameters].index(ANGLES) - 1


def turns_halves(core: nn.Module, size: int) -> bool:
    """Whether the module's forward can be given the angles of a part of its pairs.

    It must be handed ``position_embeddings``, turn whole heads by halves, and normalise queries
    and keys by root mean squares only. ``size`` is the size of a head.
    """
    text = source_of(stock_class(core))
    if f"{ANGLES}:" not in text or "apply_rotary_pos_emb" not in text or size % 2:
        return False
    return all(
        isinstance(norm, WholeNorm)
        or ("RMSNorm" in stock_class(norm).__name__ and shape_of(norm.weight) == (size,))
        for _, norm in head_norms(core)
    )


def head_norms(core: nn.Module) -> list[tuple[str, Any]]:
    """The norms over the dimensions of each query or key head, by the name of the child."""
    named = ((name, getattr(core, name, None)) for name in NORMS)
    return [(name, norm) for name, norm in named if getattr(norm, "weight", None) is not None]
