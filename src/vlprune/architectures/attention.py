"""A measured attention block, and its structures in each of the units.

What a block's projections look like is settled before, in ``measured.py``. Here one function per
unit turns the block into structures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import Attr, Gate, Slot, Structure
from ..structures.units import owner_of
from . import layouts
from .layouts import Native
from .rotary import PAIRS, WholeNorm, head_norms, pairing_of, turns_a_part
from .turned_part import partly_turned, turned_part

__all__ = ["Block", "Leave", "Part", "join", "structures_of"]


class Leave(Exception):
    """This block stays dense; the message says why."""


def join(path: str, name: str) -> str:
    """``path.name``; if either is empty, the other."""
    return f"{path}.{name}" if path and name else path or name


@dataclass(frozen=True)
class Part:
    """The rows of q, k or v: the (parameter, axis) pairs, the first row, and the gated module.

    ``gate`` is the path of the module whose output is scaled or, with ``by_weight``, whose
    parameters are scaled.
    """

    params: tuple[tuple[str, int], ...]
    start: int
    gate: str
    by_weight: bool = False

    def slots(self, repeat: int, inner: int) -> tuple[Slot, ...]:
        """One slot per parameter."""
        return tuple(Slot(name, axis, self.start, repeat, inner) for name, axis in self.params)

    def gated(self, repeat: int, inner: int) -> Gate:
        """The gate of these rows."""
        if not self.by_weight:
            return Gate(self.gate, "output", self.start, repeat, inner)
        names = tuple(owner_of(name)[1] for name, _ in self.params)
        return Gate(self.gate, "weight", self.start, repeat, inner, names)


@dataclass(frozen=True)
class Block:
    """A measured attention block.

    The block has ``heads`` query heads and ``kv`` key-value heads of ``size`` dimensions;
    value heads have ``value_size``. ``columns`` are the (parameter, axis) pairs of o. ``core`` is
    the module that computes the scores; ``native`` says what its forward accepts. Each head has
    ``wide`` times ``size`` rows in ``q``: 2 where a gate of its output lies behind its query, 3
    where its key and its value do (``k`` and ``v`` are empty then). With ``one_cache`` it
    also reads the keys and values of another block, whose heads may lose other units. ``gate`` are
    the (parameter, axis) pairs of a projection that gates what the heads give, number by number.
    """

    path: str
    core_path: str
    core: nn.Module
    stock_name: str
    native: Native
    tower: str
    heads: int
    kv: int
    size: int
    value_size: int
    q: tuple[Part, ...]
    k: tuple[Part, ...]
    v: tuple[Part, ...]
    columns: tuple[tuple[str, int], ...]
    folds: tuple[str, ...] = ()
    wide: int = 1
    one_cache: bool = False
    gate: tuple[tuple[str, int], ...] = ()

    def structure(
        self,
        suffix: str,
        kind: str,
        size: int,
        parts: list[tuple[Part, int, int]],
        *,
        native: bool,
        attrs: list[Attr],
        gates: Sequence[tuple[Part, int, int] | Gate] = (),
        more: tuple[Slot, ...] = (),
        folds: tuple[str, ...] = (),
        share: float = 1.0,
        more_swaps: tuple[tuple[str, str], ...] = (),
        indices: tuple[tuple[str, str], ...] = (),
    ) -> Structure:
        """A structure of ``parts`` (rows, repeat, inner) and the slots ``more``.

        The gates are ``gates``, or on those parts, or on ``parts`` if there are none.
        """
        slots = [slot for part, repeat, inner in parts for slot in part.slots(repeat, inner)]
        swap = (self.core_path, f"{self.native.swap}:{self.stock_name}")
        swaps = (swap,) if native and self.native.swap else ()
        return Structure(
            name=self.path + suffix,
            kind=kind,
            size=size,
            tower=self.tower,
            slots=(*slots, *more),
            gates=tuple(
                gate if isinstance(gate, Gate) else gate[0].gated(*gate[1:])
                for gate in gates or parts
            ),
            attrs=tuple(attrs) if native else (),
            folds=folds if native else (),
            layout="native" if native else "padded",
            swaps=(*swaps, *more_swaps),
            indices=indices,
            core=self.core_path if self.q else None,
            core_share=share,
        )

    def read(self, repeat: int, inner: int) -> list[Gate]:
        """The gates where o reads its input, if values from elsewhere reach it; else none."""
        paths = [owner_of(name)[0] for name, _ in self.columns] if self.one_cache else []
        return [Gate(path, "input", 0, repeat, inner) for path in paths]

    def out(self, repeat: int, inner: int) -> tuple[Slot, ...]:
        """The slots of o, and of what gates its input."""
        places = (*self.columns, *self.gate)
        return tuple(Slot(name, axis, 0, repeat, inner) for name, axis in places)

    def attrs(self, names: tuple[str, ...], per_unit: int) -> list[Attr]:
        """Attributes among ``names`` that the core has and that follow the number of units."""
        return [
            Attr(self.core_path, name, per_unit)
            for name in names
            if isinstance(getattr(self.core, name, None), int)
        ]

    def sizes(self, per_unit: int) -> list[Attr]:
        """Attributes that hold the size of a head, under whatever name."""
        names = tuple(n for n in layouts.HEAD_SIZES if n not in self.native.widths)
        return self.attrs(names, per_unit)

    def widths(self, per_unit: int) -> list[Attr]:
        """Attributes that hold heads x head size."""
        return self.attrs(layouts.WIDTHS + self.native.widths, per_unit)

    @property
    def across_heads(self) -> bool:
        """Whether what a head does depends on the queries or keys of others, or goes elsewhere."""
        if self.one_cache or self.stock_name in layouts.SCORES_LEAVE:
            return True
        for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            norm = getattr(self.core, name, None)
            weight = getattr(norm, "weight", None) if not isinstance(norm, WholeNorm) else None
            if isinstance(weight, Tensor) and math.prod(shape_of(weight)) not in (0, self.size):
                return True
        return False

    @property
    def grouped(self) -> bool:
        """Whether query heads shared keys before any cut, by the config, which a cut leaves."""
        config = getattr(self.core, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        kv = getattr(config, "num_key_value_heads", None)
        return isinstance(heads, int) and isinstance(kv, int) and heads > kv

    @property
    def borrows(self) -> bool:
        """Whether the block reads the keys and values of another layer."""
        return bool(self.q) and not self.k and not self.v and self.wide == 1

    @property
    def turned(self) -> bool:
        """Whether a rotary embedding turns the dimensions of whole heads in pairs."""
        if (
            self.wide > 1
            or not self.v
            or self.value_size != self.size
            or self.across_heads
            or self.size % 2
        ):
            return False
        known = bool(pairing_of(stock_class(self.core))) and not turns_a_part(self.core)
        return known and head_norms(self.core, self.size) is not None


# -- the units -------------------------------------------------------------------------


def whole_heads(block: Block) -> list[Structure]:
    """One structure; a unit is a head, or a KV group with all query heads that read it."""
    group = block.heads // block.kv
    queries = [(part, 1, group * block.wide * block.size) for part in block.q]
    keys = [(part, 1, block.size) for part in block.k]
    values = [(part, 1, block.value_size) for part in block.v]
    # Attention is linear in its values, so gating them gates the head. Only a norm across
    # heads must also see the missing queries and keys as zeros.
    gates = values + queries + keys if block.across_heads or not values else values
    native = block.native.head and not block.across_heads
    per_head = [
        Slot(join(block.core_path, leaf), axis)
        for leaf, axis in block.native.per_head
        if native and _has_parameter(block.core, leaf)
    ]
    attrs = block.attrs(layouts.HEAD_COUNTS, group) + block.attrs(layouts.KV_COUNTS, 1)
    attrs += block.widths(group * block.size)
    return [
        block.structure(
            "",
            "attention",
            block.kv,
            queries + keys + values,
            gates=[*gates, *block.read(1, group * block.value_size)],
            native=native,
            attrs=attrs,
            more=(*block.out(1, group * block.value_size), *per_head),
        )
    ]


def query_heads(block: Block) -> list[Structure]:
    """One structure; a unit is the same query head of every KV group, in q and o.

    All groups keep equally many, as grouped-query attention needs. Where no query heads share
    keys, the units are whole heads.
    """
    group = block.heads // block.kv
    if not block.k or (group == 1 and not block.grouped):
        return whole_heads(block)
    queries = [(part, block.kv, block.wide * block.size) for part in block.q]
    gates = [part.gated(*layout) for part, *layout in queries] if block.across_heads else []
    # A query of zeros still attends, evenly, so the gate is where its output is read.
    gates += [
        Gate(owner_of(name)[0], "input", 0, block.kv, block.value_size) for name, _ in block.columns
    ]
    attrs = block.attrs(layouts.HEAD_COUNTS, block.kv) + block.attrs(layouts.GROUPS, 1)
    attrs += block.widths(block.kv * block.size)
    return [
        block.structure(
            "",
            "attention",
            group,
            queries,
            gates=gates,
            native=block.native.head and not block.across_heads,
            attrs=attrs,
            more=block.out(block.kv, block.value_size),
        )
    ]


def head_dims(block: Block) -> list[Structure]:
    """One structure; a unit is the same dimension of every head, in q, k, v and o (UPop).

    Two structures where a rotary embedding turns a part of each head.
    Raises Leave if value heads and query heads differ in size.
    """
    if block.value_size != block.size and block.q:
        raise Leave("its value heads have another size than its query heads")
    if block.native.rotary and block.turned:
        return [rotary_pairs(block)]
    if block.native.rotary and (turned := turned_part(block)):
        return partly_turned(block, turned)
    parts = [(part, block.heads * block.wide, 1) for part in block.q]
    parts += [(part, block.kv, 1) for part in (*block.k, *block.v)]
    attrs = block.sizes(1)
    attrs += block.widths(block.heads)
    if block.native.qk_vo:
        attrs.append(Attr(block.core_path, "value_dim", 1))
    return [
        block.structure(
            "",
            "attention",
            block.size,
            parts,
            gates=[*parts, *block.read(block.heads, 1)],
            native=block.native.head_dim and not block.native.rotary and not block.across_heads,
            attrs=attrs,
            more=block.out(block.heads, 1),
            folds=block.folds,
        )
    ]


def rotary_pairs(block: Block) -> Structure:
    """The structure whose units are the pairs of q and k that a rotary embedding turns together.

    A unit also has two neighbouring dimensions of v and o, which nothing turns.
    """
    norms = [join(block.core_path, name) for name, _ in head_norms(block.core, block.size) or ()]
    halves = pairing_of(stock_class(block.core)).startswith("halves")
    repeat, inner = (2, 1) if halves else (1, 2)
    norm = "norm" if halves else "norm of neighbours"
    return block.structure(
        "",
        "attention",
        block.size // 2,
        [
            *((part, repeat * block.heads, inner) for part in block.q),
            *((part, repeat * block.kv, inner) for part in block.k),
            *((part, block.kv, 2) for part in block.v),
        ],
        native=True,
        attrs=[
            *block.sizes(2),
            *block.widths(2 * block.heads),
        ],
        more=block.out(block.heads, 2),
        more_swaps=((block.core_path, "pairs"), *((path, norm) for path in norms)),
        indices=tuple((path, PAIRS) for path in (block.core_path, *norms)),
    )


def qk_and_vo(block: Block) -> list[Structure]:
    """Two structures: dimensions of q and k, and dimensions of v and o.

    One, as under `head_dim`, where there are no queries, or where the keys are the values.
    """
    if block.wide > 1:
        raise Leave("its query rows also hold gates or keys and values: take head_dim or head")
    if not block.q or not block.v:
        return head_dims(block)
    native = block.native.qk_vo and not block.across_heads
    both = block.size + block.value_size
    qk = block.structure(
        ".qk",
        "attention_qk",
        block.size,
        [(part, block.heads, 1) for part in block.q] + [(part, block.kv, 1) for part in block.k],
        native=native,
        attrs=block.sizes(1),
        share=block.size / both,
    )
    values = [(part, block.kv, 1) for part in block.v]
    vo = block.structure(
        ".vo",
        "attention_vo",
        block.value_size,
        values,
        gates=[*values, *block.read(block.heads, 1)],
        native=native,
        attrs=[Attr(block.core_path, "value_dim", 1)],
        more=block.out(block.heads, 1),
        share=block.value_size / both,
    )
    return [qk, vo]


UNITS: Mapping[str, Callable[[Block], list[Structure]]] = {
    "head_dim": head_dims,
    "qk_vo": qk_and_vo,
    "head": whole_heads,
    "query_head": query_heads,
}


def structures_of(block: Block, unit: str) -> list[Structure]:
    """The structures of a block under an attention unit. Raises Leave if it has none.

    Of a block that reads another layer's keys and values, units are its query heads whatever is
    asked for: keys and values go with the layer that makes them.
    """
    units, why = layouts.TIED.get(block.stock_name, ((), ""))
    if unit in units:
        raise Leave(why)
    return [own_queries(block)] if block.borrows else UNITS[unit](block)


def own_queries(block: Block) -> Structure:
    """The structure of a block that has queries only; a unit is one head, in q and o."""
    columns = [owner_of(name)[0] for name, _ in block.columns]
    return block.structure(
        "",
        "attention",
        block.heads,
        [(part, 1, block.size) for part in block.q],
        gates=[Gate(path, "input", 0, 1, block.value_size) for path in columns],
        native=False,
        attrs=[],
        more=block.out(1, block.value_size),
    )


def _has_parameter(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_parameter(name), nn.Parameter)
    except AttributeError:
        return False
