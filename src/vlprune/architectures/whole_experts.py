"""Whole experts as units: each row of a router, and the weights of the expert that it stands for.

Nothing in a shape says how a router chooses: a softmax before or after its top-k, a sigmoid, a bias
for the choice alone, groups of experts that are chosen first. It is found by running the router's
own forward on a few numbers. Experts can go if the router without their rows chooses and weighs the
others as it does when these rows make no token likely to go there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.routers import KEPT, Place, counts_of, gives_scores, places_of
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import Attr, Gate, Slot, Structure
from ..structures.units import owner_of
from .attention import Leave, join
from .experts import Experts, compute_on_every_token, fewer_experts_agree
from .stand_in import stand_in

__all__ = ["WHOLE", "whole_experts"]

WHOLE = ".whole"
"""What the name of such a structure ends with, after the path of the experts."""

INSTEAD = 'only neurons of all its experts can go (experts="neuron")'

SAVED_TOGETHER = {
    "Ernie4_5_VLMoeSparseMoeBlock": "its folder holds the experts of words and those of images in "
    "one tensor, so that they must stay equally many",
}
"""Holders of experts that transformers saves as one tensor with those of another holder."""


def whole_experts(
    path: str, row: Experts, modules: Mapping[str, nn.Module], tower: str
) -> Structure:
    """The experts at ``path`` as units. Raises Leave if their router does not take fewer.

    Where it first chooses among groups, which must stay equally large, a unit has one expert of
    every group: those at the same place. Where a token goes to all of them, as after a cut, all are
    the least that must stay.
    """
    experts, (above, own) = modules[path], owner_of(path)
    together = SAVED_TOGETHER.get(stock_class(modules[above]).__name__)
    if together:
        raise Leave(f"{together}: {INSTEAD}")
    if row.apart:
        raise Leave(f"its router sorts tokens by expert itself: {INSTEAD}")
    count = shape_of(getattr(experts, row.down))[0]
    name, router, (groups, least) = _router_beside(modules[above], own, count)
    inside = places_of(experts, count)
    if least < count // groups and not _take_fewer(experts, row, inside, count):
        kind = stock_class(experts).__name__
        raise Leave(f"the forward of {kind} does not take fewer experts: {INSTEAD}")
    held = [(path, place) for place in inside]
    held += [(join(above, name), place) for place in places_of(router, count)]
    if _takes_more(router):
        held += [(above, place) for place in places_of(modules[above], count) if not place.path]
    slots: dict[bool, list[Slot]] = {False: [], True: []}
    for at, place in held:
        slots[place.is_buffer].append(Slot(join(at, place.name), place.axis, repeat=groups))
    return Structure(
        name=path + WHOLE,
        kind="experts",
        size=count // groups,
        tower=tower,
        slots=tuple(slots[False]),
        gates=(Gate(join(above, name), "router", repeat=groups),),
        attrs=tuple(
            Attr(at, number, groups)
            for at, holder in ((path, experts), (join(above, name), router))
            for number in counts_of(holder, count)
        ),
        swaps=((join(above, name), "router"),),
        indices=((join(above, name), KEPT),),
        core=path if compute_on_every_token(experts) else None,
        core_share=float(compute_on_every_token(experts)),
        buffers=tuple(slots[True]),
        least=least,
    )


def _take_fewer(experts: nn.Module, row: Experts, inside: Sequence[Place], count: int) -> bool:
    """Whether the experts' forward takes fewer of them, and nothing else inside is as long."""
    known = {*row.weights, *(f"{name}_bias" for name in row.weights)}
    names, numbers = [place.name for place in inside], counts_of(experts, count)
    if any(place.axis or place.name not in known for place in inside):
        return False
    key = (stock_class(experts), row, count, *names, *numbers)
    if key not in _TAKES_FEWER:
        _TAKES_FEWER[key] = fewer_experts_agree(experts, row, names, numbers)
    return _TAKES_FEWER[key]


