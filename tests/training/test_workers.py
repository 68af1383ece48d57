"""Batches of workers and of streams: the same bits whatever their number, and after a stop."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ranks import HEAD, launch
from vlprune.recipe.spec import Training
from vlprune.training.fit import fit
from vlprune.training.loading import Numbered, Seeded


class Noisy(nn.Module):
    """A layer with dropout, so that the weights depend on the global generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.dropout(self.layer(x), 0.5).square().mean()}


class Counted:
    """A stream of numbers that begins again after ten, as a data set does."""

    def endless(self, seed: int = 0) -> Iterator[int]:
        return (seed + number % 10 for number in itertools.count())


def collate(items: list[int], rng: random.Random) -> dict[str, Tensor]:
    rows = [[number, rng.random(), rng.random(), 1.0] for number in items]
    return {"x": torch.tensor(rows) / 10}


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trained(items: Any, spec: Training, **more: Any) -> list[float]:
    """The weights after the training; no worker is left."""
    model = Noisy()
    fit(model, items, collate, spec, seed=3, **more)
    gc.collect()
    assert not multiprocessing.active_children()
    return model.layer.weight.detach().flatten().tolist()


ITEMS = list(range(11))
KINDS = [
    pytest.param(ITEMS, id="list", marks=pytest.mark.slow),
    pytest.param(Counted(), id="stream"),
]


@pytest.mark.parametrize("items", KINDS)
def test_the_number_of_workers_changes_no_bit(items: Any) -> None:
    """Over several epochs, each of which starts workers anew or not."""
    whole = [
        trained(items, Training(steps=8, batch_size=3, accumulate=2, workers=workers))
        for workers in (0, 3)
    ]
    assert whole[0] == whole[1]
    assert whole[0] != trained(items, Training(steps=9, batch_size=3, accumulate=2))


@pytest.mark.parametrize("items", KINDS)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_training_that_is_stopped_goes_on_exactly(
    tmp_path: Path, items: Any, workers: int
) -> None:
    spec = Training(steps=9, batch_size=3, accumulate=2, save_steps=5, workers=workers)
    whole = trained(items, spec)
    place = {"checkpoints": tmp_path / "phase"}
    stopped = trained(items, spec, callbacks=[Stop(5)], **place)
    assert whole != stopped
    assert trained(items, spec, **place) == whole


def test_what_is_passed_over_is_not_read_twice() -> None:
    """A stream goes on where the step begins; a worker passes on the batches of its turn."""
    spec = Training(steps=9, batch_size=3, accumulate=2)
    assert [*itertools.islice(Numbered(Counted(), 0, spec, 1, 2), 4)] == [
        (12, 2), (13, 3), (14, 4), (15, 5)
    ]  # fmt: skip
    assert Numbered(Counted(), 0, spec, 4, 2).start == 2 * 2 * 3 * 4


def test_what_workers_get_can_be_sent_to_them() -> None:
    """Where processes are not forked, a loader pickles its data set and its collator."""
    spec = Training(steps=1, batch_size=2)
    for one in (Seeded(collate, 3), Numbered(Counted(), 3, spec, 1)):
        assert pickle.loads(pickle.dumps(one)).seed == 3


SCRIPT = (
    HEAD
    + """
import itertools
from vlprune.recipe.spec import Training
from vlprune.training.fit import fit
from test_workers import Counted, Noisy, collate

model = Noisy()
seen = []

def watched(items, rng):
    seen.extend(items)
    return collate(items, rng)

fit(model, Counted(), watched, Training(steps=3, batch_size=2, workers=WORKERS), seed=0)
result["seen"], result["weights"] = seen, model.layer.weight.flatten().tolist()
end()
"""
)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_processes_share_the_batches_of_a_stream(tmp_path: Path, python: Any, workers: int) -> None:
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n{SCRIPT}"
    found = launch(python, tmp_path, code.replace("WORKERS", str(workers)))
    if not workers:  # the loader looks one batch ahead
        assert [one["seen"][:6] for one in found] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1]]
    assert found[0]["weights"] == found[1]["weights"]
