"""The multiples of units that are fast on the device at hand."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..cutting.gates import evaluating
from ..cutting.rewrite import rewrite
from ..device import moved_to, same_random_numbers
from ..structures.plan import Plan
from ..structures.structure import AttentionUnit, Structure
from .clock import PATIENCE, seconds_of, take_turns

__all__ = ["best_round_to"]


MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Multiples of units that :func:`best_round_to` tries."""


NEAR = 1.03
"""A model counts as fast if its time is at most this many times what its size predicts."""


def best_round_to(
    model: nn.Module,
    structures: Sequence[Structure],
    inputs: Mapping[str, Any],
    attention: AttentionUnit = "head_dim",
) -> int:
    """The smallest multiple of units that is as fast on the model's device as its size predicts.

    Two copies of the model take turns. One keeps about half of every structure, a multiple of 64
    where the structure is large enough; the other keeps 1, 2, 4, ... units fewer, so it should take
    a little less time. If no smaller multiple passes, the result is 32.
    """
    with evaluating(model), same_random_numbers(model):
        inputs = moved_to(model, inputs)

        def cut(fewer: int) -> nn.Module:
            halves = {s.name: _aligned(s.size) for s in structures}
            left = {
                name: half - fewer if half > 2 * fewer else half for name, half in halves.items()
            }
            keep = {s.name: tuple(range(max(s.least, left[s.name]))) for s in structures}
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
    """About half of ``size``: a multiple of 64, or of the largest power of two up to the half."""
    block = 64
    while block > 1 and block > size // 2:
        block //= 2
    return max(1, round(size / 2 / block) * block)
