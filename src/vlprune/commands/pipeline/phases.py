"""The trainings of a run: of the dense model, during the search, of the small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from torch import nn

from ...architectures import discover
from ...errors import RecipeError
from ...folders.notes import hashed
from ...recipe.checks import Mistake, refusal
from ...recipe.spec import Recipe, Training
from ...structures.plan import Plan
from ...structures.structure import Structure
from ...training.fit import fit
from ...training.loading import Endless, length
from ...training.objective import Trainee
from ...training.regularise import regularised
from ...training.teacher import Taught
from .notes import deciding
from .problem import Problem

__all__ = [
    "Phase",
    "refuse_patterns",
    "retraining",
    "run_phase",
    "searching",
    "trainee_of",
    "training",
]


@dataclass(frozen=True)
class Phase:
    """One training.

    Logs lie in a folder called ``name``, and the bar says ``title``. ``key`` is the same for two
    runs only if one may go on from the other's checkpoints.
    """

    name: str
    title: str
    spec: Training
    key: str


def training(problem: Problem) -> Phase:
    """The training of the dense model."""
    return Phase("train", "training", problem.recipe.train, problem.basis.key)


def searching(problem: Problem) -> Phase:
    """The training that a search watches."""
    return Phase("search", "searching", problem.recipe.search, problem.key)


def retraining(problem: Problem, plan: Plan) -> Phase:
    """The training of the small model; its checkpoints fit only the plan it started from."""
    spec = problem.recipe.retrain
    return Phase(
        "retrain", "retraining", spec, hashed([problem.key, deciding(spec), plan.to_json()])
    )


def trainee_of(problem: Problem, model: Any, teacher: Any = None) -> nn.Module:
    """The module to train for ``model``: the task's objective, with a teacher if asked for."""
    recipe, trainee = problem.recipe, problem.task.objective(model)
    if teacher is None or not recipe.teacher:
        # what is trained is what computes the losses of held-out batches: an engine is made for it
        return trainee if isinstance(trainee, Trainee) else Trainee(trainee)
    structures = discover(teacher, recipe.attention).structures  # type: ignore[arg-type]
    return Taught(trainee, model, teacher, recipe.teacher, structures)


def run_phase(
    problem: Problem,
    phase: Phase,
    model: Any,
    trainee: nn.Module,
    items: Sequence[Any] | Endless,
    callbacks: Sequence[Any] = (),
    dense: Any = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place through its ``trainee``; returns the Trainer's log.

    Goes on from the phase's last whole checkpoint, if there is one. ``dense`` is the model before
    it was cut, if it was.
    """
    spec, recipe = phase.spec, problem.recipe
    if not spec.on:
        return []
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # BLIP's embeddings are added to in place
    steps = spec.count(length(items), PartialState().num_processes)
    structures: Sequence[Structure] = ()
    if spec.drop_path:  # a cut model's own attention can no longer be measured
        whole = model if dense is None else dense
        structures = discover(whole, recipe.attention, recipe.experts).structures  # type: ignore[arg-type]
    with (
        regularised(trainee, model, structures, spec.drop_path, spec.dropout),
        problem.progress.count(phase.title, steps) as advance,
    ):
        history = fit(
            trainee,
            items,
            problem.task.training_batch,
            spec,
            seed=problem.recipe.seed,
            report_to=problem.recipe.report_to,
            callbacks=callbacks,
            advance=advance,
            say=problem.progress.note,
            checkpoints=problem.work / f"{phase.name}-{phase.key}",
            logs=problem.out / "logs" / phase.name,
        )
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return history


def refuse_patterns(recipe: Recipe, model: nn.Module, structures: Sequence[Structure]) -> None:
    """Raise RecipeError now for drop path or dropout of any phase that the model has no place for.

    ``model`` is the dense one, with its structures. All that is wrong is said at once.
    """
    wrong = []
    for name in ("train", "search", "retrain"):
        spec = getattr(recipe, name)
        if spec.on:
            try:
                with regularised(model, model, structures, spec.drop_path, spec.dropout):
                    pass
            except RecipeError as error:
                wrong += [Mistake(f"{name}.{line}", f"{name}.{line}") for line in error.problems]
    if wrong:
        raise refusal(wrong)
