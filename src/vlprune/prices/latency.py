"""Seconds as a currency: a measured table of width -> time for every structure.

Time is no sum over units: kernels like some widths better than others. So the model is cut to
several widths, every structure at once, and a stopwatch runs from the first projection of each
structure to the end of its last one, inside the real forward pass, on the real device. (Not from
the paper.)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..cutting.gates import evaluating
from ..cutting.padded import linear_axes
from ..cutting.rewrite import rewrite
from ..device import device_name, device_of, moved_to, same_random_numbers
from ..errors import VlpruneError
from ..structures.plan import Plan
from ..structures.structure import Structure
from ..structures.units import named_weights, owner_of
from .budget import Prices

__all__ = [
    "STEP",
    "WIDTHS",
    "best_round_to",
    "conditions",
    "latency_prices",
    "seconds_of",
    "take_turns",
]

WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""The shares of its units that each structure is measured at."""
STEP = 8
"""Widths are measured at multiples of this; kernels round up to it or to a multiple of it."""
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Multiples of units that :func:`best_round_to` tries."""
NEAR = 1.03
"""How much more time than its size says is no difference."""
PATIENCE = 4.0
"""Seconds that the measurements of one width should take, as far as two rounds allow."""


def conditions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured time depends on: device, threads, dtype, shapes. Plain values."""
    weight = next(model.parameters())
    return {
        "device": device_name(weight.device),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shapes": {n: list(v.shape) for n, v in inputs.items() if isinstance(v, torch.Tensor)},
    }


class _Clock:
    """Moments in time, comparable after :meth:`wait`: GPU events where the model is on one.

    On accelerators other than CUDA's every moment waits for all that was launched before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> Any:
        """A moment."""
        if not self.on_gpu:
            self.wait()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one moment to a later one."""
        if not self.on_gpu:
            return float(end - start)
        return float(start.elapsed_time(end)) / 1000


@torch.no_grad()
def seconds_of(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Seconds of one forward pass, launched alone and waited for."""
    clock = _Clock(device_of(model))
    clock.wait()
    start = clock.now()
    model(**inputs)
    end = clock.now()
    clock.wait()
    return clock.between(start, end)


def take_turns(
    timers: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """What each timer said, ``rounds`` times: {name: (rounds,)}.

    They take turns, so that a busy moment of the machine falls on all of them; the first
    ``warm_up`` rounds are not counted.
    """
    timed: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + warm_up):
        for name, timer in timers.items():
            seconds = timer()
            if turn >= warm_up:
                timed[name].append(seconds)
    return timed


class _Stopwatch:
    """Seconds inside each structure of a running model, from its first projection to its last.

    It stands around the ``forward`` of the projections and sets no hook: attention forwards look
    for hooks, and where they find one they spell attention out for it, in place of the fused
    kernel that is to be timed.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure]) -> None:
        self.clock = _Clock(device_of(model))
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.opened: dict[str, Any] = {}
        self.members: dict[nn.Module, dict[str, bool]] = defaultdict(dict)
        for structure in structures:
            ends: dict[str, bool] = {}
            for slot in structure.slots:
                path, leaf = owner_of(slot.param)
                module = model.get_submodule(path)
                parent = owner_of(path)[0]
                if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
                    path, module = parent, model.get_submodule(parent)  # never calls out_proj
                inward = leaf == "weight" and _reads(module, slot.axis)
                inward = inward or isinstance(module, nn.MultiheadAttention)
                ends[path] = ends.get(path, False) or inward
            for path, closes in ends.items():
                self.members[model.get_submodule(path)][structure.name] = closes

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what runs inside the block."""
        with ExitStack() as stack:
            for module, names in self.members.items():
                stack.callback(self._stand_around(module, names))
            yield

    def read(self) -> dict[str, float]:
        """Seconds a structure since it was last read."""
        self.clock.wait()
        seconds = {
            name: sum(self.clock.between(a, b) for a, b in spans)
            for name, spans in self.spans.items()
        }
        self.spans.clear()
        self.opened.clear()
        return seconds

    def _stand_around(self, module: nn.Module, names: Mapping[str, bool]) -> Callable[[], None]:
        """Time a module's forward for {structure: whether it ends there}; returns the undoing."""
        before, forward = module.__dict__.get("forward"), module.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            for name in names:
                if name not in self.opened:
                    self.opened[name] = self.clock.now()
            output = forward(*args, **kwargs)
            for name, closes in names.items():
                start = self.opened.pop(name, None) if closes else None
                if start is not None:
                    self.spans[name].append((start, self.clock.now()))
            return output

        def undo() -> None:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before

        module.__dict__["forward"] = timed
        return undo


def _reads(module: nn.Module, axis: int) -> bool:
    """Whether this axis of the module's weight is its input."""
    return len(getattr(module, "weight", torch.empty(0)).shape) == 2 and (
        axis == linear_axes(module)[1]
    )


