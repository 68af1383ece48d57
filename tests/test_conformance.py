"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

from collections import defaultdict
from functools import cache, partial

import pytest

from vlprune.architectures import discover
from vlprune.architectures.layouts import NATIVE
from vlprune.layers import stock_name
from vlprune.testing import CHECKS, FAMILIES, VARIANTS, build

UNITS = ("head_dim", "qk_vo", "head")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, unit: str, check: str) -> None:
    CHECKS[check](partial(build, family), unit)


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


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_class_is_cut_natively_in_the_family_that_tests_it(name: str) -> None:
    family = NATIVE[name].family
    assert family in FAMILIES or family in VARIANTS
    for unit in UNITS:
        claimed = {"native" if getattr(NATIVE[name], unit) else "padded"}
        assert cut_as(family).get((name, unit)) == claimed, f"{name} under {unit} in {family}"
