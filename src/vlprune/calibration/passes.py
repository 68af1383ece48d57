"""One forward pass of every batch, and what it tells about each layer, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.gates import evaluating
from ..cutting.padded import linear_axes
from ..device import device_of
from ..structures.structure import Structure
from .batches import Batches
from .blocks import Block, blocks_of, callable_projections, hooked
from .consumers import Consumer
from .moments import Moments, flat
from .store import Shelf
from .streams import streams
from .taken_apart import token_weights

__all__ = ["calls_of", "input_hook", "kinds_of_calls", "moments_by_block", "ready", "weight_of"]

Advance = Callable[[int], None]


def calls_of(model: nn.Module, batches: Batches) -> list[Callable[[], Any]]:
    """One forward pass per batch, inputs moved to the model's device when it starts."""
    return [partial(batches.run, model, number) for number in range(len(batches))]


def ready(
    stack: ExitStack, model: nn.Module, structures: Sequence[Structure], batches: Batches
) -> list[Block]:
    """Prepare the model for passes until ``stack`` closes; returns its blocks."""
    stack.enter_context(evaluating(model))
    stack.enter_context(callable_projections(model, structures))
    stack.enter_context(torch.no_grad())
    return blocks_of(model, structures, kinds_of_calls(model, batches))


def kinds_of_calls(model: nn.Module, batches: Batches) -> list[Callable[[], Any]]:
    """One forward pass per kind of batch, where batches of a kind have the same keywords."""
    first: dict[frozenset[str], int] = {}
    for number in range(len(batches)):
        first.setdefault(frozenset(batches.given[number]), number)
    calls = calls_of(model, batches)
    return [calls[number] for number in first.values()]


def weight_of(layer: Any) -> Tensor:
    """The weight of a linear layer as (out, in), whatever the layer stores; a view."""
    weight: Tensor = layer.weight.detach()
    return weight if linear_axes(layer) == (0, 1) else weight.T


def input_hook(module: nn.Module, take: Callable[[Tensor], None]) -> tuple[Any, Any]:
    """The hook that hands a linear layer's input to ``take``, for :func:`hooked`."""

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        take(args[0])

    return module.register_forward_pre_hook, before


def moments_by_block(
    model: nn.Module,
    structures: Sequence[Structure],
    batches: Batches,
    advance: Advance = lambda done: None,
) -> Iterator[tuple[Block, dict[str, Moments]]]:
    """Moments of the input of every consumer of the model as it is, {module: moments}.

    The blocks come in the order of a forward pass, each with its own consumers. Statistics of one
    block at a time are held. ``advance(1)`` is called after each block.
    """
    towers = {s.name: s.tower for s in structures}
    with ExitStack() as stack:
        blocks = ready(stack, model, structures, batches)
        again = [b for b in blocks if b.again]
        if again:
            yield from _all_at_once(model, again, batches, towers, advance)
        once = [b for b in blocks if not b.again]
        shelf = Shelf.beside(model, batches.given)
        passes = stack.enter_context(
            streams(model, [b.path for b in once], calls_of(model, batches), shelf)
        )
        for block in once:
            found = _empty(model, block.consumers)
            for number, stream in enumerate(passes):
                if not stream.advance(block.path):
                    continue
                with hooked(_watch(model, block.consumers, found, batches, towers, number)):
                    stream.resume()
            advance(1)
            yield block, {name: m.summed() for name, m in found.items()}


def _all_at_once(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Batches,
    towers: dict[str, str],
    advance: Advance,
) -> Iterator[tuple[Block, dict[str, Moments]]]:
    """The same for blocks that a pass calls several times: all calls of a layer are pooled."""
    consumers = [c for block in blocks for c in block.consumers]
    found = _empty(model, consumers)
    for number, call in enumerate(calls_of(model, batches)):
        with hooked(_watch(model, consumers, found, batches, towers, number)):
            call()
    for block in blocks:
        advance(1)
        own = dict.fromkeys(c.module for c in block.consumers)
        yield block, {name: found[name].summed() for name in own}


def _empty(model: nn.Module, consumers: Sequence[Consumer]) -> dict[str, Moments]:
    return {
        c.module: Moments.empty(c.width, device=device_of(model.get_submodule(c.module)))
        for c in consumers
    }


def _watch(
    model: nn.Module,
    consumers: Sequence[Consumer],
    found: dict[str, Moments],
    batches: Batches,
    towers: dict[str, str],
    number: int,
) -> Iterator[tuple[Any, Any]]:
    def take(consumer: Consumer, x: Tensor) -> None:
        layer = model.get_submodule(consumer.module)
        weights = token_weights(batches, towers[consumer.structure], number, layer, x)
        found[consumer.module].add(flat(x), weights)

    for consumer in {c.module: c for c in consumers}.values():  # structures may share a layer
        yield input_hook(model.get_submodule(consumer.module), partial(take, consumer))
