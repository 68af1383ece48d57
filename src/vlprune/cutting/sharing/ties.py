"""Permanently shared weights: every shared position is stored once, with its source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...structures.plan import Plan
from ...structures.structure import Structure
from ...structures.units import owner_of, positions
from ..padded import expect_index
from .rules import slot_pairs

__all__ = [
    "SharedWeight",
    "Tie",
    "WholeWeights",
    "is_shared",
    "moved",
    "remember_ties",
    "tie",
    "ties_in",
    "ties_of",
    "untie",
]


@dataclass(frozen=True)
class Tie:
    """Positions ``into`` on one axis of ``target`` are the positions ``out_of`` of ``source``.

    ``target`` and ``source`` are parameter names. The source is multiplied by ``scale``, which
    differs from 1 only where a cut has folded a softmax temperature into one of the two.
    """

    target: str
    source: str
    axis: int
    into: tuple[int, ...]
    out_of: tuple[int, ...]
    scale: float = 1.0


def ties_of(
    structures: Sequence[Structure], plan: Plan, shapes: Mapping[str, Sequence[int]]
) -> list[Tie]:
    """The sharing of the plan, as positions of the uncut parameters."""
    by_name = {s.name: s for s in structures}
    ties = []
    for name, (source, *_) in plan.share.items():
        target, giver = by_name[name], by_name[source]
        shared = plan.shared(target)
        if not shared:
            continue
        for ours, theirs in slot_pairs(target, giver, shapes):
            into = positions(ours, target.size, [*shared]).tolist()
            out_of = positions(theirs, giver.size, [*shared.values()]).tolist()
            ties.append(Tie(ours.param, theirs.param, ours.axis, tuple(into), tuple(out_of)))
    return ties


def moved(
    ties: Sequence[Tie],
    index: Mapping[str, Mapping[int, tuple[Tensor, int]]],
    scale: Mapping[str, float],
) -> list[Tie]:
    """The ties after a cut that keeps the positions in ``index``.

    ``index`` is {parameter: {axis: (positions that stay, old length)}}; ``scale`` maps parameters
    to the factors that the cut has multiplied into them.
    """
    where: dict[tuple[str, int], dict[int, int]] = {}

    def at(param: str, axis: int, position: int) -> int:
        axes = index.get(param, {})
        if axis not in axes:
            return position
        key = (param, axis)
        if key not in where:
            where[key] = {old: new for new, old in enumerate(axes[axis][0].tolist())}
        return where[key].get(position, -1)

    result = []
    for one in ties:
        pairs = [
            (at(one.target, one.axis, a), at(one.source, one.axis, b))
            for a, b in zip(one.into, one.out_of, strict=True)
        ]
        pairs = [pair for pair in pairs if -1 not in pair]
        if pairs:
            into, out_of = zip(*pairs, strict=True)
            factor = one.scale * scale.get(one.target, 1.0) / scale.get(one.source, 1.0)
            result.append(replace(one, into=into, out_of=out_of, scale=factor))
    return result


class SharedWeight(nn.Module):
    """A weight put together from the part it stores and parts of other weights.

    The parametrization of one parameter: ``own`` and ``part_N`` say where along ``axis`` each part
    comes from, ``order`` where it goes. These index buffers are saved with the weights. ``later``
    names the parameters that follow this one in its module, so that untying can restore the order.
    """

    own: Tensor
    order: Tensor
    later: tuple[str, ...] = ()

    def __init__(self, weight: Tensor, axis: int, parts: Sequence[tuple[nn.Module, str, Tie]]):
        super().__init__()
        self.axis = axis
        # in a tuple: a source must not become a child of the module that reads it
        self.sources = tuple((module, leaf) for module, leaf, _ in parts)
        self.scales = tuple(one.scale for _, _, one in parts)
        taken = torch.tensor([i for *_, one in parts for i in one.into], device="cpu")
        mine = torch.ones(weight.shape[axis], dtype=torch.bool, device="cpu")
        mine[taken] = False
        own = mine.nonzero()[:, 0]
        order = torch.cat([own, taken]).argsort()
        self._index("own", own, weight.device)
        self._index("order", order, weight.device)
        for number, (*_, one) in enumerate(parts):
            self._index(f"part_{number}", torch.tensor(one.out_of, device="cpu"), weight.device)

    def _index(self, name: str, values: Tensor, device: torch.device) -> None:
        self.register_buffer(name, values.to(device, torch.int32))
        if device.type == "meta":
            expect_index(self, name, values)

    def forward(self, own: Tensor) -> Tensor:
        """The whole weight, from the part that is stored."""
        return self.put_together(own, [getattr(module, leaf) for module, leaf in self.sources])

    def put_together(self, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """The whole weight, from the part that is stored and the whole weights of the sources."""
        parts = [own]
        for number, whole in enumerate(sources):
            index = getattr(self, f"part_{number}")
            part = whole.index_select(self.axis, index.to(whole.device)).to(own.device, own.dtype)
            parts.append(part if self.scales[number] == 1 else part * self.scales[number])
        return torch.cat(parts, self.axis).index_select(self.axis, self.order.to(own.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The part that is stored, from the whole weight."""
        return weight.index_select(self.axis, self.own)


