"""The one measure of how far outputs lie apart: what it refuses and what it counts."""

from __future__ import annotations

import pytest
import torch

from vlprune.cutting.difference import difference
from vlprune.errors import IncomparableError, VerificationError

NAN, INF = float("nan"), float("inf")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_each_output_counts_at_its_own_scale() -> None:
    found = difference([t(100.0), t(1.0)], [t(100.5), t(1.25)])
    assert (found.largest, found.scale, found.relative) == (0.5, 100.0, 0.25)
    assert found.compared == 1


def test_a_small_output_counts_as_of_the_floor() -> None:
    pair = [t(0.01)], [t(0.02)]
    assert difference(*pair).relative == pytest.approx(0.01)
    assert difference(*pair, floor=1e-3).relative == pytest.approx(1)
    assert difference([t(1e-6)], [t(2e-6)], floor=1e-3).relative == pytest.approx(1e-3)


def test_what_is_not_finite_on_both_sides_is_left_out_and_told() -> None:
    found = difference([t(1, -INF, NAN, INF)], [t(1, -INF, NAN, INF)])
    assert (found.largest, found.compared) == (0, 0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_lowest_number_counts_as_minus_infinity_and_hides_nothing(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min
    one, other = (torch.tensor([value, low], dtype=dtype) for value in (1.0, 2.0))
    assert difference([one], [other]).relative == 1
    assert difference([one], [one]).compared == 0.5
    with pytest.raises(VerificationError, match="on one side only"):
        difference([one], [torch.ones(2, dtype=dtype)])


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ([t(1, 2)], [t(1, NAN)], "at 1 of its 2 places on one side only"),
        ([t(1, NAN)], [t(1, 2)], "at 1 of its 2 places on one side only"),
        ([t(1, 2)], [t(NAN, NAN)], "at 2 of its 2 places on one side only"),
        ([t(1, INF)], [t(1, -INF)], "infinities of another sign"),
        ([t(1, INF)], [t(1, NAN)], "NaN where the other side is infinite"),
        ([t(1)], [t(1, 2)], r"shape \(2,\), not \(1,\)"),
        ([t(1)], [], "1 outputs became 0"),
    ],
)
def test_outputs_that_are_not_alike_are_refused(
    one: list[torch.Tensor], other: list[torch.Tensor], says: str
) -> None:
    with pytest.raises(VerificationError, match=says):
        difference(one, other)


@pytest.mark.parametrize("outputs", [[], [t()], [t(NAN, NAN)], [t(1), t(-INF)]])
def test_where_nothing_can_be_compared_nothing_is_proved(outputs: list[torch.Tensor]) -> None:
    with pytest.raises(IncomparableError):
        difference(outputs, outputs)


def test_an_infinity_has_the_same_place_in_every_precision() -> None:
    found = difference([t(1, INF)], [t(1, INF).half()])
    assert found.compared == 0.5
