"""Sharing: a unit that takes its weights from another structure's unit.

Before the cut, :func:`mixed` runs a model as if it shared. The cut then makes it true with
:func:`tie`: each weight stores its own units only and is put together from these and the
source's whenever a forward pass asks for it, by ``torch.nn.utils.parametrize``. So the shared units
are one parameter in memory, on disk and for the optimizer, and gradients of all uses add up.
:func:`materialize` gives up the memory for speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import PlanError, UnsupportedError
from ..structures.plan import Plan
from ..structures.record import Record, read_record, write_record
from ..structures.structure import Slot, Structure
from ..structures.units import named_weights, owner_of, positions
from .padded import expect_index

__all__ = [
    "SharedWeight",
    "Tie",
    "check_shares",
    "is_shared",
    "materialize",
    "mixed",
    "moved",
    "pairing",
    "remember_ties",
    "settled",
    "shareable",
    "similarity",
    "slot_pairs",
    "tie",
    "ties_in",
    "ties_of",
    "unit_weights",
    "untie",
    "with_followers",
]


@dataclass(frozen=True)
class Tie:
    """Positions ``into`` of one axis of the parameter ``target`` are those ``out_of`` ``source``.

    Times ``scale``, which differs from 1 only where a cut has folded a softmax temperature into
    one of the two.
    """

    target: str
    source: str
    axis: int
    into: tuple[int, ...]
    out_of: tuple[int, ...]
    scale: float = 1.0


# -- which structures can share --------------------------------------------------------


def shareable(target: Structure, source: Structure, shapes: Mapping[str, Sequence[int]]) -> str:
    """Why units of ``target`` cannot take the weights of ``source``; empty if they can.

    The weights of a unit must be laid out alike: the same slots in the same order, and the same
    width across them. Biases are never shared.
    """
    ours, theirs = _weights(target, shapes), _weights(source, shapes)
    if target.name == source.name:
        return "a structure cannot share with itself"
    if len(ours) != len(theirs):
        return f"{target.name} has {len(ours)} weights a unit, {source.name} {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        same = (a.axis, a.repeat, a.inner) == (b.axis, b.repeat, b.inner)
        widths = [_across(slot, shapes) for slot in (a, b)]
        if not same:
            return f"the units of {target.name} are laid out unlike those of {source.name}"
        if widths[0] != widths[1]:
            return (
                f"the units of {target.name} are {_times(widths[0])} wide, those of {source.name} "
                f"{_times(widths[1])}"
            )
    return ""


def check_shares(model: nn.Module, structures: Sequence[Structure], plan: Plan) -> None:
    """Raise PlanError unless everything that the plan shares can be shared."""
    if not plan.share:
        return
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
    by_name = {s.name: s for s in structures}
    record = read_record(model)
    known = _shared_now(record) if record is not None else {}
    for name, (source, units, _) in plan.share.items():
        before, pairs = known.get(name, (source, {}))
        again = sorted(set(units) & pairs.keys())
        if before != source or again:
            raise PlanError(
                f"{name} takes weights from {before} already"
                + (f", unit {again[0]} among them" if again else "")
                + ": share only units that have weights of their own, from the same source"
            )
        problem = shareable(by_name[name], by_name[source], shapes)
        if _folded(by_name[name], record) != _folded(by_name[source], record):
            problem = "an earlier cut folded another softmax temperature into one of them"
        if problem:
            raise PlanError(
                f"{name} cannot take weights from {source}: {problem}; share only where units "
                "are alike"
            )


def _folded(structure: Structure, record: Record | None) -> float:
    """What earlier cuts have multiplied into the query weights of a structure, squared."""
    if record is None or not structure.folds or structure.name not in record.plan.keep:
        return 1.0
    return len(record.plan.keep[structure.name]) / record.sizes[structure.name]


def _weights(structure: Structure, shapes: Mapping[str, Sequence[int]]) -> list[Slot]:
    """The slots that are shared: those of weights, not of biases."""
    return [slot for slot in structure.slots if len(shapes[slot.param]) > 1]


def _across(slot: Slot, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shapes[slot.param]) if axis != slot.axis)


def _times(widths: Sequence[int]) -> str:
    return " x ".join(str(n) for n in widths)


def slot_pairs(
    target: Structure, source: Structure, weights: Mapping[str, Any]
) -> list[tuple[Slot, Slot]]:
    """The slots of two structures that are shared with each other.

    ``weights`` are parameters, or their shapes, by name.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in weights.items()}
    return list(zip(_weights(target, shapes), _weights(source, shapes), strict=True))


