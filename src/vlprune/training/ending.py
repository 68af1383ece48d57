"""The end of a search: what a reader must know of it, and the speed of the small model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

from torch import nn

from ..cutting.gates import evaluating
from ..cutting.proof import Verification
from ..device import moved_to
from ..methods import Method, Search
from ..prices.clock import (
    seconds_of,
    take_turns,
)

__all__ = ["measured_seconds", "unfinished", "untested"]

ROUNDS = 9
"""Forward passes whose median time is the reached latency."""


def unfinished(method: Method, search: Search, progress: float) -> str:
    """A warning about a cut before the end of the search; "" if the search has ended."""
    if not method.needs_training or progress >= 1:
        return ""
    gate = float(search.facts().get("gate_of_fading_units", 1.0))
    fading = f", and removed units still count {gate:.0%}" if 0 < gate < 1 else ""
    return (
        f"the search ended at {progress:.0%} of its steps{fading}: the cut is made all "
        "the same, but the model has not learnt to do without what goes, so expect a loss of "
        "accuracy"
    )


def measured_seconds(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Median seconds of a forward pass of the model as it is now."""
    with evaluating(model):
        timer = partial(seconds_of, model, moved_to(model, inputs))
        return median(take_turns({"small": timer}, ROUNDS, warm_up=2)["small"])


def untested(proof: Verification | None) -> str:
    """A sentence on structures that were cut and that the batch of the proof does not use."""
    if proof is None or not proof.unseen:
        return ""
    return (
        f"the proof says nothing about {len(proof.unseen)} structures that were cut and that its "
        f"batch does not use: {', '.join(proof.unseen)}"
    )
