"""What a repair of experts learns from: moments of each expert's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..device import device_of
from .batches import Batches
from .blocks import hooked
from .consumers import Consumer
from .moments import Moments, flat
from .taken_apart import called_at, token_weights

__all__ = ["ExpertMoments"]

AT_ONCE = 2**27
"""Numbers in the moments of experts that are gathered together: 1 GiB."""


class _Enough(Exception):
    """The rest of a block need not run."""


@dataclass
class ExpertMoments:
    """Moments of the experts of a block, of as many at once as memory should hold.

    What an expert should give is what its dense weights give on the same tokens: of the dense model
    other tokens may reach it.
    """

    model: nn.Module
    consumers: Sequence[Consumer]
    batches: Batches
    found: dict[str, tuple[Moments, Moments]] = field(default_factory=dict)

    def sums(
        self, consumer: Consumer, pairs: Mapping[int, Any], tower: str
    ) -> tuple[Moments, Moments]:
        """Moments of one expert: to fit, and held out. Called for one after the other."""
        if consumer.module not in self.found:
            first = [c.module for c in self.consumers].index(consumer.module)
            numbers = 2 * consumer.width * (consumer.width + consumer.out)
            count = max(1, AT_ONCE // numbers)
            here = [c for c in self.consumers[first:] if c.structure == consumer.structure][:count]
            device = device_of(self.model.get_submodule(called_at(consumer.module)))
            for c in here:
                empty = Moments.empty(c.width, c.out, device), Moments.empty(c.width, c.out, device)
                self.found[c.module] = empty
            for number, pair in pairs.items():
                self._add(here, number, pair, tower)
        fitted, held_out = self.found.pop(consumer.module)
        return fitted.summed(), held_out.summed()

    def _add(self, here: Sequence[Consumer], number: int, pair: Any, tower: str) -> None:
        def take(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
            weights = token_weights(self.batches, tower, number, layer, args[0])
            into = self.found[path][self.batches.held_out(number)]
            into.add(flat(args[0]), weights, flat(output))

        def enough(*_: Any) -> None:
            raise _Enough

        layers = {c.module: self.model.get_submodule(c.module) for c in here}
        hooks = [(layer.register_forward_hook, partial(take, p)) for p, layer in layers.items()]
        module = self.model.get_submodule(called_at(here[0].module))
        last = (module.register_forward_hook, enough)
        with pair.small.awake(), suppress(_Enough), hooked([*hooks, last]):
            pair.replay()
