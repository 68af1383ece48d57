"""The metrics of the model in a folder, and how much each of its parts matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from ...architectures import discover
from ...device import choose, place
from ...errors import UnsupportedError
from ...files import write_text
from ...folders.exported.model import (
    Exported,
    is_export,
)
from ...folders.opening import guarded
from ...folders.place import check_file
from ...folders.weights import (
    check_weights,
)
from ...measuring.sensitivity import BUDGETS, SHARES, scan
from ...recipe.spec import Recipe
from ...status import Progress
from ...tasks import Task
from ...training.fit import prepare
from .make import make_task

__all__ = ["evaluate_folder", "evaluated", "open_folder", "scan_folder"]


def evaluated(task: Task, model: Any, title: str, progress: Progress) -> dict[str, float]:
    """The model's metrics on the task's test data; the bar says ``title``."""
    with progress.count(title, len(task.test)) as advance:
        return task.evaluate(model, advance)


def open_folder(folder: Path, recipe: Recipe, trust_remote_code: bool = False) -> tuple[Task, Any]:
    """The task of ``recipe``, and the model in ``folder`` on the recipe's device.

    An exported model stays where its runtime computes, which is the CPU.
    """
    transformers.utils.logging.disable_progress_bar()
    prepare(recipe.seed, recipe.threads)
    if is_export(folder):
        model = Exported(folder, trust_remote_code=trust_remote_code)
        return make_task(recipe, folder.parent / "data"), model
    device = choose(recipe.device)
    task = make_task(recipe, folder / "data")
    check_weights(folder)
    return task, place(task.load(folder), device)


def evaluate_folder(
    folder: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    results: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """The metrics of the model in ``folder`` on the test data of ``recipe``.

    ``results`` is a JSON file for the model's answer to each item, in the format of the task's
    evaluation server where the task has one. Raises UnsupportedError if the task cannot be
    evaluated on the model.
    """
    progress = progress or Progress()
    if results is not None:
        check_file(results)
    task, model = open_folder(folder, recipe, trust_remote_code)
    if task.left_out:
        progress.phase(task.left_out)
    with guarded(folder, f"evaluate on {recipe.task}", UnsupportedError):
        try:
            metrics = evaluated(task, model, "evaluating", progress)
            said = None if results is None else task.results(model)
        except AttributeError as error:
            if isinstance(model, Exported) and error.obj is model:
                raise UnsupportedError(
                    f"the task {recipe.task} calls {error.name} of the model, but an export is its "
                    "forward pass alone: evaluate the model's folder"
                ) from None
            raise
    if results is not None:
        write_text(results, json.dumps(said) + "\n")
    return metrics


def scan_folder(folder: Path, recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """How much each part of the model in ``folder`` matters, on the data of ``recipe``."""
    progress = progress or Progress()
    task, model = open_folder(folder, recipe)
    every = discover(model, recipe.attention, recipe.experts)  # type: ignore[arg-type]
    towers = {(s.tower, s.kind) for s in every}
    counted = progress.count("measuring", (len(towers) + 1) * len(SHARES) + len(BUDGETS))
    with guarded(folder, "measure the sensitivity of", UnsupportedError), counted as advance:
        return scan(task, model, recipe.attention, advance=advance, experts=recipe.experts)
