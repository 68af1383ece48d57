"""Sharing before the cut: a model that runs as if it shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...structures.plan import Plan
from ...structures.shards import is_part, whole
from ...structures.structure import Structure
from ...structures.units import owner_of, positions
from .rules import slot_pairs
from .ties import is_shared

__all__ = ["mixed", "pairing"]


@contextmanager
def mixed(
    model: nn.Module,
    structures: Sequence[Structure],
    shares: Mapping[str, tuple[str, Tensor, Tensor]] | Plan,
) -> Iterator[nn.Module]:
    """The model with shared weights while the block runs.

    ``shares`` is a plan, or maps a structure to (source, values, units). ``values`` holds one
    number per unit: 1 where the unit takes the source's weights, 0 where it keeps its own.
    ``units`` holds the source's unit that each unit would take; both are (size,). A source that
    itself shares is mixed first. The mixture is computed once, on entering, and is differentiable
    in the values and in the weights of both structures, except weights of a sharded model, which
    are gathered and constant. Gates (:func:`vlprune.gated`) may be put
    on top.

    Raises UnsupportedError for a model that shares already: :func:`materialize` it first.
    """
    if isinstance(shares, Plan):
        plan = shares
        shares = {
            s.name: (plan.share[s.name][0], *pairing(s.size, plan.shared(s)))
            for s in structures
            if s.name in plan.share
        }
    if shares and is_shared(model):
        raise UnsupportedError("this model shares weights already: call vlprune.materialize first")
    whole = _mixtures(model, structures, shares)
    shadowed = []
    try:
        for name, weight in whole.items():
            path, leaf = owner_of(name)
            module = model.get_submodule(path)
            # __dict__ comes before the _parameters of nn.Module, which stay as they are
            module.__dict__[leaf] = weight
            shadowed.append((module, leaf))
        yield model
    finally:
        for module, leaf in shadowed:
            module.__dict__.pop(leaf, None)


def pairing(size: int, shared: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """``(values, units)`` of :func:`mixed`: 1 where a unit shares, and the unit that it takes.

    Both have shape (size,).
    """
    values, taken = torch.zeros(size), torch.zeros(size, dtype=torch.long)
    for unit, other in shared.items():
        values[unit], taken[unit] = 1, other
    return values, taken


def _mixtures(
    model: nn.Module,
    structures: Sequence[Structure],
    shares: Mapping[str, tuple[str, Tensor, Tensor]],
) -> dict[str, Tensor]:
    """{parameter: its mixture with its sources}, sources mixed first."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    by_name = {s.name: s for s in structures}
    done: dict[str, Tensor] = {}
    finished: set[str] = set()

    def of(name: str) -> Tensor:
        weight = parameters[name]
        return whole(weight.detach()) if is_part(weight) else weight

    def mix(name: str) -> None:
        if name in finished or name not in shares:
            return
        finished.add(name)
        source, values, units = shares[name]
        mix(source)
        target, giver = by_name[name], by_name[source]
        for ours, theirs in slot_pairs(target, giver, shapes):
            own = done[ours.param] if ours.param in done else of(ours.param)
            taken = done[theirs.param] if theirs.param in done else of(theirs.param)
            into = positions(ours, target.size, range(target.size)).to(own.device)
            out_of = positions(theirs, giver.size, units.cpu()).to(own.device)
            share = values[None, :, None].expand(ours.repeat, -1, ours.inner).reshape(-1)
            shape = [1] * own.dim()
            shape[ours.axis] = -1
            share = share.to(own.device, own.dtype).reshape(shape)
            before = own.index_select(ours.axis, into)
            there = taken.index_select(theirs.axis, out_of).to(own.device)
            # two products, not before + share * (there - before): exact where share is 1
            mixture = share * there + (1 - share) * before
            done[ours.param] = own.index_copy(ours.axis, into, mixture)

    for name in shares:
        mix(name)
    return done
