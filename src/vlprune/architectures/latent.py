"""Latent attention (MLA): queries, and keys with values, are expanded from narrow latents.

Each query head has rows [without position | with position], each head of the expansion of keys and
values rows [key without position | value]; the part of the keys with positions is one, for all
heads. Heads can go, and dimensions of the part without position, and value dimensions. The latents
pass through a norm, which mixes all of their dimensions: they stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..cutting.padded import is_linear, linear_axes, stock_name
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import AttentionUnit, Attr, Gate, Slot, Structure
from . import layouts
from .attention import Leave, join
from .fused import source_of
from .layouts import Native
from .measured import native_of, number_of

__all__ = ["expansions_at", "latent_structures"]

NOPE, ROPE, VALUE = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
IN_ORDER = tuple(re.compile(rf"\[self\.{NOPE}, self\.{last}\]") for last in (ROPE, VALUE))
"""How a forward takes the rows of a head apart."""


def expansions_at(module: nn.Module) -> tuple[str, ...]:
    """The children that expand queries, expand keys and values, and join the heads; else none."""
    for query in ("q_b_proj", "q_proj"):
        names = (query, "kv_b_proj", "o_proj")
        if all(module._modules.get(name) is not None for name in names):
            return names
    return ()


@dataclass(frozen=True)
class _Latent:
    """A measured block: ``heads`` of ``nope`` and ``rope`` query and ``value`` value dimensions."""

    path: str
    core: nn.Module
    native: Native
    tower: str
    names: tuple[str, ...]
    heads: int
    nope: int
    rope: int
    value: int

    def rows(
        self, name: str, repeat: int, inner: int, start: int = 0, period: int = 0
    ) -> list[Slot]:
        """The rows of a projection, and of its bias."""
        layer = self.core._modules[name]
        leaves = [("weight", linear_axes(layer)[0])]  # type: ignore[arg-type]
        if getattr(layer, "bias", None) is not None:
            leaves.append(("bias", 0))
        path = join(self.path, name)
        return [Slot(f"{path}.{leaf}", a, start, repeat, inner, period) for leaf, a in leaves]

    def columns(self, repeat: int, inner: int) -> tuple[Slot, Gate]:
        """The columns of the output projection, and the gate of what they read."""
        layer = self.core._modules[self.names[2]]
        path = join(self.path, self.names[2])
        axis = linear_axes(layer)[1]  # type: ignore[arg-type]
        slot = Slot(f"{path}.weight", axis, 0, repeat, inner)
        return slot, Gate(path, "input", 0, repeat, inner)

    def structure(
        self,
        suffix: str,
        size: int,
        slots: list[Slot],
        gates: list[Gate],
        attrs: list[Attr],
        native: bool,
        share: int,
    ) -> Structure:
        """A structure of this block; ``share`` dimensions of each head's scores are its own."""
        return Structure(
            name=self.path + suffix,
            kind="attention" + suffix.replace(".", "_"),
            size=size,
            tower=self.tower,
            slots=tuple(slots),
            gates=tuple(gates),
            attrs=tuple(attrs) if native else (),
            layout="native" if native else "padded",
            core=self.path,
            core_share=share / (self.nope + self.rope + self.value),
        )


def latent_structures(
    path: str,
    names: tuple[str, ...],
    modules: Mapping[str, nn.Module],
    tower: str,
    unit: AttentionUnit,
) -> list[Structure]:
    """The structures of the block at ``path``, in this unit. Raises Leave if it must stay dense."""
    return UNITS[unit](_measured(path, names, modules, tower))


