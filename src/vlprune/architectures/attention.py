"""From one attention block to its structures, in each of the three units.

A block is first *measured*, whatever its projections look like: the number and size of its heads,
and the places of the rows of q, k and v and the columns of o. Then one function per unit turns the
measured block into structures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..cutting.padded import is_linear, linear_axes, stock_name
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import Attr, Gate, Slot, Structure
from ..structures.units import owner_of
from . import layouts
from .fused import row_order, source_of
from .layouts import NATIVE, PADDED, Native

__all__ = ["UNITS", "Block", "Leave", "Part", "join", "measure_multihead", "measure_projected"]


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
    where its key and its value do (``k`` and ``v`` are empty then).
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

    def structure(
        self,
        suffix: str,
        kind: str,
        size: int,
        parts: list[tuple[Part, int, int]],
        *,
        native: bool,
        attrs: list[Attr],
        gates: list[tuple[Part, int, int]] | None = None,
        more: tuple[Slot, ...] = (),
        folds: tuple[str, ...] = (),
        share: float = 1.0,
    ) -> Structure:
        """A structure of ``parts`` (rows, repeat, inner) and the slots ``more``.

        The gates act on ``gates``, or on ``parts`` if ``gates`` is not given.
        """
        slots = [slot for part, repeat, inner in parts for slot in part.slots(repeat, inner)]
        swap = (self.core_path, f"{self.native.swap}:{self.stock_name}")
        return Structure(
            name=self.path + suffix,
            kind=kind,
            size=size,
            tower=self.tower,
            slots=(*slots, *more),
            gates=tuple(part.gated(repeat, inner) for part, repeat, inner in gates or parts),
            attrs=tuple(attrs) if native else (),
            folds=folds if native else (),
            layout="native" if native else "padded",
            swap=swap if native and self.native.swap else None,
            core=self.core_path if self.q else None,
            core_share=share,
        )

    def out(self, repeat: int, inner: int) -> tuple[Slot, ...]:
        """The slots of o."""
        return tuple(Slot(name, axis, 0, repeat, inner) for name, axis in self.columns)

    def attrs(self, names: tuple[str, ...], per_unit: int) -> list[Attr]:
        """Attributes among ``names`` that the core has and that follow the number of units."""
        return [
            Attr(self.core_path, name, per_unit)
            for name in names
            if isinstance(getattr(self.core, name, None), int)
        ]

    @property
    def across_heads(self) -> bool:
        """Whether queries or keys are normalised over all heads together."""
        for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            weight = getattr(getattr(self.core, name, None), "weight", None)
            if isinstance(weight, Tensor) and math.prod(shape_of(weight)) not in (0, self.size):
                return True
        return False


# -- the three units -------------------------------------------------------------------


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
    attrs += block.attrs(layouts.WIDTHS + block.native.widths, group * block.size)
    return [
        block.structure(
            "",
            "attention",
            block.kv,
            queries + keys + values,
            gates=gates,
            native=native,
            attrs=attrs,
            more=(*block.out(1, group * block.value_size), *per_head),
        )
    ]


def head_dims(block: Block) -> list[Structure]:
    """One structure; a unit is the same dimension of every head, in q, k, v and o (UPop).

    Raises Leave if value heads and query heads differ in size.
    """
    if block.value_size != block.size and block.q:
        raise Leave("its value heads have another size than its query heads")
    parts = [(part, block.heads * block.wide, 1) for part in block.q]
    parts += [(part, block.kv, 1) for part in (*block.k, *block.v)]
    attrs = block.attrs(layouts.HEAD_SIZES, 1)
    attrs += block.attrs(layouts.WIDTHS + block.native.widths, block.heads)
    if block.native.qk_vo:
        attrs.append(Attr(block.core_path, "value_dim", 1))
    return [
        block.structure(
            "",
            "attention",
            block.size,
            parts,
            native=block.native.head_dim and not block.across_heads,
            attrs=attrs,
            more=block.out(block.heads, 1),
            folds=block.folds,
        )
    ]


def qk_and_vo(block: Block) -> list[Structure]:
    """Two structures: dimensions of q and k, and dimensions of v and o."""
    if not block.q:
        return head_dims(block)
    if block.wide > 1:
        raise Leave("its query rows also hold gates or keys and values: take head_dim or head")
    native = block.native.qk_vo and not block.across_heads
    both = block.size + block.value_size
    qk = block.structure(
        ".qk",
        "attention_qk",
        block.size,
        [(part, block.heads, 1) for part in block.q] + [(part, block.kv, 1) for part in block.k],
        native=native,
        attrs=block.attrs(layouts.HEAD_SIZES, 1),
        share=block.size / both,
    )
    vo = block.structure(
        ".vo",
        "attention_vo",
        block.value_size,
        [(part, block.kv, 1) for part in block.v],
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
}


# -- measuring -------------------------------------------------------------------------


def measure_projected(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], tower: str
) -> Block:
    """The block at ``path`` whose projections are separate modules, or one fused module.

    Raises Leave if the block cannot be measured.
    """
    core_path = owner_of(join(path, row.qkv or row.q or row.v[0]))[0]
    core = modules[core_path]
    name = stock_name(core)
    for child in (row.q, row.k, row.qkv, *row.v, *row.o):
        if child and not is_linear(modules[join(path, child)]):
            kind = stock_class(modules[join(path, child)]).__name__
            raise Leave(f"its projection {child} is a {kind}, not a Linear")
    measure = _measure_fused if row.qkv else _measure_apart
    q, k, v, numbers = measure(path, row, modules, core)
    native = _native(core, name)
    return Block(
        path=path,
        core_path=core_path,
        core=core,
        stock_name=name,
        native=native,
        tower=tower,
        q=q,
        k=k,
        v=v,
        columns=tuple(
            (join(path, f"{o}.weight"), linear_axes(modules[join(path, o)])[1]) for o in row.o
        ),
        folds=tuple(name for x in q for name, _ in x.params) if native.fold else (),
        **numbers,
    )


Parts = tuple["Part", ...]
Measured = tuple[Parts, Parts, Parts, dict[str, int]]
"""q, k, v, and the block's ``heads``, ``kv``, ``size`` and ``value_size``."""


