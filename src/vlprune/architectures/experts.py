"""Experts whose weights are parameters of one module: (experts, rows, columns) each.

A unit is one neuron of every expert at once, so that all experts of a layer keep one width, as the
kernels that run them together need. Which rows of a fused projection belong to a neuron is in no
shape. It is found by running the module's own forward on a few numbers: the right rows are those
without which it computes what it computes when the neuron is silent.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.structure import Attr, Gate, Slot, Structure
from ..structures.units import owner_of, positions
from .attention import Leave, join
from .fused import source_of
from .stand_in import stand_in
from .towers import child_of

__all__ = [
    "Experts",
    "compute_on_every_token",
    "experts_at",
    "experts_structure",
    "fewer_experts_agree",
]


@dataclass(frozen=True)
class Experts:
    """Parameters of experts, by their paths below the module. ``fused`` rows are gate and up."""

    up: str
    down: str
    gate: str = ""
    fused: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """In the order in which a forward uses them, the last one reading the neurons."""
        return tuple(name for name in (self.gate, self.up, self.down) if name)

    @property
    def apart(self) -> bool:
        """Whether the weights lie in modules of their own, each called by the forward."""
        return "." in self.down


EXPERTS = (
    Experts("gate_up_proj", "down_proj", fused=True),  # Mixtral, Qwen, DeepSeek, Llama 4, gpt-oss
    Experts("up_proj", "down_proj", gate="gate_proj"),  # the shared experts of Inkling
    Experts("up_proj", "down_proj"),  # Nemotron-H
    Experts("input_linear.weight", "output_linear.weight", fused=True),  # JetMoE
)

WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")
"""Attributes from which a forward may read the number of an expert's neurons."""

Order = tuple[int, int]
"""(repeat, inner) of a neuron's rows: (2, 1) for [gates | ups], (1, 2) for [gate, up] in turn."""


def experts_at(module: nn.Module) -> Experts | None:
    """The row of the table that the module's parameters match; None if it holds no experts."""
    for row in EXPERTS:
        weights = [_parameter(module, name) for name in row.weights]
        if all(weight is not None and len(shape_of(weight)) == 3 for weight in weights):
            return row
    return None


def experts_structure(path: str, module: nn.Module, row: Experts, tower: str) -> Structure:
    """The neurons of the experts at ``path``, each in all experts at once.

    Raises Leave if their weights do not fit each other, or if their forward does not take fewer
    neurons as they are.
    """
    shapes = {name: shape_of(_parameter(module, name)) for name in row.weights}
    fitting = [axis for axis in (2, 1) if _fits(row, shapes, axis)]
    if not fitting:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise Leave(f"the weights of its experts do not fit each other: {listed}")
    for axis in fitting:
        _check_between(module, row, shapes[row.down][axis])
    read = _reading(module, row, shapes, fitting)
    if read is None:
        name = stock_class(module).__name__
        raise Leave(f"how the forward of {name} reads the weights of its experts is not known")
    axis, (repeat, inner) = read
    slots = [
        Slot(join(path, name), 1 if name.endswith("_bias") else 3 - axis, 0, repeat, inner)
        for first in row.weights[:-1]
        for name in (first, f"{first}_bias")
        if _parameter(module, name) is not None
    ]
    gate = Gate(path, "weight", params=(row.down,), axis=axis)
    if row.apart:
        gate = Gate(join(path, owner_of(row.down)[0]), "input")
    size = shapes[row.down][axis]
    return Structure(
        name=path,
        kind="ffn",
        size=size,
        tower=tower,
        slots=(*slots, Slot(join(path, row.down), axis)),
        gates=(gate,),
        attrs=tuple(Attr(path, name) for name in _widths(module, row, size)),
    )


def compute_on_every_token(module: nn.Module) -> bool:
    """Whether experts are handed all tokens for each of them, of which most are 0 (Llama 4)."""
    taken = inspect.signature(stock_class(module).forward).parameters
    return len(taken) == 2


_READ: dict[tuple[Any, ...], tuple[int, Order] | None] = {}
"""What has been found out about a class: (axis of the neurons in down, their order in up)."""


def _reading(
    module: nn.Module, row: Experts, shapes: Mapping[str, Sequence[int]], fitting: Sequence[int]
) -> tuple[int, Order] | None:
    key = (stock_class(module), row, *fitting)
    if key not in _READ:
        _READ[key] = _how_it_reads(module, row, shapes[row.down], fitting)
    return _READ[key]


