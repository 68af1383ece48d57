"""Requests to stop: Ctrl-C, a scheduler's SIGTERM, a terminal that goes away.

By default SIGTERM and SIGHUP end Python on the spot, and SIGINT ends it with a traceback. Here all
three raise :class:`Stopped`, which no ``except Exception`` catches, so that every ``with`` and
``finally`` on the way out runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "received", "stoppable"]

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
PATIENCE = 1.0
"""Seconds in which a further signal changes nothing: torchrun passes Ctrl-C on as SIGTERM, too."""


class Stopped(BaseException):
    """The process was asked to stop by the signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _First:
    """The first signal that came, and when."""

    number: int = 0
    at: float = 0.0


def received() -> int:
    """The number of the signal that asked this process to stop; 0 if none has.

    Libraries turn whatever is raised inside them into exceptions of their own, so an error of any
    kind means a stop once this number is not 0.
    """
    return _First.number


def _handle(number: int, _frame: Any) -> None:
    if not _First.number:
        _First.number, _First.at = number, time.monotonic()
        # Raised where nobody can catch it (in __del__, say), it would be printed with a traceback.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        raise Stopped(number)
    if time.monotonic() - _First.at > PATIENCE:  # whoever insists does not want to wait
        os._exit(128 + number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make signals that ask to stop raise :class:`Stopped` inside the block.

    Signals that were ignored before (``nohup``, a job in the background) stay ignored. Outside the
    main thread, where Python takes no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    hooks = sys.unraisablehook, threading.excepthook
    _First.number = 0
    try:
        for one, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(one, _handle)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        sys.unraisablehook, threading.excepthook = hooks
