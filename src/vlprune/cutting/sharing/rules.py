"""Which units can take their weights from which others, and what follows from sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...structures.plan import Plan
from ...structures.record import Record, read_record
from ...structures.shards import shape_of, whole
from ...structures.structure import Slot, Structure
from ...structures.units import named_weights, positions

__all__ = [
    "UnitRows",
    "check_shares",
    "settled",
    "shareable",
    "similarity",
    "slot_pairs",
    "unit_rows",
    "with_followers",
]


def shareable(target: Structure, source: Structure, shapes: Mapping[str, Sequence[int]]) -> str:
    """Why units of ``target`` cannot take the weights of ``source``; empty if they can.

    ``shapes`` are those of the parameters, by name. The units of both must be laid out alike: the
    same slots in the same order, and the same width across them. Biases are never shared.
    """
    ours, theirs = _weights(target, shapes), _weights(source, shapes)
    if target.name == source.name:
        return "a structure cannot share with itself"
    if "experts" in (target.kind, source.kind):
        return "whole experts have a router for their own layer"
    if len(ours) != len(theirs):
        return f"{target.name} has {len(ours)} weights per unit, {source.name} {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        same = (a.axis, a.repeat, a.inner) == (b.axis, b.repeat, b.inner)
        widths = [_across(slot, shapes) for slot in (a, b)]
        if not same:
            return f"the units of {target.name} are laid out unlike those of {source.name}"
        if widths[0] != widths[1]:
            return (
                f"the units of {target.name} are {_times(widths[0])} wide, those of {source.name} "
                f"{_times(widths[1])}"
            )
    return ""


def check_shares(model: nn.Module, structures: Sequence[Structure], plan: Plan) -> None:
    """Raise PlanError unless all units that the plan shares can be shared."""
    if not plan.share:
        return
    shapes = {name: shape_of(weight) for name, weight in named_weights(model).items()}
    by_name = {s.name: s for s in structures}
    record = read_record(model)
    known = _shared_now(record) if record is not None else {}
    for name, (source, units, _) in plan.share.items():
        before, pairs = known.get(name, (source, {}))
        again = sorted(set(units) & pairs.keys())
        if before != source or again:
            raise PlanError(
                f"{name} takes weights from {before} already"
                + (f", unit {again[0]} among them" if again else "")
                + ": share only units that have weights of their own, from the same source"
            )
        problem = shareable(by_name[name], by_name[source], shapes)
        if _folded(by_name[name], record) != _folded(by_name[source], record):
            problem = "an earlier cut folded another softmax temperature into one of them"
        if problem:
            raise PlanError(
                f"{name} cannot take weights from {source}: {problem}; share only where units "
                "are alike"
            )


def _folded(structure: Structure, record: Record | None) -> float:
    """The square of the factor that earlier cuts multiplied into a structure's query weights."""
    if record is None or not structure.folds or structure.name not in record.plan.keep:
        return 1.0
    return len(record.plan.keep[structure.name]) / record.sizes[structure.name]


def _weights(structure: Structure, shapes: Mapping[str, Sequence[int]]) -> list[Slot]:
    """The slots that are shared: those of weights, not of biases."""
    return [slot for slot in structure.slots if len(shapes[slot.param]) > 1]


def _across(slot: Slot, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shapes[slot.param]) if axis != slot.axis)


def _times(widths: Sequence[int]) -> str:
    return " x ".join(str(n) for n in widths)


