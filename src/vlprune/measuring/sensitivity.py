"""How much each part of a model matters, and how far it can be cut, without training."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..architectures import discover
from ..calibration.session import Calibration, Session
from ..calibration.store import Originals
from ..cutting.gates import evaluating, gated, ones
from ..device import device_of, moved_to, place
from ..errors import BudgetError, DataError
from ..methods import OBS, Problem
from ..methods.base import standardised
from ..prices import cost
from ..structures.plan import Plan
from ..structures.structure import Structure, unit_of
from ..tasks import Task

__all__ = ["BUDGETS", "SHARES", "error_curve", "scan"]

SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)

BUDGETS = (0.9, 0.75, 0.6, 0.45)
"""The fractions of the whole model that :func:`error_curve` tries, if they can be reached."""


def scan(
    task: Task,
    model: Any,
    attention: str = "head_dim",
    batches: int = 4,
    batch_size: int = 32,
    shares: Sequence[float] = SHARES,
    advance: Callable[[int], None] = lambda done: None,
    experts: str = "neuron",
) -> dict[str, Any]:
    """The loss and the size of the model with one part at a time cut to each of ``shares``.

    A part is all attention, all FFN or all whole experts of a tower; ``"whole"`` is everything.
    Units are ranked by |d loss / d gate| over ``batches`` training batches (Taylor's score), the
    lowest are masked, and the loss is measured on as many test batches. Nothing is trained, so the
    losses show the damage before any repair. ``"curve"`` is that of :func:`error_curve` on the
    same training batches. ``advance(1)`` is called after each measurement. Raises DataError if
    there is no data. Not from the papers.
    """
    structures = discover(model, attention, experts).structures  # type: ignore[arg-type]
    prices = cost.param_prices(model, structures)
    objective = place(task.objective(model), device_of(model))
    parts: dict[str, list[Structure]] = {}
    for structure in structures:
        parts.setdefault(f"{structure.tower} {structure.kind}", []).append(structure)
    parts["whole"] = list(structures)
    with evaluating(objective):
        scores = standardised(
            structures, _scores(task, objective, model, structures, batches, batch_size)
        )
        test = _batches(task, task.test, batches, batch_size)
        base = _loss(objective, model, test)
        rows = []
        for name, members in parts.items():
            points = []
            for share in shares:
                gates = _masks(members, scores, share)
                with gated(model, structures, gates):
                    loss = _loss(objective, model, test)
                kept = {n: int(gate.sum()) for n, gate in gates.items()}
                points.append({"share": share, "params": prices.cost(kept), "loss": loss})
                advance(1)
            rows.append({"part": name, "units": sum(s.size for s in members), "points": points})
    return {
        "model": type(model).__name__,
        "params": prices.total,
        "loss": base,
        "test_items": min(len(task.test), batches * batch_size),
        "parts": rows,
        "curve": error_curve(
            model,
            structures,
            _batches(task, task.first_train(batches * batch_size), batches, batch_size),
            BUDGETS,
            advance,
        ),
    }


def error_curve(
    model: Any,
    structures: Sequence[Structure],
    batches: Sequence[Mapping[str, Any]],
    budgets: Sequence[float] = BUDGETS,
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[str, float]]:
    """How far the model's outputs move from their present ones when it is cut without training.

    One row per budget that can be reached: ``params`` that stay of the whole model, and the
    relative error of the outputs on held-out batches, ``masked`` with the units of OBS merely gone,
    and ``folded`` after the repair (docs/calibration.md). The model is put back after each budget.
    """
    prices = cost.param_prices(model, structures)
    session = Session(model, structures, Calibration(batches))
    attention: Any = unit_of(structures) or "head_dim"
    problem = Problem(tuple(structures), prices, 1.0, squares=dict)
    search = OBS().start(problem)
    search.calibrate(session)
    rows = []
    for budget in budgets:
        search.problem = replace(problem, budget=budget)
        try:
            plan = Plan(keep=search.keep(), attention=attention)
        except BudgetError:
            break
        originals = Originals(model)
        try:
            found = session.fold(plan, originals)
        finally:
            originals.put_back()
            originals.forget()
        kept = {s.name: len(plan.kept(s)) for s in structures}
        rows.append(
            {
                "params": prices.cost(kept) / prices.total,
                "masked": _mean_root(found.before),
                "folded": _mean_root(found.after),
            }
        )
        advance(1)
    return rows


def _mean_root(errors: Mapping[str, float]) -> float:
    """One figure for several outputs: the root of the mean of their squared errors."""
    return (sum(e * e for e in errors.values()) / max(1, len(errors))) ** 0.5


def _batches(task: Task, items: Sequence[Any], count: int, size: int) -> list[dict[str, Any]]:
    chosen = [items[i * size : (i + 1) * size] for i in range(count)]
    made = [
        task.collate(list(part), random.Random(number))
        for number, part in enumerate(chosen)
        if part
    ]
    if not made:
        raise DataError("there is no data to measure a loss on")
    return made


def _scores(
    task: Task, objective: Any, model: Any, structures: Any, batches: int, size: int
) -> dict[str, Tensor]:
    """|d loss / d gate| at gate 1, summed over batches: {structure: (size,)}."""
    total = {s.name: torch.zeros(s.size) for s in structures}
    for batch in _batches(task, task.first_train(batches * size), batches, size):
        device = device_of(model)
        gates = {n: place(g, device).requires_grad_() for n, g in ones(structures).items()}
        with gated(model, structures, gates):
            objective(**moved_to(model, batch))["loss"].backward()
        for name, gate in gates.items():
            if gate.grad is not None:
                total[name] += gate.grad.detach().abs().cpu()
    model.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def _loss(objective: Any, model: Any, batches: Sequence[dict[str, Any]]) -> float:
    losses = [float(objective(**moved_to(model, batch))["loss"]) for batch in batches]
    return sum(losses) / len(losses)


def _masks(
    members: Sequence[Structure], scores: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Gates that keep the best ``share`` of a part's units, and the least of each structure."""
    together = torch.cat([scores[s.name] for s in members])
    keep = max(1, round(share * len(together)))
    bar = together.topk(keep).values[-1]
    gates = {}
    for structure in members:
        values = scores[structure.name]
        mask = (values >= bar).float()
        mask[values.topk(structure.least).indices] = 1
        gates[structure.name] = mask
    return gates
