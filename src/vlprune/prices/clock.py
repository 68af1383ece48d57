"""Clocks: seconds of forward passes, compared in turns, and of parts of a running model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..cutting.padded import linear_axes
from ..device import device_name, device_of
from ..structures.structure import Structure
from ..structures.units import owner_of

__all__ = ["Clock", "Stopwatch", "conditions", "reads", "seconds_of", "take_turns"]


PATIENCE = 4.0
"""Seconds that the measurements of one width should take, as far as two rounds allow."""


def conditions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a measured time, as plain values: device, threads, dtype, input shapes."""
    weight = next(model.parameters())
    return {
        "device": device_name(weight.device),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shapes": {n: list(v.shape) for n, v in inputs.items() if isinstance(v, torch.Tensor)},
    }


class Clock:
    """Moments in time, comparable after :meth:`wait`; on a CUDA device they are GPU events.

    On other accelerators, reading a moment first waits for all work launched before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> Any:
        """The current moment, for :meth:`between`."""
        if not self.on_gpu:
            self.wait()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Wait until all launched work is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one moment to a later one."""
        if not self.on_gpu:
            return float(end - start)
        return float(start.elapsed_time(end)) / 1000


@torch.no_grad()
def seconds_of(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Seconds of one forward pass that starts on an idle device, up to its end."""
    clock = Clock(device_of(model))
    clock.wait()
    start = clock.now()
    model(**inputs)
    end = clock.now()
    clock.wait()
    return clock.between(start, end)


def take_turns(
    timers: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """The seconds of each timer in ``rounds`` rounds: {name: (rounds,)}.

    The timers take turns, so that a busy moment of the machine affects all of them. Another
    ``warm_up`` rounds run first and are not counted.
    """
    timed: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + warm_up):
        for name, timer in timers.items():
            seconds = timer()
            if turn >= warm_up:
                timed[name].append(seconds)
    return timed


class Stopwatch:
    """Seconds inside each structure of a running model, from its first projection to its last.

    It wraps the ``forward`` of the projections and sets no hook: attention forwards look for
    hooks, and where they find one they compute attention step by step, in place of the fused kernel
    that is to be timed.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure]) -> None:
        self.clock = Clock(device_of(model))
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.opened: dict[str, Any] = {}
        self.members: dict[nn.Module, dict[str, bool]] = defaultdict(dict)
        for structure in structures:
            ends: dict[str, bool] = {}
            # of whole experts, the module that holds them: its router takes next to no time
            slots = structure.slots[:1] if structure.kind == "experts" else structure.slots
            for slot in slots:
                path, leaf = owner_of(slot.param)
                module = model.get_submodule(path)
                parent = owner_of(path)[0]
                if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
                    path, module = parent, model.get_submodule(parent)  # never calls its out_proj
                inward = leaf == "weight" and reads(module, slot.axis)
                inward = inward or isinstance(module, nn.MultiheadAttention)
                ends[path] = ends.get(path, False) or inward
            for path, closes in ends.items():
                closes = closes or len(ends) == 1  # experts: one module from end to end
                self.members[model.get_submodule(path)][structure.name] = closes

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the structures that run inside the block."""
        with ExitStack() as stack:
            for module, names in self.members.items():
                stack.callback(self._stand_around(module, names))
            yield

    def read(self) -> dict[str, float]:
        """{structure: seconds} since the last call, then start again from zero."""
        self.clock.wait()
        seconds = {
            name: sum(self.clock.between(a, b) for a, b in spans)
            for name, spans in self.spans.items()
        }
        self.spans.clear()
        self.opened.clear()
        return seconds

    def _stand_around(self, module: nn.Module, names: Mapping[str, bool]) -> Callable[[], None]:
        """Time a module's forward for {structure: whether it ends here}; returns the undo call."""
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


def reads(module: nn.Module, axis: int) -> bool:
    """Whether this axis of the module's weight is its input axis."""
    dims = len(getattr(module, "weight", torch.empty(0)).shape)
    return (dims == 2 and axis == linear_axes(module)[1]) or (dims == 3 and axis == 2)