def _part(path: str, child: str, modules: Mapping[str, nn.Module], start: int = 0) -> Part:
    """The rows of a projection, from ``start`` on."""
    module: Any = modules[join(path, child)]
    params = [(join(path, f"{child}.weight"), linear_axes(module)[0])]
    if module.bias is not None:
        params.append((join(path, f"{child}.bias"), 0))
    return Part(tuple(params), start, join(path, child))


def _rows(path: str, child: str, modules: Mapping[str, nn.Module]) -> int:
    module: Any = modules[join(path, child)]
    return shape_of(module.weight)[linear_axes(module)[0]]


def _measure_fused(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], core: nn.Module
) -> Measured:
    """Measure q, k and v stacked in one projection. Raises Leave if its rows are not known."""
    name, rows = stock_name(core), _rows(path, row.qkv, modules)
    order = row_order(core)
    if not order:
        raise Leave(f"the row order of the fused projection in {name} is not known")
    value_size = getattr(core, "value_dim", None)
    heads, size = _number(core, layouts.HEAD_COUNTS), _number(core, layouts.HEAD_SIZES)
    kv = _number(core, layouts.KV_COUNTS)
    if size and not heads:  # only its config says how many
        heads = rows // size - 2 * kv if kv else rows // size // 3
    size, kv = size or (rows // 3 // heads if heads else 0), kv or heads
    value_size = value_size or size
    if not heads or not size or heads * size + kv * (size + value_size) != rows:
        raise Leave(f"its fused projection has {rows} rows, not q, k and v of its heads")
    numbers = {"heads": heads, "kv": kv, "size": size, "value_size": value_size}
    if order == "heads":
        if kv != heads or value_size != size:
            raise Leave(f"the row order of the fused projection in {name} is not known")
        return (_part(path, row.qkv, modules),), (), (), {**numbers, "wide": 3}
    starts = (0, heads * size, (heads + kv) * size)
    q, k, v = ((_part(path, row.qkv, modules, start),) for start in starts)
    return q, k, v, numbers


def _measure_apart(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], core: nn.Module
) -> Measured:
    """Measure separate projections; some blocks have only values. Raises Leave if that fails."""
    name, rows = stock_name(core), _rows(path, row.q or row.v[0], modules)
    size = _number(core, layouts.HEAD_SIZES)
    if not size:
        counted = _number(core, layouts.HEAD_COUNTS)
        if not counted or rows % counted:
            raise Leave(f"{name} does not say how many heads it has")
        size = rows // counted
    value_rows, out = _rows(path, row.v[0], modules), modules[join(path, row.o[0])]
    columns = int(shape_of(out.weight)[linear_axes(out)[1]])
    heads, kv = rows // size, (_rows(path, row.k, modules) if row.k else value_rows) // size
    wide = 2 if row.k and rows == 2 * columns and _gates_itself(core) else 1
    heads //= wide
    if not kv or rows % (wide * size) or value_rows % kv or heads % kv:
        raise Leave(f"{rows} query and {value_rows} value rows are not heads of {size}")
    value_size = value_rows // kv
    if heads * value_size != columns:
        raise Leave(
            f"its {heads} heads give {heads * value_size} values, and its output takes {columns}"
        )
    _check_between(core, columns, (row.q, row.k, *row.v, *row.o))
    q, k, v = (
        tuple(_part(path, child, modules) for child in children if child)
        for children in ((row.q,), (row.k,), row.v)
    )
    numbers = {"heads": heads, "kv": kv, "size": size, "value_size": value_size, "wide": wide}
    return q, k, v, numbers


