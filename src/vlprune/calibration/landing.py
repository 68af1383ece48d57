"""Where the output of a layer joins the residual stream, found by moving it a little.

No architecture says so in one place, and every family does it in its own way (norm before or after,
a LayerScale, a dropout between). So the output is moved by a small random amount: the last value
inside the block that moves by the same amount, times one factor per channel, is the sum of the
residual and the output. Not from a paper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..cutting.first_batch import is_cache
from .blocks import hooked
from .modes import Modes
from .streams import Stream

__all__ = ["OUTPUT", "Landing", "Replay", "landing_of", "value_at"]

STEP = 0.1
"""The size of the move, in root mean squares of the output."""
PROPORTIONAL = 5e-3
"""The largest part of a move that one factor per channel may leave unexplained."""

OUTPUT = ""
"""Stands for the block's own output, in place of a module's path."""


@dataclass(frozen=True)
class Landing:
    """The value at ``place`` is the residual plus ``scale`` (out,) times the consumer's output.

    ``place`` is the path of the module inside the block that gets the value first, or ``OUTPUT``.
    """

    place: str
    scale: Tensor


@dataclass(frozen=True)
class Replay:
    """One call of a block with given arguments, which can be made again.

    It runs in the ``modes`` of the pass that would make it, with caches of its own: keys and values
    that a call adds would be there for the next one, and for the pass.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    modes: Modes = field(default_factory=Modes.now)

    @classmethod
    def of(cls, block: nn.Module, waiting: Stream) -> Replay:
        """The call that a pass waits to make."""
        return cls(block, waiting.args, waiting.kwargs, waiting.modes)

    def __call__(self) -> Any:
        again = self._with(torch.clone, lambda value: value)
        with self.modes.on():
            return self.block(*again.args, **again.kwargs)

    def in_dtype(self, dtype: torch.dtype) -> Replay:
        """The same call with its floating-point arguments in ``dtype``."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return self._with(cast, partial(recursively_apply, cast))

    def _with(self, cached: Callable[[Tensor], Tensor], other: Callable[[Any], Any]) -> Replay:
        """The same call with other tensors in its caches, and other arguments besides."""
        numbers = {getattr(module, "layer_idx", None) for module in self.block.modules()}

        def made(name: str, value: Any) -> Any:
            return _remade(value, cached, numbers) if is_cache(name, value) else other(value)

        args = tuple(made("", value) for value in self.args)
        return replace(self, args=args, kwargs={n: made(n, v) for n, v in self.kwargs.items()})


def _remade(value: Any, change: Callable[[Tensor], Tensor], numbers: set[Any]) -> Any:
    """A copy of a cache, at any depth, whose tensors are what ``change`` makes of them.

    Of the layers of a model it holds, those of other ``numbers`` are the same: a cache is large.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _remade(one, change, numbers) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(
            _remade(one, change, numbers) if number in numbers or numbers == {None} else one
            for number, one in enumerate(value)
        )
    if not type(value).__module__.startswith("transformers."):
        return value
    made = copy.copy(value)
    vars(made).update({name: _remade(one, change, numbers) for name, one in vars(value).items()})
    return made


def landing_of(replay: Replay, consumer: nn.Module) -> Landing | None:
    """The landing of a consumer inside the block; None where its output never joins unchanged."""
    moved: list[Tensor] = []

    def move(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not moved:
            size = STEP * output.float().square().mean().sqrt()
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            moved.append((size * noise.to(output.device)).to(output.dtype))
            return output + moved[0]
        return output

    before = _values(replay)
    with hooked([(consumer.register_forward_hook, move)]):
        after = _values(replay)
    if not moved:
        return None
    step = moved[0].reshape(-1, moved[0].shape[-1]).double()
    landing = None
    for place in before:
        if place not in after or before[place].shape != after[place].shape:
            continue
        if before[place].numel() != step.numel() or before[place].shape[-1] != step.shape[-1]:
            continue
        change = (after[place].double() - before[place].double()).reshape(step.shape)
        scale = (change * step).sum(0) / step.square().sum(0)
        if not scale.any():
            continue
        left = (change - scale * step).norm() / change.norm()
        if left < PROPORTIONAL:
            landing = Landing(place, scale)
    return landing


def value_at(
    replay: Replay, place: str, take: Callable[[Tensor], None]
) -> list[tuple[Any, Callable[..., None]]]:
    """The hook that hands the value at ``place`` to ``take``, for :func:`hooked`."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = _first([*args, *kwargs.values()])
        if found is not None:
            take(found)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        found = _first(output if isinstance(output, list | tuple) else [output])
        if found is not None:
            take(found)

    if place == OUTPUT:
        return [(replay.block.register_forward_hook, after)]
    module = replay.block.get_submodule(place)
    return [(partial(module.register_forward_pre_hook, with_kwargs=True), before)]


def _values(replay: Replay) -> dict[str, Tensor]:
    """The first tensor that each module inside the block gets, in order, and the block's output."""
    values: dict[str, Tensor] = {}

    def keep(place: str, value: Tensor) -> None:
        values.setdefault(place, value.detach().clone())

    places = [path for path, _ in replay.block.named_modules() if path]
    hooks = [hook for p in [*places, OUTPUT] for hook in value_at(replay, p, partial(keep, p))]
    with hooked(hooks):
        replay()
    return values


def _first(values: Any) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