def latency_prices(
    model: nn.Module,
    structures: Sequence[Structure],
    inputs: Mapping[str, Any],
    attention: str = "head_dim",
) -> Prices:
    """Seconds of one forward pass on ``inputs``, as a price list with a curve a structure.

    Copies of the model are cut to :data:`WIDTHS`, one after the other, and timed in turns with
    the model itself; structures of one shape and tower are averaged. Between measured widths the
    curve is a line; a width that is no multiple of :data:`STEP` costs what such a width was
    measured to cost. In a distributed run all processes get the first one's table.

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
    """What was measured: seconds of the model and of its structures, and ratios cut to dense."""

    model: nn.Module
    structures: tuple[Structure, ...]
    inputs: Mapping[str, Any]
    attention: str
    rounds: int
    totals: list[float] = field(default_factory=list)
    spans: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratios(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Median of cut over dense seconds of every structure, the two models taking turns."""
        small = copy.deepcopy(self.model)
        keep = {s.name: tuple(range(kept[s.name])) for s in self.structures}
        rewrite(small, self.structures, Plan(keep=keep, attention=self.attention))
        watches = {one: _Stopwatch(one, self.structures) for one in (self.model, small)}
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
    model: nn.Module, structures: tuple[Structure, ...], inputs: Mapping[str, Any], attention: str
) -> Prices:
    seconds_of(model, inputs)
    rounds = max(2, min(10, round(PATIENCE / (2 * seconds_of(model, inputs)))))
    table = _Table(model, structures, inputs, attention, rounds)
    widths = {share: {s.name: _width(s.size, share) for s in structures} for share in WIDTHS}
    measured = {share: table.ratios(kept) for share, kept in widths.items()}
    odd = {name: max(1, width - (width > STEP)) for name, width in widths[0.5].items()}
    ragged = table.ratios(odd)
    curves: dict[str, tuple[float, ...]] = {}
    for members in _alike(structures, model):
        names, size = [s.name for s in members], members[0].size

        def middle(ratios: Mapping[str, float], names: list[str] = names) -> float:
            return statistics.median(ratios.get(name, 1.0) for name in names)

        whole = statistics.fmean(statistics.median(table.spans[n] or [0.0]) for n in names)
        points = {widths[share][names[0]]: whole * middle(measured[share]) for share in WIDTHS}
        penalty = max(1.0, middle(ragged) / middle(measured[0.5])) if size >= 2 * STEP else 1.0
        curves |= dict.fromkeys(names, _curve({**points, size: whole}, size, penalty))
    sizes = {s.name: s.size for s in structures}
    curves = {name: curves[name] for name in sizes}
    fixed = statistics.median(table.totals) - sum(curve[-1] for curve in curves.values())
    unit = {name: curve[-1] / sizes[name] for name, curve in curves.items()}
    return Prices("latency", unit, sizes, max(0.0, fixed), curve=curves)


def best_round_to(
    model: nn.Module,
    structures: Sequence[Structure],
    inputs: Mapping[str, Any],
    attention: str = "head_dim",
) -> int:
    """The multiple of units that the model's device likes: the smallest as fast as 32.

    Two copies of the model take turns: one keeps about half of every structure, a multiple of 64
    where it has so many, the other 1, 2, 4, ... units fewer, which should take a little less time.
    """
    with evaluating(model), same_random_numbers(model):
        inputs = moved_to(model, inputs)

        def cut(fewer: int) -> nn.Module:
            halves = {s.name: _aligned(s.size) for s in structures}
            keep = {
                name: tuple(range(half - fewer if half > 2 * fewer else half))
                for name, half in halves.items()
            }
            return rewrite(copy.deepcopy(model), structures, Plan(keep=keep, attention=attention))

        halved = cut(0)
        seconds_of(halved, inputs)
        rounds = max(5, min(15, round(PATIENCE / (2 * seconds_of(halved, inputs)))))
        for step in MULTIPLES:
            pair = {"halved": halved, "fewer": cut(step)}
            timed = take_turns({n: partial(seconds_of, m, inputs) for n, m in pair.items()}, rounds)
            ratios = [a / b for a, b in zip(timed["fewer"], timed["halved"], strict=True)]
            kept, whole = (
                sum(p.numel() for p in pair[name].parameters()) for name in ("fewer", "halved")
            )
            if statistics.median(ratios) <= NEAR * kept / whole:
                return step
    return MULTIPLES[-1]


def _aligned(size: int) -> int:
    """About half of so many units: a multiple of 64, or of the largest power of two below."""
    block = 64
    while block > 1 and block > size // 2:
        block //= 2
    return max(1, round(size / 2 / block) * block)


def _width(size: int, share: float) -> int:
    """So many units, a multiple of :data:`STEP` where there are enough of them."""
    if size < 2 * STEP:
        return max(1, round(size * share))
    return max(STEP, round(size * share / STEP) * STEP)


def _alike(structures: Sequence[Structure], model: nn.Module) -> list[list[Structure]]:
    """Structures of one tower whose parameters have the same shapes."""
    weights = named_weights(model)
    groups: dict[Any, list[Structure]] = defaultdict(list)
    for s in structures:
        shapes = tuple(tuple(weights[slot.param].shape) for slot in s.slots)
        groups[s.tower, s.kind, s.layout, shapes].append(s)
    return list(groups.values())


def _curve(points: Mapping[int, float], size: int, penalty: float) -> tuple[float, ...]:
    """Seconds of 0, 1, ... ``size`` units, from {width: seconds}; odd widths cost the penalty."""
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
