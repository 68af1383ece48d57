"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch

from vlprune.architectures import discover
from vlprune.architectures.layouts import NATIVE
from vlprune.cutting.padded import stock_name
from vlprune.testing import CHECKS, FAMILIES, VARIANTS, build
from vlprune.testing.families import Sample

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


EVERYWHERE = ("order_is_execution_order", "masked_equals_cut", "costs_agree", "generation_agrees")
"""What every family runs under every unit. Two thirds of the other checks wait for `make slow`:
each family beyond QUICK runs them under one unit, and each unit meets them in a third of the
families.
"""


def cases() -> Iterator[Any]:
    """(family, unit, check) for all of them, with the lanes they run in."""
    for number, family in enumerate(FAMILIES):
        for unit, check in product(UNITS, CHECKS):
            marks = [] if family in QUICK else [pytest.mark.whole]
            if marks and check not in EVERYWHERE and unit != UNITS[number % len(UNITS)]:
                marks = [pytest.mark.slow]
            yield pytest.param(family, unit, check, marks=marks, id=f"{family}-{unit}-{check}")


sample = cache(build)


def copied(name: str) -> Sample:
    """A sample of its own: to copy one takes a third of the time of building it."""
    torch.manual_seed(0)
    return copy.deepcopy(sample(name))


@pytest.mark.parametrize(("family", "unit", "check"), cases())
def test_family(family: str, unit: str, check: str) -> None:
    CHECKS[check](partial(copied, family), unit)


LIKE_ANOTHER = (
    "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "jamba", "mistral4", "glm_moe_dsa",
    "mistral_large4", "youtu",
)  # fmt: skip
"""Variants with the experts and the attention of another one: in `make slow`."""


def variants() -> Iterator[Any]:
    """(variant, unit): each under one unit, under the others in `make slow`."""
    for number, variant in enumerate(VARIANTS):
        for unit in UNITS:
            own = unit == UNITS[number % len(UNITS)] and variant not in LIKE_ANOTHER
            mark = pytest.mark.whole if own else pytest.mark.slow
            yield pytest.param(variant, unit, marks=mark, id=f"{variant}-{unit}")


@pytest.mark.parametrize(("variant", "unit"), variants())
def test_variant(variant: str, unit: str) -> None:
    for check in ("order_is_execution_order", "masked_equals_cut"):
        CHECKS[check](partial(copied, variant), unit)


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
