"""Heads of which a rotary embedding turns only the first dimensions.

Two structures: the pairs that are turned, and the dimensions behind them, one by one. Both are
parts of the same rows, columns and numbers, and either can be cut without the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..cutting.wrappers import stock_class
from ..structures.structure import Gate, Slot, Structure
from .rotary import PAIRS, head_norms, pairing_of, turned_dimensions

if TYPE_CHECKING:
    from .attention import Block, Part

__all__ = ["REST", "partly_turned", "turned_part"]

REST = ".unturned"
"""What the name of the second structure ends with, after the path of the block."""

Row = tuple["Part", int, int, int, bool]
"""Rows of one of q, k and v: (where, first row of its first head, heads, rows from one head to the
next, whether they are turned)"""


def turned_part(block: Block) -> int:
    """How many dimensions of each head are turned; 0 for all or none, or where it is not known."""
    if block.wide == 2 or block.value_size != block.size or block.across_heads:
        return 0
    if not block.q or not (block.v or block.wide == 3):
        return 0
    turned = turned_dimensions(block.core)
    if not 0 < turned < block.size or turned % 2 or head_norms(block.core, block.size) != []:
        return 0
    cuts_itself = isinstance(getattr(block.core, "rotary_ndims", None), int)
    known = pairing_of(stock_class(block.core), partly=True)
    return turned if known or (cuts_itself and pairing_of(stock_class(block.core))) else 0


def partly_turned(block: Block, turned: int) -> list[Structure]:
    """The pairs among the first ``turned`` dimensions of each head, and the dimensions behind them.

    With a pair go two neighbouring dimensions of the values among the first ones.
    """
    halves = _order(block).startswith("halves")
    starts, inner = ((0, turned // 2), 1) if halves else ((0,), 2)
    pairs: list[tuple[Slot, Gate]] = []
    rest: list[tuple[Slot, Gate]] = []
    for part, first, heads, period, is_turned in _rows(block):
        for start, width in [(start, inner) for start in starts] if is_turned else [(0, 2)]:
            pairs += _placed(part, first + start, heads, width, period)
        rest += _placed(part, first + turned, heads, 1, period)
    made = []
    for suffix, size, placed, start, inner, width in (
        ("", turned // 2, pairs, 0, 2, turned),
        (REST, block.size - turned, rest, turned, 1, block.size - turned),
    ):
        columns = [
            Slot(name, axis, start, block.heads, inner, block.size) for name, axis in block.columns
        ]
        numbers = [*block.sizes(inner), *block.widths(inner * block.heads)]
        attrs = [replace(attr, joint=True) for attr in numbers]
        if not suffix:
            attrs += block.attrs(("rotary_ndims",), 2)
        made.append(
            block.structure(
                suffix,
                "attention" + suffix.replace(".", "_"),
                size,
                [],
                native=True,
                attrs=attrs,
                gates=[*dict.fromkeys(gate for _, gate in placed)],
                more=(*(slot for slot, _ in placed), *columns),
                share=width / block.size,
                more_swaps=() if suffix else ((block.core_path, "pairs"),),
                indices=() if suffix else ((block.core_path, PAIRS),),
            )
        )
    return made


def _order(block: Block) -> str:
    cls = stock_class(block.core)
    return pairing_of(cls, partly=True) or pairing_of(cls)


def _rows(block: Block) -> Iterator[Row]:
    """q, k and v, each in a projection of its own or all in one, head by head."""
    size = block.size
    if block.wide == 3:
        for part in block.q:
            for place in range(3):
                yield part, part.start + place * size, block.heads, 3 * size, place < 2
        return
    for parts, heads, is_turned in (
        (block.q, block.heads, True),
        (block.k, block.kv, True),
        (block.v, block.kv, False),
    ):
        for part in parts:
            yield part, part.start, heads, size, is_turned


def _placed(part: Part, start: int, heads: int, inner: int, period: int) -> list[tuple[Slot, Gate]]:
    """The slots of these rows, in weight and bias, with the gate of what they give."""
    gate = Gate(part.gate, "output", start, heads, inner, period=period)
    return [(Slot(name, axis, start, heads, inner, period), gate) for name, axis in part.params]
