"""A phase's optimizer, against a loop of one's own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprune.recipe.spec import Training
from vlprune.testing import build
from vlprune.training.fit import fit


@pytest.mark.parametrize("on", ["weights", "all"])
@pytest.mark.parametrize("rates", [{}, {"vit.*": 0.5}])
def test_what_decays_as_in_a_loop(on: str, rates: dict[str, float]) -> None:
    sample = build("vit")
    batch = {**sample.inputs, "labels": torch.tensor([0, 1])}
    own: Any = deepcopy(sample.model).train()
    named = dict(own.named_parameters())
    groups = [
        {
            "params": [parameter],
            "lr": 0.01 * (0.5 if rates and name.startswith("vit.") else 1.0),
            "weight_decay": 5.0 if on == "all" or not _undecayed(name) else 0.0,
        }
        for name, parameter in named.items()
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for _ in range(3):
        own(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    spec = Training(
        steps=3, batch_size=2, optimizer="sgd", learning_rate=0.01, weight_decay=5.0,
        weight_decay_on=on, warmup=0, clip=0, decay="constant", rates=rates,
    )  # fmt: skip
    fit(sample.model, [0, 1], lambda items, rng: batch, spec, seed=0)
    for name, value in sample.model.named_parameters():
        assert value.detach().flatten() == pytest.approx(
            named[name].detach().flatten(), abs=1e-5
        ), name


def _undecayed(name: str) -> bool:
    return "bias" in name or "layernorm" in name


def test_sgd_with_momentum_as_in_a_loop() -> None:
    sample = build("vit")
    batch = {**sample.inputs, "labels": torch.tensor([0, 1])}

    def collate(items: Any, rng: Any) -> dict[str, Tensor]:
        return batch

    own: Any = deepcopy(sample.model).train()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(4):
        own(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    spec = Training(
        steps=4, batch_size=2, optimizer="sgd", learning_rate=0.05, weight_decay=0,
        warmup=0, clip=0, decay="constant",
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in sample.model.named_parameters()}
    fit(sample.model, [0, 1], collate, spec, seed=0)
    wanted = dict(own.named_parameters())
    for name, value in sample.model.named_parameters():
        moved, move = value - before[name], wanted[name] - before[name]
        assert moved.detach() == pytest.approx(move.detach(), abs=1e-5), name
    assert any(not p.equal(before[n]) for n, p in sample.model.named_parameters())
