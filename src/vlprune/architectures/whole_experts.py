"""Whole experts as units: the rows of a router, and the weights of the expert that each row stands for.

Nothing in a shape says how a router chooses: a softmax before or after its top-k, a sigmoid, a bias
for the choice alone, groups of experts that are chosen first. It is found by running the router's own
forward on a few numbers. Experts can go if the router without their rows chooses, and weighs, as it
does when these rows make no token likely to go there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.routers import KEPT, Place, counts_of, places_of
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import Attr, Gate, Slot, Structure
from ..structures.units import owner_of
from .attention import Leave, join
from .experts import Experts, fewer_experts_agree, stand_in

__all__ = ["WHOLE", "whole_experts"]

WHOLE = ".whole"
"""What the name of such a structure ends with, after the path of the experts."""

INSTEAD = 'only neurons of all its experts can go (experts="neuron")'


def whole_experts(
    path: str, row: Experts, modules: Mapping[str, nn.Module], tower: str
) -> Structure:
    """The experts at ``path`` as units. Raises Leave if their router does not take fewer of them."""
    experts, (above, own) = modules[path], owner_of(path)
    if row.apart:
        raise Leave(f"its router sorts tokens by expert itself: {INSTEAD}")
    count = shape_of(getattr(experts, row.down))[0]
    name, router = _router_beside(modules[above], own, count)
    chosen = _chosen(router, count)
    if chosen >= count:
        raise Leave(f"every token goes to all of its {count} experts: {INSTEAD}")
    inside, numbers = places_of(experts, count), counts_of(experts, count)
    first = [place.name for place in inside if place.axis == 0]
    if len(first) < len(inside) or not fewer_experts_agree(experts, row, first, numbers):
        kind = stock_class(experts).__name__
        raise Leave(f"the forward of {kind} does not take fewer experts: {INSTEAD}")
    held = [(path, place) for place in inside]
    held += [(join(above, name), place) for place in places_of(router, count)]
    if _takes_more(router):
        held += [(above, place) for place in places_of(modules[above], count) if not place.path]
    slots: dict[bool, list[Slot]] = {False: [], True: []}
    for at, place in held:
        slots[place.is_buffer].append(Slot(join(at, place.name), place.axis))
    return Structure(
        name=path + WHOLE,
        kind="experts",
        size=count,
        tower=tower,
        slots=tuple(slots[False]),
        gates=(Gate(join(above, name), "router"),),
        attrs=tuple(
            Attr(at, number)
            for at, holder in ((path, experts), (join(above, name), router))
            for number in counts_of(holder, count)
        ),
        swaps=((join(above, name), "router"),),
        indices=((join(above, name), KEPT),),
        buffers=tuple(slots[True]),
        least=chosen,
    )


def _router_beside(parent: nn.Module, own: str, count: int) -> tuple[str, nn.Module]:
    """The only other child of the experts' parent that has a row per expert. Raises Leave."""
    found = [
        (name, child)
        for name, child in parent.named_children()
        if name != own and any(_is_rows(child, place) for place in places_of(child, count))
    ]
    if len(found) != 1:
        raise Leave(
            f"{stock_class(parent).__name__} has {len(found)} layers with a row for each of its "
            f"{count} experts, not one router: {INSTEAD}"
        )
    return found[0]


def _is_rows(module: nn.Module, place: Place) -> bool:
    weight = getattr(module.get_submodule(place.path), place.leaf)
    return not place.is_buffer and place.axis == 0 and len(shape_of(weight)) == 2


def _takes_more(router: nn.Module) -> bool:
    """Whether a router is handed something besides its tokens, such as a bias of the choice."""
    return len(inspect.signature(stock_class(router).forward).parameters) > 2


# -- a few numbers through the router's own forward -----------------------------------------

TOKENS, FAR, EXACT = 64, 1e6, 1e-5
_READ: dict[tuple[Any, ...], int] = {}
"""What has been found out about a kind of router: how many experts a token goes to; 0 if unsure."""


def _chosen(router: nn.Module, count: int) -> int:
    """How many experts a token goes to. Raises Leave if the router does not take fewer rows."""
    cls = stock_class(router)
    simple = (int, float, str, bool, type(None))
    numbers = [(n, v) for n, v in sorted(vars(router).items()) if isinstance(v, simple)]
    shapes = [(n, tuple(shape_of(p))) for n, p in router.named_parameters()]
    key = (cls, *numbers, *shapes)
    if key not in _READ:
        try:
            _READ[key] = _how_many(router, count)
        except Exception:  # it is handed other things, or gives others
            _READ[key] = 0
    groups = max(getattr(router, name, None) or 1 for name in ("num_group", "n_group"))
    if not _READ[key] and groups > 1:
        raise Leave(
            f"its router first chooses among {groups} groups of experts, which must stay equally "
            f"large: {INSTEAD}"
        )
    if not _READ[key]:
        raise Leave(f"what {cls.__name__} does with fewer experts is not known: {INSTEAD}")
    return _READ[key]


