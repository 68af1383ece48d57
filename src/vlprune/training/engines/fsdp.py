"""FSDP2, told by ``accelerate launch --use_fsdp --fsdp_version 2``.

On CPUs Accelerate takes no notice of that and trains by DistributedDataParallel.
"""

from __future__ import annotations

import gc
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback

from ...cutting.fsdp import end_sharding, know_the_root
from ...cutting.rewrite import NO_SHARING
from ...cutting.sharing.ties import is_shared
from ...errors import CheckpointError, UnsupportedError
from ...files import plain, reason
from ...methods import Method
from ...recipe.spec import Training

__all__ = [
    "NAME",
    "contradictions",
    "end",
    "has_written",
    "is_wanted",
    "load_checkpoint",
    "prepare",
    "refused",
    "settle",
    "splits_weights",
    "training",
]

NAME = "FSDP"
WEIGHTS = "pytorch_model_fsdp.bin"
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def _on(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("true", "1", "yes")


def is_wanted() -> bool:
    """Whether Accelerate was told to train by FSDP, and has the devices for it."""
    from accelerate.utils import DistributedType

    without = (DistributedType.NO, DistributedType.MULTI_CPU)
    return _on("ACCELERATE_USE_FSDP") and PartialState().distributed_type not in without


def prepare() -> None:
    """Let every process load whole weights, which the first one alone would hold otherwise.

    Raises UnsupportedError for FSDP1.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedError(
            "accelerate was told to use FSDP1, whose flat weights cannot be cut: add "
            "--fsdp_version 2 (fsdp_version: 2 in its config file)"
        )
    os.environ[LOADING] = "false"


def contradictions(spec: Training) -> list[str]:
    """A line for what Accelerate's settings decide otherwise than the recipe."""
    wanted = "bf16" if spec.bf16 else "fp16" if spec.fp16 else "no"
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given not in ("no", wanted):
        return [f"accelerate was told mixed precision {given}, the recipe says {wanted}: give no"]
    return []


def refused(name: str, method: Method) -> list[str]:
    """A line for each setting of FSDP that does not go with a recipe, whatever the method."""
    lines = []
    if _on("FSDP_OFFLOAD_PARAMS"):
        lines.append("--fsdp_offload_params: leave it out, the model is measured where it lies")
    if _on("FSDP_ACTIVATION_CHECKPOINTING"):
        lines.append(
            "--fsdp_activation_checkpointing puts modules around the layers, whose names a search "
            "would no longer find: leave it out"
        )
    return lines


def splits_weights() -> bool:
    """Always: each process holds a part of every weight."""
    return True


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """A training by FSDP2, whose settings Accelerate forgets after it."""
    from accelerate.state import AcceleratorState

    try:
        with warnings.catch_warnings():
            # true while it trains only: the weights are whole again when layers come to share them
            warnings.filterwarnings("ignore", message=NO_SHARING)
            # nothing is changed in place in what the objective returns
            root = rf"FSDP2-wrapped module \(FSDP{type(model).__name__}\) returned a view"
            warnings.filterwarnings("ignore", message=root)
            yield
    finally:
        AcceleratorState._reset_state()
        gc.collect()  # torch's units and their modules refer to each other


def settle(trainer: Trainer) -> None:
    """Tell FSDP2 how to divide this model, before the training starts.

    A unit is a layer, unless Accelerate was told otherwise. What lies outside the layers is
    gathered for the whole forward of the objective, which may call parts of the model by
    themselves. Where layers share weights, all is one unit: a layer would look in vain for what
    another one holds. Checkpoints hold whole weights, which torch reads as tensors only: those in
    parts come with a pickle.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    assert trainer.model is not None
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if is_shared(trainer.model):
        plugin.auto_wrap_policy = None
    elif plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _layers(trainer.model)
    trainer.callback_handler.callbacks.insert(0, _Begin())


class _Begin(TrainerCallback):
    """Lets the model know the unit around it before a search looks for its weights."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        know_the_root(model)


def _layers(model: nn.Module) -> list[str]:
    """The classes whose modules stand in lists, but for torch's own: the layers of the towers."""
    inside = {
        type(layer)
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
    }
    return sorted(c.__name__ for c in inside if not c.__module__.startswith("torch."))


def end(model: nn.Module) -> None:
    """Let every process have the whole weights."""
    end_sharding(model)


def has_written(checkpoint: Path) -> bool:
    """Whether this checkpoint was written under FSDP."""
    return (checkpoint / WEIGHTS).is_file()


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint that was written under FSDP into a whole model.

    Raises CheckpointError if they cannot be read.
    """
    try:
        state = torch.load(checkpoint / WEIGHTS, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"FSDP's checkpoint {plain(checkpoint)} cannot be read ({reason(error)}): remove that "
            "folder, and the run goes on from the one before"
        ) from error