def _measured(
    path: str, names: tuple[str, ...], modules: Mapping[str, nn.Module], tower: str
) -> _Latent:
    core = modules[path]
    for name in names:
        layer = modules[join(path, name)]
        if not is_linear(layer):
            kind = stock_class(layer).__name__
            raise Leave(f"its projection {name} is a {kind}, not a Linear")
    heads = number_of(core, layouts.HEAD_COUNTS)
    nope, rope, value = (number_of(core, (name,)) for name in (NOPE, ROPE, VALUE))
    shapes = [shape_of(modules[join(path, name)].weight) for name in names]
    axes = [linear_axes(modules[join(path, name)]) for name in names]
    found = (shapes[0][axes[0][0]], shapes[1][axes[1][0]], shapes[2][axes[2][1]])
    wanted = (heads * (nope + rope), heads * (nope + value), heads * value)
    if not heads or found != wanted:
        raise Leave(
            f"its projections have {found[0]}, {found[1]} and {found[2]} rows and columns, which "
            f"are not those of {heads} heads"
        )
    native = native_of(core, stock_name(core))
    return _Latent(path, core, native, tower, names, heads, nope, rope, value)


def _check_order(block: _Latent) -> None:
    """Raise Leave unless the source says in which order the rows of a head come."""
    text = source_of(stock_class(block.core))
    if not all(pattern.search(text) for pattern in IN_ORDER):
        raise Leave(f"the row order of the heads in {stock_name(block.core)} is not known")


def _heads(block: _Latent) -> list[Structure]:
    """One structure; a unit is a head."""
    column, gate = block.columns(1, block.value)
    slots = block.rows(block.names[0], 1, block.nope + block.rope)
    slots += [*block.rows(block.names[1], 1, block.nope + block.value), column]
    attrs = [
        Attr(block.path, name)
        for name in layouts.HEAD_COUNTS
        if getattr(block.core, name, None) == block.heads
    ]
    total = block.nope + block.rope + block.value
    return [block.structure("", block.heads, slots, [gate], attrs, block.native.head, total)]


def _without_position(block: _Latent) -> tuple[list[Slot], list[Gate], list[Attr]]:
    """Dimension u of every head's queries and keys without position."""
    q, kv = block.names[:2]
    periods = {q: block.nope + block.rope, kv: block.nope + block.value}
    slots = [
        s for name, period in periods.items() for s in block.rows(name, block.heads, 1, 0, period)
    ]
    gates = [
        Gate(join(block.path, name), "output", 0, block.heads, 1, period=period)
        for name, period in periods.items()
    ]
    attrs = [Attr(block.path, NOPE)]
    if getattr(block.core, "qk_head_dim", None) == block.nope + block.rope:
        attrs.append(Attr(block.path, "qk_head_dim", more=block.rope))
    return slots, gates, attrs


def _values(block: _Latent) -> tuple[list[Slot], list[Gate], list[Attr]]:
    """Dimension u of every head's values."""
    column, gate = block.columns(block.heads, 1)
    period = block.nope + block.value
    slots = block.rows(block.names[1], block.heads, 1, block.nope, period)
    return [*slots, column], [gate], [Attr(block.path, VALUE)]


def _dims(block: _Latent) -> list[Structure]:
    """One structure; a unit is the same dimension of queries and keys, and of values.

    Where the two differ in size, it is a dimension of the values alone.
    """
    _check_order(block)
    slots, gates, attrs = _values(block)
    native, share = block.native.head_dim, block.value
    if block.nope == block.value:
        more, gates_of, attrs_of = _without_position(block)
        slots, gates, attrs = more + slots, gates_of + gates, attrs_of + attrs
        share += block.nope
    return [block.structure("", block.value, slots, gates, attrs, native, share)]


def _apart(block: _Latent) -> list[Structure]:
    """Two structures: dimensions of queries and keys, and dimensions of values."""
    _check_order(block)
    made = []
    for suffix, size, parts in (
        (".qk", block.nope, _without_position(block)),
        (".vo", block.value, _values(block)),
    ):
        if size:
            made.append(block.structure(suffix, size, *parts, block.native.qk_vo, size))
    return made


UNITS: Mapping[AttentionUnit, Callable[[_Latent], list[Structure]]] = {
    "head_dim": _dims,
    "qk_vo": _apart,
    "head": _heads,
    "query_head": _heads,  # every query head has keys of its own
}
