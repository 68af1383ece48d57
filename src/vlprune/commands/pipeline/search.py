"""The search, the cut, and the training of the small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from torch import nn

from ...calibration.session import Calibration
from ...cutting.gates import evaluating
from ...errors import RecipeError, UnsupportedError
from ...files import plain
from ...folders.opening import guarded
from ...folders.save import (
    PLAN_FILE,
    save,
)
from ...recipe.spec import Recipe
from ...structures.plan import Plan
from ...training.adapters import Adapters
from ...training.compressor import Compressor
from ...training.loading import length
from ...training.teacher import Taught
from .evaluate import evaluated
from .make import CalibrationBatches, model_from
from .notes import CUT_NOTE, known, remember
from .phases import refuse_patterns, retraining, run_phase, searching, trainee_of
from .problem import Problem

ADAPTER = "adapter"
"""The folder of adapters that are not merged, in the folder of the result."""

__all__ = ["Small", "earlier_cut", "plan_search", "retrain", "search_and_cut"]


@dataclass(frozen=True)
class Small:
    """The model that was cut, the plan, the search's report, and metrics and logs since then.

    ``metrics`` has a row ``cut``, then ``retrained``; ``history`` has ``search``, then ``retrain``.
    """

    model: Any
    plan: Plan
    report: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: Mapping[str, Any]


class OwnLoss:
    """The loss of a held-out batch, computed by the module that the search trains, once set."""

    trainee: nn.Module | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        assert self.trainee is not None
        with evaluating(self.trainee):  # queues and averages must not be updated
            return self.trainee(**batch)["loss"]


@dataclass(frozen=True)
class PlannedSearch:
    """A Compressor that waits for its training, and the loss of its held-out batches."""

    compressor: Compressor
    loss: OwnLoss


def plan_search(problem: Problem, model: Any) -> PlannedSearch:
    """Describe and price the model, and refuse now all that would fail after hours of training."""
    recipe, batch_size = problem.recipe, problem.batch_size
    loss, example = OwnLoss(), problem.task.example_inputs(batch_size)
    if problem.timed:
        problem.progress.phase(f"measuring the time of every width, batch {batch_size}")
    with guarded(recipe.model.path or "the model", "compress", UnsupportedError):
        compressor = Compressor(
            model,
            problem.method,
            recipe.budget,
            attention=recipe.attention,  # type: ignore[arg-type]
            experts=recipe.experts,  # type: ignore[arg-type]
            example_inputs=example,
            skip=recipe.skip,
            uniform=recipe.uniform,
            held_out=problem.held_out,
            loss=loss,
            calibration=_calibration(problem),
        )
    _refuse_early(recipe, compressor, length(problem.items))
    refuse_patterns(recipe, model, compressor.description.structures)
    return PlannedSearch(compressor, loss)


def _calibration(problem: Problem) -> Calibration | None:
    """What the cut is calibrated on, if the recipe says so; a run that goes on finds its steps."""
    if not problem.recipe.calibration.items:
        return None
    return Calibration(
        CalibrationBatches(problem.task, problem.recipe),
        work=problem.work / f"calibration-{problem.key}",
        key=problem.key,
        progress=problem.progress,
    )


def _refuse_early(recipe: Recipe, compressor: Compressor, items: int) -> None:
    if compressor.method.needs_training and not recipe.search.on:
        raise RecipeError(
            f"the method {recipe.method['name']} watches a training: give search.steps or "
            "search.epochs"
        )
    if recipe.search.on:
        compressor.search.expect(recipe.search.count(items, PartialState().num_processes))
    if recipe.teacher:
        model = compressor.model
        Taught(model, model, nn.Module(), recipe.teacher, compressor.structures)


def search_and_cut(problem: Problem, search: PlannedSearch, dense: Any) -> Small:
    """Train the Compressor's model while it searches, and cut it; ``dense`` may teach it."""
    phase, compressor = searching(problem), search.compressor
    calibrated = "calibrating" if problem.recipe.calibration.items else "planning"
    problem.progress.phase("searching" if phase.spec.on else calibrated)
    compressor.restart()  # with the trained weights, for methods that look at weights
    model = compressor.given
    search.loss.trainee = trainee = trainee_of(problem, model, dense)
    history = run_phase(problem, phase, model, trainee, problem.items, [compressor.callback()])
    model = compressor.finish()
    plan, report = compressor.plan(), compressor.report()
    metrics = evaluated(problem.task, model, "evaluating cut", problem.progress)
    small = Small(model, plan, report, {"cut": metrics}, {"search": history})
    costly = phase.spec.on or problem.recipe.calibration.items
    if costly and problem.recipe.retrain.on:
        _note_cut(problem, small)
    PartialState().wait_for_everyone()
    return small


def _note_cut(problem: Problem, small: Small) -> None:
    """Keep the cut model, so that a run that is stopped from now on need not search again."""
    if PartialState().is_main_process:
        save(small.model, problem.cut_folder)
        note = {
            "report": small.report,
            "metrics": small.metrics["cut"],
            "history": small.history["search"],
        }
        remember(problem.cut_folder / CUT_NOTE, problem.key, note)


def earlier_cut(problem: Problem) -> Small | None:
    """The cut model that an earlier run of the recipe has kept, if there is one."""
    folder = problem.cut_folder
    what = f"the cut model in {plain(folder)}"
    noted = known(folder / CUT_NOTE, problem.key, problem.progress, what)
    if noted is None:
        return None
    problem.progress.phase("cut model: taken from an earlier run of this recipe")
    return Small(
        model_from(folder, problem.task, problem.device),
        Plan.load(folder / PLAN_FILE),
        noted["report"],
        {"cut": noted["metrics"]},
        {"search": noted["history"]},
    )


def retrain(problem: Problem, small: Small, dense: Any) -> Small:
    """Train the small model in place, if the recipe says so; ``dense`` may teach it."""
    phase = retraining(problem, small.plan)
    if not phase.spec.on:
        return small
    problem.progress.phase("retraining")
    lora, adapters = phase.spec.lora, None
    if lora.rank:
        adapters = Adapters(small.model, lora, problem.recipe.seed)
    trainee = trainee_of(problem, small.model, dense)
    history = run_phase(problem, phase, small.model, trainee, problem.task.train, dense=dense)
    if adapters is not None and lora.merge:
        adapters.merge()
    metrics = evaluated(problem.task, small.model, "evaluating retrained", problem.progress)
    if adapters is not None and not lora.merge:
        if PartialState().is_main_process:
            adapters.save(str(problem.out / ADAPTER))
        adapters.remove()
    return replace(
        small,
        metrics={**small.metrics, "retrained": metrics},
        history={**small.history, "retrain": history},
    )
