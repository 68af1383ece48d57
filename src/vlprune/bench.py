"""Seconds beside MACs: how fast a model answers, next to another, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["latencies"]


@torch.no_grad()
def latencies(
    models: Mapping[str, Any],
    inputs: Callable[[int], Mapping[str, Any]],
    batch_sizes: tuple[int, ...] = (1, 16),
    rounds: int = 7,
) -> dict[str, dict[int, float]]:
    """Median seconds of one forward pass: {model: {batch size: seconds}}.

    The models take turns, so that a busy moment of the machine falls on all of them; the
    first round warms up and is not counted.
    """
    seconds: dict[str, dict[int, float]] = {name: {} for name in models}
    for batch_size in batch_sizes:
        batch = inputs(batch_size)
        timed: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name, model in models.items():
                model.eval()
                moved = {
                    key: value.to(model.device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                }
                _synchronise(model)
                start = time.perf_counter()
                model(**moved)
                _synchronise(model)
                if turn:
                    timed[name].append(time.perf_counter() - start)
        for name, values in timed.items():
            seconds[name][batch_size] = statistics.median(values)
    return seconds


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