def _parameter(module: nn.Module, name: str) -> Any:
    """The parameter at a path below the module, whole if it is put together; None if absent."""
    holder, leaf = owner_of(name)
    owner = child_of(module, holder) if holder else module
    if owner is None:
        return None
    if parametrize.is_parametrized(owner, leaf):
        return getattr(owner, leaf)
    return owner._parameters.get(leaf)


def _fits(row: Experts, shapes: Mapping[str, Sequence[int]], axis: int) -> bool:
    """Whether neurons may lie on ``axis`` of down, and on the other one of the rest."""
    down, factor = shapes[row.down], 2 if row.fused else 1
    return all(
        shapes[name][3 - axis] == factor * down[axis] and shapes[name][axis] == down[3 - axis]
        for name in row.weights[:-1]
    )


def _widths(module: nn.Module, row: Experts, size: int) -> list[str]:
    return [] if row.apart else [name for name in WIDTHS if module.__dict__.get(name) == size]


def _check_between(module: nn.Module, row: Experts, size: int) -> None:
    """Raise Leave if the module holds anything else that is as wide as an expert."""
    if row.apart:
        return
    known = {*row.weights, *(f"{name}_bias" for name in row.weights)}
    for name, weight in module.named_parameters():
        if name.startswith("parametrizations.") or name in known or size not in shape_of(weight):
            continue
        child = name.partition(".")[0]
        if not (child != name and getattr(module, "has_post_expert_norm", False)):
            raise Leave(f"{child} sits in its experts and has their width")


# -- a few numbers through the module's own forward ----------------------------------------

WIDTH, NEURONS, LEFT, TOKENS = 3, 4, (0, 2, 3), 4
EXACT = 1e-5


@torch.no_grad()
def fewer_experts_agree(
    module: nn.Module, row: Experts, tensors: Sequence[str], numbers: Sequence[str]
) -> bool:
    """Whether the forward gives tokens of some experts the same if the others are cut away.

    ``tensors`` have one position per expert on their first axis, ``numbers`` are the attributes
    that say how many there are.
    """
    shapes = {name: shape_of(_parameter(module, name)) for name in row.weights}
    read = _reading(module, row, shapes, [axis for axis in (2, 1) if _fits(row, shapes, axis)])
    if read is None:
        return False
    axis, count = read[0], shapes[row.down][0]
    widths, hidden = _widths(module, row, shapes[row.down][axis]), shapes[row.down][3 - axis]
    fewer = dict.fromkeys(numbers, count - 1)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        whole = _few_numbers(module, row, axis, generator)
        cut = {name: w[1:] if name in tensors else w for name, w in whole.items()}
        weights = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)
        index = (torch.arange(TOKENS)[:, None] + torch.arange(2)) % (count - 1)
        x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        given: Sequence[tuple[Tensor, ...]]
        given = (x, index + 1, weights), (x, index, weights), (x, index, 0 * weights)
        if compute_on_every_token(module):  # expert after expert, the one that goes first
            every = torch.cat([x] * count)
            given = (every,), (every[TOKENS:],), (0 * every[TOKENS:],)
        for kernel in _kernels(module):
            try:
                full, small, none = (
                    _run(module, w, kernel, NEURONS, widths, hidden, inputs, more)
                    for w, inputs, more in zip(
                        (whole, cut, cut), given, ({}, fewer, fewer), strict=True
                    )
                )
            except Exception:  # it takes other arguments, or counts in its own way
                return False
            full = full[len(full) - len(small) :]
            same = full.shape == small.shape and bool((full - small).abs().max() < EXACT)
            if not (same and full.abs().max() > EXACT > none.abs().max()):
                return False
    return True


def _how_it_reads(
    module: nn.Module, row: Experts, down: Sequence[int], fitting: Sequence[int]
) -> tuple[int, Order] | None:
    """The axis and the order with which a cut gives what silent neurons give; None if unsure."""
    orders: list[Order] = [(2, 1), (1, 2)] if row.fused else [(1, 1)]
    if row.apart:
        halves = ".chunk(2, dim=-1)" in source_of(stock_class(module))
        return (2, orders[0]) if halves and fitting == [2] else None
    right = []
    for axis, order in product(fitting, orders):
        try:
            if all(_cut_is_masked(module, row, down, axis, order, k) for k in _kernels(module)):
                right.append((axis, order))
        except Exception:  # it is not built like this, or reads more than its own weights
            continue
    return right[0] if len(right) == 1 else None


