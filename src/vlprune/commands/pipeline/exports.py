"""Exporting the model in a folder, on a task's batches or on made-up inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import UnsupportedError
from ...folders.exported.write import (
    check_export_place,
    export,
)
from ...folders.opening import (
    guarded,
    open_model,
)
from ...measuring.inputs import made_up_inputs
from ...recipe.spec import Recipe
from ...status import Progress
from ...tasks import Task
from .evaluate import open_folder

__all__ = ["export_folder"]

SIZES, TOKENS = (2, 3, 1), (16, 12, 8)
"""Batch sizes and text lengths that an export is traced and checked on."""
CALIBRATION = 256
"""Training items that int8 is calibrated on."""


def export_folder(
    folder: Path,
    to: str,
    out: Path | None = None,
    *,
    int8: bool = False,
    generation: bool = False,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the model in ``folder``; see :func:`vlprune.folders.exported.export`.

    With a ``recipe`` the export is traced and checked on batches of the recipe's test data and
    calibrated on its training data; otherwise all of this uses made-up inputs. It runs on the CPU,
    whatever device the recipe names.
    """
    progress = progress or Progress()
    transformers.utils.logging.disable_progress_bar()
    out = out or folder / f"{to}{'-int8' if int8 else ''}"
    check_export_place(out)
    progress.phase("loading")
    calibration: list[dict[str, Any]] = []
    if recipe is not None:
        task, model = open_folder(folder, replace(recipe, device="cpu"))
        with guarded(folder, "make batches for", UnsupportedError):
            samples, calibration = _batches(task, model, int8)
    else:
        model = open_model(str(folder))
        shapes = zip(SIZES, TOKENS, strict=True)
        samples = [made_up_inputs(model, size, tokens) for size, tokens in shapes]
    if generation:
        samples = [{n: v for n, v in one.items() if not n.startswith("dec")} for one in samples]
    progress.phase(f"exporting to {to} and checking it")
    facts = export(
        model, samples, to, out, int8=int8, generation=generation, calibration=calibration
    )
    return facts | {"out": str(out)}


def _batches(task: Task, model: Any, int8: bool) -> tuple[list[Any], list[Any]]:
    """Inputs to trace and check an export on, and those to calibrate int8 on."""
    samples = [_forward_inputs(model, task.example_inputs(size)) for size in SIZES]
    items = list(task.first_train(CALIBRATION)) if int8 else []
    batches = [task.collate(items[i : i + 8]) for i in range(0, len(items), 8)]
    return samples, [_forward_inputs(model, batch) for batch in batches]


def _forward_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a training batch that a forward pass without labels takes."""
    takes = inspect.signature(model.forward).parameters
    chosen = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name in takes and name != "labels"
    }
    if "decoder_input_ids" in takes and "decoder_input_ids" not in chosen:
        size = len(next(iter(chosen.values())))
        chosen["decoder_input_ids"] = made_up_inputs(model, size, 4)["decoder_input_ids"]
    return chosen
