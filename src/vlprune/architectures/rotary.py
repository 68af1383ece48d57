"""Rotary embeddings in heads that have become smaller.

A rotary embedding turns two dimensions of a query or key together, by an angle of their own, so a
unit is such a pair, and the forward needs the angles of the pairs that stay. A norm over a head's
dimensions counts those that are gone as zeros. These are mixins for the stock classes, whose
forwards do the rest. Not from either paper.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.native import register_native_forward
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from .fused import source_of

__all__ = ["PAIRS", "WholeNorm", "head_norms", "pairing_of", "turned_dimensions", "turns_a_part"]

PAIRS = "pairs"
"""The buffer of an attention module that holds the pairs that stay, ascending, int64."""

ANGLES = "position_embeddings"
COLUMNS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "halves": lambda pairs, many: torch.cat([pairs, pairs + many]),
    "neighbours": lambda pairs, many: torch.stack([2 * pairs, 2 * pairs + 1], -1).flatten(),
    "once": lambda pairs, many: pairs,
}
"""The positions of ``pairs`` among the two numbers (or the one) of each of ``many`` pairs."""

LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda angles: torch.cat([angles, angles], -1),
    "neighbours": lambda angles: angles.repeat_interleave(2, -1),
    "once": lambda angles: angles,
}
"""The numbers of all pairs, put where :data:`COLUMNS` looks for them."""


@register_native_forward("pairs")
class RotaryPairs:
    """Attention that gives its stock forward the cosines and sines of the pairs that stay."""

    pairs: Tensor
    angles: tuple[int, str]

    def adopt(self) -> None:
        """Note where the stock forward takes its angles, and how they lie; called once."""
        stock: Any = stock_class(self)  # type: ignore[arg-type]
        place = [*inspect.signature(stock.forward).parameters].index(ANGLES) - 1
        self.angles = place, pairing_of(stock).split()[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock forward; ``position_embeddings`` are those of uncut heads."""
        place, order = self.angles
        given = kwargs.get(ANGLES, args[place] if place < len(args) else None)
        if given is not None:
            many = given[0].shape[-1] // (1 if order == "once" else 2)
            columns = COLUMNS[order](self.pairs, many)
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
    order = "halves"

    def adopt(self) -> None:
        """Do nothing: the cut itself notes the pairs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., dimensions that stay) -> the same shape."""
        whole = int(shape_of(self.weight)[0])
        columns = COLUMNS[self.order](self.pairs, whole // 2)
        every = hidden_states.new_zeros(*hidden_states.shape[:-1], whole)
        every = every.index_copy(-1, columns, hidden_states)
        return super().forward(every).index_select(-1, columns)  # type: ignore[misc]


@register_native_forward("norm of neighbours")
class WholeNormOfNeighbours(WholeNorm):
    """The same, where neighbouring dimensions are pairs."""

    order = "neighbours"


def pairing_of(cls: Any, partly: bool = False) -> str:
    """Which dimensions a class's rotary embedding turns together, and how its angles are laid out.

    ``"halves"`` (i and i + size/2) or ``"neighbours"`` (2i and 2i + 1), a space, and how the angles
    lie in the last axis of ``position_embeddings``: likewise twice, or ``"once"``. Found by running
    the function that turns, on a part of the pairs and on all of them. With ``partly`` there are
    also dimensions behind the pairs, which it must leave alone. Empty if the forward is not handed
    ``position_embeddings``, or no layout fits.
    """
    return _pairing(cls, UNTURNED if partly else 0)


UNTURNED = 3
"""How many dimensions behind the pairs are tried."""


@cache
def _pairing(cls: Any, behind: int) -> str:
    named = re.search(r"\b(apply_\w*rotary\w*)\(", source_of(cls))
    turn = getattr(sys.modules.get(cls.__module__), named[1], None) if named else None
    if turn is None or ANGLES not in inspect.signature(cls.forward).parameters:
        return ""
    layouts = product(("halves", "neighbours"), COLUMNS)
    return next((f"{a} {b}" for a, b in layouts if _fits(turn, a, b, behind)), "")


def _fits(turn: Callable[..., Any], dims: str, angles: str, behind: int, pairs: int = 4) -> bool:
    """Whether ``turn`` gives a part of the pairs what it gives them among all of them."""
    part = torch.tensor([1, 3], device="cpu")
    rows, columns = (COLUMNS[order](part, pairs) for order in (dims, angles))
    rows = torch.cat([rows, torch.arange(behind, device="cpu")[1:] + 2 * pairs])
    for q, k, cos, sin in _trials(angles, pairs, behind):
        try:
            whole = turn(q, k, cos, sin)
            few = turn(*(x[..., rows] for x in (q, k)), *(x[..., columns] for x in (cos, sin)))
        except Exception:  # written for tensors of other axes
            continue
        same = all(torch.allclose(a[..., rows], b) for a, b in zip(whole, few, strict=True))
        left = (a[..., 2 * pairs :] for a in (q, k))
        return same and (
            not behind
            or all(torch.equal(a, b[..., 2 * pairs :]) for a, b in zip(left, whole, strict=True))
        )
    return False


def _trials(order: str, pairs: int, behind: int) -> Iterator[tuple[Tensor, ...]]:
    """Queries and keys of a few heads and tokens with their angles, in the usual axes."""
    draw = torch.Generator("cpu").manual_seed(0)
    for axes, turned in product(((1, 2, 3), (3, 2)), ((1, 3), (3,))):
        wide = 2 * pairs + behind
        q, k = (torch.randn(*axes, wide, generator=draw, device="cpu") for _ in "qk")
        angles = LAID_OUT[order](torch.rand(*turned, pairs, generator=draw, device="cpu") * 6)
        yield q, k, angles.cos(), angles.sin()


def head_norms(core: nn.Module, size: int) -> list[tuple[str, Any]] | None:
    """The norms over each query or key head, by the name of the child; None if one is unsuitable.

    Only root mean squares leave a zero a zero.
    """
    found: list[tuple[str, Any]] = []
    for name, child in core.named_children():
        weight = getattr(child, "weight", None)
        whole = isinstance(child, WholeNorm)
        if whole or (isinstance(weight, Tensor) and shape_of(weight) == (size,)):
            known = "RMSNorm" in stock_class(child).__name__ and name[0] in "qk"
            if not whole and not known:
                return None
            found.append((name, child))
    return found


def turns_a_part(core: nn.Module) -> bool:
    """Whether the config turns only the first dimensions of each head."""
    return _factors(core) != {1}


def _factors(core: nn.Module) -> set[Any]:
    """The parts of a head that the config turns, in any kind of layer."""
    config: Any = getattr(core, "config", None)
    default = getattr(config, "partial_rotary_factor", None)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in given.values() if isinstance(one, dict)] or [given]
    return {one.get("partial_rotary_factor") or default or 1 for one in kinds}


def turned_dimensions(core: Any) -> int:
    """How many of the first dimensions of each head are turned; 0 where layers differ."""
    pairs, own = core._buffers.get(PAIRS), getattr(core, "rotary_ndims", None)
    if pairs is not None:
        return 2 * int(shape_of(pairs)[0])
    if isinstance(own, int):
        return own
    factors, config = _factors(core), getattr(core, "config", None)
    if config is None or len(factors) > 1:
        return 0
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return int(size * factors.pop())