def _kernels(module: nn.Module) -> tuple[str, ...]:
    """The implementations to try: transformers' own code for all experts reads them by flags."""
    return ("eager", "batched_mm") if hasattr(module, "has_gate") else ("eager",)


@torch.no_grad()
def _cut_is_masked(
    module: nn.Module, row: Experts, down: Sequence[int], axis: int, order: Order, kernel: str
) -> bool:
    with torch.device("cpu"):
        numbers = torch.Generator().manual_seed(0)
        whole = _few_numbers(module, row, axis, numbers)
        left, masked = torch.tensor(LEFT), dict(whole)
        gone = torch.tensor([u for u in range(NEURONS) if u not in LEFT])
        masked[row.down] = whole[row.down].index_fill(axis, gone, 0.0)
        cut = {row.down: whole[row.down].index_select(axis, left)}
        for name in whole.keys() - cut.keys():
            along = 1 if name.endswith("_bias") else 3 - axis
            rows = positions(Slot(name, along, 0, *order), NEURONS, LEFT)
            is_down = name.startswith(row.down)
            cut[name] = whole[name] if is_down else whole[name].index_select(along, rows)
        widths, hidden = _widths(module, row, down[axis]), down[3 - axis]
        full, small, silent = (
            _run(module, weights, kernel, neurons, widths, hidden)
            for weights, neurons in ((whole, NEURONS), (cut, len(LEFT)), (masked, NEURONS))
        )
    near = small.shape == silent.shape and bool((small - silent).abs().max() < EXACT)
    return near and bool((full - silent).abs().max() > EXACT)


def _few_numbers(
    module: nn.Module, row: Experts, axis: int, numbers: torch.Generator
) -> dict[str, Tensor]:
    """Random weights and biases for all experts, each of a few neurons of a small width."""
    made = {}
    for name in (*row.weights, *(f"{name}_bias" for name in row.weights)):
        weight = _parameter(module, name)
        if weight is None:
            continue
        wide = name.removesuffix("_bias") != row.down
        out = (NEURONS * (2 if row.fused else 1)) if wide else WIDTH
        size = [shape_of(weight)[0], out]
        if name in row.weights:
            size.insert(axis, WIDTH if wide else NEURONS)
        made[name] = torch.randn(size, generator=numbers, dtype=torch.float64)
    return made


def _run(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    kernel: str,
    neurons: int,
    widths: Sequence[str],
    hidden: int,
    inputs: tuple[Tensor, ...] | None = None,
    more: Mapping[str, int] = MappingProxyType({}),
) -> Tensor:
    """The forward of the module's class with these weights, on two of its experts or on all.

    Or on ``inputs``, whatever these say. ``more`` are attributes.
    """
    cls = stock_class(module)
    children = {
        name: nn.Identity() if any(True for _ in child.parameters()) else child
        for name, child in module.named_children()
        if name != "parametrizations"
    }
    numbers = {
        name: neurons if name in widths else WIDTH
        for name, value in module.__dict__.items()
        if type(value) is int and (name in widths or (value == hidden and "expert" not in name))
    }
    made = stand_in(module, weights, children, {**numbers, **more})
    if "config" in module.__dict__:
        made.__dict__["config"] = _Config(module.config, kernel)
    experts = min(len(w) for w in weights.values())
    taken = [p for p in inspect.signature(cls.forward).parameters.values() if p.name != "self"]
    numbers_of = torch.Generator().manual_seed(1)
    tokens = TOKENS if len(taken) > 1 else TOKENS * experts
    x = torch.randn(tokens, WIDTH, generator=numbers_of, dtype=torch.float64)
    chosen = min(2, experts)
    index = (torch.arange(tokens)[:, None] + torch.arange(chosen)) % chosen
    given = {
        1: (x,),
        2: (x, torch.ones(tokens, experts, dtype=torch.float64)),
        3: (x, index, torch.rand(index.shape, generator=numbers_of, dtype=torch.float64)),
    }
    if inputs is not None:
        given = {len(inputs): inputs}
    output: Tensor = cls.forward(made, *given[len(taken)])
    return output


class _Config:
    """A config that names another way to run experts."""

    def __init__(self, config: Any, kernel: str) -> None:
        self._config, self._experts_implementation = config, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