def _router_beside(parent: nn.Module, own: str, count: int) -> tuple[str, nn.Module, Choice]:
    """The child beside the experts that chooses among them, and how it does.

    Raises Leave if there is none, or more than one.
    """
    rows = [
        (name, child)
        for name, child in parent.named_children()
        if name != own and any(_is_rows(child, place) for place in places_of(child, count))
    ]
    found, reasons = [], []
    for name, child in rows:  # an FFN may be as wide as there are experts
        try:
            found.append((name, child, _choice(child, count)))
        except Leave as reason:
            reasons.append(reason)
    if len(found) == 1:
        return found[0]
    if reasons and not found:
        raise reasons[0]
    raise Leave(
        f"{stock_class(parent).__name__} has no router with one row for each of its {count} "
        f"experts: {INSTEAD}"
    )


def _is_rows(module: nn.Module, place: Place) -> bool:
    weight = getattr(module.get_submodule(place.path), place.leaf)
    return not place.is_buffer and place.axis == 0 and len(shape_of(weight)) == 2


def _takes_more(router: nn.Module) -> bool:
    """Whether a router is handed something besides its tokens, such as a bias of the choice."""
    return len(inspect.signature(stock_class(router).forward).parameters) > 2


# -- a few numbers through the router's own forward -----------------------------------------

TOKENS, FLIPPED, FAR, EXACT = 64, 2, 1e6, 1e-4
Choice = tuple[int, int]
"""(the groups of experts that a router chooses among first, the experts of each that must stay)"""

_READ: dict[tuple[Any, ...], Choice | None] = {}
"""What has been found out about a kind of router; None if unsure."""

_TAKES_FEWER: dict[tuple[Any, ...], bool] = {}
"""Whether a kind of experts takes fewer."""


def _choice(router: nn.Module, count: int) -> Choice:
    """How a router chooses. Raises Leave if it does not take fewer rows."""
    cls = stock_class(router)
    simple = (int, float, str, bool, type(None))
    numbers = [(n, v) for n, v in sorted(vars(router).items()) if isinstance(v, simple)]
    shapes = [(n, tuple(shape_of(p))) for n, p in router.named_parameters()]
    key = (cls, *numbers, *shapes)
    if key not in _READ:
        try:
            _READ[key] = _how_it_chooses(router, count)
        except Exception:  # it is handed other things, or gives others
            _READ[key] = None
    found = _READ[key]
    if found is None:
        raise Leave(f"what {cls.__name__} does with fewer experts is not known: {INSTEAD}")
    return found


