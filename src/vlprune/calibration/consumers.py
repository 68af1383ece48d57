"""The linear layers that read the units of a structure, found from its slots alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.padded import is_linear, linear_axes
from ..structures.structure import Slot, Structure
from ..structures.units import laid_out, owner_of
from .taken_apart import parts_of, reads_experts

__all__ = ["Consumer", "Rows", "consumers_of", "queries_of", "rows_of"]


@dataclass(frozen=True)
class Consumer:
    """A linear layer at ``module`` whose input holds the units of ``structure``.

    ``columns`` (size, columns per unit) are the unit's places in the layer's input; the layer reads
    ``width`` numbers and writes ``out``.
    """

    structure: str
    module: str
    columns: Tensor
    width: int
    out: int

    def kept(self, units: Sequence[int]) -> Tensor:
        """The columns that stay when ``units`` do, ascending, other structures' included."""
        stays = torch.ones(self.width, dtype=torch.bool)
        stays[self.columns.reshape(-1)] = False
        stays[self.columns[list(units)].reshape(-1)] = True
        return stays.nonzero().reshape(-1)


@dataclass(frozen=True)
class Rows:
    """Rows of a projection that belong to a structure: ``heads`` heads of ``size`` dimensions.

    ``module`` is the path of the projection, "" for a parameter that no module of its own holds;
    ``weight`` and ``bias`` (or "") are parameters, ``start`` the first row, ``period`` how far
    apart the heads begin (0: one directly behind the other).
    """

    module: str
    weight: str
    bias: str
    start: int
    heads: int
    size: int
    period: int = 0

    def of(self, tensor: Tensor, axis: int = -1) -> Tensor:
        """These rows of a weight, or these places of an output: ``heads * size`` on the axis."""
        if not self.period:
            return tensor.narrow(axis, self.start, self.heads * self.size)
        return tensor.index_select(axis, self._places(tensor))

    def with_new(self, tensor: Tensor, new: Tensor) -> Tensor:
        """``tensor`` with ``new`` on these places of its last axis."""
        return tensor.index_copy(-1, self._places(tensor), new)

    def put(self, tensor: Tensor, new: Tensor) -> None:
        """Write ``new`` (heads * size, ...) to these rows of a weight or bias, in place."""
        tensor.index_copy_(0, self._places(tensor), new.to(tensor.dtype))

    def _places(self, tensor: Tensor) -> Tensor:
        slot = Slot("", 0, self.start, self.heads, 1, self.period)
        return laid_out(slot, self.size).reshape(-1).to(tensor.device)


def consumers_of(model: nn.Module, structure: Structure) -> tuple[Consumer, ...]:
    """The layers that read the structure's units; none for query-key dimensions.

    Those of experts are there while :func:`.taken_apart.taken_apart` is in effect.
    """
    found = []
    for slot in structure.slots:
        path, leaf = owner_of(slot.param)
        module: Any = model.get_submodule(path)
        columns = laid_out(slot, structure.size).transpose(0, 1).reshape(structure.size, -1)
        if experts := reads_experts(model, structure, slot):
            shape = getattr(module, leaf).shape
            width, out = shape[slot.axis], shape[3 - slot.axis]
            found += [
                Consumer(structure.name, part, columns, width, out)
                for part in parts_of(path, experts)
            ]
            continue
        if leaf != "weight" or not is_linear(module) or slot.axis != linear_axes(module)[1]:
            continue
        shape = module.weight.shape
        out_axis, in_axis = linear_axes(module)
        found.append(Consumer(structure.name, path, columns, shape[in_axis], shape[out_axis]))
    return tuple(found)


def rows_of(model: nn.Module, structure: Structure) -> tuple[Rows, ...]:
    """The projections whose rows are the structure's head dimensions, in the order of its slots.

    For ``attention_qk`` that is q, then k; for ``attention_vo`` the values. Empty for other units.
    """
    found = []
    for slot in structure.slots:
        path, leaf = owner_of(slot.param)
        if slot.inner != 1 or leaf not in ("weight", "in_proj_weight"):
            continue
        module = model.get_submodule(path)
        if leaf == "weight" and (not is_linear(module) or slot.axis != linear_axes(module)[0]):
            continue
        bias = _bias_beside(structure.slots, slot, path, leaf.replace("weight", "bias"))
        name = path if leaf == "weight" else ""
        layout = slot.start, slot.repeat, structure.size, slot.period
        found.append(Rows(name, slot.param, bias, *layout))
    return tuple(found)


def queries_of(model: nn.Module, structure: Structure) -> tuple[Rows, ...]:
    """Those of :func:`rows_of` that are queries; none where there are no keys besides.

    Where only a part of each head is turned, the second dimensions of pairs are rows of their own.
    """
    rows = rows_of(model, structure)
    if len(rows) < 2:
        return ()
    first, *others = rows
    second = (first.weight, first.start + first.size, first.period or -1)
    return first, *(one for one in others if (one.weight, one.start, one.period) == second)


def _bias_beside(slots: Sequence[Slot], weight: Slot, path: str, leaf: str) -> str:
    name = f"{path}.{leaf}" if path else leaf
    return next((s.param for s in slots if s.param == name and s.start == weight.start), "")
