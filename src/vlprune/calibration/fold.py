"""Repairing what a plan takes away: the weights that stay learn to do the work of those that go.

Layer by layer, the columns that stay are fitted by least squares so that the residual stream comes
as near as it can to that of the dense model, on the inputs that the layers already repaired give.
So each repair also makes up for what the repairs before it left. Sources: least-squares channel
pruning (He et al., ICCV 2017) and CORP's affine form; the target and the shrinking towards the
unrepaired weights are not from a paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.gates import evaluating
from ..device import device_of
from ..structures.plan import Plan
from ..structures.shards import shape_of
from ..structures.structure import Slot, Structure
from ..structures.units import positions
from .batches import Batches
from .blocks import Block, columns_left, hooked
from .consumers import Consumer
from .expert_moments import ExpertMoments
from .landing import Landing, Replay, landing_of, value_at
from .moments import Moments, flat
from .passes import calls_of, ready, weight_of
from .solve import Repair, repair
from .store import Originals, Parked, Shelf, Steps, lies_in, put
from .streams import Stream, streams
from .taken_apart import Part, called_at, reads_experts, token_weights

__all__ = ["fold_layers"]


class _Enough(Exception):
    """The rest of a block need not run."""


@dataclass
class _Pair:
    """One batch at a block: the call of the small model, and what the dense model gave.

    ``wanted`` {consumer: dense value at its landing}, which lies on the shelf meanwhile.
    """

    replay: Replay
    small: Stream
    wanted: dict[str, Tensor] = field(default_factory=dict)
    parked: dict[str, Parked] = field(default_factory=dict)


def fold_layers(
    model: nn.Module,
    structures: Sequence[Structure],
    plan: Plan,
    batches: Batches,
    originals: Originals,
    steps: Steps,
    advance: Callable[..., None] = lambda done: None,
) -> dict[str, Repair]:
    """Fold the plan into the weights in place; returns {module: repair}, without its weights.

    Afterwards the model computes, with all of its units, what the cut model will compute: the
    columns of units that go are 0. ``originals`` gets every parameter before it changes, ``steps``
    every block when it is done. Blocks that a forward pass calls more than once are repaired last,
    each layer towards its own dense output.
    """
    done: dict[str, Repair] = {}
    with ExitStack() as stack:
        blocks = ready(stack, model, structures, batches)
        once = [b for b in blocks if not b.again]
        calls = calls_of(model, batches)
        shelf = Shelf.beside(model, batches.given)
        paths = [b.path for b in once]
        passes = stack.enter_context(streams(model, paths, [*calls, *calls], shelf))
        dense, small = passes[: len(calls)], passes[len(calls) :]
        for number, block in enumerate(once):
            originals.keep(_changing(model, block, plan))
            done |= _fold_block(model, block, plan, batches, dense, small, (steps, number))
            advance(1)
        for block in blocks:
            if block.again:
                originals.keep(_changing(model, block, plan))
                done |= _fold_alone(model, block, plan, batches)
                advance(1)
    return done


def _changing(model: nn.Module, block: Block, plan: Plan) -> list[str]:
    """The parameters that folding the plan changes in a block."""
    cut = [s for s in block.structures if len(plan.kept(s)) < s.size]
    names = [slot.param for s in cut for slot in _silenced(model, s)]
    for consumer in block.consumers:
        if any(consumer.structure == s.name for s in cut):
            layer = model.get_submodule(consumer.module)
            names += [f"{consumer.module}.{leaf}" for leaf, _ in layer.named_parameters()]
            if isinstance(layer, Part):
                leaves = (
                    ("down_proj", "down_proj_bias") if layer.bias is not None else ("down_proj",)
                )
                names += [f"{called_at(consumer.module)}.{leaf}" for leaf in leaves]
    return list(dict.fromkeys(names))


def _fold_block(
    model: nn.Module,
    block: Block,
    plan: Plan,
    batches: Batches,
    dense: Sequence[Stream],
    small: Sequence[Stream],
    step: tuple[Steps, int],
) -> dict[str, Repair]:
    """Fold one block, between the passes of the dense model and those of the small one."""
    steps, number = step
    here = [
        n
        for n, stream in enumerate(small)
        if stream.advance(block.path) and dense[n].advance(block.path)
    ]
    by_name = {s.name: s for s in block.structures}
    stays = columns_left(block, plan)
    cut = [*{c.module: c for c in block.consumers if not stays[c.module].all()}.values()]
    known = steps.known(f"folded-{number}")
    if known is not None:
        for n in here:
            dense[n].resume()
        tensors, facts = known
        put(model, tensors, steps.file(f"folded-{number}"))
        bare = torch.zeros(0)
        return {m: Repair(bare, None, *values) for m, values in facts["repairs"].items()}
    module = model.get_submodule(block.path)
    pairs = {n: _Pair(Replay.of(module, small[n]), small[n]) for n in here}
    landings: dict[str, Landing | None] = {}
    for n in here[:1]:
        with small[n].awake():
            for c in cut:
                layer = model.get_submodule(c.module)
                if not isinstance(layer, Part):
                    landings[c.module] = landing_of(pairs[n].replay, layer)
    for n in here:  # the dense pass goes on while the block is still dense
        values: dict[str, Tensor] = {}
        hooks = [
            h
            for c in cut
            if c.module in landings
            for h in _value_hooks(model, pairs[n].replay, c, landings, values)
        ]
        with hooked(hooks):
            dense[n].resume()
        pairs[n].wanted.update(values)
        pairs[n].parked.update({m: dense[n].shelf.park(v) for m, v in values.items()})
    for structure in block.structures:
        _silence(model, structure, plan.kept(structure))
    done = {}
    experts = ExpertMoments(model, [c for c in cut if called_at(c.module) != c.module], batches)
    for c in cut:
        tower = by_name[c.structure].tower
        if called_at(c.module) == c.module:
            sums = _sums(model, c, landings.get(c.module), pairs, batches, tower)
        else:
            sums = experts.sums(c, pairs, tower)
        done[c.module] = _repaired(model, c.module, sums, stays[c.module].nonzero()[:, 0])
    facts = {name: (r.before, r.after, r.damping) for name, r in done.items()}
    changed = {name: model.get_parameter(name) for name in _changing(model, block, plan)}
    steps.remember(f"folded-{number}", changed, {"repairs": facts})
    lies_in(model, changed, steps.file(f"folded-{number}"))
    return done


def _repaired(model: nn.Module, path: str, sums: tuple[Moments, Moments], kept: Tensor) -> Repair:
    """The repair of one layer, written into it and then dropped: its errors are returned."""
    layer: Any = model.get_submodule(path)
    weight = weight_of(layer)
    kept = kept.to(weight.device)
    fitted, held_out = sums
    if not fitted.count and not held_out.count:  # no batch reaches the layer: its columns just go
        bias = None if layer.bias is None else layer.bias.detach()
        made = Repair(weight[:, kept], bias, 0.0, 0.0, 0.0)
    else:
        made = repair(fitted, held_out, weight, layer.bias, kept)
    _write(layer, made, kept)
    return replace(made, weight=made.weight.new_zeros(0), bias=None)


def _fold_alone(model: nn.Module, block: Block, plan: Plan, batches: Batches) -> dict[str, Repair]:
    """Fold a block that is called again and again: all calls of a layer are pooled."""
    done = {}
    for structure in block.structures:
        own = [c for c in block.consumers if c.structure == structure.name]
        if not own or len(plan.kept(structure)) == structure.size:
            continue
        dense = {n: model.get_parameter(n).clone() for n in {s.param for s in structure.slots}}
        _silence(model, structure, plan.kept(structure))
        small = {name: model.get_parameter(name).clone() for name in dense}
        device = device_of(model)
        sums = {
            c.module: (Moments.empty(c.width, c.out, device), Moments.empty(c.width, c.out, device))
            for c in own
        }
        for number, call in enumerate(calls_of(model, batches)):
            wanted: dict[str, list[Tensor]] = {c.module: [] for c in own}

            def note(path: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
                wanted[path].append(output)  # noqa: B023

            def take(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
                tower = structure.tower  # noqa: B023
                weights = token_weights(batches, tower, number, layer, args[0])  # noqa: B023
                # other tokens may have come to an expert
                target = output if isinstance(layer, Part) else wanted[path].pop(0)  # noqa: B023
                into = sums[path][batches.held_out(number)]  # noqa: B023
                into.add(flat(args[0]), weights, flat(target))

            for values, hook in ((dense, note), (small, take)):
                put(model, values)
                hooks = [
                    (model.get_submodule(path).register_forward_hook, partial(hook, path))
                    for path in sums
                ]
                with evaluating(model), torch.no_grad(), hooked(hooks):
                    call()
        for c in own:
            fitted, held_out = sums[c.module]
            both = fitted.summed(), held_out.summed()
            done[c.module] = _repaired(model, c.module, both, c.kept(plan.kept(structure)))
    return done


def _value_hooks(
    model: nn.Module,
    replay: Replay,
    consumer: Consumer,
    landings: Mapping[str, Landing | None],
    into: dict[str, Tensor],
) -> list[Any]:
    """Hooks that note the dense value at the landing; at the layer's output where there is none."""

    def take(value: Tensor) -> None:
        into.setdefault(consumer.module, value.clone())  # the block may add to it in place

    landing = landings[consumer.module]
    if landing is None:
        layer = model.get_submodule(consumer.module)
        return [(layer.register_forward_hook, lambda _m, _a, output: take(output))]
    return value_at(replay, landing.place, take)


