"""The arithmetic of slots: which positions of an axis belong to which unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .shards import whole
from .structure import Gate, Slot, Structure

__all__ = [
    "laid_out",
    "named_weights",
    "owner_of",
    "plain_name",
    "positions",
    "span",
    "spread",
    "unit_squares",
]


def owner_of(name: str) -> tuple[str, str]:
    """``("a.b", "weight")`` for ``"a.b.weight"``."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def span(slot: Slot | Gate, size: int) -> int:
    """From the slot's first position to behind its last, for a structure of ``size`` units."""
    block = size * slot.inner
    return (slot.repeat - 1) * (slot.period or block) + block


def laid_out(slot: Slot | Gate, size: int) -> Tensor:
    """The positions of all units as (repeat, size, inner): int64, on the CPU."""
    block = size * slot.inner
    first = torch.arange(slot.repeat, device="cpu") * (slot.period or block) + slot.start
    inside = torch.arange(block, device="cpu").reshape(size, slot.inner)
    return first[:, None, None] + inside


def positions(slot: Slot | Gate, size: int, units: Sequence[int] | Tensor) -> Tensor:
    """Positions on the slot's axis that belong to ``units``: shape (n,), int64, on the CPU.

    They follow the slot's layout (repeat, units in the order given, inner).
    """
    chosen = torch.as_tensor(units, dtype=torch.long, device="cpu")
    return laid_out(slot, size)[:, chosen, :].reshape(-1)


def spread(values: Tensor, slot: Slot | Gate, width: int) -> Tensor:
    """``values`` (size,) laid out over an axis of ``width`` positions, 1 where no unit is.

    Differentiable; shape (width,).
    """
    rows = values[None, :, None].expand(slot.repeat, -1, slot.inner).flatten(1)
    between = slot.period - rows.shape[1] if slot.period else 0
    if between:
        rows = torch.cat([rows, rows.new_ones(slot.repeat, between)], 1)
    block = rows.reshape(-1)[: rows.numel() - between]
    before, after = slot.start, width - slot.start - block.numel()
    if before == 0 and after == 0:
        return block
    return torch.cat([block.new_ones(before), block, block.new_ones(after)])


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under the name that a forward pass uses.

    A weight that is put together from shared parts appears whole, under its own name, in place of
    its stored part; a parameter that several modules hold appears under its first name.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, leaf = owner_of(plain_name(name))
        module = model.get_submodule(path)
        whole = parametrize.is_parametrized(module, leaf)
        found[plain_name(name)] = getattr(module, leaf) if whole else parameter
    return found


def plain_name(name: str) -> str:
    """``"a.weight"`` for ``"a.parametrizations.weight.original"``; other names unchanged."""
    if not name.endswith(".original"):
        return name
    return name.removesuffix(".original").replace(".parametrizations.", ".")


@torch.no_grad()
def unit_squares(
    weights: Callable[[str], Tensor], structures: Sequence[Structure]
) -> Mapping[str, Tensor]:
    """Sum of squared weights of every unit, float32: {structure: (size,)}.

    Each sum runs over all slots of the unit, biases included. ``weights`` gives the parameter of a
    name; one is looked at (of a sharded model: gathered) at a time, and none is kept.
    """
    sums: dict[tuple[str, int], Tensor] = {}
    totals = {}
    for structure in structures:
        total = torch.zeros(structure.size)
        for slot in structure.slots:
            axis_sums = sums.get((slot.param, slot.axis))
            if axis_sums is None:
                weight = whole(weights(slot.param)).detach()
                squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
                others = [axis for axis in range(weight.dim()) if axis != slot.axis]
                if others:  # a vector_norm over rows takes ten times as long
                    squares = squares.sum(others)
                axis_sums = sums[slot.param, slot.axis] = squares.cpu()
            total += axis_sums[laid_out(slot, structure.size)].sum((0, 2))
        totals[structure.name] = total
    return totals
