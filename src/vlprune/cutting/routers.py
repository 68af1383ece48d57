"""Routers that choose among fewer experts than they have, and routers that have lost some.

A removed expert has to be gone before the router chooses: out of its softmax, and out of its top-k,
so that another expert takes its place. So a masked router computes with the rows of the experts
that stay, as the cut one does, and its choice is translated back. Its logits keep their old width
in both, with minus infinity for experts that are gone: a load-balancing loss adds them up over
layers, with one number of experts for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..structures.shards import is_dtensor, is_part, shape_of
from .native import register_native_forward
from .wrappers import stock_class

__all__ = ["KEPT", "Place", "counts_of", "gives_scores", "places_of", "routed"]

KEPT = "kept_experts"
"""The buffer of a cut router that says which experts stay, of every group if there are groups."""


@dataclass(frozen=True)
class Place:
    """An axis with one position per expert, of the tensor ``leaf`` of the child ``path``."""

    path: str
    leaf: str
    axis: int
    is_buffer: bool

    @property
    def name(self) -> str:
        """The name of the tensor below the module."""
        return f"{self.path}.{self.leaf}".lstrip(".")


def places_of(module: nn.Module, count: int) -> list[Place]:
    """The tensors of a module and of its children that have a position for each of the experts.

    The first axis of length ``count`` is taken; the router is asked whether that is right before
    anything is cut (:mod:`vlprune.architectures.whole_experts`).
    """
    found = []
    for path, child in module.named_modules():
        for held, is_buffer in ((child._parameters, False), (child._buffers, True)):
            for leaf, tensor in held.items():
                shape = () if tensor is None else shape_of(tensor)
                if count in shape and leaf != KEPT:
                    found.append(Place(path, leaf, shape.index(count), is_buffer))
    return found


def counts_of(module: nn.Module, count: int) -> list[str]:
    """The module's own numbers that say how many experts there are."""
    return [
        name
        for name, value in vars(module).items()
        if type(value) is int and value == count and "expert" in name and "tok" not in name
    ]


def routed(
    router: nn.Module,
    values: Tensor,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Any, ...]:
    """``forward`` of a router under gates ``values`` (experts,): (logits, weights, experts, ...).

    Experts whose gate is 0 are none that it can choose; the weights of the others are multiplied by
    their gates.
    """
    values = values.to(args[0].device)
    stays = (values != 0).nonzero()[:, 0]
    if len(stays) == len(values):
        output = forward(*args, **kwargs)
    else:
        given = [_few(one, stays, len(values)) for one in args[1:]]
        named = {name: _few(one, stays, len(values)) for name, one in kwargs.items()}
        with _narrowed(router, stays, len(values)):
            output = forward(args[0], *given, **named)
        output = _translated(output, stays, len(values), KEPT in router._buffers)
    if gives_scores(output):
        return output[0] * values.to(output[0].dtype), output[1]
    logits, weights, chosen, *rest = output
    return logits, weights * values[chosen].to(weights.dtype), chosen, *rest


def gives_scores(output: Any) -> bool:
    """Whether a router has given what every expert gets of every token, most of it 0, and logits.

    Llama 4's does, in place of logits, weights and numbers of the chosen experts.
    """
    return len(output) == 2


def _translated(output: Any, stays: Tensor, count: int, is_wide: bool) -> Any:
    """What a router says of the experts ``stays``, said of ``count``; ``is_wide`` logits are."""
    if gives_scores(output):
        scores, logits = output
        nothing = scores.new_zeros(*scores.shape[:-1], count)
        scores = nothing.index_copy(-1, stays.to(scores.device), scores)
        return scores, logits if is_wide else _widened(logits, stays, count)
    logits, weights, chosen, *rest = output
    logits = logits if is_wide else _widened(logits, stays, count)
    return logits, weights, stays[chosen], *rest


def _few(value: Any, stays: Tensor, count: int) -> Any:
    """What a router is handed besides its tokens, for the experts that stay."""
    if isinstance(value, Tensor) and value.dim() and value.shape[-1] == count:
        return value.index_select(-1, stays.to(value.device))
    return value


@contextmanager
def _narrowed(router: nn.Module, stays: Tensor, count: int) -> Iterator[None]:
    """The router with the rows and the numbers of the experts that stay, while the block runs."""
    places = places_of(router, count)
    shadowed: list[tuple[dict[str, Any], str, Any]] = []

    def shadow(owner: Any, name: str, value: Any) -> None:
        # an entry in __dict__ is found before nn.Module looks into _parameters
        shadowed.append((owner.__dict__, name, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    try:
        for place in places:
            owner = router.get_submodule(place.path)
            whole = getattr(owner, place.leaf)
            if is_part(whole) and (is_dtensor(whole) or whole.shape != shape_of(whole)):
                raise UnsupportedError(
                    f"{place.name} of {stock_class(router).__name__} is spread over processes "
                    "while the router runs, so it cannot leave experts out: let FSDP or DeepSpeed "
                    'gather whole layers, or choose experts="neuron"'
                )
            shadow(owner, place.leaf, whole.index_select(place.axis, stays.to(whole.device)))
        for owner in router.modules():
            for name in counts_of(owner, count):
                shadow(owner, name, len(stays))
        kept = router._buffers.get(KEPT)
        if kept is not None:  # it counts in units, which have one expert of every group
            shadow(router, KEPT, kept[stays[stays < len(kept)]])
        yield
    finally:
        for held, name, before in reversed(shadowed):
            held[name] = before
            if before is None:
                del held[name]


def _widened(logits: Tensor, stays: Tensor, count: int) -> Tensor:
    """Logits (..., experts that stay) in their places among ``count``, minus infinity elsewhere.

    Routers that give probabilities in their place (Gemma 4) have 0 there.
    """
    shares = (logits.detach().sum(-1) - 1).abs().amax() < 1e-2
    missing = torch.where(shares & (logits.detach().amin() >= 0), 0.0, -torch.inf)
    wide = missing.to(logits).expand(*logits.shape[:-1], count).clone()
    return wide.index_copy(-1, stays.to(logits.device), logits)


@register_native_forward("router")
class FewerExperts:
    """A router that has lost experts. Its logits are as wide as they were.

    Where it first chooses among groups of experts, ``kept_experts`` are those that stay of each.
    """

    kept_experts: Tensor
    experts_before = 0

    def adopt(self) -> None:
        """Note how many experts there are before the first cut: the rows of its weight."""
        weights = [p for p in self.parameters() if len(shape_of(p)) == 2]  # type: ignore[attr-defined]
        shapes = [shape_of(weight) for weight in weights]
        self.experts_before = max(shapes, key=math.prod)[0]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As the stock forward, which chooses among the experts that stay."""
        output: Any = super().forward(*args, **kwargs)  # type: ignore[misc]
        place = 1 if gives_scores(output) else 0
        logits = output[place]
        groups = logits.shape[-1] // len(self.kept_experts)
        first = torch.arange(groups, device=self.kept_experts.device)[:, None]
        stays = (first * (self.experts_before // groups) + self.kept_experts).flatten()
        wide = _widened(logits, stays, self.experts_before)
        return *output[:place], wide, *output[place + 1 :]
