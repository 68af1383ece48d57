"""Differentiable numbers per unit: does the unit stay, does it take weights from another unit?

A plan holds the same decisions as lists; vectors hold them while they are being learnt. Source:
joint share and prune (ICLR 2023); the exact form is not from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..cutting.sharing.mixed import pairing
from ..cutting.sharing.rules import UnitRows, slot_pairs, unit_rows
from ..prices.prices import Prices
from ..structures.plan import Plan
from ..structures.shards import changing, whole
from ..structures.structure import AttentionUnit, Structure
from ..structures.units import positions

__all__ = ["Move", "Vectors", "add_gradients", "alignment", "distances", "draw_near", "moves_to"]

Shares = Mapping[str, tuple[str, Tensor, Tensor]]
"""{structure: (source, 1 per unit that takes the source's weights, the source's unit for each)}."""


@dataclass(frozen=True)
class Vectors:
    """``keep`` {structure: (size,)}, 1 where a unit stays, and ``share``, as :data:`Shares`.

    A structure that is absent stays whole. Sharing takes precedence: a unit that shares is alive if
    its source unit is.
    """

    keep: Mapping[str, Tensor]
    share: Shares = field(default_factory=dict)

    @classmethod
    def of_plan(cls, structures: Sequence[Structure], plan: Plan) -> Vectors:
        """The vectors that hold the decisions of a plan."""
        keep = {}
        for structure in structures:
            keep[structure.name] = torch.zeros(structure.size)
            keep[structure.name][list(plan.kept(structure))] = 1
        share = {
            s.name: (plan.share[s.name][0], *pairing(s.size, plan.shared(s)))
            for s in structures
            if s.name in plan.share
        }
        return cls(keep, share)

    def alive(self) -> dict[str, Tensor]:
        """1 where a unit has an effect: an own unit that stays, a shared unit whose source does."""
        alive: dict[str, Tensor] = {}

        def of(name: str) -> Tensor | None:
            if name not in alive:
                stays = self.keep.get(name)
                if name in self.share:
                    source, share, units = self.share[name]
                    there = of(source)
                    taken = torch.ones_like(share) if there is None else there[units]
                    own = torch.ones_like(share) if stays is None else stays
                    alive[name] = share * taken + (1 - share) * own
                elif stays is not None:
                    alive[name] = stays
                else:
                    return None
            return alive[name]

        for name in (*self.keep, *self.share):
            of(name)
        return alive

    def own(self) -> dict[str, Tensor]:
        """1 where a unit stays with weights of its own, that is, where they are stored."""
        whole = {name: torch.ones_like(share) for name, (_, share, _) in self.share.items()}
        return {
            name: stays * (1 - self.share[name][1]) if name in self.share else stays
            for name, stays in {**whole, **self.keep}.items()
        }

    def cost(self, prices: Prices) -> Tensor:
        """The cost of the model, a scalar; exact where all vectors are 0 or 1."""
        alive, own = self.alive(), self.own()
        total = torch.tensor(prices.fixed, dtype=torch.float64)
        for name, price in prices.unit.items():
            if name not in alive:
                total = total + price * prices.sizes[name]
                continue
            borrowed = prices.borrowed.get(name, 0.0)
            total = total + borrowed * alive[name].double().sum()
            total = total + (price - borrowed) * own[name].double().sum()
        return total

    def plan(
        self,
        structures: Sequence[Structure],
        attention: AttentionUnit = "head_dim",
        fingerprint: str = "",
    ) -> Plan:
        """The plan with the same decisions; values above one half count as 1."""
        alive = self.alive()
        keep = {s.name: tuple(_units(alive[s.name])) for s in structures if s.name in alive}
        share = {}
        for name, (source, values, units) in self.share.items():
            chosen = [u for u in _units(values) if u in set(keep[name])]
            if chosen:
                share[name] = (source, chosen, units[chosen].tolist())
        return Plan(keep=keep, share=share, attention=attention, fingerprint=fingerprint)


def _units(values: Tensor) -> list[int]:
    return [int(unit) for unit in (values > 0.5).nonzero()[:, 0]]


def alignment(
    model: nn.Module, structures: Sequence[Structure], vectors: Vectors, epsilon: float = 1e-8
) -> Tensor:
    """How far the weights are from the wanted structure: R_align, a scalar.

    The lengths of all units that are to go, plus the distances of all units that are to share from
    the units they share, divided by the number of structures. A unit's weights count, not its bias.
    Differentiable in the weights, both of a unit and of its source.
    """
    moves = moves_to(model, structures, vectors)
    total: Tensor | None = None
    for term in distances(model, moves, epsilon):
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total / len(structures)


@dataclass(frozen=True)
class Move:
    """Units of a structure that are to become nothing, or to become the units at ``theirs``.

    ``factor`` (units,) is how much each one is wanted to.
    """

    factor: Tensor
    mine: Sequence[UnitRows]
    theirs: Sequence[UnitRows] = ()


def moves_to(model: nn.Module, structures: Sequence[Structure], vectors: Vectors) -> list[Move]:
    """What has to happen to the weights for the wanted structure; on the device of each weight."""
    by_name = {s.name: s for s in structures}
    parameters = dict(model.named_parameters())
    moves = []
    for name in {**vectors.keep, **vectors.share}:
        target = by_name[name]
        stays = vectors.keep.get(name)
        source, share, taken = vectors.share.get(name, ("", None, None))
        goes = None if stays is None else 1 - stays
        if share is not None and goes is not None:
            goes = goes * (1 - share)
        if goes is not None and bool((goes > 0).any()):
            units = (goes > 0).nonzero()[:, 0]
            mine = unit_rows(target, units, parameters)
            moves.append(Move(_beside(mine, goes[units]), mine))
        if share is not None and taken is not None and bool((share > 0).any()):
            units = (share > 0).nonzero()[:, 0]
            mine = unit_rows(target, units, parameters)
            theirs = unit_rows(by_name[source], taken[units], parameters)
            moves.append(Move(_beside(mine, share[units]), mine, theirs))
    return moves


def _beside(rows: Sequence[UnitRows], factor: Tensor) -> Tensor:
    return factor.to(rows[0].positions.device)


def distances(model: nn.Module, moves: Sequence[Move], epsilon: float = 1e-8) -> Iterator[Tensor]:
    """The terms of :func:`alignment` before the division, a scalar for each move.

    Of a sharded model, the weights of one structure and of its source are gathered for each.
    """
    parameters = dict(model.named_parameters())
    for move in moves:
        _, length = _way(move, parameters, epsilon)
        yield (length * move.factor.to(length)).sum()


def _way(
    move: Move, parameters: Mapping[str, Tensor], epsilon: float
) -> tuple[list[Tensor], Tensor]:
    """How far weights are to go: (units, numbers) for each slot, and in all, (units,)."""
    ways = [rows.read(parameters) for rows in move.mine]
    if move.theirs:
        goals = [rows.read(parameters) for rows in move.theirs]
        ways = [own - goal for own, goal in zip(ways, goals, strict=True)]
    square = torch.stack([way.square().sum(1) for way in ways]).sum(0)
    return ways, (square + epsilon).sqrt()


@torch.no_grad()
def add_gradients(
    parameters: Mapping[str, Tensor],
    moves: Sequence[Move],
    strength: float,
    into: Mapping[str, Tensor],
    epsilon: float = 1e-8,
) -> None:
    """Add ``strength`` times the gradients of :func:`distances` to the tensors ``into``, by name.

    A length grows by the direction it has, so none of autograd is needed, nor its gradients as
    large as the weights: this is done at every step. Weights that are not in ``into`` get nothing.
    """
    for move in moves:
        ways, length = _way(move, parameters, epsilon)
        scale = strength * move.factor.to(length) / length
        for sign, side in ((1, move.mine), (-1, move.theirs)):
            for rows, way in zip(side, ways, strict=bool(side)):
                if rows.slot.param in into:
                    rows.add(sign * scale[:, None] * way, into[rows.slot.param])


@torch.no_grad()
def draw_near(
    model: nn.Module, structures: Sequence[Structure], vectors: Vectors, factor: float
) -> None:
    """Multiply the distance of the weights from the wanted structure by ``factor``, in place.

    Units that are to go shrink, units that are to share move to the unit they share, sources first.
    With 0 the weights match the structure: masked, mixed and whole model are the same.
    """
    by_name = {s.name: s for s in structures}
    parameters = dict(model.named_parameters())
    done: set[str] = set()

    def visit(name: str) -> None:
        if name in done:
            return
        done.add(name)
        target, stays = by_name[name], vectors.keep.get(name)
        source, share, taken = vectors.share.get(name, ("", None, None))
        goes = torch.zeros(target.size) if stays is None else 1 - stays
        if share is not None and taken is not None:
            visit(source)
            goes = goes * (1 - share)
            units = (share > 0.5).nonzero()[:, 0]
            for ours, theirs in slot_pairs(target, by_name[source], parameters):
                with changing(parameters[ours.param]) as mine:
                    there = whole(parameters[theirs.param].detach())
                    into = positions(ours, target.size, units).to(mine.device)
                    out_of = positions(theirs, by_name[source].size, taken[units])
                    now = mine.index_select(ours.axis, into)
                    goal = there.index_select(theirs.axis, out_of.to(there.device)).to(now)
                    mine.index_copy_(ours.axis, into, goal.lerp(now, factor))
        units = (goes > 0.5).nonzero()[:, 0]
        for slot in target.slots:
            if parameters[slot.param].dim() > 1 and len(units):
                with changing(parameters[slot.param]) as weight:
                    at = positions(slot, target.size, units).to(weight.device)
                    weight.index_copy_(slot.axis, at, factor * weight.index_select(slot.axis, at))

    for name in {**vectors.keep, **vectors.share}:
        visit(name)
