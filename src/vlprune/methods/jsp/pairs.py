"""The vectors that the hypernetwork makes: which units may stay, go, or share with which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...recipe.options import JspOptions
from ...structures.structure import Structure
from ..base import Problem
from ..vectors import Vectors

__all__ = ["Vector", "assembled", "structures_of", "vectors_of"]


@dataclass(frozen=True)
class Vector:
    """One head of the hypernetwork: which units of a structure stay, or which it shares."""

    structure: Structure
    depth: float
    source: str = ""
    units: Tensor | None = None  # the unit of the source for each unit; -1: none

    @property
    def name(self) -> str:
        """A name that no other vector has."""
        return f"{self.structure.name}<{self.source}" if self.source else self.structure.name


def vectors_of(method: JspOptions, problem: Problem) -> list[Vector]:
    """All vectors by depth, the tower ``base`` first where depths are equal.

    Raises UnsupportedError if a tower is missing, or if layers cannot share as the method asks.
    """
    if any(s.kind == "experts" for s in problem.structures):
        raise UnsupportedError(
            "JSP draws the weights of what goes to zero, and an expert without weights is still "
            'one that tokens go to: choose another method, experts="neuron", or leave whole '
            'experts dense with skip=("*.whole",)'
        )
    layers = {tower: _layers(problem.structures, tower) for tower in (method.base, method.other)}
    for tower, kinds in layers.items():
        if not kinds and (tower == method.base or "cross" in method.families):
            towers = sorted({s.tower for s in problem.structures})
            raise UnsupportedError(
                f"this model has no structures in the tower {tower!r}, which JSP shares with: its "
                f"towers are {', '.join(towers)}; name them with base= and other="
            )
    vectors = []
    for tower, kinds in layers.items():
        for members in kinds.values():
            for number, structure in enumerate(members):
                depth = (number + 1) / len(members)
                if "prune" in method.families:
                    vectors.append(Vector(structure, depth))
                source = _source(method, tower, kinds, layers, structure, number)
                if source is not None:
                    shared = _shared(method, problem, structure, source, depth)
                    vectors += [shared] if shared else []
    if "prune" not in method.families and not vectors:
        raise UnsupportedError("no two layers of this model can share: allow prune as well")
    return sorted(vectors, key=lambda v: (v.depth, v.structure.tower != method.base))


def _layers(structures: Sequence[Structure], tower: str) -> dict[str, list[Structure]]:
    """{kind: the tower's structures of that kind, first layer first}."""
    kinds: dict[str, list[Structure]] = {}
    for structure in structures:
        if structure.tower == tower:
            kinds.setdefault(structure.kind, []).append(structure)
    return kinds


def _source(
    method: JspOptions,
    tower: str,
    kinds: Mapping[str, list[Structure]],
    layers: Mapping[str, Mapping[str, list[Structure]]],
    structure: Structure,
    number: int,
) -> Structure | None:
    """The layer that the units of a structure may take weights from; None if there is none."""
    if tower == method.other and tower != method.base:
        over = layers[method.base].get(structure.kind, [])
        if "cross" not in method.families or not over:
            return None
        own = len(kinds[structure.kind])
        return over[math.ceil((number + 1) * len(over) / own) - 1]
    if "block" not in method.families or number % method.block == 0:
        return None
    return kinds[structure.kind][number - number % method.block]


def _shared(
    method: JspOptions, problem: Problem, structure: Structure, source: Structure, depth: float
) -> Vector | None:
    """The vector that shares; None where the layers are unlike and the method skips such pairs."""
    why = problem.shareable(structure, source)
    if why:
        if method.mismatch == "skip":
            return None
        raise UnsupportedError(
            f"JSP cannot share {structure.name} with {source.name}: {why}; give mismatch='skip' to "
            "share only where layers are alike, or leave that family out"
        )
    if not method.match:
        units = torch.arange(structure.size)
        units[source.size :] = -1
        return Vector(structure, depth, source.name, units)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UnsupportedError("match=True needs scipy: pip install 'vlprune[grounding]'") from None
    alike = problem.similarity(structure, source)
    units = torch.full((structure.size,), -1)
    rows, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    units[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return Vector(structure, depth, source.name, units)


# -- from zeros and ones to vectors --------------------------------------------------------


def structures_of(vectors: Sequence[Vector]) -> list[Structure]:
    """The structures that have a vector, each once."""
    return list({v.structure.name: v.structure for v in vectors}.values())


def assembled(
    vectors: Sequence[Vector], decided: Sequence[Tensor], logits: Sequence[Tensor]
) -> Vectors:
    """m and s from u; where nothing of a structure would be alive, its best unit stays."""
    keep = {s.name: torch.ones(s.size) for s in structures_of(vectors)}
    share: dict[str, tuple[str, Tensor, Tensor]] = {}
    best: dict[str, int] = {}
    for vector, u, logit in zip(vectors, decided, logits, strict=True):
        name = vector.structure.name
        if vector.source:
            assert vector.units is not None
            there = (vector.units >= 0).to(u)
            share[name] = (vector.source, (1 - u) * there, vector.units.clamp(min=0))
        else:
            keep[name], best[name] = u, int(logit.argmax())
    for name, unit in best.items():
        if name not in share and not bool((keep[name] > 0.5).any()):
            keep[name] = _on(keep[name], unit)
    result = Vectors(keep, share)
    alive = result.alive()
    for name in share:
        if not bool((alive[name] > 0.5).any()):
            unit = best.get(name, 0)
            keep[name] = _on(keep[name], unit)
            source, values, units = share[name]
            share[name] = (source, 1 - _on(1 - values, unit), units)
            result = Vectors(keep, share)
            alive = result.alive()
    return result


def _on(values: Tensor, unit: int) -> Tensor:
    """The values with one unit at 1, differentiable in the others."""
    mask = torch.zeros_like(values)
    mask[unit] = 1
    return values * (1 - mask) + mask
