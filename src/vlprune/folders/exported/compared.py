"""The proof of an export: it answers as the model does, on inputs of other sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...cutting.difference import difference, tensors_of
from ...errors import UnsupportedError
from .model import Exported
from .runtimes import denormals, own_forwards, sentence

__all__ = ["compared", "compared_stages"]


TOLERANCE = 1e-3
"""The largest accepted difference from PyTorch, relative to an output's largest value."""


FLOOR = 1e-3
"""An output is judged at its own scale: logits of a new head and entries of a normalised embedding
lie far below 1, where a floor of 1 would let an error of a few percent pass. Below this floor
TOLERANCE would ask for less than 1e-6, which is what float32 rounds values of order 1 to."""


def compared(
    model: Any, written: Exported, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """How far model and export differ, one row per sample: shapes, difference, fraction compared.

    Raises UnsupportedError if the export cannot take a sample, VerificationError if the outputs
    are not alike.
    """
    rows = []
    for sample in samples:
        torch.manual_seed(0)  # ViLT draws patches
        shapes = shapes_of(sample)
        try:
            ours, theirs = model(**sample), written(**sample)
        except Exception as error:
            raise UnsupportedError(
                f"the export cannot take inputs of other sizes, {shapes}: {sentence(error)}"
            ) from error
        rows.append({"shapes": shapes, **_row(ours, theirs)})
    return rows


def compared_stages(
    model: Any, written: Exported, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """How far model and export differ, one row per stage, on the inputs ``generate`` gives it.

    ``generate`` runs on the first sample. Raises VerificationError if the outputs are not alike.
    """
    apart = import_module("transformers.exporters.utils").decompose_for_generation
    rows = []
    with own_forwards(model):
        parts = apart(model, dict(samples[0]))
    for name, (part, inputs) in parts.items():
        ours = part(**copy.deepcopy(inputs))  # a cache among the inputs is written to
        runner = written.stages[name]
        taken = {n: v for n, v in inputs.items() if n in runner.metadata.kwargs}
        with denormals():
            theirs = runner(**copy.deepcopy(taken))
        rows.append({"stage": name, "shapes": shapes_of(inputs), **_row(ours, theirs)})
    return rows


def shapes_of(inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """{name: shape} of the tensors among the inputs."""
    return {name: list(v.shape) for name, v in inputs.items() if isinstance(v, Tensor)}


def _row(ours: Any, theirs: Any) -> dict[str, float]:
    """The figures of one comparison. Raises VerificationError where the outputs are not alike."""
    apart = difference(tensors_of(ours), tensors_of(theirs), floor=FLOOR)
    return {"difference": apart.relative, "compared": apart.compared}
