"""Latency: seconds as prices, measured as a curve per structure."""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from ..cutting.gates import evaluating
from ..cutting.rewrite import rewrite
from ..device import device_of, moved_to, same_random_numbers
from ..errors import VlpruneError
from ..structures.plan import Plan
from ..structures.structure import AttentionUnit, Structure
from ..structures.units import named_weights
from .clock import PATIENCE, Stopwatch, seconds_of
from .params import at_least_of
from .prices import Prices

__all__ = ["STEP", "WIDTHS", "alike", "latency_prices", "width_of"]


WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""The fractions of its units that each structure is measured with."""


STEP = 8
"""Measured widths are multiples of this number; kernels round widths up to such a multiple."""


def latency_prices(
    model: nn.Module,
    structures: Sequence[Structure],
    inputs: Mapping[str, Any],
    attention: AttentionUnit = "head_dim",
) -> Prices:
    """Seconds of one forward pass on ``inputs``, as a price list with one curve per structure.

    Copies of the model are cut to :data:`WIDTHS`, one after the other, and timed in turns with
    the model itself; structures of the same shape and tower are averaged. Between measured widths
    the curve is a straight line; a width that is not a multiple of :data:`STEP` costs more by the
    factor that was measured for such widths. In a distributed run all processes get the table of
    the first process.

    Raises VlpruneError if the model is on the meta device.
    """
    if device_of(model).type == "meta":
        raise VlpruneError("a latency is measured, so the model needs its weights")
    prices: list[Any] = [None]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        with evaluating(model), same_random_numbers(model):
            prices = [_measured(model, tuple(structures), moved_to(model, inputs), attention)]
    if several:
        dist.broadcast_object_list(prices)
    return prices[0]


@dataclass
class _Table:
    """Measurements: seconds of the model and of its structures, and ratios of cut to dense."""

    model: nn.Module
    structures: tuple[Structure, ...]
    inputs: Mapping[str, Any]
    attention: AttentionUnit
    rounds: int
    totals: list[float] = field(default_factory=list)
    spans: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratios(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Median ratio of cut to dense seconds per structure, with the two models taking turns."""
        small = copy.deepcopy(self.model)
        keep = {s.name: tuple(range(kept[s.name])) for s in self.structures}
        rewrite(small, self.structures, Plan(keep=keep, attention=self.attention))
        watches = {one: Stopwatch(one, self.structures) for one in (self.model, small)}
        found: dict[str, list[float]] = defaultdict(list)
        for turn in range(self.rounds + 1):
            read = []
            for one, watch in watches.items():
                with watch.running():
                    total = seconds_of(one, self.inputs)
                read.append((total, watch.read()))
            if turn == 0:
                continue
            (total, dense), (_, cut) = read
            self.totals.append(total)
            for name, value in dense.items():
                self.spans[name].append(value)
                found[name].append(cut.get(name, value) / value if value else 1.0)
        return {name: statistics.median(values) for name, values in found.items()}


def _measured(
    model: nn.Module,
    structures: tuple[Structure, ...],
    inputs: Mapping[str, Any],
    attention: AttentionUnit,
) -> Prices:
    seconds_of(model, inputs)
    rounds = max(2, min(10, round(PATIENCE / (2 * seconds_of(model, inputs)))))
    table = _Table(model, structures, inputs, attention, rounds)
    widths = {
        share: {s.name: max(s.least, width_of(s.size, share)) for s in structures}
        for share in WIDTHS
    }
    measured = {share: table.ratios(kept) for share, kept in widths.items()}
    halves = widths[0.5]
    odd = {s.name: max(s.least, halves[s.name] - (halves[s.name] > STEP)) for s in structures}
    ragged = table.ratios(odd)
    curves: dict[str, tuple[float, ...]] = {}
    for members in alike(structures, model):
        names, size = [s.name for s in members], members[0].size

        def middle(ratios: Mapping[str, float], names: list[str] = names) -> float:
            return statistics.median(ratios.get(name, 1.0) for name in names)

        whole = statistics.fmean(statistics.median(table.spans[n] or [0.0]) for n in names)
        points = {widths[share][names[0]]: whole * middle(measured[share]) for share in WIDTHS}
        penalty = max(1.0, middle(ragged) / middle(measured[0.5])) if size >= 2 * STEP else 1.0
        curves |= dict.fromkeys(names, curve_between({**points, size: whole}, size, penalty))
    sizes = {s.name: s.size for s in structures}
    curves = {name: curves[name] for name in sizes}
    fixed = statistics.median(table.totals) - sum(curve[-1] for curve in curves.values())
    unit = {name: curve[-1] / sizes[name] for name, curve in curves.items()}
    least = at_least_of(structures)
    return Prices("latency", unit, sizes, max(0.0, fixed), curve=curves, at_least=least)


def width_of(size: int, share: float) -> int:
    """About ``size * share`` units, a multiple of :data:`STEP` if the structure is large enough."""
    if size < 2 * STEP:
        return max(1, round(size * share))
    return max(STEP, round(size * share / STEP) * STEP)


def alike(structures: Sequence[Structure], model: nn.Module) -> list[list[Structure]]:
    """Groups of structures of one tower, kind and layout whose parameters have the same shapes."""
    weights = named_weights(model)
    groups: dict[Any, list[Structure]] = defaultdict(list)
    for s in structures:
        shapes = tuple(tuple(weights[slot.param].shape) for slot in s.slots)
        groups[s.tower, s.kind, s.layout, s.least, shapes].append(s)
    return list(groups.values())


def curve_between(points: Mapping[int, float], size: int, penalty: float) -> tuple[float, ...]:
    """Seconds of 0, 1, ... ``size`` units: (size + 1,), from ``points`` {width: seconds}.

    A width that is not a multiple of :data:`STEP` costs ``penalty`` times as much, but never more
    than the whole structure.
    """
    widths = sorted(points)
    values = np.maximum.accumulate([points[width] for width in widths])
    slope = (values[1] - values[0]) / (widths[1] - widths[0]) if len(widths) > 1 else 0.0
    units = np.arange(size + 1)
    line = np.interp(units, widths, values)
    below = units < widths[0]
    line[below] = np.maximum(0.0, values[0] + slope * (units[below] - widths[0]))
    between = (units % STEP != 0) & (units != size)
    line[between] = np.minimum(line[between] * penalty, values[-1])
    return tuple(float(value) for value in line)
