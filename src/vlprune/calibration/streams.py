"""Forward passes that pause at every block, so that a model is worked on layer by layer.

A pass that pauses keeps its own state, whatever the architecture does between its blocks, and every
block runs once per pass. Recomputing each block's input from the start would take a number of
passes that grows with the depth. Each pass is a greenlet: it runs in the caller's thread, and only
while the caller waits for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from .modes import Modes
from .store import Shelf

__all__ = ["Stream", "streams"]


class Stream:
    """One forward pass. ``call`` runs the model; ``stops`` are the blocks to pause at, in order.

    ``at`` is the block that the pass has reached and not run yet, None at the start and the end;
    ``args`` and ``kwargs`` are what the block is about to be called with, in torch's ``modes`` of
    the pass. They may be read only inside :meth:`awake`: while a pass waits, its hidden states may
    lie on disk.
    """

    def __init__(self, call: Callable[[], Any], stops: Mapping[str, int], shelf: Shelf) -> None:
        self.stops, self.shelf = stops, shelf
        self._waiting = shelf.park(None)
        self.at: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.modes = Modes.now()
        self.over = False
        self._pass = greenlet.greenlet(call)
        _RUNNING[self._pass] = self

    def advance(self, block: str) -> bool:
        """Run until ``block`` is reached, or the first block behind it; whether it is reached."""
        goal = self.stops[block]
        while not self.over and (self.at is None or self.stops[self.at] < goal):
            self.resume()
        return self.at == block

    def resume(self) -> None:
        """Run to the next pause, or to the end."""
        self._waiting.take()
        self.at, self.args, self.kwargs = None, (), {}
        self._pass.parent = greenlet.getcurrent()
        with Modes.now().on():
            self._pass.switch()
        self.over = self._pass.dead

    def awake(self) -> AbstractContextManager[None]:
        """The arguments of the block in memory while a with block runs."""
        return self._waiting.awake()

    def close(self) -> None:
        """End the pass where it is."""
        self._waiting.take()
        _RUNNING.pop(self._pass, None)
        if self._pass:  # started and not over
            with Modes.now().on():
                self._pass.throw()
        self.over = True

    def pause(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called from inside the pass, by the block's hook."""
        self.at, self.args, self.kwargs = block, args, kwargs
        hidden = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        states = next((v for v in hidden if v.is_floating_point()), None)
        self._waiting = self.shelf.park(states)
        self.modes = Modes.now()
        with self.modes.on():
            self._pass.parent.switch()


_RUNNING: dict[Any, Stream] = {}


@contextmanager
def streams(
    model: nn.Module,
    blocks: Sequence[str],
    calls: Iterable[Callable[[], Any]],
    shelf: Shelf | None = None,
) -> Iterator[list[Stream]]:
    """One pass per call, none of them started; all are ended when the block ends.

    While a pass waits, its hidden states lie on ``shelf`` (None: in memory).
    """
    stops = {path: number for number, path in enumerate(blocks)}

    def stop_at(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = _RUNNING.get(greenlet.getcurrent())
            if stream is not None and path in stream.stops:
                stream.pause(path, args, kwargs)

        return hook

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            stop_at(path), with_kwargs=True, prepend=True
        )
        for path in blocks
    ]
    made: list[Stream] = []
    shelf = shelf or Shelf(sys.maxsize)
    try:
        with torch.no_grad():
            made += [Stream(call, stops, shelf) for call in calls]
            yield made
    finally:
        for stream in made:
            stream.close()
        shelf.close()
        for one in hooks:
            one.remove()
