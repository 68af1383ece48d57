"""Surgery: put smaller parameters into a model's modules and adjust all that depends on them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..structures.plan import Plan
from ..structures.shards import shape_of, whole
from ..structures.structure import Structure
from ..structures.units import laid_out, owner_of, positions
from .fsdp import Units, class_in_unit, is_sharded, is_unit, reshard
from .native import native_forward
from .padded import PaddedLinear, expect_index, is_linear, linear_axes
from .remains import Remains
from .sharing.ties import (
    Tie,
    moved,
    tie,
    ties_of,
    untie,
)
from .wrappers import stock_class
from .zero import split_again

__all__ = ["Slices", "apply_plan", "shapes_in", "slices_of"]


def apply_plan(
    model: nn.Module,
    structures: Sequence[Structure],
    plan: Plan,
    undo: ExitStack | None = None,
    ties: Sequence[Tie] = (),
) -> Slices:
    """Cut and share without any check; returns what stays of each parameter.

    Works on meta tensors, as loading needs. ``structures`` are those that are cut, and those that
    share or are shared. ``ties`` are the ties that the model had before the cut and keeps. ``undo``
    takes the calls that put the old state back; without it, each old weight is freed as soon as it
    is replaced.
    """
    undo = undo if undo is not None else _Forget()
    kept = {s.name: plan.kept(s) for s in structures}
    cut = [s for s in structures if len(kept[s.name]) < s.size]
    shapes = shapes_in(model)
    ties = [*ties, *ties_of(structures, plan, shapes)]
    slices = slices_of(structures, plan, shapes)
    swap_forwards(model, cut, undo)
    if is_sharded(model):
        reshard(model)
    units = Units(model)
    for name in slices.index:  # in the same order in all processes, which gather together
        narrow(model, name, slices, undo, units)
    pad(model, cut, slices.index, undo, units)
    follow(model, cut, kept, undo)
    if ties:
        undo.callback(untie, model)
        tie(model, moved(ties, slices.index, slices.scale))
    return slices


def shapes_in(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers, by name."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: shape_of(tensor) for name, tensor in (*parameters, *buffers)}


class _Forget(ExitStack):
    """An undo list that keeps nothing."""

    def callback(self, callback: Any, /, *_args: Any, **_kwds: Any) -> Any:
        """Drop the call, and with it the old weight that it refers to."""
        return callback


Axes = Mapping[int, tuple[Tensor, int]]
"""{axis: (positions that stay, old length)} of one parameter."""


@dataclass(frozen=True)
class Slices:
    """What a cut leaves of every parameter and buffer that it touches.

    ``index`` is {parameter or buffer: :data:`Axes`}, ``scale`` {parameter: factor} for the
    parameters that a softmax temperature is folded into.
    """

    index: Mapping[str, Axes]
    scale: Mapping[str, float]

    def of(self, name: str, weight: Tensor) -> Tensor:
        """The rows and columns of a tensor that stay, times its factor: a new tensor."""
        for axis, (index, _length) in self.index[name].items():
            weight = weight.index_select(axis, index.to(weight.device))
        if self.scale.get(name, 1.0) != 1.0:
            weight = weight * self.scale[name]
        return weight.contiguous()


def slices_of(
    structures: Sequence[Structure], plan: Plan, shapes: Mapping[str, Sequence[int]]
) -> Slices:
    """What the plan leaves of parameters and buffers with these shapes."""
    masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    scale: dict[str, float] = {}
    for structure in structures:
        kept = plan.kept(structure)
        if len(kept) == structure.size:
            continue
        if structure.layout == "native":
            scale |= dict.fromkeys(structure.folds, math.sqrt(len(kept) / structure.size))
        for slot in (*structure.slots, *structure.buffers):
            length = shapes[slot.param][slot.axis]
            mask = masks[slot.param].setdefault(
                slot.axis, torch.ones(length, dtype=torch.bool, device="cpu")
            )
            mask[laid_out(slot, structure.size)] = False
            mask[positions(slot, structure.size, kept)] = True
    index = {
        name: {axis: (mask.nonzero().reshape(-1), mask.numel()) for axis, mask in axes.items()}
        for name, axes in masks.items()
    }
    return Slices(index, scale)


def swap_forwards(model: nn.Module, cut: Sequence[Structure], undo: ExitStack) -> None:
    """Give modules vlprune's forward where the stock one does not take narrower weights."""
    for path, key in (swap for structure in cut for swap in structure.swaps):
        module: Any = model.get_submodule(path)
        target = native_forward(key, stock_class(module))
        if not isinstance(module, target):
            undo.callback(_become, module, type(module), dict(module.__dict__))
            module.__class__ = class_in_unit(module, target)
            module.adopt()


def _become(module: Any, cls: type[nn.Module], attributes: Mapping[str, Any]) -> None:
    module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(attributes)


