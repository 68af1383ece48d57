"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

from functools import partial

import pytest

from vlprune.testing import CHECKS, FAMILIES, build

UNITS = ("head_dim", "qk_vo", "head")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, unit: str, check: str) -> None:
    CHECKS[check](partial(build, family), unit)
