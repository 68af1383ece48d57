"""An exponential moving average of a model's weights, kept while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

__all__ = ["AVERAGE_FILE", "Average"]

AVERAGE_FILE = "average.safetensors"
"""The average in the Trainer's checkpoints, beside the weights themselves."""


class Average(TrainerCallback):
    """The average of a model's weights, which the model takes over at the end of its training.

    The average begins as the weights before the first step. After every optimizer step it becomes
    ``decay`` of itself and ``1 - decay`` of the weights, by torch's function, in float32 where the
    weights have fewer bits: at a decay of 0.9998 most steps would be rounded away. Parameters that
    are tied count once, and of a weight that shares others what it stores. Buffers that are saved
    with the model (a batch norm's statistics) are averaged with them. Only the model is averaged,
    not what its objective adds to it.

    ``checkpoint`` is the folder from which the training goes on, whose average :meth:`save` wrote.
    """

    def __init__(self, model: nn.Module, decay: float, checkpoint: Path | None = None) -> None:
        self.model, self.checkpoint = model, checkpoint
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._average = {
            name: own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True)
            for name, own in _weights(self.model)
        }
        if state.global_step > 0 and self.checkpoint is not None:
            for name, saved in load_file(self.checkpoint / AVERAGE_FILE).items():
                self._average[name].copy_(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        averages = [*self._average.values()]
        weights = [
            own.detach().to(average.dtype)
            for (_, own), average in zip(_weights(self.model), averages, strict=True)
        ]
        self._update(averages, weights, state.global_step)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint. Raises OSError or SafetensorError if it cannot."""
        whole = {name: average.contiguous() for name, average in self._average.items()}
        save_file(whole, folder / AVERAGE_FILE)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, own in _weights(self.model):
            own.copy_(self._average[name])
        self._average = {}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a saved model holds of floating point numbers, each once, by name."""
    yield from ((name, own) for name, own in model.named_parameters() if own.is_floating_point())
    passing = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, own in model.named_buffers():
        if own.is_floating_point() and name not in passing:
            yield name, own
