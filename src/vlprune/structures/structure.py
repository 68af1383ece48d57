"""The description of a model as plain values; everything else is derived from it.

Nothing here imports torch. A *structure* is a set of *units* (FFN neurons, head
dimensions, whole heads, KV groups) that live and die together; its *slots* say which
slices of which parameters belong to each unit. The slots alone determine the cut, the
exact and the differentiable parameter count, and the shapes needed to reload.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Attr", "Description", "Gate", "Slot", "Structure", "fingerprint", "unit_of"]

AttentionUnit = Literal["head_dim", "qk_vo", "head", "query_head"]

ExpertUnit = Literal["neuron", "expert"]
"""The unit of experts whose weights are parameters of one module: a neuron of all, or an expert."""


@dataclass(frozen=True)
class Slot:
    """One axis of one parameter, laid out as ``(repeat, size, inner)`` from ``start``.

    Unit ``u`` of a structure with ``size`` units owns ``[:, u, :]`` of that layout.
    An FFN neuron has ``repeat=1, inner=1``; a head dimension ``repeat=heads``; a whole
    head ``inner=head_dim``; the query part of a KV group ``inner=queries * head_dim``.
    ``period`` is how far apart the repeats begin, where rows of something else lie between them;
    0 where they follow each other at once.
    """

    param: str
    axis: int
    start: int = 0
    repeat: int = 1
    inner: int = 1
    period: int = 0


@dataclass(frozen=True)
class Gate:
    """The place where a structure's gate multiplies, laid out as a :class:`Slot`.

    ``at`` is ``"output"`` or ``"input"`` (last axis of what a module returns or
    receives), or ``"weight"``: positions on ``axis`` of the parameters ``params``, for modules such
    as ``nn.MultiheadAttention`` that never call their projections as modules. At a ``"router"`` the
    gate multiplies the weights of the experts that a token goes to, and an expert whose gate is 0
    is none that a token can go to (:mod:`vlprune.cutting.routers`).
    """

    module: str
    at: Literal["output", "input", "weight", "router"] = "output"
    start: int = 0
    repeat: int = 1
    inner: int = 1
    params: tuple[str, ...] = ()
    period: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Attr:
    """A module attribute that must follow the cut: ``per_unit`` times the units kept, and ``more``.

    ``more`` is the part of the number that no unit of the structure has to do with. With ``joint``
    another structure has a part in the number, too, so that it becomes smaller by what goes.
    """

    module: str
    name: str
    per_unit: int = 1
    more: int = 0
    joint: bool = False


@dataclass(frozen=True)
class Structure:
    """Units that live and die together.

    ``layout`` is ``"native"`` when the module's own forward (or the vlprune subclasses named
    by ``swaps``, (module path, key) pairs) accepts the narrower weights, ``"padded"`` when the
    narrow result is scattered back to the full width so that the forward stays untouched.
    ``indices`` are (module path, buffer name) pairs: forwards there ask which units stay.
    ``folds`` are query parameters to be multiplied by ``sqrt(kept / size)``, for a forward that
    derives its softmax temperature from the head size. ``core`` is the module that computes
    attention scores, or experts that compute on every token, ``core_share`` the fraction of its
    MACs that follow this structure.
    ``buffers`` are slots of buffers, which are cut as parameters are, and cost nothing. At least
    ``least`` units must stay.
    """

    name: str
    kind: str
    size: int
    tower: str
    slots: tuple[Slot, ...]
    gates: tuple[Gate, ...]
    attrs: tuple[Attr, ...] = ()
    folds: tuple[str, ...] = ()
    layout: Literal["native", "padded"] = "native"
    swaps: tuple[tuple[str, str], ...] = ()
    indices: tuple[tuple[str, str], ...] = ()
    core: str | None = None
    core_share: float = 0.0
    buffers: tuple[Slot, ...] = ()
    least: int = 1


def fingerprint(attention: str, structures: Iterable[Structure]) -> str:
    """Twelve hex digits that two models share only if a plan for one fits the other."""
    facts = [attention, *sorted((s.name, s.kind, s.size) for s in structures)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def unit_of(structures: Iterable[Structure]) -> str:
    """The attention unit that the structures were described in; "" if none is attention."""
    attention = [s for s in structures if s.kind.startswith("attention")]
    if any(s.kind in ("attention_qk", "attention_vo") for s in attention):
        return "qk_vo"
    if not attention:
        return ""
    first = [s.slots[0] for s in attention]
    if any(slot.inner == 1 for slot in first):
        return "head_dim"
    return "query_head" if any(slot.repeat > 1 for slot in first) else "head"


@dataclass(frozen=True)
class Description:
    """All structures of a model, and the reasons why its other modules stay dense.

    ``structures`` follow the order in which a forward pass reaches them inside each
    tower. ``dense`` maps the path of every other module that holds parameters to its reason,
    one phrase. Iterating over a description iterates over its structures.
    """

    structures: tuple[Structure, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    attention: AttentionUnit = "head_dim"
    experts: ExpertUnit = "neuron"

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(self.attention, self.structures)

    def __iter__(self) -> Iterator[Structure]:
        return iter(self.structures)

    def __len__(self) -> int:
        return len(self.structures)
