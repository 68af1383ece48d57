"""The end of a run: timing the models, writing the report, filling the folder."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn

from ... import __version__
from ...cutting.sharing.materialize import (
    materialize,
)
from ...cutting.sharing.ties import (
    is_shared,
)
from ...device import device_name
from ...errors import UnsupportedError
from ...folders.ordinary import ordinary
from ...folders.save import (
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    save,
)
from ...measuring.bench import latencies
from ...measuring.memory import peak_memory
from ...reports.card import model_card
from .problem import Problem
from .search import Small

__all__ = ["Speed", "bytes_of", "full_report", "measure_speed", "save_result", "versions"]


@dataclass(frozen=True)
class Speed:
    """Seconds of a forward pass, {model: {batch size: seconds}}, and the bytes of each model."""

    seconds: Mapping[str, Mapping[int, float]]
    weight_bytes: Mapping[str, int]


def measure_speed(problem: Problem, dense: Any, small: Any) -> Speed:
    """Time the dense and the small model side by side."""
    problem.progress.phase("measuring speed")
    models = {"dense": dense, "small": small}
    if is_shared(small):
        models["materialised"] = materialize(copy.deepcopy(small))
    sizes = tuple(sorted({1, 16, problem.batch_size}))
    seconds = latencies(models, problem.task.example_inputs, sizes)
    return Speed(seconds, {name: bytes_of(model) for name, model in models.items()})


def full_report(
    problem: Problem, trained: Mapping[str, Any], small: Small, speed: Speed, took: float
) -> dict[str, Any]:
    """The search's report plus all else that the run knows; ``took`` is in seconds."""
    recipe, task = problem.recipe, problem.task
    report = copy.deepcopy(dict(small.report))
    if problem.timed:  # side by side: the compressor's own figures lie a training apart
        beside = {name: by_size[problem.batch_size] for name, by_size in speed.seconds.items()}
        report["budget"]["reached"] = beside["small"] / beside["dense"]
        report["budget"]["seconds"] |= beside
        for when in ("before", "after"):
            report["macs"][when] //= problem.batch_size
    if "calibration" in report:
        made = report["calibration"]["batches"] * recipe.calibration.batch_size
        most = made if task.streaming else len(task.train)
        report["calibration"]["items"] = min(recipe.calibration.items, most)
    return report | {
        "weight_bytes": dict(speed.weight_bytes),
        "task": recipe.task,
        "metric": task.metric,
        "metrics": {"dense": trained["metrics"], **small.metrics},
        "latency_seconds": speed.seconds,
        "device": device_name(problem.device),
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_memory(problem.device),
        "history": {"train": trained["history"], **small.history},
        "data": task.facts(),
        "notes": [*report["notes"], *filter(None, [task.left_out])],
        "seconds": round(took, 1),
        "versions": versions(),
    }


def save_result(problem: Problem, small: Small, report: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the folder of the result; returns the report that is saved there.

    For a uniform plan, the report says whether the model has an ordinary form; if so, that form is
    saved.
    """
    problem.progress.phase("saving")
    model, saved = small.model, dict(report)
    if problem.recipe.uniform:
        saved["ordinary"], model = _ordinary(model)
    extras = {
        REPORT_FILE: json.dumps(saved, indent=1) + "\n",
        RECIPE_FILE: problem.recipe.to_yaml(),
        "README.md": model_card(saved, type(model).__name__),
    }
    if saved.get("ordinary") == "":  # its config holds no plan any more
        extras[PLAN_FILE] = small.plan.to_json() + "\n"
    if PartialState().is_main_process:
        save(model, problem.out, extras=extras, processor=problem.task.processor)
    return saved


def _ordinary(small: Any) -> tuple[str, Any]:
    """Why the model has no ordinary form ("" if it has), and the model to save."""
    try:
        return "", ordinary(small)
    except UnsupportedError as error:
        return str(error), small


def bytes_of(model: nn.Module) -> int:
    """Bytes of all weights and index buffers, as held in memory and as saved."""
    tensors = model.state_dict().values()
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


def versions() -> dict[str, str]:
    """The versions of what computed the result."""
    return {
        "vlprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