def unit_weights(
    structure: Structure, units: Tensor, parameters: Mapping[str, Tensor]
) -> list[Tensor]:
    """The weights of some units, one matrix a slot: (units, numbers of a unit) each."""
    found = []
    for slot in structure.slots:
        weight = parameters[slot.param]
        if weight.dim() < 2:
            continue
        ordered = positions(slot, structure.size, units.cpu()).to(weight.device)
        part = weight.index_select(slot.axis, ordered).movedim(slot.axis, 0)
        part = part.reshape(slot.repeat, len(units), slot.inner, -1)
        found.append(part.transpose(0, 1).reshape(len(units), -1))
    return found


@torch.no_grad()
def similarity(model: nn.Module, target: Structure, source: Structure) -> Tensor:
    """Cosine between every unit of two structures, over all their weights: (target, source)."""
    weights = named_weights(model)
    sides = []
    for structure in (target, source):
        every = torch.arange(structure.size)
        whole = torch.cat(unit_weights(structure, every, weights), dim=1).float()
        sides.append(nn.functional.normalize(whole, dim=1))
    return (sides[0] @ sides[1].T).cpu()


# -- before the cut --------------------------------------------------------------------


@contextmanager
def mixed(
    model: nn.Module,
    structures: Sequence[Structure],
    shares: Mapping[str, tuple[str, Tensor, Tensor]] | Plan,
) -> Iterator[nn.Module]:
    """The model with shared weights while the block runs.

    ``shares`` maps a structure to its source, to one number a unit, 1 where the unit takes the
    source's weights and 0 where it keeps its own, and to the source's unit that it would take
    (both (size,)); or it is a plan. A source that shares is mixed first. The mixture is made once,
    on entering, and is differentiable in the numbers and in the weights of both. Gates
    (:func:`vlprune.gated`) may be put on top.

    Raises UnsupportedError for a model that shares already: :func:`materialize` it first.
    """
    if isinstance(shares, Plan):
        plan = shares
        shares = {
            s.name: (plan.share[s.name][0], *pairing(s.size, plan.shared(s)))
            for s in structures
            if s.name in plan.share
        }
    if shares and is_shared(model):
        raise UnsupportedError("this model shares weights already: call vlprune.materialize first")
    whole = _mixtures(model, structures, shares)
    shadowed = []
    try:
        for name, weight in whole.items():
            path, leaf = owner_of(name)
            module = model.get_submodule(path)
            # found before nn.Module looks into _parameters, which stay as they are
            module.__dict__[leaf] = weight
            shadowed.append((module, leaf))
        yield model
    finally:
        for module, leaf in shadowed:
            module.__dict__.pop(leaf, None)