def _gates_itself(core: nn.Module) -> bool:
    """Whether the query projection also gives a gate of the output: (heads, [query | gate])."""
    text = source_of(stock_class(core))
    return bool(re.search(r"-1,\s*self\.head_dim \* 2\), 2, dim=-1", text))


def _check_between(core: nn.Module, width: int, projections: tuple[str, ...]) -> None:
    """Raise Leave if a module between values and output has one number per column of the output.

    A norm there mixes all heads, so that a head that is zero is not a head that is absent.
    """
    names = {name.rpartition(".")[2] for name in projections}
    for child, layer in core.named_children():
        own = any(shape_of(p) == (width,) for p in layer.parameters(recurse=False))
        of_queries = child.startswith(("q_", "k_", "query", "key"))
        if own and child not in names and not of_queries and not is_linear(layer):
            kind = stock_class(layer).__name__
            raise Leave(f"{child} ({kind}) sits between its values and its output projection")


def measure_multihead(path: str, module: Any, tower: str) -> Block:
    """The block of an nn.MultiheadAttention, whose q, k and v are one parameter, not modules.

    Raises Leave if the block cannot be measured.
    """
    if module.in_proj_weight is None:
        raise Leave("its keys or values have another width than its queries")
    if module.bias_k is not None or module.add_zero_attn:
        raise Leave("it adds key and value biases of the full width")
    leaves = ["in_proj_weight"] + (["in_proj_bias"] if module.in_proj_bias is not None else [])
    params = tuple((join(path, leaf), 0) for leaf in leaves)
    heads, size = module.num_heads, module.head_dim
    starts = (0, heads * size, 2 * heads * size)
    q, k, v = (Part(params, start, path, by_weight=True) for start in starts)
    name = stock_name(module)
    return Block(
        path=path,
        core_path=path,
        core=module,
        stock_name=name,
        native=_native(module, name),
        tower=tower,
        heads=heads,
        kv=heads,
        size=size,
        value_size=getattr(module, "value_dim", size),
        q=(q,),
        k=(k,),
        v=(v,),
        columns=((join(path, "out_proj.weight"), 1),),
    )


def _native(core: nn.Module, name: str) -> Native:
    """The table's entry for the forward; PADDED for unknown classes, even under a known name."""
    known = stock_class(core).__module__.startswith(("transformers.", "torch.nn.", "vlprune."))
    return NATIVE.get(name, PADDED) if known else PADDED


def _number(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of ``names`` that is a positive whole number on the module, else 0."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _has_parameter(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_parameter(name), nn.Parameter)
    except AttributeError:
        return False
