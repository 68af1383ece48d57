"""The masked model: its weights, and which of its structures a forward pass uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structures.structure import Structure
from ..structures.units import plain_name
from .apply import shapes_in, slices_of
from .layerwise import Weights
from .settle import Cut
from .sharing.ties import Tie, WholeWeights, remember_ties, ties_of, untie

__all__ = ["MaskedWeights", "untied", "used_in"]


class MaskedWeights:
    """The weights of the masked model: those that the plan shares taken from their sources.

    Query weights that a softmax temperature will be folded into are rounded as the cut will round
    their product, so that the rest of the proof can be exact. ``stored`` gives the weights of the
    model as they are.
    """

    # not closures that call themselves: they would hold the old weights until Python looks for
    # circles, while the cut makes the new ones

    def __init__(self, model: nn.Module, cut: Cut, stored: Weights) -> None:
        with untied(model):
            shapes = shapes_in(model)
        self._scale = slices_of(cut.structures, cut.plan, shapes).scale
        self._ties: dict[str, list[Tie]] = defaultdict(list)
        for tie in ties_of(cut.structures, cut.plan, shapes):
            self._ties[tie.target].append(tie)
        self._whole = WholeWeights(model, _Rounded(stored, self._scale))

    def __call__(self, name: str) -> Tensor:
        weight = self._whole(name)
        for tie in self._ties.get(name, ()):
            source = self(tie.source)
            wide = torch.promote_types(weight.dtype, source.dtype)
            taken = source.to(wide).index_select(tie.axis, _on(source, tie.out_of))
            weight = weight.to(wide).index_copy(tie.axis, _on(weight, tie.into), taken)
        return weight


def _on(weight: Tensor, positions: Sequence[int]) -> Tensor:
    return torch.tensor(positions, device=weight.device)


@dataclass(frozen=True)
class _Rounded:
    """Stored weights, rounded where the cut multiplies them by a factor."""

    stored: Weights
    scale: Mapping[str, float]

    def __call__(self, name: str) -> Tensor:
        weight, factor = self.stored(name), self.scale.get(plain_name(name), 1.0)
        return weight if factor == 1.0 else (weight * factor).double() / factor


@contextmanager
def used_in(
    model: nn.Module, structures: Sequence[Structure]
) -> Iterator[Callable[[], frozenset[str]]]:
    """A function that tells which structures had all their gated modules called in the block.

    A gate works where its module is called: a forward that reads the weight of a layer by itself
    passes it by.
    """
    called: set[str] = set()
    with ExitStack() as hooks:
        for path in {gate.module for structure in structures for gate in structure.gates}:
            module = model.get_submodule(path)

            def note(*_: Any, path: str = path) -> None:
                called.add(path)

            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield lambda: frozenset(
            structure.name
            for structure in structures
            if all(gate.module in called for gate in structure.gates)
        )


@contextmanager
def untied(model: nn.Module) -> Iterator[None]:
    """The model with whole weights in place of shared ones while the block runs."""
    tie_again = remember_ties(model)
    try:
        untie(model)
        yield
    finally:
        tie_again()
