"""A recipe from data to folder: train, search, cut, retrain, measure, save."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from ...device import choose
from ...errors import RecipeError
from ...folders.save import (
    check_result,
)
from ...recipe.machine import need_logger
from ...recipe.spec import Recipe
from ...status import Progress
from ...training.adapters import need_peft
from ...training.engines import need_engine
from ...training.fit import prepare
from .dense import open_dense, train_dense
from .make import make_method
from .notes import refuse_overwriting
from .problem import Problem, read
from .result import full_report, measure_speed, save_result
from .search import earlier_cut, plan_search, retrain, search_and_cut
from .workplace import WORK, claimed, cleared, disk_errors_told

__all__ = ["compress"]


def compress(recipe: Recipe, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the recipe and fill ``out``; returns the report that is saved there.

    ``out`` becomes a folder that plain ``from_pretrained`` loads, with the dense model in
    ``out/dense``. If a run of the same recipe was stopped, it goes on from the last finished phase
    or checkpoint, and ends as if it had never been stopped.

    Raises CheckpointError if ``out`` cannot be written, or if another run is working in it;
    RecipeError if this machine cannot do what the recipe asks.
    """
    progress = progress or Progress()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    check_result(out)
    with disk_errors_told(out, "the last complete checkpoint"):
        return _compress(recipe, out, progress, started)


def _compress(recipe: Recipe, out: Path, progress: Progress, started: float) -> dict[str, Any]:
    prepare(recipe.seed, recipe.threads)
    device = choose(recipe.device)
    need_logger(recipe.report_to)
    if recipe.retrain.lora.rank:
        need_peft()
    method = make_method(recipe.method, 1 if recipe.method.get("round_to") == "auto" else None)
    need_engine(recipe, method)
    for spec in (recipe.train, recipe.search, recipe.retrain):
        if spec.fp16 and device.type == "cpu":
            raise RecipeError("fp16 needs a GPU: leave it out, or use bf16")
    alone = PartialState().is_main_process  # the other processes help it, in the same folder
    with claimed(out, progress.note) if alone else nullcontext(out / WORK) as work:
        refuse_overwriting(recipe, out)
        report = _run(read(recipe, method, out, work, device, progress), started)
        if alone:
            cleared(work)
        PartialState().wait_for_everyone()
    return report


def _run(problem: Problem, started: float) -> dict[str, Any]:
    """All steps of a run in order; impossible requests are refused before anything trains."""
    model, trained = open_dense(problem)
    small = earlier_cut(problem)
    search = plan_search(problem, model) if small is None else None
    trained = trained or train_dense(problem, model)
    dense = copy.deepcopy(model)  # the search cuts the model in place
    if search is not None:
        small = search_and_cut(problem, search, dense)
    assert small is not None
    small = retrain(problem, small, dense)
    speed = measure_speed(problem, dense, small.model)
    report = full_report(problem, trained, small, speed, time.monotonic() - started)
    return save_result(problem, small, report)
