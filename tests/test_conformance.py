"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

from collections import defaultdict
from functools import cache, partial
from typing import Any

import pytest

from vlprune.architectures import discover
from vlprune.architectures.layouts import NATIVE
from vlprune.layers import stock_name
from vlprune.testing import CHECKS, FAMILIES, VARIANTS, build

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


@pytest.mark.whole
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str) -> None:
    for unit in UNITS:
        for check in ("order_is_execution_order", "masked_equals_cut"):
            CHECKS[check](partial(build, variant), unit)


@cache
def cut_as(family: str) -> dict[tuple[str, str], set[str]]:
    """{(class of an attention block, unit): the layouts in which the family's blocks are cut}."""
    model, layouts = build(family).model, defaultdict(set)
    for unit in UNITS:
        for structure in discover(model, unit):
            if structure.core:
                name = stock_name(model.get_submodule(structure.core))
                layouts[name, unit].add(structure.layout)
    return dict(layouts)


@pytest.mark.whole
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_class_is_cut_natively_in_the_family_that_tests_it(name: str) -> None:
    family = NATIVE[name].family
    assert family in FAMILIES or family in VARIANTS
    for unit in UNITS:
        claimed = {"native" if getattr(NATIVE[name], unit) else "padded"}
        assert cut_as(family).get((name, unit)) == claimed, f"{name} under {unit} in {family}"
