"""Torch's modes of a thread: gradients, inference, autocast.

A forward may enter them between two of its blocks and leave them at its end. A pass that pauses in
between takes its own along: whoever works meanwhile would compute in them, and create tensors that
no gradient may pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Modes"]


@dataclass(frozen=True)
class Modes:
    """Modes as they are at one moment. ``casts`` are (device, whether it casts, to which dtype)."""

    gradients: bool
    inference: bool
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> Modes:
        """Those of the calling thread."""
        accelerator = torch.accelerator.current_accelerator()
        devices = ["cpu", *([accelerator.type] if accelerator is not None else [])]
        casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(casts))

    @contextmanager
    def on(self) -> Iterator[None]:
        """These modes while the block runs; whatever it leaves on or off, they are put back."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            # it also sets whether there are gradients, so that has to come behind it
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            yield