def pairing(size: int, shared: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """1 for the units that share, and which unit each takes; both (size,)."""
    values, taken = torch.zeros(size), torch.zeros(size, dtype=torch.long)
    for unit, other in shared.items():
        values[unit], taken[unit] = 1, other
    return values, taken


def _mixtures(
    model: nn.Module,
    structures: Sequence[Structure],
    shares: Mapping[str, tuple[str, Tensor, Tensor]],
) -> dict[str, Tensor]:
    """{parameter: its mixture with its sources}, sources mixed first."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    by_name = {s.name: s for s in structures}
    done: dict[str, Tensor] = {}
    finished: set[str] = set()

    def mix(name: str) -> None:
        if name in finished or name not in shares:
            return
        finished.add(name)
        source, values, units = shares[name]
        mix(source)
        target, giver = by_name[name], by_name[source]
        for ours, theirs in slot_pairs(target, giver, shapes):
            own = done.get(ours.param, parameters[ours.param])
            taken = done.get(theirs.param, parameters[theirs.param])
            into = positions(ours, target.size, range(target.size)).to(own.device)
            out_of = positions(theirs, giver.size, units.cpu()).to(own.device)
            share = values[None, :, None].expand(ours.repeat, -1, ours.inner).reshape(-1)
            shape = [1] * own.dim()
            shape[ours.axis] = -1
            share = share.to(own.device, own.dtype).reshape(shape)
            before = own.index_select(ours.axis, into)
            there = taken.index_select(theirs.axis, out_of).to(own.device)
            # a product each, not share * (there - before): exact where share is 1
            mixture = share * there + (1 - share) * before
            done[ours.param] = own.index_copy(ours.axis, into, mixture)

    for name in shares:
        mix(name)
    return done


# -- the cut ---------------------------------------------------------------------------


def ties_of(
    structures: Sequence[Structure], plan: Plan, shapes: Mapping[str, Sequence[int]]
) -> list[Tie]:
    """What the plan shares, as positions of the uncut parameters."""
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
    """The ties after a cut that keeps the positions in ``index`` {parameter: {axis: ...}}.

    ``scale`` are the factors that the cut has multiplied into parameters.
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


def settled(model: nn.Module, structures: Sequence[Structure], plan: Plan) -> Plan:
    """The plan with what follows from the sharing that the model has already.

    A unit whose weights are stored in one that goes, goes with it.
    """
    record = read_record(model)
    if record is None or not record.plan.share:
        return plan
    sizes = {s.name for s in structures}
    share = dict(plan.share)
    for name, (source, pairs) in _shared_now(record).items():
        if name in sizes and source in sizes:
            more = dict(zip(*plan.share[name][1:], strict=True)) if name in plan.share else {}
            both = {**pairs, **more}
            share[name] = (source, [*both], [*both.values()])
    whole = replace(plan, share=share)
    keep = {s.name: whole.kept(s) for s in structures if s.name in share or s.name in plan.keep}
    empty = next((name for name, units in keep.items() if not units), "")
    if empty:
        raise PlanError(
            f"the plan leaves nothing of {empty!r}: the units it keeps are stored in "
            f"{share[empty][0]!r}, where they go; keep one of them there"
        )
    return replace(plan, keep=keep)


def _shared_now(record: Record) -> dict[str, tuple[str, dict[int, int]]]:
    """What a model shares already, in units as they are numbered now."""
    alive = record.alive()
    found = {}
    for name, (source, units, theirs) in record.plan.share.items():
        now, there = ({u: i for i, u in enumerate(alive[n])} for n in (name, source))
        pairs = zip(units, theirs, strict=True)
        found[name] = (source, {now[u]: there[v] for u, v in pairs})
    return found


def with_followers(model: nn.Module, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates where a unit whose weights are stored in another is no more open than that one.

    The cut takes such a unit away with its source, so a search must fade both.
    """
    record = read_record(model)
    followed = dict(gates)
    shares = _shared_now(record) if record is not None and record.plan.share else {}
    for _ in shares:  # as often as a chain of sources can be long
        for name, (source, pairs) in shares.items():
            if name in followed and source in followed:
                units, theirs = [*pairs], [*pairs.values()]
                values = followed[name].clone()
                values[units] = torch.minimum(values[units], followed[source][theirs])
                followed[name] = values
    return followed


class SharedWeight(nn.Module):
    """A weight put together from the part it stores and parts of other weights.

    The parametrization of one parameter: ``own`` and ``part_N`` say where along ``axis`` each part
    comes from, ``order`` where it goes. The index buffers are saved with the weights. ``later``
    are the parameters that come after this one in its module, whose order untying restores.
    """

    own: Tensor
    order: Tensor
    later: tuple[str, ...] = ()

    def __init__(self, weight: Tensor, axis: int, parts: Sequence[tuple[nn.Module, str, Tie]]):
        super().__init__()
        self.axis = axis
        # in tuples: a source must not become a child of what reads it
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
        parts = [own]
        for number, (module, leaf) in enumerate(self.sources):
            whole, index = getattr(module, leaf), getattr(self, f"part_{number}")
            part = whole.index_select(self.axis, index.to(whole.device)).to(own.device, own.dtype)
            parts.append(part if self.scales[number] == 1 else part * self.scales[number])
        return torch.cat(parts, self.axis).index_select(self.axis, self.order)

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
    """One tie for each target and source, in one order, however many cuts they came from.

    So a model that was cut twice stores the same parts as one that is loaded, in one step.
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
    """The ties that a model has, in positions of its weights as they are now."""
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


def remember_ties(model: nn.Module) -> Callable[[], None]:
    """A call that ties the model again as it is tied now, whatever was untied meanwhile.

    It only puts references back, so it cannot fail, and optimizers keep their parameters.
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


def untie(model: nn.Module) -> list[Tie]:
    """Give every module its whole weight as a parameter of its own; returns what was tied."""
    ties = ties_in(model)
    for path, leaf, shared in _shared_weights(model):
        module = model.get_submodule(path)
        # torch takes the weight's property off the module's class, which copies of it have, too
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        for name in shared.later:  # torch appends the weight; optimizers go by this order
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
    return ties


def _shared_weights(model: nn.Module) -> list[tuple[str, str, SharedWeight]]:
    found = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, chain in module.parametrizations.items():
                found += [(path, leaf, one) for one in chain if isinstance(one, SharedWeight)]
    return found


def materialize(model: Any) -> Any:
    """The same model object with plain dense layers in place of shared weights.

    It gives the same outputs, faster (nothing is put together any more) and with more memory;
    from here on its units are trained, saved and cut each for itself.
    """
    record = read_record(model)
    untie(model)
    if record is not None and record.plan.share:
        plan = replace(record.plan, keep=record.alive(), share={})
        write_record(model, replace(record, plan=plan))
    return model