def slot_pairs(
    target: Structure, source: Structure, weights: Mapping[str, Any]
) -> list[tuple[Slot, Slot]]:
    """The pairs of slots, (target's, source's), that two structures share with each other.

    ``weights`` are parameters, or their shapes, by name.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in weights.items()}
    return list(zip(_weights(target, shapes), _weights(source, shapes), strict=True))


@dataclass(frozen=True)
class UnitRows:
    """Where the weights of some units lie in one slot; worked out once, read at every step."""

    slot: Slot
    count: int
    positions: Tensor

    def read(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The weights as they are now, (units, numbers per unit)."""
        slot, weight = self.slot, whole(parameters[self.slot.param])
        part = weight.index_select(slot.axis, self.positions).movedim(slot.axis, 0)
        part = part.reshape(slot.repeat, self.count, slot.inner, -1)
        return part.transpose(0, 1).reshape(self.count, -1)

    def add(self, rows: Tensor, into: Tensor) -> None:
        """Add ``rows``, as :meth:`read` gives them, to a tensor of the weight's shape, in place."""
        slot = self.slot
        across = [size for axis, size in enumerate(into.shape) if axis != slot.axis]
        part = rows.reshape(self.count, slot.repeat, slot.inner, -1).transpose(0, 1)
        part = part.reshape(-1, *across).movedim(0, slot.axis)
        into.index_add_(slot.axis, self.positions, part.to(into.dtype))


def unit_rows(
    structure: Structure, units: Tensor, parameters: Mapping[str, Tensor]
) -> list[UnitRows]:
    """Where the weights of some units lie, without biases: an entry per slot."""
    chosen = units.cpu()
    return [
        UnitRows(
            slot,
            len(chosen),
            positions(slot, structure.size, chosen).to(parameters[slot.param].device),
        )
        for slot in structure.slots
        if parameters[slot.param].dim() > 1
    ]


@torch.no_grad()
def similarity(model: nn.Module, target: Structure, source: Structure) -> Tensor:
    """Cosine similarity of every pair of units of two structures, over all their weights.

    Shape (target's size, source's size), float32 on the CPU.
    """
    weights = named_weights(model)
    sides = []
    for structure in (target, source):
        every = torch.arange(structure.size)
        rows = unit_rows(structure, every, weights)
        whole = torch.cat([one.read(weights) for one in rows], dim=1).float()
        sides.append(nn.functional.normalize(whole, dim=1))
    return (sides[0] @ sides[1].T).cpu()


def settled(model: nn.Module, structures: Sequence[Structure], plan: Plan) -> Plan:
    """The plan with the consequences of the sharing that the model has already.

    A unit whose weights are stored in another goes if that one goes. Raises PlanError if this
    leaves a structure without units.
    """
    record = read_record(model)
    if record is None or not record.plan.share:
        return plan
    sizes = {s.name for s in structures}
    share = dict(plan.share)
    for name, (source, pairs) in _shared_now(record).items():
        if name in sizes and source in sizes:
            more = dict(zip(*plan.share[name][1:], strict=True)) if name in plan.share else {}
            both = {**pairs, **more}
            share[name] = (source, [*both], [*both.values()])
    whole = replace(plan, share=share)
    keep = {s.name: whole.kept(s) for s in structures if s.name in share or s.name in plan.keep}
    empty = next((name for name, units in keep.items() if not units), "")
    if empty:
        raise PlanError(
            f"the plan leaves nothing of {empty!r}: the units it keeps are stored in "
            f"{share[empty][0]!r}, where they go; keep one of them there"
        )
    return replace(plan, keep=keep)


def _shared_now(record: Record) -> dict[str, tuple[str, dict[int, int]]]:
    """{structure: (source, {unit: source's unit})} of a cut model, units as numbered now."""
    alive = record.alive()
    found = {}
    for name, (source, units, theirs) in record.plan.share.items():
        now, there = ({u: i for i, u in enumerate(alive[n])} for n in (name, source))
        pairs = zip(units, theirs, strict=True)
        found[name] = (source, {now[u]: there[v] for u, v in pairs})
    return found


def with_followers(model: nn.Module, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates in which a unit whose weights are stored in another is no more open than that one.

    The cut removes such a unit together with its source, so a search must fade both.
    """
    record = read_record(model)
    followed = dict(gates)
    shares = _shared_now(record) if record is not None and record.plan.share else {}
    for _ in shares:  # one pass per link of the longest possible chain of sources
        for name, (source, pairs) in shares.items():
            if name in followed and source in followed:
                units, theirs = [*pairs], [*pairs.values()]
                values = followed[name].clone()
                values[units] = torch.minimum(values[units], followed[source][theirs])
                followed[name] = values
    return followed
