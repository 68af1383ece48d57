"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from vlprune.testing import CHECKS, FAMILIES, build

UNITS = ("head_dim", "qk_vo", "head")
QUICK = {
    "clip": "two towers, native heads, the fused kernel",
    "blip_captioning": "fused query-key-value, cross-attention, a folded temperature, generation",
    "gpt2": "transposed weights (Conv1D)",
    "llava": "rotary positions, gated FFN, grouped key-value heads",
    "bridgetower": "nn.MultiheadAttention, which never calls its projections",
    "swin": "windows with position biases per head: padded",
}
"""One family per way in which a block is described and cut; all the others are variations."""


def families() -> list[Any]:
    """All of them; those beyond QUICK are left out of the quick lane."""
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.whole) for f in FAMILIES]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", families())
def test_family(family: str, unit: str, check: str) -> None:
    CHECKS[check](partial(build, family), unit)