@torch.no_grad()
def _how_it_chooses(router: nn.Module, count: int) -> Choice | None:
    """The router's groups; None if fewer rows do not give what unlikely rows give."""
    with torch.device("cpu"):
        for rank, dtype in product((2, 3), (torch.float64, torch.float32)):
            numbers = torch.Generator().manual_seed(0)
            trial = _trial_of(router, count, rank, dtype, numbers)
            try:
                chosen = trial.run()[2].shape[-1]
            except Exception:  # it takes tokens in another shape, or in another dtype
                continue
            for groups in _groups_of(router, count):
                for least in (chosen,) if groups == 1 else range(1, count // groups):
                    if _all_agree(trial, groups, least, numbers):
                        return groups, least
                if KEPT in router._buffers:  # a cut has left the least
                    return groups, count // groups
            return None
    return None


def _groups_of(router: nn.Module, count: int) -> list[int]:
    """The numbers of groups that a router may choose among, by its own numbers; 1 comes first."""
    kept = router._buffers.get(KEPT)
    if kept is not None:
        return [count // shape_of(kept)[0]]
    numbers = {v for n, v in vars(router).items() if "group" in n and type(v) is int}
    return [1, *sorted((g for g in numbers if 1 < g < count and count % g == 0), reverse=True)]


def _all_agree(trial: _Trial, groups: int, least: int, numbers: torch.Generator) -> bool:
    """Whether rows of ``least`` experts of each group, or of more, do for all rows."""
    count = len(trial.bias)
    each = count // groups
    for size in sorted({least, (least + each) // 2, max(least, each - 1)} - {each}):
        drawn = (
            torch.randperm(each, generator=numbers)[:size].sort().values for _ in range(groups)
        )
        stays = torch.cat([places + each * group for group, places in enumerate(drawn)])
        try:
            if not trial.fewer_is_unlikely(stays, groups > 1):
                return False
        except Exception:  # too few to choose from
            return False
    return True


def _trial_of(
    router: nn.Module, count: int, rank: int, dtype: torch.dtype, numbers: torch.Generator
) -> _Trial:
    """A trial with tokens of ``rank`` axes. Norms and biases are positive."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

    tensors = {}
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        shape = shape_of(tensor)
        if tensor.is_floating_point():
            flat = len(shape) < 2 or 1 in shape
            tensors[name] = draw(*shape).abs() + 0.5 if flat else draw(*shape) * shape[-1] ** -0.5
    places = places_of(router, count)
    rows = max((p for p in places if _is_rows(router, p)), key=lambda p: tensors[p.name].numel())
    tokens = draw(TOKENS, tensors[rows.name].shape[1])
    tokens[:, 0] = 1.0  # what makes rows unlikely
    bias = draw(count).abs()
    return _Trial(router, places, tensors, tokens if rank == 2 else tokens[None], bias)


@dataclass(frozen=True)
class _Trial:
    """A router with other ``tensors``, on a few tokens. ``bias`` is for one that is handed it."""

    router: nn.Module
    places: Sequence[Place]
    tensors: Mapping[str, Tensor]
    tokens: Tensor
    bias: Tensor

    def run(self, numbers: Mapping[str, int] = MappingProxyType({})) -> tuple[Tensor, ...]:
        """Logits, weights and choice by the router's forward, with ``numbers`` for attributes."""
        copy = _copied(self.router, self.tensors, numbers)
        more = [self.bias] if _takes_more(self.router) else []
        output: tuple[Tensor, ...] = stock_class(self.router).forward(copy, self.tokens, *more)
        if not gives_scores(output):
            return output
        scores, logits = output
        chosen = (scores != 0).sum(-1)
        if scores.shape != logits.shape or not bool((chosen == chosen.flatten()[0]).all()):
            raise ValueError("neither choices nor scores")
        return logits, *scores.topk(int(chosen.flatten()[0]))

    def fewer_is_unlikely(self, stays: Tensor, enough: bool) -> bool:
        """Whether the rows ``stays`` alone give what all give if the others are unlikely.

        If ``enough``, every expert that a token goes to must also get a weight.
        """
        count = len(self.bias)
        goes = torch.ones(count, dtype=torch.bool).index_fill(0, stays, False).nonzero()[:, 0]
        unlikely, fewer = dict(self.tensors), dict(self.tensors)
        for place in self.places:
            full = self.tensors[place.name]
            fewer[place.name] = full.index_select(place.axis, stays)
            far = full.index_fill(place.axis, goes, -FAR)
            if place.axis == 0 and full.dim() == 2:
                far[goes] = 0.0
                far[goes, 0] = -FAR
            unlikely[place.name] = far
        bias = self.bias.index_fill(0, goes, -FAR)
        reference = replace(self, tensors=unlikely, bias=bias).run()
        numbers = dict.fromkeys(counts_of(self.router, count), len(stays))
        found = replace(self, tensors=fewer, bias=self.bias[stays]).run(numbers)
        return _alike(reference, found, stays, count) and (not enough or bool(found[1].all()))


def _alike(reference: Sequence[Tensor], found: Sequence[Tensor], stays: Tensor, count: int) -> bool:
    """Whether logits agree, and the weights that each expert gets from each token.

    Where a router computes in float32, rounding may decide between two experts for a token or two.
    """
    if len(reference) != 3 or reference[0].shape[-1] != count:
        return False
    logits, weights, index = (one.reshape(-1, one.shape[-1]) for one in reference)
    few, own, own_index = (one.reshape(-1, one.shape[-1]) for one in found)
    nothing = torch.zeros(len(weights), count, dtype=torch.float64)
    ours = nothing.scatter_add(1, stays[own_index], own.double())
    theirs = nothing.scatter_add(1, index, weights.double())
    same = ((ours - theirs).abs().amax(1) < EXACT) & ((theirs != 0) == (ours != 0)).all(1)
    near = bool((logits[:, stays] - few).abs().max() < EXACT)
    return near and bool(theirs.any()) and int((~same).sum()) <= FLIPPED


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