def _sums(
    model: nn.Module,
    consumer: Consumer,
    landing: Landing | None,
    pairs: Mapping[int, _Pair],
    batches: Batches,
    tower: str,
) -> tuple[Moments, Moments]:
    """Moments of the layer's input and of the outputs wanted from it: to fit, and held out.

    The dense values are dropped as they are used.
    """
    layer = model.get_submodule(consumer.module)
    device = device_of(layer)
    fitted, held_out = (Moments.empty(consumer.width, consumer.out, device) for _ in range(2))
    for n, pair in pairs.items():
        if consumer.module not in pair.wanted:
            continue
        with pair.small.awake():
            x, y, t = _once(pair.replay, layer, landing)
        weights = batches.weights(tower, n, x)
        with pair.parked[consumer.module].awake():
            target = flat(pair.wanted.pop(consumer.module))
            if landing is not None:
                target = flat(y) - _drift(flat(t), target, landing.scale)
            (held_out if batches.held_out(n) else fitted).add(flat(x), weights, target)
        pair.parked.pop(consumer.module).take()
    return fitted.summed(), held_out.summed()


def _drift(small: Tensor, dense: Tensor, scale: Tensor) -> Tensor:
    """What the layer's output would have to change by, for the small value to be the dense one.

    Channels that the output hardly reaches, by the size of ``scale``, count as right.
    """
    scale = scale.to(small.device, torch.promote_types(small.dtype, torch.float32))
    usable = scale.abs() > 1e-6 * scale.abs().max()
    apart = (small.to(scale.dtype) - dense.to(scale.dtype)) / torch.where(usable, scale, 1.0)
    return torch.where(usable, apart, 0.0).to(small.dtype)