@torch.no_grad()
def narrow(model: nn.Module, name: str, slices: Slices, undo: ExitStack, units: Units) -> None:
    """Replace one parameter or buffer by what stays of it.

    A parameter that lies in parts is gathered for the purpose, alone, and comes back in parts.
    Raises PlanError if the module holds None in place of the parameter.
    """
    path, leaf = owner_of(name)
    module = model.get_submodule(path)
    if leaf in module._buffers:
        whole_buffer = module._buffers[leaf]
        undo.callback(module._buffers.__setitem__, leaf, whole_buffer)
        module._buffers[leaf] = slices.of(name, whole_buffer)  # type: ignore[arg-type]
        return
    old = module._parameters[leaf]
    if old is None:
        raise PlanError(f"the model has no parameter {name!r}")
    data = slices.of(name, whole(old).detach())
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if units.replace(old, new, undo):
        pass
    elif split_again(old, new):
        undo.callback(module._parameters.__setitem__, leaf, old)
        module._parameters[leaf] = new
    else:
        if not isinstance(undo, _Forget):
            remains = Remains(old, slices.index[name], name in slices.scale)
            undo.callback(_put_back, module, leaf, remains, new)
        module._parameters[leaf] = new
    if leaf == "weight" and is_linear(module):
        out_axis, in_axis = linear_axes(module)
        names = ("nf", "nx") if out_axis == 1 else ("out_features", "in_features")
        for attr, width in zip(names, (data.shape[out_axis], data.shape[in_axis]), strict=True):
            if hasattr(module, attr):
                _set(module, attr, width, undo)


def _put_back(module: nn.Module, leaf: str, remains: Remains, new: Tensor) -> None:
    module._parameters[leaf] = remains.put_together(new)


def pad(
    model: nn.Module,
    cut: Sequence[Structure],
    index: Mapping[str, Axes],
    undo: ExitStack,
    units: Units,
) -> None:
    """Replace the cut projections of padded structures by layers that keep the old outer width."""
    padded: dict[str, dict[int, tuple[Tensor, int]]] = defaultdict(dict)
    for structure in cut:
        for slot in structure.slots if structure.layout == "padded" else ():
            path, leaf = owner_of(slot.param)
            if leaf == "weight":
                padded[path][slot.axis] = index[slot.param][slot.axis]
    for path, axes in padded.items():
        module: Any = model.get_submodule(path)
        device = module.weight.device
        out_axis, in_axis = linear_axes(module)
        rows, columns = axes.get(out_axis), axes.get(in_axis)
        layer = PaddedLinear(
            module.weight,
            module.bias,
            rows[0].to(device) if rows else None,
            columns[0].to(device) if columns else None,
            full_out=rows[1] if rows else shape_of(module.weight)[out_axis],
            full_in=columns[1] if columns else shape_of(module.weight)[in_axis],
            transposed=out_axis == 1,
        )
        if device.type == "meta":
            for name, kept in (("rows", rows), ("columns", columns)):
                if kept:
                    expect_index(layer, name, kept[0])
        layer.train(module.training)
        if is_unit(module):  # the hooks that gather its weights stay with the object
            undo.callback(_become, module, type(module), dict(module.__dict__))
            numbers = ("in_features", "out_features", "transposed", "_buffers")
            module.__dict__.update({name: layer.__dict__[name] for name in numbers})
            module.__class__ = class_in_unit(module, PaddedLinear)
            continue
        parent_path, leaf = owner_of(path)
        parent = model.get_submodule(parent_path)
        undo.callback(parent._modules.__setitem__, leaf, module)
        setattr(parent, leaf, layer)
        units.follow(module, layer, undo)


def follow(
    model: nn.Module,
    cut: Sequence[Structure],
    kept: Mapping[str, Sequence[int]],
    undo: ExitStack,
) -> None:
    """Set the module attributes that native forwards read to the numbers after the cut."""
    for structure in cut:
        if structure.layout != "native":
            continue
        for attr in structure.attrs:
            module = model.get_submodule(attr.module)
            left = len(kept[structure.name])
            value = attr.per_unit * left + attr.more
            if attr.joint:
                value = getattr(module, attr.name) - attr.per_unit * (structure.size - left)
            _set(module, attr.name, value, undo)
        for path, name in structure.indices:
            _note_units(model.get_submodule(path), name, kept[structure.name], undo)


def _note_units(module: nn.Module, name: str, kept: Sequence[int], undo: ExitStack) -> None:
    """Let a buffer hold the units that stay, counted in those of the uncut module."""
    before = module._buffers.get(name)
    values = torch.as_tensor(kept, dtype=torch.long, device="cpu")
    if before is not None:
        values = before.cpu()[values]
    device = next(module.parameters()).device
    if device.type == "meta":
        expect_index(module, name, values)
    undo.callback(
        module._buffers.pop if before is None else module._buffers.__setitem__, name, before
    )
    module.register_buffer(name, values.to(device))


def _set(module: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
