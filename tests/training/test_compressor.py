"""The Compressor in a Trainer, in a loop of one's own, and with each baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.errors import BudgetError, RecipeError, UnsupportedError, VlpruneError
from vlprune.methods import Problem
from vlprune.testing import build

METHODS = [vlprune.Magnitude(), vlprune.Random(seed=3), vlprune.Taylor()]


def train(model: Any, callbacks: Any, tmp_path: Any, steps: int = 3, accumulate: int = 1) -> None:
    items = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 5} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=items, callbacks=callbacks
    )
    trainer.train()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("scope", ["global", pytest.param("uniform", marks=pytest.mark.slow)])
def test_every_baseline_in_a_trainer(method: Any, scope: str, tmp_path: Any) -> None:
    from dataclasses import replace

    model = build("vit").model
    before = sum(p.numel() for p in model.parameters())
    compressor = vlprune.Compressor(model, replace(method, scope=scope), {"params": 0.6})
    train(model, [compressor.callback()], tmp_path)
    assert not any(m._forward_hooks for m in model.modules())
    small = compressor.finish()
    after = sum(p.numel() for p in small.parameters())
    report = compressor.report()
    assert after <= 0.6 * before
    assert report["params"] == {"before": before, "after": after}
    assert report["budget"]["reached"] == pytest.approx(after / before)
    assert report["verified"]["difference"] < 1e-9  # the first training batch was the probe
    if scope == "uniform":
        shares = [g["kept"] / g["units"] for g in report["groups"]]
        assert max(shares) - min(shares) < 0.15


def test_a_loop_of_ones_own_and_a_macs_budget() -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(
        sample.model, vlprune.Taylor(), {"macs": 0.6}, example_inputs=sample.inputs
    )
    optimizer = torch.optim.SGD(sample.model.parameters(), lr=1e-3)
    for step in range(3):
        sample.model(**sample.inputs, return_loss=True).loss.backward()
        compressor.step((step + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
    small = compressor.finish()
    assert compressor.finish() is small
    macs = compressor.report()["macs"]
    assert macs["after"] <= 0.6 * macs["before"]
    counted = vlprune.cost.macs(small, (), sample.inputs)
    assert counted == macs["after"]


def test_accumulated_gradients_make_one_step(tmp_path: Any) -> None:
    model = build("vit").model
    compressor = vlprune.Compressor(model, vlprune.Taylor(), {"params": 0.6})
    train(model, [compressor.callback()], tmp_path, steps=2, accumulate=2)
    assert compressor.search.steps == 2  # type: ignore[attr-defined]


def test_taylor_scores_are_weight_times_gradient() -> None:
    sample = build("vit")
    model = sample.model
    labels = torch.tensor([1, 2])
    model(**sample.inputs, labels=labels).loss.backward()
    layer = model.vit.layers[0].mlp
    # gate u multiplies neuron u's pre-activation: the sum of weight x gradient over its rows
    want = (layer.fc1.weight * layer.fc1.weight.grad).sum(1) + layer.fc1.bias * layer.fc1.bias.grad
    model.zero_grad()
    with vlprune.Compressor(model, vlprune.Taylor(), {"params": 0.6}) as compressor:
        model(**sample.inputs, labels=labels).loss.backward()
        compressor.step(1.0)
    got = compressor.search.sums["vit.layers.0.mlp.fc1"]  # type: ignore[attr-defined]
    assert torch.allclose(got, want.abs(), atol=1e-6)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    model = build("vit").model
    compressor = vlprune.Compressor(model, vlprune.Taylor(), {"params": 0.6})
    search: Any = compressor.search
    bad = {s.name: torch.full((s.size,), float("nan")) for s in compressor.description}
    search.after_backward(0.5, bad)
    assert search.steps == 0
    with pytest.raises(VlpruneError, match="no finite gradient"):
        compressor.finish()


def test_magnitude_keeps_the_largest() -> None:
    model = build("vit").model
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[:40] *= 1e-3
        model.vit.layers[0].mlp.fc1.bias[:40] = 0
        model.vit.layers[0].mlp.fc2.weight[:, :40] *= 1e-3
    method = vlprune.Magnitude(scope="uniform")
    plan = vlprune.Compressor(model, method, {"params": 0.8}).plan()
    kept = plan.keep["vit.layers.0.mlp.fc1"]
    assert set(range(40, 48)) <= set(kept)


def test_random_depends_on_its_seed_alone() -> None:
    def plan(seed: int) -> Any:
        torch.manual_seed(torch.seed() % 1000)
        model = build("vit", seed=5).model
        return vlprune.Compressor(model, vlprune.Random(seed=seed), {"params": 0.5}).plan()

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: type(m).__name__)
def test_round_to_gives_multiples(method: Any) -> None:
    from dataclasses import replace

    model = build("vit").model
    plan = vlprune.Compressor(model, replace(method, round_to=4), {"params": 0.6}).plan()
    assert all(len(units) % 4 == 0 for units in plan.keep.values())


def test_what_cannot_be_done_is_said_at_once() -> None:
    sample = build("vit")
    with pytest.raises(BudgetError, match="example_inputs"):
        vlprune.Compressor(sample.model, vlprune.Magnitude(), {"macs": 0.5})
    for method in (*METHODS, vlprune.UPop(), vlprune.JSP(base="vision", other="vision")):
        with pytest.raises(BudgetError, match="ask for at least"):
            vlprune.Compressor(sample.model, method, {"params": 0.01})
    with pytest.raises(UnsupportedError, match="method must be"):
        vlprune.Compressor(sample.model, "magnitude", {"params": 0.5})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="no attention or FFN"):
        vlprune.Compressor(torch.nn.Linear(2, 2), vlprune.Magnitude(), {"params": 0.5})
    with pytest.raises(RecipeError, match="scope"):
        vlprune.Magnitude(scope="globl")
    with pytest.raises(RecipeError, match="Did you mean 'scope'"):
        vlprune.Magnitude(scop="global")  # type: ignore[call-arg]
    compressor = vlprune.Compressor(sample.model, vlprune.Taylor(), {"params": 0.5})
    with pytest.raises(VlpruneError, match="no gate was in place"):
        compressor.step(1.0)
    with pytest.raises(VlpruneError, match=r"after loss\.backward"):
        compressor.step(0.5)
    with pytest.raises(VlpruneError, match="from 0 to 1"):
        compressor.step(1.5)


def test_a_method_of_ones_own_is_one_class() -> None:
    from dataclasses import dataclass

    from vlprune.methods import OneShot, Search

    @dataclass(frozen=True)
    class First(OneShot):
        def start(self, problem: Problem) -> Search:
            method = self

            class FirstSearch(Search):
                def keep(self) -> dict[str, tuple[int, ...]]:
                    scores = {s.name: -torch.arange(s.size) for s in problem.structures}
                    return method.best(problem, scores)

            return FirstSearch(problem)

    model = build("vit").model
    plan = vlprune.Compressor(model, First(scope="uniform"), {"params": 0.6}).plan()
    assert all(units == tuple(range(len(units))) for units in plan.keep.values())