def tie(model: nn.Module, ties: Sequence[Tie]) -> None:
    """Store every shared position once, with its source. Works on meta tensors."""
    by_target: dict[str, list[Tie]] = defaultdict(list)
    for one in _merged(ties):
        by_target[one.target].append(one)
    for name, group in by_target.items():
        path, leaf = owner_of(name)
        module = model.get_submodule(path)
        parts = []
        for one in group:
            source_path, source_leaf = owner_of(one.source)
            parts.append((model.get_submodule(source_path), source_leaf, one))
        weight = module._parameters[leaf]
        assert weight is not None
        shared = SharedWeight(weight, group[0].axis, parts)
        names = [*module._parameters]
        shared.later = tuple(names[names.index(leaf) + 1 :])
        wanted = weight.requires_grad
        parametrize.register_parametrization(module, leaf, shared, unsafe=weight.is_meta)
        module.parametrizations[leaf].original.requires_grad_(wanted)  # type: ignore[union-attr, index]


def _merged(ties: Sequence[Tie]) -> list[Tie]:
    """One tie per target, source and axis, in a fixed order, however many cuts they came from.

    So a model that was cut twice stores the same parts as one that is loaded in one step.
    """
    groups: dict[tuple[str, str, int], dict[int, int]] = {}
    scales: dict[tuple[str, str, int], float] = {}
    for one in ties:
        key = (one.target, one.source, one.axis)
        groups.setdefault(key, {}).update(zip(one.into, one.out_of, strict=True))
        scales[key] = one.scale
    found = []
    for key in sorted(groups):
        into = tuple(sorted(groups[key]))
        found.append(Tie(*key, into, tuple(groups[key][i] for i in into), scales[key]))
    return found


def is_shared(model: nn.Module) -> bool:
    """Whether any weight of the model is put together from others."""
    return any(isinstance(module, SharedWeight) for module in model.modules())


def ties_in(model: nn.Module) -> list[Tie]:
    """The ties of a model, in positions of its weights as they are now."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for path, leaf, shared in _shared_weights(model):
        order, own = shared.order.tolist(), len(shared.own)
        place = {part: position for position, part in enumerate(order)}
        start = own
        for number, (module, source_leaf) in enumerate(shared.sources):
            out_of = getattr(shared, f"part_{number}").tolist()
            into = tuple(place[start + i] for i in range(len(out_of)))
            start += len(out_of)
            source = f"{paths[id(module)]}.{source_leaf}".lstrip(".")
            scale = shared.scales[number]
            target = f"{path}.{leaf}".lstrip(".")
            found.append(Tie(target, source, shared.axis, into, tuple(out_of), scale))
    return found


class WholeWeights:
    """The weight as a forward pass reads it, by its name, from the tensors that are ``stored``.

    A weight that shares is put together in float64: where a cut has folded a softmax temperature
    into one of two weights, the product would be rounded in a smaller dtype. The model may be
    untied afterwards.
    """

    def __init__(self, model: nn.Module, stored: Callable[[str], Tensor]) -> None:
        self._stored = stored
        paths = {id(module): path for path, module in model.named_modules()}
        self._shared: dict[str, tuple[SharedWeight, str, list[str]]] = {}
        for path, leaf, one in _shared_weights(model):
            own = f"{path}.parametrizations.{leaf}.original".lstrip(".")
            sources = [f"{paths[id(m)]}.{name}".lstrip(".") for m, name in one.sources]
            self._shared[f"{path}.{leaf}".lstrip(".")] = one, own, sources

    def __call__(self, name: str) -> Tensor:
        if name not in self._shared:
            return self._stored(name)
        one, own, sources = self._shared[name]
        return one.put_together(self._stored(own).double(), [self(s).double() for s in sources])


def remember_ties(model: nn.Module) -> Callable[[], None]:
    """A function that ties the model again as it is tied now, whatever was untied meanwhile.

    The function only puts references back, so it cannot fail, and optimizers keep their
    parameters.
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    classes, stored = [], []
    for path, leaf, _ in _shared_weights(model):
        module: Any = model.get_submodule(path)
        original = module.parametrizations[leaf].original
        classes.append((module, type(module)))
        stored.append((original, original.data))
        for table in (module._parameters, module._modules, module.parametrizations._modules):
            tables.append((table, dict(table)))

    def tie_again() -> None:
        for module, cls in classes:
            module.__class__ = cls
        for table, before in tables:
            table.clear()
            table.update(before)
        for parameter, data in stored:
            parameter.data = data

    return tie_again


def untie(model: nn.Module) -> None:
    """Give every module its whole weight as a parameter of its own."""
    for path, leaf, shared in _shared_weights(model):
        module = model.get_submodule(path)
        # torch deletes the weight's property from the class, which copies of the module share
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        for name in shared.later:  # torch appends the weight, but optimizers go by this order
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)


def _shared_weights(model: nn.Module) -> list[tuple[str, str, SharedWeight]]:
    found = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, chain in module.parametrizations.items():
                found += [(path, leaf, one) for one in chain if isinstance(one, SharedWeight)]
    return found
