"""The dense model of a run: opened or made, trained, and saved for runs to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from accelerate import PartialState

from ...folders.notes import NO_NOTE, note_text
from ...folders.save import (
    save,
)
from .evaluate import evaluated
from .make import model_from, new_model
from .notes import DENSE_NOTE, known_dense, remember
from .phases import run_phase, trainee_of, training
from .problem import Problem

__all__ = ["open_dense", "train_dense"]


def open_dense(problem: Problem) -> tuple[Any, Mapping[str, Any] | None]:
    """The dense model, and its metrics and log if an earlier run of the recipe trained it."""
    folder = problem.out / "dense"
    noted = known_dense(folder, problem.basis, problem.progress)
    if noted is None:
        return new_model(problem.task, problem.device), None
    problem.progress.phase("dense model: taken from an earlier run of this recipe")
    return model_from(folder, problem.task, problem.device), noted


def train_dense(problem: Problem, model: Any) -> Mapping[str, Any]:
    """Train the dense model in place and save it; returns its ``metrics`` and ``history``."""
    phase, history = training(problem), list[dict[str, float]]()
    if phase.spec.on:
        problem.progress.phase("training the dense model")
        trainee = trainee_of(problem, model)
        history = run_phase(problem, phase, model, trainee, problem.task.train)
    metrics = evaluated(problem.task, model, "evaluating dense", problem.progress)
    body = {"basis": asdict(problem.basis), "metrics": metrics, "history": history}
    processes, folder = PartialState(), problem.out / "dense"
    if processes.is_main_process:
        extras = {DENSE_NOTE: note_text(NO_NOTE)}
        save(model, folder, extras=extras, processor=problem.task.processor)
        remember(folder / DENSE_NOTE, problem.basis.key, body)
    processes.wait_for_everyone()
    return body
