"""Seconds as a currency, on a clock that counts work instead of time, so that it cannot lie."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vlprune
from vlprune.errors import BudgetError, VlpruneError
from vlprune.prices import clock, latency
from vlprune.prices.prices import Prices, least
from vlprune.prices.select import select
from vlprune.testing import build

FAMILIES = ["clip", "blip_vqa", "bert", "detr", "llava"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_table_expects_is_what_the_cut_model_takes(
    family: str, worked: dict[str, float]
) -> None:
    """On the counting clock time is proportional to widths, so the table must be exact."""
    sample = build(family)
    attention = "head" if family == "llava" else "head_dim"
    description = vlprune.discover(sample.model, attention)  # type: ignore[arg-type]
    inputs = sample.inputs
    prices = vlprune.latency_prices(sample.model, description.structures, inputs, attention)
    before = clock.seconds_of(sample.model.eval(), inputs)
    assert prices.total == pytest.approx(before)
    assert any(len(set(curve)) > 2 for curve in prices.curve.values())
    keep = {
        s.name: range(latency.width_of(s.size, 0.5))
        for s in description
        if prices.curve[s.name][-1]
    }
    plan = vlprune.Plan(keep=keep, attention=attention)
    small = vlprune.rewrite(copy.deepcopy(sample.model), description.structures, plan)
    expected = prices.cost({name: len(units) for name, units in keep.items()})
    assert clock.seconds_of(small.eval(), inputs) == pytest.approx(expected, rel=0.02)


class Twice(nn.Module):
    """A model that is run twice in one forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        self.inner(**inputs)
        return self.inner(**inputs)


def test_a_layer_that_runs_twice_costs_twice(worked: dict[str, float]) -> None:
    sample = build("bert")
    once = vlprune.latency_prices(
        sample.model, vlprune.discover(sample.model).structures, sample.inputs
    )
    model = Twice(sample.model)
    twice = vlprune.latency_prices(model, vlprune.discover(model).structures, sample.inputs)
    for name, curve in once.curve.items():
        assert twice.curve[f"inner.{name}"][-1] == pytest.approx(2 * curve[-1])


def test_a_latency_budget_is_met_and_reported(worked: dict[str, float]) -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(
        sample.model, vlprune.Magnitude(), {"latency": 0.6}, example_inputs=sample.inputs
    )
    dense = compressor.prices.total
    compressor.finish()
    budget = compressor.report()["budget"]
    assert budget["asked"] == 0.6
    assert 0.5 < budget["reached"] <= 0.6 + 1e-9
    assert budget["seconds"]["small"] == pytest.approx(budget["reached"] * dense)
    assert budget["seconds"]["device"] == "cpu"
    assert budget["seconds"]["threads"] == torch.get_num_threads()
    assert budget["seconds"]["shapes"]["pixel_values"] == list(sample.inputs["pixel_values"].shape)


def test_measuring_changes_neither_the_model_nor_the_random_numbers() -> None:
    sample = build("vilt")
    before = copy.deepcopy(sample.model.state_dict())
    state = torch.get_rng_state()
    structures = vlprune.discover(sample.model).structures
    sample.model.train()
    vlprune.latency_prices(sample.model, structures, sample.inputs)
    assert sample.model.training
    assert bool((torch.get_rng_state() == state).all())
    for name, value in sample.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sample.model.modules())