@torch.no_grad()
def _how_many(router: nn.Module, count: int) -> int:
    """How many experts a token goes to; 0 if fewer rows do not give what unlikely rows give."""
    with torch.device("cpu"):
        numbers = torch.Generator().manual_seed(0)
        places = places_of(router, count)
        whole = _few_numbers(router, numbers)
        rows = max((place for place in places if _is_rows(router, place)), key=lambda p: _size(router, p))
        tokens = torch.randn(TOKENS, whole[rows.name].shape[1], generator=numbers).double()
        tokens[:, 0] = 1.0  # what makes rows unlikely
        bias = torch.rand(count, generator=numbers).double()
        ranks = (2, 3) if len(inspect.signature(stock_class(router).forward).parameters) > 1 else ()
        for rank in ranks:
            shaped = tokens if rank == 2 else tokens[None]
            try:
                chosen = _run(router, whole, {}, shaped, bias)[2].shape[-1]
            except Exception:  # it takes tokens in another shape
                continue
            sizes = sorted({chosen, (chosen + count) // 2, count - 1} - {count})
            stays = [torch.randperm(count, generator=numbers)[:size].sort().values for size in sizes]
            alike = all(_fewer_is_unlikely(router, places, whole, shaped, bias, s) for s in stays)
            return chosen if alike else 0
    return 0


def _size(router: nn.Module, place: Place) -> int:
    return math.prod(shape_of(getattr(router.get_submodule(place.path), place.leaf)))


def _few_numbers(router: nn.Module, numbers: torch.Generator) -> dict[str, Tensor]:
    """Random numbers in the place of all that a router holds: norms and biases are positive."""
    made = {}
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        shape = shape_of(tensor)
        if not tensor.is_floating_point():
            continue
        values = torch.randn(shape, generator=numbers, dtype=torch.float64)
        flat = len(shape) < 2 or 1 in shape
        made[name] = values.abs() + 0.5 if flat else values * shape[-1] ** -0.5
    return made


def _fewer_is_unlikely(
    router: nn.Module,
    places: Sequence[Place],
    whole: Mapping[str, Tensor],
    tokens: Tensor,
    bias: Tensor,
    stays: Tensor,
) -> bool:
    """Whether the rows ``stays`` alone give what all give if nothing makes the others likely."""
    count = len(bias)
    goes = torch.ones(count, dtype=torch.bool).index_fill(0, stays, False).nonzero()[:, 0]
    unlikely, fewer = dict(whole), dict(whole)
    for place in places:
        full = whole[place.name]
        fewer[place.name] = full.index_select(place.axis, stays)
        far = full.index_fill(place.axis, goes, -FAR)
        if place.axis == 0 and full.dim() == 2:
            far[goes] = 0.0
            far[goes, 0] = -FAR
        unlikely[place.name] = far
    reference = _run(router, unlikely, {}, tokens, bias.index_fill(0, goes, -FAR))
    numbers = dict.fromkeys(counts_of(router, count), len(stays))
    found = _run(router, fewer, numbers, tokens, bias[stays])
    return _apart(reference, found, stays, count) < EXACT


def _apart(reference: Sequence[Tensor], found: Sequence[Tensor], stays: Tensor, count: int) -> float:
    """The largest difference of logits, or of the weights that each expert gets from each token."""
    if len(reference) != 3 or reference[0].shape[-1] != count:
        return math.inf
    logits, weights, index = (one.reshape(-1, one.shape[-1]) for one in reference)
    few, own, own_index = (one.reshape(-1, one.shape[-1]) for one in found)
    given = torch.zeros(len(weights), count, dtype=torch.float64)
    ours = given.scatter_add(1, stays[own_index], own.double())
    theirs = given.scatter_add(1, index, weights.double())
    if not torch.equal(theirs != 0, ours != 0) or not theirs.any():
        return math.inf
    both = ((logits[:, stays] - few).abs().max(), (theirs - ours).abs().max())
    return max(float(difference) for difference in both)


def _run(
    router: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    tokens: Tensor,
    bias: Tensor,
) -> tuple[Tensor, ...]:
    """The router's forward with these tensors and numbers; ``bias`` is for one that is handed it."""
    copy = _copied(router, tensors, numbers)
    more = [bias] if _takes_more(router) else []
    output: tuple[Tensor, ...] = stock_class(router).forward(copy, tokens, *more)
    return output


def _copied(
    module: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], path: str = ""
) -> Any:
    """A module with the ``tensors`` below it in place of its own, and those of its children."""
    children = {
        name: _copied(child, tensors, {}, join(path, name))
        for name, child in module.named_children()
    }
    own = {n: tensors[join(path, n)] for n, p in module._parameters.items() if p is not None}
    made = stand_in(module, own, children, numbers)
    for name, buffer in module._buffers.items():
        made._buffers[name] = tensors.get(join(path, name), buffer)
    return made
