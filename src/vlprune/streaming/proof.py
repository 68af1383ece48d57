"""The proof of a cut between two folders: masked and cut model compared, one layer in memory.

Where inputs can be made up, both models run, each layer with its weights from the files. What no
such pass reaches is proved weight by weight: a weight of the small model, put into zeros, is the
masked weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cutting.gates import plan_gates
from ..cutting.layerwise import Weights
from ..cutting.masked import MaskedWeights
from ..cutting.proof import (
    Verification,
    compare,
    run_masked,
    verification,
)
from ..cutting.settle import Cut
from ..cutting.sharing.ties import WholeWeights
from ..errors import IncomparableError, VerificationError
from ..structures.structure import Slot, Structure
from ..structures.units import spread
from .source import Source

__all__ = ["Proof", "prove"]

ADVICE = "nothing was saved: report this architecture"
ROUNDING = 1e-9
"""The largest difference of two weights, as a fraction of the largest number in them."""


@dataclass(frozen=True)
class Proof:
    """How a cut was proved: by passes {part of the model: result}, the rest by its weights.

    ``by_passes`` and ``by_weights`` count structures.
    """

    passes: Mapping[str, Verification]
    by_passes: int
    by_weights: int


def prove(
    dense: Source,
    small: Source,
    cut: Cut,
    inputs: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None] = lambda text: None,
) -> Proof:
    """Prove that ``small`` is ``dense`` after ``cut``; both are read layer by layer.

    ``inputs`` {path of a part of the model: keywords of its forward pass}. ``say`` gets a line for
    a part that cannot be run. Raises VerificationError if the two differ.
    """
    stored, wanted = small.weights.__getitem__, dense.weights.__getitem__
    passes, reached = dict[str, Verification](), set[str]()
    for part, keywords in inputs.items():
        try:
            masked = run_masked(dense.model, cut, keywords, wanted, part)
        except IncomparableError as error:
            say(f"{part or 'the model'} is proved by its weights only: {error}")
            continue
        reached |= masked.used
        passes[part] = verification(compare(small.model, masked, stored, part, ADVICE), masked, cut)
    rest = [structure for structure in cut.structures if structure.name not in reached]
    _same_weights(rest, cut, MaskedWeights(dense.model, cut, wanted), dense, small)
    return Proof(passes, len(cut.structures) - len(rest), len(rest))


def _same_weights(
    structures: Sequence[Structure], cut: Cut, masked: Weights, dense: Source, small: Source
) -> None:
    """Raise VerificationError unless every weight of the structures is the masked one, cut."""
    every = cut.description.structures
    gates, found = (
        plan_gates(every, cut.plan),
        WholeWeights(small.model, small.weights.__getitem__),
    )
    for name in dict.fromkeys(slot.param for s in structures for slot in _slots(s)):
        whole = masked(name).double()
        part = found(name).double()
        scale = _folded(name, cut)
        for structure in every:
            for slot in _slots(structure):
                if slot.param == name:
                    gate = spread(gates[structure.name], slot, whole.shape[slot.axis])
                    whole = _masked(whole, gate, slot.axis)
        axes = {slot.axis for s in every for slot in _slots(s) if slot.param == name}
        for axis in sorted(axes):
            stays = _stays(every, gates, name, axis, whole.shape[axis])
            if part.shape[axis] != len(stays):
                raise VerificationError(
                    f"{name} has {part.shape[axis]} in place of {len(stays)} positions; {ADVICE}"
                )
            size = (*part.shape[:axis], whole.shape[axis], *part.shape[axis + 1 :])
            part = part.new_zeros(size).index_copy(axis, stays, part)
        apart = float((whole * scale - part).abs().max())
        if not apart <= ROUNDING * float(whole.abs().max()):
            raise VerificationError(
                f"{name} differs from the masked weight by {apart:.2g}; {ADVICE}"
            )


def _slots(structure: Structure) -> tuple[Slot, ...]:
    return structure.slots + structure.buffers


def _masked(weight: Tensor, gate: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * gate.double().reshape(shape)


def _stays(
    structures: Sequence[Structure], gates: Mapping[str, Tensor], name: str, axis: int, length: int
) -> Tensor:
    """The positions on an axis of a parameter that no gate closes."""
    still = torch.ones(length)
    for structure in structures:
        for slot in _slots(structure):
            if (slot.param, slot.axis) == (name, axis):
                still = still * spread(gates[structure.name], slot, length)
    return still.nonzero().reshape(-1)


def _folded(name: str, cut: Cut) -> float:
    """The factor that a cut multiplies into a query weight."""
    for structure in cut.structures:
        if structure.layout == "native" and name in structure.folds:
            return float((len(cut.plan.kept(structure)) / structure.size) ** 0.5)
    return 1.0
