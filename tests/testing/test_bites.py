"""The conformance suite fails when the code is broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from vlprune.architectures import attention
from vlprune.cutting import apply as surgery
from vlprune.cutting.rewrite import rewrite
from vlprune.testing import CHECKS, Sample, build, conformance

discovery = import_module("vlprune.architectures.discover")  # beside the function of that name
masked_equals_cut = CHECKS["masked_equals_cut"]


def test_the_unbroken_code_passes() -> None:
    masked_equals_cut(partial(build, "clip"), "head_dim")
    masked_equals_cut(partial(build, "blip"), "head_dim")


def test_a_bias_that_keeps_the_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = surgery.narrow

    def forgetful(model: Any, name: str, slices: Any, *args: Any) -> None:
        if name.endswith(".bias"):
            axes = slices.index[name]
            wrong = {axis: (torch.arange(len(index)), n) for axis, (index, n) in axes.items()}
            slices = surgery.Slices({name: wrong}, slices.scale)
        cut(model, name, slices, *args)

    monkeypatch.setattr(surgery, "narrow", forgetful)
    with pytest.raises(AssertionError, match="apart"):
        masked_equals_cut(partial(build, "clip"), "head_dim")


def test_a_bias_left_out_of_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = discovery.Discovery._row_slots
    monkeypatch.setattr(discovery.Discovery, "_row_slots", lambda *args: rows(*args)[:1])
    with pytest.raises(RuntimeError):
        masked_equals_cut(partial(build, "vit"), "head_dim")


def test_a_forgotten_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Block, "attrs", lambda *args: [])
    with pytest.raises(AssertionError, match="apart"):
        masked_equals_cut(partial(build, "vit"), "head_dim")


def test_a_forgotten_softmax_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = discovery.measure_projected
    monkeypatch.setattr(
        discovery, "measure_projected", lambda *args: replace(measure(*args), folds=())
    )
    with pytest.raises(AssertionError, match="apart"):
        masked_equals_cut(partial(build, "blip"), "head_dim")


def test_an_off_by_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = surgery.positions

    def shifted(slot: Any, size: int, units: Any) -> torch.Tensor:
        if slot.axis == 1:  # columns of the second projection only
            units = [(unit + 1) % size for unit in units]
        return positions(slot, size, units)

    monkeypatch.setattr(surgery, "positions", shifted)
    with pytest.raises(AssertionError, match="apart"):
        masked_equals_cut(partial(build, "clip"), "head_dim")


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("masked_equals_cut", float("nan")),
        ("masked_equals_cut", float("inf")),
        ("every_structure_alone_equals_its_mask", float("nan")),
        ("sharing_is_exact", float("nan")),
        ("folders_round_trip", float("nan")),
        ("a_second_cut_composes", float("nan")),
    ],
)
def test_a_small_model_that_answers_nan(
    check: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one place: ``max(0.0, nan)`` is 0.0, so a careless maximum takes it for no difference."""

    def poison(_module: Any, _inputs: Any, output: Any) -> Any:
        output.flatten()[0] = value
        return output

    def poisoned(model: Any, *args: Any, **kwargs: Any) -> Any:
        small = rewrite(model, *args, **kwargs)
        small.classifier.register_forward_hook(poison)
        return small

    monkeypatch.setattr(conformance, "rewrite", poisoned)
    with pytest.raises(AssertionError, match="NaN or infinite at"):
        CHECKS[check](partial(build, "vit"), "head_dim")


def test_outputs_that_are_nan_everywhere_prove_nothing() -> None:
    def broken() -> Sample:
        sample = build("vit")
        torch.nn.init.constant_(sample.model.classifier.bias, float("nan"))
        return sample

    for name in ("masked_equals_cut", "sharing_is_exact", "folders_round_trip"):
        with pytest.raises(AssertionError, match="nowhere finite"):
            CHECKS[name](broken, "head_dim")


def test_a_hook_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlprune.cutting.gates as gate

    monkeypatch.setattr(gate, "_take_off", lambda module: None)
    with pytest.raises(AssertionError, match="hook"):
        CHECKS["ones_change_nothing"](partial(build, "vit"), "head_dim")


def test_a_price_that_forgets_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlprune.prices.cost as cost

    prices = cost.param_prices

    def forgetful(model: Any, structures: Any) -> Any:
        kept = [replace(s, slots=s.slots[:-1]) for s in structures]
        return prices(model, kept)

    monkeypatch.setattr(cost, "param_prices", forgetful)
    with pytest.raises(AssertionError):
        CHECKS["costs_agree"](partial(build, "vit"), "head_dim")


def test_a_turn_that_forgets_the_bias_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the proof that every turn has is there to catch it."""
    from vlprune.calibration import rotate

    times = rotate._rows_times
    monkeypatch.setattr(
        rotate, "_rows_times", lambda model, rows, by: times(model, replace(rows, bias=""), by)
    )
    monkeypatch.setitem(rotate.ROUNDING, torch.float64, float("inf"))
    with pytest.raises(AssertionError, match="turning heads moved"):
        CHECKS["calibration_is_exact"](partial(build, "bert"), "qk_vo")


def test_a_repair_that_leaves_columns_of_units_that_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.calibration import fold

    write = fold._write

    def careless(layer: Any, made: Any, kept: torch.Tensor) -> None:
        before = fold.weight_of(layer).clone()
        write(layer, made, kept)
        gone = [column for column in range(before.shape[1]) if column not in kept.tolist()]
        with torch.no_grad():
            fold.weight_of(layer)[:, gone] = before[:, gone]

    monkeypatch.setattr(fold, "_write", careless)
    with pytest.raises(AssertionError, match="folded away still move"):
        CHECKS["calibration_is_exact"](partial(build, "clip"), "head")
