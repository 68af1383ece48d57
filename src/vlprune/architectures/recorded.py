"""Finding the structures that the record of a cut names, whatever they were described in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..cutting.wrappers import uncompiled
from ..structures.structure import AttentionUnit, Description, Structure
from .discover import Discovery, discover
from .whole_experts import WHOLE

__all__ = ["discover_apart", "discover_recorded"]


def discover_apart(model: nn.Module, attention: AttentionUnit) -> Description:
    """As :func:`discover`, with every dimension of a rotary head as a unit of its own, padded.

    Folders written before vlprune knew pairs were cut so.
    """
    return Discovery(uncompiled(model), attention, pairs=False).run()


def discover_recorded(
    model: nn.Module, attention: AttentionUnit, names: Iterable[str]
) -> tuple[Structure, ...]:
    """All structures that a record with these ``names`` may mean.

    A model can lose experts in one cut, and neurons of those that are left in another.
    """
    found = discover(model, attention).structures
    if any(name.endswith(WHOLE) for name in names):
        whole = discover(model, attention, "expert")
        found += tuple(s for s in whole if s.name.endswith(WHOLE))
    return found
