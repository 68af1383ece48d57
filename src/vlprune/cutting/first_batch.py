"""The batch that a cut is proved on: a copy of the first training batch, ready to run again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

__all__ = ["copied", "is_cache", "run_inputs"]


def copied(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one forward pass by name, tensors copied to main memory at any depth.

    Objects that may change in the pass are copied too. Caches of keys and values are left out: the
    pass fills them, so a second pass would not start from the same state.
    """
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    plain = {name: _own(value) for name, value in given.items() if not is_cache(name, value)}
    copies: dict[str, Any] = recursively_apply(_copy, plain)
    return copies


VALUES = (Tensor, Mapping, list, tuple, str, bytes, int, float, complex, torch.dtype, torch.device)


def _own(value: Any) -> Any:
    """``value``, or a copy of it where it is an object with a state, if that can be copied."""
    if value is None or isinstance(value, VALUES):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock
        return value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", copy=True)


def run_inputs(
    model: nn.Module, inputs: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """``inputs`` for a model on ``device``, floating tensors in ``dtype``, without caches.

    Tensors are moved and cast at any depth; ``use_cache`` is False where the model takes it. Other
    objects are copies: the session of a tracker keeps what a pass computes, and the next pass would
    answer from it, whatever its weights are.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    plain = {name: _own(value) for name, value in inputs.items() if not is_cache(name, value)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        plain["use_cache"] = False
    ready: dict[str, Any] = recursively_apply(cast, plain)
    return ready


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument of this name holds keys and values, which a pass would add to."""
    by_class = any(cls.__name__ in ("Cache", "EncoderDecoderCache") for cls in type(value).__mro__)
    return by_class or name in (
        "past_key_values",
        "past_key_value",
        "cache_params",
        "cache_position",
    )
