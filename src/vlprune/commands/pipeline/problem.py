"""The problem of a recipe: everything a run works with, built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...architectures import discover
from ...device import device_name, place
from ...files import plain
from ...folders.notes import hashed
from ...methods import Method
from ...prices.round_to import (
    best_round_to,
)
from ...recipe.spec import Recipe
from ...status import Progress
from ...tasks import Task
from ...training.ranks import agreed
from .make import make_method, make_task, split
from .notes import Basis, basis_of, known, remember, search_key

__all__ = ["Problem", "read"]


@dataclass(frozen=True)
class Problem:
    """A recipe, the place where it runs, and the objects made from it.

    ``items`` are trained on in the search, ``held_out`` are further batches that the search learns
    from; ``basis`` identifies the sources of the dense model.
    """

    recipe: Recipe
    out: Path
    work: Path
    device: torch.device
    progress: Progress
    task: Task
    method: Method
    basis: Basis
    items: Sequence[Any]
    held_out: Sequence[Any]

    @cached_property
    def key(self) -> str:
        """The same for two runs only if they make the same cut."""
        return search_key(self.recipe, self.basis, getattr(self.method, "round_to", 1))

    @property
    def timed(self) -> bool:
        """Whether the budget is a latency."""
        return "latency" in self.recipe.budget

    @property
    def batch_size(self) -> int:
        """The number of items in a forward pass that is priced."""
        return self.recipe.latency_batch_size if self.timed else 1

    @property
    def cut_folder(self) -> Path:
        """Where the cut model is kept until it has been retrained."""
        return self.work / f"cut-{self.key}"


def read(
    recipe: Recipe, method: Method, out: Path, work: Path, device: torch.device, progress: Progress
) -> Problem:
    """Read the data, and measure ``round_to`` where the recipe says ``auto``.

    ``method`` is the recipe's, with ``round_to=1`` in place of ``auto``.
    """
    progress.phase("reading data")
    with PartialState().main_process_first():
        task = make_task(recipe, out / "data")
    if task.left_out:
        progress.phase(task.left_out)
    basis = basis_of(recipe, task)
    items, held_out = split(task, recipe) if method.uses_held_out else (task.train, ())
    problem = Problem(
        recipe=recipe,
        out=out,
        work=work,
        device=device,
        progress=progress,
        task=task,
        method=method,
        basis=basis,
        items=items,
        held_out=held_out,
    )
    if recipe.method.get("round_to") == "auto":
        progress.phase("measuring which widths this device likes")
        return replace(problem, method=make_method(recipe.method, _fast_multiple(problem)))
    return problem


def _fast_multiple(problem: Problem) -> int:
    """The multiple of units that is fast here; measured once per run, by the first process."""
    task = problem.task
    attention: Any = problem.recipe.attention
    size = problem.recipe.latency_batch_size if problem.timed else 8
    key = hashed([problem.basis.model, attention, size, device_name(problem.device)])
    path = problem.work / "round-to.json"
    noted = known(path, key, problem.progress, f"the width in {plain(path)}")
    if noted is not None:
        return int(noted)

    def measured() -> int:
        model = place(task.dense_model(), problem.device)
        structures = discover(model, attention).structures
        multiple = best_round_to(model, structures, task.example_inputs(size), attention)
        remember(path, key, multiple)
        return multiple

    return agreed(measured)
