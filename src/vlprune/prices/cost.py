"""What units cost: exact for a plan, differentiable for gates, equal where gates are 0 or 1.

One multiply-add is 1 MAC. Counted: matrix products, convolutions and both products of
attention, whichever kernel computes them. Not counted, by convention: elementwise work,
norms, softmax, look-ups. What could not be counted is listed by :func:`measure_macs`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..cutting.gates import Gates, evaluating
from ..cutting.padded import is_linear
from ..cutting.sharing.rules import settled
from ..cutting.sharing.ties import ties_in, ties_of
from ..device import moved_to
from ..structures.plan import Plan
from ..structures.structure import Structure
from ..structures.units import named_weights, positions
from .budget import Prices

__all__ = ["MacsProfile", "Prices", "macs", "macs_of", "measure_macs", "param_prices", "params"]


def _kept(structure: Structure, choice: Plan | Gates | None) -> int | Tensor:
    """How many units stay: a number for a plan, a differentiable scalar for gates."""
    if choice is None:
        return structure.size
    if isinstance(choice, Plan):
        return len(choice.kept(structure))
    return choice[structure.name].sum() if structure.name in choice else structure.size


def params(
    model: nn.Module, structures: Sequence[Structure], plan_or_gates: Plan | Gates | None = None
) -> int | Tensor:
    """Parameters of the whole model after the cut, as they are stored.

    An int for a plan (or for nothing: the model as it is), a differentiable scalar for
    gates. Parameters shared by several modules count once, and so do units that a plan shares;
    buffers do not count. A plan's sharing adds to that which the model has already.
    """
    if isinstance(plan_or_gates, Plan):
        plan_or_gates = settled(model, structures, plan_or_gates)
    shapes = {name: list(p.shape) for name, p in named_weights(model).items()}
    removed: dict[str, dict[int, Any]] = defaultdict(dict)
    for structure in structures:
        gone = structure.size - _kept(structure, plan_or_gates)
        for slot in structure.slots:
            axes = removed[slot.param]
            axes[slot.axis] = axes.get(slot.axis, 0) + gone * slot.repeat * slot.inner
    total: int | Tensor = 0
    for name, shape in shapes.items():
        total = (
            total
            + math.prod(
                (length - removed[name].get(axis, 0) for axis, length in enumerate(shape)),
                start=1,
            )
            if name in removed
            else total + math.prod(shape)
        )
    return total - _stored_elsewhere(model, structures, plan_or_gates, shapes)


def _stored_elsewhere(
    model: nn.Module,
    structures: Sequence[Structure],
    choice: Plan | Gates | None,
    shapes: Mapping[str, Sequence[int]],
) -> int:
    """Numbers in weights that take them from another weight, now or after the plan."""
    ties = ties_in(model)
    if isinstance(choice, Plan):
        ties = [*ties, *ties_of(structures, choice, shapes)]
    if not ties:
        return 0
    gone: dict[str, set[int]] = defaultdict(set)
    if isinstance(choice, Plan):
        for structure in structures:
            dead = sorted(set(range(structure.size)) - set(choice.kept(structure)))
            for slot in structure.slots:
                gone[slot.param].update(positions(slot, structure.size, dead).tolist())
    total = 0
    for one in ties:
        pairs = zip(one.into, one.out_of, strict=True)
        alive = sum(a not in gone[one.target] and b not in gone[one.source] for a, b in pairs)
        total += alive * math.prod(shapes[one.target]) // shapes[one.target][one.axis]
    return total


def param_prices(model: nn.Module, structures: Sequence[Structure]) -> Prices:
    """The price of one unit of each structure in parameters.

    Linear in the number of kept units, because no parameter has two pruned axes. A unit whose
    weights are stored elsewhere costs its bias alone (``Prices.borrowed``).
    """
    weights = named_weights(model)
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    unit, borrowed = {}, {}
    for structure in structures:
        costs = [
            (slot.repeat * slot.inner * math.prod(shape) // shape[slot.axis], len(shape) > 1)
            for slot in structure.slots
            for shape in (shapes[slot.param],)
        ]
        unit[structure.name] = float(sum(cost for cost, _ in costs))
        borrowed[structure.name] = float(sum(cost for cost, weight in costs if not weight))
    sizes = {s.name: s.size for s in structures}
    whole = sum(math.prod(shape) for shape in shapes.values())
    fixed = whole - sum(unit[n] * sizes[n] for n in unit)
    elsewhere = _units_elsewhere(model, structures)
    inside = sum((unit[n] - borrowed[n]) * len(units) for n, units in elsewhere.items())
    fixed -= _stored_elsewhere(model, (), None, shapes) - inside
    return Prices("params", unit, sizes, fixed, borrowed, elsewhere)


def _units_elsewhere(
    model: nn.Module, structures: Sequence[Structure]
) -> dict[str, tuple[int, ...]]:
    """{structure: its units that take their weights from another}, of a model that shares."""
    tied: dict[str, set[int]] = defaultdict(set)
    for one in ties_in(model):
        tied[one.target].update(one.into)
    found = {}
    for structure in structures:
        slots = [s for s in structure.slots if s.param in tied]
        if slots:
            slot = slots[0]
            every = positions(slot, structure.size, range(structure.size)).reshape(
                slot.repeat, structure.size, slot.inner
            )
            units = [u for u in range(structure.size) if int(every[0, u, 0]) in tied[slot.param]]
            if units:
                found[structure.name] = tuple(units)
    return found


@dataclass(frozen=True)
class MacsProfile:
    """MACs of one forward pass of the dense model, split so that any cut can be priced.

    ``total`` is everything; ``unit`` what one unit of a structure adds; ``not_counted``
    names operations that did arithmetic we cannot price.
    """

    total: int
    unit: Mapping[str, float]
    sizes: Mapping[str, int]
    not_counted: tuple[str, ...]

    @property
    def prices(self) -> Prices:
        """The profile as a price list."""
        fixed = self.total - sum(self.unit[n] * self.sizes[n] for n in self.unit)
        return Prices("macs", self.unit, self.sizes, fixed, self.unit)


def macs(
    model: nn.Module,
    structures: Sequence[Structure],
    example_inputs: Mapping[str, Any],
    plan_or_gates: Plan | Gates | None = None,
) -> int | Tensor:
    """Multiply-adds of one forward pass on ``example_inputs`` after the cut.

    An int for a plan, a differentiable scalar for gates. The dense model runs once.
    """
    return macs_of(measure_macs(model, structures, example_inputs), structures, plan_or_gates)


def macs_of(
    profile: MacsProfile, structures: Sequence[Structure], choice: Plan | Gates | None
) -> int | Tensor:
    """As :func:`macs`, from a profile measured before."""
    total: Any = float(profile.total)
    for structure in structures:
        total = total - profile.unit[structure.name] * (structure.size - _kept(structure, choice))
    return total if isinstance(total, Tensor) else round(total)


# torch's flop registry has no formula for the fused attention kernel that CPUs use, and says
# nothing when it meets it.
def _sdpa_cpu(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_EXTRA_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_cpu
}
_UNPRICED = ("grid_sampler", "fft", "cdist", "_native_multi_head")


class _Counter(TorchDispatchMode):
    """Adds up the multiply-adds of every operation, in total and inside the open cores."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.core: dict[str, int] = defaultdict(int)
        self.open: list[str] = []
        self.unpriced: set[str] = set()

    def watch(self, path: str, module: nn.Module) -> list[Any]:
        """Hooks that open the core ``path`` while ``module`` runs."""
        return [
            module.register_forward_pre_hook(lambda _m, _a: self.open.append(path)),
            module.register_forward_hook(lambda _m, _a, _o: self.open.remove(path)),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _EXTRA_FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            done = formula(*args, **kwargs, out_val=output) // 2
            self.total += done
            for path in self.open:
                self.core[path] += done
        elif not str(packet).startswith(("aten.", "prim")) or any(
            name in str(packet) for name in _UNPRICED
        ):
            self.unpriced.add(str(packet))
        return output


@torch.no_grad()
def measure_macs(
    model: nn.Module, structures: Sequence[Structure], example_inputs: Mapping[str, Any]
) -> MacsProfile:
    """Run the dense model once, where it lies, and split its MACs by structure."""
    inputs = moved_to(model, example_inputs)
    linear_macs: dict[str, int] = defaultdict(int)
    hooks = []

    def count(path: str, width_in: int, width_out: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            tokens = args[0].numel() // args[0].shape[-1]
            linear_macs[path] += tokens * width_in * width_out

        return hook

    def count_mha(path: str, module: Any) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _o: Any) -> None:
            given = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
            tokens = [x.numel() // x.shape[-1] for x in given[:3]]
            third = module.in_proj_weight.shape[0] // 3
            for part, count in enumerate(tokens):  # q, k and v may see different lengths
                key = f"{path}.in_proj_weight@{part * third}"
                linear_macs[key] += count * module.in_proj_weight.numel() // 3
            linear_macs[f"{path}.out_proj.weight"] += tokens[0] * module.out_proj.weight.numel()

        return hook

    for path, module in model.named_modules():
        if is_linear(module):
            rows, columns = module.weight.shape
            hooks.append(module.register_forward_hook(count(f"{path}.weight", rows, columns)))
        elif isinstance(module, nn.MultiheadAttention):
            hook = count_mha(path, module)
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    counter = _Counter()
    for core in {s.core for s in structures if s.core}:
        hooks += counter.watch(core, model.get_submodule(core))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel has no formula
    try:
        with evaluating(model), counter:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in hooks:
            handle.remove()

    core_macs = {
        core: done - sum(n for path, n in linear_macs.items() if path.startswith(core + "."))
        for core, done in counter.core.items()
    }
    shapes = {name: tuple(p.shape) for name, p in named_weights(model).items()}
    unit = {}
    for structure in structures:
        price = 0.0
        for slot in structure.slots:
            rows = shapes[slot.param][slot.axis]
            done = linear_macs.get(slot.param, 0)
            if done == 0 and f"{slot.param}@{slot.start}" in linear_macs:
                done, rows = linear_macs[f"{slot.param}@{slot.start}"], rows // 3
            price += done * slot.repeat * slot.inner / rows
        if structure.core and structure.layout == "native":
            price += core_macs.get(structure.core, 0) * structure.core_share / structure.size
        unit[structure.name] = price
    sizes = {s.name: s.size for s in structures}
    return MacsProfile(counter.total, unit, sizes, tuple(sorted(counter.unpriced)))
