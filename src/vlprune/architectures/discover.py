"""Finding structures in any model: by the names and shapes of a module's children."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import nn

from ..architectures import layouts
from ..cutting.padded import PaddedLinear, is_linear, linear_axes
from ..cutting.wrappers import stock_class, uncompiled
from ..errors import UnsupportedError, did_you_mean
from ..structures.shards import shape_of
from ..structures.structure import (
    AttentionUnit,
    Description,
    ExpertUnit,
    Gate,
    Slot,
    Structure,
)
from ..structures.units import owner_of, span
from .attention import Block, Leave, join, structures_of
from .experts import experts_at, experts_structure
from .latent import expansions_at, latent_structures
from .layouts import ATTENTION, FFN
from .measured import measure_multihead, measure_projected
from .reasons import reason_of
from .towers import child_of, default_tower, in_order, tower_of
from .whole_experts import whole_experts

__all__ = ["Discovery", "discover"]


def discover(
    model: nn.Module, attention: AttentionUnit = "head_dim", experts: ExpertUnit = "neuron"
) -> Description:
    """All structures of any model, and the reasons why its other modules stay dense.

    ``attention`` chooses the unit: ``"head_dim"`` (the same dimension of every head in q,
    k, v and o, as in UPop), ``"qk_vo"`` (query-key and value-output dimensions apart),
    ``"head"`` (whole heads, or whole KV groups where queries share keys) or ``"query_head"`` (the
    same query head of every KV group, whose keys and values stay; whole heads where each query
    head has its own). Where a rotary embedding turns head dimensions in pairs, a unit of
    ``"head_dim"`` is a pair.

    ``experts`` chooses the unit of experts that are one parameter: ``"neuron"`` (the same neuron of
    every expert of a layer) or ``"expert"`` (whole experts, with their rows of the router).

    Discovery needs no data, does not run the model and works on meta tensors. Calling it twice
    on one model gives equal descriptions.

    Raises UnsupportedError if ``attention`` or ``experts`` is not one of these.
    """
    for name, unit, known in (
        ("attention", attention, get_args(AttentionUnit)),
        ("experts", experts, get_args(ExpertUnit)),
    ):
        if unit not in known:
            raise UnsupportedError(
                f"{name} must be one of {', '.join(known)}, not {unit!r}."
                f"{did_you_mean(str(unit), known)}"
            )
    return Discovery(uncompiled(model), attention, experts).run()


class Discovery:
    """One walk over the modules of a model."""

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionUnit,
        experts: ExpertUnit = "neuron",
        *,
        pairs: bool = True,
    ) -> None:
        self.model, self.attention, self.experts, self.pairs = model, attention, experts, pairs
        self.modules = dict(model.named_modules())
        self.dense: dict[str, str] = {}
        self.taken: set[str] = set()
        self.shared = _shared_parameters(model)
        self.default_tower = default_tower(model)
        self.one_cache = tuple(
            f"{join(path, part)}."
            for path, module in self.modules.items()
            for part in layouts.ONE_CACHE.get(stock_class(module).__name__, ())
        )

    def run(self) -> Description:
        """The description of the model."""
        structures: list[Structure] = []
        order: dict[str, int] = {}
        for path, module in in_order(self.model):
            order[path] = len(order)
            structures += self._experts(path, module)
            if module._modules:  # most modules are single layers
                structures += self._attention(path, module)
                structures += self._ffn(path, module)
        structures.sort(key=lambda s: order[s.core or s.gates[0].module])
        self._explain_rest({owner_of(slot.param)[0] for s in structures for slot in s.slots})
        return Description(tuple(structures), self.dense, self.attention, self.experts)

    # -- attention ---------------------------------------------------------------------

    def _attention(self, path: str, module: nn.Module) -> list[Structure]:
        """The structures of the attention block at ``path``; none if it is not one."""
        if parts := expansions_at(module):
            return self._guarded(
                path,
                [*parts],
                lambda: latent_structures(
                    path, parts, self.modules, self._tower(path), self.attention
                ),
            )
        if isinstance(module, nn.MultiheadAttention):
            return self._guarded(
                path,
                ["", "out_proj"],
                lambda: structures_of(
                    measure_multihead(path, module, self._tower(path)), self.attention
                ),
            )
        for row in ATTENTION:
            names = [n for n in (row.q, row.k, row.qkv, *row.v, *row.o) if n]
            if _has_values(module, row) and self._free(path, module, names):
                return self._guarded(
                    path,
                    names,
                    lambda row=row: structures_of(  # type: ignore[misc]
                        self._measured(path, row), self.attention
                    ),
                )
        return []

    def _measured(self, path: str, row: layouts.Attention) -> Block:
        block = measure_projected(path, row, self.modules, self._tower(path))
        if path.startswith(self.one_cache):
            return replace(block, native=layouts.PADDED, folds=(), one_cache=True)
        if block.native.rotary and not self.pairs:
            return replace(block, native=replace(block.native, rotary=False, head_dim=False))
        return block

    def _free(self, path: str, module: nn.Module, names: list[str]) -> bool:
        """Whether the module has all these children and none is part of another block already."""
        if any(child_of(module, name) is None for name in names):
            return False
        return all(
            not {join(path, name), join(path, f"{name}.linear")} & self.taken
            and self._known_wrapper(join(path, name))
            for name in names
        )

    def _known_wrapper(self, path: str) -> bool:
        """Whether ``path`` is no ``x.linear``, or its ``x`` leaves a zero a zero."""
        owner, leaf = owner_of(path)
        kind = stock_class(self.modules[owner]).__name__
        return leaf != "linear" or kind in layouts.WRAPPERS

    def _guarded(
        self, path: str, names: list[str], build: Callable[[], list[Structure]]
    ) -> list[Structure]:
        """The structures of one block; if it must stay dense, none, with the reason noted."""
        blocks = [join(path, name) for name in names]
        try:
            if stock_class(self.modules[path]).__name__ in layouts.DENSE:
                raise Leave(layouts.DENSE[stock_class(self.modules[path]).__name__])
            for block in blocks:
                if isinstance(self.modules[block], PaddedLinear):
                    raise Leave("cut before with padded projections")
            found: list[Structure] = build()
            for structure in found:
                self._check_places(structure)
                for slot in structure.slots:
                    if slot.param in self.shared:
                        raise Leave(f"shares its weights with {self.shared[slot.param]}")
        except Leave as reason:
            for block in blocks:
                self.dense[block] = str(reason)
            return []
        finally:
            self.taken.update(blocks)
        touched = {owner_of(slot.param)[0] for one in found for slot in one.slots}
        self.dense |= dict.fromkeys(set(blocks) - touched, "all query heads of a group read it")
        return found

    def _check_places(self, structure: Structure) -> None:
        """Raise Leave if the structure claims rows or columns that a parameter does not have."""
        for slot in structure.slots:
            path, leaf = owner_of(slot.param)
            shape = shape_of(getattr(self.modules[path], leaf))
            if slot.start + span(slot, structure.size) > shape[slot.axis]:
                raise Leave(
                    f"{slot.param} has the shape {tuple(shape)}, too few for {structure.size} units"
                )

    # -- FFN ---------------------------------------------------------------------------

    def _experts(self, path: str, module: nn.Module) -> list[Structure]:
        """The units of experts whose weights are parameters of one module."""
        row = experts_at(module)
        if row is None:
            return []
        names = sorted({owner_of(name)[0] for name in row.weights})
        for name, child in module.named_modules():
            inside = names == [""] and name and not name.startswith("parametrizations")
            if inside and any(True for _ in child.parameters(recurse=False)):
                self.dense[join(path, name)] = reason_of(child, stock_class(module).__name__, name)

        def build() -> list[Structure]:
            if self.experts == "expert":
                return [whole_experts(path, row, self.modules, self._tower(path))]
            return [experts_structure(path, module, row, self._tower(path))]

        return self._guarded(path, names, build)

    def _ffn(self, path: str, module: nn.Module) -> list[Structure]:
        found = []
        for row in FFN:
            names = [n for n in (row.gate, row.up, row.down) if n]
            if row.listed and not _is_pair(module, names):
                continue
            if self._free(path, module, names):
                found += self._guarded(
                    path,
                    names,
                    lambda row=row: [self._ffn_structure(path, module, row)],  # type: ignore[misc]
                )
        return found

    def _ffn_structure(self, path: str, module: nn.Module, row: layouts.Ffn) -> Structure:
        names = [n for n in (row.gate, row.up, row.down) if n]
        layers = [self.modules[join(path, n)] for n in names]
        for child, layer in zip(names, layers, strict=True):
            if not is_linear(layer):
                raise Leave(
                    f"its projection {child} is a {stock_class(layer).__name__}, not a Linear"
                )
        up, down = layers[-2], layers[-1]
        up_out, up_in = (shape_of(up.weight)[axis] for axis in linear_axes(up))
        down_out, down_in = (shape_of(down.weight)[a] for a in linear_axes(down))
        size = up_out // 2 if row.fused else up_out
        if down_in != size:
            raise Leave(f"{row.up} gives {up_out} values, {row.down} takes {down_in}")
        if up_in != down_out:
            raise Leave("it changes the width: a projector, not an FFN")
        between = self._between(path, module, names, size)
        if between:
            raise Leave(f"{between} sits between its projections and has their width")
        parts = [join(path, n) for n in names[:-1]]
        repeat = 2 if row.fused else 1
        slots = [s for part in parts for s in self._row_slots(part, 0, repeat, 1)]
        slots.append(self._column_slot(join(path, row.down), 1, 1))
        first = join(path, row.up)
        if row.gate or (not row.fused and self._zero_stays_zero(path, row.up)):
            gates = (Gate(first),)
        else:
            gates = (Gate(join(path, row.down), "input"),)
        return Structure(
            name=join(path, row.gate or row.up),
            kind="ffn",
            size=size,
            tower=self._tower(path),
            slots=tuple(slots),
            gates=gates,
        )

    def _between(self, path: str, module: nn.Module, names: list[str], size: int) -> str:
        """The child between the projections that has the hidden width, or ""."""
        inside = {n.split(".")[0] for n in names}
        holder = owner_of(names[0])[0]
        nearby = module if not holder else self.modules[join(path, holder)]
        for child, layer in nearby.named_children():
            if child in inside or (holder and join(holder, child) in names):
                continue
            own = size > 1 and any(
                shape_of(p)[:1] == (size,) or math.prod(shape_of(p)) == size
                for p in layer.parameters(False)
            )
            norm = own and _is_residual_norm(layer, self.modules, path, names)
            deep = isinstance(layer, nn.ModuleList) and any(
                is_linear(inner) and shape_of(inner.weight)[linear_axes(inner)[1]] == size
                for inner in layer.modules()
            )
            if (own and not norm and not is_linear(layer)) or deep or _convolves(layer, size):
                return f"{child} ({stock_class(layer).__name__})"
        return ""

    def _zero_stays_zero(self, path: str, up: str) -> bool:
        """Whether the activation after ``up`` maps 0 to 0, so that gating before it is exact."""
        owner = self.modules[join(path, owner_of(up)[0])]
        for name in ("activation_fn", "intermediate_act_fn", "act_fn", "act", "activation", "gelu"):
            activation = getattr(owner, name, None)
            if callable(activation):
                with torch.no_grad():
                    try:
                        zero = torch.zeros(1, device="cpu")
                        return bool(activation(zero).abs().max() == 0)
                    except Exception:
                        return False
        return False

    # -- shared ------------------------------------------------------------------------

    def _row_slots(self, path: str, start: int, repeat: int, inner: int) -> list[Slot]:
        module = self.modules[path]
        slots = [Slot(f"{path}.weight", linear_axes(module)[0], start, repeat, inner)]
        if getattr(module, "bias", None) is not None:
            slots.append(Slot(f"{path}.bias", 0, start, repeat, inner))
        return slots

    def _column_slot(self, path: str, repeat: int, inner: int) -> Slot:
        return Slot(f"{path}.weight", linear_axes(self.modules[path])[1], 0, repeat, inner)

    def _tower(self, path: str) -> str:
        return tower_of(path) or self.default_tower

    def _explain_rest(self, cut: set[str]) -> None:
        """Say why all modules stay dense that are neither a part of a block nor ``cut``."""
        for path, module in self.modules.items():
            own = list(module.parameters(recurse=False))
            if not own or path in self.taken or path in self.dense or path in cut:
                continue
            if any(path.startswith(taken + ".") for taken in self.taken if taken):
                continue
            owner, name = owner_of(path)
            kind = stock_class(self.modules[owner]).__name__
            self.dense[path or "(model)"] = reason_of(module, kind, name)


def _has_values(module: nn.Module, row: layouts.Attention) -> bool:
    """Whether a block of this row knows its values; other blocks have such names, too."""
    if row.qkv or row.v:
        return True
    if row.k:  # which are the values
        return getattr(module, "v_proj", module) is None
    return bool(getattr(module, "is_kv_shared_layer", False))


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """{name: another name of the same parameter} for parameters that two modules hold."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    shared = {}
    for group in names.values():
        modules = {owner_of(name)[0] for name in group}
        if len(modules) > 1 and len({id(model.get_submodule(m)) for m in modules}) > 1:
            for name in group:
                shared[name] = next(other for other in group if other != name)
    return shared


def _is_pair(module: nn.Module, names: list[str]) -> bool:
    """Whether the layers at ``names`` are Linears, and the only layers of their list."""
    holder = child_of(module, owner_of(names[0])[0])
    layers = [*holder.children()] if holder is not None else []
    return len(layers) == len(names) and all(is_linear(layer) for layer in layers)


def _convolves(layer: nn.Module, size: int) -> bool:
    """Whether ``layer`` contains a convolution over ``size`` channels, as SegFormer's FFN does."""
    return any(
        isinstance(m, nn.Conv1d | nn.Conv2d) and m.in_channels == size for m in layer.modules()
    )


def _is_residual_norm(
    layer: nn.Module, modules: dict[str, nn.Module], path: str, names: list[str]
) -> bool:
    """Whether ``layer`` is as wide as the residual stream: a norm beside an FFN of equal width."""
    down = modules[join(path, names[-1])]
    width = shape_of(down.weight)[linear_axes(down)[0]]
    return all(shape_of(p) == (width,) for p in layer.parameters(False))
