"""DeepSpeed in a recipe: the engine that Accelerate was told to use, for one training.

``accelerate launch`` says by environment variables that DeepSpeed trains, and how. An engine trains
the model that it was made for only, while a recipe measures, cuts and trains one model in turn. So
each training of a recipe has an engine of its own, which ends with it: from one training to the
next every process holds the whole model, in the dtype it had before.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cutting.zero import end_engine
from ..errors import CheckpointError, RecipeError, UnsupportedError
from ..files import plain, reason
from ..methods import Method
from ..recipe.spec import Recipe, Training

__all__ = ["config_of", "engine_for", "is_wanted", "load_checkpoint", "need_engine"]

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
    return _on(FLAG)


def _on(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("true", "1", "yes")


def need_engine(recipe: Recipe, method: Method) -> None:
    """Raise UnsupportedError, or RecipeError, if this recipe cannot be trained by DeepSpeed.

    Does nothing where DeepSpeed is not wanted. All that stands against it is said at once. FSDP,
    which Accelerate can be told to use in the same way, is refused.
    """
    if _on("ACCELERATE_USE_FSDP"):
        raise UnsupportedError(
            "accelerate was told to use FSDP, under which a recipe cannot measure and cut a model: "
            "divide its training by DeepSpeed instead (accelerate launch --use_deepspeed "
            "--zero_stage 3), start it by torchrun alone, or use FSDP2 in a loop of your own "
            "(docs/several-processes.md)"
        )
    if not is_wanted():
        return
    if find_spec("deepspeed") is None:
        raise UnsupportedError(
            "accelerate was told to use DeepSpeed, which is not installed: "
            "pip install 'vlprune[deepspeed]'"
        )
    phases = {"train": recipe.train, "search": recipe.search, "retrain": recipe.retrain}
    against: list[str] = []
    for name, spec in phases.items():
        if not spec.on:
            continue
        if spec.ema:
            against.append(f"{name}.ema keeps an average beside the weights: leave it out")
        if spec.compile:
            against.append(f"{name}.compile: leave it out, DeepSpeed wraps the model itself")
        against += [f"{name}: {line}" for line in _contradictions(_given(), spec)]
    if method.uses_held_out and _stage() == 3:
        against.append(
            f"the method {recipe.method['name']} changes weights in turn with training, which "
            "ZeRO stage 3 does not allow: use stage 2"
        )
    if against:
        raise RecipeError(
            "DeepSpeed cannot train this recipe.\n" + "\n".join(dict.fromkeys(against))
        )


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


def _stage() -> int:
    """The stage of ZeRO; 0 where the config does not say."""
    return int(_given().get("zero_optimization", {}).get("stage", 0))


def _decided(spec: Training) -> dict[str, Any]:
    """What a recipe decides of DeepSpeed's config."""
    return {
        "train_micro_batch_size_per_gpu": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "gradient_clipping": spec.clip,
        "bf16.enabled": spec.bf16,
        "fp16.enabled": spec.fp16,
    }


def _contradictions(config: Mapping[str, Any], spec: Training) -> list[str]:
    """A line for everything in the config that the recipe decides otherwise, or by itself."""
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
def engine_for(model: nn.Module) -> Iterator[None]:
    """A training of ``model`` by an engine of DeepSpeed, made in the block, which ends with it.

    Afterwards the model has its weights as precisely as the engine knew them, whole in every
    process, in the dtypes and shapes that they had before. Does nothing else where DeepSpeed is
    not wanted. Raises UnsupportedError where ZeRO stage 3 would split weights that the objective
    reads.
    """
    if not is_wanted():
        yield
        return
    flag = os.environ[FLAG]
    reads = [type(m).__name__ for m in model.modules() if getattr(m, "reads_weights", False)]
    if reads and _stage() == 3:
        raise UnsupportedError(
            f"this task's objective ({reads[0]}) keeps an average of the weights, which ZeRO stage "
            "3 divides among the processes: use stage 2"
        )
    before = _Before(model)
    try:
        with _tensors_only():
            yield
        end_engine(model)  # not after an error, where other processes may not come here
        before.put_back()
    finally:
        _forget(flag)


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


class _Before:
    """Dtypes and shapes of a model's parameters, which an engine is about to take over.

    DeepSpeed cannot send parameters without a dimension, so these become vectors of one number.
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
