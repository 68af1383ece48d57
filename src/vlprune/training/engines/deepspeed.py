"""DeepSpeed, told by ``accelerate launch --use_deepspeed`` or a config file of its own."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...cutting.zero import end_engine
from ...errors import CheckpointError, RecipeError, UnsupportedError
from ...files import plain, reason
from ...methods import Method
from ...recipe.spec import Training

__all__ = [
    "NAME",
    "config_of",
    "contradictions",
    "end",
    "has_written",
    "is_wanted",
    "load_checkpoint",
    "prepare",
    "refused",
    "splits_weights",
    "training",
]

NAME = "DeepSpeed"
FLAG = "ACCELERATE_USE_DEEPSPEED"
SIZES = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
"""Sizes that a config may leave to the Trainer, which reads them off a config of a language model:
here DeepSpeed's own are taken."""


def is_wanted() -> bool:
    """Whether Accelerate was told to train by DeepSpeed."""
    return os.environ.get(FLAG, "").lower() in ("true", "1", "yes")


def prepare() -> None:
    """Raise UnsupportedError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise UnsupportedError(
            "accelerate was told to use DeepSpeed, which is not installed: "
            "pip install 'vlprune[deepspeed]'"
        )


def refused(name: str, method: Method) -> list[str]:
    """A line for what DeepSpeed cannot do for this method, called ``name`` in the recipe."""
    if method.uses_held_out and splits_weights():
        return [
            f"the method {name} changes weights in turn with training, which ZeRO stage 3 does not "
            "allow: use stage 2"
        ]
    return []


def splits_weights() -> bool:
    """Whether each process holds a part of the weights only, as in stage 3 of ZeRO."""
    return int(_given().get("zero_optimization", {}).get("stage", 0)) == 3


def _given() -> dict[str, Any]:
    """The config that Accelerate was given as a file, or makes of its own flags."""
    from accelerate.utils import DeepSpeedPlugin

    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    try:
        written = json.loads(Path(file).read_text(encoding="utf-8")) if file != "none" else {}
        config: dict[str, Any] = copy.deepcopy(DeepSpeedPlugin().hf_ds_config.config)
    except (OSError, ValueError) as error:  # json.JSONDecodeError is a ValueError
        where = f" {plain(Path(file))}" if file != "none" else ""
        raise RecipeError(f"DeepSpeed's config{where} cannot be used: {reason(error)}") from error
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        if name not in written:  # accelerate's own choice, which nobody has written down
            config[name] = "auto"
    return config


def _decided(spec: Training) -> dict[str, Any]:
    """What a recipe decides of DeepSpeed's config."""
    return {
        "train_micro_batch_size_per_gpu": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "gradient_clipping": spec.clip,
        "bf16.enabled": spec.bf16,
        "fp16.enabled": spec.fp16,
    }


def contradictions(spec: Training) -> list[str]:
    """A line for everything in the config that the recipe decides otherwise, or by itself."""
    config = _given()
    lines = [
        f"DeepSpeed's config has its own {section}: take it out, the recipe has one"
        for section in ("optimizer", "scheduler")
        if section in config
    ]
    if config.get("train_batch_size", "auto") != "auto":
        lines.append("DeepSpeed's config has a train_batch_size: give auto, the recipe decides it")
    for name, wanted in _decided(spec).items():
        section, _, last = name.rpartition(".")
        node = config.get(section, {}) if section else config
        if node.get(last, "auto") not in ("auto", wanted):
            lines.append(
                f"DeepSpeed's config says {name} = {node[last]}, the recipe {wanted}: give auto"
            )
    return lines


def config_of(spec: Training) -> dict[str, Any] | None:
    """DeepSpeed's config for one training of a recipe; None where DeepSpeed is not wanted."""
    if not is_wanted():
        return None
    config = _given()
    for name, value in _decided(spec).items():
        section, _, last = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[last] = value
    config.pop("train_batch_size", None)
    zero = config["zero_optimization"]
    for name in SIZES:
        if zero.get(name) == "auto":
            del zero[name]
    # the optimizer is torch's, whichever device its states lie on
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """A training by an engine, whose checkpoints are read as tensors; it is forgotten after it."""
    flag = os.environ[FLAG]
    try:
        with _tensors_only():
            yield
    finally:
        _forget(flag)


def end(model: nn.Module) -> None:
    """Let every process have the whole weights, as precisely as the engine knew them."""
    end_engine(model)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Have checkpoints read without running what is in them, which DeepSpeed itself does not ask.

    torch then refuses all classes but its own and those that DeepSpeed's checkpoints are made of.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    force = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(force)
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[force]
        else:
            os.environ[force] = before


def has_written(checkpoint: Path) -> bool:
    """Whether DeepSpeed wrote this checkpoint."""
    return (checkpoint / "latest").is_file()


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint that DeepSpeed wrote into a model without an engine.

    Raises CheckpointError if they cannot be read.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        model.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"DeepSpeed's checkpoint {plain(checkpoint)} cannot be read ({reason(error)}): remove "
            "that folder, and the run goes on from the one before"
        ) from error


def _forget(flag: str) -> None:
    """Let transformers and Accelerate forget an engine that has ended: models load whole again."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    os.environ[FLAG] = flag  # the Trainer takes it away
    gc.collect()  # an engine refers to itself
