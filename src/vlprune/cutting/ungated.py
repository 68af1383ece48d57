"""A pass through a model in the middle of a search, without what the search has put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .gates import GATES
from .wrappers import uncompiled

__all__ = ["ungated"]


@contextmanager
def ungated(model: nn.Module) -> Iterator[nn.Module]:
    """The model without gates, and without weights mixed for a look, while the block runs.

    For passes with other weights, such as averaged ones. Graphs of earlier passes keep the gates.
    Nothing happens to a model without gates.
    """
    taken: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in uncompiled(model).modules():
            own, gates = module.__dict__, module.__dict__.get(GATES)
            # __dict__ comes before the _parameters of nn.Module, so that is where a mixture lies
            names = [name for name in (GATES, *module._parameters) if name in own]
            before = {name: own.pop(name) for name in names}
            if gates is not None and gates.forward is not None:  # that of the instance itself
                before["forward"], own["forward"] = own["forward"], gates.forward
            if before:
                taken.append((own, before))
        yield model
    finally:
        for own, before in taken:
            own.update(before)