def _once(
    replay: Replay, layer: nn.Module, landing: Landing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's input and output and the value at its landing, in one call of the block."""
    seen: dict[str, Tensor] = {}

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = args[0], output
        if landing is None:
            raise _Enough

    def land(value: Tensor) -> None:
        if "y" in seen:
            seen["t"] = value
            raise _Enough

    hooks = [(layer.register_forward_hook, after)]
    hooks += value_at(replay, landing.place, land) if landing is not None else []
    with hooked(hooks), suppress(_Enough):
        replay()
    return seen["x"], seen["y"], seen.get("t", seen["y"])


def _silenced(model: nn.Module, structure: Structure) -> tuple[Slot, ...]:
    """All of attention, so that scores are computed without what goes; what reads experts that
    cannot be taken apart."""
    if structure.kind != "ffn":
        return structure.slots
    last = structure.slots[-1]
    unread = not reads_experts(model, structure, last)
    return (last,) if unread and len(shape_of(model.get_parameter(last.param))) == 3 else ()


@torch.no_grad()
def _silence(model: nn.Module, structure: Structure, kept: Sequence[int]) -> None:
    """Zero the weights of units that go, where no repair of the layer behind them will."""
    gone = sorted(set(range(structure.size)) - set(kept))
    for slot in _silenced(model, structure) if gone else ():
        weight = model.get_parameter(slot.param)
        weight.index_fill_(slot.axis, positions(slot, structure.size, gone).to(weight.device), 0.0)


@torch.no_grad()
def _write(layer: Any, made: Repair, kept: Tensor) -> None:
    """Put a repair into the layer; all other columns become 0."""
    weight = weight_of(layer)
    weight.zero_()
    weight[:, kept.to(weight.device)] = made.weight.to(weight.dtype)
    if made.bias is not None:
        layer.bias.copy_(made.bias)