class Attended(nn.Module):
    """A model around nn.MultiheadAttention, whose projections are never called as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.attn(hidden, hidden, hidden, need_weights=False)[0]


class Kernels(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", ["multihead", "bridgetower", "blip_vqa", "clip", "vilt"])
def test_the_stopwatch_times_the_kernels_that_run_without_it(family: str, cut: bool) -> None:
    if family == "multihead":
        torch.manual_seed(0)
        model, inputs = Attended().eval(), {"hidden": torch.randn(2, 5, 16)}
    else:
        sample = build(family)
        model, inputs = sample.model.eval(), sample.inputs
    description = vlprune.discover(model)
    structures = description.structures
    if cut:
        plan = vlprune.Plan(keep={s.name: range(max(1, s.size // 2)) for s in structures})
        vlprune.rewrite(model, description, plan)
    watch = clock.Stopwatch(model, structures)

    def calls() -> Counter[str]:
        with torch.no_grad(), Kernels() as kernels:
            torch.manual_seed(0)  # ViLT draws patches
            model(**inputs)
        return kernels.calls

    without = calls()
    with watch.running():
        watched = calls()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert watched == without
    attention = [name for name in watched if "attention" in name or "multi_head" in name]
    assert attention or not cut  # a cut model's attention is fused
    spans = watch.read()
    assert set(spans) <= {s.name for s in structures}  # BridgeTower does not use its last block
    assert len(spans) > len(structures) / 2
    assert min(spans.values()) > 0
    assert not any("forward" in m.__dict__ for m in model.modules())  # nothing stays behind


def test_the_stopwatch_keeps_a_forward_that_somebody_else_has_put_there() -> None:
    sample = build("clip")
    structures = vlprune.discover(sample.model).structures
    layer = sample.model.vision_model.encoder.layers[0].mlp.fc1
    calls = []
    plain = layer.forward

    def mine(inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(inputs)

    layer.forward = mine
    with clock.Stopwatch(sample.model, structures).running():
        sample.model(**sample.inputs)
    assert calls == [1]
    assert layer.forward is mine


def test_a_search_goes_on_with_the_table_it_began_with(
    worked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compressor() -> vlprune.Compressor:
        sample = build("clip")
        return vlprune.Compressor(
            sample.model, vlprune.UPop(), {"latency": 0.6}, example_inputs=sample.inputs
        )

    first = compressor()
    monkeypatch.setattr(clock.Clock, "now", lambda self: 3 * worked["done"])  # a slower machine
    second = compressor()
    assert first.prices.curve != second.prices.curve  # measured anew
    second.restore(first.state())
    assert second.prices == first.prices
    assert second.search.prices == first.prices  # type: ignore[attr-defined]
    assert second.search.problem.prices == first.prices


def test_a_curve_is_walked_down_by_what_each_unit_saves() -> None:
    # the first unit of a to go saves nothing, the second 4, the third 1; units of b save 1 each
    curve = {"a": (0.0, 5.0, 6.0, 10.0, 10.0), "b": (0.0, 1.0, 2.0)}
    prices = Prices("latency", {"a": 2.5, "b": 1.0}, {"a": 4, "b": 2}, 8.0, curve=curve)
    assert prices.total == 20
    scores = {"a": [4.0, 1.0, 3.0, 2.0], "b": [0.5, 9.0]}
    assert select(scores, prices, 19 / 20) == {"a": (0, 1, 2, 3), "b": (1,)}
    assert select(scores, prices, 18 / 20) == {"a": (0, 2), "b": (1,)}
    assert prices.cost({"a": 2, "b": (1,)}) == 15
    assert prices.whole("a") == 10
    assert least(prices) == pytest.approx((8 + 5 + 1) / 20)
    assert least(prices, round_to=2) == pytest.approx((8 + 6 + 2) / 20)
    with pytest.raises(BudgetError, match="latency cannot be reached"):
        select(scores, prices, 0.5)


def test_odd_widths_cost_their_measured_penalty() -> None:
    curve = np.array(latency.curve_between({8: 1.0, 16: 2.0, 24: 3.0}, 24, penalty=1.5))
    assert curve[[8, 16, 24]].tolist() == [1.0, 2.0, 3.0]
    assert curve[12] == pytest.approx(1.5 * 1.5)
    assert curve[23] == 3.0  # never above the whole
    assert curve[4] == pytest.approx(0.5 * 1.5)


def test_structures_of_a_group_keep_equally_many_units() -> None:
    prices = Prices("params", {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3, "b": 3, "c": 2}, 0.0)
    scores = {"a": [9.0, 1.0, 5.0], "b": [2.0, 8.0, 1.0], "c": [0.5, 3.0]}
    groups = {"a": "g", "b": "g"}
    # ranks of g: means (1, 3.5, 8.5), of c: 0.5, 3; c0 goes (7 left), then both lowest of g (5)
    assert select(scores, prices, 5 / 8, groups=groups) == {"a": (0, 2), "b": (0, 1), "c": (1,)}
    with pytest.raises(BudgetError, match="different sizes"):
        select(scores, prices, 5 / 8, groups={"a": "g", "c": "g"})


def test_a_model_that_shares_has_a_latency_too(worked: dict[str, float]) -> None:
    sample = build("clip")
    description = vlprune.discover(sample.model)
    text = [s for s in description if s.tower == "text" and s.kind == "ffn"]
    plan = vlprune.Plan(share={text[1].name: (text[0].name, range(10))})
    tied = vlprune.rewrite(sample.model, description, plan)
    compressor = vlprune.Compressor(
        tied, vlprune.Magnitude(), {"latency": 0.6}, example_inputs=sample.inputs
    )
    compressor.finish()
    assert compressor.report()["budget"]["reached"] <= 0.6 + 1e-9


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (vlprune.Magnitude(), {}, "needs example_inputs"),
        (vlprune.JSP(), {"held_out": [{}]}, "params or macs"),
    ],
)
def test_mistakes(method: Any, options: Any, says: str) -> None:
    sample = build("clip")
    if options:
        options["example_inputs"] = sample.inputs
    with pytest.raises(BudgetError, match=says):
        vlprune.Compressor(sample.model, method, {"latency": 0.5}, **options)


def test_a_model_without_weights_has_no_latency() -> None:
    sample = build("clip")
    structures = vlprune.discover(sample.model).structures
    with pytest.raises(VlpruneError, match="needs its weights"):
        vlprune.latency_prices(sample.model.to("meta"), structures, sample.inputs)
