"""Parameter counts: of a model, under a plan or gates, and of one unit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..cutting.gates import Gates
from ..cutting.sharing.rules import settled
from ..cutting.sharing.ties import ties_in, ties_of
from ..structures.plan import Plan
from ..structures.shards import shape_of
from ..structures.structure import Structure
from ..structures.units import laid_out, named_weights, positions
from .prices import Prices

__all__ = ["at_least_of", "kept_of", "param_prices", "params"]


def kept_of(structure: Structure, choice: Plan | Gates | None) -> int | Tensor:
    """How many units stay: a number for a plan, a differentiable scalar for gates."""
    if choice is None:
        return structure.size
    if isinstance(choice, Plan):
        return len(choice.kept(structure))
    return choice[structure.name].sum() if structure.name in choice else structure.size


def params(
    model: nn.Module, structures: Sequence[Structure], plan_or_gates: Plan | Gates | None = None
) -> int | Tensor:
    """Parameters of the whole model after the cut, as they are stored.

    An int for a plan or for None (the model as it is), a differentiable scalar for gates.
    Parameters shared by several modules count once, and so do units that a plan shares; buffers
    do not count. A plan's sharing adds to the sharing that the model has already.
    """
    if isinstance(plan_or_gates, Plan):
        plan_or_gates = settled(model, structures, plan_or_gates)
    shapes = {name: list(shape_of(p)) for name, p in named_weights(model).items()}
    removed: dict[str, dict[int, Any]] = defaultdict(dict)
    for structure in structures:
        gone = structure.size - kept_of(structure, plan_or_gates)
        for slot in structure.slots:
            axes = removed[slot.param]
            axes[slot.axis] = axes.get(slot.axis, 0) + gone * slot.repeat * slot.inner
    total: int | Tensor = 0
    for name, shape in shapes.items():
        total = (
            total
            + math.prod(
                (length - removed[name].get(axis, 0) for axis, length in enumerate(shape)),
                start=1,
            )
            if name in removed
            else total + math.prod(shape)
        )
    return total - _stored_elsewhere(model, structures, plan_or_gates, shapes)


def _stored_elsewhere(
    model: nn.Module,
    structures: Sequence[Structure],
    choice: Plan | Gates | None,
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """How many numbers weights take from other weights, now or after the plan."""
    ties = ties_in(model)
    if isinstance(choice, Plan):
        ties = [*ties, *ties_of(structures, choice, shapes)]
    if not ties:
        return 0
    gone: dict[str, set[int]] = defaultdict(set)
    if isinstance(choice, Plan):
        for structure in structures:
            dead = sorted(set(range(structure.size)) - set(choice.kept(structure)))
            for slot in structure.slots:
                gone[slot.param].update(positions(slot, structure.size, dead).tolist())
    total = 0
    for one in ties:
        pairs = zip(one.into, one.out_of, strict=True)
        alive = sum(a not in gone[one.target] and b not in gone[one.source] for a, b in pairs)
        total += alive * math.prod(shapes[one.target]) // shapes[one.target][one.axis]
    return total


def param_prices(model: nn.Module, structures: Sequence[Structure]) -> Prices:
    """The price of one unit of each structure in parameters.

    The cost is linear in the number of kept units, because no parameter has two pruned axes. A
    unit whose weights are stored elsewhere costs its bias alone (``Prices.borrowed``).
    """
    weights = named_weights(model)
    shapes = {name: shape_of(p) for name, p in weights.items()}
    unit, borrowed = {}, {}
    for structure in structures:
        costs = [
            (slot.repeat * slot.inner * math.prod(shape) // shape[slot.axis], len(shape) > 1)
            for slot in structure.slots
            for shape in (shapes[slot.param],)
        ]
        unit[structure.name] = float(sum(cost for cost, _ in costs))
        borrowed[structure.name] = float(sum(cost for cost, weight in costs if not weight))
    sizes = {s.name: s.size for s in structures}
    whole = sum(math.prod(shape) for shape in shapes.values())
    fixed = whole - sum(unit[n] * sizes[n] for n in unit)
    elsewhere = _units_elsewhere(model, structures)
    inside = sum((unit[n] - borrowed[n]) * len(units) for n, units in elsewhere.items())
    fixed -= _stored_elsewhere(model, (), None, shapes) - inside
    return Prices(
        "params", unit, sizes, fixed, borrowed, elsewhere, at_least=at_least_of(structures)
    )


def at_least_of(structures: Sequence[Structure]) -> dict[str, int]:
    """{structure: experts that must stay} of those whose units are experts."""
    return {s.name: s.least for s in structures if s.kind == "experts"}


def _units_elsewhere(
    model: nn.Module, structures: Sequence[Structure]
) -> dict[str, tuple[int, ...]]:
    """{structure: its units that take their weights from another structure} of the model."""
    tied: dict[str, set[int]] = defaultdict(set)
    for one in ties_in(model):
        tied[one.target].update(one.into)
    found = {}
    for structure in structures:
        slots = [s for s in structure.slots if s.param in tied]
        if slots:
            slot = slots[0]
            every = laid_out(slot, structure.size)
            units = [u for u in range(structure.size) if int(every[0, u, 0]) in tied[slot.param]]
            if units:
                found[structure.name] = tuple(units)
    return found
