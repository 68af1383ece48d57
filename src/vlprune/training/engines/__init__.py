"""Engines in a recipe: DeepSpeed or FSDP2, as Accelerate was told, for one training at a time.

``accelerate launch`` says by environment variables which engine trains, and how. An engine trains
the model that it was made for only, while a recipe measures, cuts and trains one model in turn. So
each training of a recipe has an engine of its own, which ends with it: from one training to the
next every process holds the whole model, in the dtype it had before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, RecipeError, UnsupportedError
from ...files import plain
from ...methods import Method
from ...recipe.spec import Recipe
from . import deepspeed, fsdp

__all__ = ["engine_for", "load_checkpoint", "need_engine", "refuse_other_engine"]

ENGINES = (deepspeed, fsdp)


def _engine() -> Any:
    """The module of the engine that Accelerate was told to use; None if it was told nothing."""
    return next((engine for engine in ENGINES if engine.is_wanted()), None)


def need_engine(recipe: Recipe, method: Method) -> None:
    """Raise UnsupportedError, or RecipeError, if the engine cannot train this recipe.

    Does nothing where no engine is wanted. All that stands against it is said at once.
    """
    engine = _engine()
    if engine is None:
        return
    engine.prepare()
    phases = {"train": recipe.train, "search": recipe.search, "retrain": recipe.retrain}
    against: list[str] = []
    for name, spec in phases.items():
        if not spec.on:
            continue
        if spec.ema:
            against.append(f"{name}.ema keeps an average beside the weights: leave it out")
        if spec.compile:
            against.append(
                f"{name}.compile: leave it out, {engine.NAME} changes how the model runs"
            )
        against += [f"{name}: {line}" for line in engine.contradictions(spec)]
    against += engine.refused(str(recipe.method["name"]), method)
    if against:
        raise RecipeError(
            f"{engine.NAME} cannot train this recipe.\n" + "\n".join(dict.fromkeys(against))
        )


@contextmanager
def engine_for(model: nn.Module) -> Iterator[None]:
    """A training of ``model`` by the wanted engine, made in the block, which ends with it.

    Afterwards the model has its weights as precisely as the engine knew them, whole in every
    process, in the dtypes and shapes that they had before. Does nothing else where no engine is
    wanted. Raises UnsupportedError where the engine would split weights that the objective reads.
    """
    engine = _engine()
    if engine is None:
        yield
        return
    reads = [type(m).__name__ for m in model.modules() if getattr(m, "reads_weights", False)]
    if reads and engine.splits_weights():
        raise UnsupportedError(
            f"this task's objective ({reads[0]}) keeps an average of the weights, which "
            f"{engine.NAME} divides among the processes: use DeepSpeed's ZeRO stage 2, or torchrun "
            "alone"
        )
    before = _Before(model)
    with engine.training(model):
        yield
        engine.end(model)  # not after an error, where other processes may not come here
        before.put_back()


class _Before:
    """Dtypes and shapes of a model's parameters, which an engine is about to take over.

    Neither engine can divide parameters without a dimension, so these become vectors of one number.
    Buffers stay in the dtype that they have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.scalars = {name for name, p in model.named_parameters() if not p.dim()}
        for name in self.scalars:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.reshape(1)

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.model.named_parameters():
            shape = () if name in self.scalars else parameter.shape
            parameter.data = parameter.data.reshape(shape).to(self.dtypes[name])


def refuse_other_engine(checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint that another engine has written than trains now."""
    engine = _engine()
    wrote = next((one for one in ENGINES if one.has_written(checkpoint)), None)
    if wrote is not engine:
        began, goes_on = (
            f"by {one.NAME}" if one else "without an engine" for one in (wrote, engine)
        )
        raise CheckpointError(
            f"the training in {plain(checkpoint.parent)} began {began} and is to go on {goes_on}: "
            "start it as it was begun, or remove that folder to begin it again"
        )


def load_checkpoint(model: nn.Module, checkpoint: Path) -> bool:
    """Load the weights that the engine wrote into a model without one; False if none is wanted.

    Raises CheckpointError if they cannot be read.
    """
    engine = _engine()
    if engine is None:
        return False
    engine.load_checkpoint(model, checkpoint)
    return True
